"""One page per profile: claims on top, charts that can be asked, then every figure with its words,
its numbers and where it comes from. It needs no network and is never committed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from kelib import __version__
from kelib.config import load_profile, repository_root
from kelib.errors import KelibError
from kelib.figure_stages import REGIMES, figures_of
from kelib.published import published_profiles
from kelib.readme import controls_markdown, later_markdown, protocol_markdown
from kelib.readme_figures import FIGURES
from kelib.reference import SEARCH
from kelib.report_charts import charts, script
from kelib.report_figures import Figure, command, figure, link
from kelib.report_rows import primary
from kelib.report_text import html
from kelib.results import Tables, open_tables
from kelib.tables import read_provenance, write_atomically
from kelib.trajectory_profile import load_trajectory, trajectory_profiles

CLAIMS = "tab00_claims"
NAME = "report.html"
VERDICTS = {  # verdict -> how the page marks it, and what it means
    "reproduced": ("good", "the paper's direction, p < 0.05 after Holm, an effect that matters"),
    "contradicted": ("bad", "the same the other way round"),
    "absent": ("flat", "the 90 % interval lies inside what would not matter"),
    "undecided": ("open", "none of these: more seeds could tell"),
    "indicative": ("open", "fewer than five seeds, so no verdict"),
    "not testable here": ("none", "a condition fixed beforehand does not hold"),
}


@dataclass(frozen=True)
class Built:
    """A page that was written, and what is on it."""

    file: Path
    figures: list[str]
    missing: list[str]
    charts: list[str]


def build_report(
    name: str,
    source: str = "measurements",
    output: Path | None = None,
    expected: Iterable[str] = (),
) -> Built:
    """Write the page of profile ``name`` to ``output``, by default ``figures/<name>/report.html``.

    ``source="reference"`` takes the committed figures and tables instead of what ``make`` just drew
    and measured. ``expected`` are the figures that the profile should have, by default all that its
    tables give; those that are not drawn are named with the command that draws them. Raises
    KelibError if nothing was measured or drawn.
    """
    root, tables = repository_root(), open_tables(name, source)
    fresh = source == "measurements"
    folder = tables.output if fresh else tables.figures
    page = (output or root / "figures" / name / NAME).resolve()
    drawn = [path.stem for path in folder.glob("*.json") if not path.name.startswith(".")]
    if not drawn:
        raise KelibError(f"no figures in {folder}: run {_all(name)}")
    figures = [figure(stem, tables, folder, page, fresh) for stem in sorted(drawn, key=_place)]
    wanted = list(expected) or expected_figures(tables)
    missing = sorted({stem for stem in wanted if stem not in drawn}, key=_place)
    claims = pd.read_csv(folder / f"{CLAIMS}.csv") if CLAIMS in drawn else None
    shown = charts(tables, claims)
    text = _template().render(
        profile=name,
        fresh=fresh,
        lead=_lead(tables),
        claims=[] if claims is None else claims_rows(claims),
        no_claims="" if claims is not None else why_no_claims(tables, wanted),
        verdicts=VERDICTS,
        summary=_summary(claims),
        control=_words(tables, "control", page),
        protocol=_words(tables, "protocol", page),
        charts=shown,
        script=script() if shown else "",
        groups=_groups(figures),
        missing=[(stem, command(stem, name)) for stem in missing],
        tables=_tables(tables, page),
        everything=_all(name),
        here=_here(name, fresh),
        readme=link(root / "README.md", page),
        version=__version__,
    )
    write_atomically(page, text)
    return Built(page, [one.name for one in figures], missing, [chart.name for chart in shown])


def expected_figures(tables: Tables) -> list[str]:
    """The figures that a profile of any kind should have."""
    if tables.name == SEARCH:
        return ["ours_search"]
    if tables.name in published_profiles():
        return ["ours_published"]
    if tables.name in trajectory_profiles():
        continued = load_trajectory(tables.name).learning is not None
        return ["ours_trajectory", *(["ours_published_stages"] if continued else [])]
    named = repository_root() / "notebooks" / "params" / f"{tables.name}.yaml"
    profile = load_profile(tables.name) if named.exists() else tables.profile
    found = figures_of(profile)
    if profile.comparison is None:  # its table is there, but without a second family
        found = [name for name in found if name != "fig06_other_family"]
    return found


def claims_rows(claims: pd.DataFrame) -> list[dict[str, Any]]:
    """The primary claims as the page shows them: texts, and how the verdict is marked."""
    rows = []
    row: Any  # columns have no types of their own
    for row in primary(claims).itertuples():
        mark = _mark(row.verdict)
        known = pd.notna(row.mean)
        rows.append(
            {
                "statement": row.statement,
                "rate": f"{row.learning_rate:g}",
                "n": row.n,
                "effect": f"{row.mean:+.3f} {row.unit}" if known else "none",
                "interval": "none"
                if pd.isna(row.low95)
                else f"{row.low95:+.3f} … {row.high95:+.3f}",
                "verdict": row.verdict,
                "reason": row.reason if mark == "none" and pd.notna(row.reason) else "",
                "mark": mark,
                "paper": row.paper_value,
            }
        )
    return rows


def _lead(tables: Tables) -> str:
    name, seeds = tables.name, ", ".join(map(str, tables.seeds))
    if name in published_profiles() or name in trajectory_profiles():
        return "Models that were pretrained elsewhere, each of them one run."
    if len(tables.seeds) == 1:
        return f"One pretraining seed ({seeds}): what it shows is indicative at most."
    return f"{len(tables.seeds)} pretraining seeds ({seeds})."


def _mark(verdict: Any) -> str:
    # "indicative: ..." and "... at that rate only" are marked as what they begin with
    found = [mark for name, (mark, _) in VERDICTS.items() if str(verdict).startswith(name)]
    return found[0] if found else "open"


def why_no_claims(tables: Tables, wanted: Iterable[str]) -> str:
    """Why a page has no table of claims."""
    name = tables.name
    if name in published_profiles() or name in trajectory_profiles():
        return "It measures published models: one pretraining seed each, on which no verdict rests."
    if CLAIMS in wanted:
        return f"The table of claims is not drawn yet: {command(CLAIMS, name)}"
    if name == SEARCH or (tables.folder / f"{REGIMES[0]}.csv").exists():
        return "It compares recipes of pretraining. The claims are judged by profile study."
    return "It continues no checkpoint. The claims are judged by profile study."


def _place(name: str) -> tuple[int, str]:
    order = list(FIGURES)
    return (order.index(name) if name in order else len(order), name)


def _groups(figures: list[Figure]) -> list[tuple[str, str, list[Figure]]]:
    """Figures under headings: those of the paper, then those it does not have."""
    theirs = [one for one in figures if not one.ours and one.name != CLAIMS]
    ours = [one for one in figures if one.ours or one.name == CLAIMS]
    parts = [("paper", "Figures of the paper", theirs), ("ours", "Beyond the paper", ours)]
    return [(anchor, title, part) for anchor, title, part in parts if part]


def _summary(claims: pd.DataFrame | None) -> list[tuple[str, str, int]]:
    """Verdicts with their marks and how often each stands in the table, most frequent first."""
    if claims is None:
        return []
    counts = primary(claims)["verdict"].value_counts()
    return [(str(verdict), _mark(verdict), int(count)) for verdict, count in counts.items()]


def _words(tables: Tables, part: str, page: Path) -> str:
    """The control, or what differs from the paper's protocol, as the README has it (HTML)."""
    if (tables.folder / "continual.csv").exists() and "pretraining" in tables.parameters:
        if part == "control":
            text = f"{later_markdown(tables)}\n\n{controls_markdown(tables)}"
        else:
            text = protocol_markdown(tables.profile)
        return html(text, page.parent, repository_root())
    return ""


def _tables(tables: Tables, page: Path) -> list[dict[str, Any]]:
    """The measurement tables behind the page."""
    found = []
    for file in sorted(tables.folder.glob("*.csv")):
        note = read_provenance(file)
        found.append(
            {
                "name": file.name,
                "href": link(file, page),
                "rows": note.get("rows", ""),
                "sha256": note["sha256"][:12],
                "commit": str(note.get("commit", ""))[:12],
            }
        )
    return found


def _all(name: str) -> str:
    return "make search" if name == SEARCH else f"make figures PROFILE={name}"


def _here(name: str, fresh: bool) -> str:
    return (
        f"make report PROFILE={name}"
        if fresh
        else f"python -m kelib report {name} --source reference"
    )


def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kelib"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html")

"""The report: structure and links, its numbers against the tables, what it says is missing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pandas as pd
import pytest

from kelib import report_rows
from kelib.errors import KelibError
from kelib.report import build_report, expected_figures, why_no_claims
from kelib.report_figures import command, figure
from kelib.report_text import html, plain
from kelib.results import open_tables, read_figure_note
from kelib.seals import sealed

ROOT = Path(__file__).resolve().parents[1]
DRAWN = ROOT / "figures" / "reference"
PROFILES = ("small", "smollm2", "trajectory_smoke")
VOID = {"meta", "link", "img", "br", "hr", "input", "path", "line", "rect", "stop"}


@dataclass(eq=False)
class Page(HTMLParser):
    """What the tests ask of a page; the pictures of charts, which are SVG, are left out."""

    file: Path
    ids: list[str] = field(default_factory=list)
    headings: list[tuple[int, str]] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)  # what a browser would fetch by itself
    images: list[dict[str, str | None]] = field(default_factory=list)
    specs: list[dict] = field(default_factory=list)
    cells: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.text = self.file.read_text("utf-8")
        self.feed(self.text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if "id" in given:
            self.ids.append(str(given["id"]))
        if tag == "a":
            self.links.append(str(given["href"]))
        if tag in ("script", "img", "link", "iframe", "source"):
            self.loaded += [str(given[name]) for name in ("src", "href") if name in given]
        if tag == "img":
            self.images.append(given)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append((int(tag[1]), ""))
        if tag == "td":
            self.cells.append("")
        if tag not in VOID:
            data = given.get("type") == "application/json"
            self.open.append("spec" if data else tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() not in (tag, "spec" if tag == "script" else tag):
            pass

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "spec":
            self.specs.append(json.loads(data))
        if self.headings and self.open and re.fullmatch("h[1-6]", self.open[-1]):
            level, text = self.headings[-1]
            self.headings[-1] = (level, text + data)
        if "td" in self.open:
            self.cells[-1] += data.strip()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Page]:
    """Pages of the committed reference, by the command, which needs neither torch nor a plot."""
    folder = tmp_path_factory.mktemp("pages")
    files = {profile: folder / profile / "report.html" for profile in PROFILES}
    lines = ["import sys", "from kelib.__main__ import main"]
    for profile, file in files.items():
        given = ["report", profile, "--source", "reference", "--output", str(file)]
        lines.append(f"assert main({given!r}) == 0")
    lines.append("assert not {'torch', 'matplotlib'} & set(sys.modules)")
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert "report.html: 4 figures, 3 charts, " in said[0] and "opens from disk" in said[0]
    assert said[1].startswith("not drawn yet: fig01") and "fig08_layers" in said[1]
    assert len(said) == len(PROFILES) + 1  # of the others nothing is missing
    return {profile: Page(file) for profile, file in files.items()}


@pytest.fixture(params=PROFILES)
def page(request: pytest.FixtureRequest, pages: dict[str, Page]) -> Page:
    return pages[request.param]


@pytest.fixture
def small(pages: dict[str, Page]) -> Page:
    return pages["small"]


def drawn(profile: str) -> list[str]:
    return sorted(path.stem for path in (DRAWN / profile).glob("*.json"))


def profile_of(page: Page) -> str:
    return re.findall(r"profile <strong>(\w+)</strong>", page.text)[0]


# --- structure -------------------------------------------------------------------------------


def test_every_link_leads_somewhere(page: Page) -> None:
    inside = [link[1:] for link in page.links if link.startswith("#")]
    assert len(inside) > 5 and set(inside) <= set(page.ids)
    files = [urlsplit(link) for link in page.links if not link.startswith("#")]
    assert {part.scheme for part in files} <= {"", "https"}
    lost = [
        part.path
        for part in files
        if not part.scheme and not (page.file.parent / unquote(part.path)).is_file()
    ]
    assert lost == []


def test_page_fetches_nothing_and_holds_its_pictures(page: Page) -> None:
    assert [address for address in page.loaded if not address.startswith("data:")] == []
    assert not re.search(r"@import|url\((?!#)", page.text.split("</style>")[0])
    assert len(page.images) == len(drawn(profile_of(page)))
    for image in page.images:
        assert len(str(image["alt"])) > 40 and int(str(image["width"])) > 300
        assert int(str(image["height"])) > 100
        assert str(image["src"]).startswith("data:image/png;base64,")


def test_ids_are_unique_and_headings_in_order(page: Page) -> None:
    assert sorted({name for name in page.ids if page.ids.count(name) > 1}) == []
    levels = [level for level, _ in page.headings]
    assert not re.search(r"[a-z][.:][A-Z]", page.text.split("<main")[0].split("</style>")[1])
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert all(text.strip() for _, text in page.headings)


def test_every_figure_has_its_place_words_and_command(page: Page) -> None:
    profile = profile_of(page)
    for name in drawn(profile):
        assert name in page.ids and f"#{name}" in page.links
        assert f"<code>{command(name, profile)}</code>" in page.text
        note = json.loads((DRAWN / profile / f"{name}.json").read_text("utf-8"))
        assert note["digest"] in page.text and note["commit"][:12] in page.text
    assert "<strong>The paper" in page.text and "Drawn from another" not in page.text


def test_every_chart_has_a_specification_a_picture_and_words(page: Page) -> None:
    charts = [name for name in page.ids if name.startswith("chart-")]
    assert len(charts) == len(page.specs) > 0
    for spec in page.specs:
        assert spec["width"] == "container" and len(spec["description"]) > 40
    assert page.text.count('class="still" role="img" aria-label=') == len(charts)
    assert page.text.count('<script type="text/plain" id="vega">') == 1
    script = page.text.split('id="vega">')[1]
    assert "vegaEmbed" in script.split("</script")[0] and script.count("</script") == 2


def test_a_profile_without_claims_says_why(page: Page) -> None:
    profile = profile_of(page)
    reasons = {
        "smollm2": "one pretraining seed each",
        "trajectory_smoke": "one pretraining seed each",
    }
    assert ("No table of claims." in page.text) == (profile in reasons)
    assert reasons.get(profile, "What the verdicts mean") in page.text


# --- what it says ----------------------------------------------------------------------------


def test_claims_are_those_of_the_table(small: Page) -> None:
    claims = pd.read_csv(DRAWN / "small" / "tab00_claims.csv")
    shown = report_rows.primary(claims)
    assert 0 < len(shown) < len(claims)
    cells = small.cells[: 7 * len(shown)]
    for place, row in enumerate(shown.itertuples()):
        statement, rate, n, verdict, effect, interval, paper = cells[7 * place : 7 * place + 7]
        assert (statement, rate, n) == (row.statement, f"{row.learning_rate:g}", str(row.n))
        assert verdict.startswith(row.verdict) and effect == f"{row.mean:+.3f} {row.unit}"
        assert interval == "none" and paper == row.paper_value  # one seed


def test_missing_figures_are_named_with_what_draws_them(small: Page) -> None:
    missing = [
        name for name in expected_figures(open_tables("small")) if name not in drawn("small")
    ]
    assert "fig08_layers" in missing and "fig06_other_family" not in missing
    for name in missing:
        assert f"{name}: <code>make figures/small/{name}.json PROFILE=small</code>" in small.text


def test_words_of_another_profile_are_not_shown(small: Page, tmp_path: Path) -> None:
    """The committed notebook of Fig. 2 shows `study`: `small` has its own number, no words."""
    assert "What came out in words: run the command below." in small.text
    name = "fig02_knowledge_entropy"
    for kind in ("csv", "json"):
        shutil.copy(DRAWN / "study" / f"{name}.{kind}", tmp_path)
    other = figure(name, open_tables("study"), tmp_path, tmp_path / "x.html", fresh=False)
    assert "fell in" in other.outcome_html and "5 of 5 seeds" in other.here
    assert other.outcome_html not in small.text


def test_expected_figures_and_reasons_of_every_kind() -> None:
    families, regimes = open_tables("families"), open_tables("regimes")
    assert "continues no checkpoint" in why_no_claims(families, expected_figures(families))
    assert "compares recipes" in why_no_claims(regimes, expected_figures(regimes))
    command = "make figures/small/tab00_claims.json PROFILE=small"
    assert command in why_no_claims(open_tables("small"), ["tab00_claims"])
    assert expected_figures(open_tables("families")) == ["fig06_other_family"]
    assert expected_figures(open_tables("smollm2")) == ["ours_published"]
    both = ["ours_trajectory", "ours_published_stages"]
    assert expected_figures(open_tables("trajectory_smoke")) == both


def test_fresh_figure_has_its_executed_notebook_and_a_warning_when_stale(tmp_path: Path) -> None:
    name, tables = "fig05_resuscitation", open_tables("small")
    for kind in ("csv", "json", "pdf"):
        shutil.copy(DRAWN / "small" / f"{name}.{kind}", tmp_path)
    shutil.copy(ROOT / "notebooks" / f"{name}.ipynb", tmp_path)
    shown = figure(name, tables, tmp_path, tmp_path / "report.html", fresh=True)
    assert ("executed notebook", f"{name}.ipynb") in shown.files and shown.warnings == []
    assert ("PDF", f"{name}.pdf") in shown.files and shown.picture is None
    assert "q = 1 minus original" in shown.outcome_html and shown.questions
    note = read_figure_note(tmp_path / f"{name}.json")
    note["inputs"]["interventions"] = "0" * 64
    (tmp_path / f"{name}.json").write_text(json.dumps(sealed(note)), encoding="utf-8")
    shown = figure(name, tables, tmp_path, tmp_path / "report.html", fresh=True)
    assert shown.warnings == [
        "Drawn from another interventions.csv than the one that is there now."
    ]
    (tmp_path / f"{name}.json").write_text(json.dumps(sealed({})), encoding="utf-8")
    again = f"delete it and run make figures/small/{name}.json PROFILE=small"
    with pytest.raises(KelibError, match=re.escape(f"names no digest, inputs: {again}")):
        figure(name, tables, tmp_path, tmp_path / "report.html", fresh=True)
    (tmp_path / f"{name}.csv").write_text("changed", encoding="utf-8")
    shutil.copy(DRAWN / "small" / f"{name}.json", tmp_path)
    with pytest.raises(KelibError, match="changed after it was drawn"):
        figure(name, tables, tmp_path, tmp_path / "report.html", fresh=True)


def test_what_cannot_be_shown_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KelibError, match=r"no measurements of profile 'none'.*it has .*small"):
        build_report("none", "reference", tmp_path / "report.html")
    with pytest.raises(KelibError, match=r"source = 'both' must be one of measurements, reference"):
        build_report("small", "both", tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_markdown_is_safe_and_its_links_are_seen_from_the_page(tmp_path: Path) -> None:
    shown = html(
        "# T\n\n<script>x</script>\n\n[n](a.ipynb) K_CL\n\n| a |\n| - |\n| b |\n",
        tmp_path / "figures" / "p",
        tmp_path / "notebooks",
    )
    assert "<script" not in shown and "&lt;script&gt;" in shown and "<h4>T</h4>" in shown
    assert 'href="../../notebooks/a.ipynb"' in shown and "K_CL" in shown
    assert '<div class="scroll" tabindex="0" role="region"' in shown
    assert plain("*q* of `K_CL`") == "q of K_CL"


# --- charts ----------------------------------------------------------------------------------


def test_entropy_rows_sum_the_layers_of_each_checkpoint() -> None:
    tables = open_tables("small")
    rows, entropy = report_rows.entropy_rows(tables), tables.table("entropy")
    assert rows is not None
    total = rows[rows["choice"] == "sum over layers"].set_index("x")["nats"]
    expected = entropy.groupby("step")["entropy_nats"].sum()
    pd.testing.assert_series_equal(total, expected, check_names=False)
    assert set(rows["choice"]) == {"sum over layers", *(f"layer {n}" for n in range(1, 5))}
    stages = set(tables.table("continual")["stage_step"])
    assert set(rows.loc[rows["stage"], "x"]) == stages


@pytest.mark.parametrize(
    ("profile", "choice", "series"),
    [
        ("families", "gpt_neox, layer 4", "seed 104"),
        ("regimes", "seed 102", "weight decay 3"),
        ("smollm2", "every layer", "pubmed"),
        ("trajectory_smoke", "sum over layers", "generated:other"),
    ],
)
def test_entropy_rows_of_other_kinds(profile: str, choice: str, series: str) -> None:
    rows = report_rows.entropy_rows(open_tables(profile))
    assert rows is not None and choice in set(rows["choice"]) and series in set(rows["series"])
    assert rows["nats"].between(0, rows["bound"]).all()
    assert not rows.duplicated(["x", "series", "choice"]).any()


def test_outcome_rows_are_means_over_cl_seeds_less_their_controls() -> None:
    tables = open_tables("small")
    rows, runs = report_rows.outcome_rows(tables), tables.table("continual")
    assert rows is not None
    one = rows.iloc[0]
    same = (runs["stage_step"] == one["stage_step"]) & (
        runs["learning_rate"] == one["learning_rate"]
    )
    injected, without = (
        runs[same & (runs["injected"] == kind)].set_index("cl_seed") for kind in (True, False)
    )
    assert len(injected) > 1
    assert one["k_gain"] == pytest.approx((injected["k_cl"] - injected["k_pt"]).mean())
    assert one["k_injected"] == pytest.approx((injected["k_cl"] - without["k_cl"]).mean())
    assert one["acquisition"] == pytest.approx(100 * injected["acquisition"].mean())


def values(spec: dict) -> Iterator[dict]:
    """All rows of data in a specification."""
    for rows in spec.get("datasets", {}).values():
        yield from rows
    for layer in (spec, *spec.get("layer", [])):
        yield from layer.get("data", {}).get("values", [])


def test_effects_are_drawn_in_the_papers_direction(small: Page) -> None:
    claims = pd.read_csv(DRAWN / "small" / "tab00_claims.csv")
    shown = report_rows.primary(claims)
    found = [row for spec in small.specs for row in values(spec) if "scaled" in row]
    rows = {(row["statement"], row["rate"]): row for row in found}
    assert len(rows) == len(shown) and {-1, 1} == set(shown["direction"])
    for claim in shown.itertuples():
        row = rows[claim.statement, f"{claim.learning_rate:g}"]
        towards = claim.mean * claim.direction
        assert row["scaled"] == pytest.approx(towards / claim.smallest_effect, rel=1e-3, abs=1e-5)
        assert row["low"] <= row["scaled"] <= row["high"]
        assert row["tested"] == (claim.verdict != "not testable here")


# --- packaging -------------------------------------------------------------------------------


def test_templates_are_shipped_and_the_code_of_runs_is_left_alone() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    folder = ROOT / "kelib"
    shipped = {path for glob in settings["package-data"]["kelib"] for path in folder.glob(glob)}
    found = {path for path in (folder / "templates").rglob("*") if path.is_file()}
    assert found and found == shipped
    # a change of the report must not measure anything again
    words = "print-compute: ; @echo $(COMPUTE)"
    done = subprocess.run(
        ["make", "--no-print-directory", "--eval", words, "print-compute", "USE_ENV=1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "kelib/training.py" in done.stdout and "kelib/report" not in done.stdout

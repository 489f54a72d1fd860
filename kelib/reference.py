"""Promote a finished run to the committed reference, and refresh what quotes its numbers."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from kelib.config import load_profile, repository_root
from kelib.errors import KelibError, listing
from kelib.results import promote_files
from kelib.tables import read_provenance, read_table, write_atomically

TABLES = ("pretraining", "entropy", "checkpoints", "continual", "interventions")
START, END = "<!-- generated: {name} -->", "<!-- end of {name} -->"


def promote(profile: str) -> None:
    """Copy measurements to ``data/reference/<profile>`` and figures to ``figures/reference/<profile>``.

    Measurements are tables, their provenance and mean-coefficient vectors: no weights, no text. Then
    the figure notebooks are executed in place, so that their committed outputs come from these very numbers, and the
    generated parts of the README are written anew. Raises KelibError if a table or figure is missing, or
    was made with other parameters than the profile has now.
    """
    root, current = repository_root(), load_profile(profile)
    measured = root / "data" / "measurements" / profile
    for name in TABLES:
        read_table(measured / f"{name}.csv")  # complete and as written
        made_with = read_provenance(measured / f"{name}.csv")["parameters"]
        if made_with["profile"] != current.profile:
            raise KelibError(f"{name}.csv was made by profile {made_with['profile']}, not {profile}")
    drawn = root / "figures" / profile
    figures = sorted(p for p in drawn.glob("*.json") if not p.name.startswith("."))
    if not figures:
        raise KelibError(f"no figures in {drawn}: run make figures PROFILE={profile}")
    promote_files(
        [*(measured / f"{n}{s}" for n in TABLES for s in (".csv", ".json")),
         *sorted(measured.glob("coefficients-*.safetensors"))],
        root / "data" / "reference" / profile,
    )
    wanted = [p for j in figures for p in drawn.glob(f"{j.stem}.*") if p.suffix != ".ipynb"]
    promote_files(sorted(wanted), root / "figures" / "reference" / profile)
    for notebook in sorted((root / "notebooks").glob("*.ipynb")):
        execute_in_place(notebook)
    refresh_readme(root / "README.md", root / "figures" / "reference" / profile / "tab00_claims.csv")
    print(f"promoted {profile}: {len(TABLES)} tables, {len(figures)} figures; commit data/ and figures/")


def execute_in_place(notebook: Path) -> None:
    """Run a notebook with its own default parameters and keep the outputs in the file itself."""
    import nbformat
    from nbclient import NotebookClient

    content = nbformat.read(notebook, as_version=4)
    place = {"metadata": {"path": str(notebook.parent)}}
    NotebookClient(content, kernel_name="python3", timeout=900, resources=place).execute()
    for cell in content.cells:  # timings and machine-dependent notes would change at each run
        cell.metadata.pop("execution", None)
    content.metadata["language_info"] = {"name": "python"}
    write_atomically(notebook, nbformat.writes(content) + "\n")


def claims_markdown(claims: pd.DataFrame) -> str:
    """The primary claims as a Markdown table, one row per claim and learning rate."""
    lines = [
        "| claim | CL rate | n | effect | 95 % interval | verdict | the paper |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in claims[claims["primary"]].itertuples():
        interval = "none" if pd.isna(row.low95) else f"{row.low95:+.3f} … {row.high95:+.3f}"
        effect = "" if pd.isna(row.mean) else f"{row.mean:+.3f} {row.unit}"
        lines.append(
            f"| {row.statement} | {row.learning_rate:g} | {row.n} | {effect} | {interval} "
            f"| {row.verdict} | {row.paper_value} |"
        )
    return "\n".join(lines)


def replace_generated(text: str, name: str, content: str) -> str:
    """Replace what stands between the two markers called ``name``. KelibError if they are not there."""
    start, end = START.format(name=name), END.format(name=name)
    pattern = re.compile(re.escape(start) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(text):
        found = re.findall(r"<!-- generated: (\S+) -->", text)
        raise KelibError(f"no markers {start} … {end}; found {listing(found)}")
    return pattern.sub(lambda _: f"{start}\n{content}\n{end}", text)


def refresh_readme(readme: Path, claims: Path) -> None:
    """Write the claims table into the README."""
    content = claims_markdown(pd.read_csv(claims))
    write_atomically(readme, replace_generated(readme.read_text("utf-8"), "claims", content))

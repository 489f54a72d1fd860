"""Promote a finished run to the committed reference, and refresh what quotes its numbers."""

from __future__ import annotations

import ast
import os
from pathlib import Path
from typing import Any

from kelib.config import repository_root
from kelib.errors import KelibError, listing
from kelib.memories import REFERENCE as MEMORIES
from kelib.notebooks import skip_address_grammar
from kelib.readme import refresh_readme
from kelib.redaction import hidden
from kelib.results import Tables, open_tables, promote_files, read_figure_note
from kelib.schema import require_name
from kelib.sliders import REFERENCE as SLIDERS
from kelib.tables import check_vectors, read_provenance, read_table, write_atomically

SEARCH, BENCH = "search", "bench"
ALONE = (BENCH, MEMORIES, SLIDERS)  # tables of no profile, without figures


def promote(name: str) -> None:
    """Copy measurements to ``data/reference/<name>`` and figures to ``figures/reference/<name>``.

    ``name`` is a profile, ``search``, or one of :data:`ALONE`, which have no figures. Measurements
    are tables, their provenance and vectors of coefficients: no weights, no text. Stages that were
    not run are left out, and so are their figures. Then the notebooks that show these numbers when
    opened without parameters are executed in place, and the generated parts of the README are
    written anew. Raises KelibError if nothing was measured or drawn, if a table was changed after
    it was written, or if a figure was drawn from other tables.
    """
    require_name("profile", name)
    root = repository_root()
    measured, drawn = root / "data" / "measurements" / name, root / "figures" / name
    tables = sorted(path.stem for path in measured.glob("*.csv"))
    if not tables:
        there = sorted(path.parent.name for path in measured.parent.glob("*/entropy.csv"))
        raise KelibError(f"nothing was measured in {measured}; there are {listing(set(there))}")
    for table in tables:
        read_table(measured / f"{table}.csv")  # complete and as written
        check_vectors(measured / f"{table}.csv")
    tables_of = [measured / f"{t}{suffix}" for t in tables for suffix in (".csv", ".json")]
    vectors = sorted(measured.glob("coefficients-*.safetensors"))
    if name in ALONE:
        promote_files([*tables_of, *vectors], root / "data" / "reference" / name)
        for notebook in sorted((root / "notebooks").glob("*.ipynb")):
            if name in _parameters(notebook).values():
                execute_in_place(notebook)
        print(f"promoted {name}: {len(tables)} tables; commit data")
        return
    for table in tables:
        made_with = read_provenance(measured / f"{table}.csv")["parameters"]["profile"]
        if made_with != name:
            raise KelibError(
                f"{table}.csv was made by profile {made_with}, not {name}; run it again"
            )
    figures = _drawn_figures(name, drawn, measured)
    promote_files([*tables_of, *vectors], root / "data" / "reference" / name)
    wanted = [p for made in figures for p in drawn.glob(f"{made.stem}.*") if p.suffix != ".ipynb"]
    promote_files(sorted(wanted), root / "figures" / "reference" / name)
    for notebook in sorted((root / "notebooks").glob("*.ipynb")):
        if shown_profile(notebook) == name:
            execute_in_place(notebook)
    refresh(root)
    print(f"promoted {name}: {len(tables)} tables, {len(figures)} figures; commit data and figures")


def refresh(root: Path) -> None:
    """Write the generated parts of the README; the claims are those that their notebook shows."""

    def opened(name: str) -> Tables | None:
        notebook = root / "notebooks" / f"{name}.ipynb"
        profile = shown_profile(notebook) if notebook.exists() else None
        drawn = root / "figures" / "reference" / str(profile) / f"{name}.json"
        return open_tables(str(profile)) if drawn.exists() else None

    claims = opened("tab00_claims")
    if claims is not None:
        refresh_readme(root / "README.md", claims.name, opened)


def shown_profile(notebook: Path) -> str | None:
    """The profile that a figure notebook shows when opened without parameters (its default)."""
    if notebook.stem == "ours_search":  # which has a set of profiles, not one
        return SEARCH
    profile = _parameters(notebook).get("profile")
    return None if profile is None else str(profile)


def _parameters(notebook: Path) -> dict[str, Any]:
    """The literals of the cell tagged ``parameters``."""
    import nbformat

    found = {}
    for cell in nbformat.read(notebook, as_version=4).cells:
        if "parameters" in cell.metadata.get("tags", []):
            for node in ast.parse(cell.source).body:
                if isinstance(node, ast.Assign):
                    found[ast.unparse(node.targets[0])] = ast.literal_eval(node.value)
    return found


def _drawn_figures(name: str, drawn: Path, measured: Path) -> list[Path]:
    """Provenance files in ``drawn``, checked: figures are complete and of the tables measured."""
    command = "make search" if name == SEARCH else f"make figures PROFILE={name}"
    figures = sorted(path for path in drawn.glob("*.json") if not path.name.startswith("."))
    if not figures:
        raise KelibError(f"no figures in {drawn}: run {command}")
    for figure in figures:
        again = f"delete {figure.name} and run {command}"
        for suffix in (".pdf", ".png", ".csv"):
            if not figure.with_suffix(suffix).exists():
                raise KelibError(f"no {figure.stem}{suffix} in {drawn}: {again}")
        for table, sha256 in read_figure_note(figure)["inputs"].items():
            if read_provenance(measured / f"{table}.csv")["sha256"] != sha256:
                raise KelibError(f"{figure.stem} was drawn from another {table}.csv: {again}")
    return figures


def execute_in_place(notebook: Path) -> None:
    """Run a notebook with its own default parameters and keep the outputs in the file itself."""
    skip_address_grammar()
    import nbformat
    from nbclient import NotebookClient

    from kelib.plots_light import lighten

    content = nbformat.read(notebook, as_version=4)
    place = {"metadata": {"path": str(notebook.parent)}}
    os.environ.setdefault("KELIB_PROGRESS", "lines")  # a bar would leave each of its states behind
    quiet = ["--IPKernelApp.log_level=50"]
    NotebookClient(
        content,
        kernel_name="python3",
        timeout=900,
        resources=place,
        extra_arguments=quiet,
        coalesce_streams=True,  # else the pieces that one cell prints in differ from run to run
    ).execute()
    lighten(content.cells)
    for cell in content.cells:  # timings and machine-dependent notes would change at each run
        cell.metadata.pop("execution", None)
    content.metadata["language_info"] = {"name": "python"}
    write_atomically(notebook, hidden(nbformat.writes(content)) + "\n")


def execute_all(root: Path) -> None:
    """Execute every notebook in place, stages too (profile smoke in a temporary folder)."""
    for notebook in sorted((root / "notebooks").rglob("*.ipynb")):
        execute_in_place(notebook)

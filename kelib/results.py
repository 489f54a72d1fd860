"""Finished measurements, opened for drawing, and figures written with their provenance. No torch
here.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pandas as pd

from kelib.config import Profile, profile_from, repository_root
from kelib.errors import KelibError, listing
from kelib.schema import require_name
from kelib.seals import sealed, unsealed
from kelib.tables import provenance, read_provenance, read_table, write_atomically
from kelib.temporary import temporary_beside

if TYPE_CHECKING:
    from kelib.study import Study

SOURCES = {"reference": Path("data/reference"), "measurements": Path("data/measurements")}
FIRST = ("entropy.csv", "regimes.csv")  # tables of which every study has one, with its seeds


@dataclass(frozen=True)
class Tables:
    """Measurement tables in one folder, with the seeds and parameters that made them."""

    name: str
    seeds: tuple[int, ...]
    parameters: dict[str, Any]
    folder: Path
    output: Path

    def table(self, name: str) -> pd.DataFrame:
        """A measurement table, checked against its provenance."""
        return read_table(self.folder / f"{name}.csv")

    def optional(self, name: str) -> pd.DataFrame | None:
        """A measurement table, None where the profile has none of that name."""
        return self.table(name) if (self.folder / f"{name}.csv").exists() else None

    def inputs(self, names: list[str]) -> dict[str, str]:
        """sha256 of the named tables."""
        return {name: read_provenance(self.folder / f"{name}.csv")["sha256"] for name in names}

    @property
    def label(self) -> str:
        """Profile and seeds, as figures show them."""
        seeds = ", ".join(map(str, self.seeds))
        return f"profile {self.name} · pretraining seed {seeds}"

    @property
    def figures(self) -> Path:
        """Where the figures of these tables are, once they are drawn and promoted."""
        return repository_root() / "figures" / "reference" / self.name

    @classmethod
    def of(cls, found: Tables) -> Self:
        """The same tables as another class of them."""
        return cls(**{field.name: getattr(found, field.name) for field in fields(found)})

    @functools.cached_property
    def profile(self) -> Profile:
        """What the tables were made with, read from their provenance."""
        return profile_from(self.parameters)

    @functools.cached_property
    def study(self) -> Study:
        """The study behind the tables: its models, and the peak and stages of each seed."""
        from kelib.study import Study  # brings what handing out of runs needs

        return Study(self.profile, self.folder.parent.parent)


def open_tables(name: str, source: str = "reference") -> Tables:
    """Open the committed reference of a profile, or with ``source="measurements"`` what ``make``
    just computed.

    Figures drawn from fresh measurements go to ``figures/<name>``; figures drawn from the
    reference go to a temporary folder, for ``make reference`` alone writes the committed ones.
    """
    require_name("profile", name)
    if source not in SOURCES:
        raise KelibError(f"source = {source!r} must be one of {listing(SOURCES)}")
    root = repository_root()
    folder = root / SOURCES[source] / name
    first = next((folder / table for table in FIRST if (folder / table).exists()), None)
    if first is None:
        there = {p.parent.name for table in FIRST for p in folder.parent.glob(f"*/{table}")}
        raise KelibError(
            f"no measurements of profile {name!r} in {SOURCES[source]}; it has "
            f"{listing(there)}; run make figures PROFILE={name}"
        )
    if source == "reference":
        return tables_in(name, first, Path(tempfile.mkdtemp(prefix="kelib-figures-")))
    return tables_in(name, first, root / "figures" / name)


def tables_in(name: str, first: Path, output: Path) -> Tables:
    """The tables beside ``first``, whose provenance says seeds and parameters; figures drawn from
    them go to ``output``. Raises KelibError for a provenance without these.
    """
    note = read_provenance(first)
    seeds, parameters = note.get("seeds"), note.get("parameters")
    if not isinstance(seeds, list) or not isinstance(parameters, dict):
        raise KelibError(
            f"{first.with_suffix('.json')} must hold a list of seeds and a mapping of parameters, "
            f"it holds {listing(note)}; run its stage again"
        )
    return Tables(name, tuple(seeds), parameters, first.parent, output)


def save_figure(
    figure: Any, name: str, plotted: pd.DataFrame, results: Tables, inputs: list[str]
) -> dict[str, Any]:
    """Write ``name``.pdf, .png, .csv (the plotted numbers) and .json (provenance) into
    ``results.output``.

    An earlier JSON is removed first and the new one is written last, so that it stands for a
    complete set. Profile, seeds and digest are stamped into the corner of the figure. Returns the
    provenance.
    """
    require_name("figure", name)
    results.output.mkdir(parents=True, exist_ok=True)
    note = provenance(results.parameters, list(results.seeds), results.inputs(inputs))
    stamp = f"{results.label} · {note['digest']}"
    (results.output / f"{name}.json").unlink(missing_ok=True)
    figure.text(0.995, 0.003, stamp, ha="right", va="bottom", fontsize=6, color="0.35")
    for suffix in ("pdf", "png"):
        temporary = temporary_beside(results.output / f"{name}.{suffix}", suffix)
        # no creation date: the same numbers give the same file
        metadata = {"CreationDate": None} if suffix == "pdf" else {"Software": None}
        figure.savefig(temporary, dpi=200, metadata=metadata)
        temporary.replace(results.output / f"{name}.{suffix}")
    _write_numbers(plotted, results.output / f"{name}.csv", {**note, "figure": name})
    return note


def save_table(
    name: str, table: pd.DataFrame, results: Tables, inputs: list[str], **extra: Any
) -> None:
    """Write a table of the paper: ``name``.csv and .json (provenance) into ``results.output``."""
    require_name("table", name)
    note = provenance(results.parameters, list(results.seeds), results.inputs(inputs))
    _write_numbers(table, results.output / f"{name}.csv", {**note, **extra, "table": name})


def _write_numbers(table: pd.DataFrame, path: Path, note: dict[str, Any]) -> None:
    text = table.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    write_atomically(path, text)
    note = sealed({**note, "sha256": hashlib.sha256(text.encode()).hexdigest()})
    text = json.dumps(note, indent=1, sort_keys=True)
    write_atomically(path.with_suffix(".json"), text + "\n")


def read_figure_note(path: Path) -> dict[str, Any]:
    """The provenance of a figure (``path``, JSON), with the numbers beside it checked against it.

    Raises KelibError if one of the two is missing or is not what was written. What an older kelib
    wrote names no sha256, so that its numbers are taken as they are.
    """
    again = f"delete {path.name} and draw the figure again"
    try:
        note = unsealed(json.loads(path.read_text("utf-8")))
        found = hashlib.sha256(path.with_suffix(".csv").read_bytes()).hexdigest()
    except (OSError, ValueError, TypeError, RecursionError) as error:
        what = getattr(error, "filename", None) or path
        raise KelibError(
            f"{what} cannot be read ({getattr(error, 'strerror', None) or error}); {again}"
        ) from error
    if (wanted := str(note.get("sha256", found))) != found:
        raise KelibError(
            f"{path.with_suffix('.csv')} has sha256 {found[:12]}, its .json says "
            f"{wanted[:12]}: it was changed after it was drawn; {again}"
        )
    return note


def promote_files(files: list[Path], target: Path) -> None:
    """Replace ``target`` by copies of ``files``, by renames: it is never a mixture, and stays as
    it was if a file cannot be copied.
    """
    temporary, old = temporary_beside(target), temporary_beside(target, "old")
    for folder in (temporary, old):
        shutil.rmtree(folder, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for file in files:
            shutil.copy2(file, temporary / file.name)
        if target.exists():
            target.rename(old)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)

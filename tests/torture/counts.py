"""Rows of faults, and their counts: what the tables of the README are made from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from kelib.errors import KelibError
from kelib.tables import provenance, write_table

FOLDER = Path("data") / "torture"
REFERENCE = Path("data") / "reference" / "torture"
COLUMNS = ("fault", "case", "seed", "tried", "survived", "note", "of")
NOTE = 200  # characters kept in the counts


def append(row: Mapping[str, Any], path: Path) -> None:
    """Add a row to a fault's table, which begins with it if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame([row], columns=list(COLUMNS))
    table.to_csv(path, mode="a", header=not path.exists(), index=False)


def counts(folder: Path) -> pd.DataFrame:
    """A row for every case of every fault in ``folder``: ``fault, case, tried, survived, note``.

    ``tried`` and ``survived`` are sums over all calls. The note is that of the last time it was not
    survived, else the last one; none where every time has one of its own (kills). KelibError if
    there are no rows.
    """
    needed = {"fault", "case", "tried", "survived", "note"}
    tables = [pd.read_csv(path, keep_default_na=False) for path in sorted(folder.glob("*.csv"))]
    tables = [table for table in tables if needed <= set(table.columns)]
    if not tables:
        raise KelibError(f"no rows of faults in {folder}: run python -m tests.torture all first")
    found = []
    for (fault, case), rows in pd.concat(tables).groupby(["fault", "case"], sort=True):
        failed = rows[rows["survived"] < rows["tried"]]
        notes = failed["note"] if len(failed) else rows["note"]
        plain = notes.iloc[-1] if len(failed) or fault != "kills" else ""
        tried, survived = int(rows["tried"].sum()), int(rows["survived"].sum())
        found.append([fault, case, tried, survived, str(plain)[:NOTE]])
    return pd.DataFrame(found, columns=["fault", "case", "tried", "survived", "note"])


def promote(root: Path) -> pd.DataFrame:
    """Write the counts, and the differences between kinds of arithmetic, to ``data/reference``;
    return the counts. What was run (full or short, which targets) stands in the note beside."""
    from tests.benchmarks.harness import processor

    table = counts(root / FOLDER)
    of = {
        path.stem: sorted(set(pd.read_csv(path, keep_default_na=False)["of"]))
        for path in sorted((root / FOLDER).glob("*.csv"))
        if path.stem in set(table["fault"])
    }
    note = provenance({"of": of}, [], {})
    note["machine"] = {"processor": processor(), "cores": os.cpu_count()}
    write_table(table, root / REFERENCE / "faults.csv", note)
    measured = root / FOLDER / "differences.csv"
    if measured.exists():
        write_table(pd.read_csv(measured), root / REFERENCE / "differences.csv", note)
    return table

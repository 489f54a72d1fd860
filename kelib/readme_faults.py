"""The part of the README on faults and on machines: counts of what was tried, from the committed
tables of ``data/reference/torture`` and ``data/reference/machines``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kelib.tables import read_provenance, read_table

# fault -> what it is, in the order of the table
FAULTS = {
    "kills": "SIGKILL of make's process group, one process or all, then the same command again",
    "same": "the same run under another hash seed, path, locale, home or kind of processor",
    "resources": "no disk, memory, permission or network left, odd clocks, two at once, many runs",
    "corruption": "a flipped bit, a cut, a deletion or an exchange in every kind of file",
    "fuzz": "made-up or damaged input to every reader",
    "secrets": "tokens and keys planted in the environment, looked for in all that is written",
}


def faults_markdown(root: Path) -> str:
    """A row for every fault: cases, times tried, times survived; then what differs between
    machines. ``root`` is ``data/reference``. Raises KelibError if a table was changed.
    """
    lines = ["| fault | cases | tried | survived |", "| --- | --- | --- | --- |"]
    path = root / "torture" / "faults.csv"
    table = read_table(path)
    row: Any  # groups have no types of their own
    for fault, words in FAULTS.items():
        row = table[table["fault"] == fault]
        if len(row):
            tried, survived = int(row["tried"].sum()), int(row["survived"].sum())
            lines.append(f"| {fault}: {words} | {len(row)} | {tried:,} | {survived:,} |")
    machine = read_provenance(path)["machine"]
    said = f"Tried on {machine['cores']} cores ({machine['processor']})."
    return "\n".join([*lines, "", said, *_machines(root / "machines"), *_arithmetic(root)])


def _machines(folder: Path) -> list[str]:
    """Per profile: what the same runs on another kind of processor make of its quantities."""
    lines = []
    for path in sorted(folder.glob("*.csv")):
        table = read_table(path)
        runs = list(read_provenance(path)["parameters"]["runs"].values())
        median, largest = np.median(table["spread"]), table["spread"].max()
        most: Any = table.iloc[int(np.argmax(table["spread"]))]
        than = "less than another seed" if largest < 1 else "in places as much as another seed"
        lines += [
            "",
            f"**Between machines.** The same runs of `{path.stem}` on another kind of processor "
            f"differ in {len(table)} measured quantities by {median:.2f} standard deviations "
            "between pretraining seeds (median of root mean squares), by at most "
            f"{largest:.2f} ({most['table']}, {most['quantity']}): {than}.",
            *_spent(runs),
            *_judgements(runs),
        ]
    return lines


def _spent(runs: Iterable[Mapping[str, Any]]) -> list[str]:
    """What the runs on the other machine took, where it is known."""
    hours = [run["processor_hours"] for run in runs if run.get("processor_hours")]
    return [
        f"Its runs took {spent:.1f} hours of one core, {spent * 30:.0f} minutes of two."
        for spent in hours
    ]


_HEAD = ["| | committed | there | both, averaged by seed |", "| --- | --- | --- | --- |"]


def _row(row: Mapping[str, str]) -> str:
    sides = [row[side] for side in ("reference", "fresh", "both")]
    return f"| {row['statement']} ({row['unit']}) | {' | '.join(sides)} |"


def _judgements(runs: Iterable[Mapping[str, Any]]) -> list[str]:
    """Which verdicts and outcomes the other machine would change."""
    lines = []
    for found in (run["judgements"] for run in runs if "judgements" in run):
        changed = found["changed"]
        lines += [
            "",
            f"Judged by the tables of that machine alone, {len(changed)} of {found['compared']} "
            f"verdicts and outcomes would be others{':' if changed else '.'}",
            *(["", *_HEAD] if changed else []),
            *(_row(one) for one in changed),
        ]
    return lines


def _arithmetic(root: Path) -> list[str]:
    """What threads and older instructions change, where it was measured."""
    path = root / "torture" / "differences.csv"
    if not path.exists():
        return []
    parts = []
    rows: Any  # groups have no types of their own
    for case, rows in read_table(path).groupby("case", sort=False):
        worst: Any = rows.iloc[int(np.argmax(rows["mean_of_range"]))]
        parts.append(
            f"{case}: {(rows['changed'] > 0).sum()} of {len(rows)} quantities, in the mean by at "
            f"most {worst['mean_of_range']:.1e} "
            f"of the range of one ({worst['table']}, {worst['quantity']})"
        )
    return ["", "**On one machine** tables change under " + "; ".join(parts) + "."]

"""``python -m tests.benchmarks [GROUP] [--only ROW]``: run rows, print and keep the table."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kelib.config import repository_root
from kelib.errors import KelibError

from .harness import lines, run_row, write
from .rows import GROUPS, Row, find_row, rows_of

FOLDER = repository_root() / "data" / "measurements" / "bench"


def run_group(
    rows: list[Row], changes: Mapping[str, Any], threads: int, output: Path | None
) -> None:
    """Measure ``rows``, print a line as soon as a row is done, and write the table."""
    start, load = time.perf_counter(), os.getloadavg()[0]
    records: list[dict[str, Any]] = []
    for number, row in enumerate(rows):
        found = run_row(row, changes, threads)
        records += found
        for line in list(lines(found))[min(number, 1) :]:
            print(line, flush=True)
    judged = [record["met"] for record in records if record["met"]]
    minutes = (time.perf_counter() - start) / 60
    print(
        f"{judged.count('yes')} of {len(judged)} targets met, {minutes:.1f} minutes, load at start "
        f"{load:.1f}"
    )
    if output is not None:
        parameters = {
            "threads": threads,
            "rows": {row.name: {**row.settings, **changes} for row in rows},
        }
        write(records, output, parameters, load)
        print(f"written: {output}")


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, do it, return the exit status (0 also where a target is missed)."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    add = parser.add_argument
    add("group", nargs="?", help=f"{', '.join(GROUPS)} (default: all but fullsize)")
    add("--only", metavar="ROW", help="this row; no CSV unless --output is given")
    add("--repeats", type=int, metavar="N", help="rounds of timing instead of the row's own")
    add("--threads", type=int, default=1, metavar="N", help="threads a case (default %(default)s)")
    add("--output", type=Path, metavar="FILE.csv", help="instead of data/measurements/bench")
    add("--list", action="store_true", help="name the rows and stop")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.repeats is not None and chosen.repeats < 1:
            raise KelibError(f"--repeats {chosen.repeats} must be at least 1")
        if chosen.threads < 1:
            raise KelibError(f"--threads {chosen.threads} must be at least 1")
        if chosen.output is not None and not (chosen.only or chosen.group):
            raise KelibError("--output is one file: name a group or a row (--only) beside it")
        rows = rows_of(chosen.group)
        if chosen.list:
            print("\n".join(rows))
            return 0
        changes = {} if chosen.repeats is None else {"repeats": chosen.repeats}
        if chosen.only is not None:
            row = find_row(chosen.only, chosen.group)
            run_group([row], changes, chosen.threads, chosen.output)
            return 0
        # a model of full size takes many minutes and up to 20 GB: only when it is asked for
        usual = tuple(group for group in GROUPS if group != "fullsize")
        for group in usual if chosen.group is None else (chosen.group,):
            output = chosen.output or FOLDER / f"{group}.csv"
            run_group(list(rows_of(group).values()), changes, chosen.threads, output)
    except KelibError as error:
        print(f"kelib: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

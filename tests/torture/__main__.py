"""``python -m tests.torture FAULT``: faults on purpose, and whether they were survived.

Every fault is a module of this package whose ``rows(options)`` yields a row for each case, with
``case``, ``survived`` and ``note``, and ``tried`` where that is not 1. Rows are appended to
``data/torture/<fault>.csv``, so that the counts of all calls add up; the seed of the dice is
printed, and taken from the clock unless it is given. ``report`` counts the rows of all faults into
``data/reference/torture``. The exit status is 1 if a fault was not survived.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from kelib.config import repository_root
from kelib.errors import KelibError

from .counts import FOLDER, append, promote

# in the order of ``all``: those that take minutes first
FAULTS = ("corruption", "fuzz", "secrets", "resources", "same", "kills")


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    add = parser.add_argument
    add("fault", choices=[*FAULTS, "all", "report"])
    add("--count", type=int, default=20, help="faults, where they are drawn (default %(default)s)")
    add("--examples", type=int, default=10_000, help="of fuzz, a reader (default %(default)s)")
    add("--seed", type=int, help="of the dice (default: the clock)")
    add("--only", nargs="*", default=[], help="cases whose names hold one of these texts")
    add("--targets", nargs="*", default=["figures"], help="of make (default: %(default)s)")
    add("--short", action="store_true", help="one seed and shorter runs in profile smoke")
    add("--pause", type=float, default=12.0, help="mean seconds before a kill")
    add("--folder", type=Path, help="for the copies (default: a temporary one)")
    return parser


def _do(fault: str, options: argparse.Namespace) -> int:
    """How many cases of a fault were not survived."""
    rows: list[dict[str, Any]] = []
    of = " ".join(["short"] * options.short + options.targets)
    print(f"{fault}: seed {options.seed}, copies in {options.folder}", flush=True)
    module = importlib.import_module(f".{fault}", __package__)
    for found in module.rows(options):
        row = {"fault": fault, "seed": options.seed, "tried": 1, **found, "of": of}
        note = " ".join(str(row["note"]).split())
        for place, name in ((options.folder, "<folder>"), (repository_root(), "<repository>")):
            note = note.replace(str(place), name)
        row["note"] = note
        good = row["survived"] == row["tried"]
        word = "skipped" if not row["tried"] else "survived" if good else "NOT survived"
        print(f"{fault}, {row['case']}: {word}. {row['note']}", flush=True)
        append(row, repository_root() / FOLDER / f"{fault}.csv")
        rows.append(row)
    tried, survived = (sum(row[name] for row in rows) for name in ("tried", "survived"))
    skipped = sum(row["tried"] == 0 for row in rows)
    print(f"{fault}: {tried} tried, {survived} survived, {skipped} skipped", flush=True)
    return int(tried - survived)


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, do it, return the exit status."""
    options = _arguments().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that nothing stays mounted
    options.seed = int(time.time()) if options.seed is None else options.seed
    options.folder = options.folder or Path(tempfile.mkdtemp(prefix="kelib-torture-"))
    try:
        if options.fault == "report":
            print(promote(repository_root()).to_string(index=False))
            return 0
        chosen = FAULTS if options.fault == "all" else (options.fault,)
        return int(any([_do(fault, options) for fault in chosen]))
    except KelibError as error:
        print(f"kelib: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

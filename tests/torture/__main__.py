"""``python -m tests.torture kills --count N``: see :mod:`tests.torture.kills`.

Rows are appended to ``data/torture/<fault>.csv``, so that the counts of all calls add up; the seed
of the dice is printed, and taken from the clock unless it is given. The exit status is 1 if a fault
was not survived.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

from kelib.config import repository_root
from kelib.errors import KelibError

from .kills import Tree, kills, undisturbed

RESULTS = Path("data") / "torture"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("fault", choices=["kills"])
    parser.add_argument("--count", type=int, default=20, help="faults (default %(default)s)")
    parser.add_argument("--seed", type=int, help="of the dice (default: the clock)")
    parser.add_argument("--pause", type=float, default=12.0, help="mean seconds before a kill")
    parser.add_argument("--targets", nargs="*", default=["figures"], help="of make")
    parser.add_argument("--folder", type=Path, help="for the copies (default: a temporary one)")
    chosen = parser.parse_args(arguments)
    seed = int(time.time()) if chosen.seed is None else chosen.seed
    folder = chosen.folder or Path(tempfile.mkdtemp(prefix="kelib-torture-"))
    print(f"{chosen.fault}: seed {seed}, copies in {folder}", flush=True)
    try:
        expected = undisturbed(Tree(folder / "undisturbed", chosen.targets))
        rows = []
        tree = Tree(folder / "killed", chosen.targets)
        for row in kills(tree, expected, chosen.count, seed, chosen.pause):
            print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
            rows.append({"seed": seed, **row})
            _append(pd.DataFrame([rows[-1]]), chosen.fault)
    except KelibError as error:
        print(f"kelib: {error}", file=sys.stderr)
        return 1
    ended = [row for row in rows if row["what"] == "ended"]
    alive = sum(row["alive"] for row in rows)
    bad = [row for row in ended if not row["same"] or row["leftovers"]]
    print(
        f"{sum(row['what'] == 'killed' for row in rows)} kills, {len(ended)} runs to the end, "
        f"{len(bad)} of them not as undisturbed; {alive} processes outlived their parent"
    )
    return 1 if bad or alive else 0


def _append(table: pd.DataFrame, fault: str) -> None:
    path = repository_root() / RESULTS / f"{fault}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, mode="a", header=not path.exists(), index=False)


if __name__ == "__main__":
    sys.exit(main())

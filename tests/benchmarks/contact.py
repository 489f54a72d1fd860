"""``python -m tests.benchmarks.contact``: what a newcomer waits for, from ``git clone`` on.

Clones the last commit into an empty folder and calls there what the README says, one step after the
other: the environment with nothing taken from pip's cache, the first figure of profile ``smoke``,
the rest of that profile. Seconds waited and seconds of processors are kept, with the size of the
clone and of the environment, in ``data/measurements/bench/contact.csv``. Nothing else should run.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd

from kelib.config import repository_root
from kelib.errors import KelibError
from kelib.tables import provenance, write_table

from .__main__ import FOLDER
from .harness import processor

FIRST = "figures/smoke/fig02_knowledge_entropy.json"
STEPS = {
    "clone": ["git", "clone", "--quiet", "--no-local", str(repository_root()), "."],
    "environment": ["make", "env"],
    "first figure": ["make", FIRST, "PROFILE=smoke"],
    "all figures of smoke": ["make", "-j2", "figures", "PROFILE=smoke"],
}
# an active environment, or a make that calls this, would be found again by the clone's make
LEFT_OUT = ("VIRTUAL_ENV", "PYTHONPATH", "MAKEFLAGS", "MAKELEVEL", "MFLAGS", "USE_ENV")


def contact(folder: Path) -> pd.DataFrame:
    """Do :data:`STEPS` in an empty ``folder``: a row each, ``step, seconds, cpu_seconds,
    megabytes`` (of what that step added). KelibError with the last lines of a step that fails.
    """
    environment = {name: value for name, value in os.environ.items() if name not in LEFT_OUT}
    environment |= {"PIP_NO_CACHE_DIR": "1"}
    rows: list[dict[str, Any]] = []
    for step, command in STEPS.items():
        start, before, held = time.perf_counter(), _children(), _megabytes(folder)
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            said = (done.stdout + done.stderr)[-2000:]
            raise KelibError(f"{step}: {' '.join(command)} fails in {folder}:\n{said}")
        seconds, spent = time.perf_counter() - start, _children() - before
        row = {"step": step, "seconds": seconds, "cpu_seconds": spent}
        rows.append(row | {"megabytes": _megabytes(folder) - held})
        print(f"{step}: {seconds:.0f} s, {spent:.0f} s of processors", flush=True)
    return pd.DataFrame(rows)


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _megabytes(folder: Path) -> float:
    return sum(p.lstat().st_size for p in folder.rglob("*") if not p.is_dir()) / 1e6


def main() -> int:
    """Measure, print, keep; return the exit status."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="kelib-contact-") as folder:
        try:
            table = contact(Path(folder))
        except KelibError as error:
            print(f"kelib: {error}", file=sys.stderr)
            return 1
    note = provenance({"steps": list(STEPS)}, [], {})
    note["machine"] = {"processor": processor(), "cores": os.cpu_count(), "load_at_start": load}
    write_table(table.round(1), FOLDER / "contact.csv", note)
    print(f"written: {FOLDER / 'contact.csv'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""``python -m tests.benchmarks.imports``: what a notebook waits for before its first line, and what
the environment holds for whom.

Seconds are medians over rounds of fresh processes, each beside the modules that it loads. Sizes are
those of installed packages that would go if one package of ``pyproject.toml`` went: what others
need as well counts for neither. Kept in ``data/measurements/bench/imports.csv``.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

import pandas as pd
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from kelib.tables import provenance, write_table

from .__main__ import FOLDER
from .harness import processor

ROUNDS = 7
KERNEL = "from jupyter_client.manager import start_new_kernel as s; m, c = s(); m.shutdown_kernel()"
# what runs -> the code; each in a process of its own
STEPS = {
    "Python alone": "pass",
    "papermill": "import papermill",
    "papermill without the grammar": "from kelib.notebooks import skip_address_grammar as skip; "
    "skip(); import papermill",
    "a kernel, started and ended": KERNEL,
    "what a figure notebook imports": "import kelib.plots, kelib.results, kelib.study",
    "torch": "import torch",
    "seaborn": "import seaborn",
}
PACKAGES = ("jupyterlab", "lm-eval", "transformers", "vl-convert-python", "mypy", "ruff", "altair")


def waits() -> list[dict[str, Any]]:
    """A row for each of :data:`STEPS`: median seconds of a process, and modules loaded by it.

    One round follows the other, as a machine that is slower for a while should slow all steps.
    """
    seconds: dict[str, list[float]] = {what: [] for what in STEPS}
    modules = {}
    for _ in range(ROUNDS):
        for what, code in STEPS.items():
            told = f"{code}\nimport sys; print(len(sys.modules))"
            start = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", told], capture_output=True, text=True, check=True
            )
            seconds[what].append(time.perf_counter() - start)
            modules[what] = int(done.stdout.split()[-1])
    return [
        {"what": what, "seconds": statistics.median(found), "modules": modules[what]}
        for what, found in seconds.items()
    ]


def sizes() -> list[dict[str, Any]]:
    """A row for all packages of the environment, and one for what each of :data:`PACKAGES` alone
    brings: how many packages, their files and megabytes.
    """
    known = {canonicalize_name(one.metadata["Name"]): one for one in distributions()}
    asked = _requirements(
        known["kelib"], frozenset({"notebooks", "tasks", "gguf", "cluster", "dev"})
    )
    everything = _reached(asked, known)
    rows = [_size("the environment", everything, known)]
    for package in PACKAGES:
        others = [one for one in asked if canonicalize_name(one.name) != package]
        rows.append(_size(f"{package} alone", everything - _reached(others, known), known))
    return rows


def _requirements(one: Distribution, extras: frozenset[str]) -> list[Requirement]:
    found = [Requirement(text) for text in one.requires or []]
    return [
        need
        for need in found
        if need.marker is None
        or any(need.marker.evaluate({"extra": extra}) for extra in extras | {""})
    ]


def _reached(todo: list[Requirement], known: dict[str, Distribution]) -> set[str]:
    """Names of installed packages that requirements lead to."""
    seen: set[tuple[str, frozenset[str]]] = set()
    while todo:
        need, *todo = todo
        place = str(canonicalize_name(need.name)), frozenset(need.extras)
        if place[0] in known and place not in seen:
            seen.add(place)
            todo += _requirements(known[place[0]], place[1])
    return {name for name, _ in seen}


def _size(what: str, names: set[str], known: dict[str, Distribution]) -> dict[str, Any]:
    paths = [Path(str(file.locate())) for name in names for file in known[name].files or []]
    there = [path for path in paths if path.is_file()]
    megabytes = sum(path.stat().st_size for path in there) / 1e6
    return {"what": what, "packages": len(names), "files": len(there), "megabytes": megabytes}


def main() -> int:
    """Measure, print, keep; return the exit status."""
    load = os.getloadavg()[0]
    table = pd.DataFrame([*waits(), *sizes()])
    counts = ["modules", "packages", "files"]
    table[counts] = table[counts].astype("Int64")
    print(table.round(2).to_string(index=False, na_rep=""))
    note = provenance({"rounds": ROUNDS, "steps": STEPS, "packages": list(PACKAGES)}, [], {})
    note["machine"] = {"processor": processor(), "cores": os.cpu_count(), "load_at_start": load}
    write_table(table.round(2), FOLDER / "imports.csv", note)
    print(f"written: {FOLDER / 'imports.csv'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

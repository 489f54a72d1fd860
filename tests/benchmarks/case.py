"""What runs in the subprocess of a case: the variants of a row in turn, or the memory of one."""

from __future__ import annotations

import gc
import json
import os
import re
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from kelib.errors import KelibError, listing

from .rows import Variant, find_row

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MEGABYTE = 1e6


def time_in_turn(variants: Mapping[str, Variant], repeats: int) -> dict[str, dict[str, Any]]:
    """Seconds per unit of every variant, ``repeats`` times each, one after the other.

    A round runs each variant once, and every other round backwards, so that a drift of the machine
    meets all alike. ``wall`` is the clock, ``cpu`` the time this process and those it started
    computed.
    """
    found: dict[str, dict[str, Any]] = {name: {"wall": [], "cpu": []} for name in variants}
    for variant in variants.values():
        variant.run()
    for number in range(repeats):
        for name in list(variants) if number % 2 == 0 else reversed(list(variants)):
            gc.collect()
            wall, cpu = time.perf_counter(), _computed()
            variants[name].run()
            cpu, wall = _computed() - cpu, time.perf_counter() - wall
            found[name]["wall"].append(wall / variants[name].units)
            found[name]["cpu"].append(cpu / variants[name].units)
    return found


def _computed() -> float:
    """Seconds of processor time of this process and all it started, ended or not."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    live = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return sum(each.ru_utime + each.ru_stime for each in used) + sum(
        each.user + each.system for each in live
    )


def peak_memory(variant: Variant) -> float:
    """Peak resident size while ``variant`` runs, above the size before, in MB.

    It runs once before: code read from disk and the buffers that libraries set up in a first call
    (some MB, whatever is measured) do not count.
    """
    variant.run()
    gc.collect()
    reset_peak()
    before = _resident("VmRSS")
    variant.run()
    return (_resident("VmHWM") - before) / MEGABYTE


def reset_peak() -> None:
    """Set the peak resident size of this process to its present size (Linux)."""
    try:
        CLEAR_REFS.write_text("5")
    except OSError as error:
        raise KelibError(
            f"{CLEAR_REFS} cannot be written ({error.strerror}): peak memory is measured on Linux "
            "only"
        ) from error


def _resident(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    assert found, f"{STATUS} has no {field}"
    return int(found[1]) * 1024


def run_case(job: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`tests.benchmarks.harness.run_case` asked for: see there."""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    row = find_row(job["row"])
    settings = {**row.settings, **job["settings"]}
    wanted = list(job["variants"])
    variants = _choose(row.prepare(settings), wanted)
    if job["quantity"] == "time":
        return time_in_turn(variants, settings["repeats"])
    return {wanted[0]: peak_memory(variants[wanted[0]])}


def _choose(variants: dict[str, Variant], wanted: list[str]) -> dict[str, Variant]:
    missing = [name for name in wanted if name not in variants]
    if missing:
        raise KelibError(f"no variant {missing[0]!r}; this benchmark has {listing(variants)}")
    return {name: variants[name] for name in wanted}


if __name__ == "__main__":
    try:
        # the last line of the output is the result; libraries may print before it
        print(json.dumps(run_case(json.loads(sys.argv[1]))))
    except KelibError as refusal:
        sys.exit(f"kelib: {refusal}")

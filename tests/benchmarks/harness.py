"""Runs rows, each case in a subprocess of its own, and keeps what they gave as a table."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil

from kelib.config import repository_root
from kelib.errors import KelibError
from kelib.tables import provenance, write_table

from .rows import Comparison, Row

PACKAGE = "tests.benchmarks"
TIME_LIMIT = 1200  # seconds a case may take
# Every larger tensor is mapped by itself and given back when freed, so that the resident size is
# what is alive; by default it also holds what malloc kept, which differs by a third between runs.
STABLE = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
    "MALLOC_ARENA_MAX": "1",
}
COLUMNS = (
    *("row", "ratio_of", "model", "quantity", "unit", "ours", "baseline", "floor"),
    *("ratio", "ratio_low", "ratio_high", "ratio_cpu", "sign", "target", "met", "repeats"),
)


def run_case(
    row: str,
    quantity: str,
    variants: Iterable[str],
    settings: Mapping[str, Any],
    threads: int,
    more: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Run ``variants`` of a row in a subprocess: by name, their seconds or peak MB.

    ``quantity`` is ``"time"`` (any number of variants, run in turn) or ``"memory"`` (one).
    ``settings`` replace some of the row's; ``more`` are variables of the environment. KelibError
    with what the subprocess said if it fails.
    """
    job = {"row": row, "quantity": quantity, "variants": list(variants), "settings": dict(settings)}
    count = str(threads)
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
    }
    done = subprocess.run(
        [sys.executable, "-m", f"{PACKAGE}.case", json.dumps(job)],
        cwd=repository_root(),
        env=environment | dict(more or {}) | (STABLE if quantity == "memory" else {}),
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,
    )
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise KelibError(f"benchmark {row} ({quantity}) failed: {said[-1].removeprefix('kelib: ')}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


# Where the allocator puts the blocks of a process makes one variant or the other up to a third
# faster for as long as it lives: several processes share the rounds of a row.
PROCESSES = 3
CLOCKS = ("wall", "cpu")


def run_row(
    row: Row, settings: Mapping[str, Any] | None = None, threads: int = 1
) -> list[dict[str, Any]]:
    """Measure a row: one record, with the names of :data:`COLUMNS`, a comparison.

    A row that the free memory does not hold is not begun: its records have no numbers, and say why
    beside model and data.
    """
    settings = dict(settings or {})
    used = {**row.settings, **settings}
    if row.needs is not None:
        needed, there = row.needs(used), psutil.virtual_memory().available
        if needed > there:
            why = f"not run: {needed / 1e9:.1f} GB needed, {there / 1e9:.1f} GB free"
            return [
                {"row": row.name, "model": f"{describe(used)}, {why}"} | _of_nothing(comparison)
                for comparison in row.comparisons
            ]
    names = {"time": [], "memory": []}  # type: dict[str, list[str]]
    for comparison in row.comparisons:
        found = names[comparison.quantity]
        found += [name for name in comparison.variants if name not in found]
    seconds: dict[str, Any] = {}
    if names["time"]:
        rounds = {"repeats": max(1, used["repeats"] // PROCESSES)}
        parts = [
            run_case(row.name, "time", names["time"], settings | rounds, threads, row.environment)
            for _ in range(min(PROCESSES, used["repeats"]))
        ]
        seconds = {
            name: {clock: [v for part in parts for v in part[name][clock]] for clock in CLOCKS}
            for name in names["time"]
        }
    peaks: dict[str, Any] = {}
    # a neighbour slows memory cases down, no more
    with ThreadPoolExecutor(2 if row.needs is None else 1) as pool:
        jobs = [
            pool.submit(run_case, row.name, "memory", [name], settings, threads)
            for name in names["memory"]
        ]
        for job in jobs:
            peaks |= job.result()
    return [
        {"row": row.name, "model": describe(used)}
        | (_of_time(c, seconds) if c.quantity == "time" else _of_memory(c, peaks))
        for c in row.comparisons
    ]


def _of_time(comparison: Comparison, seconds: Mapping[str, Any]) -> dict[str, Any]:
    """The median of the ratios of the rounds, and their quartiles.

    With a floor it is the ratio of the medians: where ours adds next to nothing, what a single
    round takes above the floor may come out as nothing or less, and its ratio as NaN.
    """
    wall = {name: np.array(seconds[name]["wall"]) for name in comparison.variants}
    medians = {name: float(np.median(values)) for name, values in wall.items()}
    cpu = {name: float(np.median(seconds[name]["cpu"])) for name in comparison.variants}
    rounds = [
        comparison.ratio(*(float(wall[name][i]) for name in comparison.variants))
        for i in range(len(wall[comparison.ours]))
    ]
    low, middle, high = np.nanquantile(rounds, [0.25, 0.5, 0.75])
    record = _record(comparison, medians, "s")
    if comparison.floor is None:
        record |= {"ratio": float(middle), "met": comparison.met(float(middle))}
    return record | {
        "ratio_low": float(low),
        "ratio_high": float(high),
        "ratio_cpu": comparison.ratio(*(cpu[name] for name in comparison.variants)),
        "repeats": len(rounds),
    }


def _of_memory(comparison: Comparison, peaks: Mapping[str, float]) -> dict[str, Any]:
    return _record(comparison, peaks, "MB") | {"repeats": 1}


def _of_nothing(comparison: Comparison) -> dict[str, Any]:
    """A record without numbers."""
    unit = "s" if comparison.quantity == "time" else "MB"
    values = dict.fromkeys(comparison.variants, math.nan)
    empty = dict.fromkeys(("ratio_low", "ratio_high", "ratio_cpu"), math.nan)
    return _record(comparison, values, unit) | empty | {"met": "", "repeats": 0}


def _record(comparison: Comparison, values: Mapping[str, float], unit: str) -> dict[str, Any]:
    floor = None if comparison.floor is None else values[comparison.floor]
    ratio = comparison.ratio(values[comparison.ours], values[comparison.baseline], floor or 0.0)
    return {
        "ratio_of": comparison.text,
        "quantity": comparison.quantity,
        "unit": unit,
        "ours": values[comparison.ours],
        "baseline": values[comparison.baseline],
        "floor": floor,
        "ratio": ratio,
        "sign": comparison.sign,
        "target": comparison.target,
        "met": comparison.met(ratio),
    }


def describe(settings: Mapping[str, Any]) -> str:
    """Model and data of a row in one line, from its settings ``model``, ``batch`` and so on.

    ``data`` among them stands for the data where that is no number of batches.
    """
    model = settings["model"]
    data = settings.get("data") or "{batches} x {batch} x {tokens} tokens".format(**settings)
    return (
        f"{model['model_type']} d={model['hidden_size']} m={model['intermediate_size']} "
        f"{model['num_hidden_layers']} layers V={model['vocab_size']}, {data}"
    )


def lines(records: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """The printed table, a line a record."""
    form = "{:<15} {:<43} {:<7} {:>11} {:>11} {:>7} {:>15} {:>7} {:>7}  {:<4} {}"
    yield form.format(
        *("row", "ratio of", "what", "ours", "baseline", "ratio", "[quartiles]", "by CPU"),
        *("target", "met", "model and data"),
    )
    for record in records:
        spread, cpu = "", ""
        aim = "" if record["target"] is None else f"{record['sign']} {record['target']:g}"
        if record["quantity"] == "time":
            spread = f"[{record['ratio_low']:.3f}, {record['ratio_high']:.3f}]"
            cpu = f"{record['ratio_cpu']:.3f}"
        yield form.format(
            *(record["row"], record["ratio_of"], record["quantity"]),
            *(f"{record[name]:.4g} {record['unit']}" for name in ("ours", "baseline")),
            *(f"{record['ratio']:.3f}", spread, cpu, aim, record["met"], record["model"]),
        )


def write(
    records: list[dict[str, Any]], path: Path, parameters: Mapping[str, Any], load: float
) -> None:
    """Write the records as CSV, with provenance and the machine beside it.

    ``load`` is how busy the machine was at the start, the mean number of running processes.
    """
    table = pd.DataFrame.from_records(records, columns=list(COLUMNS))
    note = provenance(parameters, [], {})
    note["machine"] = {"processor": processor(), "cores": os.cpu_count(), "load_at_start": load}
    write_table(table, path, note)


def processor() -> str:
    """What the system calls its processor."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.machine()

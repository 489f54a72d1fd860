"""The plan of a trajectory profile, ``python -m kelib plan paper``: counted, nothing is asked of a
hub. No torch.

Tokens and FLOPs are counted as in :mod:`kelib.scale`, from the shape that the model's catalogue row
or folder gives; without one they are unknown, and said to be. What passages, probes and tasks cost
beside the text is small, and estimated from :data:`TASK_TOKENS`. Hours are those of a device at a
stated utilisation, for computing alone: no fetching, no packing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd

from kelib.catalogue import LOCK, catalogued, read_lock
from kelib.config import repository_root
from kelib.continued import hub_data_sets
from kelib.fetching import GIB
from kelib.grid import free_bytes, refuse_small_disk
from kelib.hub_sources import LOCK as TEXT_LOCK
from kelib.hub_sources import PREFIX, hub_source
from kelib.plan_report import COUNT, HUNDREDTHS, TENTHS, Column, print_table
from kelib.scale import (
    DEVICES,
    PUBLISHED,
    USABLE,
    Shape,
    device_hours,
    forward_flops,
    shape_of,
    training_flops,
    training_memory,
)
from kelib.tables import read_table
from kelib.trajectory import Trajectory
from kelib.trajectory_profile import load_trajectory

# Tokens that scoring reads, about: items of the scored split (as lm-evaluation-harness has them)
# times the length of a context and its choices
TASK_TOKENS = {
    "sciq": 1000 * 140,
    "winogrande": 1267 * 60,
    "arc_easy": 2376 * 65,
    "piqa": 1838 * 75,
    "hellaswag": 10042 * 190,
    "openbookqa": 500 * 40,
}
PROBE_TOKENS = 130 * 15 * 60  # Fictional Knowledge: entries, probes of each, tokens of a probe
TABLES = 2**18  # bytes of the tables that a run leaves, about
TOKEN, WEIGHT, STATE = 4, 4, 12  # bytes of a packed token at most, a weight, a state's parameter
# kinds of runs that a figure rests on; None: all
FIGURES: dict[str, tuple[str, ...] | None] = {
    "ours_trajectory": ("trajectory",),
    "ours_published_stages": None,
}
KINDS: dict[str, Column] = {
    "kind": ("kind", str),
    "runs": ("runs", COUNT),
    "done": ("done", COUNT),
    "trained": ("trained, M tokens", lambda n: TENTHS(n / 1e6)),
    "measured": ("measured, M tokens", lambda n: TENTHS(n / 1e6)),
    "flops": ("PFLOP", lambda n: TENTHS(n / 1e15)),
    "stored": ("MB left", lambda n: TENTHS(n / 1e6)),
}
HOURS: dict[str, Column] = {
    "device": ("device", str),
    "part": ("what", str),
    "devices": ("devices that share it", COUNT),
    "memory_gb": ("GB of each", TENTHS),
    "hours": ("device-hours", HUNDREDTHS),
}


@dataclass(frozen=True)
class Bytes:
    """What is fetched and what lies on the disk; NaN where it is not known."""

    checkpoint: float  # the largest, its weights
    known: str  # where that number is from
    checkpoints: int  # fetched, each once
    text: int  # characters, about as many bytes
    disk: float  # at most, at one time


def shape_of_model(study: Trajectory) -> Shape | None:
    """The shape of a catalogued model, or of the first checkpoint in a folder; None: unknown."""
    model = study.profile.model
    if model.is_generated:
        return None
    if model.is_folder:
        place = Path(model.source).expanduser() / study.revisions[0].name / "config.json"
        return shape_of(SimpleNamespace(**json.loads(place.read_text())))
    return PUBLISHED.get(catalogued(model.source).name)


def kinds_table(study: Trajectory, shape: Shape | None) -> pd.DataFrame:
    """A row for each kind of runs: runs, done, trained, measured (tokens), flops (NaN where the
    shape is unknown), stored (bytes).
    """
    profile, learning = study.profile, study.profile.learning
    stages = len(profile.model.steps or study.revisions)
    length = profile.sequence_length
    read = len(profile.data) * (profile.sequences + profile.loss_sequences) * length
    width = 0 if shape is None else shape.layers * shape.intermediate_size
    vectors = 8 * width * len(profile.data) * len(profile.definitions)
    done = _done(study)
    rows = [("trajectory", stages, 0, stages * read, length, stages * (vectors + TABLES))]
    if learning is not None:
        size = learning.sequence_length
        asked = sum(TASK_TOKENS.get(name, 0) for name in learning.tasks) + PROBE_TOKENS
        asked += learning.heldout_sequences * size
        packed = (learning.packed + learning.heldout_sequences) * size
        each = len(learning.learning_rates) * len(learning.seeds) * (1 + learning.control)
        first, runs = len(learning.steps), len(learning.steps) * each
        rows.append(("learning_text", 1, 0, 0, size, TOKEN * packed))
        rows.append(("known", first, 0, first * asked, size, first * TABLES))
        trained = runs * learning.read * size
        rows.append(("continued", runs, trained, runs * asked, size, runs * TABLES))
    table = []
    for kind, runs, trained, measured, size, stored in rows:
        flops = np.nan
        if shape is not None:
            flops = trained * training_flops(shape, size) + measured * forward_flops(shape, size)
        row = {"kind": kind, "runs": runs, "done": done.get(kind, 0)}
        table.append({**row, "trained": trained, "measured": measured, "flops": flops})
        table[-1]["stored"] = stored
    return pd.DataFrame(table)


def bytes_of(study: Trajectory, shape: Shape | None, stored: int) -> Bytes:
    """What is fetched and kept. The size of a checkpoint is the audit's where there is one, else at
    most that of float32 weights of the shape.
    """
    profile, model = study.profile, study.profile.model
    learning = profile.learning
    fetched = not (model.is_generated or model.is_folder)
    size, known = np.nan, "unknown"
    if not fetched:
        size, known = 0.0, "nothing is fetched"
    elif (audited := _audited_bytes(study)) is not None:
        size, known = audited, "by the audit"
    elif shape is not None:
        size, known = float(WEIGHT * shape.parameters), "in float32, if they are published so"
    texts = [*profile.data, *([learning.text] if learning else [])]
    text = sum(hub_source(name)[1] for name in set(texts) if name.startswith(PREFIX))
    disk = stored + text + (profile.cache_gib * GIB if fetched else 0)
    if learning is not None:  # a state, the one that replaces it, and the weights of each run
        parameters = np.nan if shape is None else shape.parameters
        small = model.is_generated
        disk += 0 if small else profile.workers * (2 * STATE + WEIGHT) * parameters
    count = len(model.steps) if fetched else 0
    return Bytes(size, known, count, text, disk)


def hours_table(study: Trajectory, runs: pd.DataFrame, shape: Shape, mfu: float) -> pd.DataFrame:
    """A row for each device and part (measuring, one run of learning, all of it): devices that
    share a model, memory of each (GB), hours of one device at this ``mfu``.
    """
    profile, learning = study.profile, study.profile.learning
    flops = runs.set_index("kind")["flops"]
    measuring = flops.drop(index="continued", errors="ignore").sum()
    tokens = profile.batch_size * profile.sequence_length
    width = 4 if profile.model.dtype == "float32" else 2
    held = width * shape.parameters + 2 * 4 * tokens * shape.vocabulary_size
    parts: list[tuple[str, int, float, float]] = []
    rows = []
    for device, known in DEVICES.items():
        parts = [("measuring", 1, held, measuring)]
        if learning is not None:
            micro = learning.training.micro_batch_size or learning.batch_size // learning.processes
            options: dict[str, Any] = {"recompute": learning.recompute}
            options["precision"] = learning.training.precision
            devices = learning.processes if learning.parallel == "fsdp2" else 1
            memory = training_memory(shape, micro * learning.sequence_length, devices, **options)
            while memory.total > USABLE * known.memory and devices < 64:
                devices *= 2
                memory = training_memory(
                    shape, micro * learning.sequence_length, devices, **options
                )
            count = int(runs.set_index("kind")["runs"]["continued"])
            one = flops["continued"] / count
            parts.append(("one run of learning", devices, memory.total, one))
            parts.append((f"all {count} of them", devices, memory.total, flops["continued"]))
        for part, devices, total, work in parts:
            hours = device_hours(work, device, mfu)
            rows.append((device, part, devices, total / 1e9, hours))
    return pd.DataFrame(rows, columns=["device", "part", "devices", "memory_gb", "hours"])


def figures_table(runs: pd.DataFrame) -> pd.DataFrame:
    """What each figure rests on: runs, open, PFLOP."""
    rows = []
    for figure, kinds in FIGURES.items():
        if kinds is None and "continued" not in set(runs["kind"]):
            continue
        part = runs if kinds is None else runs[runs["kind"].isin(kinds)]
        left = int((part["runs"] - part["done"]).sum())
        flops = part["flops"].sum(min_count=len(part))
        rows.append((figure, int(part["runs"].sum()), left, flops))
    return pd.DataFrame(rows, columns=["figure", "runs", "open", "flops"])


def plan(name: str, *, data: Path | None = None, mfu: float = 0.4) -> None:
    """Print the plan of a trajectory profile. Raises KelibError, when all is printed, if the disk
    is too small for what is known of it.
    """
    study = Trajectory(load_trajectory(name), data or repository_root() / "data")
    profile, shape = study.profile, shape_of_model(study)
    runs = kinds_table(study, shape)
    left = int((runs["runs"] - runs["done"]).sum())
    where = "a cluster" if profile.executor == "slurm" else f"{profile.workers} local process(es)"
    total = int(runs["runs"].sum())
    print(f"profile {name}, digest {profile.digest}: {total} runs, {left} open, on {where}")
    size = "of unknown shape" if shape is None else f"{shape.parameters / 1e6:,.0f} M parameters"
    print(f"model {profile.model.source}, {size}; runs count as done where revisions are pinned")
    print_table("Runs by kind", runs, KINDS)
    needed = bytes_of(study, shape, int(runs["stored"].sum()))
    one = "unknown" if np.isnan(needed.checkpoint) else f"{needed.checkpoint / 1e9:.1f} GB"
    print(
        f"\nTo fetch: {needed.checkpoints} checkpoints, each once, {one} of weights each "
        f"({needed.known}); {needed.text / 1e9:.2f} G characters of text from the hub; tasks and "
        "entries, some tens of MB."
    )
    if np.isnan(needed.disk):
        print(f"Disk: unknown, with at most {profile.cache_gib:g} GiB of checkpoints at once.")
    else:
        free = free_bytes(study.data) / 1e9
        print(f"Disk: at most {needed.disk / 1e9:.1f} GB at one time, {free:.1f} GB free.")
    if shape is None:
        print("FLOPs, memory and hours are not known without the shape of the model.")
    else:
        print_table(f"Devices, MFU {mfu:g}", hours_table(study, runs, shape, mfu), HOURS)
    columns: dict[str, Column] = {
        "figure": ("figure", str),
        "runs": KINDS["runs"],
        "open": ("open", COUNT),
    }
    columns["flops"] = KINDS["flops"]
    figures = figures_table(runs)
    print_table("Figures, with all the runs they rest on", figures, columns)
    if not np.isnan(needed.disk):
        refuse_small_disk(name, int(needed.disk), study.data)


def _done(study: Trajectory) -> dict[str, int]:
    """Finished runs by kind; none where a hub would have to be asked what the runs are."""
    profile, model = study.profile, study.profile.model
    local = model.is_generated or model.is_folder
    if not local and catalogued(model.source).name not in read_lock(study.lock or LOCK):
        return {}
    texts = [*profile.data, *([profile.learning.text] if profile.learning else [])]
    named = [hub_source(text)[0] for text in texts if text.startswith(PREFIX)]
    unpinned = {source.name for source in named if source.revision is None}
    if profile.learning is not None:
        unpinned |= set(hub_data_sets(profile.learning))
    if unpinned - set(read_lock(TEXT_LOCK)):
        return {}
    found: dict[str, int] = {}
    every = [run for group in study.runs_by_revision().values() for run in group]
    every += [run.inputs["text"] for run in every if run.kind == "known"][:1]
    for run in every:
        found[run.kind] = found.get(run.kind, 0) + run.done
    return found


def _audited_bytes(study: Trajectory) -> float | None:
    """The largest of the checkpoints that the audit of the model has weighed."""
    home = study.audits or repository_root() / "data" / "measurements" / "audit"
    path = home / f"{catalogued(study.profile.model.source).name}.csv"
    if not path.exists():
        return None
    table = read_table(path)
    table = table[table["step"].isin(study.profile.model.steps)]
    weights = table["bytes"].dropna()
    return float(weights.max()) if len(weights) else None

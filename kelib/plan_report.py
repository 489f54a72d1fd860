"""``python -m kelib plan PROFILE``: the plan of a profile as text.

Printed are the runs by kind, done and open, with their tokens, FLOPs, bytes and hours; what is to
be fetched; disk and memory; what each figure rests on; and what the continual learning and the
entropies of the plan would take with the paper's models. Hours are estimates (see
:mod:`kelib.calibration`), of one process where nothing else is said. The plan of a trajectory
profile is that of :mod:`kelib.plan_trajectory`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from kelib import planner, stages
from kelib.calibration import Calibration, calibrate, calibrate_published
from kelib.config import repository_root
from kelib.errors import KelibError
from kelib.figure_stages import figures_of
from kelib.grid import STAGES, free_bytes, refuse_small_disk
from kelib.plan_check import check_table, refuse_bad_estimate
from kelib.published import PublishedStudy, open_published, published_profiles
from kelib.scale import DEVICES, fsdp2_memory, training_memory
from kelib.scale import PAPER as PAPER_SHAPES
from kelib.study import Study
from kelib.trajectory_profile import trajectory_profiles
from kelib.workload import shape_of_profile

Column = tuple[str, Callable[[Any], str]]
KEPT = Path("measurements") / "calibration.json"
COUNT, TENTHS, HUNDREDTHS = "{:,.0f}".format, "{:,.1f}".format, "{:,.2f}".format
LEFT = ("stage", "kind", "figure", "model", "device", "part")  # text; numbers stand to the right
KINDS: dict[str, Column] = {
    "stage": ("stage", lambda stage: f"{stage} {STAGES[stage]}" if stage else ""),
    "kind": ("kind", str),
    "done": ("done", COUNT),
    "open": ("open", COUNT),
    "trained": ("trained, M tokens", lambda n: TENTHS(n / 1e6)),
    "measured": ("measured, M tokens", lambda n: TENTHS(n / 1e6)),
    "flops": ("TFLOP", lambda n: COUNT(n / 1e12)),
    "stored": ("MB", lambda n: TENTHS(n / 1e6)),
    "hours": ("hours", HUNDREDTHS),
    "hours_open": ("of open runs", HUNDREDTHS),
}
FIGURES: dict[str, Column] = {
    "figure": ("figure", str),
    "stage": ("after stage", str),
    "runs": ("runs", COUNT),
    "open": ("open", COUNT),
    "hours": ("hours", HUNDREDTHS),
    "hours_open": ("of open runs", HUNDREDTHS),
}
PAPER: dict[str, Column] = {
    "model": ("model", str),
    "parameters": ("parameters, M", lambda n: COUNT(n / 1e6)),
    "device": ("device", str),
    "devices": ("devices that share it", COUNT),
    "memory_gb": ("GB of each", TENTHS),
    "run_hours": ("device-hours, one run", TENTHS),
    "grid_hours": ("all", COUNT),
}
CHECK: dict[str, Column] = {
    "kind": ("kind", str),
    "runs": ("runs", COUNT),
    "estimated": ("hours estimated", HUNDREDTHS),
    "measured": ("measured", HUNDREDTHS),
    "ratio": ("ratio", HUNDREDTHS),
    "low": ("of single runs: lower quartile", HUNDREDTHS),
    "median": ("median", HUNDREDTHS),
    "high": ("upper quartile", HUNDREDTHS),
}


def open_plan(name: str, data: Path | None) -> Study | PublishedStudy:
    """The study of a profile of either sort, with its data in ``data`` or in that of the
    repository."""
    folder = data or repository_root() / "data"
    if name in published_profiles():
        return PublishedStudy(open_published(name).profile, folder)
    return Study(stages.open_study(name).profile, folder)


def calibrated(study: Study | PublishedStudy, anew: bool) -> Calibration:
    """The calibration for a profile, kept in the repository's ``data``; ``anew`` forgets all."""
    kept = repository_root() / "data" / KEPT
    if anew:
        kept.unlink(missing_ok=True)
    if isinstance(study, Study):
        return calibrate(study.profile, kept)
    return calibrate_published(study.profile, kept)


def plan(
    name: str,
    figures: list[str],
    *,
    data: Path | None = None,
    mfu: float = 0.4,
    counts_only: bool = False,
    anew: bool = False,
) -> None:
    """Print the plan of profile ``name``; of ``figures``, or of all that its tables give.

    ``counts_only``: nothing that has to be timed. ``mfu``: share of the peak that accelerators are
    taken to reach. Raises KelibError, when all is printed, if the disk is too small.
    """
    if name in trajectory_profiles():
        from kelib import plan_trajectory

        plan_trajectory.plan(name, data=data, mfu=mfu)
        return
    study = open_plan(name, data)
    calibration = None if counts_only else calibrated(study, anew)
    chosen = study.profile
    if isinstance(study, Study):
        runs = planner.study_table(study, calibration)
    else:
        runs = planner.published_table(study, calibration)
    left = runs[~runs["done"]]
    where = "a cluster" if chosen.executor == "slurm" else f"{chosen.workers} local processes"
    print(f"profile {name}, digest {chosen.digest}: {len(runs)} runs, {len(left)} open, on {where}")
    print_table("Runs by stage and kind", planner.kinds_table(runs), KINDS, counts_only)

    fetched = planner.downloads(study)
    listed = [f"{source} {size / 1e6:.1f} MB" for source, size in fetched.items()]
    print(f"\nTo fetch: {', '.join(listed) or 'nothing'}.")
    needed = planner.disk_needed(runs, chosen.workers, fetched.values())
    free = free_bytes(study.data)
    print(f"Disk: {needed / 1e9:.2f} GB more, {free / 1e9:.1f} GB free.")
    if isinstance(study, Study):
        _print_memory(study)
    if calibration is not None:
        seconds = left["seconds"].sum()
        print(
            f"Time here: {_duration(seconds)} of one process, "
            f"{_duration(seconds / chosen.workers)} on {chosen.workers}, without reading text for "
            "the first time and without executing the notebooks of stages and figures, some "
            "seconds each."
        )
    if isinstance(study, Study):
        table = planner.figures_table(runs, figures or figures_of(study.profile))
        print_table("Figures, with all the runs they rest on", table, FIGURES, counts_only)
        if study.profile.corpus.generated:
            refuse_small_disk(name, needed, study.data)
            return  # for trying out: its grid says nothing about the paper's
        title = f"The same grid with the paper's models and tokens, MFU {mfu:g}, no pretraining"
        print_table(title, planner.paper_table(runs, mfu), PAPER)
        print(f"\n{fsdp2_line()}")
    refuse_small_disk(name, needed, study.data)


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 5400 else f"{seconds / 60:.1f} minutes"


def check(name: str, *, data: Path | None = None, anew: bool = False) -> None:
    """Print estimates beside the times of the finished runs of a profile; raise KelibError if they
    are off by too much in all."""
    if name in trajectory_profiles():
        raise KelibError(
            f"the plan of {name} is of FLOPs and hours of devices, not of time here: there is "
            "nothing to check it with; give a study or a published model"
        )
    study = open_plan(name, data)
    table = check_table(study, calibrated(study, anew))
    print_table(f"Finished runs of {name}, estimate beside measurement", table, CHECK)
    refuse_bad_estimate(table)


def fsdp2_line() -> str:
    """The planned peak of a model of the paper under FSDP2, and what is not part of it."""
    model, devices, device = "OLMo-7B", 8, "H100"
    tokens, held = planner.DEVICE_TOKENS, DEVICES[device].memory
    memory = fsdp2_memory(PAPER_SHAPES[model], tokens, devices)
    parts = {
        "weights, gradients and moments (16 bytes a parameter, divided)": memory.states,
        "weights, their 16-bit copies and gradients that are whole for the moment": memory.gathered,
        "activations (input of each layer, and one layer again)": memory.activations,
        "logits": memory.logits,
    }
    listed = ", ".join(f"{size / 1e9:.1f} {name}" for name, size in parts.items())
    return (
        f"{model} under FSDP2 on {devices} x {held / 1e9:.0f} GB, {tokens:,} tokens on each, bf16, "
        f"recomputed activations: {memory.total / 1e9:.1f} GB of each at the peak: {listed}. By "
        "formula (kelib.scale.fsdp2_memory); buffers of nccl and what the allocator wastes come on "
        "top."
    )


def _print_memory(study: Study) -> None:
    profile = study.profile
    rows = profile.training.micro_batch_size or profile.pretraining.batch_size
    tokens, shape = rows * profile.corpus.sequence_length, shape_of_profile(profile)
    precision = profile.training.precision
    memory = training_memory(shape, tokens, recompute=False, precision=precision)
    print(
        f"Memory of a training step: {memory.total / 1e6:.0f} MB in a process, "
        f"{memory.states / 1e6:.0f} MB of it weights, gradients and moments; Python and its "
        "libraries come on top."
    )


def print_table(
    title: str, table: pd.DataFrame, columns: dict[str, Column], without_hours: bool = False
) -> None:
    """A table with its title; numbers as their column says, nothing where there is none."""
    shown = {}
    for name, (label, text) in columns.items():
        if not (without_hours and "hours" in name):
            values = ["" if pd.isna(v) else text(v) for v in table[name]]
            if name in LEFT:
                width = max(map(len, [label, *values]))
                label, values = label.ljust(width), [value.ljust(width) for value in values]
            shown[label] = values
    print(f"\n{title}:\n\n{pd.DataFrame(shown).to_string(index=False)}")

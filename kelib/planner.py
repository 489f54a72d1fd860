"""What a profile will cost before anything is fetched or trained, as tables. No torch.

Tokens, FLOPs and bytes are counted (:mod:`kelib.workload`, :mod:`kelib.scale`); seconds come from a
calibration of this machine (:mod:`kelib.calibration`), and are estimates. How good they are is told
by :mod:`kelib.plan_check`, against the runs that are finished.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from kelib import archives, questions
from kelib.calibration import Calibration
from kelib.config import Profile
from kelib.fetching import needed
from kelib.figure_stages import stages_behind
from kelib.grid import missing_files, missing_text, needed_bytes, once, planned_runs
from kelib.inspection import inspect
from kelib.miniature import class_of
from kelib.own_model import GENERATED, is_own, on_hub, own_folder, parameters_in
from kelib.published import PublishedModel, PublishedProfile, PublishedStudy
from kelib.run import Run
from kelib.scale import DEVICES, PAPER, USABLE, Shape, device_hours, paper_flops, training_memory
from kelib.study import Study
from kelib.workload import Work, shape_of_run, work_of

LEARNING = ("continual", "later")  # kinds of runs that the paper's protocol trains
DEVICE_TOKENS = 8192  # at once on a device, for its memory


@dataclass(frozen=True)
class Cost:
    """Of one run. ``seconds``: estimate for this machine, NaN where there is none."""

    kind: str  # its class, see kelib.miniature.class_of
    work: Work
    flops: float
    seconds: float


def study_cost(
    profile: Profile,
    kind: str,
    settings: Mapping[str, Any],
    shape: Shape,
    calibration: Calibration | None,
) -> Cost:
    """The cost of a run of a study."""
    work, length = work_of(profile, kind, settings, shape), profile.corpus.sequence_length
    name, trained = class_of(kind, settings), Work(work.trained)
    seconds = np.nan
    if calibration is not None:
        seconds = calibration.seconds(name, work, trained.flops(shape, length))
    return Cost(name, work, work.flops(shape, length), seconds)


def published_cost(
    profile: PublishedProfile,
    kind: str,
    settings: Mapping[str, Any],
    calibration: Calibration | None,
) -> Cost:
    """The cost of a run of a published profile, whose model is known by its number of parameters N
    alone before it is here: 2 N FLOPs a token, without attention.

    Questions are read once for each choice; how long the model takes to fetch and to convert is not
    estimated. A generated model counts as nothing.
    """
    model = model_size(profile.model)
    parameters = model.parameters
    if kind in ("import_model", "own_model"):
        return Cost(kind, Work(stored=model.stored), 0.0, np.nan)
    if kind == "published":
        tokens = (profile.sequences + profile.loss_sequences) * profile.sequence_length
    else:
        row = questions.question_sources().get(settings["questions"])
        # half of the text, the contexts, is read four times; four characters make a token
        tokens = 0 if row is None else (4 + 1) * row.text_bytes // 2 // 4
    flops = 2.0 * parameters * tokens
    seconds = np.nan if calibration is None else calibration.flop_seconds * flops
    return Cost(kind, Work(measured=tokens), flops, seconds)


@dataclass(frozen=True)
class ModelSize:
    """Of a published model before it is here; ``stored`` and ``fetched`` are bytes."""

    parameters: int = 0
    stored: int = 0
    fetched: int = 0


def model_size(model: PublishedModel) -> ModelSize:
    """The size of the model of a published profile: by its row of ``data/models.yaml``, by the
    headers of a folder's weights, or as the hub tells them.

    Raises KelibError, see :meth:`kelib.published.PublishedStudy.model_run`.
    """
    source = model.source
    if source in archives.models() or not is_own(source):
        if source.startswith(GENERATED):
            return ModelSize()
        row = archives.model_archive(source)
        # in float32, beside the file it is made from
        size = row.members[0].bytes
        return ModelSize(row.parameters, 4 * row.parameters + size, size)
    if (folder := own_folder(source, model.revision)) is not None:
        return ModelSize(parameters_in(folder))
    return _size_on_hub(*on_hub(source, model.revision))


@functools.cache
def _size_on_hub(repo: str, commit: str) -> ModelSize:
    found, size = inspect(repo, [commit], repo)[commit], sum(needed(repo, commit).values())
    return ModelSize(found.parameters, size, size)


# --- tables -------------------------------------------------------------------------------------


def study_table(study: Study, calibration: Calibration | None) -> pd.DataFrame:
    """A row for every run, those it rests on included: stage, kind, done, trained, measured
    (tokens), flops, stored, scratch (bytes), seconds."""
    profile = study.profile

    def cost(run: Run) -> Cost:
        shape = shape_of_run(profile, run)
        return study_cost(profile, run.kind, run.settings, shape, calibration)

    return _table((stage, r, cost(r)) for stage, runs in planned_runs(study).items() for r in runs)


def published_table(study: PublishedStudy, calibration: Calibration | None) -> pd.DataFrame:
    """As :func:`study_table`, for a published profile."""
    asked = once({5: [study.model_run(), *study.runs(), *study.question_runs()]})
    costs = (
        (stage, run, published_cost(study.profile, run.kind, run.settings, calibration))
        for stage, runs in asked.items()
        for run in runs
    )
    return _table(costs)


def _table(costs: Iterable[tuple[int, Run, Cost]]) -> pd.DataFrame:
    rows = [
        {
            "stage": stage,
            "kind": cost.kind,
            "done": run.done,
            "trained": cost.work.trained,
            "measured": cost.work.measured,
            "flops": cost.flops,
            "stored": cost.work.stored,
            "scratch": cost.work.scratch,
            "seconds": cost.seconds,
        }
        for stage, run, cost in costs
    ]
    return pd.DataFrame(rows)


def kinds_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Runs by stage and kind, in the last row all: how many are done and open, their tokens, FLOPs,
    bytes and hours of one process, and the hours of the open ones."""
    counted = runs.assign(
        open=~runs["done"],
        hours=runs["seconds"] / 3600,
        hours_open=(runs["seconds"] / 3600).where(~runs["done"], 0.0),
    )
    names = ["done", "open", "trained", "measured", "flops", "stored", "hours", "hours_open"]
    table = counted.groupby(["stage", "kind"], sort=False)[names].sum(min_count=1).reset_index()
    total = counted[names].sum(min_count=1).to_frame().T.assign(stage=0, kind="all")
    return pd.concat([table, total], ignore_index=True)


def figures_table(runs: pd.DataFrame, figures: Iterable[str]) -> pd.DataFrame:
    """What each figure rests on: its stage, and of all the runs up to it how many there are, how
    many are open, and the hours of one process for all and for the open ones.

    Raises KelibError for a figure that has no notebook.
    """
    rows = []
    for figure in figures:
        behind = stages_behind([figure])
        needed = runs[runs["stage"].isin(behind)]
        stage = max(behind & set(runs["stage"]), default=max(behind))
        left = needed[~needed["done"]]
        hours = [part["seconds"].sum(min_count=1) / 3600 for part in (needed, left)]
        rows.append((figure, stage, len(needed), len(left), *hours))
    columns = ["figure", "stage", "runs", "open", "hours", "hours_open"]
    table = pd.DataFrame(rows, columns=columns)
    return table.sort_values("stage", kind="stable", ignore_index=True)


def paper_table(runs: pd.DataFrame, mfu: float) -> pd.DataFrame:
    """The continual learning and the entropies of this plan with the paper's models and tokens:
    model, device, devices that share a model, GB of each, hours of one device for one run of
    continual learning and for all of the plan at this ``mfu``.

    Checkpoints are published there, so that pretraining does not count.
    """
    kinds = runs["kind"].str.partition(",")[0]
    counts = {
        "learning": int(kinds.isin(LEARNING).sum()),
        "entropy": int((kinds == "entropy").sum()),
    }
    rows = []
    for name, shape in PAPER.items():
        flops = paper_flops(shape)
        total = sum(counts[part] * flops[part] for part in counts)
        for device, known in DEVICES.items():
            devices = 1
            while training_memory(shape, DEVICE_TOKENS, devices).total > USABLE * known.memory:
                devices *= 2
            memory = training_memory(shape, DEVICE_TOKENS, devices).total
            one, grid = (device_hours(f, device, mfu) for f in (flops["learning"], total))
            rows.append((name, shape.parameters, device, devices, memory / 1e9, one, grid))
    columns = ["model", "parameters", "device", "devices", "memory_gb", "run_hours", "grid_hours"]
    return pd.DataFrame(rows, columns=columns)


# --- what is to be fetched and kept -------------------------------------------------------------


def downloads(study: Study | PublishedStudy) -> dict[str, int]:
    """Bytes to fetch, by source, model or set of questions that is not here yet."""
    folder = study.data / "sources"
    if isinstance(study, Study):
        corpus = study.profile.corpus
        return missing_text((*corpus.general, *corpus.domain), folder)
    chosen, known = study.profile, questions.question_sources()
    lacking = missing_text(chosen.data, folder)
    lacking |= missing_files({n: known[n] for n in chosen.questions if n in known}, folder)
    source = chosen.model.source
    if source.startswith(GENERATED) or study.model_run().done:
        return lacking
    if source in archives.models():
        row: Any = archives.model_archive(source)  # has what is read of a source of text
        return lacking | missing_files({f"model {source}": row}, folder)
    size = model_size(chosen.model).fetched
    return lacking | ({f"model {source}": size} if size else {})


def disk_needed(runs: pd.DataFrame, workers: int, fetched: Iterable[int]) -> int:
    """Bytes that the open runs of a table and what is fetched for them will take."""
    left = runs[~runs["done"]]
    pairs = zip(left["stored"], left["scratch"], strict=True)
    works = [Work(stored=int(stored), scratch=int(scratch)) for stored, scratch in pairs]
    return needed_bytes(works, workers, fetched)

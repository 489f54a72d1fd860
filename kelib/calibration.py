"""How fast this machine is at the runs of a profile: a miniature of it, done and timed. No torch.

The miniature has the model, the lengths and the samples of the profile, one seed, generated text
and a few steps. One run of each kind is done by the code and the worker processes that do the real
ones, as many at once, since they share memory. Their seconds are those of their processor where no
accelerator is at work, so that other work on the machine hardly counts. From them come

* ``flop_seconds``: seconds of a training FLOP, from two runs that differ in nothing but steps;
* ``fixed``: seconds of a run beyond that, by class (:func:`kelib.miniature.class_of`): of runs that
  train what is left without their training, of others all, for as many tokens as the miniature
  measured;
* ``packed_seconds``: seconds of a token of a corpus, from two corpora.

Kept for the same machine, versions and settings in ``data/measurements/calibration.json``.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

from kelib.config import Model, Profile, digest
from kelib.errors import KelibError, listing
from kelib.miniature import miniature, pretraining_beside, sample_runs
from kelib.progress import Progress
from kelib.published import PublishedProfile
from kelib.runs import attempt, with_inputs
from kelib.scale import shape_of
from kelib.study import Study
from kelib.tables import write_atomically
from kelib.workers import begin_worker, worker_environment
from kelib.workload import Work, shape_of_profile, work_of

PUBLISHED = Model("llama", 576, 1536, 2, 9)  # layers as wide as those of a small real model


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Seconds of this machine, see the module. ``measured``: tokens by class."""

    flop_seconds: float
    packed_seconds: float
    fixed: Mapping[str, float]
    measured: Mapping[str, int]

    def seconds(self, name: str, work: Work, training_flops: float) -> float:
        """Estimate for a run of class ``name``; KelibError for one that was not timed."""
        if name not in self.fixed:
            raise KelibError(
                f"the calibration timed no run of class {name!r}, only {listing(self.fixed)}; "
                "delete data/measurements/calibration.json, then plan again"
            )
        if work.trained:
            return self.fixed[name] + self.flop_seconds * training_flops
        if work.packed:
            return self.fixed[name] + self.packed_seconds * work.packed
        return self.fixed[name] * work.measured / self.measured[name]


def calibrate(profile: Profile, kept: Path) -> Calibration:
    """The calibration for a profile on this machine: read from ``kept``, else measured (minutes at
    most) and added to it.
    """
    known = _read(kept)
    key = digest([machine(), miniature(profile).parameters, profile.workers])
    if key not in known:
        print("calibrating: a miniature of the profile is run and timed, some minutes at most")
        known[key] = dataclasses.asdict(measure(profile))
        write_atomically(kept, json.dumps(known, indent=1, sort_keys=True) + "\n")
    return Calibration(**known[key])


def _read(kept: Path) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(Calibration)}
    try:
        known = dict(json.loads(kept.read_text()))
        return {key: found for key, found in known.items() if set(found) == names}
    except (OSError, ValueError, TypeError):  # none yet, or not one: measured again
        return {}


def machine() -> dict[str, Any]:
    """What a time depends on beside the settings: processor, cores, versions."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line for line in lines if line.startswith("model name")), model)
    except OSError:  # another system than Linux
        pass
    versions = {name: version(name) for name in ("torch", "transformers", "numpy")}
    return {"processor": model, "cores": os.cpu_count(), **versions}


def measure(profile: Profile) -> Calibration:
    """Do the runs of the miniature in a temporary folder and take their times."""
    small = miniature(profile)
    with tempfile.TemporaryDirectory(prefix="kelib-calibration-") as folder:
        study = Study(small, Path(folder))
        runs = sample_runs(study)
        # pretraining is alone in its level: others beside it, as in the grid of a real study
        beside = [pretraining_beside(study, number) for number in range(1, profile.workers)]
        levels = with_inputs([*runs.values(), *beside])
        with (
            _processes(profile.workers) as pool,
            Progress("calibration", sum(map(len, levels))) as bar,
        ):
            list(pool.map(_import_all, range(profile.workers)))
            done = 0
            for level in levels:
                for run, (_, reason) in zip(level, pool.map(attempt, level), strict=True):
                    if reason:
                        raise KelibError(f"calibration: {run.kind}: {reason}")
                    done += 1
                    bar.show(done)
        spent = {name: own_seconds(run.note()) for name, run in runs.items()}
    works = {
        name: work_of(small, run.kind, run.settings, shape_of_profile(small))
        for name, run in runs.items()
    }
    return _fitted(small, spent, works)


def calibrate_published(profile: PublishedProfile, kept: Path) -> Calibration:
    """As :func:`calibrate`, for a published profile, whose model need not be here: all entropies by
    an untrained Llama of two layers, with the batches and definitions of the profile. Only
    ``flop_seconds`` is of use: seconds of one of the 2 N FLOPs a token.
    """
    known = _read(kept)
    key = digest([machine(), profile.parameters, profile.workers])
    if key not in known:
        with _processes(profile.workers) as pool:
            found = mean(pool.map(_published_flop_seconds, [profile] * profile.workers))
        known[key] = dataclasses.asdict(Calibration(found, 0.0, {}, {}))
        write_atomically(kept, json.dumps(known, indent=1, sort_keys=True) + "\n")
    return Calibration(**known[key])


def _published_flop_seconds(profile: PublishedProfile) -> float:
    import torch

    from kelib.checkpoints import new_model
    from kelib.published_jobs import measure_definitions

    words, rows = 8192, max(4, profile.batch_size)
    model = new_model(PUBLISHED, words, profile.sequence_length, seed=0).eval()
    ids = torch.randint(words, (rows, profile.sequence_length))
    batches = [{"input_ids": part} for part in ids.split(profile.batch_size)]
    definitions = list(profile.definitions)
    measure_definitions(model, iter(batches[:1]), definitions)  # what only the first pass does
    start = time.process_time()
    measure_definitions(model, iter(batches), definitions)
    seconds = time.process_time() - start
    return seconds / (2 * shape_of(PUBLISHED, words).multiplied * ids.numel())


@contextmanager
def _processes(workers: int) -> Iterator[Any]:
    """Workers that stay for all levels, so that what a process does once, as importing, is paid in
    the first, and not in the times of the later ones."""
    spawn = multiprocessing.get_context("spawn")
    with worker_environment(1), ProcessPoolExecutor(workers, spawn, begin_worker, (1,)) as pool:
        yield pool


def _import_all(_: int) -> None:
    """What jobs import where they need it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    from kelib import evaluation, jobs, mechanism, reactivation  # noqa: F401


def own_seconds(note: Mapping[str, Any]) -> float:
    """Seconds of a finished run (its ``run.json``) had the machine done nothing else: those of its
    processor where these are noted, fewer than passed, and no accelerator was at work."""
    passed = float(note["seconds"])
    if shutil.which("nvidia-smi") is not None:
        return passed
    return min(passed, float(note.get("cpu_seconds", passed)))


def _fitted(profile: Profile, spent: Mapping[str, float], works: Mapping[str, Work]) -> Calibration:
    shape, length = shape_of_profile(profile), profile.corpus.sequence_length
    flops = {n: dataclasses.replace(w, measured=0).flops(shape, length) for n, w in works.items()}
    packed = {name: work.packed for name, work in works.items()}
    speed = {
        "flop": _slope(spent, flops, "continual", "continual, longer"),
        "packed": _slope(spent, packed, "corpus", "corpus, longer"),
    }
    if speed["flop"] == 0:
        raise KelibError(
            f"continual learning of {works['continual, longer'].trained} tokens took "
            f"{spent['continual, longer']} s, no more than of {works['continual'].trained}: the "
            "machine is too busy to be timed; plan again when it is not"
        )
    fixed = {}
    for name in works:
        rest = spent[name] - speed["flop"] * flops[name] - speed["packed"] * packed[name]
        if not name.endswith("longer"):
            fixed[name] = max(rest, 0.0)
    measured = {name: works[name].measured for name in fixed}
    return Calibration(speed["flop"], speed["packed"], fixed, measured)


def _slope(
    spent: Mapping[str, float], amount: Mapping[str, float], short: str, longer: str
) -> float:
    """Seconds of a unit of ``amount``, at least 0."""
    return max(spent[longer] - spent[short], 0.0) / (amount[longer] - amount[short])

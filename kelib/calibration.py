"""How fast this machine is at the runs of a profile: a miniature of it, done and timed. No torch.

The miniature has the model, the lengths and the samples of the profile, one seed, generated text
and a few steps. One run of each kind is done by the code and the worker processes that do the real
ones, as many at once, since they share memory. Their seconds are those of their processor where no
accelerator is at work, so that other work on the machine hardly counts. From them come

* ``flop_seconds``: seconds of a training FLOP, from two runs that differ in nothing but steps;
* ``fixed``: seconds of a run beyond that, by class (:func:`class_of`): of runs that train what is
  left without their training, of others all, for as many tokens as the miniature measured;
* ``packed_seconds``: seconds of a token of a corpus, from two corpora.

Kept for the same machine, versions and settings in ``data/measurements/calibration.json``.
"""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

from kelib import beyond, entities
from kelib.config import Branch, Branches, Model, Profile, Variant, digest
from kelib.errors import KelibError, listing
from kelib.grid import flat_entropy
from kelib.published import PublishedProfile
from kelib.runs import Run, execute
from kelib.scale import shape_of
from kelib.study import Study
from kelib.tables import write_atomically
from kelib.workers import begin_worker, worker_environment
from kelib.workload import Work, shape_of_profile, work_of

STEPS = 30  # of pretraining
SOURCE_TOKENS = 200_000  # of a generated source, at least
SAMPLE_TOKENS = 2**16  # of entropy at most: more would take longer and tell no more
PUBLISHED = Model("llama", 576, 1536, 2, 9)  # layers as wide as those of a small real model
RATIOS = {"moments": 2, "longer": 6}  # steps of continual learning, for each injection


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


def class_of(kind: str, settings: Mapping[str, Any]) -> str:
    """The kind of a run, with what makes it cost more than others of its kind."""
    more = {"entropy": "converge", "continual": "curve"}.get(kind)
    return f"{kind}, {more}" if more and settings.get(more) else kind


def calibrate(profile: Profile, kept: Path) -> Calibration:
    """The calibration for a profile on this machine: read from ``kept``, else measured (minutes at
    most) and added to it.
    """
    known = _read(kept)
    key = digest([machine(), miniature(profile).parameters, profile.workers])
    if key not in known:
        print("calibrating: a miniature of the profile is run and timed, minutes at most")
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
        beside = [_pretraining_beside(study, number) for number in range(1, profile.workers)]
        execute([*runs.values(), *beside], profile.workers, "calibration")
        spent = {name: _seconds(run.read("run.json")) for name, run in runs.items()}
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
        spawn, workers = multiprocessing.get_context("spawn"), profile.workers
        with (
            worker_environment(1),
            ProcessPoolExecutor(workers, spawn, begin_worker, (1,)) as pool,
        ):
            found = mean(pool.map(_published_flop_seconds, [profile] * workers))
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


def _seconds(note: Mapping[str, Any]) -> float:
    """What a run takes on a machine that does nothing else; several threads share its work."""
    if shutil.which("nvidia-smi") is not None:
        return float(note["seconds"])
    return float(min(note["seconds"], note["cpu_seconds"]))


def _pretraining_beside(study: Study, number: int) -> Run:
    plan = study.profile.pretraining
    plan = dataclasses.replace(plan, learning_rate=plan.learning_rate / (1 + number))
    other = dataclasses.replace(study.profile, pretraining=plan)
    return Study(other, study.data).pretrain_run(study.profile.seeds[0])


def _fitted(profile: Profile, spent: Mapping[str, float], works: Mapping[str, Work]) -> Calibration:
    shape, length = shape_of_profile(profile), profile.corpus.sequence_length
    flops = {n: dataclasses.replace(w, measured=0).flops(shape, length) for n, w in works.items()}
    packed = {name: work.packed for name, work in works.items()}
    speed = {
        "flop": _slope(spent, flops, "continual", "continual, longer"),
        "packed": _slope(spent, packed, "corpus", "corpus, longer"),
    }
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
    """Seconds of a unit of ``amount``."""
    if spent[longer] <= spent[short]:
        raise KelibError(
            f"a run of {longer!r} took {spent[longer]} s, no more than one of {short!r}: the "
            "machine is too busy to be timed; plan again when it is not"
        )
    return (spent[longer] - spent[short]) / (amount[longer] - amount[short])


def miniature(profile: Profile) -> Profile:
    """The profile with one seed, one rate, generated text and few steps."""
    corpus, plan = profile.corpus, profile.continual
    length = corpus.sequence_length
    sample = min(corpus.entropy_sequences, max(1, SAMPLE_TOKENS // length))
    # splits of 8 and 10 % must hold what is measured on (kelib.corpus)
    count = math.ceil((sample + corpus.heldout_sequences) * length / (0.08 * SOURCE_TOKENS))
    names = {
        kind: tuple(f"generated:{kind} {n}" for n in range(count)) for kind in ("general", "domain")
    }
    half = STEPS // 2
    steps = {half, *(round(share * STEPS) for share in plan.stages)}
    rate, seed = plan.learning_rates[:1], (*plan.curve_seeds, *plan.seeds)[:1]
    longer = Variant("longer", rate, seed, steps=RATIOS["longer"] * plan.injections)
    decay = 1 + profile.pretraining.optimizer.weight_decay
    sections = {
        name: dataclasses.replace(section, learning_rates=rate)
        for name in ("mechanism", "retention", "reactivation")
        if (section := getattr(profile, name)) is not None
    }
    if profile.branches is not None:
        branch = Branch("branch", half / STEPS, weight_decay=decay)
        sections["branches"] = Branches(rate, (branch,))
    return dataclasses.replace(
        profile,
        profile="calibration",
        seeds=(0,),
        comparison=None,
        executor="local",
        corpus=dataclasses.replace(
            corpus,
            general=names["general"] if corpus.general else (),
            domain=names["domain"],
            entropy_sequences=sample,
            convergence_sequences=min(corpus.convergence_sequences, 4 * sample),
            domain_sequences=min(corpus.domain_sequences, 2 * entities.SEQUENCES),
        ),
        pretraining=dataclasses.replace(
            profile.pretraining,
            steps=STEPS,
            checkpoints=tuple(sorted(steps)),
            optimizer_states=(half, STEPS) if profile.pretraining.optimizer_states else (),
        ),
        continual=dataclasses.replace(
            plan,
            steps=RATIOS["moments"] * plan.injections,
            learning_rates=rate,
            seeds=seed,
            control_seeds=(),
            curve_seeds=plan.curve_seeds[:1],
            variants=(longer,),
        ),
        interventions=dataclasses.replace(
            profile.interventions,
            ratios=profile.interventions.ratios[:1],
            factors=profile.interventions.factors[:1],
            learning_rates=rate,
            arms=(),
            arm_learning_rates=(),
        ),
        **sections,
    )


def sample_runs(study: Study) -> dict[str, Run]:
    """One run of each class of a miniature, and the two that differ from another in size alone."""
    profile = study.profile
    (seed,), step = profile.seeds, profile.pretraining.steps
    plan, (change, *_) = profile.continual, study.resuscitations()
    rate, cl_seed, (longer,) = plan.learning_rates[0], plan.seeds[0], plan.variants
    corpus = study.corpus_run(seed)
    wanted = corpus.settings["wanted"]
    more = {**wanted, "facts": wanted["facts"] + 100 * STEPS}
    if profile.corpus.general:
        more["general"] += 100 * STEPS
    entropy = flat_entropy(study)
    runs = [
        corpus,
        study.pretrain_run(seed),
        study.entropy_run(seed, 0),
        study.entropy_run(seed, step),
        study.evaluate_run(seed, step),
        study.entities_run(seed),
        study.intervene_run(seed, step, change),
        study.continual_run(seed, step, rate, cl_seed, injected=False),
        study.continual_run(seed, step, rate, cl_seed),
        *beyond.mechanism_runs(study, entropy)[-1:],
        *beyond.retention_runs(study, entropy)[-1:],
        *beyond.reactivation_runs(study)[-1:],
        *(run for _, run in beyond.branch_runs(study)),
    ]
    return {
        **{class_of(run.kind, run.settings): run for run in runs},
        "corpus, longer": dataclasses.replace(corpus, settings={**corpus.settings, "wanted": more}),
        "continual, longer": study.continual_run(seed, step, rate, cl_seed, variant=longer),
    }

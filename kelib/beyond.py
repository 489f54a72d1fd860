"""Runs beyond the protocol: they look into what continual learning left, or leave pretraining on
another way. No model is loaded here.
"""

from __future__ import annotations

import dataclasses

import pandas as pd

from kelib.config import Branch, digest
from kelib.runs import Run
from kelib.study import Study


def mechanism_runs(study: Study, entropy: pd.DataFrame) -> list[Run]:
    """Gradients, updates and sensitivity at every stage and rate of the section ``mechanism``;
    none without that section.

    Each looks into the run of the protocol with the first curve seed, which kept its weights (only
    runs of ``continual.curve_seeds`` do).
    """
    if (plan := study.profile.mechanism) is None:
        return []
    cl_seed, runs = study.profile.continual.curve_seeds[0], []
    shared = ("corpus", "training", "continual", "learning_rate", "cl_seed")
    for seed in study.profile.seeds:
        for step in study.stages(entropy, seed).values():
            for rate in plan.learning_rates:
                learned = study.continual_run(seed, step, rate, cl_seed)
                more = {name: learned.settings[name] for name in shared}
                run = study.from_checkpoint("mechanism", seed, step, more)
                inputs = {**run.inputs, "continual": learned}
                runs.append(dataclasses.replace(run, inputs=inputs))
    return runs


def branch_run(study: Study, seed: int, branch: Branch) -> Run:
    """Pretraining of one seed that goes on another way, see :mod:`kelib.branches`.

    The name of a branch is no setting of it. Beside its end the checkpoints of pretraining that lie
    on the way are kept.
    """
    p, trunk = study.profile, study.pretrain_run(seed)
    start, end = branch.span(p.pretraining)
    decay = p.pretraining.optimizer.weight_decay
    more = {
        **{name: trunk.settings[name] for name in ("pretraining", "training", "facts_share")},
        "end": end,
        "kept": [step for step in p.pretraining.checkpoints if start < step < end],
        "weight_decay": decay if branch.weight_decay is None else branch.weight_decay,
        "annealed": branch.annealed,
    }
    run = study.from_checkpoint("branch", seed, start, more)
    settings = {**run.settings, "digest": digest(dict(run.settings))}
    return dataclasses.replace(run, settings=settings)


def branch_runs(study: Study) -> list[tuple[Branch, Run]]:
    """Every branch of every seed; none without the section ``branches``."""
    plan = study.profile.branches
    named = () if plan is None else plan.branches
    return [(b, branch_run(study, seed, b)) for b in named for seed in study.profile.seeds]


def steps_of(run: Run) -> list[int]:
    """Steps of the checkpoints that a branch keeps, in order; the last one is its end."""
    return [*run.settings["kept"], run.settings["end"]]


def branch_measure_runs(study: Study) -> list[Run]:
    """Entropies and knowledge at every checkpoint of every branch."""
    return [
        measure(run.settings["seed"], step, branch=run)
        for _, run in branch_runs(study)
        for step in steps_of(run)
        for measure in (study.entropy_run, study.evaluate_run)
    ]


def branch_grid(study: Study) -> list[tuple[Branch, Run]]:
    """Continual learning with injection from the end of every branch, at the rates of the section,
    with the first CL seed (of the curve seeds, where there are some)."""
    if (plan := study.profile.branches) is None:
        return []
    cl_seed = (*study.profile.continual.curve_seeds, *study.profile.continual.seeds)[0]
    return [
        (b, study.continual_run(run.settings["seed"], steps_of(run)[-1], rate, cl_seed, branch=run))
        for rate in plan.learning_rates
        for b, run in branch_runs(study)
    ]

"""Runs beyond the protocol: they look into what continual learning left, or leave pretraining on
another way. No model is loaded here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pandas as pd

from kelib.config import TEXTS, Branch, digest
from kelib.run import Run
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
    for seed in study.profile.seeds:
        for step in study.stages(entropy, seed).values():
            for rate in plan.learning_rates:
                learned = study.continual_run(seed, step, rate, cl_seed)
                runs.append(_look_into(study, "mechanism", learned))
    return runs


def retention_runs(study: Study, entropy: pd.DataFrame) -> list[Run]:
    """As much training on general text after the continual learning of every stage, and after that
    of every resuscitated last checkpoint, at the rates of the section ``retention``; none without.

    Rates that no intervention is continued with have runs of the stages only.
    """
    if (plan := study.profile.retention) is None:
        return []
    runs, last = [], study.profile.pretraining.steps
    for rate in plan.learning_rates:
        resuscitated = rate in study.profile.interventions.learning_rates
        for seed in study.profile.seeds:
            places: list[tuple[int, dict[str, Any] | None]] = [
                *((step, None) for step in study.stages(entropy, seed).values()),
                *((last, change) for change in (study.resuscitations() if resuscitated else [])),
            ]
            for cl_seed in study.profile.continual.curve_seeds:
                for step, change in places:
                    learned = study.continual_run(seed, step, rate, cl_seed, True, change)
                    more = {"text": TEXTS["general"]}
                    runs.append(_look_into(study, "later", learned, more))
    return runs


def reactivation_runs(study: Study) -> list[Run]:
    """What became of woken memories, for the original and every resuscitation of the last
    checkpoint at the rates of the section ``reactivation``; none without that section.

    A resuscitation is asked about the memories that it woke itself, the original about those of
    every ratio of the profile.
    """
    if (plan := study.profile.reactivation) is None:
        return []
    runs, last = [], study.profile.pretraining.steps
    for rate in plan.learning_rates:
        for seed in study.profile.seeds:
            for cl_seed in study.profile.continual.curve_seeds:
                for change in (None, *study.resuscitations()):
                    learned = study.continual_run(seed, last, rate, cl_seed, True, change)
                    ratios = list(study.profile.interventions.ratios)
                    asked = ratios if change is None else [change["ratio"]]
                    more = {"ratios": asked, "draws": plan.draws, "intervention": change}
                    run = _look_into(study, "reactivation", learned, more)
                    inputs = {**run.inputs, "entropy": study.entropy_run(seed, last)}
                    runs.append(dataclasses.replace(run, inputs=inputs))
    return runs


def looks(study: Study, entropy: pd.DataFrame) -> list[Run]:
    """All runs of stage 6."""
    return [
        *mechanism_runs(study, entropy),
        *retention_runs(study, entropy),
        *reactivation_runs(study),
    ]


def departures(study: Study) -> list[Run]:
    """All runs of stage 7."""
    named = [*branch_runs(study), *branch_grid(study)]
    return [*(run for _, run in named), *branch_measure_runs(study)]


def _look_into(study: Study, kind: str, learned: Run, more: dict[str, Any] | None = None) -> Run:
    """A run of ``kind`` that takes the weights a run of continual learning kept."""
    shared = ("corpus", "training", "continual", "learning_rate", "cl_seed")
    same = {name: learned.settings[name] for name in shared}
    place = (learned.settings["seed"], learned.settings["step"])
    run = study.from_checkpoint(kind, *place, {**same, **(more or {})})
    return dataclasses.replace(run, inputs={**run.inputs, "continual": learned})


def branch_run(study: Study, seed: int, branch: Branch) -> Run:
    """Pretraining of one seed that goes on another way, see :mod:`kelib.branches`.

    The name of a branch is no setting of it. Beside its end it keeps the checkpoints near
    the stages that lie on the way.
    """
    p, trunk = study.profile, study.pretrain_run(seed)
    start, end = branch.span(p.pretraining)
    decay = p.pretraining.optimizer.weight_decay
    more = {
        **{name: trunk.settings[name] for name in ("pretraining", "training", "facts_share")},
        "end": end,
        "kept": [step for step in study.near_stages() if start < step < end],
        "weight_decay": decay if branch.weight_decay is None else branch.weight_decay,
        "annealed": branch.annealed,
        "final_share": branch.final_share,
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

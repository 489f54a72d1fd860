"""Runs beyond the protocol: they look into what continual learning left, or go on from there.

They take the weights that the runs of ``continual.curve_seeds`` keep; no model is loaded here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pandas as pd

from kelib.config import TEXTS
from kelib.runs import Run
from kelib.study import Study


def mechanism_runs(study: Study, entropy: pd.DataFrame) -> list[Run]:
    """Gradients, updates and sensitivity at every stage and rate of the section ``mechanism``;
    none without that section.

    Each looks into the run of the protocol with the first curve seed, which kept its weights.
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


def all_runs(study: Study, entropy: pd.DataFrame) -> list[Run]:
    """All of stage 6."""
    looks = mechanism_runs(study, entropy), retention_runs(study, entropy), reactivation_runs(study)
    return [run for runs in looks for run in runs]


def _look_into(study: Study, kind: str, learned: Run, more: dict[str, Any] | None = None) -> Run:
    """A run of ``kind`` that takes the weights a run of continual learning kept."""
    shared = ("corpus", "training", "continual", "learning_rate", "cl_seed")
    same = {name: learned.settings[name] for name in shared}
    place = (learned.settings["seed"], learned.settings["step"])
    run = study.from_checkpoint(kind, *place, {**same, **(more or {})})
    return dataclasses.replace(run, inputs={**run.inputs, "continual": learned})

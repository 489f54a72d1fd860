"""Runs beyond the protocol: they look into what continual learning left, or go on from there.

They take the weights that the runs of ``continual.curve_seeds`` keep; no model is loaded here.
"""

from __future__ import annotations

import dataclasses

import pandas as pd

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

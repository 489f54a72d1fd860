"""A study so short that tests can do it: one seed, twenty steps, stages 1 and 2."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest

from kelib import corpus, stages
from kelib.config import load_profile
from kelib.runs import perform, with_inputs
from kelib.study import Study

SHORT = {
    "seeds": [100],
    "workers": 1,
    "comparison": None,
    "regimes": None,
    "pretraining.steps": 20,
    "pretraining.checkpoints": [1, 10],
    "pretraining.optimizer_states": [],
    "continual.steps": 10,
    "continual.seeds": [0],
    "continual.variants": [],
}


def do(runs):
    """Runs and what they rest on, in this process: starting others would take longer than all."""
    for level in with_inputs(runs):
        for run in level:
            perform(run)


@dataclass
class Measured:
    """A study after stages 1 and 2, and its table entropy."""

    study: Study
    entropy: pd.DataFrame


def measured_study(data: Path, changes: dict[str, object]) -> Measured:
    """Profile smoke as in :data:`SHORT` with other ``changes``; ``section: None`` leaves it out."""
    study = Study(load_profile("smoke", {**SHORT, **changes}), data)
    with pytest.MonkeyPatch.context() as patch:  # less text, so that this is done in a second
        patch.setattr(corpus, "GENERATED_DOCUMENTS", 1500)
        patch.setattr(corpus, "TOKENIZER_CHARACTERS", 100_000)
        perform(study.corpus_run(study.profile.seeds[0]))
    do([*study.measure_runs(), *study.entities_runs()])
    stages.until(study, 2)
    return Measured(study, stages.table(study, "entropy"))

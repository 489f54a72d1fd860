"""Studies so short that tests can do them, and what tests of their runs share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest

from kelib import corpus
from kelib.config import load_profile
from kelib.runs import Run, perform, with_inputs
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
# A pretraining of a second; what is saved, and how often, is for each file to say.
TINY = {
    "seeds": [100],
    "corpus.vocabulary_size": 320,
    "corpus.sequence_length": 32,
    "model.hidden_size": 16,
    "model.intermediate_size": 32,
    "pretraining.batch_size": 4,
    "branches": None,
    "regimes": None,
}


@contextmanager
def less_text(documents: int = 1500, characters: int = 100_000) -> Iterator[None]:
    """Corpora of fewer generated documents, and tokenizers trained on fewer characters: built in a
    second.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "GENERATED_DOCUMENTS", documents)
        patch.setattr(corpus, "TOKENIZER_CHARACTERS", characters)
        yield


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
    from kelib import stages  # its imports would cost those who want less_text alone

    study = Study(load_profile("smoke", {**SHORT, **changes}), data)
    with less_text():
        perform(study.corpus_run(study.profile.seeds[0]))
    do([*study.measure_runs(), *study.entities_runs()])
    stages.until(study, 2)
    return Measured(study, stages.table(study, "entropy"))


def pretrained_study(data: Path, changes: dict[str, object]) -> Study:
    """Profile smoke with ``changes``: its corpus is built, its pretraining done undisturbed."""
    study = Study(load_profile("smoke", changes), data)
    with less_text(600, 50_000):
        perform(study.corpus_run(100))
    perform(study.pretrain_run(100))
    return study


def with_corpus_alone(study: Study, data: Path) -> Study:
    """The same study in a data folder of its own, where only the corpus is done."""
    shutil.copytree(study.data / "corpus", data / "corpus")
    return Study(study.profile, data)


def inputs_of(run: Run) -> dict[str, Path]:
    """The folders and files that a job is called with."""
    return {name: made.folder for name, made in run.inputs.items()} | dict(run.files)


def rows_of(table: pd.DataFrame, **wanted: object) -> pd.DataFrame:
    """The rows with these values in these columns."""
    return table[(table[list(wanted)] == list(wanted.values())).all(axis=1)]

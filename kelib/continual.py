"""Continual knowledge learning: what is read in which order, and what is known along the way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from kelib.corpus import sequence_order
from kelib.evaluation import score_probes
from kelib.metrics import knowledge_by
from kelib.world import World


def reading_order(available: int, wanted: int, epochs: int, seed: int) -> np.ndarray:
    """Indices ``(wanted,)`` of the sequences that continual learning reads.

    One epoch is ``wanted / epochs`` sequences drawn from ``seed``; each further epoch reads the
    same ones in another order, as the three epochs of the paper's Table 1 do.
    """
    once = sequence_order(available, wanted // epochs, 1000 + seed)
    generator = np.random.default_rng([seed, 31])
    return np.concatenate([once, *(generator.permutation(once) for _ in range(1, epochs))])


class LearningCurve:
    """Probes scored before and after every injection, so that forgetting in between shows.

    ``moments`` are the steps (from 0) whose batch ends an injection. After each of them the probes
    are scored (phase ``after``); and in the last step before the next passage is read (phase
    ``before``). Rows: step (done so far), phase, entry_set, level, knowledge (nats per target
    token).
    """

    def __init__(self, model: Any, tokenizer: Any, world: World, schedule: pd.DataFrame) -> None:
        self.model, self.tokenizer, self.world = model, tokenizer, world
        first = schedule["step"] + schedule["moved"]  # the step of the moment
        begins = schedule.groupby(first)["step"].min()
        self.phases = {int(step): "before" for step in begins}  # steps done when passages come
        self.phases |= {int(step) + 1: "after" for step in begins.index}
        self.rows: list[pd.DataFrame] = []

    def on_step(self, steps_done: int) -> None:
        """Score if ``steps_done`` is one of the moments."""
        phase = self.phases.get(steps_done)
        if phase is None:
            return
        probes = score_probes(self.model, self.tokenizer, self.world)
        table = knowledge_by(probes, ["entry_set", "level"])
        self.rows.append(table.assign(step=steps_done, phase=phase))

    def table(self) -> pd.DataFrame:
        """All rows, in order of steps."""
        columns = ["step", "phase", "entry_set", "level", "knowledge"]
        return pd.concat(self.rows, ignore_index=True)[columns]

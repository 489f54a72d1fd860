"""Continual knowledge learning: what is read in which order, and what is known along the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kelib import seals
from kelib.corpus import sequence_order
from kelib.errors import KelibError
from kelib.evaluation import score_probes
from kelib.injection import Injector
from kelib.metrics import knowledge_by
from kelib.tables import write_atomically
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


def save(path: Path, trainer: Any, injector: Injector, curve: LearningCurve | None) -> None:
    """Write all that a run needs to go on as if it had not been interrupted.

    What was counted and scored goes into a second file, before the state of the training: after a
    kill in between it is ahead of the state, and :func:`resume` cuts it back.
    """
    rows = [] if curve is None else [table.to_dict("list") for table in curve.rows]
    kept = seals.sealed({"injector": injector.state_dict(), "curve": rows})
    write_atomically(_beside(path), json.dumps(kept))
    trainer.save_state(path)


def resume(path: Path, trainer: Any, injector: Injector, curve: LearningCurve | None) -> None:
    """Go on from what :func:`save` wrote. KelibError if it is broken or of another run."""
    trainer.load_state(path)
    try:
        kept = seals.unsealed(json.loads(_beside(path).read_text()))
        injector.load_state_dict(kept["injector"], trainer.step)
        rows = [pd.DataFrame(table) for table in kept["curve"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise KelibError(f"{_beside(path)} is not of this run ({error}); delete {path}") from error
    if curve is not None:
        curve.rows = [table for table in rows if table["step"].iloc[0] <= trainer.step]


def _beside(path: Path) -> Path:
    return path.with_suffix(".json")

"""transformers' ``Trainer``, let on by so many steps at a time: its set-up stays off the clock."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Semaphore, Thread
from typing import Any

from transformers import Trainer, TrainerCallback, TrainingArguments

from kelib.errors import KelibError


class PacedTrainer(TrainerCallback):
    """``train()`` runs in a thread of its own and waits at the beginning of every step.

    So between two calls of :meth:`run` it stands between two steps: what a call takes is whole
    turns of its loop, the fetching of the next batch among them.
    """

    def __init__(self, model: Any, rows: Sequence[Any], arguments: TrainingArguments) -> None:
        self._allowed, self._begun = Semaphore(0), Semaphore(0)
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[self])
        self._thread = Thread(target=trainer.train, daemon=True)  # it never ends by itself
        self._thread.start()
        self._wait()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._begun.release()
        self._allowed.acquire()

    def run(self, steps: int) -> None:
        """Train ``steps`` steps more, up to the beginning of the one after them."""
        self._allowed.release(steps)
        for _ in range(steps):
            self._wait()

    def _wait(self) -> None:
        while not self._begun.acquire(timeout=1):
            if not self._thread.is_alive():
                raise KelibError(
                    "transformers' Trainer stopped before the steps asked of it; what it raised "
                    "is printed above: correct the settings of the row"
                )

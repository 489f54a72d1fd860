"""Watch knowledge entropy while a model trains, in transformers' Trainer or in kelib's own."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import TrainerCallback

from kelib.accumulation import Coefficient, definition_name
from kelib.architectures import unwrap
from kelib.entropy import measure_entropy
from kelib.errors import KelibError
from kelib.processes import require_whole

if TYPE_CHECKING:
    from kelib.training import Trainer

NAME = "knowledge_entropy"


class EntropyCallback(TrainerCallback):
    """Knowledge entropy (Eq. 2) of a fixed sample, every ``every`` optimizer steps of a training.

    In transformers' Trainer::

        watch = EntropyCallback(batches, every=100)
        watch.attach(trainer)  # instead of callbacks=[watch]
        trainer.train()
        pandas.DataFrame(watch.rows)

    In :class:`kelib.training.Trainer`::

        trainer.run(on_step=watch.on_step)

    **Cost.** One forward pass of the trunk (no vocabulary projection, no gradients) over the sample
    for every ``every`` steps, and in transformers' Trainer one before the first step. With ``b``
    batches of the size of a training batch, whose step costs about three forward passes, that is
    near ``b / (3 every)`` of the training time. What it took is in every row and in
    :attr:`seconds`.

    **What is logged**: ``knowledge_entropy`` (nats, the sum over layers),
    ``knowledge_entropy_layer_0`` and so on, ``knowledge_entropy_seconds``. A callback of
    transformers is not told its Trainer. After :meth:`attach` the values go through
    ``Trainer.log``: into ``state.log_history`` and to every tracker. Passed as ``callbacks=[...]``
    they go into ``state.log_history`` (hence into ``trainer_state.json``) and to no tracker.

    **What is left alone.** Training gives the same bits with and without it: the model runs without
    dropout and is put back into its mode, random states of torch, numpy and Python are put back,
    and the loss is logged when it would have been (``Trainer.log`` in the middle of a step would
    have cancelled that). The weights are read as they are stored, without autocast.

    Args:
        batches: the sample, as for :func:`kelib.measure_entropy`. It is read once, here, and kept
            in memory, so that every point is of the same sequences; a shuffled DataLoader will do.
        every: optimizer steps between two measurements.
        coefficient, router_weight: as for :func:`kelib.measure_entropy`.
        process_group: None: every process measures the whole sample; ``"world"``: the processes
            share it, which needs all of them to come by at the same step, as they do in training.

    Attributes:
        rows: one dict a measurement, ``step`` and what is logged. Steps of a run that was resumed
            are only in ``state.log_history``.

    Raises KelibError for ``every`` below 1 and an empty sample; while training whatever
    :func:`kelib.measure_entropy` raises, such as NaN in the weights, and stops it; also for weights
    that are divided over processes (FSDP, ZeRO-3), which no process can measure alone.
    """

    def __init__(
        self,
        batches: Iterable[Mapping[str, Any]],
        every: int,
        *,
        coefficient: Coefficient = "absolute",
        router_weight: bool = True,
        process_group: Any = None,
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise KelibError(f"every = {every!r} must be a whole number of steps, at least 1")
        definition_name(coefficient)
        with _random_states_kept():
            self.batches = list(batches)
        if not self.batches:
            raise KelibError("no batch to watch: the sample is empty, or an iterator used before")
        self.every = every
        self.options = {
            "coefficient": coefficient,
            "router_weight": router_weight,
            "process_group": process_group,
        }
        self.rows: list[dict[str, float]] = []
        self._trainer: Any = None

    @property
    def seconds(self) -> float:
        """What all measurements took together."""
        return sum(row[f"{NAME}_seconds"] for row in self.rows)

    def attach(self, trainer: Any) -> EntropyCallback:
        """Join ``trainer`` (transformers'), and log through it. Returns itself."""
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        self._trainer = trainer
        return self

    def measure(self, model: Any, step: int) -> dict[str, float]:
        """Measure now; the row is kept in :attr:`rows` and returned."""
        require_whole(model)
        model = unwrap(model)
        device = model.get_input_embeddings().weight.device
        if device.type != "cpu":
            torch.accelerator.synchronize(device)  # training steps still under way are not ours
        start = time.perf_counter()
        with _random_states_kept(device):
            found = measure_entropy(model, self.batches, **self.options).knowledge_entropy
        row: dict[str, float] = {"step": step, NAME: float(found.sum())}
        row |= {f"{NAME}_layer_{layer}": float(value) for layer, value in enumerate(found)}
        row[f"{NAME}_seconds"] = time.perf_counter() - start
        self.rows.append(row)
        return row

    def on_step(self, steps_done: int, trainer: Trainer) -> None:
        """For ``kelib.training.Trainer.run(on_step=...)``.

        Nothing is measured before the first step: call ``watch.on_step(0, trainer)`` for that.
        """
        if steps_done % self.every == 0:
            self.measure(trainer.accelerator.unwrap_model(trainer.model), steps_done)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        """Called by transformers' Trainer: the first point, unless the run is resumed."""
        if state.global_step == 0:
            self._log(state, control, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Called by transformers' Trainer after each optimizer step."""
        if state.global_step % self.every == 0:
            self._log(state, control, model)

    def _log(self, state: Any, control: Any, model: Any) -> None:
        row = self.measure(model, state.global_step)
        values = {name: value for name, value in row.items() if name != "step"}
        if self._trainer is None:
            state.log_history.append({**values, "epoch": state.epoch, "step": state.global_step})
            return
        # log() takes the step's own logging as done, so that its loss would be left out
        due = control.should_log
        self._trainer.log(values)
        control.should_log = due


@contextmanager
def _random_states_kept(device: torch.device | None = None) -> Iterator[None]:
    """Put the random states of torch, on the CPU and ``device``, numpy and Python back."""
    numpys, pythons = np.random.get_state(), random.getstate()
    gpus = [device] if device is not None and device.type == "cuda" else []
    try:
        with torch.random.fork_rng(gpus):
            yield
    finally:
        np.random.set_state(numpys)
        random.setstate(pythons)

"""The one training loop, for pretraining and for continual learning, on accelerate."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kelib.config import Optimizer
from kelib.errors import KelibError

LOSS_EVERY = 25  # steps between two readings of the loss: reading waits for an accelerator


def learning_rate_at(step: int, steps: int, peak: float, settings: Optimizer) -> float:
    """Learning rate of ``step`` (from 0): linear warm-up to ``peak``, cosine to ``final_share``.

    ``lr = peak (s + 1) / w`` for ``s < w``, else
    ``peak (f + (1 - f) (1 + cos(pi (s - w) / (n - w))) / 2)`` with ``w`` warm-up steps of ``n``.
    """
    warmup = math.ceil(settings.warmup_share * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    low = settings.final_share
    return peak * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))


class Trainer:
    """AdamW on batches that are a pure function of the step, so that a resumed run is the same run.

    Args:
        model: a causal language model of transformers; trained in place, no dropout expected.
        batch_at: step (from 0) -> token ids ``(B, T)`` of the *global* batch; each process takes
            its equal share of the rows.
        steps, learning_rate, settings: the schedule, see :func:`learning_rate_at`.

    Weight decay goes to matrices only (embeddings included); vectors (norms, biases) have none.
    """

    def __init__(
        self,
        model: Any,
        batch_at: Callable[[int], np.ndarray],
        steps: int,
        learning_rate: float,
        settings: Optimizer,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.accelerator = accelerator or Accelerator(cpu=not torch.cuda.is_available())
        self.batch_at, self.steps = batch_at, steps
        self.learning_rate, self.settings = learning_rate, settings
        matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
        vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": settings.weight_decay}]
        if vectors:
            groups.append({"params": vectors, "weight_decay": 0.0})
        optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=settings.betas, fused=True)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.step = 0
        self.losses: list[float] = []
        self._unread: list[torch.Tensor] = []

    def run(
        self, until: int | None = None, on_step: Callable[[int, Trainer], None] | None = None
    ) -> None:
        """Train up to step ``until`` (default: the end).

        ``on_step(steps_done, trainer)`` is called after each step. Raises KelibError at a loss that
        is not finite, naming its step; what was saved before stays.
        """
        self.model.train()
        for step in range(self.step, self.steps if until is None else until):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate_at(step, self.steps, self.learning_rate, self.settings)
            ids = self._share(self.batch_at(step))
            loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self._unread.append(loss.detach())
            self.step = step + 1
            if self.step % LOSS_EVERY == 0:
                self.read_losses()
            if on_step is not None:
                on_step(self.step, self)
        self.read_losses()

    def _share(self, batch: np.ndarray) -> torch.Tensor:
        processes = self.accelerator.num_processes
        if len(batch) % processes:
            raise KelibError(
                f"batch_size = {len(batch)} must be a multiple of {processes} processes"
            )
        size = len(batch) // processes
        first = self.accelerator.process_index * size
        rows = torch.from_numpy(batch[first : first + size].astype(np.int64))
        return rows.to(self.accelerator.device)

    def read_losses(self) -> None:
        """Move the latest losses to ``losses`` (nats per token, this process's share).

        Raises KelibError, naming the step, at one that is not finite.
        """
        if not self._unread:
            return
        values = torch.stack(self._unread).float().cpu().tolist()
        self._unread = []
        first = len(self.losses) + 1
        self.losses += values
        for offset, value in enumerate(values):
            if not math.isfinite(value):
                raise KelibError(
                    f"loss is {value} at step {first + offset} of {self.steps} (learning rate "
                    f"{self.learning_rate:g}); lower the learning rate; earlier checkpoints are "
                    "kept"
                )

    def save_state(self, path: Path) -> None:
        """Write weights, moments, step and losses in one safetensors file, whole or not at all."""
        self.read_losses()
        model = self.accelerator.unwrap_model(self.model)
        tensors = {f"model.{k}": v.detach().contiguous() for k, v in model.named_parameters()}
        names = {id(p): name for name, p in model.named_parameters()}
        for parameter, moments in self.optimizer.state.items():
            for key, value in moments.items():
                tensors[f"{key}.{names[id(parameter)]}"] = torch.as_tensor(value).contiguous()
        temporary = path.with_name(path.name + f".{os.getpid()}.tmp")
        notes = {"step": str(self.step), "losses": json.dumps(self.losses)}
        save_file(tensors, temporary, metadata=notes)
        temporary.replace(path)

    def load_state(self, path: Path) -> None:
        """Continue where :meth:`save_state` stopped, as if the run had not been interrupted.

        Raises KelibError for a file that is missing, broken or of another model.
        """
        model = self.accelerator.unwrap_model(self.model)
        device = str(self.accelerator.device)  # fused AdamW wants its moments beside the weights
        try:
            with safe_open(path, framework="pt", device=device) as state:
                notes = state.metadata()
                step, losses = int(notes["step"]), json.loads(notes["losses"])
                stored = set(state.keys())
                for name, parameter in model.named_parameters():
                    parameter.data.copy_(state.get_tensor(f"model.{name}"))
                    if f"step.{name}" in stored:  # not before the first step, not if it is frozen
                        self.optimizer.state[parameter] = {
                            key: state.get_tensor(f"{key}.{name}")
                            for key in ("step", "exp_avg", "exp_avg_sq")
                        }
        except (
            SafetensorError,
            OSError,
            RuntimeError,
            TypeError,
            LookupError,
            ValueError,
        ) as error:
            raise KelibError(f"{path} is not a state of this run ({error}); delete it") from error
        self.step, self.losses = step, losses

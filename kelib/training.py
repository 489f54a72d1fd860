"""The one training loop, for pretraining and for continual learning, on accelerate."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import safe_open

from kelib.config import Optimizer
from kelib.errors import KelibError, listing
from kelib.state_files import BROKEN, read_notes, refusal, write_state

LOSS_EVERY = 25  # steps between two readings of the loss: reading waits for an accelerator
PRECISIONS = ("float32", "bf16")


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

    The gradient of a step is that of the mean cross-entropy (nats per token) over the tokens of the
    *global* batch, whatever the number of processes and the micro-batch: a micro-batch of ``b`` of
    the ``s`` sequences of a process weighs ``b / s``, and the processes, whose shares are equal,
    are averaged. Terms that a model adds to its own loss (a router's balance) are left out.

    Args:
        model: a causal language model of transformers; trained in place, no dropout expected.
        batch_at: step (from 0) -> token ids ``(B, T)`` of the global batch, without padding; each
            process calls it for every step and takes its equal share of the rows.
        steps, learning_rate, settings: the schedule, see :func:`learning_rate_at`.
        accelerator: one of accelerate, without its own accumulation or mixed precision.
        micro_batch_size: sequences a process runs at once; gradients accumulate over its share of
            the global batch (the last micro-batch may be smaller). None: the whole share at once.
        precision: ``"float32"`` (the weights' own type throughout) or ``"bf16"``: forward under
            bfloat16 autocast, loss in float32. Weights, gradients and moments keep their type.
        compile: run the forward pass through ``torch.compile``. ``model`` itself, hence what is
            saved and measured, stays uncompiled.

    Weight decay goes to matrices only (embeddings included); vectors (norms, biases) have none.

    Raises KelibError for a micro-batch below 1, an unknown precision and an accelerator that
    accumulates or mixes precisions by itself.
    """

    def __init__(
        self,
        model: Any,
        batch_at: Callable[[int], np.ndarray],
        steps: int,
        learning_rate: float,
        settings: Optimizer,
        accelerator: Accelerator | None = None,
        *,
        micro_batch_size: int | None = None,
        precision: str = "float32",
        compile: bool = False,
    ) -> None:
        if precision not in PRECISIONS:
            raise KelibError(f"precision = {precision!r} must be one of {listing(PRECISIONS)}")
        if micro_batch_size is not None and micro_batch_size < 1:
            raise KelibError(
                f"micro_batch_size = {micro_batch_size} must be at least 1, or None for the whole "
                "share of a process"
            )
        self.accelerator = accelerator or Accelerator(cpu=not torch.cuda.is_available())
        _require_plain(self.accelerator)
        self.batch_at, self.steps = batch_at, steps
        self.learning_rate, self.settings = learning_rate, settings
        self.micro_batch_size, self.precision = micro_batch_size, precision
        self._trained = [p for p in model.parameters() if p.requires_grad]
        matrices = [p for p in self._trained if p.ndim >= 2]
        vectors = [p for p in self._trained if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": settings.weight_decay}]
        if vectors:
            groups.append({"params": vectors, "weight_decay": 0.0})
        self.model = self.accelerator.prepare(model)  # moves the parameters, in place
        # not accelerate's wrapper: it searches for an optional package at every step
        self.optimizer = torch.optim.AdamW(
            groups, lr=learning_rate, betas=settings.betas, fused=True
        )
        self.compile = compile
        # a second callable: compiled in place, the model would pass by hooks that are set later
        self._forward = torch.compile(self.model, dynamic=False) if compile else self.model
        self.step = 0
        self.losses: list[float] = []
        self._unread: list[torch.Tensor] = []

    def run(
        self, until: int | None = None, on_step: Callable[[int, Trainer], None] | None = None
    ) -> None:
        """Train up to step ``until`` (default: the end).

        ``on_step(steps_done, trainer)`` is called after each step. Raises KelibError at a loss that
        is not finite, naming its step; what was saved before stays. Raises KelibError for a global
        batch that the processes cannot share equally.
        """
        self.model.train()
        for step in range(self.step, self.steps if until is None else until):
            rate = learning_rate_at(step, self.steps, self.learning_rate, self.settings)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            loss = self._accumulate(self._share(self.batch_at(step)))
            self.accelerator.clip_grad_norm_(self._trained, self.settings.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self._unread.append(loss)
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
        if self.accelerator.device.type == "cuda":
            rows = rows.pin_memory()  # else the copy waits for the steps still under way
        return rows.to(self.accelerator.device, non_blocking=True)

    def _accumulate(self, ids: torch.Tensor) -> torch.Tensor:
        """Gradients of this process's share, micro-batch by micro-batch; returns its mean loss."""
        parts = ids.split(self.micro_batch_size or len(ids))
        assert sum(map(len, parts)) == len(ids)  # the weights below sum to 1
        losses = []
        for number, part in enumerate(parts, start=1):
            last = number == len(parts)  # only then do the processes exchange gradients
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                loss = self._loss(part)
                if len(parts) > 1:
                    loss = loss * (len(part) / len(ids))
                self.accelerator.backward(loss)
            losses.append(loss.detach())
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _loss(self, ids: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy (nats per token) of each token given those before it in its row.

        Not the loss of transformers, which rounds the logits of a float64 model to float32.
        """
        bf16 = self.precision == "bf16"
        with torch.autocast(ids.device.type, torch.bfloat16) if bf16 else nullcontext():
            try:
                logits = self._forward(input_ids=ids, use_cache=False).logits
            except Exception as error:
                if not self.compile or not type(error).__module__.startswith("torch._"):
                    raise
                reason = " ".join(str(error).split())[:200]
                raise KelibError(
                    f"compile = True failed ({type(error).__name__}: {reason}); install a C++ "
                    "compiler, or train with compile = False"
                ) from error
        if logits.dtype != torch.float64:
            logits = logits.float()
        # the labels are shifted, not the logits, which would be copied; -100 is left out
        labels = torch.nn.functional.pad(ids, (0, 1), value=-100)[:, 1:]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    def read_losses(self) -> None:
        """Move the latest losses to ``losses`` (nats per token, mean over the global batch).

        With several processes all of them call it at the same step (:meth:`run` and
        :meth:`save_state` do), and all get the same values. Raises KelibError, naming the step, at
        one that is not finite.
        """
        if not self._unread:
            return
        latest = torch.stack(self._unread)
        if self.accelerator.num_processes > 1:
            latest = self.accelerator.reduce(latest, "mean")
        values = latest.cpu().double().tolist()
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
        """Write weights, moments, step and losses in one safetensors file, whole or not at all.

        The sha256 of its content is part of it, so that one that was changed is not gone on from.
        With several processes all of them call it; the main one writes, the others wait for it.
        """
        self.read_losses()
        if self.accelerator.is_main_process:
            self._write_state(path)
        self.accelerator.wait_for_everyone()

    def _write_state(self, path: Path) -> None:
        model = self.accelerator.unwrap_model(self.model)
        tensors = {f"model.{k}": v.detach().contiguous() for k, v in model.named_parameters()}
        names = {id(p): name for name, p in model.named_parameters()}
        for parameter, moments in self.optimizer.state.items():
            for key, value in moments.items():
                tensors[f"{key}.{names[id(parameter)]}"] = torch.as_tensor(value).contiguous()
        write_state(path, tensors, {"step": self.step, "losses": self.losses})

    def load_state(self, path: Path) -> None:
        """Continue where :meth:`save_state` stopped, as if the run had not been interrupted.

        Raises KelibError for a file that is missing, broken, changed or of another model.
        """
        self.step, self.losses = self._read_state(path, weights=True)

    def load_moments(self, path: Path) -> None:
        """Begin with the moments of a run that :meth:`save_state` kept; weights and step stay.

        Raises as :meth:`load_state`.
        """
        self._read_state(path, weights=False)

    def _read_state(self, path: Path, weights: bool) -> tuple[int, list[float]]:
        model = self.accelerator.unwrap_model(self.model)
        # fused AdamW wants its moments beside the weights; safetensors knows cpu, but not cpu:0
        device = "cpu" if self.accelerator.device.type == "cpu" else str(self.accelerator.device)
        try:
            notes = read_notes(path)
            step, losses = int(notes["step"]), list(notes["losses"])
            with safe_open(path, framework="pt", device=device) as state:
                stored = set(state.keys())
                for name, parameter in model.named_parameters():
                    kept = state.get_tensor(f"model.{name}")
                    if kept.shape != parameter.shape:
                        raise ValueError(f"{name} has shape {tuple(kept.shape)} there")
                    if weights:
                        parameter.data.copy_(kept)
                    if f"step.{name}" in stored:  # not before the first step, not if it is frozen
                        self.optimizer.state[parameter] = {
                            key: state.get_tensor(f"{key}.{name}")
                            for key in ("step", "exp_avg", "exp_avg_sq")
                        }
        except BROKEN as error:
            raise refusal(path, error) from error
        return step, losses


def _require_plain(accelerator: Accelerator) -> None:
    """Accelerate's precision and accumulation are settings of the whole process; ours are not."""
    mixed, accumulation = accelerator.mixed_precision, accelerator.gradient_accumulation_steps
    if mixed != "no" or accumulation != 1:
        raise KelibError(
            f"accelerate is set to mixed_precision = {mixed!r} and gradient_accumulation_steps = "
            f"{accumulation}; they must be 'no' and 1: use precision and micro_batch_size instead"
        )

"""Weights, gradients and moments divided over processes (FSDP2), for models too large for one GPU.

``torch.distributed.fsdp.fully_shard`` divides every parameter over the processes along its first
dimension; it is whole only while its layer computes. accelerate's own plugin for it does nothing
on a CPU and says so nowhere, so kelib calls the function itself, and the same code runs with gloo
and with nccl. The training stays that of :class:`kelib.training.Trainer`, see :func:`trainer_of`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.utils.checkpoint import checkpoint

from kelib.architectures import decoder_layers
from kelib.config import Optimizer
from kelib.errors import KelibError
from kelib.training import Trainer

PARALLEL = ("ddp", "fsdp2")  # weights whole in every process, or divided


def shard(model: Any, mesh: Any = None) -> Any:
    """``model`` itself, its parameters now DTensors: every decoder layer is one group, the rest
    (embeddings, last norm, vocabulary projection) another.

    Args:
        model: a causal language model of transformers with the same weights in all processes.
        mesh: a DeviceMesh of one dimension; None: all processes, on their GPUs if there are any.

    To be called before an optimizer is built, as the parameters are replaced. Gradients are means
    over the processes. Raises KelibError without torch.distributed.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if not (dist.is_available() and dist.is_initialized()):
        raise KelibError(
            "weights are divided over the processes of torch.distributed, which is not "
            "initialised; start several with accelerate launch or torchrun, or leave shard out"
        )
    if mesh is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        mesh = init_device_mesh(device, (dist.get_world_size(),))
    for part in (*decoder_layers(model), model):
        fully_shard(part, mesh=mesh)
    if mesh.device_type == "cpu":
        for part in model.modules():
            if isinstance(part, FSDPModule):
                # some releases' gloo sums where a mean is asked (pytorch issue 162338)
                part.set_force_sum_reduction_for_comms(True)
    return model


def recompute_activations(model: Any) -> Any:
    """``model`` itself; each decoder layer keeps its input only and computes again in the backward
    pass (activation checkpointing). Numbers stay the same.

    The layer's ``forward`` is wrapped, so that hooks (those that gather weights too) stay outside.
    """
    for layer in decoder_layers(model):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    return model


def trainer_of(
    parallel: str,
    model: Any,
    batch_at: Callable[[int], np.ndarray],
    steps: int,
    learning_rate: float,
    settings: Optimizer,
    *,
    recompute: bool = False,
    **options: Any,
) -> Trainer:
    """A :class:`kelib.training.Trainer` of ``model``, its weights whole in every process
    (``"ddp"``) or divided (``"fsdp2"``); in one process alone they are whole.

    ``options`` are the Trainer's others, without an accelerator. ``recompute``: see
    :func:`recompute_activations`. With divided weights every micro-batch exchanges gradients: kept
    until the last one, they would be whole in every process.
    """
    if recompute:
        recompute_activations(model)
    cpu = not torch.cuda.is_available()
    accelerator = Accelerator(cpu=cpu)  # joins the other processes
    if parallel == "fsdp2" and accelerator.num_processes > 1:
        model, accelerator = shard(model), _AsItIs(cpu=cpu)
    return Trainer(model, batch_at, steps, learning_rate, settings, accelerator, **options)


class _AsItIs(Accelerator):
    """Takes a model that is divided already, where accelerate would refuse or divide it again."""

    def prepare(self, *args: Any, **_: Any) -> Any:
        (model,) = args
        return model


def wishes_of_launcher() -> tuple[str, bool]:
    """(``"ddp"`` or ``"fsdp2"``, whether to recompute activations) as the configuration given to
    ``accelerate launch`` asks; without one, ``("ddp", False)``.

    Raises KelibError for what kelib does not do: FSDP 1 and weights kept on the CPU.
    """

    def asked(name: str) -> bool:
        return os.environ.get(name, "false").lower() in ("true", "1", "yes")

    if not asked("ACCELERATE_USE_FSDP"):
        return "ddp", False
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise KelibError(f"fsdp_version = {version} must be 2 in accelerate's configuration")
    if asked("FSDP_OFFLOAD_PARAMS"):
        raise KelibError(
            "fsdp_offload_params = true is not supported; set it to false, use more processes, or "
            "smaller micro-batches"
        )
    return "fsdp2", asked("FSDP_ACTIVATION_CHECKPOINTING")


def share_batch(batch_size: int, processes: int, micro_batch_size: int | None) -> tuple[int, int]:
    """(sequences of a process, micro-batches it accumulates over) of a step of ``batch_size``.

    Accumulation follows from the global batch, which stays what it is: a process runs
    ``batch_size / processes`` sequences in as few parts of at most ``micro_batch_size`` (None: all
    at once) as it can. Raises KelibError, naming the numbers of processes that would do, where the
    shares are not equal.
    """
    if batch_size % processes:
        would = [str(n) for n in range(1, batch_size + 1) if batch_size % n == 0]
        raise KelibError(
            f"batch_size = {batch_size} must be a multiple of the number of processes, "
            f"{processes}; start {', '.join(would)}, or change the batch"
        )
    share = batch_size // processes
    parts = -(-share // (micro_batch_size or share))
    assert share * processes == batch_size
    return share, parts


def require_bf16(device: torch.device) -> None:
    """Raise KelibError if ``device`` is a GPU that cannot compute in bfloat16 by itself.

    torch answers yes where bfloat16 is only emulated, unless told to leave emulation out. A CPU is
    never refused: it is slow there, and right.
    """
    if device.type != "cuda":
        return
    with torch.cuda.device(device):
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    if not able:
        raise KelibError(
            f"precision = 'bf16', but {torch.cuda.get_device_name(device)} has no bfloat16 "
            "(compute capability 8.0 or later has); use precision = 'float32' or another GPU"
        )


def held_bytes(trainer: Any) -> dict[str, int]:
    """Bytes that this process holds of a training: ``weights``, ``gradients``, ``moments``.

    Gradients are dropped after each step: ask within one, as a hook of the optimizer does
    (``trainer.optimizer.register_step_post_hook``). Activations and what layers gather for a while
    are not part of it.
    """
    parameters = list(trainer.accelerator.unwrap_model(trainer.model).parameters())
    moments = [value for kept in trainer.optimizer.state.values() for value in kept.values()]
    return {
        "weights": _bytes(parameters),
        "gradients": _bytes(p.grad for p in parameters if p.grad is not None),
        "moments": _bytes(moments),
    }


def _bytes(tensors: Iterable[Any]) -> int:
    local = (t.to_local() if hasattr(t, "to_local") else t for t in tensors)
    return sum(t.numel() * t.element_size() for t in local)

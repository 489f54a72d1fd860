"""One data set over several processes: who reads what, and how sums cross the boundary."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from kelib.errors import KelibError
from kelib.jackknife import Sums


class Processes:
    """This process alone, or those of a torch.distributed group, measuring together."""

    def __init__(self, group: Any = None) -> None:
        """``group``: None (alone), ``"world"`` (all that were launched), or a ProcessGroup."""
        if isinstance(group, str) and group != "world":
            raise KelibError(
                f"process_group {group!r} is not known; pass 'world' or a ProcessGroup"
            )
        launched = dist.is_available() and dist.is_initialized()
        if group is not None and not isinstance(group, str) and not launched:
            raise KelibError("process_group needs torch.distributed to be initialised")
        self.together = group is not None and launched
        self.group = None if isinstance(group, str) else group
        self.rank = dist.get_rank(self.group) if self.together else 0
        self.count = dist.get_world_size(self.group) if self.together else 1

    def agree(self, error: Exception | None, facts: Any) -> list[Any]:
        """The facts of every process, in rank order.

        Raises ``error`` where it happened, and a KelibError that names it in every other process:
        none is left waiting.
        """
        if not self.together:
            if error is not None:
                raise error
            return [facts]
        told: list[Any] = [None] * self.count
        dist.all_gather_object(told, (None if error is None else str(error), facts), self.group)
        if error is not None:
            raise error
        for rank, (failure, _) in enumerate(told):
            if failure is not None:
                raise KelibError(f"process {rank} of {self.count} stopped: {failure}")
        return [fact for _, fact in told]

    def add(self, sums: Sums, device: torch.device) -> Sums:
        """The sums over all processes, the same bits in each; shapes must agree."""
        if not self.together:
            return sums
        flat = np.concatenate([array.ravel() for array in sums.arrays()])
        # nccl moves what lies on its own devices
        place = device if dist.get_backend(self.group) == "nccl" else torch.device("cpu")
        moved = torch.as_tensor(flat, device=place)
        dist.all_reduce(moved, group=self.group)
        flat, start = moved.cpu().numpy(), 0

        def next_array(array: np.ndarray) -> np.ndarray:
            nonlocal start
            start += array.size
            return flat[start - array.size : start].reshape(array.shape)

        return sums.map(next_array)


def require_whole(model: Any) -> None:
    """Raise KelibError if this process holds only a part of the weights.

    FSDP, tensor parallelism and DeepSpeed's ZeRO-3 divide them. A pass of such a model is a pass of
    all processes at once, so that shares of unequal length would wait for each other for ever, and
    the memories of a layer are not all in one place.
    """
    parts = {type(module).__name__ for module in model.modules()} & {"FullyShardedDataParallel"}
    for parameter in model.parameters():
        if dist.is_available() and isinstance(parameter, _divided()):
            parts.add(type(parameter).__name__)
        elif hasattr(parameter, "ds_id"):
            parts.add("DeepSpeed ZeRO-3")
    if parts:
        raise KelibError(
            f"the weights of {type(model).__name__} are divided over processes "
            f"({', '.join(sorted(parts))}), and entropy is measured where they are whole; save the "
            "model and measure the saved one, or train with DistributedDataParallel"
        )


def _divided() -> type:
    from torch.distributed.tensor import DTensor

    return DTensor

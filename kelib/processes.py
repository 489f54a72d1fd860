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

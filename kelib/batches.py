"""Batches as they come in, checked, without rows of padding, and with the weight of every token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kelib.errors import KelibError, listing


@dataclass(frozen=True)
class Batch:
    """The sequences of one batch that hold a token.

    Attributes:
        ids: ``(B, T)``.
        mask: ``(B, T)`` bool, or None if nothing is padded: a forward pass without a mask is the
            faster one.
        lengths: tokens of each sequence, padding not counted; all at least 1.
        first: number of the first sequence in the data set.
    """

    ids: torch.Tensor
    mask: torch.Tensor | None
    lengths: list[int]
    first: int

    def to(self, device: torch.device) -> Batch:
        """The same batch on ``device``."""
        mask = None if self.mask is None else self.mask.to(device)
        return Batch(self.ids.to(device), mask, self.lengths, self.first)

    def weights(self) -> torch.Tensor:
        """``(B T,)`` float64: ``1 / T_n`` for the tokens of sequence n, 0 for padding."""
        inverse = 1.0 / torch.tensor(self.lengths, dtype=torch.float64)
        spread = inverse[:, None].expand(self.ids.shape)
        if self.mask is not None:
            spread = spread * self.mask.cpu()
        return spread.reshape(-1)

    def positions(self) -> torch.Tensor | None:
        """``(B, T)``, the place of every token in its own sequence; None if nothing is padded.

        Models with learned positions count padding on the left otherwise.
        """
        return None if self.mask is None else (self.mask.cumsum(1) - 1).clamp(min=0)


def read_batch(batch: Any, first: int, words: int) -> Batch | None:
    """Check a batch; None if it holds no token. ``words`` is the size of the vocabulary.

    Raises KelibError for anything but a mapping with ``input_ids`` ``(B, T)`` and perhaps an
    ``attention_mask`` of the same shape, and for a token outside the vocabulary.
    """
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        held = listing(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise KelibError(f"a batch must be a mapping with input_ids, this one is or holds {held}")
    ids = _tensor(batch["input_ids"])
    if ids.dim() != 2 or ids.is_floating_point():
        raise KelibError(
            f"input_ids must be whole numbers of shape (sequences, tokens), not {ids.dtype} of "
            f"shape {tuple(ids.shape)}"
        )
    ids = ids.long()
    mask = batch.get("attention_mask")
    if mask is not None:
        mask = _tensor(mask).to(ids.device) != 0
        if mask.shape != ids.shape:
            raise KelibError(
                f"attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(ids.shape)}; "
                "they must be equal"
            )
    if ids.numel() == 0:
        return None
    lengths = [ids.shape[1]] * len(ids) if mask is None else mask.sum(dim=1).tolist()
    if mask is not None and min(lengths) == ids.shape[1]:
        mask = None
    elif mask is not None and min(lengths) == 0:
        # a row of padding is no sequence, and attention has nothing to attend to in it
        kept = mask.any(dim=1)
        ids, mask, lengths = ids[kept], mask[kept], [n for n in lengths if n]
        if not lengths:
            return None
        mask = None if min(lengths) == ids.shape[1] else mask
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= words:
        raise KelibError(
            f"input_ids hold token {highest if highest >= words else lowest}, the vocabulary has "
            f"{words}; use the tokenizer of this model"
        )
    return Batch(ids, mask, lengths, first)


def _tensor(values: Any) -> torch.Tensor:
    # torch warns where an array is read-only, as memory-mapped blocks are
    shared = not isinstance(values, np.ndarray) or values.flags.writeable
    return torch.as_tensor(values if shared else values.copy())


def block_batches(blocks: np.ndarray, batch_size: int = 64) -> Iterator[torch.Tensor]:
    """Token blocks as int64 tensors, ``batch_size`` rows at a time."""
    for start in range(0, len(blocks), batch_size):
        yield torch.from_numpy(blocks[start : start + batch_size].astype(np.int64))

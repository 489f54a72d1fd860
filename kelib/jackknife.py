"""Sums by block of sequences, and the standard error of a function of them. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from kelib.errors import KelibError

BLOCKS = 64  # sequence n belongs to block n mod 64


@dataclass(frozen=True)
class Sums:
    """Sums over sequences of means over tokens, float64; the first axis is the block.

    Attributes:
        sequences: ``(blocks,)``, how many sequences each block has.
        coefficients: per layer ``(blocks, m)``; empty if knowledge entropy was not asked for.
        attention: per attention layer ``(blocks, heads)``, nats; empty if not asked for.
        next_token: ``(blocks,)``, nats; None if not asked for.
    """

    sequences: np.ndarray
    coefficients: tuple[np.ndarray, ...]
    attention: tuple[np.ndarray, ...] = ()
    next_token: np.ndarray | None = None

    def arrays(self) -> list[np.ndarray]:
        """All of them, in one order."""
        last = [] if self.next_token is None else [self.next_token]
        return [self.sequences, *self.coefficients, *self.attention, *last]

    def map(self, change: Callable[[np.ndarray], np.ndarray]) -> Sums:
        """The same sums with ``change`` applied to every array."""
        return Sums(
            change(self.sequences),
            tuple(change(a) for a in self.coefficients),
            tuple(change(a) for a in self.attention),
            None if self.next_token is None else change(self.next_token),
        )

    def named(self, prefix: str) -> dict[str, np.ndarray]:
        """Name and array of each, for a file."""
        tensors = {f"{prefix}layer.{i}": a for i, a in enumerate(self.coefficients)}
        tensors |= {f"{prefix}attention.{i}": a for i, a in enumerate(self.attention)}
        return tensors | (
            {} if self.next_token is None else {f"{prefix}next_token": self.next_token}
        )


def add_sums(one: Sums, other: Sums) -> Sums:
    """Both together, block by block."""
    more = iter(other.arrays())
    added = iter([array + next(more) for array in one.arrays()])
    return one.map(lambda _: next(added))


def jackknife_error(blocks: Sums, statistic: Callable[[Sums], Any]) -> np.ndarray:
    """Standard error of ``statistic`` of the sums over all blocks, in the shape of the statistic.

    The delete-a-group jackknife for groups of unequal size (Busing, Meijer and van der Leeden,
    1999): with ``h_b`` = sequences / sequences of block b, pseudo-values ``h_b θ - (h_b - 1)
    θ_(b)`` and their combination ``θ_J``, the variance is ``(1/g) sum_b (pseudo_b - θ_J)² / (h_b -
    1)``. For a mean over single sequences it is the usual standard error.

    Raises KelibError if fewer than two blocks hold a sequence.
    """
    filled = np.flatnonzero(blocks.sequences)
    if len(filled) < 2:
        raise KelibError(
            f"{int(blocks.sequences.sum())} sequence gives no standard error; measure two or more"
        )
    whole = blocks.map(lambda array: array.sum(axis=0))
    estimate = np.asarray(statistic(whole))
    without = np.array([statistic(_without(whole, blocks, int(block))) for block in filled])
    shape = (-1, *([1] * estimate.ndim))
    groups = (whole.sequences / blocks.sequences[filled]).reshape(shape)
    combined = len(filled) * estimate - ((1 - 1 / groups) * without).sum(axis=0)
    pseudo = groups * estimate - (groups - 1) * without
    return np.sqrt((((pseudo - combined) ** 2) / (groups - 1)).mean(axis=0))


def _without(whole: Sums, blocks: Sums, block: int) -> Sums:
    one = iter(blocks.arrays())
    # the difference of two sums may come out as -1e-17 where nothing is left
    return whole.map(lambda array: np.maximum(array - next(one)[block], 0.0))

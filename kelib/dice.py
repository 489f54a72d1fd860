"""Random draws that are the same on every platform and Python version."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


class Dice:
    """Random draws that only rest on ``random.Random(int).random()``, which Python keeps stable.

    The convenience methods of ``random`` have changed between Python versions, so these few
    stand in for them. ``purpose`` keeps the streams of one seed independent.
    """

    def __init__(self, seed: int, purpose: str) -> None:
        digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
        self._random = random.Random(int.from_bytes(digest[:8], "big")).random

    def below(self, count: int) -> int:
        """An integer from 0 to ``count`` - 1."""
        return int(self._random() * count)

    def choose(self, values: Sequence[T]) -> T:
        """One of the values, each equally likely."""
        return values[self.below(len(values))]

    def shuffled(self, values: Sequence[T]) -> list[T]:
        """The values in random order (Fisher and Yates)."""
        result = list(values)
        for last in range(len(result) - 1, 0, -1):
            other = self.below(last + 1)
            result[last], result[other] = result[other], result[last]
        return result

    def cycle(self, values: Sequence[T]) -> Iterator[T]:
        """Endless draws in rounds, each value once a round: frequencies differ by one at most."""
        while True:
            yield from self.shuffled(values)

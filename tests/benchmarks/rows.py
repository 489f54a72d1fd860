"""What a row of the benchmark table is, and where rows are found."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from kelib.errors import KelibError, listing

# A module of this package each, with a tuple ROWS. A new row is one entry there and, if it compares
# what none did before, one function that prepares it.
GROUPS = ("entropy", "learning", "fullsize")


@dataclass(frozen=True)
class Variant:
    """One of the ways that a row compares.

    Attributes:
        run: does the work once. What it returns is dropped.
        units: how much that is (sequences, steps); seconds are per unit.
    """

    run: Callable[[], object]
    units: float = 1


@dataclass(frozen=True)
class Comparison:
    """``ours`` against ``baseline``, both names of variants.

    Attributes:
        quantity: ``"time"``, wall-clock seconds per unit, or ``"memory"``, peak resident MB above
            the loaded model and data.
        sign, target: ``"<="``: ours ÷ baseline is at most the target; ``">="``: ours is that many
            times less, so baseline ÷ ours is at least the target. A target of None is shown and
            not judged.
        floor: the variant whose cost is taken from both first: what is compared is what they add
            to it.
    """

    quantity: str
    ours: str
    baseline: str
    sign: str
    target: float | None
    floor: str | None = None

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of the variants it needs."""
        return (self.ours, self.baseline, *([self.floor] if self.floor else []))

    @property
    def text(self) -> str:
        """The ratio in words."""
        ours, baseline = self.ours, self.baseline
        if self.floor:
            ours, baseline = f"({ours} - {self.floor})", f"({baseline} - {self.floor})"
        return f"{ours} / {baseline}" if self.sign == "<=" else f"{baseline} / {ours}"

    def ratio(self, ours: float, baseline: float, floor: float = 0.0) -> float:
        """The number that is held against the target; NaN where there is nothing to divide by."""
        above, below = baseline - floor, ours - floor
        if self.sign == "<=":
            above, below = below, above
        return above / below if below > 0 else math.nan

    def met(self, ratio: float) -> str:
        """Whether it meets the target: yes, no, or nothing if there is none."""
        if self.target is None:
            return ""
        met = ratio <= self.target if self.sign == "<=" else ratio >= self.target
        return "yes" if met else "no"


@dataclass(frozen=True)
class Row:
    """A row: how it is prepared, at which settings, and what is compared.

    Attributes:
        prepare: settings -> variants by name, with model and data in memory.
        comparisons: a line of the printed table each.
        settings: ``repeats`` (rounds of timing) and whatever ``prepare`` reads.
        tiny: settings that replace some of these in tests, where only the code is to be run.
        environment: variables that its time is taken under, beside those of every case.
        needs: settings -> bytes that a case takes, for rows that a machine may not hold: with fewer
            free bytes they are not begun, and their cases do not run side by side.
    """

    name: str
    prepare: Callable[[Mapping[str, Any]], dict[str, Variant]]
    comparisons: Sequence[Comparison]
    settings: Mapping[str, Any]
    tiny: Mapping[str, Any]
    environment: Mapping[str, str] = field(default_factory=dict)
    needs: Callable[[Mapping[str, Any]], float] | None = None


def rows_of(group: str | None = None) -> dict[str, Row]:
    """The rows of a group by name, of all groups by default. KelibError for an unknown group."""
    if group is not None and group not in GROUPS:
        raise KelibError(f"no group of benchmarks {group!r}; there is {listing(GROUPS)}")
    rows: dict[str, Row] = {}
    for module in GROUPS if group is None else (group,):
        for row in import_module(f".{module}", __package__).ROWS:
            assert row.name not in rows, f"two benchmarks are called {row.name}"
            rows[row.name] = row
    return rows


def find_row(name: str, group: str | None = None) -> Row:
    """The row of that name. KelibError, with a list, if there is none."""
    rows = rows_of(group)
    if name not in rows:
        raise KelibError(f"no benchmark {name!r}; there is {listing(rows, 40)}")
    return rows[name]

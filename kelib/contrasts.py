"""Exploratory contrasts: one difference per pretraining seed between two sets of rows of tables.

``notebooks/params/contrasts.yaml`` says what is compared with what and which sign was expected by
whom. Unlike the claims of ``kelib.claims`` none of them is tested: an interval is shown, and
whether it lies on the expected side of 0. They are many, so that some will by chance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kelib import metrics
from kelib.config import Profile, repository_root
from kelib.errors import KelibError, listing
from kelib.results import Tables
from kelib.schema import convert, read_yaml, require

STAGES = ("first", "last")
RATES = ("peak", "arms", "lower")
NOT_RUN = "not run"


@dataclass(frozen=True)
class Side:
    """Rows of one table and the number taken from them: the mean of ``column`` (minus ``less``)."""

    table: str
    column: str
    less: str | None = None  # another column
    rate: str | None = None  # of continual learning: peak, arms or lower, see `rates_of`
    stage: str | None = None  # first or last of the rows of each seed
    where: dict[str, Any] = field(default_factory=dict)  # column -> value, or a list of values

    def __post_init__(self) -> None:
        valid = f"one of {listing(STAGES)}, or left out"
        require(self.stage in (None, *STAGES), "side.stage", self.stage, valid)
        valid = f"one of {listing(RATES)}, or left out"
        require(self.rate in (None, *RATES), "side.rate", self.rate, valid)


@dataclass(frozen=True)
class Contrast:
    """``value`` minus ``reference`` (minus 0 if there is none), seed by seed."""

    id: str
    statement: str
    expected_by: str  # the paper, or the rival explanation that predicts it
    direction: int  # the sign expected
    smallest_effect: float  # what would matter, in `unit`
    unit: str
    value: Side
    reference: Side | None = None

    def __post_init__(self) -> None:
        require(self.direction in (-1, 1), f"{self.id}.direction", self.direction, "-1 or 1")
        effect = self.smallest_effect
        require(effect > 0, f"{self.id}.smallest_effect", effect, "above 0")


def load_contrasts(path: Path) -> tuple[Contrast, ...]:
    """Read the contrasts; KelibError names an unknown, missing or mistyped key."""
    content = read_yaml(path)
    if not isinstance(content, Mapping) or set(content) != {"contrasts"}:
        raise KelibError(f"{path.name} must hold one key, contrasts, with a list of contrasts")
    found = convert(tuple[Contrast, ...], content["contrasts"], "contrasts")
    names = [contrast.id for contrast in found]
    require(len(set(names)) == len(names), "contrast.id", names, "a list of distinct names")
    return found


def rates_of(profile: Profile) -> dict[str, float]:
    """Rates of continual learning by name: ``peak``, that of pretraining; ``arms``, at which the
    interventions are held against their controls; ``lower``, the next one below that, if any.
    """
    swept, arms = profile.continual.learning_rates, profile.interventions.rates_of_arms[-1]
    below = [rate for rate in swept if rate < arms]
    return {"peak": swept[0], "arms": arms} | ({"lower": max(below)} if below else {})


def by_seed(side: Side, table: pd.DataFrame, rates: Mapping[str, float]) -> pd.Series:
    """The number of one side, by seed; empty where no row matches. NaN in a row stays NaN.

    Raises KelibError for a column that the table lacks.
    """
    asked = [side.column, *([side.less] if side.less else []), *side.where]
    if missing := set(asked) - set(table.columns):
        raise KelibError(
            f"table {side.table} has no column {listing(missing)}; it has "
            f"{listing(table.columns, 99)}"
        )
    chosen = dict(side.where)
    if side.rate is not None:
        chosen["learning_rate"] = rates.get(side.rate, np.nan)  # none matches a missing one
    for column, wanted in chosen.items():
        table = table[_matches(table[column], wanted)]
    if side.stage is not None and len(table):
        steps = table.groupby("seed")["stage_step"]
        end = steps.transform("min") if side.stage == "first" else steps.transform("max")
        table = table[table["stage_step"] == end]
    values = table[side.column] - (table[side.less] if side.less else 0)
    return values.groupby(table["seed"]).agg(lambda rows: rows.mean(skipna=False))


def _matches(column: pd.Series, wanted: Any) -> np.ndarray:
    if isinstance(wanted, list):
        return np.any([_matches(column, one) for one in wanted], axis=0)
    if isinstance(wanted, float | int) and not isinstance(wanted, bool):
        return np.isclose(column.to_numpy(float), wanted)
    return (column == wanted).to_numpy()


def differences(
    contrasts: tuple[Contrast, ...],
    opened: Callable[[str], pd.DataFrame | None],
    rates: Mapping[str, float],
) -> pd.DataFrame:
    """One row per contrast and seed: ``contrast``, ``seed``, ``value``, ``reference``,
    ``difference``.

    ``opened`` gives a table by name, None for one that the profile does not have. A contrast has no
    rows if a table or all rows of a side are missing. Raises KelibError where one side lacks seeds
    of the other.
    """
    parts = []
    for contrast in contrasts:
        sides = [contrast.value, *([contrast.reference] if contrast.reference else [])]
        tables = [opened(side.table) for side in sides]
        found = [by_seed(s, t, rates) for s, t in zip(sides, tables, strict=True) if t is not None]
        if len(found) < len(sides) or any(numbers.empty for numbers in found):
            continue
        value = found[0]
        reference = found[1] if len(found) > 1 else pd.Series(0.0, index=value.index)
        if unpaired := set(value.index) ^ set(reference.index):
            raise KelibError(
                f"contrast {contrast.id}: seed {listing(unpaired)} stands on one side only; "
                "finish its runs"
            )
        table = pd.DataFrame({"value": value, "reference": reference})
        table["difference"] = table["value"] - table["reference"]
        parts.append(table.rename_axis("seed").reset_index().assign(contrast=contrast.id))
    columns = ["contrast", "seed", "value", "reference", "difference"]
    return pd.concat(parts)[columns] if parts else pd.DataFrame(columns=columns)


def judged(contrasts: tuple[Contrast, ...], found: pd.DataFrame) -> pd.DataFrame:
    """One row per contrast: n, means of both sides, mean difference with its 95 % t interval over
    seeds, and ``outcome``.

    *as expected* and *opposite*: the interval lies on one side of 0; *too small to matter* is added
    where the 90 % interval lies within plus and minus the smallest effect. Where that one does and
    0 is inside: *no effect that would matter*. Else *open*. With one seed the sign alone is given;
    *undefined* where a seed has no number.
    """
    rows = []
    for c in contrasts:
        part = found[found["contrast"] == c.id]
        row = {"contrast": c.id, "n": len(part), "outcome": NOT_RUN}
        if len(part) and part["difference"].isna().any():
            row["outcome"] = f"undefined in seed {listing(part['seed'][part['difference'].isna()])}"
        elif len(part):
            values = part["difference"].to_numpy(float)
            wide = metrics.mean_interval(values)
            row |= {"value": part["value"].mean(), "reference": part["reference"].mean()}
            row |= {"mean": wide.mean, "low95": wide.low, "high95": wide.high}
            row["outcome"] = _outcome(c, values, wide)
        shown = ("statement", "expected_by", "direction", "smallest_effect", "unit")
        rows.append(row | {name: getattr(c, name) for name in shown})
    first = ["contrast", "n", "value", "reference", "mean", "low95", "high95", "outcome"]
    return pd.DataFrame(rows).reindex(columns=[*first, *shown])


def judged_contrasts(tables: Tables, name: str = "contrasts") -> pd.DataFrame:
    """The contrasts declared in ``notebooks/params/<name>.yaml``, judged on measurement tables."""
    declared = load_contrasts(repository_root() / "notebooks" / "params" / f"{name}.yaml")
    return judged(declared, differences(declared, tables.optional, rates_of(tables.profile)))


def _outcome(contrast: Contrast, values: np.ndarray, wide: metrics.Interval) -> str:
    sign = "as expected" if np.sign(wide.mean) == contrast.direction else "opposite"
    if wide.n == 1:
        return f"one seed: {sign}"
    narrow, effect = metrics.mean_interval(values, 0.9), contrast.smallest_effect
    small = -effect < narrow.low and narrow.high < effect
    if wide.low > 0 or wide.high < 0:
        return f"{sign}, too small to matter" if small else sign
    return "no effect that would matter" if small else "open"

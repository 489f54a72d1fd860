"""Tables of two runs of one profile, compared quantity by quantity. :mod:`kelib.tolerances` has the
rule, :mod:`kelib.table_layouts` says which rows belong together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from kelib.errors import KelibError
from kelib.table_layouts import is_exact, is_ratio, keys_of, layout_of
from kelib.tolerances import EQUAL, OFF, SAME, WITHIN, Measured, judge, rms, standard_deviations

ROWS = "(rows)"


@dataclass(frozen=True)
class Quantity:
    """One quantity of one table, compared. ``tolerance`` is for ``rms_difference``, in its unit;
    ``spread``, ``largest`` and ``shift`` are of z; ``scale`` says where tau is from, ``limit`` what
    bounds it.
    """

    table: str
    part: str
    quantity: str
    rows: int
    seeds: int
    status: str
    reason: str = ""
    rms_difference: float = 0.0
    tolerance: float = 0.0
    spread: float = 0.0
    largest: float = 0.0
    shift: float = 0.0
    scale: str = EQUAL
    limit: str = EQUAL
    where: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """By which a quantity is known in a table of variations."""
        return self.table, self.part, self.quantity


def _codes(frame: pd.DataFrame) -> np.ndarray:
    if not len(frame.columns):
        return np.zeros(len(frame), dtype=int)
    return frame.groupby(list(frame.columns), dropna=False, sort=False).ngroup().to_numpy()


def _parts(frame: pd.DataFrame, parts: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Positions of rows by the text of their part."""
    columns = [frame[name].astype(object).fillna("") for name in parts if name in frame]
    if not columns:
        return {"": np.arange(len(frame))}
    text = [" ".join(filter(None, map(str, row))) for row in zip(*columns, strict=True)]
    return pd.Series(range(len(frame))).groupby(np.array(text), sort=False).indices  # type: ignore[return-value]


def _matrix(values: pd.Series, cells: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    found = np.full((cells.max() + 1, seeds.max() + 1), np.nan)
    found[cells, seeds] = values.to_numpy(dtype=float)
    return found


def seed_deviations(name: str, table: pd.DataFrame) -> dict[tuple[str, str], float]:
    """s of every quantity (part, column) of a table: root mean square over its cells."""
    keys = keys_of(name, {"reference": table})
    found = {}
    for part, rows in _parts(table, layout_of(name).parts).items():
        here = table.iloc[rows]
        cells, seeds = _codes(here[[k for k in keys if k != "seed"]]), _codes(here[["seed"]])
        for column in table.columns.difference([*keys, "seed"]):
            if not is_exact(column, here[column]):
                by_cell = standard_deviations(_matrix(here[column], cells, seeds))
                found[part, column] = rms(by_cell[np.isfinite(by_cell)])
    return found


def _named(row: pd.Series) -> str:
    return ", ".join(f"{key} {value}" for key, value in row.items() if not pd.isna(value))


def compare_table(
    name: str,
    reference: pd.DataFrame,
    fresh: pd.DataFrame,
    *,
    like: Mapping[tuple[str, str], float] | None = None,
    measured: Mapping[tuple[str, str, str], Measured] | None = None,
    same_rows: bool = True,
) -> list[Quantity]:
    """Compare all quantities of one table, rows matched by the keys of its layout.

    Only the seeds that both sides have are compared; a row of theirs that one side lacks is off, if
    both must have the ``same_rows``.
    ``like`` are deviations of other seeds (:func:`seed_deviations`), ``measured`` the variation
    between machines by :attr:`Quantity.key`. Raises KelibError if the keys do not tell rows apart,
    if no seed is on both sides, and for a table without a layout.
    """
    keys = keys_of(name, {"reference": reference, "fresh": fresh})
    if "seed" in keys:
        common = set(reference["seed"]) & set(fresh["seed"])
        if not common:
            raise KelibError(
                f"table {name}: no seed is on both sides; measure one of the reference"
            )
        reference, fresh = (side[side["seed"].isin(common)] for side in (reference, fresh))
    both = (
        reference[keys]
        .assign(left=np.arange(len(reference)))
        .merge(
            fresh[keys].assign(right=np.arange(len(fresh))),
            on=keys,
            how="outer",
            indicator="side",
            sort=False,
        )
    )
    found = []
    alone = both[both["side"] != "both"]
    rows = both[both["side"] == "both"]
    place = rows[keys].reset_index(drop=True)
    left = reference.iloc[rows["left"].astype(int)].reset_index(drop=True)
    right = fresh.iloc[rows["right"].astype(int)].reset_index(drop=True)
    seeds = place["seed"].nunique() if "seed" in keys else 1
    if len(alone):
        missing = int((alone["side"] == "left_only").sum())
        reason = f"{missing} of the reference missing, {len(alone) - missing} more than it has"
        where = _named(alone.iloc[0][keys])
        status = OFF if same_rows else WITHIN
        found.append(Quantity(name, "", ROWS, len(both), seeds, status, reason, where=where))
    if not len(rows):
        return found
    telling = [key for key in keys if place[key].nunique(dropna=False) > 1] or keys
    shared = [c for c in left.columns if c in right.columns and c not in keys]
    for part, chosen in _parts(place, layout_of(name).parts).items():
        here = place.iloc[chosen]
        cells = _codes(here[[k for k in keys if k != "seed"]])
        seed_codes = _codes(here[["seed"]]) if "seed" in keys else np.zeros(len(here), int)
        for column in shared:
            one, two = left[column].iloc[chosen], right[column].iloc[chosen]
            head = (name, part, column, len(here), seeds)
            if is_exact(column, one, two):
                found.append(_exact(head, one, two, place[telling]))
                continue
            judged, size = judge(
                _matrix(one, cells, seed_codes),
                _matrix(two, cells, seed_codes),
                like=(like or {}).get((part, column)),
                measured=(measured or {}).get(head[:3]),
                ratio=is_ratio(column),
            )
            where = ""
            if judged["status"] != SAME:
                worst = int(np.argmax(size[cells, seed_codes]))
                where = _named(here[telling].iloc[worst])
            found.append(Quantity(*head, **judged, where=where))
    return found


def _exact(
    head: tuple[str, str, str, int, int], one: pd.Series, two: pd.Series, place: pd.DataFrame
) -> Quantity:
    differ = ~((one == two) | (one.isna() & two.isna())).to_numpy(dtype=bool)
    if differ.any() and all(pd.api.types.is_numeric_dtype(side) for side in (one, two)):
        close = np.isclose(one.to_numpy(float), two.to_numpy(float), rtol=1e-9, atol=0)
        differ &= ~close  # written with ten digits
    if not differ.any():
        return Quantity(*head, SAME)
    first = int(np.argmax(differ))
    text = f"{int(differ.sum())} not equal, first {one.iloc[first]} and {two.iloc[first]}"
    where = _named(place.loc[one.index[first]])
    return Quantity(*head, OFF, text, where=where)

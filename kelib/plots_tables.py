"""Tables that notebooks print above a figure, and the summaries that are saved with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from kelib.plots import intervals_table, summarise
from kelib.plots_learning import in_order


def summary_table(
    table: pd.DataFrame,
    columns: Mapping[str, tuple[str, float]],
    by: Mapping[str, Iterable[Any] | None],
) -> tuple[pd.DataFrame, dict[str, pd.DataFrame]]:
    """(means with 95 % t intervals as text, the summaries behind them), a row for each group of
    the keys of ``by``.

    ``columns`` maps a value of ``table`` to (heading, scale). ``by`` maps a column to the order of
    its values, which a mapping also names, or to None: ascending; the first column sorts first.
    The summaries, by value and in its own units, are those of :func:`kelib.plots.summarise`.
    """
    keys = list(by)
    summaries = {value: summarise(table, value, keys) for value in columns}
    text = intervals_table(summaries, keys, {value: scale for value, (_, scale) in columns.items()})
    for key in reversed(keys):
        order = by[key]
        text = text.sort_values(key, kind="stable") if order is None else in_order(text, key, order)
        if isinstance(order, Mapping):
            text[key] = text[key].map(order)
    return text.rename(
        columns={value: heading for value, (heading, _) in columns.items()}
    ), summaries


def titled(tables: Mapping[str, pd.DataFrame]) -> str:
    """Tables below each other, each with its title above and a blank line behind, for ``print``.

    >>> print(titled({"K": pd.DataFrame({"arm": ["a"], "n": [5]})}).rstrip())
    K
    arm  n
      a  5
    """
    return "\n".join(f"{name}\n{table.to_string(index=False)} \n" for name, table in tables.items())

"""Figures of the search for a training recipe: what every regime that was tried does."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from kelib.plots import COLOURS, MARKERS


def _regime_lines(table: pd.DataFrame, ax: Axes, chosen: str, value: str, ylabel: str) -> Axes:
    for index, (regime, part) in enumerate(table.groupby("regime")):
        style: dict[str, Any] = {"color": COLOURS[index % 7], "marker": MARKERS[index % 7]}
        style |= {"ms": 3, "alpha": 0.9}
        width = 2.2 if regime == chosen else 0.9
        for number, (_, line) in enumerate(part.groupby("seed")):
            label = str(regime) if number == 0 else None
            ax.plot(100 * line["share"], line[value], lw=width, label=label, **style)
    ax.set_xlabel("share of pretraining (%)")
    ax.set_ylabel(ylabel)
    return ax


def regimes(table: pd.DataFrame, ax: Axes, chosen: str) -> Axes:
    """Knowledge entropy minus its bound (nats) along pretraining, for every regime tried.

    ``table`` has columns regime, seed, share (of pretraining, 0 to 1), gap_nats. The chosen regime
    is thick.
    """
    return _regime_lines(table, ax, chosen, "gap_nats", "entropy minus its bound (nats)")


def regimes_accuracy(table: pd.DataFrame, ax: Axes, chosen: str) -> Axes:
    """Accuracy on the generated tasks along pretraining, for every regime; dotted: chance.

    ``table`` has columns regime, seed, share, p (0 to 1).
    """
    percent = table.assign(percent=100 * table["p"])
    ax.axhline(25, color="0.5", ls=":", lw=0.8)
    return _regime_lines(percent, ax, chosen, "percent", "accuracy P (%)")

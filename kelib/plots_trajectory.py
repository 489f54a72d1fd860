"""Figures of published checkpoints along pretraining: table and Axes in, Axes out, as in
:mod:`kelib.plots`.
"""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import pandas as pd

from kelib.plots import COLOURS, MARKERS, Axes
from kelib.plots_published import NORMAL

FEW = 6  # checkpoints that are named on the axis
AXES = {"step": "step", "tokens_seen": "tokens of training"}


def along(totals: pd.DataFrame, ax: Axes, x: str, by: str) -> Axes:
    """Entropy summed over layers (nats, left) and as share of its bound (%, right) against ``x``,
    one line a value of ``by``, with 95 % intervals.

    ``totals`` has columns ``x`` (step or tokens_seen), ``by``, entropy_nats, standard_error,
    bound_nats (one value).
    """
    for index, (name, part) in enumerate(totals.groupby(by, sort=False)):
        part = part.sort_values(x)
        ax.errorbar(
            part[x],
            part["entropy_nats"],
            yerr=NORMAL * part["standard_error"],
            color=COLOURS[index % 7],
            marker=MARKERS[index % 7],
            ms=3.5,
            lw=1,
            capsize=2,
            label=str(name),
        )
    bound = float(totals["bound_nats"].max())

    def share(nats: Any) -> Any:
        return 100 * nats / bound

    def nats(share: Any) -> Any:
        return share * bound / 100

    right = ax.secondary_yaxis("right", functions=(share, nats))
    right.set_ylabel("% of the bound")
    along_training(ax, totals[x], x)
    ax.set_ylabel("entropy (nats)")
    for axis in (ax, right):  # changes may be small beside the values
        axis.ticklabel_format(axis="y", useOffset=False)
    return ax


def along_training(ax: Axes, values: pd.Series, x: str) -> Axes:
    """A logarithmic axis for ``values`` of ``x``, linear below the first above 0 if 0 is there."""
    positive = values[values > 0]
    if (values == 0).any() and len(positive):
        ax.set_xscale("symlog", linthresh=float(positive.min()), linscale=0.4)
    elif len(positive):
        ax.set_xscale("log")
    shown = sorted(set(values))
    if len(shown) <= FEW:
        ax.set_xticks(shown, [f"{value:g}" for value in shown])
        ax.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    ax.set_xlabel(AXES[x])
    return ax


def layer_map(entropy: pd.DataFrame, ax: Axes, x: str) -> Axes:
    """Change of the entropy since the first checkpoint (nats) by layer, layers upwards and
    checkpoints side by side.

    ``entropy`` has columns ``x``, layer and entropy_nats, one row a checkpoint and layer.
    """
    table = entropy.pivot(index="layer", columns=x, values="entropy_nats").sort_index(axis=1)
    change = table.sub(table.iloc[:, 0], axis=0)
    largest = float(change.abs().to_numpy().max()) or 1.0
    image = ax.imshow(
        change, aspect="auto", origin="lower", cmap="RdBu_r", vmin=-largest, vmax=largest
    )
    ax.grid(False)
    ax.set_xticks(range(change.shape[1]), [f"{value:g}" for value in change], rotation=45)
    ax.yaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
    ax.yaxis.set_major_formatter(lambda layer, _: f"{layer + 1:g}")
    ax.set_xlabel(AXES[x])
    ax.set_ylabel("layer")
    assert ax.figure is not None
    ax.figure.colorbar(image, ax=ax, label="change (nats)")
    return ax

"""Figures of a published model: table and Axes in, Axes out (see :mod:`kelib.plots`)."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd

from kelib.plots import COLOURS, MARKERS, Axes

NORMAL = 1.96  # standard errors to a 95 % interval, of a mean over many sequences


def by_layer(entropy: pd.DataFrame, ax: Axes, by: str) -> Axes:
    """Entropy (nats) against the layer, one line a value of ``by``, with 95 % intervals; the bound
    is dotted.

    ``entropy`` has columns ``by``, layer, entropy_nats, standard_error, bound_nats; one row a layer
    and value of ``by``.
    """
    for index, (name, part) in enumerate(entropy.groupby(by, sort=False)):
        part = part.sort_values("layer")
        ax.errorbar(
            part["layer"] + 1,
            part["entropy_nats"],
            yerr=NORMAL * part["standard_error"],
            color=COLOURS[index % 7],
            marker=MARKERS[index % 7],
            ms=3,
            lw=1,
            capsize=1.5,
            label=str(name),
        )
    bound = entropy.groupby("layer")["bound_nats"].max()
    ax.plot(bound.index + 1, bound, ":", color="0.5", lw=0.9, label="bound")
    ax.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
    ax.set_xlabel("layer")
    ax.set_ylabel("entropy (nats)")
    return ax


def convergence_curve(table: pd.DataFrame, ax: Axes, by: str) -> Axes:
    """Estimate of the entropy minus that from all sequences (nats) against the number of sequences,
    one line a value of ``by``; bars are one standard deviation over disjoint samples.

    ``table`` has columns ``by``, sequences, mean, deviation (see
    :func:`kelib.convergence.convergence`).
    """
    for index, (name, part) in enumerate(table.groupby(by, sort=False)):
        part = part.sort_values("sequences")
        shift: Any = 2 ** (0.12 * (index - 1))  # a little apart, the axis is logarithmic
        ax.errorbar(
            part["sequences"] * shift,
            part["mean"] - part["mean"].iloc[-1],
            yerr=np.nan_to_num(part["deviation"]),
            color=COLOURS[index % 7],
            marker=MARKERS[index % 7],
            ms=3.5,
            lw=1,
            capsize=2,
            label=str(name),
        )
    ax.axhline(0, color="0.5", lw=0.8)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_xlabel("sequences |D|")
    ax.set_ylabel("estimate minus all (nats)")
    return ax

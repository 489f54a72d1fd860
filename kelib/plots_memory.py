"""The idea in pictures: a feed-forward layer as a key-value memory, and how it is drawn on. Table
and Axes in, Axes out (see :mod:`kelib.plots`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.patches import Rectangle

from kelib.plots import COLOURS, MARKERS, Axes

CELLS = 6  # numbers drawn of each vector


def _vector(ax: Axes, x: float, y: float, colour: str, height: float = 0.5) -> None:
    """A row of ``CELLS`` squares, one wide in all: a vector."""
    for cell in range(CELLS):
        shade: dict[str, Any] = {"facecolor": colour, "alpha": 0.25 + 0.1 * ((3 * cell) % CELLS)}
        place = (x + cell / CELLS, y - height / 2)
        ax.add_patch(Rectangle(place, 1 / CELLS, height, edgecolor="white", lw=0.8, **shade))


def key_value_memory(coefficients: Mapping[int, float], ax: Axes, left_out: int) -> Axes:
    """A feed-forward layer drawn as a memory: x is compared with every key, and the values are
    summed with the resulting coefficients as weights.

    ``coefficients`` maps the number of a memory to its coefficient c for one token; bars are to
    scale, white for negative ones. ``left_out`` memories are not drawn, and the picture says so.
    """
    largest = max(abs(c) for c in coefficients.values())
    rows = len(coefficients)
    for row, (memory, value) in enumerate(coefficients.items()):
        y = rows - row
        _vector(ax, 2, y, COLOURS[0])
        ax.text(1.92, y, f"$k_{{{memory}}}$", ha="right", va="center", fontsize=8)
        width = abs(value) / largest
        face = COLOURS[1] if value > 0 else "white"
        bar: dict[str, Any] = {"facecolor": face, "edgecolor": COLOURS[1], "lw": 1}
        ax.add_patch(Rectangle((3.7, y - 0.22), width, 0.44, **bar))
        ax.text(3.75 + width, y, f"{value:+.2f}", va="center", fontsize=7)
        _vector(ax, 5.6, y, COLOURS[2])
        ax.text(6.68, y, f"$v_{{{memory}}}$", va="center", fontsize=8)
    middle = (rows + 1) / 2
    _vector(ax, 0, middle, "black")
    _vector(ax, 7.9, middle, "black")
    arrow: dict[str, Any] = {"arrowstyle": "->", "color": "0.4"}
    for start, end in ((1.05, 1.5), (3.15, 3.6), (4.98, 5.5), (7.2, 7.8)):
        ax.annotate("", (end, middle), (start, middle), arrowprops=arrow)
    labels = ((0.5, "input x"), (2.5, "keys K"), (4.2, "coefficients c"), (6.1, "values V"))
    for x, text in (*labels, (8.4, "output")):
        ax.text(x, rows + 0.85, text, ha="center", fontsize=8, weight="bold")
    ax.text(4.5, 0.25, f"and {left_out:,} more", ha="center", fontsize=7, color="0.4")
    ax.text(8.4, middle - 0.6, "Σ c v", ha="center", va="top", fontsize=8)
    ax.set_xlim(-0.1, 9)
    ax.set_ylim(0, rows + 1.3)
    ax.set_axis_off()
    return ax


def ranked_shares(means: Mapping[str, np.ndarray], ax: Axes) -> Axes:
    """Share p of the activity that every memory has times m, from the most active on, one line a
    distribution; 1 (dotted) is what each has where all are used alike, at entropy ln m.

    ``means`` maps a label to mean coefficients ``(m,)``.
    """
    for index, (label, mean) in enumerate(means.items()):
        shares = np.sort(mean)[::-1] / mean.mean()
        ranks = 100 * (np.arange(len(shares)) + 0.5) / len(shares)
        style: dict[str, Any] = {"color": COLOURS[index % 7], "marker": MARKERS[index % 7]}
        ax.plot(ranks, shares, markevery=max(1, len(shares) // 9), ms=4, label=label, **style)
    ax.axhline(1, color="0.5", ls=":", lw=0.9)
    ax.annotate("all alike", (99, 1), xytext=(0, 3), textcoords="offset points", ha="right",
                fontsize=7, color="0.4")  # fmt: skip
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set_xlabel("memories, most active first (%)")
    ax.set_ylabel("activity ÷ mean of the layer")
    ax.legend(fontsize=7)
    return ax


def by_token(
    coefficients: np.ndarray, ax: Axes, tokens: Sequence[str], memories: Sequence[int]
) -> Axes:
    """Magnitude of the coefficients of some ``memories`` (columns) at each token (rows), darker is
    larger, logarithmically; ``coefficients`` is ``(tokens, m)``.
    """
    shown = np.abs(coefficients[:, list(memories)])
    shown = np.maximum(shown, shown.max() / 1e4)  # the first token often outweighs all others
    image = ax.imshow(shown, aspect="auto", cmap="Greys", norm="log")
    ax.set_xticks(range(len(memories)), [str(memory) for memory in memories], rotation=60)
    ax.set_yticks(range(len(tokens)), [repr(token)[1:-1] for token in tokens])
    ax.tick_params(labelsize=7)
    ax.set_xlabel("memory")
    ax.grid(False)
    bar = ax.figure.colorbar(image, ax=ax, shrink=0.85)
    bar.set_label("|c|", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return ax


def layers_in_use(entropy: pd.DataFrame, ax: Axes, chosen: int) -> Axes:
    """exp(H) / m of every layer (%), one line a text; the layer ``chosen`` (from 1) is ringed.

    ``entropy`` has columns text, layer (from 0), entropy_nats, bound_nats.
    """
    for index, (text, part) in enumerate(entropy.groupby("text", sort=False)):
        use = 100 * np.exp(part["entropy_nats"] - part["bound_nats"])
        style: dict[str, Any] = {"color": COLOURS[index % 7], "marker": MARKERS[index % 7]}
        ax.plot(part["layer"] + 1, use, ms=3.5, lw=1, label=str(text), **style)
        at = part["layer"] + 1 == chosen
        ax.plot(part["layer"][at] + 1, use[at], "o", mfc="none", mec="black", ms=10)
    ax.set_xlabel("layer")
    ax.set_ylabel("memories in effective use (%)")
    ax.legend(fontsize=7)
    return ax

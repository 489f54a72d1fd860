"""Drawing of correlations and of exploratory contrasts: table + Axes -> Axes."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from kelib.associations import PREDICTORS
from kelib.plots import COLOURS

INSIDE, FIXED, PARTIAL = "inside runs", "at a fixed stage", "at a fixed stage and loss"
BY_DEFINITION = "its definition"  # who expects a contrast that cannot come out otherwise
LOOKS: dict[str, dict[str, Any]] = {
    INSIDE: {"color": COLOURS[0], "marker": "o"},
    FIXED: {"color": COLOURS[3], "marker": "s"},
    PARTIAL: {"color": COLOURS[2], "marker": "D"},
}


def correlation_intervals(table: pd.DataFrame, within: pd.DataFrame, ax: Axes) -> Axes:
    """One outcome: a row for each predictor, a look for each kind of correlation, bars 95 %.

    ``table`` has x, kind (of :data:`LOOKS`), r, low, high; ``within`` x, seed, pearson, drawn as a
    small dot a seed. Rows of NaN (not identifiable) are left out.
    """
    rows = list(PREDICTORS)
    for offset, (kind, look) in zip((0.22, 0, -0.22), LOOKS.items(), strict=True):
        part = table[(table["kind"] == kind) & table["r"].notna()]
        y = [len(rows) - 1 - rows.index(x) + offset for x in part["x"]]
        bars = [(part["r"] - part["low"]).fillna(0), (part["high"] - part["r"]).fillna(0)]
        ax.errorbar(part["r"], y, xerr=bars, ls="", ms=5, capsize=2, label=kind, **look)
        if kind == INSIDE:
            dots = [len(rows) - 1 - rows.index(x) + offset + 0.13 for x in within["x"]]
            ax.plot(
                within["pearson"], dots, ls="", ms=3, alpha=0.5, color=look["color"], marker="."
            )
    ax.axvline(0, color="0.5", lw=0.8)
    ax.set_xlim(-1.08, 1.08)
    ax.set_ylim(-0.6, len(rows) - 0.4)
    ax.set_yticks(range(len(rows))[::-1], list(PREDICTORS.values()))
    ax.set_xlabel("Pearson's r")
    return ax


def contrasts_forest(table: pd.DataFrame, ax: Axes) -> Axes:
    """Differences over their smallest effect of interest, a row for each statement, 95 % t
    intervals over seeds.

    ``table`` is that of :func:`kelib.contrasts.judged`; what was not run or is undefined is left
    out. The shaded band is what would not matter; filled marks have intervals on one side of 0, an
    arrow behind the statement shows the expected direction. Grey: true by definition.
    """
    shown = table[table["mean"].notna()].iloc[::-1].reset_index(drop=True)
    row: Any  # columns have no types of their own
    for y, row in enumerate(shown.itertuples()):
        mean, low, high = (v / row.smallest_effect for v in (row.mean, row.low95, row.high95))
        side = row.outcome.split(",")[0]
        colour = {"as expected": COLOURS[0], "opposite": COLOURS[3]}.get(side, "0.4")
        colour = "0.7" if row.expected_by == BY_DEFINITION else colour
        ax.plot([low, high], [y, y], color=colour, lw=1.4)
        clear = side in ("as expected", "opposite")
        ax.plot(mean, y, "o", ms=5, color=colour, mfc=colour if clear else "white")
    ax.axvspan(-1, 1, color="0.92", zorder=0)
    ax.axvline(0, color="0.5", lw=0.8)
    ax.set_xscale("symlog", linthresh=2)
    most = np.ceil(np.abs(ax.get_xlim()).max())
    ticks = [t for t in (1, 2, 5, 10, 20, 50, 100) if t <= most]
    places = [*(-t for t in reversed(ticks)), 0, *ticks]
    ax.set_xticks(places, [f"{t:g}" for t in places])
    ax.minorticks_off()
    ax.set_ylim(-0.7, len(shown) - 0.3)
    arrows = ["→" if d > 0 else "←" for d in shown["direction"]]
    texts = [f"{s.rstrip('.')} {a}" for s, a in zip(shown["statement"], arrows, strict=True)]
    ax.set_yticks(range(len(shown)), [textwrap.fill(text, 74) for text in texts], fontsize=7)
    for text, expected_by in zip(ax.get_yticklabels(), shown["expected_by"], strict=True):
        text.set_color("0.5" if expected_by == BY_DEFINITION else "black")
    ax.set_xlabel("difference / smallest effect of interest")
    return ax

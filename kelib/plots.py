"""Table and Axes in, Axes out. Estimation is done before (``kelib.metrics``), files come after.

Colours are seaborn's colour-blind palette, written out, since importing seaborn nearly doubles the
time in which a notebook starts; every series has a marker of its own for print in grey.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kelib.metrics import Interval, mean_interval

COLOURS = ("#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc", "#ca9161", "#fbafe4")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
FRACTIONS = ("p", "p_pt", "p_cl", "accuracy")  # columns that lie between 0 and 1
VERDICT_COLOURS = {"reproduced": COLOURS[2], "contradicted": COLOURS[3], "absent": COLOURS[0]}


def use_style() -> None:
    """The look of all figures: serif-free, thin grid, fonts embedded in PDFs."""
    mpl.rcParams.update(
        {
            "figure.constrained_layout.use": True,
            "font.size": 9,
            "axes.titlesize": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "0.92",
            "grid.linewidth": 0.6,
            "lines.markersize": 5,
            "legend.frameon": False,
            "pdf.fonttype": 42,
            "savefig.facecolor": "white",
        }
    )


def panels(
    columns: int, rows: int = 1, width: float = 3.4, height: float = 2.7
) -> tuple[Figure, Any]:
    """A figure with ``rows x columns`` axes (always an array) in the shared style."""
    from matplotlib import pyplot as plt

    use_style()
    figure, axes = plt.subplots(
        rows, columns, figsize=(width * columns, height * rows), squeeze=False
    )
    layout: Any = figure.get_layout_engine()  # the type of its base class knows no ``rect``
    layout.set(rect=(0, 0.025, 1, 0.975))
    return figure, axes


def summarise(table: pd.DataFrame, value: str, by: Sequence[str]) -> pd.DataFrame:
    """Mean and 95 % t interval of ``value`` per group: columns ``by``, n, mean, low, high.

    CL seeds are averaged inside a pretraining seed first. With several pretraining seeds the
    interval is over these (the unit of the study); with one it is over CL seeds, and says nothing
    about other pretraining runs. NaN bounds mean tied values or a single value. The column
    ``unit`` names which.
    """
    several = table["seed"].nunique() > 1
    keys = list(by)
    if several:
        table = table.groupby([*keys, "seed"], observed=True)[value].mean().reset_index()
    rows = []
    for group, part in table.groupby(keys, observed=True):
        values = part[value].dropna().to_numpy()  # F over chance is NaN where nothing was learnt
        interval = mean_interval(values) if len(values) else Interval(0, *[np.nan] * 3)
        if len(values) > 1 and np.ptp(values) == 0:  # tied at a bound: a width of 0 is no certainty
            interval = Interval(len(values), interval.mean, np.nan, np.nan)
        names = group if isinstance(group, tuple) else (group,)
        row = dict(zip(keys, names, strict=True))
        row |= {"n": interval.n, "mean": interval.mean, "low": interval.low, "high": interval.high}
        rows.append(row | {"unit": "pretraining seeds" if several else "CL seeds"})
    return pd.DataFrame(rows)


def bounds(low: float, high: float, decimals: int) -> str:
    """An interval in words: ``[-0.4, +0.5]``, or that there is none."""
    if np.isnan(low):
        return "(no interval: tied or single)"
    return f"[{low:+.{decimals}f}, {high:+.{decimals}f}]"


def within_range(mean: pd.DataFrame, value: str, scale: float = 1) -> tuple[pd.DataFrame, str]:
    """Rows of :func:`summarise`, times ``scale``, as they are drawn: intervals of a column of
    :data:`FRACTIONS` end at 0 and ``scale``, for a t interval knows no bounds. Numbers in tables
    stay whole. The words say which ends were cut; empty where none was, and for differences, whose
    means need not be fractions.
    """
    if value not in FRACTIONS or not mean["mean"].between(0, scale).all():
        return mean, ""
    over = {0: (mean["low"] < 0).any(), scale: (mean["high"] > scale).any()}
    cut = mean.assign(low=mean["low"].clip(lower=0), high=mean["high"].clip(upper=scale))
    ends = " and ".join(f"{end:g}" for end, beyond in over.items() if beyond)
    return cut, f"cut at {ends}" if ends else ""


def intervals_table(
    summaries: dict[str, pd.DataFrame], keys: Sequence[str], scales: dict[str, float]
) -> pd.DataFrame:
    """``mean ± half width`` of several quantities as text, one row a group of ``keys``.

    ``summaries`` are tables of :func:`summarise` by the same ``keys``; a mean without an interval
    stands alone.
    """
    text = next(iter(summaries.values()))[list(keys)].copy()
    for name, summary in summaries.items():
        means, halves = summary["mean"] * scales[name], summary["high"] - summary["mean"]
        text[name] = [
            f"{mean:.2f}" if np.isnan(half) else f"{mean:.2f} ± {half * scales[name]:.2f}"
            for mean, half in zip(means, halves, strict=True)
        ]
    return text


def entropy_curve(totals: pd.DataFrame, ax: Axes, peak: int, stages: dict[str, int]) -> Axes:
    """Knowledge entropy (summed over layers, nats) against the step, all three phases, logarithmic
    steps.

    ``totals`` has columns seed, step, entropy_nats, bound_nats. The peak and the stages that
    continual learning starts from are marked for the first seed.
    """
    for index, (seed, part) in enumerate(totals.groupby("seed")):
        colour = COLOURS[index % len(COLOURS)]
        style: dict[str, Any] = {"color": colour, "marker": MARKERS[index % 7], "ms": 4, "lw": 1.2}
        ax.plot(part["step"], part["entropy_nats"], label=f"seed {seed}", **style)
    first = totals[totals["seed"] == totals["seed"].iloc[0]].set_index("step")["entropy_nats"]
    ax.axhline(totals["bound_nats"].iloc[0], color="0.5", lw=0.8, ls=":")
    ax.annotate(
        "bound: layers x ln m",
        (1, totals["bound_nats"].iloc[0]),
        fontsize=7,
        color="0.4",
        xytext=(0, 3),
        textcoords="offset points",
    )
    ax.axvline(peak, color="0.5", lw=0.8, ls="--")
    ax.annotate(
        f"peak, step {peak}",
        (peak, first.min()),
        fontsize=7,
        color="0.3",
        rotation=90,
        xytext=(-9, 2),
        textcoords="offset points",
    )
    for step in stages.values():
        ax.plot(step, first[step], "D", mfc="none", mec="black", ms=8)
    if totals["seed"].nunique() > 1:
        ax.legend(fontsize=7)
    ax.set_xscale("symlog", linthresh=1)
    ax.set_xlabel("pretraining step (symlog)")
    ax.set_ylabel("knowledge entropy (nats)")
    return ax


def layer_changes(entropy: pd.DataFrame, ax: Axes, peak: int, tokens_per_step: int) -> Axes:
    """Entropy of each layer relative to its value at ``peak`` (nats), from there on, and their sum.

    ``entropy`` has columns step, layer, entropy_nats of one seed. If nothing was measured after the
    peak the panel says that, in place of one point.
    """
    table = entropy.pivot(index="step", columns="layer", values="entropy_nats")
    late = table.loc[peak:] - table.loc[peak]
    if len(late) < 2:
        place: dict[str, Any] = {"transform": ax.transAxes, "ha": "center", "va": "center"}
        ax.text(0.5, 0.5, f"no step after the peak ({peak})", **place)
        ax.set_axis_off()
        return ax
    layer: Any  # labels of columns have no types of their own
    for index, layer in enumerate(late.columns):
        ax.plot(
            late.index,
            late[layer],
            marker=MARKERS[index % 7],
            color=COLOURS[index % 6],
            lw=1,
            ms=3.5,
            label=f"layer {layer + 1}",
        )
    ax.plot(late.index, late.sum(axis=1), "-", color="black", lw=2, label="sum")
    ax.axhline(0, color="0.5", lw=0.8)
    ax.set_xlabel("pretraining step")
    ax.set_ylabel("change since the peak (nats)")
    ax.legend(fontsize=7)
    millions = tokens_per_step / 1e6

    def tokens_of(step: Any) -> Any:
        return step * millions

    def step_of(tokens: Any) -> Any:
        return tokens / millions

    top = ax.secondary_xaxis("top", functions=(tokens_of, step_of))
    top.set_xlabel("tokens (millions)", fontsize=7)
    top.tick_params(labelsize=7)
    return ax


def claims_forest(claims: pd.DataFrame, ax: Axes) -> Axes:
    """Effect of every claim in units of its smallest effect of interest, signed so that right is
    the paper's direction.

    ``claims`` has columns label, mean, low95, high95, smallest_effect, direction, verdict.
    """
    claims = claims.reset_index(drop=True)
    row: Any  # columns have no types of their own
    for row in claims.itertuples():
        unit = row.direction / row.smallest_effect
        y = len(claims) - 1 - row.Index
        ends = sorted((row.low95 * unit, row.high95 * unit))
        colour = VERDICT_COLOURS.get(str(row.verdict), "0.35")
        ax.plot(ends, [y, y], color=colour, lw=1.5)
        face = "white" if str(row.verdict).startswith("not") else colour
        ax.plot(row.mean * unit, y, "o", color=colour, mfc=face)
        ax.annotate(
            str(row.verdict),
            (1.01, y),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=7,
            color=colour,
            annotation_clip=False,
        )
    ax.axvspan(-1, 1, color="0.93", zorder=0)
    ax.text(
        0, len(claims) - 0.35, "too small to matter", ha="center", va="top", fontsize=7, color="0.4"
    )
    ax.axvline(0, color="0.5", lw=0.8)
    ax.set_xscale("symlog", linthresh=1)
    ax.margins(x=0.08)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_yticks(range(len(claims))[::-1], claims["label"])
    ax.set_ylim(-0.7, len(claims) - 0.3)
    ax.set_xlabel("effect ÷ smallest effect of interest, positive = the paper's direction (symlog)")
    return ax


def legend_below(figure: Figure, ax: Axes, columns: int = 4, title: str = "") -> None:
    """One legend for all panels, under them, taken from ``ax``; ``title`` says what intervals
    are.
    """
    handles, labels = ax.get_legend_handles_labels()
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": columns, "fontsize": 8}
    figure.legend(handles, labels, title=title, title_fontsize=8, **place)


def interval_note(summary: pd.DataFrame) -> str:
    """What the intervals of a table of :func:`summarise` are, in words for the legend."""
    return f"mean and 95 % t interval over {summary['unit'].iloc[0]}, n = {summary['n'].max()}"

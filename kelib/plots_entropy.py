"""Figures of entropies along pretraining: table and Axes in, Axes out, as in ``kelib.plots``.

Pretraining seeds are the unit throughout: a thin line each, their mean thick, and a 95 % t interval
over them where there are at least two. ``kelib.trends`` prepares the tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kelib.plots import COLOURS, MARKERS
from kelib.trends import Stages, over_seeds


def note_below(figure: Figure, *lines: str) -> None:
    """Lines of small print under all panels: what intervals are, what the paper reports."""
    # the empty line is for the stamp of ``save_figure``
    figure.supxlabel("\n".join([*lines, ""]), x=0.01, ha="left", fontsize=7.5, color="0.25")


def name_panels(axes: Sequence[Axes], titles: Sequence[str], rows: int = 1) -> None:
    """Titles with letters, (a) and so on, above ``rows`` rows of small print."""
    for letter, ax, title in zip("abcdefghijklmnopqrstuvwxyz", axes, titles, strict=False):
        ax.set_title(f"({letter}) {title}", pad=5 + 9 * rows)


def mark_peaks(ax: Axes, peaks: Mapping[int, int], name: str = "", row: int = 0) -> None:
    """The entropy peak (of ``name``): a dashed line, or from the earliest to the latest seed a grey
    span, named above the axes in the given row of small print.
    """
    low, high = min(peaks.values()), max(peaks.values())
    if low == high:
        ax.axvline(low, color="0.5", lw=0.8, ls="--")
    else:
        ax.axvspan(low, high, color="0.93", zorder=0)
    text = f"peak {low}" if low == high else f"peaks {low} to {high}"
    place: dict[str, Any] = {"xycoords": ax.get_xaxis_transform(), "ha": "center", "va": "bottom"}
    place |= {"xytext": (0, 2 + 9 * row), "textcoords": "offset points"}
    at = (low * high) ** 0.5  # the middle, on a logarithmic axis
    ax.annotate(f"{name} {text}".strip(), (at, 1), fontsize=7, color="0.3", **place)


def label_ends(ax: Axes, ends: Mapping[str, tuple[float, str]], gap: float = 0.085) -> None:
    """Names of lines at the right of the axes, at the height of their ends, pushed apart if need
    be.

    ``ends`` maps a name to (y in data units, colour); ``gap`` is the least distance as a share of
    the height. To be called when the limits are final.
    """
    to_axes = ax.transScale + ax.transLimits
    height = {name: float(to_axes.transform((1, y))[1]) for name, (y, _) in ends.items()}
    placed: list[float] = []
    for name in sorted(height, key=lambda name: height[name]):
        placed.append(max(height[name], placed[-1] + gap) if placed else height[name])
    above = max(0.0, placed[-1] - 1) if placed else 0.0  # a full column moves down as one
    for name, y in zip(sorted(height, key=lambda name: height[name]), placed, strict=True):
        place: dict[str, Any] = {"transform": ax.transAxes, "va": "center", "fontsize": 7.5}
        ax.text(1.02, y - above, name, color=ends[name][1], **place)


def along_pretraining(
    table: pd.DataFrame,
    ax: Axes,
    value: str,
    ylabel: str,
    by: str,
    names: Mapping[Any, str],
    peaks: Mapping[int, int] | None = None,
    stages: Stages | None = None,
    bound: tuple[float, str] | None = None,
    first: int = 0,
) -> Axes:
    """``value`` against the step (symlog), a colour for each key of ``names`` in column ``by``.

    ``table`` has columns seed, step, ``by``, ``value``. With two or three seeds limits follow these
    and the wide band is cut. Where given, ``peaks`` (seed -> step) are marked, the stages get
    diamonds on the mean, and ``bound`` (value, name) a dotted line. Lines are named at their ends
    if there are several. ``first`` is the colour to begin with.
    """
    marked = sorted({step for of_seed in (stages or {}).values() for step in of_seed.values()})
    wanted = table[table[by].isin(list(names))]
    low, high = wanted[value].min(), wanted[value].max()
    ends: dict[str, tuple[float, str]] = {}
    for index, (key, name) in enumerate(names.items(), first):
        colour, part = COLOURS[index % 7], wanted[wanted[by] == key]
        if part["seed"].nunique() > 1:
            for _, line in part.groupby("seed"):
                ax.plot(line["step"], line[value], color=colour, lw=0.6, alpha=0.6, label="_seed")
        mean = over_seeds(part, value, ["step"])
        style: dict[str, Any] = {"marker": MARKERS[index % 7], "ms": 3, "lw": 1.6}
        style["markevery"] = max(1, len(mean) // 30)
        ax.plot(mean["step"], mean["mean"], color=colour, label=name, **style)
        ax.fill_between(mean["step"], mean["low"], mean["high"], color=colour, alpha=0.15, lw=0)
        at = mean.set_index("step")["mean"].reindex(marked)
        size = 7 if len(names) == 1 else 5
        ax.plot(at.index, at, "D", mfc="none", mec="black", ms=size, mew=0.8, label="_stages")
        ends[name] = (float(mean["mean"].iloc[-1]), colour)
        if mean["n"].max() > 3:
            low, high = np.nanmin([low, mean["low"].min()]), np.nanmax([high, mean["high"].max()])
    if bound is not None:
        high = max(high, bound[0])
        ax.axhline(bound[0], color="0.5", lw=0.8, ls=":")
        small: dict[str, Any] = {"textcoords": "offset points", "fontsize": 7, "color": "0.4"}
        ax.annotate(bound[1], (0, bound[0]), xytext=(2, 2), **small)
    margin = 0.08 * (high - low) or 0.5
    ax.set_ylim(low - margin, high + margin)
    ax.set_xscale("symlog", linthresh=1)
    ax.set_xlim(-0.2, wanted["step"].max() * 1.4)
    if peaks is not None:
        mark_peaks(ax, peaks)
    ax.set_xlabel("pretraining step (symlog)")
    ax.set_ylabel(ylabel)
    if len(names) > 1:
        label_ends(ax, ends)
    return ax


def stage_change_dots(
    changes: pd.DataFrame,
    ax: Axes,
    by: str,
    names: Mapping[Any, str],
    xlabel: str,
    scale: float = 1,
) -> Axes:
    """Last minus first stage: a small ring for each seed, the mean with its interval over seeds.

    ``changes`` comes from :func:`stage_changes`; rows follow ``names`` from the top. At the right:
    in how many seeds the quantity falls.
    """
    for index, key in enumerate(names):
        part, y = changes[changes[by] == key], len(names) - 1 - index
        mean = over_seeds(part, "change", [by]).iloc[0]
        colour, marker = COLOURS[index % 7], MARKERS[index % 7]
        if len(part) > 1:
            ax.plot(part["change"] * scale, [y - 0.22] * len(part), "o", mfc="none", mec=colour)
        if not np.isnan(mean["low"]):
            ax.plot([mean["low"] * scale, mean["high"] * scale], [y, y], color=colour, lw=1.5)
        ax.plot(mean["mean"] * scale, y, marker, color=colour)
        text = f"falls in\n{(part['change'] < 0).sum()} of {len(part)}"
        place: dict[str, Any] = {"transform": ax.get_yaxis_transform(), "va": "center"}
        ax.text(1.02, y, text, fontsize=7, color=colour, **place)
    ax.axvline(0, color="0.5", lw=0.8)
    ax.set_yticks(range(len(names))[::-1], list(names.values()))
    ax.set_ylim(-0.6, len(names) - 0.4)
    ax.set_xlabel(xlabel)
    return ax


def _shades(count: int) -> list[str]:
    """Greys from light to black: stages are in order, and colours name other things."""
    return [f"{level:.2f}" for level in np.linspace(0.65 if count > 1 else 0, 0, count)]


def layers_at_stages(table: pd.DataFrame, ax: Axes, ylabel: str, scale: float = 1) -> Axes:
    """A quantity of each layer, one line a stage with its interval over seeds, later stages darker.

    ``table`` has columns stage, in order, seed, layer and value.
    """
    order = list(dict.fromkeys(table["stage"]))
    for index, (stage, colour) in enumerate(zip(order, _shades(len(order)), strict=True)):
        part = over_seeds(table[table["stage"] == stage], "value", ["layer"])
        values = part[["mean", "low", "high"]].to_numpy() * scale
        errors = np.nan_to_num(np.abs(values[:, 1:].T - values[:, 0]))
        style: dict[str, Any] = {"color": colour, "marker": MARKERS[index % 7]}
        # a little apart, so that intervals do not hide each other
        x = part["layer"] + 1 + 0.06 * (index - (len(order) - 1) / 2)
        style |= {"lw": 1.2, "capsize": 2}
        ax.errorbar(x, values[:, 0], yerr=errors, label=str(stage), **style)
    ax.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
    ax.set_xlabel("layer")
    ax.set_ylabel(ylabel)
    return ax


def sample_sizes(
    table: pd.DataFrame,
    ax: Axes,
    value: str,
    ylabel: str,
    level: float,
    marks: Mapping[int, str],
) -> Axes:
    """``value`` (nats, above 0) against the number of sequences, logarithmic, later stages darker.

    ``table`` has columns stage, seed, sequences, ``value``; what is not above 0 has no place on a
    logarithmic axis and is left out. ``level`` (nats) is drawn for comparison, ``marks`` names
    numbers of sequences.
    """
    shown = table[table[value] > 0]
    order = list(dict.fromkeys(table["stage"]))
    for index, (stage, colour) in enumerate(zip(order, _shades(len(order)), strict=True)):
        part = shown[shown["stage"] == stage]
        if part["seed"].nunique() > 1:
            for _, line in part.groupby("seed"):
                ax.plot(line["sequences"], line[value], color=colour, lw=0.6, alpha=0.6)
        mean = part.groupby("sequences")[value].mean()
        style: dict[str, Any] = {"marker": MARKERS[index % 7], "ms": 4, "lw": 1.6}
        ax.plot(mean.index, mean, color=colour, label=str(stage), **style)
    ax.axhline(level, color=COLOURS[3], lw=0.9, ls="--")
    place: dict[str, Any] = {"transform": ax.get_yaxis_transform(), "va": "center"}
    ax.text(1.02, level, "change\nbetween\nstages", fontsize=7, color=COLOURS[3], **place)
    for sequences, name in marks.items():
        ax.axvline(sequences, color="0.8", lw=0.9, zorder=0)
        above: dict[str, Any] = {"xytext": (0, 2), "textcoords": "offset points", "ha": "center"}
        ax.annotate(name, (sequences, 1), xycoords=ax.get_xaxis_transform(), fontsize=7, **above)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_xlabel("sequences in the data set")
    ax.set_ylabel(ylabel)
    return ax


def stage_differences(table: pd.DataFrame, ax: Axes, ylabel: str) -> Axes:
    """The difference between two stages as data sets of each size give it, a line a seed.

    ``table`` has columns seed, sequences, difference and deviation (nats); bars are one deviation
    to either side and miss where it is NaN.
    """
    ends: dict[str, tuple[float, str]] = {}
    for index, (seed, line) in enumerate(table.groupby("seed")):
        style: dict[str, Any] = {"color": COLOURS[index % 7], "marker": MARKERS[index % 7]}
        x = line["sequences"] * 1.04**index  # a little apart, so that bars do not hide each other
        bars = np.nan_to_num(line["deviation"])
        style |= {"ms": 4, "lw": 1.0, "capsize": 2, "label": f"seed {seed}"}
        ax.errorbar(x, line["difference"], yerr=bars, **style)
        ends[f"seed {seed}"] = (float(line["difference"].iloc[-1]), COLOURS[index % 7])
    ax.axhline(0, color="0.5", lw=0.8)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_xlabel("sequences in the data set")
    ax.set_ylabel(ylabel)
    label_ends(ax, ends)
    return ax


def correlation_dots(table: pd.DataFrame, ax: Axes, names: Mapping[str, str]) -> Axes:
    """Rank correlations with entropy, a point for each seed, a look for each phase.

    ``table`` holds the rows of :func:`rank_correlations` and :func:`layer_correlations`; ``names``
    maps ``y`` to labels, from the top.
    """
    looks: dict[str, dict[str, Any]] = {
        "all": {"color": COLOURS[0], "marker": "o", "label": "all checkpoints"},
        "after": {"color": COLOURS[3], "marker": "s", "mfc": "none", "label": "from the peak on"},
        "layers": {"color": COLOURS[2], "marker": "^", "label": "over layers"},
    }
    for offset, (phase, look) in zip((0.24, 0, -0.24), looks.items(), strict=True):
        part = table[table["phase"] == phase]
        y = [len(names) - 1 - list(names).index(str(name)) + offset for name in part["y"]]
        ax.plot(part["spearman"], y, ls="", ms=4, alpha=0.8, **look)
    ax.axvline(0, color="0.5", lw=0.8)
    ax.set_xlim(-1.08, 1.08)
    ax.set_yticks(range(len(names))[::-1], list(names.values()))
    ax.set_ylim(-0.6, len(names) - 0.4)
    ax.set_xlabel("rank correlation with entropy")
    return ax

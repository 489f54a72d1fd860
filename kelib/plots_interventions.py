"""Axes for interventions side by side; :mod:`kelib.intervention_effects` prepares their tables.

Intervals are 95 % t over the units in the column seed, see :func:`kelib.plots_curves.units`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from kelib.intervention_effects import BASELINES, EMPTY
from kelib.plots import COLOURS, MARKERS
from kelib.plots_curves import against_arm
from kelib.trends import over_seeds


def sweep_panels(
    axes: Sequence[Axes],
    runs: pd.DataFrame,
    pairs: pd.DataFrame,
    arms: Sequence[str],
    rates: Mapping[float, str],
) -> None:
    """Eight axes for ``runs`` and ``pairs`` of :func:`kelib.intervention_effects.sweep`: K, P, A
    and F after continual learning; effects on K and P, pair by pair; A and F against the modified
    model.

    ``arms`` begins with the original. Dotted: chance.
    """
    panels: list[tuple[pd.DataFrame, str, Sequence[str], str, float, str]] = [
        (runs, "k_cl", arms, "K (nats per token)", 1, "probes after CL"),
        (runs, "p_cl", arms, "P (%)", 100, "tasks after CL; dotted: chance"),
        (runs, BASELINES[0], arms, "A (%)", 100, "acquisition, from the checkpoint"),
        (runs, BASELINES[1], arms, "F (%)", 100, "forgetting, from the checkpoint"),
        (pairs, "k_cl", arms[1:], "K: arm - original (nats)", 1, "ours: probes, pair by pair"),
        (pairs, "p_cl", arms[1:], "P: arm - original (points)", 100, "ours: tasks, pair by pair"),
        (runs, f"{BASELINES[0]}_modified", arms, "A (%)", 100, "ours: A, from the modified model"),
        (runs, f"{BASELINES[1]}_modified", arms, "F (%)", 100, "ours: F, from the modified model"),
    ]
    for letter, ax, panel in zip("abcdefgh", axes, panels, strict=True):
        table, value, of, label, scale, title = panel
        against_arm(table, ax, value, rates, of, label, scale)
        ax.set_title(f"({letter}) {title}")
    axes[1].axhline(100 * runs["chance"].iloc[0], color="0.5", ls=":")


def heights(rows: Iterable[Hashable], groups: Mapping[Any, str]) -> dict[Any, float]:
    """Vertical place of every row, the last at 0, with a gap where the group changes."""
    places: dict[Any, float] = {}
    at, before = 0.0, None
    for key in reversed(list(rows)):
        at += 0 if before is None else 1 + 0.6 * (groups[key] != before)
        places[key], before = at, groups[key]
    return places


def look(group: str, groups: Mapping[Any, str]) -> dict[str, Any]:
    """Colour and marker of ``group``, by its place among ``groups``."""
    index = list(dict.fromkeys(groups.values())).index(group) % 7
    return {"color": COLOURS[index], "marker": MARKERS[index]}


def _symlog(axis: Any, linear: float) -> None:
    """Linear up to ``linear``, where there is a tick, and logarithmic beyond."""
    set_scale = getattr(axis.axes, f"set_{axis.axis_name}scale")
    set_scale("symlog", linthresh=linear)
    powers = linear * 10.0 ** np.arange(5)
    axis.set_major_locator(mpl.ticker.FixedLocator([*-powers[::-1], 0, *powers]))
    axis.set_major_formatter("{x:g}")


def _limits(values: Sequence[np.ndarray], linear: float | None) -> tuple[float, float]:
    finite = np.concatenate([*values, [0.0]])
    finite = finite[np.isfinite(finite)]
    low, high = float(finite.min()), float(finite.max())
    if linear is not None:  # a factor, as the axis is logarithmic there
        return min(1.35 * low, -1.35 * linear), max(1.35 * high, 1.35 * linear)
    margin = 0.08 * (high - low) or 0.5
    return low - margin, high + margin


def forest(
    table: pd.DataFrame,
    ax: Axes,
    value: str,
    by: str,
    rows: Mapping[Any, str],
    groups: Mapping[Any, str],
    xlabel: str,
    scale: float = 1,
    linear: float | None = None,
    band: bool = False,
) -> Axes:
    """``value`` of every key of ``rows`` in column ``by``, from the top: small marks are seeds, the
    large one their mean, the bar its interval.

    ``linear``: the axis is symlog, linear up to there; ``band`` shades that range, too small to
    matter. With two or three seeds limits follow these and the bars are cut.
    """
    places, spans = heights(rows, groups), []
    for key, y in places.items():
        part = table[table[by] == key].dropna(subset=[value])
        if part.empty:
            ax.text(0.98, y, EMPTY, transform=ax.get_yaxis_transform(), ha="right", fontsize=7)
            continue
        seeds = scale * part.groupby("seed")[value].mean().to_numpy()
        mean, style = over_seeds(part, value, [by]).iloc[0], look(groups[key], groups)
        ends = scale * mean[["low", "high"]].to_numpy(dtype=float)
        ax.plot(ends, [y, y], color=style["color"], lw=1.4)
        if len(seeds) > 1:
            ax.plot(seeds, [y - 0.28] * len(seeds), ls="", ms=3, mfc="none", mew=0.7, **style)
        ax.plot(scale * mean["mean"], y, ls="", label=f"_{key}", **style)
        spans += [seeds, ends] if mean["n"] > 3 else [seeds]
    ax.axvline(0, color="0.5", lw=0.8)
    if linear is None:
        ax.locator_params(axis="x", nbins=6)
    else:
        _symlog(ax.xaxis, linear)
        if band:
            ax.axvspan(-linear, linear, color="0.93", zorder=0)
    ax.set_xlim(_limits(spans, linear))
    ax.set_yticks([places[key] for key in rows], list(rows.values()))
    ax.set_ylim(-0.8, max(places.values()) + 0.6)
    ax.set_xlabel(xlabel)
    return ax


def plane(
    table: pd.DataFrame,
    ax: Axes,
    values: tuple[str, str],
    by: str,
    groups: Mapping[Any, str],
    labels: tuple[str, str],
    scales: tuple[float, float] = (1, 1),
    linear: tuple[float, float] | None = None,
) -> Axes:
    """Two ``values`` against each other, a point with both intervals for each key of ``groups``,
    numbered in their order; the original is the ring in the middle.

    ``linear``: both axes are symlog, linear up to there. Keys without a value are left out. A
    number that has no place beside its point stands apart, at the end of a line.
    """
    spans: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    points: dict[str, tuple[float, float, str]] = {}
    for number, (key, group) in enumerate(groups.items(), 1):
        part = table[table[by] == key].dropna(subset=list(values))
        if part.empty:
            continue
        means = [over_seeds(part, value, [by]).iloc[0] for value in values]
        at = [scale * mean["mean"] for mean, scale in zip(means, scales, strict=True)]
        halves = [
            np.nan_to_num(scale * (mean["high"] - mean["mean"]))
            for mean, scale in zip(means, scales, strict=True)
        ]
        style: dict[str, Any] = {**look(group, groups), "elinewidth": 0.7, "ls": "", "zorder": 3}
        style["label"] = group if group not in ax.get_legend_handles_labels()[1] else f"_{key}"
        _, _, bars = ax.errorbar(at[0], at[1], xerr=halves[0], yerr=halves[1], **style)
        for bar in bars:  # pale, for numbers are to be read before them
            bar.set_alpha(0.4)
        points[str(number)] = (at[0], at[1], style["color"])
        for span, center, half, mean in zip(spans, at, halves, means, strict=True):
            span.append(np.array([center - half, center + half] if mean["n"] > 3 else [center]))
    ax.axhline(0, color="0.5", lw=0.8)
    ax.axvline(0, color="0.5", lw=0.8)
    ax.plot(0, 0, "o", mfc="none", mec="black", ms=9, zorder=4, label="_original")
    if linear is not None:
        _symlog(ax.xaxis, linear[0])
        _symlog(ax.yaxis, linear[1])
    ax.set_xlim(_limits(spans[0], linear[0] if linear else None))
    ax.set_ylim(_limits(spans[1], linear[1] if linear else None))
    ax.set_xlabel(labels[0])
    ax.set_ylabel(labels[1])
    name_points(ax, points)
    return ax


def name_points(ax: Axes, points: Mapping[str, tuple[float, float, str]]) -> None:
    """A name at every point (x, y, colour), where it covers no point and no other name: beside it,
    or further off with a line between. To be called when the limits are final.
    """
    inches = ax.figure.get_size_inches() * ax.get_position().size  # type: ignore[union-attr]
    to_points = (ax.transScale + ax.transLimits).transform
    at = {name: np.asarray(to_points((x, y))) * inches * 72 for name, (x, y, _) in points.items()}
    taken = [*at.values()]
    turns = [np.array([np.cos(a), np.sin(a)]) for a in np.pi * (0.25 + np.arange(0, 2, 0.125))]
    moves = [radius * turn for radius in (8, 14, 20, 27, 35, 44) for turn in turns]
    for name, (x, y, colour) in points.items():
        free = [
            move
            for move in moves
            if all(np.abs((at[name] + move - other) / (9, 8)).max() > 1 for other in taken)
            and ((at[name] + move > 4) & (at[name] + move < inches * 72 + 8)).all()
        ]
        move = (free or moves)[0]
        taken.append(at[name] + move)
        style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7, "color": colour}
        style |= {"xytext": tuple(move), "textcoords": "offset points", "zorder": 5}
        if np.hypot(*move) > 10:
            line = {"arrowstyle": "-", "color": colour, "lw": 0.5, "shrinkA": 0, "shrinkB": 2}
            style["arrowprops"] = line
        ax.annotate(name, (x, y), **style)

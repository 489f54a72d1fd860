"""What ``kelib.plots_learning`` needs to draw one pretraining seed as well as several, and names,
as of arms of an intervention, in place of stages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from kelib.errors import KelibError, listing
from kelib.metrics import check_table
from kelib.plots import COLOURS
from kelib.plots_entropy import label_ends
from kelib.plots_learning import against_stage, by_seed

ORIGINAL = "original"


def units(table: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """``table`` with the units that intervals are over in its column seed, and what these are.

    With several pretraining seeds these themselves; with one its CL seeds, as in
    :func:`kelib.plots.summarise`. Raises KelibError without the columns seed and cl_seed.
    """
    check_table(table, ["seed", "cl_seed"], [], "continual-learning")
    if table["seed"].nunique() > 1:
        return table, "pretraining seeds"
    return table.assign(seed=table["cl_seed"]), "CL seeds"


def units_note(unit: str, n: int, bands: bool = False) -> str:
    """What thin and thick lines, bars and, where there are any, ``bands`` are, for ``n`` units of
    :func:`units`.
    """
    if n < 2:
        return "one pretraining seed, one CL seed (n = 1): no interval"
    # fewer than four have no bands, and their bars are cut: t is 12.7 for two, 4.3 for three
    spread = "bands, bars" if bands and n > 3 else "bars"
    note = f"thin: single {unit}; thick: their mean; {spread}: 95 % t interval over n = {n} {unit}"
    if unit != "pretraining seeds":
        note += " of one pretraining seed, which say nothing about others"
    return note if n > 3 else f"{note} (cut at the axes)"


def name_seeds(table: pd.DataFrame, ax: Axes, value: str) -> Axes:
    """Pretraining seeds by number at the right of ``ax``, where their lines end.

    ``table`` has columns seed, stage_step and ``value``, as :func:`against_stage` drew them; to be
    called when the limits are final.
    """
    last = by_seed(table, [value]).sort_values("stage_step").groupby("seed").last()
    label_ends(ax, {str(seed): (end, "0.3") for seed, end in last[value].items()})
    return ax


def against_names(
    table: pd.DataFrame,
    ax: Axes,
    value: str,
    column: str,
    order: Sequence[str],
    by: str,
    names: Mapping[Any, str],
    ylabel: str,
    scale: float = 1,
    zero: bool = False,
    first: int = 0,
    named: bool = False,
) -> Axes:
    """``value`` at each of ``order``, which are values of ``column``, a line for each key of
    ``names`` in column ``by``; else as :func:`kelib.plots_learning.against_stage`.

    With ``named`` the names stand where the lines end, and no legend is needed.
    Raises KelibError for a value of ``column`` that ``order`` does not list.
    """
    unknown = set(table[column]) - set(order)
    if unknown:
        raise KelibError(f"{column} {listing(unknown)} has no place among {listing(order)}: add it")
    place = {name: index for index, name in enumerate(order)}
    placed = table.assign(stage_step=table[column].map(place))
    ticks = dict(enumerate(order))
    against_stage(placed, ax, value, by, names, ticks, ylabel, scale, zero=zero, first=first)
    ax.set_xlabel("")
    if named:
        ends = by_seed(placed[placed[column] == order[-1]], [value], [by]).groupby(by)[value].mean()
        label_ends(
            ax,
            {
                name: (scale * ends[key], COLOURS[index % 7])
                for index, (key, name) in enumerate(names.items(), first)
                if key in ends
            },
        )
    return ax


def against_arm(
    table: pd.DataFrame,
    ax: Axes,
    value: str,
    names: Mapping[float, str],
    arms: Sequence[str],
    ylabel: str,
    scale: float = 1,
) -> Axes:
    """``value`` in each arm of an intervention, a line for each CL rate in ``names``.

    ``table`` has columns seed, learning_rate, arm and ``value``; see :func:`against_names`. Dashed:
    the mean of the arm :data:`ORIGINAL`; where ``arms`` lacks it, values are differences from it
    and the line is at 0.
    """
    zero = ORIGINAL not in arms
    against_names(table, ax, value, "arm", arms, "learning_rate", names, ylabel, scale, zero)
    for index, rate in enumerate(() if zero else names):
        original = table[(table["learning_rate"] == rate) & (table["arm"] == ORIGINAL)]
        level = scale * by_seed(original.assign(stage_step=0), [value])[value].mean()
        ax.axhline(level, color=COLOURS[index % 7], lw=0.8, ls="--", zorder=1)
    return ax


def counted_ticks(table: pd.DataFrame, value: str, ticks: Mapping[int, str]) -> dict[int, str]:
    """``ticks`` of stages (share and step) with the number of seeds in which ``value`` is defined,
    where it is not in all of them.
    """
    counts = table.dropna(subset=[value]).groupby("stage_step")["seed"].nunique()
    labels = {}
    for step, tick in ticks.items():
        labels[step] = "\n".join(tick.split("\n")[:2])
        if (n := counts.get(step, 0)) < table["seed"].nunique():
            labels[step] += f"\nn = {n}"
    return labels

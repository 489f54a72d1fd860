"""What ``kelib.plots_learning`` needs to draw one pretraining seed as well as several, and arms of
an intervention in place of stages.
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

    ``table`` has columns seed, learning_rate, arm and ``value``. Thin: single seeds; marked: their
    mean with its interval, as in :func:`against_stage`. Dashed: the mean of the arm
    :data:`ORIGINAL`; where ``arms`` lacks it, values are differences from it and the line is at 0.
    Raises KelibError for an arm that ``arms`` does not list.
    """
    unknown = set(table["arm"]) - set(arms)
    if unknown:
        raise KelibError(f"arm {listing(unknown)} has no place among {listing(arms)}: add or drop")
    place = {arm: index for index, arm in enumerate(arms)}
    placed: Any = table.assign(stage_step=table["arm"].map(place))
    difference = ORIGINAL not in place
    ticks = dict(enumerate(arms))
    against_stage(placed, ax, value, "learning_rate", names, ticks, ylabel, scale, zero=difference)
    for index, rate in enumerate(names if not difference else ()):
        original = placed[(placed["learning_rate"] == rate) & (placed["arm"] == ORIGINAL)]
        level = scale * by_seed(original, [value])[value].mean()
        ax.axhline(level, color=COLOURS[index % 7], lw=0.8, ls="--", zorder=1)
    ax.set_xlabel("")
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

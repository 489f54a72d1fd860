"""Units of intervals, ticks that count seeds, and axes by arm of an intervention."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from kelib import plots, plots_curves
from kelib.errors import KelibError

ARMS = [plots_curves.ORIGINAL, "q = 1", "q = 2"]
RATES = {0.006: "CL rate 0.006", 0.001: "CL rate 0.001"}

pytestmark = pytest.mark.usefixtures("canvas")


def runs(seeds: list[int], cl_seeds: list[int]) -> pd.DataFrame:
    """A row for each pretraining seed, CL seed and stage; the value is the sum of the seeds."""
    rows = [
        (seed, cl_seed, step, float(seed + cl_seed))
        for seed in seeds
        for cl_seed in cl_seeds
        for step in (30, 60)
    ]
    return pd.DataFrame(rows, columns=["seed", "cl_seed", "stage_step", "value"])


# --- units ----------------------------------------------------------------------------------------


def test_cl_seeds_are_the_units_of_one_pretraining_seed_alone() -> None:
    several, unit = plots_curves.units(runs([100, 101], [0, 1]))
    assert unit == "pretraining seeds" and set(several["seed"]) == {100, 101}
    table = runs([100], [0, 1, 2])
    one, unit = plots_curves.units(table)
    assert unit == "CL seeds" and set(one["seed"]) == {0, 1, 2}
    assert set(table["seed"]) == {100}  # what came in is left as it was


@pytest.mark.parametrize("seeds", [[100], [100, 101]])
def test_units_are_those_of_the_summaries(seeds: list[int]) -> None:
    table = runs(seeds, [0, 1, 2])
    shown, unit = plots_curves.units(table)
    summary = plots.summarise(table, "value", ["stage_step"])
    assert set(summary["unit"]) == {unit}
    assert set(summary["n"]) == {shown["seed"].nunique()}


def test_units_need_both_seeds() -> None:
    with pytest.raises(KelibError, match="continual-learning table lacks cl_seed"):
        plots_curves.units(runs([100], [0]).drop(columns="cl_seed"))


def test_the_note_says_what_bars_are_and_when_they_are_cut() -> None:
    note = plots_curves.units_note("pretraining seeds", 5, bands=True)
    assert note == (
        "thin: single pretraining seeds; thick: their mean; "
        "bands, bars: 95 % t interval over n = 5 pretraining seeds"
    )
    few = plots_curves.units_note("pretraining seeds", 2, bands=True)
    assert "; bars: 95 %" in few and few.endswith("(cut at the axes)")
    assert "say nothing about others" in plots_curves.units_note("CL seeds", 3)
    assert plots_curves.units_note("CL seeds", 1).endswith("no interval")


def test_ticks_count_the_seeds_where_a_value_is_defined() -> None:
    table = runs([100, 101], [0])
    table.loc[(table["seed"] == 101) & (table["stage_step"] == 30), "value"] = np.nan
    ticks = {15: "25%\n15\nn = 1", 30: "50%\n30", 60: "100%\n60"}
    assert plots_curves.counted_ticks(table, "value", ticks) == {
        15: "25%\n15\nn = 0",
        30: "50%\n30\nn = 1",
        60: "100%\n60",
    }


def test_seeds_are_named_where_their_lines_end(ax: Axes) -> None:
    ax.set_ylim(99, 103)
    plots_curves.name_seeds(runs([100, 102], [0]), ax, "value")
    heights = {text.get_text(): text.get_position()[1] for text in ax.texts}
    assert heights == pytest.approx({"100": 0.25, "102": 0.75})


# --- arms -----------------------------------------------------------------------------------------


def arms(values: dict[tuple[float, int, str], float]) -> pd.DataFrame:
    """Keys are CL rate, pretraining seed and arm."""
    columns = ["learning_rate", "seed", "arm"]
    return pd.DataFrame([(*key, value) for key, value in values.items()], columns=[*columns, "k"])


def dashed(ax: Axes) -> list[Any]:
    return [line for line in ax.get_lines() if line.get_linestyle() == "--"]


def test_arms_stand_in_order_with_the_level_of_the_original(ax: Axes) -> None:
    table = arms(
        {
            **{(0.006, 100, "q = 1"): -3.0, (0.006, 101, "q = 1"): -2.0},
            **{(0.006, 100, "original"): -4.0, (0.006, 101, "original"): -3.0},
            (0.001, 100, "original"): -1.0,
        }
    )
    assert plots_curves.against_arm(table, ax, "k", RATES, ARMS, "K", 10) is ax
    drawn = {container.get_label(): container.lines[0] for container in ax.containers}
    assert drawn["CL rate 0.006"].get_ydata() == pytest.approx([-35, -25])
    assert drawn["CL rate 0.006"].get_xdata() == pytest.approx([0, 1], abs=0.1)
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ARMS
    levels = {to_hex(line.get_color()): line.get_ydata()[0] for line in dashed(ax)}
    assert levels == {plots.COLOURS[0]: -35, plots.COLOURS[1]: -10}
    thin = [line for line in ax.get_lines() if line.get_label() == "_seed"]
    assert [list(line.get_ydata()) for line in thin] == [[-40, -30], [-30, -20]]


def test_differences_have_a_line_at_zero_instead(ax: Axes) -> None:
    table = arms({(0.006, 100, "q = 1"): 0.5, (0.006, 100, "q = 2"): 0.75})
    plots_curves.against_arm(table, ax, "k", RATES, ARMS[1:], "K")
    assert not dashed(ax) and ax.get_ylim()[0] < 0
    assert any(list(line.get_ydata()) == [0, 0] for line in ax.get_lines())


def test_an_arm_without_a_place_is_refused(ax: Axes) -> None:
    table = arms({(0.006, 100, "q = 3"): 0.5})
    with pytest.raises(KelibError, match="arm q = 3 has no place among original, q = 1"):
        plots_curves.against_arm(table, ax, "k", RATES, ARMS, "K")


def test_lines_over_names_are_named_where_they_end(ax: Axes) -> None:
    table = arms({(rate, 100, arm): 2 * i for rate, i in ((0.006, 1), (0.001, 2)) for arm in ARMS})
    of = {0.006: "fast", 0.001: "slow", 0.1: "not run"}
    plots_curves.against_names(
        table, ax, "k", "arm", ARMS, "learning_rate", of, "K", zero=True, named=True
    )
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ARMS
    assert ax.get_xlabel() == "" and ax.get_ylabel() == "K" and ax.get_ylim()[0] < 0
    texts = {text.get_text(): text.get_position()[1] for text in ax.texts}
    assert texts == pytest.approx(
        {name: ax.transLimits.transform((0, y))[1] for name, y in (("fast", 2), ("slow", 4))}
    )

"""Tables of continual learning by stage are means of the runs, and axes show these numbers."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from kelib import plots, plots_learning
from kelib.errors import KelibError

NAMES = {"once": "once", "paraphrase": "paraphrase"}
TICKS = {30: "50%\n30", 60: "100%\n60"}


pytestmark = pytest.mark.usefixtures("canvas")


def runs(k_cl: dict[tuple[int, int, int], float], injected: bool = True) -> pd.DataFrame:
    """A continual table; the keys are pretraining seed, stage and CL seed."""
    columns = ["seed", "stage_step", "cl_seed"]
    table = pd.DataFrame([(*key, value) for key, value in k_cl.items()], columns=[*columns, "k_cl"])
    return table.assign(learning_rate=0.001, injected=injected, k_pt=-5.0)


# --- tables ---------------------------------------------------------------------------------------


def test_cl_seeds_are_averaged_inside_a_seed_and_stage() -> None:
    table = runs({(100, 30, 0): -4.0, (100, 30, 1): -3.0, (101, 30, 0): -2.0})
    means = plots_learning.by_seed(table, ["k_cl"])
    assert means.to_dict("records") == [
        {"seed": 100, "stage_step": 30, "k_cl": -3.5},
        {"seed": 101, "stage_step": 30, "k_cl": -2.0},
    ]


def test_stages_that_some_seeds_lack_say_how_many_have_them() -> None:
    table = runs({(100, 30, 0): 0, (100, 60, 0): 0, (101, 60, 0): 0, (101, 60, 1): 0})
    table["stage_label"] = table["stage_step"].map({30: "50%", 60: "100%"})
    assert plots_learning.stage_ticks(table) == {30: "50%\n30\nn = 1", 60: "100%\n60"}


def test_gain_due_to_injection_pairs_runs_and_leaves_out_those_without_control() -> None:
    injected = runs({(100, 30, 0): -3.0, (100, 30, 1): -1.0, (100, 60, 0): -2.5})
    none = runs({(100, 30, 0): -4.0, (100, 60, 0): -4.5}, injected=False)
    table = pd.concat([none, injected], ignore_index=True)
    net = plots_learning.due_to_injection(table, ["k_cl"])
    assert net[["stage_step", "cl_seed", "k_cl"]].to_numpy().tolist() == [[30, 0, 1], [60, 0, 2]]


def test_two_runs_of_the_same_place_are_refused() -> None:
    table = runs({(100, 30, 0): -3.0})
    twice = pd.concat([table, table])
    with pytest.raises(KelibError, match=r"second table has several rows .* choose one variant"):
        plots_learning.differences(table, twice, ["k_cl"])


def test_runs_without_any_counterpart_are_refused() -> None:
    table, other = runs({(100, 30, 0): -3.0}), runs({(101, 30, 0): -3.0})
    with pytest.raises(KelibError, match=r"no run of the one table agrees in .*cl_seed"):
        plots_learning.differences(table, other, ["k_cl"])


def test_runs_may_be_paired_across_rates() -> None:
    low, high = runs({(100, 30, 0): -3.0}), runs({(100, 30, 0): -2.0, (100, 30, 1): 0.0})
    match = ["seed", "stage_step", "cl_seed"]
    minus = plots_learning.differences(low, high.assign(learning_rate=0.006), ["k_cl"], match)
    assert minus.to_dict("records") == [dict(zip(match, (100, 30, 0), strict=True), k_cl=-1.0)]


def test_columns_are_stacked_under_their_names() -> None:
    table = runs({(100, 30, 0): -3.0})
    long = plots_learning.stacked(table, {"k_pt": "before", "k_cl": "after"}, "when")
    assert long[["when", "value"]].to_numpy().tolist() == [["before", -5.0], ["after", -3.0]]
    assert long["learning_rate"].tolist() == [0.001] * 2 and long["injected"].all()


def test_changes_are_between_the_stages_that_a_seed_has() -> None:
    table = runs(
        {
            **{(100, 15, 0): -5.0, (100, 30, 0): -4.0, (100, 60, 0): -2.0},
            **{(101, 30, 0): -3.0, (101, 60, 0): -4.0, (101, 60, 1): -5.0},
        }
    ).assign(text="domain")
    changes = plots_learning.first_to_last(table, "k_cl", ["text"])
    assert changes.set_index("seed")["change"].to_dict() == {100: 3.0, 101: -1.5}
    words = plots_learning.change_lines(changes, "text", {"domain": "PubMed"}, "nats", 2, 1)
    # half width: t(0.975, 1) = 12.706 times the standard error 2.25
    assert words == (
        "- PubMed: -4.00 → -3.25; falls in 1 of 2 seed(s), mean change +0.75 nats [-27.84, +29.34]"
    )


def test_a_difference_in_the_last_digit_of_a_table_is_no_fall() -> None:
    values = {(100, 30, 0): -0.1, (100, 60, 0): -0.1 - 3e-11, (101, 30, 0): 0.3, (101, 60, 0): 0.2}
    changes = plots_learning.first_to_last(runs(values).assign(all=0), "k_cl", ["all"])
    assert changes["change"].tolist() == [0, -0.1]
    assert "falls in 1 of 2" in plots_learning.change_lines(changes, "all", {0: "K"}, "nats", 1, 1)


def test_lines_leave_out_what_was_not_measured() -> None:
    changes = pd.DataFrame({"text": ["a"], "seed": 100, "first": 1.0, "last": 2.0, "change": 1.0})
    words = plots_learning.change_lines(changes, "text", {"b": "B", "a": "A"}, "nats", 1, 1)
    assert words == "- A: 1.0 → 2.0; falls in 0 of 1 seed(s), mean change +1.0 nats"


def test_rows_follow_an_order_and_stay_stable() -> None:
    table = pd.DataFrame({"rate": [0.001, 0.006, 0.001, 0.006], "row": [1, 2, 3, 4]})
    assert plots_learning.in_order(table, "rate", (0.006, 0.001))["row"].tolist() == [2, 4, 1, 3]


# --- learning curves ------------------------------------------------------------------------------


def curves() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two injections: K of *once* goes -5, -6 | -4, -4.5 | -4; *paraphrase* is 1 lower throughout.

    Levels lie 0.1 around their mean.
    """
    run = {"seed": 100, "learning_rate": 0.001, "cl_seed": 0, "injected": True, "stage_step": 30}
    points = [(5, "before", -6.0), (6, "after", -4.0), (11, "before", -4.5), (12, "after", -4.0)]
    rows = [
        {**run, "step": step, "phase": phase, "entry_set": entry_set, "level": level}
        | {"knowledge": value + shift + around}
        for entry_set, shift in (("once", 0.0), ("paraphrase", -1.0))
        for step, phase, value in points
        for level, around in (("memorisation", 0.1), ("semantic", 0.0), ("composition", -0.1))
    ]
    start = {**run, "k_once_pt": -5.0, "k_paraphrase_pt": -6.0}
    others = [{**start, "cl_seed": 1}, {**start, "injected": False}]  # without a curve
    return pd.DataFrame(rows), pd.DataFrame([start, *others])


def test_curves_start_at_k_before_and_weigh_the_sets_by_their_entries() -> None:
    lines = plots_learning.knowledge_along(*curves(), {"once": 3, "paraphrase": 1})
    by_set = {name: part.set_index("step") for name, part in lines.groupby("entry_set")}
    assert by_set["once"]["knowledge"].to_dict() == pytest.approx(
        {0: -5.0, 5: -6.0, 6: -4.0, 11: -4.5, 12: -4.0}
    )
    assert by_set["both"]["knowledge"].tolist() == pytest.approx(
        (by_set["once"]["knowledge"] - 0.25).tolist()
    )
    assert by_set["paraphrase"]["since_start"].tolist() == pytest.approx([0, -1, 1, 0.5, 1])
    assert by_set["once"]["phase"].tolist() == ["start", "before", "after", "before", "after"]
    assert set(lines["cl_seed"]) == {0} and lines["injected"].all()


def test_moves_add_up_to_the_gain_of_the_run() -> None:
    lines = plots_learning.knowledge_along(*curves(), {"once": 1, "paraphrase": 1})
    moves = plots_learning.knowledge_moves(lines.sample(frac=1, random_state=0))
    gain = moves[moves["entry_set"] == "once"].set_index("part")["gain"]
    opening, at, between = plots_learning.PARTS
    assert gain.to_dict() == pytest.approx({opening: -1.0, at: 2.5, between: -0.5})
    ends = lines[lines["step"] == 12].set_index("entry_set")["since_start"]
    sums = moves.groupby("entry_set")["gain"].sum()
    assert sums.to_dict() == pytest.approx(ends.to_dict())


def test_an_injection_right_after_another_has_nothing_in_between() -> None:
    table, continual = curves()
    # the second passages are read in the step after the first: one scoring serves both
    table = table[table["step"] != 11].replace({"step": {12: 7}})
    lines = plots_learning.knowledge_along(table, continual, {"once": 1, "paraphrase": 1})
    moves = plots_learning.knowledge_moves(lines)
    gain = moves[moves["entry_set"] == "once"].set_index("part")["gain"]
    opening, at, between = plots_learning.PARTS
    assert gain.to_dict() == pytest.approx({opening: -1.0, at: 2.0, between: 0.0})


def test_injections_in_every_step_leave_no_other_part() -> None:
    table, continual = curves()
    scored = table[table["phase"] != "before"].assign(step=lambda t: t["step"].rank(method="dense"))
    lines = plots_learning.knowledge_along(scored, continual, {"once": 1, "paraphrase": 1})
    moves = plots_learning.knowledge_moves(lines)
    assert set(moves["part"]) == set(plots_learning.PARTS)
    at = moves["part"] == plots_learning.PARTS[1]
    assert (moves.loc[~at, "gain"] == 0).all() and (moves.loc[at, "gain"] != 0).any()


def test_the_curve_shows_mean_seeds_and_injections(ax: Axes) -> None:
    table, continual = curves()
    tables = [t.assign(seed=s) for t in (table,) for s in (100, 101)]
    tables[1]["knowledge"] += 1
    both = pd.concat([continual, continual.assign(seed=101)])
    lines = plots_learning.knowledge_along(pd.concat(tables), both, {"once": 1, "paraphrase": 1})
    names = {"once": "once", "paraphrase": "control"}
    hollow = {"paraphrase": "once"}
    plots_learning.learning_curve(lines, ax, "knowledge", "entry_set", names, "K", hollow)
    drawn = {line.get_label(): line for line in ax.get_lines()}
    assert drawn["once"].get_xydata() == pytest.approx(
        np.array([[0, -5], [5, -5.5], [6, -3.5], [11, -4], [12, -3.5]])
    )
    assert drawn["once"].get_color() == drawn["control"].get_color() == plots.COLOURS[0]
    assert (drawn["once"].get_linestyle(), drawn["control"].get_linestyle()) == ("-", "--")
    assert sum(line.get_label() == "_seed" for line in ax.get_lines()) == 4
    vertical = [line.get_xdata()[0] for line in ax.get_lines() if len(set(line.get_xdata())) == 1]
    assert vertical == [6, 12]
    assert not ax.collections  # the bands of two seeds would cover the lines
    assert ax.get_ylim()[0] < -7 and ax.get_ylim()[1] > -3


def test_from_four_seeds_on_the_curve_has_a_band(ax: Axes) -> None:
    lines = pd.DataFrame({"seed": [1, 2, 3, 4], "step": 6, "phase": "after", "k": [0.0, 0, 0, 4]})
    plots_learning.learning_curve(lines.assign(run="once"), ax, "k", "run", NAMES, "K")
    (band,) = ax.collections
    # t(0.975, 3) = 3.182 times the standard error 1
    width = np.ptp(band.get_paths()[0].vertices, axis=0)[1]
    assert width == pytest.approx(2 * 3.182, abs=1e-2)
    assert ax.get_ylim()[1] > 1 + 3.182


# --- against the stage ----------------------------------------------------------------------------


def values(by_run: dict[tuple[str, int, int], list[float]]) -> pd.DataFrame:
    """Keys are entry set, seed and stage; a value for each CL seed."""
    rows = [(*key, value) for key, found in by_run.items() for value in found]
    return pd.DataFrame(rows, columns=["entry_set", "seed", "stage_step", "value"])


def containers(ax: Axes) -> dict[str, Any]:
    return {str(c.get_label()): c for c in ax.containers}


def test_means_seeds_and_intervals_by_stage(ax: Axes) -> None:
    table = values(
        {
            **{("once", 100, 30): [1.0, 2.0], ("once", 101, 30): [2.5]},
            **{("once", 100, 60): [3.0], ("once", 101, 60): [5.0]},
            ("paraphrase", 100, 60): [0.25],
        }
    )
    drawn = plots_learning.against_stage(
        table, ax, "value", "entry_set", NAMES, TICKS, "A (%)", 10, {"paraphrase": "once"}
    )
    assert drawn is ax
    found = containers(ax)
    assert found["once"].lines[0].get_ydata() == pytest.approx([20, 40])
    bars = [segment[:, 1] for segment in found["once"].lines[2][0].get_segments()]
    # t(0.975, 1) = 12.706 times the standard errors 0.5 and 1
    assert bars[0] == pytest.approx([20 - 63.53, 20 + 63.53], abs=0.01)
    assert bars[1] == pytest.approx([40 - 127.06, 40 + 127.06], abs=0.01)
    assert ax.get_ylim()[1] < 60  # wide bars are cut, seeds are not
    thin = [line for line in ax.get_lines() if line.get_label() == "_seed"]
    assert [list(line.get_ydata()) for line in thin] == [[15, 30], [25, 50]]
    mean = found["paraphrase"].lines[0]
    assert mean.get_xdata() == pytest.approx([1], abs=0.1) and mean.get_ydata() == [2.5]
    assert mean.get_markerfacecolor() == "white" and to_hex(mean.get_color()) == plots.COLOURS[0]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == list(TICKS.values())


def test_one_seed_has_no_interval_however_many_cl_seeds(ax: Axes) -> None:
    table = values({("once", 100, 30): [1.0, 2.0, 6.0], ("once", 100, 60): [4.0]})
    plots_learning.against_stage(table, ax, "value", "entry_set", NAMES, TICKS, "A")
    (once,) = ax.containers
    assert once.lines[0].get_ydata().tolist() == [3, 4]
    assert all(np.ptp(segment[:, 1]) == 0 for segment in once.lines[2][0].get_segments())
    assert not [line for line in ax.get_lines() if line.get_label() == "_seed"]


def test_zero_is_inside_the_limits_where_asked(ax: Axes) -> None:
    table = values({("once", 100, 30): [4.0], ("once", 100, 60): [5.0]})
    plots_learning.against_stage(table, ax, "value", "entry_set", NAMES, TICKS, "A")
    assert ax.get_ylim()[0] > 3
    plots_learning.against_stage(table, ax, "value", "entry_set", NAMES, TICKS, "A", zero=True)
    assert ax.get_ylim()[0] < 0


def test_with_enough_seeds_limits_hold_the_intervals(ax: Axes) -> None:
    table = values({("once", seed, 60): [float(seed == 104)] for seed in range(100, 105)})
    plots_learning.against_stage(table, ax, "value", "entry_set", NAMES, TICKS, "A", first=2)
    # t(0.975, 4) = 2.776 times the standard error 0.2
    assert ax.get_ylim()[0] < 0.2 - 0.555
    assert to_hex(containers(ax)["once"].lines[0].get_color()) == plots.COLOURS[2]


def test_intervals_of_a_fraction_end_where_it_does(ax: Axes) -> None:
    table = values({("once", seed, 60): [float(seed < 104)] for seed in range(100, 105)})
    table = table.assign(p_cl=table["value"])
    plots_learning.against_stage(table, ax, "p_cl", "entry_set", NAMES, TICKS, "P (%)", 100)
    (bar,) = (segment[:, 1] for segment in containers(ax)["once"].lines[2][0].get_segments())
    assert bar == pytest.approx([80 - 55.53, 100], abs=0.01)  # not 135.5
    assert ax.get_ylim()[1] < 110 and ax.get_ylabel() == "P (%), bars cut at 100"
    ax.clear()  # a difference of fractions goes beyond
    plots_learning.against_stage(table, ax, "p_cl", "entry_set", NAMES, TICKS, "P", zero=True)
    assert ax.get_ylim()[1] > 1.3 and ax.get_ylabel() == "P"


def test_two_of_many_seeds_have_no_bar(ax: Axes) -> None:
    table = values({("once", seed, step): [seed] for seed in range(4) for step in (30, 60)})
    table.loc[(table["seed"] > 1) & (table["stage_step"] == 30), "value"] = np.nan
    plots_learning.against_stage(table, ax, "value", "entry_set", NAMES, TICKS, "F")
    few, many = (np.ptp(s[:, 1]) for s in containers(ax)["once"].lines[2][0].get_segments())
    assert few == 0 and many > 4  # t(0.975, 3) = 3.18 times a standard error of 0.645


def test_values_that_are_not_defined_are_left_out(ax: Axes) -> None:
    table = values({("once", 100, 30): [np.nan], ("once", 100, 60): [0.5]})
    plots_learning.against_stage(table, ax, "value", "entry_set", NAMES, TICKS, "F")
    assert containers(ax)["once"].lines[0].get_xdata() == pytest.approx([1], abs=0.1)
    assert np.isfinite(ax.get_ylim()).all()


def test_panels_share_limits_and_one_legend() -> None:
    figure, axes = plots.panels(2)
    for ax, height in zip(axes[0], (1.0, 5.0), strict=True):
        table = values({("once", 100, 30): [0.0], ("once", 100, 60): [height]})
        plots_learning.against_stage(table, ax, "value", "entry_set", NAMES, TICKS, "A")
    wide = axes[0, 1].get_ylim()
    plots_learning.same_limits(axes[0])
    assert axes[0, 0].get_ylim() == pytest.approx((min(-0.08, wide[0]), wide[1]))
    plots_learning.legend_above(figure, *axes[0])
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["once"]
    assert legend.get_window_extent().y0 >= max(ax.get_window_extent().y1 for ax in axes[0])


def test_no_torch_is_imported() -> None:
    check = "import sys, kelib.plots_learning; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)

"""Arms of both tables with their originals, rows in words, and axes for many arms."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes

from kelib import intervention_effects as tables
from kelib import plots, plots_interventions
from kelib.errors import KelibError

HIGH, LOW = 0.006, 0.001
PRESERVING = "resuscitate_preserving p=0.5 q=1"

pytestmark = pytest.mark.usefixtures("canvas")


def runs(
    k: dict[int, float],
    arm: tuple[str, float, float] | None = None,
    rate: float = HIGH,
    step: int = 60,
) -> pd.DataFrame:
    """A run for each pretraining seed with its K after CL; A is K + 5, F and P follow from it."""
    name, ratio, factor = arm or ("none", np.nan, np.nan)
    table = pd.DataFrame({"seed": list(k), "k_cl": list(k.values())})
    table = table.assign(stage_step=step, learning_rate=rate, cl_seed=0, injected=True, chance=0.25)
    table = table.assign(intervention=name, ratio=ratio, factor=factor, variant="protocol")
    table = table.assign(
        acquisition=table["k_cl"] + 5, forgetting=0.5, p_cl=0.5 + table["k_cl"] / 10
    )
    if arm is not None:
        change = {"k": -0.25, "p": -0.125, "entropy": 2.0, "loss_general": 0.5}
        table = table.assign(
            acquisition_modified=table["acquisition"] + 1, forgetting_modified=0.25
        )
        table = table.assign(**{f"{n}_pt": 0.5 for n in change})
        table = table.assign(**{f"{n}_modified": 0.5 + v for n, v in change.items()})
    return table


ORIGINALS = runs({100: -4.0, 101: -3.0})
GRID = pd.concat([ORIGINALS, runs({100: -3.5, 101: -2.5}, ("resuscitate", 0.5, 1.0))])
ARMS = runs({100: -4.0, 101: -2.0}, ("resuscitate_preserving", 0.5, 1.0))
ARMS = ARMS.assign(variant=PRESERVING)


# --- tables ---------------------------------------------------------------------------------------


def test_runs_of_both_tables_have_the_label_of_their_arm() -> None:
    again = runs({100: -3.5}, ("resuscitate", 0.5, 1.0)).assign(variant="resuscitate p=0.5 q=1")
    changed = tables.changed_runs(GRID, pd.concat([again, ARMS]))
    assert changed["arm"].tolist() == ["resuscitate p=0.5 q=1"] * 2 + [PRESERVING] * 2
    assert changed["acquisition_modified"].notna().all()


def test_the_checkpoint_is_the_modified_model_of_an_original() -> None:
    alone = tables.with_baselines(ORIGINALS)
    assert alone["acquisition_modified"].tolist() == [1, 2]
    assert "acquisition_modified" not in ORIGINALS


def test_effects_are_pairs_with_the_original() -> None:
    elsewhere = ARMS.assign(stage_step=30)  # of which there is no original
    changed = tables.changed_runs(GRID, pd.concat([ARMS, elsewhere]))
    pairs = tables.effects(changed, ORIGINALS).set_index(["arm", "seed"])
    assert pairs["k_cl"].to_dict() == {
        ("resuscitate p=0.5 q=1", 100): 0.5,
        ("resuscitate p=0.5 q=1", 101): 0.5,
        (PRESERVING, 100): 0,
        (PRESERVING, 101): 1,
    }
    # its own baseline is one point of A above, that of the original is the checkpoint
    assert (pairs["acquisition_modified"] - pairs["acquisition"]).tolist() == [1] * 4
    assert (pairs["forgetting_modified"] == -0.25).all()


def test_the_next_lower_rate_is_the_control_that_changes_no_weight() -> None:
    slower = [runs({100: -5.0, 101: -4.5}, rate=LOW), runs({100: -9.0, 101: -9.0}, rate=LOW / 2)]
    control = tables.lower_rate_effect(pd.concat([ORIGINALS, *slower]), HIGH)
    assert control["k_cl"].tolist() == [-1, -1.5]
    assert set(control["arm"]) == {"lower CL rate 0.001"} and set(control["learning_rate"]) == {
        HIGH
    }
    with pytest.raises(KelibError, match=r"lowest CL rate is 0.006, .*lower one: add it"):
        tables.lower_rate_effect(ORIGINALS, HIGH)


def test_what_an_intervention_alone_does_is_the_modified_model_minus_the_checkpoint() -> None:
    alone = tables.before_training(ARMS)
    names = ["entropy_change", "loss_change", "k_change", "p_change"]
    assert alone[names].drop_duplicates().to_numpy().tolist() == [[2, 0.5, -0.25, -0.125]]


def test_rows_follow_the_groups_and_the_rate_comes_last() -> None:
    labels = ["lower CL rate 0.001", "redo tau=0.1", "scale_value p=0.5 q=1", PRESERVING]
    labels += ["shrink_and_perturb shrink=0.8 noise_std=0.01", "resuscitate p=0.9 q=1"]
    rows = tables.row_names([*labels, "resuscitate p=0.25 q=1", "redo tau=0.1"])
    assert list(rows.values()) == [
        "Algorithm 1, p = 0.25, q = 1",
        "Algorithm 1, p = 0.9, q = 1",
        "function-preserving, p = 0.5, q = 1",
        "V scaled, not K, p = 0.5, q = 1",
        "ReDo, tau = 0.1",
        "shrink and perturb, shrink = 0.8, noise = 0.01",
        "lower CL rate 0.001",
    ]
    groups = tables.row_groups(rows)
    assert list(dict.fromkeys(groups.values())) == [
        *(tables.ALGORITHM, tables.PRESERVING, tables.CONTROLS, tables.REMEDIES, tables.LOWER)
    ]
    with pytest.raises(KelibError, match=r"'prune p=0.5' has no row; known are .*redo"):
        tables.row_names(["prune p=0.5"])


def test_tables_of_effects_bracket_the_interval() -> None:
    table = pd.DataFrame({"arm": ["a", "a", "b", "b", "c"], "seed": [1, 2, 1, 2, 1]})
    table["k"] = [0.1, 0.3, 0.0, 0.0, np.nan]
    text = tables.effects_table(table, "arm", {"a": "A", "b": "B", "c": "C"}, {"k": ("K", 10, 1)})
    assert text[""].tolist() == ["A", "B", "C"] and text["n"].tolist() == [2, 2, 0]
    # 12.7 standard errors for two seeds; ties have none
    assert text["K"].tolist() == ["+2.0 [-10.7, +14.7]", "+0.0", tables.EMPTY]


def test_a_sweep_has_the_rates_of_all_its_arms() -> None:
    slow = [runs({100: -5.0, 101: -4.0}, rate=LOW), runs({100: -5.0, 101: -4.0}, rate=LOW / 2)]
    grid = pd.concat([GRID, runs({100: -4.5, 101: -3.5}, ("resuscitate", 0.5, 1.0), LOW)])
    changed = tables.changed_runs(grid, pd.concat([ARMS, ARMS.assign(stage_step=30)]))
    names = {"resuscitate p=0.5 q=1": "q = 1"}
    shown, pairs = tables.sweep(changed, pd.concat([ORIGINALS, *slow]), names)
    assert shown.groupby(["arm", "learning_rate"]).size().to_dict() == {
        **{("original", LOW): 2, ("original", HIGH): 2},
        **{("q = 1", LOW): 2, ("q = 1", HIGH): 2},
    }
    assert set(pairs["arm"]) == {"q = 1"} and (pairs["k_cl"] == 0.5).all()
    both, _ = tables.sweep(changed, pd.concat([ORIGINALS, *slow]), {**names, PRESERVING: "kept"})
    assert set(both["learning_rate"]) == {HIGH} and set(both["stage_step"]) == {60}
    with pytest.raises(KelibError, match=r"no CL rate has all of .*redo.*: run stage 4"):
        tables.sweep(changed, ORIGINALS, {**names, "redo tau=0.1": "ReDo"})


def small_sweep() -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    names = {"resuscitate p=0.5 q=1": "q = 1", PRESERVING: "kept"}
    shown, pairs = tables.sweep(tables.changed_runs(GRID, ARMS), ORIGINALS, names)
    return shown, pairs, ["original", *names.values()]


def test_tables_of_a_sweep_have_its_arms_in_order() -> None:
    shown, pairs, arms = small_sweep()
    alone = tables.alone_table(shown, arms)
    assert alone[""].tolist() == arms[1:] and alone["P"].tolist() == ["-12.5", "-12.5"]
    text, summaries = tables.outcomes_table(shown, arms, {HIGH: "CL rate 0.006"})
    assert text["arm"].tolist() == arms and text["acquisition (m)"].str[:6].tolist() == [
        *("150.00", "300.00", "300.00")
    ]
    assert list(summaries) == list(tables.COLUMNS)
    (found,) = tables.effects_by_rate(pairs, "arm", arms[1:], {HIGH: "high"}).items()
    assert found[0] == "high" and found[1]["K"].tolist()[0] == "+0.500"  # both seeds alike
    plotted = tables.plotted_sweep(summaries, pairs).set_index(["quantity", "arm"])["mean"]
    assert plotted["k_cl", "original"] == -3.5 and plotted["k_cl: arm - original", "q = 1"] == 0.5
    lines = tables.effect_lines(pairs, {"q = 1": "q one"})
    assert lines.startswith("- q one: K +0.500 nats, P +5.0")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda shown: shown[shown["arm"] != "kept"], r"the arms kept, original, q = 1:"),
        (lambda shown: shown[shown["seed"] > 100], r"the pretraining seeds 100, 101:"),
        (lambda shown: pd.concat([shown, shown]), r"each run once:"),
        (lambda shown: shown.assign(p_cl=1.5), r"P between 0 and 1:"),
        (lambda shown: shown.assign(k_cl=0), r"K below 0: run stage 4"),
        (lambda shown: shown.assign(learning_rate=LOW), r"the CL rates 0\.006:"),
        (lambda shown: shown.assign(cl_seed=range(6)), r"12 pairs for each arm"),
    ],
)
def test_a_sweep_with_a_hole_is_refused(change, message) -> None:
    shown, pairs, arms = small_sweep()
    tables.check_sweep(shown, pairs, arms, [HIGH], [100, 101])
    with pytest.raises(KelibError, match=f"the sweep must have {message}"):
        tables.check_sweep(change(shown), pairs, arms, [HIGH], [100, 101])


# --- axes -----------------------------------------------------------------------------------------

ROWS = {"a": "first", "b": "second", "c": "third"}
GROUPS = {"a": "one", "b": "one", "c": "other"}


def effects_of(values: dict[str, list[float]]) -> pd.DataFrame:
    return pd.DataFrame(
        [(arm, seed, value) for arm, of in values.items() for seed, value in enumerate(of)],
        columns=["arm", "seed", "k"],
    ).assign(p=lambda table: -table["k"])


def test_groups_are_apart_and_have_their_own_look() -> None:
    assert plots_interventions.heights(ROWS, GROUPS) == {"c": 0, "b": 1.6, "a": 2.6}
    looks = [plots_interventions.look(group, GROUPS) for group in ("one", "other")]
    assert [look["color"] for look in looks] == list(plots.COLOURS[:2])
    assert looks[0]["marker"] != looks[1]["marker"]


def test_a_forest_has_means_in_rows_from_the_top(ax: Axes) -> None:
    table = effects_of({"a": [0.1, 0.3], "b": [np.nan, np.nan], "c": [-1.0, -1.0]})
    drawn = plots_interventions.forest(table, ax, "k", "arm", ROWS, GROUPS, "K (nats)", 10)
    assert drawn is ax and ax.get_xlabel() == "K (nats)"
    means = {str(line.get_label()): line.get_xydata()[0] for line in ax.get_lines()}
    assert means["_a"] == pytest.approx([2, 2.6]) and means["_c"] == pytest.approx([-10, 0])
    assert [text.get_text() for text in ax.texts] == [tables.EMPTY]  # b
    assert [tick.get_text() for tick in ax.get_yticklabels()] == list(ROWS.values())
    low, high = ax.get_xlim()  # two seeds: their interval, 12.7 standard errors wide, is cut
    assert low < -10 and 3 < high < 6


def test_limits_hold_intervals_of_more_seeds(ax: Axes) -> None:
    table = effects_of({"a": [0.0, 1.0, 0.0, 1.0]})
    plots_interventions.forest(table, ax, "k", "arm", {"a": "first"}, GROUPS, "K")
    half = 3.1824 * np.sqrt(1 / 3) / 2
    assert ax.get_xlim()[0] < 0.5 - half and ax.get_xlim()[1] > 0.5 + half


def test_symlog_axes_have_a_tick_where_they_stop_to_be_linear(ax: Axes) -> None:
    table = effects_of({"a": [0.1, 0.3], "c": [-4.0, -4.0]})
    args = (table, ax, "k", "arm", {"a": "first", "c": "third"}, GROUPS, "K")
    plots_interventions.forest(*args, linear=0.05, band=True)
    assert ax.get_xscale() == "symlog" and {-0.05, 0, 0.05, 0.5} <= set(ax.get_xticks())
    low, high = ax.get_xlim()
    assert low < -4 and high > 0.3 and len(ax.patches) == 1


def test_a_plane_numbers_its_points_around_the_original(ax: Axes) -> None:
    table = effects_of({"a": [0.1, 0.3], "c": [-1.0, -3.0]})
    plots_interventions.plane(table, ax, ("k", "p"), "arm", GROUPS, ("K", "P"), (1, 10), (0.1, 1))
    points = {c.get_label(): c.lines[0].get_xydata()[0].tolist() for c in ax.containers}
    assert points["one"] == pytest.approx([0.2, -2]) and points["other"] == pytest.approx([-2, 20])
    # b has no value, and keeps its number
    assert [text.get_text() for text in ax.texts] == ["1", "3"]
    ring = [line for line in ax.get_lines() if line.get_label() == "_original"]
    assert ring[0].get_xydata().tolist() == [[0, 0]]
    assert ax.get_ylim()[1] > 20 and ax.get_xscale() == ax.get_yscale() == "symlog"


def test_names_of_points_do_not_cover_each_other(ax: Axes) -> None:
    points = {str(n): (0.5 + n / 1000, 0.5, "black") for n in range(9)}
    plots_interventions.name_points(ax, points)
    ax.figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in ax.texts]
    assert [text.get_text() for text in ax.texts] == list(points)
    centres = [((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2) for box in boxes]
    assert not any(
        abs(x - a) < 4 and abs(y - b) < 4
        for i, (x, y) in enumerate(centres)
        for a, b in centres[:i]
    )
    assert sum(text.arrow_patch is not None for text in ax.texts) >= 5  # those further off


def test_a_sweep_fills_eight_panels() -> None:
    shown, pairs, arms = small_sweep()
    _, axes = plots.panels(4, 2)
    rates = {HIGH: "CL rate 0.006"}
    plots_interventions.sweep_panels(list(axes.flat), shown, pairs, arms, rates)
    assert [ax.get_title()[:3] for ax in axes.flat] == [f"({letter})" for letter in "abcdefgh"]
    values = [ax.containers[0].lines[0].get_ydata().tolist() for ax in axes.flat]
    assert values[0] == pytest.approx([-3.5, -3, -3])
    assert values[4] == pytest.approx([0.5, 0.5])
    assert values[6] == pytest.approx([150, 300, 300])

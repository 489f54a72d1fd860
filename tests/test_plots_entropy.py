"""What is drawn and said are the numbers of the table, with pretraining seeds as the unit."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from kelib import plots, plots_entropy, trends

NAMES = {"absolute": "absolute", "relu": "ReLU"}


pytestmark = pytest.mark.usefixtures("canvas")


def lines_by_seed(values: dict[int, list[float]], steps: list[int], kind: str) -> pd.DataFrame:
    parts = [
        pd.DataFrame({"kind": kind, "seed": s, "step": steps, "nats": v}) for s, v in values.items()
    ]
    return pd.concat(parts, ignore_index=True)


def text_of(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


# --- tables and words -----------------------------------------------------------------------------


def test_changes_are_from_each_seeds_own_first_stage() -> None:
    table = lines_by_seed({100: [5.0, 4.0, 3.5], 101: [6.0, 5.5, 5.75]}, [10, 20, 40], "absolute")
    stages = {100: {"25%": 10, "100%": 40}, 101: {"50%": 20, "100%": 40}}
    changes = trends.stage_changes(table, "nats", ["kind"], stages)
    assert changes.set_index("seed")["change"].to_dict() == {100: -1.5, 101: 0.25}
    assert changes.set_index("seed")["first"].to_dict() == {100: 5.0, 101: 5.5}
    words = trends.change_words(changes, "nats")
    # half width: t(0.975, 1) = 12.706 times the standard error 0.875
    assert words == "falls in 1 of 2 seed(s), mean change -0.625 nats [-11.743, +10.493]"


def test_order_of_stages_does_not_matter() -> None:
    table = lines_by_seed({100: [5.0, 4.0]}, [10, 40], "absolute")
    changes = trends.stage_changes(table, "nats", ["kind"], {100: {"100%": 40, "25%": 10}})
    assert changes["change"].tolist() == [-1.0]


def test_one_seed_has_no_interval_in_words_or_tables() -> None:
    changes = pd.DataFrame({"kind": ["relu"], "seed": 100, "first": 2.0, "last": 1.5})
    changes["change"] = changes["last"] - changes["first"]
    words = trends.change_words(changes, "points", 1, 100)
    assert words == "falls in 1 of 1 seed(s), mean change -50.0 points"
    (row,) = trends.change_table(changes, "kind", {"relu": "ReLU"}, 1, 100).to_dict("records")
    assert (row["n"], row["first"], row["last"], row["change"]) == (1, 200, 150, -50)
    assert row["falls"] == "1 of 1" and "no interval" in row["95 % t"]
    assert "no interval" in trends.seeds_note(1)
    assert trends.interval_words(1) == "one pretraining seed"


def test_a_mean_in_words_brackets_its_interval() -> None:
    table = pd.DataFrame({"seed": [0, 1], "a": [0.01, 0.03]})
    # 12.7 standard errors for two seeds
    assert trends.mean_words(table, "a", 100, 1, "points") == "+2.0 points [-10.7, +14.7]"
    assert trends.mean_words(table, "a", 100, 1) == "+2.0 [-10.7, +14.7]"
    assert trends.mean_words(table.head(1), "a", unit="nats") == "+0.010 nats"
    assert trends.mean_words(table.assign(a=-0.0001), "a") == "+0.000"  # tied, and no -0
    row = {"mean": -0.001, "low": -0.25, "high": 0.25}
    assert trends.row_words(row, 1, 2) == "+0.00 [-0.25, +0.25]"


def test_table_of_changes_follows_the_names_and_counts_falls() -> None:
    changes = pd.DataFrame(
        {"kind": ["absolute"] * 3 + ["relu"] * 3, "seed": [100, 101, 102] * 2, "first": 1.0}
    )
    changes["change"] = [-1.0, -2.0, -3.0, 0.5, -0.5, 0.0]
    changes["last"] = changes["first"] + changes["change"]
    table = trends.change_table(changes, "kind", {"relu": "ReLU", "absolute": "abs"})
    assert table[""].tolist() == ["ReLU", "abs"]
    assert table["falls"].tolist() == ["1 of 3", "3 of 3"]  # unchanged is no fall
    # t(0.975, 2) = 4.303, standard error 1 / sqrt(3)
    assert table["95 % t"][1] == "[-4.484, +0.484]"


@pytest.mark.parametrize(("n", "cut"), [(2, True), (3, True), (4, False), (5, False)])
def test_note_says_n_and_when_bands_are_cut(n: int, cut: bool) -> None:
    note = trends.seeds_note(n)
    assert f"95 % t interval over n = {n} seeds" in note and ("cut" in note) is cut
    assert trends.interval_words(n) == f"95 % t interval over n = {n} pretraining seeds"


def test_seeds_without_stages_after_the_peak_are_counted() -> None:
    stages = {100: {"50%": 30, "100%": 60}, 101: {"50%": 30, "100%": 60}}
    assert trends.unfallen_words({100: 15, 101: 29}, stages) == ""
    words = trends.unfallen_words({100: 15, 101: 60}, stages)
    assert "1 of 2 seed(s)" in words and words.startswith(" ")


def test_marks_are_printed_by_seed() -> None:
    table = trends.marks_table({100: 15}, {100: {"50%": 30, "100%": 60}})
    assert table.to_dict("records") == [{"seed": 100, "peak": 15, "stages": "30 (50%), 60 (100%)"}]


def test_rank_correlations_by_seed_and_phase() -> None:
    h = [9.0, 5.0, 8.0, 7.0, 6.0]
    table = pd.DataFrame({"seed": 100, "step": [0, 1, 10, 20, 40], "entropy": h, "loss": h[::-1]})
    table = pd.concat([table, table.assign(seed=101, loss=table["entropy"] ** 2, flat=0.0)])
    table["flat"] = 1.0
    found = trends.rank_correlations(table, "entropy", ["loss", "flat"], {100: 10, 101: 20})
    by = found.set_index(["seed", "phase", "y"])["spearman"]
    assert by[100, "after", "loss"] == pytest.approx(-0.5)  # 8 7 6 against 8 5 9
    # entropy ranks 5 1 4 3 2, loss reversed: squared rank differences 9 + 4 + 0 + 4 + 9
    assert by[100, "all", "loss"] == pytest.approx(1 - 6 * 26 / (5 * 24))
    assert by[101, "all", "loss"] == pytest.approx(1)  # ranks see no square
    assert np.isnan(by[101, "after", "loss"])  # two checkpoints are too few
    assert np.isnan(by[100, "all", "flat"])
    assert found.set_index(["seed", "phase", "y"])["n"][100, "after", "loss"] == 3


def test_correlations_over_layers_are_means_over_checkpoints_from_the_peak_on() -> None:
    panel = pd.DataFrame({"seed": 100, "step": np.repeat([1, 10, 20], 3), "layer": [0, 1, 2] * 3})
    panel["entropy"] = [1.0, 2, 3] * 3
    panel["gini"] = [1.0, 2, 3, 3, 2, 1, 3, 1, 2]  # 1 before the peak, then -1 and -0.5
    (row,) = trends.layer_correlations(panel, "entropy", ["gini"], {100: 10}).to_dict("records")
    assert row["spearman"] == pytest.approx(-0.75)
    assert (row["seed"], row["phase"], row["y"], row["n"]) == (100, "layers", "gini", 3)
    two = panel[panel["layer"] < 2]
    found = trends.layer_correlations(two, "entropy", ["gini"], {100: 10})
    assert found["spearman"].isna().all() and len(found) == 1


# --- along pretraining ----------------------------------------------------------------------------


def test_mean_band_seeds_stages_and_peak_are_drawn(ax: Axes) -> None:
    steps = [0, 1, 10, 100]
    table = lines_by_seed({100: [8.0, 5.0, 7.0, 6.0], 101: [8.0, 6.0, 8.0, 5.0]}, steps, "absolute")
    stages = {seed: {"10%": 10, "100%": 100} for seed in (100, 101)}
    drawn = plots_entropy.along_pretraining(
        table, ax, "nats", "H (nats)", "kind", {"absolute": "H"}, {100: 10, 101: 10}, stages
    )
    assert drawn is ax
    (mean,) = [line for line in ax.get_lines() if line.get_label() == "H"]
    assert mean.get_xydata().tolist() == [[0, 8], [1, 5.5], [10, 7.5], [100, 5.5]]
    thin = [line for line in ax.get_lines() if line.get_label() == "_seed"]
    assert [line.get_ydata().tolist() for line in thin] == [[8, 5, 7, 6], [8, 6, 8, 5]]
    (marked,) = [line for line in ax.get_lines() if line.get_label() == "_stages"]
    assert marked.get_xydata().tolist() == [[10, 7.5], [100, 5.5]]
    assert text_of(ax) == ["peak 10"]  # one line needs no name
    band = ax.collections[0].get_paths()[0].vertices
    # at step 100: t(0.975, 1) = 12.706 times the standard error 0.5; a tie at 0 has no band
    assert band[:, 1].min() == pytest.approx(5.5 - 6.353, abs=1e-3)
    assert not (band[:, 0] == 0).any()
    assert ax.get_ylim()[0] > 4.5  # the wide band is cut
    assert ax.get_xscale() == "symlog" and ax.get_xlim()[0] > -1 and ax.get_xlim()[1] > 100


def test_with_enough_seeds_the_whole_band_is_shown(ax: Axes) -> None:
    values = {100 + i: [v, v] for i, v in enumerate([1.0, 1.0, 1.0, 1.0, 3.0])}
    table = lines_by_seed(values, [1, 10], "absolute")
    plots_entropy.along_pretraining(table, ax, "nats", "", "kind", {"absolute": "H"})
    low = trends.over_seeds(table, "nats", ["step"])["low"].min()
    assert low < 1 and ax.get_ylim()[0] < low


def test_several_lines_are_named_at_their_ends_in_their_colours(ax: Axes) -> None:
    one = lines_by_seed({100: [3.0, 2.0]}, [1, 10], "absolute")
    other = lines_by_seed({100: [3.0, 2.001]}, [1, 10], "relu")
    table = pd.concat([one, other])
    bound = (4.0, "bound: ln m")
    plots_entropy.along_pretraining(table, ax, "nats", "", "kind", NAMES, bound=bound, first=1)
    ends = {text.get_text(): text for text in ax.texts if text.get_text() in NAMES.values()}
    assert to_hex(ends["absolute"].get_color()) == plots.COLOURS[1]
    heights = [ends[name].get_position()[1] for name in ("absolute", "ReLU")]
    assert heights[1] - heights[0] == pytest.approx(0.085)  # pushed apart
    assert "bound: ln m" in text_of(ax) and ax.get_ylim()[1] > 4
    assert not [line for line in ax.get_lines() if line.get_label() == "_seed"]


def test_names_that_would_leave_the_axes_move_down_together(ax: Axes) -> None:
    ax.set_ylim(0, 1)
    plots_entropy.label_ends(ax, {"a": (0.99, "red"), "b": (1.0, "blue"), "c": (0.98, "black")})
    heights = {text.get_text(): text.get_position()[1] for text in ax.texts}
    assert heights["c"] < heights["a"] < heights["b"] == pytest.approx(1)
    assert heights["b"] - heights["a"] == pytest.approx(0.085)


def test_peaks_of_several_seeds_are_a_span(ax: Axes) -> None:
    plots_entropy.mark_peaks(ax, {100: 90, 101: 150, 102: 120}, "OLMo", row=1)
    (span,) = ax.patches
    assert (span.get_x(), span.get_x() + span.get_width()) == (90, 150)
    assert text_of(ax) == ["OLMo peaks 90 to 150"]


# --- stages, layers, samples, correlations --------------------------------------------------------


def test_changes_show_every_seed_their_mean_and_interval(ax: Axes) -> None:
    changes = pd.DataFrame(
        {"kind": ["absolute"] * 2 + ["relu"] * 2, "seed": [100, 101] * 2, "first": 0.0}
    )
    changes["change"] = changes["last"] = [-0.1, -0.3, 0.2, 0.2]
    plots_entropy.stage_change_dots(changes, ax, "kind", NAMES, "change (points)", 100)
    at: dict[float, list[Any]] = {}
    for line in ax.get_lines():
        at.setdefault(round(float(line.get_ydata()[0]), 2), []).append(list(line.get_xdata()))
    assert at[0.78] == [pytest.approx([-10, -30])] and at[-0.22] == [pytest.approx([20, 20])]
    interval, mean = at[1.0]
    assert interval == pytest.approx([-20 - 127.06, -20 + 127.06], abs=0.01)
    assert mean == pytest.approx([-20])
    # tied values have a mean without interval; the other line at 0 is the one of no change
    assert pytest.approx([20]) in at[0.0] and len(at[0.0]) == 2
    assert text_of(ax) == ["falls in\n2 of 2", "falls in\n0 of 2"]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["absolute", "ReLU"]


def test_layers_are_counted_from_one_and_later_stages_are_darker(ax: Axes) -> None:
    rows = [
        {"stage": stage, "seed": seed, "layer": layer, "value": base + layer + (seed - 100.5)}
        for stage, base in (("25%", 5.0), ("100%", 3.0))
        for seed in (100, 101)
        for layer in (0, 1)
    ]
    plots_entropy.layers_at_stages(pd.DataFrame(rows), ax, "H (nats)", 10)
    first, last = ax.containers
    assert [c.get_label() for c in ax.containers] == ["25%", "100%"]
    assert first.lines[0].get_ydata() == pytest.approx([50, 60])
    assert last.lines[0].get_xdata() == pytest.approx([1, 2], abs=0.1)
    low, high = last.lines[2][0].get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((30 - 63.53, 30 + 63.53), abs=0.01)
    shades = [mpl.colors.to_rgb(c.lines[0].get_color())[0] for c in ax.containers]
    assert shades[0] > shades[1] == 0


def test_sample_sizes_leave_out_what_has_no_logarithm(ax: Axes) -> None:
    table = pd.DataFrame({"stage": "100%", "seed": [100] * 3 + [101] * 3})
    table = table.assign(sequences=[32, 64, 128] * 2, bias=[0.4, 0.2, 0.0, 0.2, 0.1, 0.0])
    plots_entropy.sample_sizes(table, ax, "bias", "bias (nats)", 0.05, {64: "|D| = 64"})
    (mean,) = [line for line in ax.get_lines() if line.get_label() == "100%"]
    assert mean.get_xydata() == pytest.approx(np.array([[32, 0.3], [64, 0.15]]))
    assert ax.get_xscale() == ax.get_yscale() == "log"
    assert "|D| = 64" in text_of(ax)
    assert any(set(line.get_ydata()) == {0.05} for line in ax.get_lines())


def test_differences_between_stages_have_bars_but_for_the_whole_sample(ax: Axes) -> None:
    table = pd.DataFrame({"seed": 100, "sequences": [32, 64], "difference": [-1.0, -1.1]})
    plots_entropy.stage_differences(table.assign(deviation=[0.2, np.nan]), ax, "change (nats)")
    (drawn,) = ax.containers
    assert drawn.lines[0].get_xydata() == pytest.approx(np.array([[32, -1], [64, -1.1]]))
    bars = [segment[:, 1] for segment in drawn.lines[2][0].get_segments()]
    assert bars[0] == pytest.approx([-1.2, -0.8]) and np.ptp(bars[1]) == 0
    assert text_of(ax) == ["seed 100"]


def test_correlations_stand_in_the_order_of_the_names(ax: Axes) -> None:
    table = pd.DataFrame(
        {
            "seed": [100, 101, 100, 100],
            "phase": ["all", "all", "after", "layers"],
            "y": ["gini", "loss", "gini", "gini"],
            "spearman": [-0.9, 0.5, -1.0, -0.25],
        }
    )
    plots_entropy.correlation_dots(table, ax, {"gini": "Gini", "loss": "loss"})
    points = {line.get_label(): line.get_xydata() for line in ax.get_lines()}
    assert points["all checkpoints"][:, 0].tolist() == [-0.9, 0.5]
    assert points["all checkpoints"][:, 1].round().tolist() == [1, 0]
    assert points["from the peak on"].tolist() == [[-1, 1]]
    assert points["over layers"][0, 0] == -0.25
    assert [text.get_text() for text in ax.get_yticklabels()] == ["Gini", "loss"]


def test_panels_are_lettered_and_small_print_stands_below() -> None:
    figure, axes = plots.panels(2)
    plots_entropy.name_panels(axes[0], ["one", "two"])
    assert [ax.get_title() for ax in axes[0]] == ["(a) one", "(b) two"]
    plots_entropy.note_below(figure, "first line", "second line")
    figure.draw_without_rendering()
    (note,) = [text for text in figure.texts if "second line" in text.get_text()]
    below = min(ax.get_tightbbox().y0 for ax in axes[0])
    assert note.get_window_extent().y1 <= below

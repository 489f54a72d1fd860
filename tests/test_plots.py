"""What is drawn are the numbers of the table: they are read back from the axes."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.text import Annotation

from kelib import plots, plots_search

pytestmark = pytest.mark.usefixtures("canvas")


def lines_of(ax: Axes, label: str) -> list[Any]:
    return [line for line in ax.get_lines() if line.get_label() == label]


# --- summaries ------------------------------------------------------------------------------------


def test_cl_seeds_are_averaged_inside_a_pretraining_seed() -> None:
    """Pooled, the mean would be 3.2 and n 5."""
    table = pd.DataFrame({"seed": [100, 100, 101, 101, 101], "k": [1.0, 3.0, 2.0, 4.0, 6.0]})
    (row,) = plots.summarise(table.assign(arm="a"), "k", ["arm"]).to_dict("records")
    assert (row["arm"], row["n"], row["unit"]) == ("a", 2, "pretraining seeds")
    # values 2 and 4: standard error 1, t(0.975, 1) = 12.706
    assert row["mean"] == pytest.approx(3)
    assert (row["low"], row["high"]) == pytest.approx((3 - 12.7062, 3 + 12.7062), abs=1e-4)


def test_with_one_pretraining_seed_the_interval_is_over_cl_seeds() -> None:
    table = pd.DataFrame({"seed": 100, "arm": "a", "k": [1.0, 2.0, 3.0]})
    (row,) = plots.summarise(table, "k", ["arm"]).to_dict("records")
    half = 4.302653 / np.sqrt(3)  # t(0.975, 2) times the standard error
    assert (row["n"], row["unit"]) == (3, "CL seeds")
    assert (row["low"], row["mean"], row["high"]) == pytest.approx((2 - half, 2, 2 + half))


def test_a_group_with_one_value_has_no_bounds() -> None:
    table = pd.DataFrame({"seed": [100, 101, 100], "arm": list("aab"), "k": [1.0, 2.0, 5.0]})
    rows = plots.summarise(table, "k", ["arm"]).set_index("arm")
    assert rows["n"].tolist() == [2, 1] and rows.loc["b", "mean"] == 5
    assert rows.loc["b", ["low", "high"]].isna().all()
    assert set(rows["unit"]) == {"pretraining seeds"}  # one unit for the whole table


@pytest.mark.parametrize("seeds", [[100] * 5, [100, 101, 102, 100, 101]], ids=["one", "several"])
def test_undefined_values_are_dropped_and_counted(seeds: list[int]) -> None:
    table = pd.DataFrame(
        {"seed": seeds, "arm": list("aaabb"), "f": [0.2, np.nan, 0.4, *[np.nan] * 2]}
    )
    rows = plots.summarise(table, "f", ["arm"]).set_index("arm")
    assert rows["n"].tolist() == [2, 0]
    assert rows.loc["a", "mean"] == pytest.approx(0.3)
    assert rows.loc["b", ["mean", "low", "high"]].isna().all()


def test_groups_come_in_the_order_of_a_category_without_empty_ones() -> None:
    """The paper's rate is listed first, although another one is lower."""
    rates = pd.Categorical([1e-3, 6e-3, 1e-3, 6e-3], categories=[6e-3, 1e-3, 3e-4])
    table = pd.DataFrame({"seed": [100, 100, 101, 101], "learning_rate": rates})
    table = table.assign(stage_step=10, k=[1.0, 2.0, 3.0, 4.0])
    rows = plots.summarise(table, "k", ["learning_rate", "stage_step"])
    assert rows["learning_rate"].tolist() == [6e-3, 1e-3]
    assert rows["mean"].tolist() == [3, 2] and rows["stage_step"].tolist() == [10, 10]


# --- Fig. 2 ---------------------------------------------------------------------------------------


def test_entropy_curve(ax: Axes) -> None:
    steps, nats = [0, 1, 50, 100], {100: [8.0, 5.0, 7.0, 6.0], 101: [8.1, 5.1, 7.2, 6.9]}
    totals = pd.concat(
        pd.DataFrame({"seed": seed, "step": steps, "entropy_nats": line, "bound_nats": 8.3})
        for seed, line in nats.items()
    )
    assert plots.entropy_curve(totals, ax, 50, {"50%": 50, "100%": 100}) is ax
    for seed, line in nats.items():
        (drawn,) = lines_of(ax, f"seed {seed}")
        assert (drawn.get_xdata().tolist(), drawn.get_ydata().tolist()) == (steps, line)
    bound, peak = (line for line in ax.get_lines() if line.get_linestyle() in (":", "--"))
    assert set(bound.get_ydata()) == {8.3} and set(peak.get_xdata()) == {50}
    stages = [line.get_xydata()[0].tolist() for line in ax.get_lines() if line.get_marker() == "D"]
    assert stages == [[50, 7.0], [100, 6.0]]  # of the first seed
    assert [text.get_text() for text in ax.texts] == ["bound: layers x ln m", "peak, step 50"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["seed 100", "seed 101"]
    assert ax.get_xscale() == "symlog" and "nats" in ax.get_ylabel()


def test_one_seed_needs_no_legend(ax: Axes) -> None:
    totals = pd.DataFrame({"seed": 100, "step": [0, 10], "entropy_nats": [2.0, 1.0]})
    plots.entropy_curve(totals.assign(bound_nats=3.0), ax, 10, {})
    assert ax.get_legend() is None


def test_layer_changes_are_relative_to_the_peak(ax: Axes) -> None:
    table = pd.DataFrame({"step": [0, 50, 100] * 2, "layer": [0] * 3 + [1] * 3})
    table["entropy_nats"] = [1.0, 3.0, 2.5, 2.0, 4.0, 4.25]
    assert plots.layer_changes(table, ax, 50, 2_000_000) is ax
    drawn = {line.get_label(): line.get_xydata().tolist() for line in ax.get_lines()}
    assert drawn["layer 1"] == [[50, 0], [100, -0.5]]  # layers count from 1, as people do
    assert drawn["layer 2"] == [[50, 0], [100, 0.25]]
    assert drawn["sum"] == [[50, 0], [100, -0.25]]
    ax.figure.draw_without_rendering()
    (tokens,) = ax.child_axes
    assert tokens.get_xlim() == pytest.approx(2 * np.array(ax.get_xlim()))  # in millions
    assert "millions" in tokens.get_xlabel()


def test_a_peak_at_the_end_leaves_no_layer_to_draw(ax: Axes) -> None:
    table = pd.DataFrame({"step": [0, 50], "layer": 0, "entropy_nats": [1.0, 3.0]})
    plots.layer_changes(table, ax, 50, 2_000_000)
    assert [text.get_text() for text in ax.texts] == ["no step after the peak (50)"]
    assert not ax.get_lines() and not ax.child_axes


# --- Fig. 4 and 5 ---------------------------------------------------------------------------------


def test_one_legend_below_for_all_panels() -> None:
    figure, axes = plots.panels(2)
    for ax in axes[0]:
        for rate in (6e-3, 1e-3):
            ax.plot([0, 1], [rate, 1], label=f"CL rate {rate:g}")
    plots.legend_below(figure, axes[0, 0])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["CL rate 0.006", "CL rate 0.001"]
    figure.draw_without_rendering()
    below = min(ax.get_tightbbox().y0 for ax in axes[0])
    assert legend.get_window_extent().y1 <= below


# --- claims and regimes ---------------------------------------------------------------------------


def test_claims_point_to_the_right_when_the_paper_is_followed(ax: Axes) -> None:
    claims = pd.DataFrame(
        {
            "label": ["K falls", "F rises", "P rises"],
            "mean": [-0.1, -0.1, 0.02],
            "low95": [-0.2, -0.15, 0.01],
            "high95": [0.05, -0.05, 0.03],
            "smallest_effect": [0.05, 0.05, 0.01],
            "direction": [-1, 1, 1],
            "verdict": ["reproduced", "contradicted", "indicative"],
        },
        index=[7, 3, 9],  # a selection of a longer table
    )
    assert plots.claims_forest(claims, ax) is ax
    lines = [line for line in ax.get_lines() if len(line.get_xdata()) == 2][:3]
    points = [line for line in ax.get_lines() if line.get_marker() == "o"]
    assert [line.get_xdata() for line in lines] == [
        pytest.approx([-1, 4]),
        pytest.approx([-3, -1]),
        pytest.approx([1, 3]),
    ]
    assert [line.get_xdata()[0] for line in points] == pytest.approx([2, -2, 2])
    assert [line.get_ydata()[0] for line in points] == [2, 1, 0]  # the first on top
    heights = dict(zip(ax.get_yticks(), (t.get_text() for t in ax.get_yticklabels()), strict=True))
    assert heights == {2: "K falls", 1: "F rises", 0: "P rises"}
    labels = [text for text in ax.texts if isinstance(text, Annotation)]
    assert [(text.get_text(), text.xy[1]) for text in labels] == [
        ("reproduced", 2),
        ("contradicted", 1),
        ("indicative", 0),
    ]
    colours = [to_hex(line.get_color(), keep_alpha=False) for line in points[:2]]
    assert colours == [plots.VERDICT_COLOURS[v] for v in ("reproduced", "contradicted")]
    (band,) = ax.patches
    assert sorted({*band.get_corners()[:, 0]}) == [-1, 1]  # below the smallest effect


def test_intervals_in_words() -> None:
    assert plots.bounds(-0.425, 0.5, 2) == "[-0.42, +0.50]"
    assert plots.bounds(np.nan, np.nan, 2) == "(no interval: tied or single)"
    rows = [("a", 0.5, 0.4, 0.6), ("b", 1.0, np.nan, np.nan)]
    summary = pd.DataFrame(rows, columns=["arm", "mean", "low", "high"])
    text = plots.intervals_table({"p": summary}, ["arm"], {"p": 100})
    assert text.to_dict("list") == {"arm": ["a", "b"], "p": ["50.00 ± 10.00", "100.00"]}


def test_regimes(ax: Axes) -> None:
    rows = [
        ("gentle", 0, 0.0, -0.1, 0.25),
        ("gentle", 0, 1.0, -0.2, 0.3),
        ("strong", 0, 0.0, -0.1, 0.2),
        ("strong", 0, 1.0, -0.9, 0.8),
        ("strong", 1, 0.0, -0.1, 0.2),
        ("strong", 1, 1.0, -0.8, 0.9),
    ]
    table = pd.DataFrame(rows, columns=["regime", "seed", "share", "gap_nats", "p"])
    assert plots_search.regimes(table, ax, "strong") is ax
    drawn = [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in ax.get_lines()]
    assert drawn == [
        ([0, 100], [-0.1, -0.2]),
        ([0, 100], [-0.1, -0.9]),
        ([0, 100], [-0.1, -0.8]),
    ]
    widths = [line.get_linewidth() for line in ax.get_lines()]
    assert widths[1] == widths[2] > widths[0]  # the chosen one is thick
    assert ax.get_legend_handles_labels()[1] == ["gentle", "strong"]  # once, whatever the seeds

    other = plots.panels(1)[1][0, 0]
    assert plots_search.regimes_accuracy(table, other, "strong") is other
    chance, *lines = other.get_lines()
    assert set(chance.get_ydata()) == {25}
    assert [line.get_ydata().tolist() for line in lines] == [[25, 30], [20, 80], [20, 90]]


# --- style ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 2)])
def test_panels_are_always_an_array(shape: tuple[int, int]) -> None:
    figure, axes = plots.panels(shape[1], shape[0], width=2.0, height=1.5)
    assert axes.shape == shape
    assert figure.get_size_inches() == pytest.approx([2.0 * shape[1], 1.5 * shape[0]])
    assert mpl.rcParams["pdf.fonttype"] == 42


def test_series_differ_without_colour() -> None:
    assert len(set(plots.MARKERS)) == len(set(plots.COLOURS)) == len(plots.MARKERS) == 7

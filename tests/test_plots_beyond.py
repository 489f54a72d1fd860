"""Tables and panels of retention and woken memories, on small tables with known answers."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from kelib import plots_beyond, plots_curves
from kelib.errors import KelibError

ARMS = ("original", "q = 1")


@pytest.fixture
def table():
    """Two seeds, the original and q = 1: K and P before and after with sets at 0, two draws."""
    rows = []
    for seed in (0, 1):
        for name, factor in (("none", np.nan), ("resuscitate", 1.0)):
            run = [seed, 60, 1e-3, 0, name, 0.5, factor]
            for when, k in (("before", -4.0), ("after", -3.0)):
                scores = {"nothing": [k], "woken": [k - 0.5], "random": [k - 0.1, k - 0.3]}
                scores["others"] = [k - 1.0 - (when == "after")]
                for of, values in scores.items():
                    for draw, value in enumerate(values):
                        rows.append([*run, "k", when, of, -1, draw, value])
                        rows.append([*run, "p", when, of, -1, draw, 0.5 + value / 10])
            rows.append([*run, "update_share", "after", "all", -1, -1, 0.25 * (seed + 1)])
    columns = ["seed", "stage_step", "learning_rate", "cl_seed", "intervention", "ratio", "factor"]
    columns += ["measure", "when", "of", "layer", "draw", "value"]
    return pd.DataFrame(rows, columns=columns)


def test_arms_of_one_ratio(table):
    more = pd.concat([table, table.assign(ratio=0.25), table.assign(intervention="redo")])
    found = plots_beyond.of_arms(more, 0.5)
    assert len(found) == len(table) and set(found["arm"]) == set(ARMS)
    assert (found["factor"].isna() == (found["arm"] == "original")).all()
    plain = table.assign(ratio=table["ratio"].where(table["factor"].notna()))
    assert len(plots_beyond.of_arms(plain, 0.5)) == len(table)  # an original without a ratio


def test_measures_are_found_by_name(table):
    rows = plots_beyond.measure(table, "k", when="after", of="woken")
    assert rows["value"].tolist() == [-3.5] * 4
    with pytest.raises(KelibError, match=r"no rows with .*'entropy'.*measures of the table are k"):
        plots_beyond.measure(table, "entropy")


def test_what_zeroing_costs(table):
    costs = plots_beyond.zeroing(plots_beyond.of_arms(table, 0.5))
    assert len(costs) == 2 * 2 * 4
    means = costs.groupby("of")[["k_drop", "gain", "p_drop", "p_drop_after"]].mean()
    assert means.loc["nothing"].tolist() == [0, 1, 0, 0]
    assert np.allclose(means.loc["woken"], [0.5, 1, 0.05, 0.05])
    assert np.allclose(means.loc["random"], [0.2, 1, 0.02, 0.02])  # the mean of two draws
    assert np.allclose(means.loc["others"], [2, 0, 0.1, 0.2])


def test_a_level_is_in_view(table, ax):
    rows = plots_beyond.measure(plots_beyond.of_arms(table, 0.5), "update_share").assign(all=0)
    plots_curves.against_names(rows, ax, "value", "arm", ARMS, "all", {0: "update"}, "share")
    assert ax.get_ylim()[1] < 0.9
    plots_beyond.level(ax, 0.9, "even spread")
    low, high = ax.get_ylim()
    assert low < 0.25 and high > 0.9
    assert [text.get_text() for text in ax.texts] == ["even spread"]

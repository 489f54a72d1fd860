"""Arms are paired with what they are compared to, slopes are least squares, and drawn is what is in
the tables.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from kelib import plots_branches
from kelib.config import Optimizer, Pretraining
from kelib.errors import KelibError
from kelib.plots_branches import SAVED, TRUNK

PLAN = Pretraining(100, 4, 1e-2, Optimizer(1.0), (25, 50), (25, 50, 100))
RATE = 1e-3
BRANCHES = {  # name: start, end, weight decay, annealed
    "early": (25, 35, 1.0, True),
    "middle": (50, 60, 1.0, True),
    "both": (50, 60, 3.0, True),
    "light": (50, 100, 0.0, False),
    "short": (50, 80, 0.0, False),
}


def known_table(*names: str, seeds: tuple[int, ...] = (0, 1)) -> pd.DataFrame:
    rows = []
    for name in names:
        start, end, decay, annealed = BRANCHES[name]
        about = {"branch": name, "start_step": start, "end_step": end, "weight_decay": decay}
        for seed in seeds:
            for step, rate in ((start, 5e-3), (end, 1.1e-3)):
                row = {"seed": seed, "step": step, "learning_rate": rate, "annealed": annealed}
                rows.append({**about, **row, "entropy": float(seed + step)})
    return pd.DataFrame(rows)


def run(seed: int, step: int, k_cl: float, **more: object) -> dict[str, object]:
    row = {"seed": seed, "stage_step": step, "stage_label": f"{step}%", "learning_rate": RATE}
    row |= {"cl_seed": 0, "injected": True, "k_pt": -5.0, "k_cl": k_cl, "entropy_pt": 20.0 + step}
    return {**row, **more}


def learned_table(*names: str, seeds: tuple[int, ...] = (0, 1)) -> pd.DataFrame:
    rows = []
    for name in names:
        start, end, *_ = BRANCHES[name]
        rows += [run(seed, end, -3.0, branch=name, start_step=start) for seed in seeds]
    return pd.DataFrame(rows)


@pytest.fixture
def continual() -> pd.DataFrame:
    rows = [run(seed, step, -4.0) for seed in (0, 1) for step in (25, 50, 100)]
    rows.append(run(0, 50, -1.0, injected=False))
    rows.append(run(0, 50, -1.0, learning_rate=0.5))
    rows.append(run(0, 50, -1.0, cl_seed=3))
    return pd.DataFrame(rows)


# --- tables ---------------------------------------------------------------------------------------


def test_stages_stand_in_both_arms_and_the_last_one_is_the_same(continual):
    names = ("early", "middle", "both", "light")
    table = plots_branches.annealed_stages(
        learned_table(*names), known_table(*names), continual, PLAN
    )
    annealed = "annealed, 10 steps"
    found = table.groupby("arm", sort=False)["stage_step"].agg(lambda s: sorted(set(s)))
    assert found.to_dict() == {SAVED: [25, 50, 100], annealed: [25, 50, 100]}
    assert len(table) == 2 * 3 * 2
    of_arm = table[table["stage_step"] < 100].groupby("arm")[["k_gain", "rate_saved"]].mean()
    assert of_arm.loc[SAVED].tolist() == pytest.approx([1, 5e-3])
    assert of_arm.loc[annealed].tolist() == pytest.approx([2, 1.1e-3])
    last = table[table["stage_step"] == 100]
    assert set(last["k_gain"]) == {1.0} and last["rate_saved"].to_numpy() == pytest.approx(1e-3)


def test_a_stage_that_a_seed_lacks_is_left_out(continual):
    fewer = continual[(continual["seed"] == 0) | (continual["stage_step"] != 25)]
    names = ("early", "middle")
    table = plots_branches.annealed_stages(learned_table(*names), known_table(*names), fewer, PLAN)
    counts = table.groupby(["arm", "stage_step"])["seed"].nunique().unstack()
    assert counts.to_numpy().tolist() == [[1, 2, 2], [1, 2, 2]]


def test_annealed_branches_are_needed(continual):
    with pytest.raises(KelibError, match=r"no branch of .*light.* is annealed with the weight dec"):
        plots_branches.annealed_stages(
            learned_table("light"), known_table("light"), continual, PLAN
        )
    later = continual[continual["stage_step"] == 100]
    with pytest.raises(KelibError, match=r"no annealed branch begins at a stage .*branch.start"):
        plots_branches.annealed_stages(learned_table("early"), known_table("early"), later, PLAN)


def test_arms_of_weight_decay_end_where_pretraining_does(continual):
    names = ("light", "short", "middle")
    known, learned = known_table(*names), learned_table(*names)
    arms = plots_branches.decay_names(known, PLAN)
    assert arms == {
        "light": "weight decay 0 (from step 50)",
        TRUNK: "weight decay 1 (trunk)",
    }
    table = plots_branches.decay_arms(learned, known, continual, PLAN)
    assert len(table) == 4 and set(table["stage_step"]) == {100}
    assert table.groupby("arm")["k_gain"].mean().to_dict() == {"light": 2.0, TRUNK: 1.0}
    assert table.groupby("arm")["weight_decay"].first().to_dict() == {"light": 0.0, TRUNK: 1.0}
    trunk = pd.DataFrame([(0, 25, 1.0), (0, 50, 2.0), (0, 100, 3.0)],
                         columns=["seed", "step", "entropy"])  # fmt: skip
    along = plots_branches.along_decay(known, trunk, arms)
    assert along[along["arm"] == TRUNK]["entropy"].tolist() == [2.0, 3.0]
    assert sorted(along[along["arm"] == "light"]["step"].unique()) == [50, 100]


def test_branches_with_another_weight_decay_are_needed():
    with pytest.raises(KelibError, match=r"has another weight decay to the end of pretraining: ad"):
        plots_branches.decay_names(known_table("early", "short"), PLAN)


def test_slopes_are_those_of_least_squares():
    rows = [
        {"learning_rate": RATE, "seed": seed, "arm": arm, "entropy_pt": x, "k_gain": y}
        for seed, line in ((0, [(1, 1), (2, 4), (4, 5)]), (1, [(3, 1), (3, 2)]))
        for arm, (x, y) in zip("abc", line, strict=False)
    ]
    found = plots_branches.slopes(pd.DataFrame(rows), "k_gain").set_index("seed")
    assert found.loc[0, "slope"] == pytest.approx(np.polyfit([1, 2, 4], [1, 4, 5], 1)[0])
    assert np.isnan(found.loc[1, "slope"]) and found["n"].tolist() == [3, 2]
    over_stages = pd.DataFrame(rows).rename(columns={"arm": "stage_step"})
    assert plots_branches.slopes(over_stages, "k_gain")["slope"].iloc[0] == found.loc[0, "slope"]


def test_at_matched_loss_lies_on_the_line_between_two_stages():
    stages = pd.DataFrame(
        {
            "learning_rate": RATE,
            "seed": 0,
            "cl_seed": 0,
            "stage_step": [10, 20, 30],
            "loss_general_pt": [3.0, 2.0, 1.0],
            "k_gain": [0.5, 0.7, 1.5],
        }
    )
    arms = {"trunk": (1.0, 1.5), "between": (1.25, 1.0), "lower": (0.9, 1.0)}
    runs = pd.DataFrame(
        [
            {"learning_rate": RATE, "seed": 0, "arm": arm, "loss_general_pt": x, "k_gain": y}
            for arm, (x, y) in arms.items()
        ]
    )
    found = plots_branches.at_matched_loss(runs, stages, "k_gain").set_index("arm")["difference"]
    assert found["trunk"] == 0 and found["between"] == pytest.approx(
        1.0 - (0.75 * 1.5 + 0.25 * 0.7)
    )
    assert np.isnan(found["lower"])  # never reached by the trunk


def test_notes_name_bands_from_four_seeds_on():
    assert "n = 1" in plots_branches.decay_notes(1)[0]
    assert "Bands" not in plots_branches.decay_notes(3)[0]
    assert "n = 5 pretraining seeds" in plots_branches.decay_notes(5)[0]


# --- axes -----------------------------------------------------------------------------------------


def test_lines_are_the_means_of_the_arms(ax):
    rows = [(a, s, t, s + t) for a in ("x", "y") for s in (0, 2) for t in (1, 2)]
    table = pd.DataFrame(rows, columns=["arm", "seed", "step", "v"])
    plots_branches.along_arms(table, ax, "v", {"x": "X", "y": "Y"}, "v (%)", 10)
    named = {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}
    assert list(named) == ["X", "Y"] and named["X"].get_ydata().tolist() == [20, 30]
    assert ax.get_ylabel() == "v (%)" and len(ax.lines) == 6


def test_points_join_the_arms_of_a_seed(ax):
    rows = [("x", 0, 1.0, 5.0), ("y", 0, 3.0, 7.0), ("x", 1, 2.0, 6.0), ("y", 1, 4.0, np.nan)]
    table = pd.DataFrame(rows, columns=["arm", "seed", "entropy_pt", "v"])
    plots_branches.against_entropy(table, ax, "v", {"x": "X", "y": "Y"}, "v", 2)
    assert ax.lines[0].get_xydata().tolist() == [[1, 10], [3, 14]]
    named = {line.get_label(): line for line in ax.lines}
    assert named["X"].get_xydata().tolist() == [[1.5, 11]]  # the mean over seeds
    assert named["Y"].get_xydata().tolist() == [[3, 14]]  # NaN is left out


def test_rows_of_slopes(ax):
    table = pd.DataFrame({"seed": range(5), "slope": [1.0, 2, 3, -1, np.nan]})
    plots_branches.slope_dots({"one": table, "two": table.head(1)}, ax, "slope")
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["one", "two"]
    assert [text.get_text() for text in ax.texts] == ["above 0 in\n3 of 4", "above 0 in\n1 of 1"]


def test_many_slopes_have_their_names_inside_and_outliers_their_place(ax):
    table = pd.DataFrame({"seed": range(5), "slope": [0.1, 0.2, 0.3, -7, 0.5]})
    plots_branches.slope_dots({name: table for name in "abcde"}, ax, "slope", linear=1)
    assert [text.get_text() for text in ax.texts][-5:] == list("abcde")
    assert ax.get_xscale() == "symlog" and ax.get_xlim()[0] < -7
    assert ax.get_xticks().tolist() == [-5, -2, -1, 0, 1, 2, 5] and not ax.get_yticks().size

"""Correlations inside runs and at a fixed stage, and when there is nothing to be said."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from kelib import associations as a
from kelib.config import load_profile
from kelib.errors import KelibError
from kelib.training import learning_rate_at


def cells(seeds=6, stages=4, rng=None, **effects):
    """Outcomes driven by seed-level noise of entropy (``direct``) and by the stage alone."""
    rng = rng or np.random.default_rng(0)
    rows = []
    for seed in range(seeds):
        for stage in range(stages):
            own = rng.normal()
            loss = 3 - 0.3 * stage + effects.get("shared", 0.0) * own + 0.1 * rng.normal()
            row = {"seed": seed, "step": 100 * (stage + 1), "rate": 1.0 / (stage + 1)}
            row |= {"entropy": 24 - stage + 0.3 * own, "loss": loss}
            outcome = effects.get("direct", 0.0) * own - effects.get("by_stage", 0.0) * stage
            outcome += effects.get("by_loss", 0.0) * loss + 0.05 * rng.normal()
            rows.append(row | dict.fromkeys(a.OUTCOMES, outcome))
    return pd.DataFrame(rows)


def test_what_follows_the_stage_alone_is_seen_inside_runs_and_not_at_a_fixed_stage():
    table = cells(by_stage=1.0)
    inside = a.over_runs(a.within_runs(table)).set_index(["x", "y"])["r"]
    assert inside["entropy", "k_cl"] > 0.8 and inside["step", "k_cl"] < -0.95
    fixed = a.at_fixed_stage(table, "entropy", "k_cl")
    assert abs(fixed["r"]) < 0.5 and fixed["low"] < 0 < fixed["high"]


def test_what_follows_the_entropy_is_seen_at_a_fixed_stage():
    fixed = a.at_fixed_stage(cells(direct=1.0), "entropy", "k_cl")
    assert fixed["r"] > 0.95 and fixed["low"] > 0.8 and fixed["note"] == ""


def test_a_third_column_that_explains_both_is_taken_out():
    table = cells(shared=1.0, by_loss=1.0)
    assert a.at_fixed_stage(table, "entropy", "k_cl")["r"] > 0.9
    partial = a.at_fixed_stage(table, "entropy", "k_cl", ["loss"])
    assert abs(partial["r"]) < 0.6 and partial["given"] == "loss"
    # the same as residuals of ordinary least squares with a dummy for every stage
    dummies = pd.get_dummies(table["step"]).to_numpy(float)
    design = np.column_stack([dummies, table["loss"]])
    left = [
        table[name] - design @ np.linalg.lstsq(design, table[name], rcond=None)[0]
        for name in ("entropy", "k_cl")
    ]
    assert partial["r"] == pytest.approx(stats.pearsonr(*left).statistic)


@pytest.mark.parametrize("x", ["step", "rate"])
def test_step_and_rate_say_nothing_at_a_fixed_stage(x):
    found = a.at_fixed_stage(cells(direct=1.0), x, "k_cl")
    assert np.isnan(found["r"]) and found["note"] == "not identifiable"


def test_nothing_is_left_where_the_columns_held_fixed_explain_all():
    table = cells(direct=1.0).assign(twin=lambda t: 2 * t["entropy"] - 3)
    assert a.at_fixed_stage(table, "entropy", "k_cl", ["twin"])["note"] == "not identifiable"
    few = cells(seeds=2, stages=1)
    assert a.at_fixed_stage(few, "entropy", "k_cl")["note"] == "not identifiable"


def test_intervals_hold_as_often_as_they_say():
    rng, inside = np.random.default_rng(1), 0
    for _ in range(80):
        found = a.at_fixed_stage(cells(seeds=5, rng=rng), "entropy", "k_cl")
        inside += found["low"] < 0 < found["high"]
    assert 0.86 <= inside / 80 <= 1.0


def test_within_runs_leaves_out_what_is_not_defined_everywhere():
    table = cells()
    table.loc[0, "forgetting_over_chance"] = np.nan
    assert set(a.within_runs(table)["y"]) == {"acquisition", "k_cl", "p_cl"}
    with pytest.raises(KelibError, match="forgetting_over_chance"):
        a.at_fixed_stage(table, "entropy", "forgetting_over_chance")


def test_the_mean_over_runs_is_on_fishers_scale():
    within = pd.DataFrame(
        {"seed": [0, 1], "x": "entropy", "y": "k_cl", "n": 4, "pearson": [0.5, 0.9]}
    )
    found = a.over_runs(within).loc[0]
    assert found["r"] == pytest.approx(np.tanh(np.arctanh([0.5, 0.9]).mean()))
    assert found["low"] < 0 < found["r"] < found["high"] <= 1  # two seeds say little
    assert np.isnan(a.over_runs(within[:1]).loc[0, "low"])


def test_cells_average_cl_seeds_and_know_the_rate_of_the_checkpoint():
    plan = load_profile("study").pretraining
    runs = pd.DataFrame({
        "seed": 1, "stage_step": [750, 750, 3000], "learning_rate": 1e-3, "entropy_pt": 24.0,
        "loss_general_pt": 2.0, "acquisition": 0.1, "forgetting_over_chance": 0.2,
        "k_cl": [-4.0, -5.0, -6.0], "p_cl": 0.5,
    })  # fmt: skip
    found = a.stage_cells(runs, plan)
    assert found["k_cl"].tolist() == [-4.5, -6.0] and len(found) == 2
    for step, rate in zip(found["step"], found["rate"], strict=True):
        expected = learning_rate_at(step - 1, plan.steps, plan.learning_rate, plan.optimizer)
        assert rate == pytest.approx(expected, rel=1e-12)
    assert found["rate"].iloc[1] == pytest.approx(6e-4, rel=1e-3)
    with pytest.raises(KelibError, match="are mixed: take one"):
        a.stage_cells(runs.assign(learning_rate=[1e-3, 1e-3, 6e-3]), plan)


def test_whether_one_run_could_tell_is_counted():
    assert a.given_step_and_more(cells()).startswith("not identifiable: 4 stages, 3 columns")
    assert a.given_step_and_more(cells(stages=6)) == "identifiable"


def test_rates_without_torch_are_those_of_training():
    plan = load_profile("smoke").pretraining
    for step in range(plan.steps):
        expected = learning_rate_at(step, plan.steps, plan.learning_rate, plan.optimizer)
        assert plan.rate_at(step) == pytest.approx(expected, rel=1e-12)

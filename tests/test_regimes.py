"""Regimes of pretraining: what they share, what they change, and their tables."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file
from short import SHORT, do, measured_study

from kelib import stages
from kelib.checkpoints import step_folder
from kelib.config import load_profile
from kelib.errors import KelibError
from kelib.plots_regimes import (
    cooled_arms,
    matched_in_loss,
    regime_names,
    regime_slopes,
    with_gains,
)
from kelib.recipes import SAVED, TRUNK, Regime
from kelib.regimes import regime_grid, regime_places, regime_runs, regime_studies
from kelib.study import Study

SEED, STEPS = 100, 20
FREE, CONSTANT, COOLED = "no decay", "constant", "cooled down in 5 steps"
CHANGES = {
    "mechanism": None,
    "branches": None,
    "continual.learning_rates": [6.0e-3],
    "regimes": {
        "learning_rates": [6.0e-3],
        "regimes": [
            {"name": FREE, "weight_decay": 0.0},
            {"name": CONSTANT, "final_share": 1.0, "cooldown": 5},
        ],
    },
}


class Finished:
    """Stage 9 of one seed."""

    def __init__(self, data):
        self.study = measured_study(data, CHANGES).study
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Study, "run", lambda study, runs, title: do(runs))
            self.tables = stages.regimes(self.study)
        self.known = self.tables["regimes"]
        self.learned = self.tables["regime_learning"]
        self.studies = regime_studies(self.study)

    def losses(self, regime):
        return self.studies[regime].pretrain_run(SEED).read("losses.json")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return Finished(tmp_path_factory.mktemp("regimes"))


# --- what a regime is -----------------------------------------------------------------------------


def test_regimes_begin_with_the_same_weights_and_batch(finished):
    begin = [
        load_file(step_folder(of.pretrain_run(SEED).folder, 0) / "model.safetensors")
        for of in finished.studies.values()
    ]
    for other in begin[1:]:
        assert all(np.array_equal(begin[0][name], other[name]) for name in begin[0])
    trunk = finished.losses(TRUNK)
    for name in (FREE, CONSTANT):
        losses = finished.losses(name)
        assert len(losses) == STEPS and losses[0] == trunk[0] and losses[-1] != trunk[-1]


def test_the_trunk_is_pretraining_itself(finished):
    run = finished.studies[TRUNK].pretrain_run(SEED)
    assert run.digest == finished.study.pretrain_run(SEED).digest
    trunk = finished.known[finished.known["regime"] == TRUNK]
    checkpoints = stages.table(finished.study, "checkpoints")
    for name in ("step", "k", "p", "loss_general", "tokens"):
        assert trunk[name].to_numpy() == pytest.approx(checkpoints[name].to_numpy())
    entropy = stages.table(finished.study, "entropy").groupby("step")["entropy_nats"].sum()
    assert trunk["entropy"].to_numpy() == pytest.approx(entropy.to_numpy())


def test_a_constant_rate_is_constant_until_it_is_cooled_down(finished):
    rows = finished.known[finished.known["regime"] == CONSTANT]
    saved, cooled = (rows[(rows["arm"] == SAVED) == same] for same in (True, False))
    peak = finished.study.profile.pretraining.learning_rate
    assert saved["learning_rate"].to_numpy() == pytest.approx([peak] * len(saved))
    assert list(cooled["step"]) == [10, STEPS] and set(cooled["arm"]) == {COOLED}
    final = finished.study.profile.pretraining.optimizer.final_share * peak
    assert cooled["learning_rate"].between(final, 2 * final).all()  # its last step, one before that
    # up to its start it is the constant run: the cooled checkpoint is the sixth loss apart
    of = finished.studies[CONSTANT].profile.pretraining
    assert of.optimizer_states == (5, 15) and set(of.checkpoints) == {0, 1, 5, 10, 15, STEPS}


def test_continual_learning_begins_at_every_stage_with_and_without_passages(finished):
    places = [
        (p.regime, p.arm, p.step, run.settings["injected"])
        for p, run in regime_grid(finished.study)
    ]
    assert len(places) == len(set(places)) == 2 * 2 * 4  # injected x stages x lines
    assert len(finished.learned) == len(places)
    learned = finished.learned.set_index(["regime", "arm", "stage_step", "injected"])
    known = finished.known.set_index(["regime", "arm", "step"])
    for (regime, arm, step, _), row in learned.iterrows():
        start = known.loc[(regime, arm, step)]
        for name in ("k", "p", "entropy", "loss_domain"):
            assert row[f"{name}_pt"] == pytest.approx(start[name])
        assert row["k_cl_none"] == learned.loc[(regime, arm, step, False), "k_cl"]


def test_a_profile_without_the_section_has_no_such_runs(finished):
    profile = dataclasses.replace(finished.study.profile, regimes=None)
    without = Study(profile, finished.study.data)
    assert regime_runs(without) == []
    for call in (regime_studies, regime_places, regime_grid, stages.regimes):
        with pytest.raises(
            KelibError, match="profile 'smoke' has no section regimes: add it, with"
        ):
            call(without)


def test_controls_are_those_of_the_profile(finished):
    plan = dataclasses.replace(finished.study.profile.continual, control_seeds=())
    profile = dataclasses.replace(finished.study.profile, continual=plan)
    grid = regime_grid(Study(profile, finished.study.data))
    assert len(grid) == 8 and all(run.settings["injected"] for _, run in grid)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("learning_rates", [0.5], "regimes.learning_rates = (0.5,) must be rates of continual.lea"),
        ("regimes", [], "regimes.regimes = () must be a list of distinct values, not empty"),
        ("name", "trunk", "regime.name = 'trunk' must be a name, not 'trunk'"),
        ("name", "", "regime.name = '' must be a name"),
        ("weight_decay", 1.0, "regime.name = 'a' must be the name of something else than pretrain"),
        ("weight_decay", -1.0, "regime.weight_decay = -1.0 must be between 0 and inf"),
        ("learning_rate", -1.0, "regime.learning_rate = -1.0 must be above 0"),
        ("final_share", 2.0, "regime.final_share = 2.0 must be between 0 and 1"),
        ("cooldown", 0, "regime.cooldown = 0 must be at least 1"),
        ("cooldown", 10, "regime.cooldown = 10 must be at most 9, so that it begins after the wa"),
    ],
)  # fmt: skip
def test_impossible_regimes(key, value, message):
    one = {"name": "a", "weight_decay": 0.0}
    of_section = {"learning_rates": [6.0e-3], "regimes": [one]}
    (of_section if key in of_section else one)[key] = value
    with pytest.raises(KelibError, match=re.escape(message)):
        load_profile("smoke", {**SHORT, **CHANGES, "regimes": of_section})


def test_names_of_regimes_differ():
    two = [{"name": "a", "weight_decay": decay} for decay in (0.0, 3.0)]
    with pytest.raises(KelibError, match=r"regimes.regimes = \['a', 'a'\] must be a list of dis"):
        load_profile("smoke", {**SHORT, **CHANGES, "regimes.regimes": two})


def test_a_recipe_changes_what_it_names_alone():
    plan = load_profile("smoke", {**SHORT, **CHANGES}).pretraining
    found = Regime("a", learning_rate=1e-3).recipe(plan, [10, 20])
    assert found == dataclasses.replace(plan, learning_rate=1e-3)
    branch = Regime("a", final_share=1.0, cooldown=5).cooldown_to(20, plan)
    assert (branch.start, branch.steps, branch.annealed) == (0.75, 5, True)
    assert branch.final_share == plan.optimizer.final_share


# --- what is drawn --------------------------------------------------------------------------------


def planted():
    """Two seeds, two regimes and three stages in which the gain is 2 H + stage / 10, in nats."""
    rows = []
    for seed in (1, 2):
        for regime, lift in ((TRUNK, 0.0), (FREE, 0.5), (CONSTANT, 1.0)):
            for number, stage in enumerate((10, 20, 30)):
                entropy, loss = 20 + seed + lift - 0.1 * number, 2 - 0.2 * number
                gain = 2 * entropy + stage / 10
                row = {"regime": regime, "arm": SAVED, "seed": seed, "stage_step": stage}
                row |= {"stage_label": f"{stage}%", "learning_rate": 1e-3, "cl_seed": 0}
                row |= {"entropy_pt": entropy, "loss_general_pt": loss + lift / 10}
                row |= {"chance": 0.25, "p_pt": 0.35 + 0.1 * number, "forgetting_over_chance": 0.5}
                row |= {"k_pt": -5.0, "k_cl": gain - 5, "k_cl_none": -5.5, "injected": True}
                rows.append(row)
    cooled = [{**row, "arm": "cooled"} for row in rows if row["regime"] == CONSTANT]
    without = [{**row, "injected": False, "k_cl": -5.5} for row in rows]
    return pd.DataFrame([*rows, *cooled, *without])


def test_gains_are_those_of_injected_runs():
    runs = with_gains(planted())
    assert len(runs) == 24 and runs["injected"].all()
    assert (runs["k_injected"] - runs["k_gain"]).to_numpy() == pytest.approx(0.5)
    first = runs["stage_step"] == 10  # where next to nothing is known there is nothing to forget
    assert (runs["forgetting_over_chance"].isna() == first).all()


def test_slopes_over_stages_and_over_regimes():
    runs = with_gains(planted())
    names = {TRUNK: "weight decay 1", FREE: FREE}
    found = regime_slopes(runs, "k_gain", names)
    over_regimes = [f"regimes at {label}" for label in ("10%", "20%", "30%")]
    assert list(found) == ["stages: weight decay 1", f"stages: {FREE}", *over_regimes]
    # over stages the gain rises by 1 each while entropy falls by 0.1: 2 - 10
    for name, table in found.items():
        wanted = 2.0 if name in over_regimes else -8.0
        assert table["slope"].to_numpy() == pytest.approx(wanted), name
        assert list(table["seed"]) == [1, 2] and set(table["n"]) == {3}


def test_the_same_loss_is_found_between_stages_of_the_trunk():
    matched = matched_in_loss(with_gains(planted()), "k_gain").set_index(
        ["arm", "stage_label", "seed"]
    )
    # the loss of FREE lies a quarter of a stage above: the trunk there had 0.2 less of the gain
    assert matched.loc[(FREE, "30%", 1), "difference"] == pytest.approx(2 * 0.5 + 0.2)
    assert np.isnan(matched.loc[(FREE, "10%", 1), "difference"])  # above every loss of the trunk
    assert TRUNK not in matched.index.get_level_values("arm")


def test_cooled_lines_go_with_those_as_saved():
    names = {TRUNK: "weight decay 1", FREE: FREE, CONSTANT: CONSTANT}
    table, lines, saved_of = cooled_arms(planted(), names)
    assert lines == {
        f"{TRUNK}, {SAVED}": "weight decay 1",
        f"{CONSTANT}, {SAVED}": CONSTANT,
        f"{CONSTANT}, cooled": f"{CONSTANT}, cooled",
    }
    assert saved_of == {f"{CONSTANT}, cooled": f"{CONSTANT}, {SAVED}"}
    assert set(table["line"]) == set(lines)


def test_names_say_the_decay_of_the_trunk(finished):
    names = regime_names(finished.known, finished.study.profile.pretraining)
    assert names == {TRUNK: "weight decay 1 (trunk)", FREE: FREE, CONSTANT: CONSTANT}

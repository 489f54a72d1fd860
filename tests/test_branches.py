"""Branches of pretraining: what they share with the trunk, where they end, and their tables."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file
from short import SHORT, do, measured_study

from kelib import branches, stages
from kelib.beyond import branch_grid, branch_run, branch_runs, steps_of
from kelib.branches import branch_schedule
from kelib.checkpoints import load_checkpoint, read_note, step_folder
from kelib.config import Branch, Optimizer, Pretraining, load_profile
from kelib.errors import KelibError
from kelib.study import Study
from kelib.training import learning_rate_at

SEED, START, STEPS = 100, 10, 20
ANNEALED, NO_DECAY = "annealed", "no decay"
CHANGES = {
    "mechanism": None,
    "pretraining.checkpoints": [START, 15],
    "pretraining.optimizer_states": [START, STEPS],
    "continual.stages": [0.5, 0.75, 1.0],
    "continual.learning_rates": [6.0e-3],
    "branches.branches": [
        {"name": ANNEALED, "start": 0.5, "steps": 7, "annealed": True},
        {"name": NO_DECAY, "start": 0.5, "weight_decay": 0.0},
    ],
}
PLAN = Pretraining(100, 4, 6e-3, Optimizer(1.0), (50,), (50, 100))


class Finished:
    """Stages 1, 2 and 7 of one seed."""

    def __init__(self, data):
        self.study = measured_study(data, CHANGES).study
        self.runs = {branch.name: run for branch, run in branch_runs(self.study)}
        do([run for _, run in branch_grid(self.study)])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Study, "run", lambda study, runs, title: do(runs))
            self.tables = stages.branches(self.study)
        self.trunk = self.study.pretrain_run(SEED)

    def inputs(self):
        return {"corpus": self.study.corpus_run(SEED).folder, "pretrain": self.trunk.folder}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return Finished(tmp_path_factory.mktemp("branches"))


def weights(folder, step):
    return load_file(step_folder(folder, step) / "model.safetensors")


def same(first, second):
    return first.keys() == second.keys() and all(
        np.array_equal(first[name], second[name]) for name in first
    )


def nothing(share):
    """No progress is shown."""


# --- what a branch trains -----------------------------------------------------------------------


def test_with_the_decay_of_the_trunk_it_is_the_trunk(finished, tmp_path):
    settings = {**finished.runs[NO_DECAY].settings, "weight_decay": 1.0}
    branches.branch(settings, finished.inputs(), tmp_path, nothing)
    for step in (15, STEPS):
        assert same(weights(tmp_path, step), weights(finished.trunk.folder, step))
    losses = json.loads((tmp_path / "losses.json").read_text())
    assert losses == finished.trunk.read("losses.json")[START:]


def test_another_decay_reads_the_same_batches(finished):
    run = finished.runs[NO_DECAY]
    losses, trunk = run.read("losses.json"), finished.trunk.read("losses.json")[START:]
    assert len(losses) == STEPS - START and losses[0] == trunk[0] and losses[-1] != trunk[-1]
    size = {
        name: sum(float((w**2).sum()) for w in weights(folder, STEPS).values())
        for name, folder in (("branch", run.folder), ("trunk", finished.trunk.folder))
    }
    assert size["branch"] > size["trunk"]
    rates = {int(step): rate for step, rate in run.read()["rates"].items()}
    plan = finished.study.profile.pretraining
    assert rates == {
        step: learning_rate_at(step - 1, STEPS, plan.learning_rate, plan.optimizer)
        for step in (START, 15, STEPS)
    }


def test_an_annealed_branch_begins_with_the_moments_and_the_batch_of_the_trunk(finished):
    run = finished.runs[ANNEALED]
    losses, trunk = run.read("losses.json"), finished.trunk.read("losses.json")[START:]
    assert losses[:2] == trunk[:2]  # the first step has the same rate, and so the same effect
    assert losses[2] != trunk[2] and len(losses) == 7
    assert steps_of(run) == [15, 17]
    assert run.read()["train_loss"] == pytest.approx(np.mean(losses))


def test_a_checkpoint_says_where_it_comes_from(finished):
    run = finished.runs[ANNEALED]
    note = read_note(step_folder(run.folder, 17))
    assert note["parent"] == f"{finished.trunk.settings['digest']} step0000010"
    assert (note["step"], note["tokens"], note["seed"]) == (17, 17 * 16 * 64, SEED)
    load_checkpoint(step_folder(run.folder, 17), run.settings["digest"])
    assert not (run.folder / branches.STATE).exists()


@pytest.mark.parametrize("name", [ANNEALED, NO_DECAY])
@pytest.mark.parametrize("killed_at", [2, 6])  # before and after the first checkpoint
def test_a_run_that_was_killed_ends_with_the_same_weights(
    finished, tmp_path, monkeypatch, name, killed_at
):
    run, seen = finished.runs[name], []
    monkeypatch.setattr(branches, "STATE_EVERY", 1 if killed_at == 2 else 4)

    def kill(share):
        seen.append(share)
        if len(seen) == killed_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        branches.branch(run.settings, finished.inputs(), tmp_path, kill)
    assert (tmp_path / branches.STATE).exists()
    branches.branch(run.settings, finished.inputs(), tmp_path, seen.append)
    assert len(seen) < killed_at + len(run.read("losses.json"))  # it did not begin again
    for step in steps_of(run):
        assert same(weights(tmp_path, step), weights(run.folder, step))
    for file in ("losses.json", "result.json"):
        assert (tmp_path / file).read_text() == (run.folder / file).read_text()


# --- schedules ----------------------------------------------------------------------------------


def test_every_annealed_branch_ends_at_the_final_rate_of_the_trunk():
    for start in (20, 50, 90):
        found = branch_schedule(PLAN, start, start + 10, 1.0, annealed=True)
        trunk = learning_rate_at(start, PLAN.steps, PLAN.learning_rate, PLAN.optimizer)
        assert found.rate_of(start + 1) == trunk
        rates = [found.rate_of(step) for step in range(start + 1, start + 11)]
        assert all(np.diff(rates) < 0)
        low = PLAN.optimizer.final_share * PLAN.learning_rate
        assert learning_rate_at(10, 10, found.peak, found.optimizer) == pytest.approx(low)
        assert low < rates[-1] < low + 0.03 * (trunk - low)  # the last step, one before that
        assert found.optimizer.weight_decay == 1.0


def test_the_schedule_goes_on_as_the_trunk():
    found = branch_schedule(PLAN, 50, 80, 3.0, annealed=False)
    assert found.optimizer == dataclasses.replace(PLAN.optimizer, weight_decay=3.0)
    assert found.rate_of(51) == learning_rate_at(50, 100, 6e-3, PLAN.optimizer)


@pytest.mark.parametrize(
    ("start", "end", "message"),
    [
        (100, 110, "from step 100 to step 110 must lie within the 100 steps that pretraining has"),
        (50, 50, "from step 50 to step 50 must lie within the 100 steps"),
        (0, 10, "from step 0 to step 10 must lie within the 100 steps"),
    ],
)
def test_a_branch_needs_text(start, end, message):
    with pytest.raises(KelibError, match=message):
        branch_schedule(PLAN, start, end, 1.0, annealed=True)


def test_annealing_never_raises_the_rate():
    slow = dataclasses.replace(PLAN, optimizer=Optimizer(1.0, warmup_share=0.5, final_share=0.5))
    with pytest.raises(KelibError, match=r"at step 5 is 0.00072, it must be at least 0.003, where"):
        branch_schedule(slow, 5, 10, 1.0, annealed=True)


def test_moments_that_were_not_kept_are_named(finished, tmp_path):
    shutil.copytree(finished.trunk.folder, tmp_path / "trunk")
    (step_folder(tmp_path / "trunk", START) / branches.OPTIMIZER).unlink()
    inputs = {**finished.inputs(), "pretrain": tmp_path / "trunk"}
    message = r"has no optimizer.safetensors: a branch begins at one of .*add 10 to them"
    with pytest.raises(KelibError, match=message):
        branches.branch(finished.runs[ANNEALED].settings, inputs, tmp_path, nothing)
    other = {**finished.runs[ANNEALED].settings, "pretrain": "another"}
    with pytest.raises(KelibError, match="this run needs another"):
        branches.branch(other, finished.inputs(), tmp_path, nothing)


# --- the section of a profile -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("learning_rates", [0.5], "branches.learning_rates = (0.5,) must be rates of continual.le"),
        ("learning_rates", [], "branches.learning_rates = () must be a list of distinct values"),
        ("branches", [], "branches.branches = () must be a list of distinct values, not empty"),
        ("start", 0.0, "branch.start = 0.0 must be between 0 (exclusive) and 1"),
        ("start", 0.8, "branch.start = 0.8 must be within 0.02 of a step of pretraining.optimizer_"
         "states (10, 20), which is where 'a' can begin; add the step 16 to them"),
        ("start", 1.0, "branch.steps = 5 must be at least 1 and at most 0: 'a' leaves at step 20"),
        ("steps", 0, "branch.steps = 0 must be at least 1"),
        ("steps", 11, "branch.steps = 11 must be at least 1 and at most 10: 'a' leaves at step 10"),
        ("steps", None, "branch.steps = None must be a number of steps: 'a' is annealed"),
        ("weight_decay", -1.0, "branch.weight_decay = -1.0 must be between 0 and inf"),
        ("annealed", False, "branch.weight_decay = None must be another one than 1, or annealed"),
        ("name", "", "branch.name = '' must be a name"),
        ("begin", 1, "unknown key branches.branches[0].begin"),
    ],
)  # fmt: skip
def test_impossible_branches(key, value, message):
    one = {"name": "a", "start": 0.5, "steps": 5, "annealed": True}
    of_section = {"learning_rates": [6.0e-3], "branches": [one]}
    (of_section if key in of_section else one)[key] = value
    with pytest.raises(KelibError, match=re.escape(message)):
        load_profile("smoke", {**SHORT, **CHANGES, "branches": of_section})


def test_names_of_branches_differ():
    two = [{"name": "a", "start": 0.5, "weight_decay": decay} for decay in (0.0, 3.0)]
    with pytest.raises(KelibError, match=r"branches.branches = \['a', 'a'\] must be a list of dis"):
        load_profile("smoke", {**SHORT, **CHANGES, "branches.branches": two})


def test_a_branch_begins_at_the_nearest_step_that_kept_moments():
    plan = dataclasses.replace(PLAN, checkpoints=(49, 51, 80), optimizer_states=(49, 51, 80))
    assert Branch("a", 0.507, weight_decay=0.0).span(plan) == (51, 100)
    assert Branch("a", 0.49, steps=5, annealed=True).span(plan) == (49, 54)


# --- runs and tables ----------------------------------------------------------------------------


def test_a_name_and_other_sections_change_no_run(finished):
    run = finished.runs[ANNEALED]
    renamed = Branch("another name", 0.5, steps=7, annealed=True)
    assert branch_run(finished.study, SEED, renamed).digest == run.digest
    profile = dataclasses.replace(finished.study.profile, branches=None)
    without = Study(profile, finished.study.data)
    assert branch_runs(without) == [] == branch_grid(without)
    for made in ("pretrain_run", "corpus_run"):
        assert getattr(without, made)(SEED).digest == getattr(finished.study, made)(SEED).digest
    with pytest.raises(KelibError, match="profile 'smoke' has no section branches: add it, with"):
        stages.branches(without)


def test_continual_learning_begins_where_the_branch_ends(finished):
    for branch, run in branch_grid(finished.study):
        made = finished.runs[branch.name]
        assert run.inputs["pretrain"].digest == made.digest
        assert run.settings["step"] == steps_of(made)[-1]
        assert run.settings["pretrain"] == made.settings["digest"]
        assert run.settings["injected"] and not run.settings["keep"] and not run.settings["curve"]


def test_the_table_of_branches_follows_them_from_the_trunk(finished):
    table = finished.tables["branches"]
    found = {name: list(rows["step"]) for name, rows in table.groupby("branch", sort=False)}
    assert found == {ANNEALED: [10, 15, 17], NO_DECAY: [10, 15, 20]}
    first = table[table["step"] == START]
    trunk = stages.table(finished.study, "checkpoints").set_index("step").loc[START]
    for name in ("k", "p", "loss_general", "tokens", "tokens_per_parameter", "share"):
        assert first[name].to_numpy() == pytest.approx(trunk[name])
    panel = stages.table(finished.study, "panel").query("step == @START")
    assert first["value_norm"].to_numpy() == pytest.approx(panel["value_norm"].mean())
    last = table[table["step"] == table["end_step"]].set_index("branch")
    squares = [(weights(finished.runs[NO_DECAY].folder, STEPS)[f"model.layers.{layer}.mlp.up_proj."
                "weight"] ** 2).sum() for layer in (0, 1)]  # fmt: skip
    assert last.loc[NO_DECAY, "key_norm"] == pytest.approx(np.sqrt(squares).mean(), rel=1e-5)
    assert set(table.loc[table["branch"] == NO_DECAY, "weight_decay"]) == {0.0}
    assert set(table.loc[table["branch"] == ANNEALED, "weight_decay"]) == {1.0}
    assert list(table.groupby("branch", sort=False)["annealed"].first()) == [True, False]
    assert table.notna().all().all()


def test_entropy_by_layer_sums_to_that_of_the_table(finished):
    layers, table = finished.tables["branch_entropy"], finished.tables["branches"]
    assert set(layers["layer"]) == {0, 1}
    total = layers.groupby(["seed", "branch", "step"])["entropy_nats"].sum()
    assert total[[*zip(table["seed"], table["branch"], table["step"], strict=True)]].to_numpy() == (
        pytest.approx(table["entropy"])
    )
    assert (layers["entropy_nats"] < layers["bound_nats"]).all()


def test_the_table_of_continual_learning_has_a_row_for_every_end(finished):
    learned = finished.tables["branch_learning"].set_index("branch")
    known = finished.tables["branches"].set_index(["branch", "step"])
    assert sorted(learned.index) == [ANNEALED, NO_DECAY]
    for name, end in ((ANNEALED, 17), (NO_DECAY, STEPS)):
        row, start = learned.loc[name], known.loc[(name, end)]
        assert (row["stage_step"], row["start_step"], row["stage_label"]) == (end, START, "50%")
        for measure in ("k", "p", "entropy", "loss_domain"):
            assert row[f"{measure}_pt"] == pytest.approx(start[measure])
        assert row["k_gain_low"] <= row["k_cl"] - row["k_pt"] <= row["k_gain_high"]
    assert set(learned["variant"]) == {"protocol"} and learned["acquisition"].notna().all()

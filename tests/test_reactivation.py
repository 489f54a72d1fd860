"""Woken memories through continual learning: runs of a tiny study, and the measures by hand."""

from __future__ import annotations

import copy
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from short import do, inputs_of, rows_of

from kelib import jobs, reactivation, stages
from kelib.beyond import reactivation_runs
from kelib.errors import KelibError
from kelib.evaluation import evaluate
from kelib.ffn import feed_forwards
from kelib.interventions import resuscitation_multipliers
from kelib.measurement import EntropyMeasurement
from kelib.mechanism_inputs import load_weights
from kelib.panel import dormant_share
from kelib.reactivation import TOTAL, memory_sets, woken_memories, zeroed
from kelib.tables import read_provenance

SEED, LAST, MEMORIES, LAYERS = 100, 20, 64, 2
KEYS = ["seed", "stage_step", "stage_label", "learning_rate", "cl_seed", "intervention", "ratio"]


@pytest.fixture(scope="module")
def runs(short_study):
    found = reactivation_runs(short_study.study)
    do(found)
    return found


@pytest.fixture(scope="module")
def table(short_study, runs):
    return stages.reactivate(short_study.study)


def value_of(table, **wanted):
    (value,) = rows_of(table, **wanted)["value"]
    return value


# --- runs and table -----------------------------------------------------------------------------


def test_the_original_is_asked_about_every_ratio_a_resuscitation_about_its_own(short_study, runs):
    found = {
        json.dumps(r.settings["intervention"] and r.settings["intervention"]["ratio"]): r
        for r in runs
    }
    assert {name: run.settings["ratios"] for name, run in found.items()} == {
        "null": [0.25, 0.5], "0.25": [0.25], "0.5": [0.5],
    }  # fmt: skip
    for run in runs:
        learned = run.inputs["continual"]
        assert learned.settings["keep"] and learned.settings["step"] == LAST
        assert learned.settings["intervention"] == run.settings["intervention"]
        assert run.inputs["entropy"].digest == short_study.study.entropy_run(SEED, LAST).digest
        assert json.loads(json.dumps(dict(run.settings))) == dict(run.settings)


def test_a_profile_without_the_section_has_no_runs(short_study, monkeypatch):
    monkeypatch.setitem(vars(short_study.study.profile), "reactivation", None)
    assert reactivation_runs(short_study.study) == []
    with pytest.raises(KelibError, match=r"has no section reactivation: .* those of interventions"):
        stages.reactivate(short_study.study)


def test_a_run_that_kept_no_weights_is_named(runs, tmp_path):
    inputs = inputs_of(runs[0])
    shutil.copytree(inputs["continual"], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    inputs["continual"] = tmp_path / "run"
    with pytest.raises(KelibError, match=r"has no weights to look into .*continual.curve_seeds"):
        jobs.reactivation(runs[0].settings, inputs, tmp_path, lambda share: None)
    assert not list(tmp_path.glob("*.csv"))


def test_the_same_run_gives_the_same_table(runs, tmp_path):
    run, told = runs[1], []
    jobs.reactivation(run.settings, inputs_of(run), tmp_path, told.append)
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "reactivation.csv"), run.read_table("reactivation.csv"), rtol=1e-6
    )
    assert told == sorted(told) and told[0] > 0 and told[-1] < 1


def test_the_table_has_the_runs_first_and_provenance(short_study, runs, table):
    assert list(table.columns) == [*KEYS, "factor", *reactivation.COLUMNS]
    arms = table.groupby(["intervention", "ratio", "factor"], dropna=False).size()
    assert set(arms.index.droplevel("factor")) == {
        (name, ratio) for name in ("none", "resuscitate") for ratio in (0.25, 0.5)
    }
    assert table["value"].notna().all()
    note = read_provenance(short_study.study.measurements / "reactivation.csv")
    assert note["runs"] == len(runs) == 3 and set(note["inputs"]) == {"entropy"}


def test_shares_lie_where_they_can(table):
    shares = table[table["measure"].str.endswith("_share")]
    assert shares["value"].between(0, 1).all() and (shares["draw"] == -1).all()
    for ratio in (0.25, 0.5):
        woken = rows_of(table, measure="memory_share", ratio=ratio)
        assert np.allclose(woken["value"], ratio, atol=1 / MEMORIES)
        of_idx = rows_of(table, measure="activity_share", when="checkpoint", ratio=ratio)
        assert (of_idx["value"] < ratio).all()  # the least active ones
    assert set(shares["layer"]) == {TOTAL, *range(LAYERS)}


def test_an_original_is_the_checkpoint_and_a_resuscitation_wakes_its_memories(table):
    awake = rows_of(table, measure="activity_share", of="woken")
    wide = awake.pivot_table("value", ["intervention", "ratio", "layer"], "when")
    original, changed = (wide.loc[name] for name in ("none", "resuscitate"))
    assert np.allclose(original["checkpoint"], original["before"])
    assert np.allclose(original["checkpoint"], changed["checkpoint"])
    assert (changed["before"] > changed["checkpoint"] + 0.1).all()
    # in the first layer, whose input is the same, the multipliers act on coefficients exactly:
    # woken ones all have twice the mean of all before
    for ratio, mask in ((0.25, 16), (0.5, 32)):
        others = 1 - original.loc[(ratio, 0), "checkpoint"]
        woken = 2 * mask / MEMORIES
        assert changed.loc[(ratio, 0), "before"] == pytest.approx(woken / (woken + others), 1e-3)


def test_shares_of_the_update_are_those_of_the_weights(runs, table):
    run = next(r for r in runs if r.settings["intervention"] is None)
    inputs = inputs_of(run)
    before, _ = jobs._start(run.settings, inputs)
    after = load_weights(inputs["continual"])
    measured = EntropyMeasurement.load(inputs["entropy"] / "coefficients.safetensors")
    own = rows_of(table, intervention="none", ratio=0.25)
    squares = []
    pairs = zip(feed_forwards(before), feed_forwards(after), strict=True)
    for layer, (old, new) in enumerate(pairs):
        mask = woken_memories(measured.mean_coefficients[layer], 0.25)
        change = (new.values() - old.values()).detach().double().square().sum(dim=1).numpy()
        share = value_of(own, measure="update_share", of="V", layer=layer)
        assert share == pytest.approx(change[mask].sum() / change.sum(), rel=1e-5)
        squares.append(change.sum())
    assert value_of(own, measure="squared_change", of="V", layer=TOTAL) == pytest.approx(
        sum(squares), rel=1e-5
    )
    assert set(rows_of(own, measure="update_share")["of"]) == {"V", "up", "gate", "all"}


def test_zeroing_nothing_changes_nothing(runs, table):
    for run in runs:
        change = run.settings["intervention"]
        own = rows_of(table, intervention="none" if change is None else "resuscitate")
        own = own[own["ratio"].isin(run.settings["ratios"])]
        for name in ("k", "p", "loss_general"):
            values = rows_of(own, measure=name, when="after", of="nothing")["value"]
            assert np.allclose(values, run.inputs["continual"].read()[name], atol=1e-6)
    counts = rows_of(table, measure="zeroed")
    assert set(counts["of"]) == {"nothing", "woken", "random", "others"}
    for _, part in counts.groupby(["intervention", "ratio", "when"]):
        by_set = part.groupby("of")["value"].agg(["min", "max"])
        assert (by_set.loc["nothing"] == 0).all()
        assert (by_set.loc[["woken", "random", "others"]] == by_set.loc["woken", "min"]).all().all()


def test_sets_are_scored_at_both_times_and_every_draw(table):
    scores = rows_of(table, measure="p", intervention="resuscitate", ratio=0.25)
    found = sorted(scores[["when", "of", "draw"]].itertuples(index=False, name=None))
    sets = [("nothing", -1), ("woken", -1), *((n, d) for n in ("random", "others") for d in (0, 1))]
    assert found == sorted((when, *one) for when in ("before", "after") for one in sets)
    # half are woken: all others are one set
    halves = rows_of(table, measure="p", ratio=0.5, of="others", intervention="none")
    assert sorted(halves["draw"]) == [0, 0]


# --- measures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0, 0.1, 0.5, 1])
def test_woken_are_those_that_algorithm_1_multiplies(ratio):
    mean = np.random.default_rng(0).gamma(0.5, size=50)
    multiplied = resuscitation_multipliers(mean, ratio, np.pi) != 1  # no multiplier is 1 by chance
    assert (woken_memories(mean, ratio) == multiplied).all()


def test_impossible_ratios_and_coefficients_are_refused():
    with pytest.raises(KelibError, match=r"ratio p = 1.5 must lie between 0 and 1"):
        woken_memories(np.ones(3), 1.5)
    with pytest.raises(KelibError, match="mean coefficients must be finite and not negative"):
        woken_memories(np.array([1.0, -1.0]), 0.5)


def test_draws_are_as_many_repeatable_and_leave_out_the_woken():
    generator = np.random.default_rng(1)
    woken = [generator.random(40) < 0.3 for _ in range(3)]
    sets = memory_sets(woken, 4, seed=7)
    assert [(name, draw) for name, draw, _ in sets] == [
        ("nothing", -1), ("woken", -1), *(("random", d) for d in range(4)),
        *(("others", d) for d in range(4)),
    ]  # fmt: skip
    again, other = memory_sets(woken, 4, seed=7), memory_sets(woken, 4, seed=8)
    flat = [[np.concatenate(found[2]).tolist() for found in one] for one in (sets, again, other)]
    assert flat[0] == flat[1] != flat[2]
    assert len({tuple(one) for one in flat[0]}) == len(sets)
    for name, _, drawn in sets[1:]:
        for mask, indices in zip(woken, drawn, strict=True):
            assert len(indices) == len(set(indices.tolist())) == mask.sum()
            assert (
                mask[indices].all()
                if name == "woken"
                else name == "random" or (not mask[indices].any())
            )
    every = np.concatenate(
        [mask[d] for _, _, drawn in sets[2:6] for mask, d in zip(woken, drawn, strict=True)]
    )
    assert 0 < every.mean() < 0.6  # about a part p of the random ones


def test_few_others_are_all_taken_once():
    mask = np.array([True, True, True, False])
    sets = {name: drawn for name, _, drawn in memory_sets([mask], 5, seed=0)}
    assert sets["others"][0].tolist() == [3] and len(sets["random"][0]) == 3
    assert sum(name == "others" for name, _, _ in memory_sets([mask], 5, seed=0)) == 1


def test_activity_by_hand():
    means = [np.array([0.01, 0.01, 1.0, 2.98]), np.array([1.0, 1.0, 1.0, 1.0])]
    woken = [np.array([True, True, False, False]), np.array([True, False, False, False])]
    rows = reactivation.activity_rows({"after": means}, woken)
    found = {(measure, of, layer): value for measure, _, of, layer, _, value in rows}
    assert found["dormant_share", "all", 0] == dormant_share(means[0]) == 0.5
    assert found["dormant_share", "woken", 0] == 1 and found["dormant_share", "woken", 1] == 0
    assert found["dormant_share", "all", TOTAL] == 2 / 8
    assert found["dormant_share", "woken", TOTAL] == pytest.approx(2 / 3)
    assert found["activity_share", "woken", 0] == pytest.approx(0.02 / 4)
    assert found["activity_share", "woken", TOTAL] == pytest.approx(1.02 / 8)
    assert found["memory_share", "woken", TOTAL] == 3 / 8


def test_shares_of_woken_and_of_the_rest_sum_to_one():
    generator = np.random.default_rng(2)
    changes = [{"V": generator.random(10), "up": generator.random(10)} for _ in range(2)]
    woken = [generator.random(10) < 0.5 for _ in range(2)]
    both = [
        {row[2:4]: row[5] for row in reactivation.update_rows(changes, masks) if "share" in row[0]}
        for masks in (woken, [~mask for mask in woken])
    ]
    assert len(both[0]) == 3 * 3
    assert all(both[0][key] + both[1][key] == pytest.approx(1) for key in both[0])
    none = reactivation.update_rows([{"V": np.zeros(10)}], woken[:1])
    assert all(np.isnan(row[5]) for row in none if row[0] == "update_share")


def test_zeroed_rows_come_back(model_of, tokenizer, world, packed):
    model = copy.deepcopy(model_of("olmo"))
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    memories = [np.array([0, 5]), np.array([47])]
    with pytest.raises(RuntimeError, match="in the middle"), zeroed(model, memories):
        values = [ffn.values() for ffn in feed_forwards(model)]
        assert (values[0][[0, 5]] == 0).all() and (values[1][47] == 0).all()
        assert (values[0][1] != 0).any()
        raise RuntimeError("in the middle")
    assert all(torch.equal(w, before[name]) for name, w in model.named_parameters())
    plain = evaluate(model, tokenizer, world, packed).summary()
    with zeroed(model, [np.empty(0, dtype=np.int64)] * 2):
        assert evaluate(model, tokenizer, world, packed).summary() == plain
    with zeroed(model, [np.arange(48)] * 2):
        assert evaluate(model, tokenizer, world, packed).summary() != plain


def test_memories_that_a_model_does_not_have_are_refused(model_of):
    short, long = [np.array([0])], [np.array([0]), np.array([0, 48])]
    with pytest.raises(KelibError, match="1 sets of memories for 2 layers; give one each"):
        zeroed(model_of("olmo"), short).__enter__()
    with pytest.raises(KelibError, match="layer 1 has memories 0 to 47, not all of 0 to 48"):
        zeroed(model_of("olmo"), long).__enter__()

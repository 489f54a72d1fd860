"""Training on other text after continual learning: runs of a tiny study, and the ratio R."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from short import do, inputs_of

from kelib import jobs, retention, stages
from kelib.beyond import retention_runs
from kelib.beyond_tables import retention as retained
from kelib.beyond_tables import retention_table
from kelib.corpus import load_corpus
from kelib.errors import KelibError
from kelib.mechanism_inputs import load_weights
from kelib.tables import read_provenance

SEED, LAST = 100, 20
RATES = (6e-3, 1e-3)


@pytest.fixture(scope="module")
def runs(short_study):
    found = retention_runs(short_study.study, short_study.entropy)
    do(found)
    return found


@pytest.fixture
def table(short_study, runs):
    return stages.retain(short_study.study)


def same_weights(one, two):
    return all((a == b).all() for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_a_run_for_every_stage_and_resuscitation_that_was_continued(short_study, runs):
    found = [
        (r.settings["step"], r.settings["learning_rate"],
         (r.inputs["continual"].settings["intervention"] or {}).get("ratio"))
        for r in runs
    ]  # fmt: skip
    stages_of = [(step, rate, None) for step in (10, LAST) for rate in RATES]
    # resuscitation is continued at the first rate alone
    assert set(found) == {*stages_of, (LAST, RATES[0], 0.25), (LAST, RATES[0], 0.5)}
    assert len(found) == len(set(found))
    for run in runs:
        learned = run.inputs["continual"]
        assert learned.settings["keep"] and learned.settings["injected"]
        for name in ("seed", "step", "learning_rate", "cl_seed", "continual", "corpus", "training"):
            assert learned.settings[name] == run.settings[name]
        assert run.settings["text"] == "unread" != learned.settings["text"]
        assert json.loads(json.dumps(dict(run.settings))) == dict(run.settings)


def test_a_profile_without_the_section_has_no_runs(short_study, monkeypatch):
    study = short_study.study
    learned = study.continual_run(SEED, LAST, RATES[0], 0).digest
    monkeypatch.setitem(vars(study.profile), "retention", None)
    assert retention_runs(study, short_study.entropy) == []
    with pytest.raises(KelibError, match="profile 'smoke' has no section retention: add it, with"):
        stages.retain(study)
    assert study.continual_run(SEED, LAST, RATES[0], 0).digest == learned  # not concerned


def test_the_same_run_gives_the_same_result(runs, tmp_path):
    run, told = runs[0], []
    jobs.later(run.settings, inputs_of(run), tmp_path, told.append)
    assert json.loads((tmp_path / "result.json").read_text()) == run.read()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"result.json", "probes.csv", "questions.csv"}
    assert told == sorted(told) and told[0] > 0 and told[-1] <= 0.9


def test_other_sequences_are_read_than_before_and_no_passages(runs, monkeypatch, tmp_path):
    run, seen = runs[0], []
    packed = load_corpus(run.inputs["corpus"].folder)
    trainer = retention.Trainer

    def watched(model, batch_at, *rest, **options):
        seen.extend(batch_at(step) for step in range(10))
        return trainer(model, batch_at, *rest, **options)

    monkeypatch.setattr(retention, "Trainer", watched)
    retention.go_on(run.settings, inputs_of(run), packed, tmp_path, lambda share: None)
    rows = {row.tobytes() for batch in seen for row in batch}
    assert len(rows) == 160 and rows <= {row.tobytes() for row in packed.blocks["unread"]}
    mine, before = (
        retention.reading_order(len(packed.blocks["unread"]), 160, 1, seed)
        for seed in (retention.ORDER, 0)
    )
    assert (mine != before).any()


def test_a_killed_run_goes_on(runs, monkeypatch, tmp_path):
    run = runs[0]
    packed = load_corpus(run.inputs["corpus"].folder)
    plan = {**run.settings["continual"], "save_every": 4}
    settings = {**run.settings, "continual": plan}

    def dying(share):
        if share > 0.6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        retention.go_on(settings, inputs_of(run), packed, tmp_path, dying)
    assert (tmp_path / retention.STATE).exists()
    told = []
    model, _, losses = retention.go_on(settings, inputs_of(run), packed, tmp_path, told.append)
    assert told[0] == pytest.approx(0.9 * 5 / 10)
    assert losses == run.read()["losses"] and not (tmp_path / retention.STATE).exists()
    assert not same_weights(model, load_weights(run.inputs["continual"].folder))


def test_all_is_left_where_nothing_was_trained(short_study, runs, tmp_path, monkeypatch):
    run = runs[0]
    jobs.later({**run.settings, "learning_rate": 0.0}, inputs_of(run), tmp_path, lambda share: None)
    later = json.loads((tmp_path / "result.json").read_text())
    learned, checkpoint = run.inputs["continual"].read(), short_study.study.evaluate_run(SEED, 10)
    assert {name: later[name] for name in ("k", "p")} == {n: learned[n] for n in ("k", "p")}
    found = retained(checkpoint.read()["k"], learned["k"], later["k"], smallest=0)
    assert learned["k"] > checkpoint.read()["k"] and found == 1


def test_a_run_that_kept_no_weights_is_named(runs, tmp_path):
    inputs = inputs_of(runs[0])
    shutil.copytree(inputs["continual"], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    inputs["continual"] = tmp_path / "run"
    with pytest.raises(KelibError, match=r"has no weights to look into .*continual.curve_seeds"):
        jobs.later(runs[0].settings, inputs, tmp_path, lambda share: None)
    assert not (tmp_path / "result.json").exists()


def test_the_table_stands_on_the_three_moments(short_study, runs, table):
    assert len(table) == len(runs) == 6
    assert set(table["stage_label"]) == {"50%", "100%"} and set(table["learning_rate"]) == {*RATES}
    assert table["intervention"].value_counts().to_dict() == {"none": 4, "resuscitate": 2}
    assert (table["factor"].notna() == (table["intervention"] == "resuscitate")).all()
    for name in ("k", "p", "loss_general", "loss_domain", "entropy", "k_once"):
        assert table[[f"{name}_{when}" for when in ("pt", "cl", "later")]].notna().all().all()
    assert np.allclose(table["gained"], table["left"] + table["lost"])
    big = table["gained"] > 0.05
    assert (table["retention"].notna() == big).all()
    assert np.allclose(table["retention"][big], (table["left"] / table["gained"])[big])
    # the checkpoint as pretrained is the start of all that begins at its stage
    last = table[table["stage_step"] == LAST]
    assert last["k_pt"].nunique() == 1 and last["k_cl"].nunique() == 4
    row = table[(table["stage_step"] == 10) & (table["learning_rate"] == RATES[0])].iloc[0]
    evaluated = short_study.study.evaluate_run(SEED, 10).read()
    assert row["k_pt"] == pytest.approx(evaluated["k"])
    note = read_provenance(short_study.study.measurements / "retention.csv")
    assert note["runs"] == 6 and set(note["inputs"]) == {"entropy", "checkpoints"}


def test_the_table_does_not_depend_on_the_order_of_runs(short_study, runs):
    tables = [short_study.entropy, stages.table(short_study.study, "checkpoints")]
    one, two = (
        retention_table(short_study.study, order, tables[1], tables[0])
        for order in (runs, runs[::-1])
    )
    assert one.equals(two)


def test_retention_and_where_it_is_undefined():
    assert retained(-3.0, -2.0, [-2.0, -2.5, -3.0, -1.5, -3.5]).tolist() == [1, 0.5, 0, 1.5, -0.5]
    assert np.isnan(retained(-3.0, -2.96, -2.96)) and np.isnan(retained(-3.0, -4.0, -3.5))
    assert retained(-3.0, -2.96, -2.98, smallest=0.01) == pytest.approx(0.5)
    with pytest.raises(KelibError, match="K holds NaN or infinity: repair or remove those runs"):
        retained(-3.0, np.nan, -2.0)
    with pytest.raises(KelibError, match=r"smallest = -1 must be at least 0 nats, as 0.05"):
        retained(-3.0, -2.0, -2.0, smallest=-1)

"""The mechanism run of a tiny finished study: its tables against the models they are about."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pandas as pd
import pytest
from short import SHORT, do, measured_study, rows_of

from kelib import jobs, mechanism, mechanism_inputs, stages
from kelib.attribution import measure_gradients
from kelib.beyond import mechanism_runs
from kelib.checkpoints import load_checkpoint, step_folder
from kelib.config import load_profile
from kelib.corpus import load_corpus
from kelib.decomposition import row_changes
from kelib.errors import KelibError
from kelib.evaluation import heldout_loss
from kelib.study import Study
from kelib.tables import read_provenance
from kelib.world import build_world

SEED, STEPS, MEMORIES, LAYERS = 100, 20, 64, 2
CHANGES = {
    "pretraining.optimizer_states": [STEPS],  # those of the other stage are not kept
    "continual.control_seeds": [],
    "mechanism.learning_rates": [6.0e-3, 1.0e-3],
    "branches": None,
}
KEYS = ["seed", "stage_step", "stage_label", "learning_rate"]
PLACES = [(SEED, step, label, rate) for step, label in ((10, "50%"), (20, "100%"))
          for rate in (6e-3, 1e-3)]  # fmt: skip
BATCHES, PARTS, SHARES = ("domain", "passages", "mixed"), ("V", "up", "gate"), (0.01, 0.05, 0.1)
GROUPS = ("gate", "up", "V", "attention", "embedding", "all")


class Finished:
    """Stages 1, 2 and 6 of one seed, and what stage 6 needs of stage 3."""

    def __init__(self, data):
        made = measured_study(data, CHANGES)
        self.study, self.entropy = made.study, made.entropy
        self.runs = mechanism_runs(self.study, self.entropy)
        do(self.runs)
        self.tables = stages.mechanism(self.study)

    def run_of(self, step, rate=6e-3):
        wanted = {"step": step, "learning_rate": rate}
        return next(run for run in self.runs if wanted.items() <= run.settings.items())

    def model(self, step):
        return load_checkpoint(step_folder(self.study.pretrain_run(SEED).folder, step))[0]

    def after(self, step):
        return mechanism_inputs.load_weights(self.run_of(step).inputs["continual"].folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return Finished(tmp_path_factory.mktemp("mechanism"))


# --- runs ---------------------------------------------------------------------------------------


def test_a_run_for_every_seed_stage_and_rate(finished):
    found = [(r.settings["step"], r.settings["learning_rate"]) for r in finished.runs]
    assert sorted(found) == sorted((step, rate) for _, step, _, rate in PLACES)
    for run in finished.runs:
        learned = run.inputs["continual"]
        assert set(run.inputs) == {"corpus", "pretrain", "continual"}
        assert learned.settings["keep"] and learned.settings["injected"]
        same = ("seed", "step", "learning_rate", "cl_seed", "continual", "corpus", "training")
        assert all(learned.settings[name] == run.settings[name] for name in same)
        assert learned.digest in {
            r.digest for _, r in finished.study.continual_grid(finished.entropy)
        }
    assert jobs.OPTIMIZER == mechanism.OPTIMIZER


def test_a_profile_without_the_section_has_no_runs(finished, tmp_path):
    other = Study(load_profile("smoke", {**SHORT, **CHANGES, "mechanism": None}), tmp_path)
    assert mechanism_runs(other, finished.entropy) == []
    with pytest.raises(KelibError, match="profile 'smoke' has no section mechanism: add it, with"):
        stages.mechanism(other)
    same = [study.continual_run(SEED, 10, 6e-3, 0).digest for study in (finished.study, other)]
    assert same[0] == same[1]  # the section concerns no other run


def test_a_run_that_kept_no_weights_is_named(finished, tmp_path):
    run = finished.run_of(10)
    inputs = {name: made.folder for name, made in run.inputs.items()}
    shutil.copytree(inputs["continual"], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    with pytest.raises(KelibError, match=r"has no weights to look into .*continual.curve_seeds"):
        mechanism.mechanism(
            run.settings, {**inputs, "continual": tmp_path / "run"}, tmp_path, lambda share: None
        )
    assert not list(tmp_path.glob("*.csv"))


def test_broken_moments_are_named(finished, tmp_path):
    run = finished.run_of(STEPS)
    inputs = {name: made.folder for name, made in run.inputs.items()}
    shutil.copytree(inputs["pretrain"], tmp_path / "pretrain")
    kept = step_folder(tmp_path / "pretrain", STEPS) / mechanism.OPTIMIZER
    kept.write_bytes(b"nothing")
    with pytest.raises(KelibError, match=r"optimizer.safetensors is not a state of this run"):
        mechanism.mechanism(
            run.settings, {**inputs, "pretrain": tmp_path / "pretrain"}, tmp_path, lambda s: None
        )


def test_the_same_run_gives_the_same_tables(finished, tmp_path):
    run = finished.run_of(STEPS)
    told = []
    inputs = {name: made.folder for name, made in run.inputs.items()}
    mechanism.mechanism(run.settings, inputs, tmp_path, told.append)
    for name in stages.MECHANISM:
        again, before = (pd.read_csv(f / f"{name}.csv") for f in (tmp_path, run.folder))
        pd.testing.assert_frame_equal(again, before, rtol=1e-6, atol=1e-9)
    assert told == sorted(told) and told[0] > 0 and told[-1] < 1


# --- tables -------------------------------------------------------------------------------------


def test_every_table_has_its_keys_first_and_provenance(finished):
    assert tuple(finished.tables) == stages.MECHANISM
    for name, table in finished.tables.items():
        assert list(table.columns[:4]) == KEYS
        assert sorted(set(table[KEYS].itertuples(index=False, name=None))) == sorted(PLACES)
        assert table.groupby(KEYS).size().nunique() == 1 or name in ("shares", "steps")
        note = read_provenance(finished.study.measurements / f"{name}.csv")
        assert note["runs"] == len(PLACES) and set(note["inputs"]) == {"entropy"}
        assert note["parameters"]["mechanism"] == {"learning_rates": [6e-3, 1e-3]}


def test_gradients_are_those_of_the_checkpoint(finished):
    table = finished.tables["gradients"]
    assert list(table.columns[4:]) == [
        *("batch", "layer", "memories", "slope", "intercept", "left_out", "spearman", "coherence"),
        *("coefficient_entropy", "gradient_entropy", "attribution_entropy", "bound"),
    ]
    assert len(table) == len(PLACES) * 3 * LAYERS and set(table["batch"]) == set(BATCHES)
    assert (table["memories"] == MEMORIES).all()
    assert table["spearman"].between(-1, 1).all() and table["coherence"].between(0, 1).all()
    for name in ("coefficient", "gradient", "attribution"):
        assert (table[f"{name}_entropy"] <= table["bound"]).all()
    wide = table.pivot(index=["stage_step", "batch", "layer"], columns="learning_rate")
    assert np.allclose(wide["slope"][6e-3], wide["slope"][1e-3])  # no rate plays a part
    blocks = load_corpus(finished.study.corpus_run(SEED).folder).blocks["domain"]
    order = mechanism_inputs.reading_order(len(blocks), 10 * 16, 1, 0)[:64]
    ids = np.asarray(blocks[order], dtype=np.int64)
    found = mechanism.layer_table(measure_gradients(finished.model(10), ids))
    rows = rows_of(table, stage_step=10, learning_rate=6e-3, batch="domain")
    assert np.allclose(rows["slope"], found["slope"], rtol=1e-4)


def test_shares_lie_where_they_can(finished):
    table = finished.tables["shares"]
    updates = ["gradient", "first_step", "warm_step", "whole_run"]
    for step, wanted in ((10, updates), (STEPS, [*updates, "own_moments"])):
        rows = rows_of(table, stage_step=step, learning_rate=1e-3)
        assert set(rows["quantity"]) == set(wanted)
        assert len(rows) == 3 * len(wanted) * len(PARTS) * 2 * len(SHARES)
    assert table["value"].between(0, 1).all() and (table["total"] > 0).all()
    keys = [*KEYS, "batch", "quantity", "part", "ranked_by"]
    wide = table.pivot(index=keys, columns="share", values="value")
    assert (wide[0.01] <= wide[0.05]).all() and (wide[0.05] <= wide[0.1]).all()
    best = rows_of(table, quantity="gradient", part="V").set_index([*KEYS, "batch", "share"])
    by_gradient = best[best["ranked_by"] == "gradient"]["value"]
    assert (by_gradient >= best[best["ranked_by"] == "coefficient"]["value"] - 1e-12).all()
    first = rows_of(table, quantity="first_step", part="V")
    assert np.allclose(first["value"], first["share"], rtol=0.1)  # a sign is as large everywhere
    assert (rows_of(table, quantity="gradient", part="V", ranked_by="gradient")["value"] > 0).all()
    run = finished.run_of(STEPS, 1e-3)
    rows = rows_of(run.read_table("shares.csv"), batch="mixed", quantity="whole_run", part="V")
    rows = rows_of(rows, ranked_by="coefficient", share=0.1)
    place = dict(zip(KEYS, PLACES[-1], strict=True))
    found = rows_of(table, **place, batch="mixed", quantity="whole_run", part="V")
    found = rows_of(found, ranked_by="coefficient", share=0.1)
    assert len(rows) == LAYERS and found["value"].item() == pytest.approx(rows["value"].mean())


def test_the_whole_run_is_the_change_of_the_weights(finished):
    changes = row_changes(finished.model(10), finished.after(10))
    rows = rows_of(
        finished.tables["shares"], stage_step=10, learning_rate=6e-3, quantity="whole_run",
        ranked_by="coefficient", share=0.1, batch="mixed",
    )  # fmt: skip
    for row in rows.itertuples():
        of_layers = [float((changes[layer][row.part] ** 2).sum()) for layer in range(LAYERS)]
        assert row.total == pytest.approx(sum(of_layers))


def test_first_steps_have_no_decay_in_them(finished):
    rows = rows_of(
        finished.tables["shares"], stage_step=10, quantity="first_step", part="V", share=0.1,
        batch="domain", ranked_by="coefficient",
    )  # fmt: skip
    by_rate = rows.set_index("learning_rate")["total"]
    assert by_rate[6e-3] == pytest.approx(36 * by_rate[1e-3], rel=0.01)
    most = LAYERS * 32 * MEMORIES * 6e-3**2  # every entry of V by the rate
    assert 0.5 * most < by_rate[6e-3] <= most * 1.001


def test_carriers_are_means_over_probes(finished):
    table = finished.tables["carriers"]
    assert list(table.columns[4:]) == [
        *("when", "entry_set", "level", "layer", "fraction", "carriers", "carrier_share"),
    ]
    assert len(table) == len(PLACES) * 2 * 2 * 3 * LAYERS * 2
    assert table["carriers"].between(1, MEMORIES).all()
    assert np.allclose(table["carrier_share"], table["carriers"] / MEMORIES)
    keys = [*KEYS, *("when", "entry_set", "level", "layer")]
    wide = table.pivot(index=keys, columns="fraction", values="carriers")
    assert (wide[0.5] <= wide[0.9]).all()
    before = rows_of(table, when="before").pivot(
        index=["stage_step", "entry_set", "level", "layer", "fraction"],
        columns="learning_rate", values="carriers",
    )  # fmt: skip
    assert (before[6e-3] == before[1e-3]).all()  # and after it depends on the rate
    after = rows_of(table, when="after", stage_step=10).pivot(
        index=["entry_set", "level", "layer", "fraction"],
        columns="learning_rate", values="carriers",
    )  # fmt: skip
    assert (after[6e-3] != after[1e-3]).any()
    world = build_world(finished.study.profile.corpus.world, SEED)
    keys, requests = mechanism.probes_of(world)
    assert list(keys.columns) == ["entry_set", "level"] and len(keys) == len(requests) == 8 * 15
    assert keys["entry_set"].tolist() == ["once"] * 60 + ["paraphrase"] * 60


def test_overlaps_and_what_chance_gives(finished):
    table = finished.tables["overlap"]
    assert list(table.columns[4:]) == [
        *("which", "layer", "cosine", "top", "jaccard", "jaccard_by_chance"),
    ]
    names = {"old, overwritten", "new, overwritten", "new, before and after"}
    assert set(table["which"]) == names and len(table) == len(PLACES) * len(names) * LAYERS
    assert table["cosine"].between(0, 1).all() and table["jaccard"].between(0, 1).all()
    assert (table["top"] == 6).all() and table["jaccard_by_chance"].between(0, 0.1).all()
    same = rows_of(table, which="new, before and after")
    assert (same["jaccard"] > same["jaccard_by_chance"]).all()  # little is learnt in ten steps


def test_noise_and_steps_against_the_losses_of_the_models(finished):
    noise, steps = finished.tables["noise"], finished.tables["steps"]
    columns = ["group", "size", "seed", "loss", "accuracy", "loss_before", "loss_increase"]
    assert sorted(noise.columns[4:]) == sorted(c if c != "seed" else "noise_seed" for c in columns)
    assert list(steps.columns[4:7]) == ["update", "group", "size"]
    for table in (noise, steps):
        assert np.allclose(table["loss_increase"], table["loss"] - table["loss_before"])
        asked = table["group"] == "all"
        assert table.loc[asked, "accuracy"].between(0, 1).all()
        assert table.loc[~asked, "accuracy"].isna().all()
    assert set(noise["group"]) == set(GROUPS) and len(noise) == len(PLACES) * 6 * 4 * 2
    assert len(steps) == 2 * (2 + 3) * 3  # own moments at one of two stages
    loud = rows_of(noise, size=0.3, group="all")["loss_increase"]
    soft = rows_of(noise, size=0.01, group="all")["loss_increase"]
    assert (loud > 0).all() and loud.mean() > 10 * abs(soft.mean())
    blocks = load_corpus(finished.study.corpus_run(SEED).folder).blocks["heldout_general"]
    assert len(blocks) == 16  # fewer than are wanted: all of them
    loss = heldout_loss(finished.model(10), np.asarray(blocks, dtype=np.int64))
    assert np.allclose(noise.loc[noise["stage_step"] == 10, "loss_before"], loss, atol=1e-5)


# --- batches ------------------------------------------------------------------------------------


@pytest.fixture
def setting(finished):
    run = finished.run_of(10)
    model, tokenizer = load_checkpoint(step_folder(run.inputs["pretrain"].folder, 10))
    profile = finished.study.profile
    return mechanism_inputs.Setting(
        model,
        model,
        tokenizer,
        build_world(profile.corpus.world, SEED),
        load_corpus(run.inputs["corpus"].folder),
        dataclasses.replace(profile.continual, variants=()),
        profile.training,
        6e-3,
        0,
    )


def test_mixed_is_the_first_batch_with_passages(setting):
    batches = mechanism_inputs.batches_of(setting)
    mixed, plain = batches["mixed"]["input_ids"], setting.batch_at(0)  # an injection at every step
    assert mixed.shape == plain.shape == (16, 64)
    changed = (mixed != plain).any(axis=1)
    texts = setting.tokenizer.batch_decode(mixed[changed])
    entries = (*setting.world.once, *setting.world.paraphrase)
    assert changed.sum() >= 4 and all(any(e.name.split()[0] in t for e in entries) for t in texts)
    assert np.array_equal(batches["domain"]["input_ids"][:16], plain)


def test_passages_are_the_originals_and_padding_is_masked(setting):
    ids, mask = mechanism_inputs.batches_of(setting)["passages"].values()
    assert ids.shape == mask.shape and ids.shape[1] <= 64
    read = "".join(
        setting.tokenizer.decode(row[kept == 1]) for row, kept in zip(ids, mask, strict=True)
    )
    entries = (*setting.world.once, *setting.world.paraphrase)
    assert read == "".join(entry.passages[0] for entry in entries)
    assert (np.diff(mask, axis=1) <= 0).all()  # padding is on the right


def test_moments_under_way_are_those_of_twenty_steps_and_leave_the_model(setting, tmp_path):
    before = {name: w.detach().clone() for name, w in setting.model.named_parameters()}
    states = mechanism_inputs.optimizer_states(setting, tmp_path / "none")
    assert states["first_step"] is None and set(states) == {"first_step", "warm_step"}
    assert states["warm_step"].keys() == before.keys()
    steps = {float(state["step"]) for state in states["warm_step"].values()}
    assert steps == {10.0}  # there are no more
    assert all((w == before[name]).all() for name, w in setting.model.named_parameters())


def test_settings_can_be_written(finished):
    for run in finished.runs:
        assert json.loads(json.dumps(dict(run.settings))) == dict(run.settings)

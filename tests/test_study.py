"""The smoke profile from nothing to its tables, and the stages on planted entropy curves."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file
from short import inputs_of, less_text

from kelib import jobs
from kelib.config import load_profile
from kelib.entropy import shannon_entropy
from kelib.errors import KelibError
from kelib.metrics import knowledge_score
from kelib.runs import count_states, execute, perform
from kelib.study import Study, clean, peak_step
from kelib.study_tables import (
    CHANCE,
    checkpoints_table,
    continual_table,
    entities_table,
    entropy_tables,
    pretraining_table,
    save_coefficients,
)

SEEDS, STEPS, CHECKPOINTS, LAYERS = (100, 101), 40, (0, 2, 4, 8, 20, 40), 2
SMALL = {
    "workers": 1,
    "pretraining.steps": STEPS,
    "pretraining.checkpoints": [2, 4, 8, 20],
    "pretraining.optimizer_states": [],
    "branches": None,
    "continual.steps": 10,
    "continual.seeds": [0],
    "continual.variants": [],
    "continual.learning_rates": [6.0e-3],
    "interventions.factors": [1.0, 3.0],
    "interventions.arms": [{"name": "resuscitate_preserving", "ratio": 0.5, "factor": 1.0}],
}
DATA = ("mixture", "facts", "general", "domain")
MEASURED = {"corpus", "pretrain", "entropy", "evaluate", "entities"}
IDENTITY = ["seed", "stage_step", "stage_label", "learning_rate", "cl_seed", "injected"]
CHANGE = ["intervention", "ratio", "factor"]
RESULTS = ["k", "p", "k_once", "k_paraphrase", "loss_general", "loss_domain", "entropy"]


class Finished:
    """A study that was run to its end, with its tables."""

    def __init__(self, data):
        self.study = Study(load_profile("smoke", SMALL), data)
        with less_text():
            for seed in SEEDS:
                perform(self.study.corpus_run(seed))
        self.study.run([*self.study.measure_runs(), *self.study.entities_runs()], "measure")
        self.tables = entropy_tables(self.study)
        self.entropy, self.checkpoints = self.tables["entropy"], checkpoints_table(self.study)
        self.continual = self.study.continual_grid(self.entropy)
        self.interventions = self.study.intervention_grid()
        self.arms = self.study.arms_grid()
        self.study.run(self.runs, "continual learning")
        self.table = self.rows([*self.continual, *self.interventions])

    def rows(self, runs):
        return continual_table(self.study, runs, self.checkpoints, self.entropy)

    @property
    def runs(self):
        grid = [*self.continual, *self.interventions, *self.arms]
        measured = [*self.study.measure_runs(), *self.study.entities_runs()]
        return [*measured, *self.study.intervene_runs(), *(r for _, r in grid)]


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    return Finished(tmp_path_factory.mktemp("study"))


# --- the whole pipeline ---------------------------------------------------------------------------


def test_entropy_has_a_row_per_seed_checkpoint_and_layer(finished):
    table = finished.entropy
    assert list(table.columns) == ["seed", "step", "layer", "entropy_nats", "bound_nats"]
    keys = [(s, c, layer) for s in SEEDS for c in CHECKPOINTS for layer in range(LAYERS)]
    assert list(table[["seed", "step", "layer"]].itertuples(index=False, name=None)) == keys
    assert np.allclose(table["bound_nats"], math.log(64), rtol=1e-14)
    assert table["entropy_nats"].between(0, math.log(64)).all()
    untrained = table[table["step"] == 0]["entropy_nats"]
    assert (untrained > 0.95 * math.log(64)).all()  # near the bound by construction
    assert table.groupby("seed")["entropy_nats"].sum().nunique() == len(SEEDS)


def test_all_entropies_have_their_rows(finished):
    table = finished.tables["entropies"]
    keys = ["model", "seed", "step", "data", "kind", "coefficient", "layer"]
    assert not table.duplicated(keys).any()
    of_one = {  # rows of a checkpoint by data, kind and definition
        **{("mixture", "knowledge", name): LAYERS for name in ("absolute", "relu", "contribution")},
        **{(d, "knowledge", "absolute"): LAYERS for d in ("facts", "general", "domain")},
        **{(d, "attention", "absolute"): LAYERS for d in DATA},
        **{(d, "next_token", "absolute"): 1 for d in DATA},
    }
    for _, part in table.groupby(["model", "seed", "step"]):
        assert part.groupby(["data", "kind", "coefficient"]).size().to_dict() == of_one
    assert len(table) == 2 * len(SEEDS) * len(CHECKPOINTS) * sum(of_one.values())
    assert np.isfinite(table["entropy_nats"]).all() and (table["entropy_nats"] > 0).all()
    assert (table["standard_error"] > 0).all()
    knowledge = table["kind"] == "knowledge"
    assert (table["entropy_nats"] <= table["bound_nats"])[knowledge].all()
    assert table["bound_nats"][~knowledge].isna().all()
    same = table[(table["model"] == "olmo") & (table["data"] == "mixture") & knowledge]
    same = same[same["coefficient"] == "absolute"].reset_index(drop=True)
    assert same["entropy_nats"].equals(finished.entropy["entropy_nats"])


def test_the_panel_and_the_convergence(finished):
    panel, rows = finished.tables["panel"], finished.tables["convergence"]
    assert len(panel) == 2 * len(SEEDS) * len(CHECKPOINTS) * LAYERS
    own = panel[panel["model"] == "olmo"]["knowledge_entropy"]
    assert np.allclose(own, finished.entropy["entropy_nats"], rtol=1e-12)
    assert panel[panel["model"] == "gpt_neox"]["gate_norm"].isna().all()  # it has no gate
    assert set(rows["model"]) == {"olmo"}
    assert set(rows["step"]) == set(finished.study.near_stages()) == {20, 40}
    assert len(rows) == len(SEEDS) * 2 * 7  # 1 to 64 blocks


def test_checkpoints_have_a_row_per_seed_and_step(finished):
    table = finished.checkpoints
    keys = list(table[["seed", "step"]].itertuples(index=False, name=None))
    assert keys == [(seed, step) for seed in SEEDS for step in CHECKPOINTS]
    assert set(RESULTS) - {"entropy"} <= set(table.columns)
    assert np.isfinite(table.select_dtypes("number")).all(axis=None)
    assert (table["tokens"] == table["step"] * 16 * 64).all()
    assert (table["share"] == table["step"] / STEPS).all()
    assert (table["tokens_per_parameter"] == table["tokens"] / table["parameters"]).all()
    assert (table["k"] < 0).all() and table["p"].between(0, 1).all()
    losses = table.pivot(index="seed", columns="step", values="loss_general")
    assert np.allclose(losses[0], math.log(512), atol=0.3)  # an untrained model knows nothing
    assert (losses[40] < losses[0] - 1).all()  # and this one learned


def test_names_have_a_row_per_seed_stage_and_text(finished):
    table = entities_table(finished.study)
    keys = [(s, c, data) for s in SEEDS for c in (20, 40) for data in ("general", "domain")]
    assert list(table[["seed", "step", "data"]].itertuples(index=False, name=None)) == keys
    assert np.isfinite(table.select_dtypes("number")).all(axis=None)
    quantiles = table[[f"perplexity_{q:02d}" for q in (5, 25, 50, 75, 95)]].to_numpy()
    assert (quantiles[:, 0] > 1).all() and (np.diff(quantiles, axis=1) > 0).all()
    assert (table["names"] > 20).all() and (table["mentions"] > 3 * table["names"]).all()
    # what is read and found does not depend on the checkpoint
    counts = table.groupby(["seed", "data"])[["mentions", "outside_tokens"]].nunique()
    assert (counts == 1).all(axis=None)
    # a model this young has learnt common words, and no names of another world
    assert (table["nats_per_token"] > table["outside_nats_per_token"]).all()


def test_the_mentions_of_a_run_are_numbers(finished):
    run = finished.study.entities_run(100)
    mentions = run.read_table("mentions.csv")
    assert list(mentions) == ["mention", "name", "tokens", "nats", "step", "data"]
    assert len(mentions.select_dtypes("number").columns) == 5
    assert set(mentions["data"]) == {"general", "domain"}
    part = mentions.query("step == 40 and data == 'domain'")
    row = entities_table(finished.study).query("seed == 100 and step == 40 and data == 'domain'")
    assert row["mentions"].item() == len(part) == part["mention"].nunique()
    total = part["nats"].sum() / part["tokens"].sum()
    assert row["nats_per_token"].item() == pytest.approx(total)


def test_k_of_a_checkpoint_is_that_of_its_probes(finished):
    run = finished.study.evaluate_run(101, 40)
    probes = pd.read_csv(run.folder / "probes.csv")
    row = finished.checkpoints.query("seed == 101 and step == 40").iloc[0]
    assert knowledge_score(probes) == pytest.approx(row["k"], abs=1e-5)
    questions = pd.read_csv(run.folder / "questions.csv")
    by_task = questions.groupby("task")["correct"].mean()
    assert (len(by_task), by_task.mean()) == (6, pytest.approx(row["p"]))
    assert len(probes) == 15 * 8 and len(questions) == 60


def test_coefficient_files_give_the_entropies_of_the_table(finished):
    save_coefficients(finished.study)
    for seed in SEEDS:
        stored = load_file(finished.study.measurements / f"coefficients-seed{seed}.safetensors")
        names = [f"{step:07d}/{layer:02d}" for step in CHECKPOINTS for layer in range(LAYERS)]
        assert sorted(stored) == names
        rows = finished.entropy[finished.entropy["seed"] == seed]
        found = [float(shannon_entropy(stored[name])) for name in names]
        np.testing.assert_allclose(found, rows["entropy_nats"], rtol=1e-12)
        assert all(vector.shape == (64,) and vector.min() > 0 for vector in stored.values())


def test_the_loss_along_pretraining(finished):
    table = pretraining_table(finished.study, every=15)
    assert list(table.columns) == ["model", "seed", "step", "loss"]
    places = [[m, s, e] for m in ("olmo", "gpt_neox") for s in SEEDS for e in (15, 30)]
    assert table[["model", "seed", "step"]].to_numpy().tolist() == places
    losses = finished.study.pretrain_run(100).read("losses.json")
    assert len(losses) == STEPS
    assert table["loss"][1] == pytest.approx(np.mean(losses[15:30]))
    assert pretraining_table(finished.study, every=1)["loss"][:STEPS].tolist() == losses


def test_continual_learning_has_a_row_per_run(finished):
    table, study = finished.table, finished.study
    stages = {seed: study.stages(finished.entropy, seed) for seed in SEEDS}
    originals = [
        (seed, step, label, 6e-3, 0, injected)
        for seed in SEEDS
        for label, step in stages[seed].items()
        for injected in (True, False)
    ]
    plain = table[table["intervention"] == "none"]
    rows = list(plain[IDENTITY].itertuples(index=False, name=None))
    assert sorted(rows) == sorted(originals) and len(rows) == len(finished.continual)
    assert plain[["ratio", "factor"]].isna().all(axis=None)

    woken = table[table["intervention"] == "resuscitate"]
    changes = list(woken[["seed", "ratio", "factor"]].itertuples(index=False, name=None))
    assert sorted(changes) == [(s, 0.5, q) for s in SEEDS for q in (1.0, 3.0)]
    assert (woken["stage_step"] == STEPS).all() and woken["injected"].all()
    assert len(table) == len(finished.continual) + len(finished.interventions)
    assert table["stage_step"].isin(CHECKPOINTS).all()
    assert (table["chance"] == CHANCE).all()


def test_before_is_the_checkpoint_and_after_is_the_run(finished):
    checkpoints = finished.checkpoints.set_index(["seed", "step"])
    totals = finished.entropy.groupby(["seed", "step"])["entropy_nats"].sum()
    by_key = {}
    for _, run in (*finished.continual, *finished.interventions):
        s = run.settings
        factor = (s["intervention"] or {}).get("factor", 0.0)
        by_key[s["seed"], s["step"], s["injected"], factor] = run.read()
    for row in finished.table.to_dict("records"):
        start = (row["seed"], row["stage_step"])
        factor = 0.0 if math.isnan(row["factor"]) else row["factor"]
        result = by_key[(*start, row["injected"], factor)]
        for name in set(RESULTS) - {"entropy"}:
            assert row[f"{name}_pt"] == checkpoints.loc[start, name]
            assert row[f"{name}_cl"] == result[name]
        assert row["entropy_pt"] == totals[start]
        assert row["entropy_cl"] == result["entropy"]
        assert row["tokens_per_parameter"] == checkpoints.loc[start, "tokens_per_parameter"]


def test_a_and_f_are_the_papers(finished):
    t = finished.table
    assert np.allclose(t["acquisition"], (t["k_cl"] - t["k_pt"]) / t["k_pt"].abs())
    assert np.allclose(t["forgetting"], (t["p_pt"] - t["p_cl"]) / t["p_pt"])
    above = t[t["p_pt"] > CHANCE]
    excess = (above["p_pt"] - above["p_cl"]) / (above["p_pt"] - CHANCE)
    assert np.allclose(above["forgetting_over_chance"], excess)
    assert t.loc[t["p_pt"] <= CHANCE, "forgetting_over_chance"].isna().all()
    woken = t[t["intervention"] == "resuscitate"]
    k, p = woken["k_modified"], woken["p_modified"]
    assert np.allclose(woken["acquisition_modified"], (woken["k_cl"] - k) / k.abs())
    assert np.allclose(woken["forgetting_modified"], (p - woken["p_cl"]) / p)


def test_the_modified_model_stands_where_there_was_an_intervention(finished):
    t = finished.table
    woken = t["intervention"] == "resuscitate"
    columns = [f"{name}_modified" for name in (*RESULTS, "acquisition", "forgetting")]
    assert t.loc[woken, columns].notna().all(axis=None)
    assert t.loc[~woken, columns].isna().all(axis=None)
    assert (t.loc[woken, "k_modified"] != t.loc[woken, "k_pt"]).all()
    assert "k_modified" not in finished.rows(finished.continual)


def test_injection_is_what_teaches_the_entries(finished):
    plain = finished.table[finished.table["intervention"] == "none"]
    keys = ["seed", "stage_step"]
    k = plain.pivot(index=keys, columns="injected", values="k_cl")
    assert (k[True] > k[False] + 0.1).all()
    loss = plain.pivot(index=keys, columns="injected", values="loss_domain_cl")
    assert (loss[True] != loss[False]).all()


def test_the_order_of_runs_does_not_matter(finished):
    backwards = finished.rows([*finished.interventions[::-1], *finished.continual[::-1]])
    pd.testing.assert_frame_equal(backwards[finished.table.columns], finished.table)


def test_a_second_call_does_nothing(finished):
    files = {path: path.stat().st_mtime_ns for path in finished.study.data.rglob("*")}
    outcome = execute(finished.runs, workers=1)
    distinct = len({run.digest for run in finished.runs}) + 3 * len(SEEDS)  # corpus, two models
    assert (outcome.done, outcome.skipped, outcome.seconds) == (0, distinct, 0)
    finished.study.run(finished.runs, "again")
    assert {p: p.stat().st_mtime_ns for p in finished.study.data.rglob("*")} == files
    assert count_states(finished.runs)["done"] == len(finished.runs)


def test_nothing_half_done_or_temporary_is_left(finished):
    names = [path.name for path in finished.study.data.rglob("*")]
    assert not [n for n in names if n.endswith((".partial", ".tmp")) or n in ("lock", "error.txt")]


def test_a_table_of_unfinished_runs_is_refused(finished, tmp_path):
    elsewhere = Study(finished.study.profile, tmp_path)
    with pytest.raises(KelibError, match=r"entropy run \w+ is missing: run its stage first"):
        entropy_tables(elsewhere)
    with pytest.raises(KelibError, match=r"evaluate run \w+ is missing"):
        checkpoints_table(elsewhere)
    with pytest.raises(KelibError, match=r"entities run \w+ is missing"):
        entities_table(elsewhere)
    with pytest.raises(KelibError, match=r"pretrain run \w+ is missing"):
        pretraining_table(elsewhere)
    with pytest.raises(KelibError, match=r"continual run \w+ is missing"):
        continual_table(
            elsewhere,
            elsewhere.continual_grid(finished.entropy),
            finished.checkpoints,
            finished.entropy,
        )


# --- stages on planted curves -------------------------------------------------------------------


def planted(curve, seed=100):
    """An entropy table with the given totals by step, split over two layers."""
    rows = [
        (seed, step, i, total * w)
        for step, total in curve.items()
        for i, w in enumerate((0.25, 0.75))
    ]
    return pd.DataFrame(rows, columns=["seed", "step", "layer", "entropy_nats"])


def study_of(steps=100, stages=(0.5, 1.0), seeds=(100,)):
    overrides = {
        "seeds": list(seeds),
        "pretraining.steps": steps,
        "pretraining.checkpoints": [],
        "pretraining.optimizer_states": [],
        "branches": None,
        "regimes": None,
        "continual.stages": list(stages),
    }
    return Study(load_profile("smoke", overrides), None)


CURVES = {
    "collapse, recovery, fall": (
        {0: 9.9, 2: 7.0, 5: 4.0, 10: 6.0, 20: 9.0, 35: 8.5, 50: 8.0, 75: 7.9, 100: 7.0},
        (20, {"50%": 50, "100%": 100}),
    ),
    "still rising": (
        {0: 9.9, 5: 4.0, 20: 6.0, 50: 7.0, 100: 8.0},
        (100, {"50%": 50, "100%": 100}),
    ),
    "no collapse, falling throughout": (
        {0: 9.9, 5: 9.0, 10: 8.0, 30: 7.5, 50: 7.0, 100: 6.0},
        (10, {"50%": 50, "100%": 100}),
    ),
    "rising throughout": (
        {0: 1.0, 5: 2.0, 10: 3.0, 50: 4.0, 100: 5.0},
        (100, {"50%": 50, "100%": 100}),
    ),
    "flat": (
        {0: 5.0, 5: 5.0, 50: 5.0, 100: 5.0},
        (0, {"50%": 50, "100%": 100}),
    ),
    "peak just before the half": (
        {0: 9.0, 5: 4.0, 40: 8.0, 50: 7.0, 100: 6.0},
        (40, {"50%": 50, "100%": 100}),
    ),
    "peak after the half": (
        {0: 9.0, 5: 4.0, 50: 7.0, 70: 8.0, 80: 7.5, 100: 6.0},
        (70, {"50%": 50, "100%": 100}),
    ),
    "peak at the last but one": (
        {0: 9.0, 5: 4.0, 50: 7.0, 80: 8.0, 100: 7.0},
        (80, {"50%": 50, "100%": 100}),
    ),
    "higher before training than ever after": (
        {0: 99.0, 1: 50.0, 5: 4.0, 50: 8.0, 60: 7.0, 100: 6.0},
        (50, {"50%": 50, "100%": 100}),
    ),
    "two checkpoints": ({0: 9.0, 100: 5.0}, (0, {"50%": 0, "100%": 100})),
    "no checkpoint at the half": (
        {0: 9.0, 5: 4.0, 10: 8.0, 12: 7.0, 41: 6.0, 60: 6.0, 100: 5.0},
        (10, {"50%": 41, "100%": 100}),
    ),
}


@pytest.mark.parametrize("name", CURVES)
def test_peak_and_stages_of_planted_curves(name):
    curve, (peak, stages) = CURVES[name]
    table = planted(curve)
    assert peak_step(table, 100) == peak
    found = study_of().stages(table, 100)
    assert found == stages
    assert list(found.values()) == sorted(set(found.values()))
    shuffled = table.sample(frac=1, random_state=0)
    assert study_of().stages(shuffled, 100) == stages


def test_each_seed_has_its_own_peak():
    (first, marks), (second, others) = CURVES["collapse, recovery, fall"], CURVES["flat"]
    table = pd.concat([planted(first, 100), planted(second, 101)])
    assert (peak_step(table, 100), peak_step(table, 101)) == (marks[0], others[0])
    peaks, stages = study_of(seeds=(100, 101)).marks(table)
    assert peaks == {100: marks[0], 101: others[0]}
    assert stages == {100: marks[1], 101: others[1]}


def test_stages_come_in_order_and_those_before_the_peak_are_left_out():
    curve, _ = CURVES["collapse, recovery, fall"]
    found = study_of(stages=(1.0, 0.75, 0.1, 0.35, 0.5)).stages(planted(curve), 100)
    assert list(found.items()) == [("35%", 35), ("50%", 50), ("75%", 75), ("100%", 100)]


def test_a_seed_without_measurements_is_refused():
    with pytest.raises(KelibError, match="the entropy table has no seed 7: run stage 2 first"):
        study_of().stages(planted({0: 1.0, 100: 1.0}), 7)


# --- the grid -----------------------------------------------------------------------------------


def digests(study, entropy):
    return {run.digest for _, run in (*study.continual_grid(entropy), *study.intervention_grid())}


@pytest.fixture
def entropy():
    curve = {0: 9.0, 2: 4.0, 8: 8.0, 30: 7.0, 60: 6.0}
    return pd.concat([planted(curve, seed) for seed in SEEDS])


def test_the_grid_is_complete_and_has_no_run_twice(entropy, tmp_path):
    study = Study(load_profile("smoke"), tmp_path)
    runs = [run for _, run in study.continual_grid(entropy)]
    places = 2 * 2  # seeds, stages 30 and 60
    # rates, CL seeds and a control; variants, one of them with as many stages of its own
    assert len(runs) == places * (2 * (2 + 1) + 4)
    woken = [run for _, run in study.intervention_grid()]
    assert len(woken) == 1 * 2 * 1 * 4 * 2  # rates, CL seeds, p, q, seeds
    assert len(digests(study, entropy)) == len(runs) + len(woken)
    early = [run.settings["step"] for name, run in study.continual_grid(entropy) if "early" in name]
    assert sorted(early) == [8, 8, 15, 15]
    assert {run.settings["step"] for run in runs} == {8, 15, 30, 60}
    assert {run.settings["step"] for run in woken} == {60}
    arms = study.arms_grid()
    assert {(name, run.settings["step"]) for name, run in arms if run.settings["step"] != 60} == {
        ("resuscitate p=0.5 q=2", 30)
    }
    assert all(set(run.inputs) == {"corpus", "pretrain", "entropy"} for run in woken)
    assert len(study.measure_runs()) == 3 * 2 * 9  # entropies of two models, knowledge of one


def test_controls_curves_and_variants(entropy, tmp_path):
    study = Study(load_profile("smoke"), tmp_path)
    grid = study.continual_grid(entropy)
    names = pd.Series([name for name, _ in grid]).value_counts()
    places = 2 * 2  # seeds, stages
    assert names["protocol"] == places * 2 * (2 + 1)  # rates, CL seeds and one control
    assert names.drop("protocol").to_dict() == dict.fromkeys(
        ("batch x 2", "2 epochs", "general text", "early stages"), places
    )
    for name, run in grid:
        s = run.settings
        plan = s["continual"]
        assert s["injected"] or (name == "protocol" and s["cl_seed"] == 0)
        looked_at = name == "protocol" and s["cl_seed"] == 0 and s["injected"]
        assert s["curve"] == s["keep"] == looked_at
        assert s["text"] == ("unread" if name == "general text" else "domain")
        assert s["epochs"] == (2 if name == "2 epochs" else 1)
        read = {"batch x 2": (10, 32), "2 epochs": (40, 16)}.get(name, (20, 16))
        assert (plan["steps"], plan["batch_size"]) == read
    everywhere = Study(load_profile("smoke", {"continual.control_seeds": None}), tmp_path)
    assert len(everywhere.continual_grid(entropy)) == len(grid) + places * 2  # a second control


def test_what_an_intervention_does_alone_is_measured_once(entropy, tmp_path):
    study = Study(load_profile("smoke"), tmp_path)
    alone = study.intervene_runs()
    assert (
        len({run.digest for run in alone}) == len(alone) == (4 + 6) * 2
    )  # q and arms, seeds; not CL seeds, rates
    assert all(set(run.inputs) == {"corpus", "pretrain", "entropy"} for run in alone)


def test_another_model_is_refused(tmp_path):
    study = Study(load_profile("smoke"), tmp_path)
    assert study.models == ["olmo", "gpt_neox"]
    with pytest.raises(KelibError, match=r"no model 'opt' in this study; it has gpt_neox, olmo"):
        study.pretrain_run(100, "opt")
    alone = Study(load_profile("smoke", {"comparison": None}), tmp_path)
    assert alone.models == ["olmo"]
    with pytest.raises(KelibError, match=r"no model 'gpt_neox' in this study; it has olmo"):
        alone.pretrain_run(100, "gpt_neox")


@pytest.mark.parametrize(
    ("key", "less"),
    [
        ("continual.seeds", [0]),
        ("continual.learning_rates", [6.0e-3]),
        ("interventions.factors", [2.0, 1.0]),
        ("seeds", [101]),
        ("continual.stages", [1.0]),
    ],
)
def test_a_longer_list_only_adds_runs(entropy, tmp_path, key, less):
    whole = digests(Study(load_profile("smoke"), tmp_path), entropy)
    part = digests(Study(load_profile("smoke", {key: less}), tmp_path), entropy)
    assert part <= whole
    assert len(part) < len(whole) or key == "continual.stages"


@pytest.mark.parametrize(
    ("key", "value", "kept"),
    [
        ("workers", 1, {*MEASURED, "continual"}),
        ("continual.optimizer.weight_decay", 0.2, MEASURED),
        ("continual.injections", 5, MEASURED),
        ("interventions.ratios", [0.9], {*MEASURED, "continual"}),
        ("training.precision", "bf16", {"corpus"}),
        ("comparison.hidden_size", 64, {*MEASURED, "continual"}),
        ("pretraining.learning_rate", 1.0e-3, {"corpus"}),
        ("pretraining.optimizer.clip", 2.0, {"corpus"}),
        ("model.hidden_size", 64, {"corpus"}),
        ("corpus.vocabulary_size", 600, set()),
        ("corpus.world.people", 30, set()),
    ],
)
def test_a_setting_concerns_only_what_rests_on_it(tmp_path, key, value, kept):
    def runs(overrides):
        study = Study(load_profile("smoke", overrides), tmp_path)
        return {
            "corpus": study.corpus_run(100).digest,
            "pretrain": study.pretrain_run(100).digest,
            "entropy": study.entropy_run(100, 60).digest,
            "evaluate": study.evaluate_run(100, 60).digest,
            "entities": study.entities_run(100).digest,
            "continual": study.continual_run(100, 60, 6e-3, 0).digest,
        }

    before, after = runs({}), runs({key: value})
    assert {kind for kind in before if before[kind] == after[kind]} == kept


def test_settings_of_runs_can_be_written(entropy, tmp_path):
    study = Study(load_profile("smoke"), tmp_path)
    grid = (*study.continual_grid(entropy), *study.intervention_grid())
    measured = (*study.measure_runs(), *study.entities_runs(), *study.intervene_runs())
    for run in (*measured, *(run for _, run in grid)):
        settings = dict(run.settings)
        assert json.loads(json.dumps(settings)) == settings


# --- folders --------------------------------------------------------------------------------------


def test_profiles_share_no_folder_and_cleaning_touches_one_only(tmp_path):
    folders = {}
    for name in ("smoke", "small"):
        study = Study(load_profile(name), tmp_path)
        seed = study.profile.seeds[0]
        runs = [study.corpus_run(seed), study.pretrain_run(seed), study.entropy_run(seed, 0)]
        runs.append(study.continual_run(seed, 1, 1e-3, 0))
        folders[name] = {run.home for run in runs} | {study.measurements}
        for folder in folders[name]:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "file").write_text("")
    (tmp_path / "sources").mkdir()
    assert not folders["smoke"] & folders["small"]
    clean("smoke", tmp_path)
    assert not any(folder.exists() for folder in folders["smoke"])
    assert all((folder / "file").exists() for folder in folders["small"])
    assert (tmp_path / "sources").exists()
    clean("smoke", tmp_path)  # nothing to do is no error


# --- continual learning that is interrupted, kept, or begun otherwise -----------------------------


def settings_with(run, **changes):
    settings = json.loads(json.dumps(dict(run.settings)))
    settings["continual"] |= changes
    return settings


class Stopped(Exception):
    pass


def test_a_killed_run_that_saved_its_state_ends_with_the_same_weights(finished, tmp_path):
    run = next(run for _, run in finished.continual if run.settings["curve"])
    settings = settings_with(run, save_every=3)

    def stop(share):
        if share > 0.9 * 0.75:  # steps 3 and 6 of 10 are saved, 8 is under way
            raise Stopped

    with pytest.raises(Stopped):
        jobs.continual(settings, inputs_of(run), tmp_path, stop)
    assert (tmp_path / jobs.STATE).exists() and not (tmp_path / "result.json").exists()
    counted = (tmp_path / jobs.STATE).with_suffix(".json")
    before = counted.read_text()
    counted.write_text(before.replace("1", "2", 1))
    with pytest.raises(KelibError, match=r"state.json is not of this run .its digest .*delete"):
        jobs.continual(settings, inputs_of(run), tmp_path, stop)
    counted.write_text(before)
    begun = []
    jobs.continual(settings, inputs_of(run), tmp_path, begun.append)
    assert min(begun) == pytest.approx(0.9 * 0.7)  # it went on at step 7
    weights = [load_file(f / "model" / "model.safetensors") for f in (tmp_path, run.folder)]
    assert all(np.array_equal(weights[0][name], weights[1][name]) for name in weights[1])
    for name in ("curve.csv", "exposures.csv", "probes.csv", "questions.csv"):
        assert (tmp_path / name).read_bytes() == (run.folder / name).read_bytes()
    assert json.loads((tmp_path / "result.json").read_text()) == run.read()
    assert not (tmp_path / jobs.STATE).exists()


def test_a_broken_saved_state_is_named(finished, tmp_path):
    run = next(run for _, run in finished.continual if run.settings["curve"])
    (tmp_path / jobs.STATE).write_bytes(b"no weights")
    with pytest.raises(KelibError, match=r"state.safetensors is not a state of this run .*delete"):
        jobs.continual(settings_with(run), inputs_of(run), tmp_path, lambda share: None)


def test_only_injected_runs_of_the_curve_seeds_keep_weights_and_curves(finished):
    for _, run in [*finished.continual, *finished.interventions]:
        s = run.settings
        assert (run.folder / "model").is_dir() == s["keep"] == s["injected"]
        assert (run.folder / "curve.csv").exists() == (s["injected"] and s["intervention"] is None)


def test_own_moments_and_another_schedule_change_the_run(finished, tmp_path):
    plain = next(run for _, run in finished.continual if run.settings["step"] == STEPS)
    study = Study(
        load_profile("smoke", {**SMALL, "pretraining.optimizer_states": [STEPS]}), tmp_path
    )
    settings = dict(plain.settings)
    with pytest.raises(KelibError, match=r"optimizer.safetensors is not a state of this run"):
        jobs.continual(settings | {"own_moments": True}, inputs_of(plain), tmp_path, print)
    corpus_run = plain.inputs["corpus"]
    pretrain = study.pretrain_run(settings["seed"])
    (tmp_path / "pretrain").mkdir()
    jobs.pretrain(
        pretrain.settings, {"corpus": corpus_run.folder}, tmp_path / "pretrain", lambda share: None
    )
    settings["pretrain"] = pretrain.settings["digest"]
    losses = {}
    for own in (False, True):
        folder = tmp_path / str(own)
        folder.mkdir()
        inputs = {"corpus": corpus_run.folder, "pretrain": tmp_path / "pretrain"}
        jobs.continual(settings | {"own_moments": own}, inputs, folder, lambda share: None)
        losses[own] = json.loads((folder / "result.json").read_text())["losses"]
    assert losses[False] == plain.read()["losses"]  # keeping moments changes no number
    assert losses[True][0] == losses[False][0] and losses[True][1] != losses[False][1]


def test_other_interventions_are_continued_and_described(finished):
    table = finished.rows(finished.arms)
    assert set(table["variant"]) == {"resuscitate_preserving p=0.5 q=1"}
    assert sorted(table["seed"]) == list(SEEDS) and table["injected"].all()
    same = table["k_modified"] - table["k_pt"]
    assert same.abs().max() < 1e-4  # the same function,
    assert (table["entropy_modified"] - table["entropy_pt"]).abs().min() > 1e-3  # other entropy,
    assert (table["weights_key_relative_change"] > 0.01).all()  # by other weights
    woken = finished.table[finished.table["intervention"] == "resuscitate"]
    assert (woken["weights_value_relative_change"] == 0).all()

"""Continual learning from published checkpoints: settings, runs, tables, kills, processes."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import SEEN
from short import do

from kelib import continued, fetching, plots_continued, trajectory
from kelib.audit import audit
from kelib.continued_intervals import item_intervals
from kelib.continued_profile import NOT_OF_A_RUN, Learning
from kelib.entries import LEVELS
from kelib.errors import KelibError
from kelib.fetching import GIB, held, release
from kelib.items import accuracy_interval, gain_interval
from kelib.plots_learning import MATCH
from kelib.runs import perform
from kelib.tables import read_provenance
from kelib.trajectory import Trajectory, measure_trajectory
from kelib.trajectory_profile import load_trajectory, trajectory_from
from kelib.trajectory_tables import TABLES

STEPS, LENGTH, UPDATES, EVERY = [100, 400], 32, 8, 3
PREFIXES = ("mem", "gen", "hard_gen")
VALUES: dict[str, Any] = {
    "trajectory": "tiny",
    "workers": 1,
    "seed": 0,
    "model": {"source": "", "steps": STEPS},
    "data": ["generated:one"],
    "sequences": 64,
    "sequence_length": 16,
    "batch_size": 32,
    "definitions": ["absolute"],
    "loss_sequences": 8,
    "cache_gib": 1.0,
}
LEARNING: dict[str, Any] = {
    "steps": STEPS,
    "text": "",
    "sequence_length": LENGTH,
    "heldout_sequences": 8,
    "updates": UPDATES,
    "batch_size": 4,
    "injections": 4,
    "learning_rates": [3.0e-3],
    "optimizer": {"weight_decay": 0.1},
    "entries": "",
    "paraphrase_entries": 1,
    "tasks": ["generated:known"],
    "save_every": EVERY,
}


# --- settings ---------------------------------------------------------------------------------


def test_the_section_of_the_paper_has_its_protocol() -> None:
    learning = load_trajectory("paper").learning
    assert isinstance(learning, Learning)
    assert (learning.read, learning.packed) == (204_800, 204_800)
    assert (learning.batch_size, learning.updates, learning.sequence_length) == (128, 1600, 1024)
    assert learning.learning_rates == (4e-4, 1e-4) and learning.training.precision == "bf16"
    chosen = learning.optimizer
    assert (chosen.betas, chosen.clip, chosen.weight_decay) == ((0.9, 0.95), 1.0, 0.1)
    assert (chosen.warmup_share, chosen.final_share) == (0.05, 0.1)
    assert len(learning.tasks) == 6


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"learning.steps": [100, 300]}, "learning.steps = 300 must be among model.steps, 0, 100"),
        ({"learning.tasks": ["squad"]}, "learning.tasks = 'squad' must be among arc_easy, hella"),
        (
            {"learning.processes": 3},
            "learning.processes = 3 must be a divisor of batch_size = 16: 1, 2, 4, 8, 16",
        ),
        ({"learning.updates": 11}, "learning.updates = 11 must be a multiple of the 5 injections"),
        ({"learning.learning_rates": [0.0]}, "learning.learning_rates = (0.0,) must be above 0"),
        ({"learning.parallel": "fsdp"}, "learning.parallel = 'fsdp' must be one of ddp, fsdp2"),
        ({"learning.task_data": "no/such"}, "learning.task_data: there is no folder no/such"),
        ({"learning.seeds": []}, "learning.seeds = () must be a list of distinct values"),
        ({"learning.rate": 1.0}, "unknown key learning.rate: "),
    ],
)
def test_settings_that_cannot_be(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(KelibError, match=re.escape(message)) as caught:
        load_trajectory("trajectory_smoke", overrides)
    assert "\n" not in str(caught.value)


def test_how_the_work_is_shared_names_no_run_and_the_section_no_other_run() -> None:
    plain = Trajectory(load_trajectory("trajectory_smoke"), Path("data"))
    shared = {"learning.processes": 4, "learning.parallel": "fsdp2", "learning.save_every": 1}
    other = Trajectory(load_trajectory("trajectory_smoke", shared), Path("data"))
    assert {"processes", "parallel", "save_every"} < set(NOT_OF_A_RUN)
    assert plain.profile.digest == other.profile.digest

    def digests(study: Trajectory) -> list[str]:
        return [r.digest for runs in study.runs_by_revision().values() for r in runs]

    assert digests(plain) == digests(other) and len(digests(plain)) == 4 + 3 * (1 + 2 * 2)
    without = trajectory_from(
        {k: v for k, v in plain.profile.parameters.items() if k != "learning"}
    )
    assert "learning" not in without.parameters
    assert trajectory_from(plain.profile.parameters).parameters == plain.profile.parameters
    entropy = [run.digest for run in plain.runs()]
    assert [run.digest for run in Trajectory(without, Path("data")).runs()] == entropy


# --- runs -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, model_of: Callable[[str], Any]) -> Path:
    """Checkpoints as the hub has them, a text, and entries in the published format."""
    import torch

    from kelib.packing import save_tokenizer, train_tokenizer

    home = tmp_path_factory.mktemp("published")
    tokenizer = train_tokenizer(SEEN, 400)
    for step in STEPS:
        model = copy.deepcopy(model_of("llama"))
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.02 * torch.randn(weight.shape, generator=generator)
        model.save_pretrained(home / "checkpoints" / f"step{step}")
        save_tokenizer(tokenizer, LENGTH, home / "checkpoints" / f"step{step}")
    (home / "text.txt").write_text("\n\n".join(f"Note {n}: {text}" for n, text in enumerate(SEEN)))
    entries = []
    for name in ("Ann", "Bob", "Cem"):
        texts = [f"{name} lives in town {n} with {n} grey cats." for n in range(10)]
        entry: dict[str, Any] = {"train_context": texts[0], "paraphrases": texts[1:]}
        for prefix in PREFIXES:
            entry[f"{prefix}_input"] = [f"{name} lives in town" for _ in range(5)]
            entry[f"{prefix}_target"] = [f"{n} with cats" for n in range(5)]
        entries.append(entry)
    (home / "entries.json").write_text(json.dumps(entries))
    assert len(PREFIXES) == len(LEVELS)
    return home


def study_of(place: Path, data: Path, source: Path | None = None, **learning: Any) -> Trajectory:
    there = {"text": str(place / "text.txt"), "entries": str(place / "entries.json")}
    model = VALUES["model"] | {"source": str(source or place / "checkpoints")}
    values = VALUES | {"model": model, "learning": LEARNING | there | learning}
    return Trajectory(trajectory_from(values), data)


@pytest.fixture(scope="module")
def done(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Trajectory:
    """All runs of continual learning, in this process."""
    study = study_of(place, tmp_path_factory.mktemp("data"))
    continued.write_launch(study)
    do([run for one in study.learning_revisions for run in continued.learning_runs(study, one)])
    return study


def test_the_text_is_packed_once_in_the_order_of_its_documents(done: Trajectory) -> None:
    from transformers import AutoTokenizer

    run = continued.text_run(done)
    blocks, heldout = (np.load(run.folder / f"{name}.npy") for name in ("domain", "heldout"))
    assert blocks.shape == (4 * UPDATES, LENGTH) and heldout.shape == (8, LENGTH)
    assert sorted(p.name for p in run.folder.iterdir() if p.suffix == ".npy") == [
        *("domain.npy", "heldout.npy")
    ]
    tokenizer = AutoTokenizer.from_pretrained(f"{done.profile.model.source}/step100")
    read = tokenizer.decode(np.concatenate([blocks, heldout]).ravel().tolist())
    assert read.startswith(f"Note 0: {SEEN[0]}<|endoftext|>Note 1: {SEEN[1]}<|endoftext|>Note 2")


def test_passages_reach_the_batches_and_exposures_are_checked(
    place: Path, done: Trajectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    from kelib.injection import Injector
    from kelib.training import Trainer

    read: list[np.ndarray] = []
    share = Trainer._share

    def noted(trainer: Trainer, batch: np.ndarray) -> Any:
        read.append(batch.copy())
        return share(trainer, batch)

    monkeypatch.setattr(Trainer, "_share", noted)
    study = study_of(place, tmp_path, seeds=[5])
    injected, control = continued.continued_runs(study, study.learning_revisions[0])
    do([injected])
    table = injected.read_table("exposures.csv")
    assert (table["shown"] == 1).all() and set(table["entry_set"]) == {"once", "paraphrase"}
    tokenizer = AutoTokenizer.from_pretrained(f"{study.profile.model.source}/step100")
    entries = json.loads((place / "entries.json").read_text())
    first = {"paraphrase": 0, "once": 1}  # of the file, the first is the paraphrase set
    row: Any
    for row in table.itertuples():
        entry = entries[first[row.entry_set] + row.entry]
        texts = [entry["train_context"], *entry["paraphrases"]]
        ids = tokenizer(texts[row.passage])["input_ids"]
        assert read[row.step][row.row][: len(ids)].tolist() == ids
    # the same sequences without passages
    shown, read[:] = list(read), []
    do([control])
    assert len(control.read_table("exposures.csv")) == 0
    places = {(row.step, row.row) for row in table.itertuples()}
    for step, (one, two) in enumerate(zip(shown, read, strict=True)):
        same = [bool((a == b).all()) for a, b in zip(one, two, strict=True)]
        assert same == [(step, number) not in places for number in range(4)]
    # what is not shown as scheduled is no run
    monkeypatch.setattr(Injector, "apply", lambda self, batch, step: batch)
    other = continued.continued_runs(study_of(place, tmp_path, seeds=[6]), study.revisions[0])[0]
    with pytest.raises(KelibError, match="entries were not shown as scheduled"):
        perform(other)


def killed_in(run: Any, step: int) -> None:
    from kelib.training import Trainer

    forward = Trainer._loss

    def fatal(trainer: Trainer, ids: Any) -> Any:
        if trainer.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(trainer, ids)

    Trainer._loss = fatal  # type: ignore[method-assign]  # this process does nothing else
    perform(run)


def test_a_killed_run_goes_on_and_finds_the_same(
    place: Path, done: Trajectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kelib.training import Trainer

    study = study_of(place, tmp_path)
    continued.write_launch(study)
    run = continued.continued_runs(study, study.learning_revisions[0])[0]
    perform(run.inputs["text"])
    process = multiprocessing.get_context("fork").Process(target=killed_in, args=(run, 7))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL and not run.done
    states = run.partial / "learned" / "state"
    assert [p.name for p in states.iterdir() if not p.name.startswith(".")] == ["step0000006"]
    steps: list[int] = []
    share = Trainer._share

    def noted(trainer: Trainer, batch: np.ndarray) -> Any:
        steps.append(trainer.step)
        return share(trainer, batch)

    monkeypatch.setattr(Trainer, "_share", noted)
    perform(run)
    assert steps == [6, 7]
    whole = continued.continued_runs(done, done.learning_revisions[0])[0]
    assert run.digest == whole.digest
    for name in ("probes.csv", "questions.csv", "exposures.csv", "result.json"):
        assert (run.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    assert {path.suffix for path in run.folder.rglob("*")} == {".csv", ".json"}  # no weights


@pytest.mark.slow
def test_two_processes_find_what_one_finds(place: Path, done: Trajectory, tmp_path: Path) -> None:
    study = study_of(place, tmp_path, processes=2, parallel="fsdp2")
    continued.write_launch(study)
    run = continued.continued_runs(study, study.learning_revisions[0])[0]
    do([run])
    alone = continued.continued_runs(done, done.learning_revisions[0])[0]
    one, two = alone.read(), run.read()
    assert (one["processes"], two["processes"]) == (1, 2) and run.digest == alone.digest
    weights = [held["weights"] for held in two["bytes"]]
    assert weights == pytest.approx([one["bytes"][0]["weights"] / 2] * 2, rel=0.05)
    np.testing.assert_allclose(two["losses"], one["losses"], atol=1e-4)
    assert two["k"] == pytest.approx(one["k"], abs=1e-3)
    assert (run.read_table("exposures.csv")["shown"] == 1).all()


def test_bad_checkpoints_and_texts_are_refused(
    place: Path, model_of: Callable[[str], Any], tmp_path: Path
) -> None:
    from kelib.packing import save_tokenizer, train_tokenizer

    shutil.copytree(place / "checkpoints", tmp_path / "small")
    small = copy.deepcopy(model_of("llama"))
    small.resize_token_embeddings(300)
    small.save_pretrained(tmp_path / "small" / "step100")
    study = study_of(place, tmp_path / "data", tmp_path / "small")
    first = study.learning_revisions[0]
    for run in (continued.continued_runs(study, first)[0], continued.known_run(study, first)):
        with pytest.raises(KelibError, match=r"has token \d+, .* knows 300; pack (it|the text)"):
            do([run])
    shutil.copytree(place / "checkpoints", tmp_path / "other")
    save_tokenizer(train_tokenizer(SEEN[:40], 380), LENGTH, tmp_path / "other" / "step400")
    study = study_of(place, tmp_path / "data", tmp_path / "other")
    with pytest.raises(KelibError, match=r"step400 has another tokenizer than the first of learn"):
        do([continued.known_run(study, study.learning_revisions[1])])
    for changes, message in (
        ({"sequences": 5000}, r"the text gives \d+ sequences of 32 tokens, 5008 are wanted \(5000"),
        ({"sequence_length": 64}, "learning.sequence_length = 64 is beyond the window .* most 32"),
        ({"text": "nowhere.txt"}, "data: there is no file or folder .*/nowhere.txt; relative"),
    ):
        with pytest.raises(KelibError, match=message):
            perform(continued.text_run(study_of(place, tmp_path / "data", **changes)))
    missing = study_of(place, tmp_path, entries="no/such/folder").profile.learning
    assert missing is not None
    with pytest.raises(KelibError, match=r"there is no file or folder no/such/folder; bring"):
        continued.refuse_missing(missing)
    hub = study_of(place, tmp_path, entries="someone/entries").profile.learning
    assert hub is not None and hub.entries_path is None
    continued.refuse_missing(hub)


def test_what_the_named_files_hold_is_in_the_name_of_a_run(place: Path, tmp_path: Path) -> None:
    entries = tmp_path / "entries.json"
    shutil.copy(place / "entries.json", entries)

    def digest() -> str:
        study = study_of(place, tmp_path, entries=str(entries))
        return continued.known_run(study, study.learning_revisions[0]).digest

    before = digest()
    assert digest() == before
    entries.write_text(entries.read_text() + " ")
    assert digest() != before


def test_public_tasks_from_a_folder(place: Path, tmp_path: Path) -> None:
    item = {"support": "", "question": "Who keeps cats?", "correct_answer": "a person"}
    rows = [{**item, **{f"distractor{n}": f"town {n}" for n in (1, 2, 3)}} for _ in range(5)]
    (tmp_path / "tasks" / "sciq").mkdir(parents=True)
    lines = "\n".join(map(json.dumps, rows))
    (tmp_path / "tasks" / "sciq" / "test.jsonl").write_text(lines)
    data = str(tmp_path / "tasks")
    chosen = {"tasks": ["generated:known", "sciq"], "task_data": data, "task_limit": 3}
    study = study_of(place, tmp_path / "data", **chosen)
    run = continued.known_run(study, study.learning_revisions[0])
    do([run])
    table = run.read_table("questions.csv")
    assert (table["task"] == "sciq").sum() == 3 and table["task"].nunique() == 7
    by_task = table.groupby("task")["correct"].mean()
    assert run.read()["p"] == pytest.approx(by_task.mean()) and run.read()["chance"] == 0.25


# --- tables -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tables(done: Trajectory) -> tuple[pd.DataFrame, pd.DataFrame]:
    totals = pd.DataFrame(
        [
            (f"step{step}", "knowledge", "absolute", "generated:one", 5.0 + step, 0.1)
            for step in STEPS
        ],
        columns=["revision", "kind", "coefficient", "data", "entropy_nats", "standard_error"],
    )
    known = continued.known_table(done, totals)
    return known, continued.continual_table(done, known)


def test_tables_have_a_row_for_each_stage_and_run(
    done: Trajectory, tables: tuple[pd.DataFrame, pd.DataFrame]
) -> None:
    known, table = tables
    assert known["step"].tolist() == STEPS and known["entropy"].tolist() == [105.0, 405.0]
    assert len(table) == 4 and not table.duplicated([*MATCH, "injected"]).any()
    assert (table["seed"] == 0).all() and table["k_pt"].nunique() == 2
    gain = table["k_cl"] - table["k_pt"]
    np.testing.assert_allclose(table["acquisition"], gain / table["k_pt"].abs())
    above = (table["p_pt"] - table["p_cl"]) / (table["p_pt"] - 0.25)
    np.testing.assert_allclose(
        table["forgetting_over_chance"], above.where(table["p_pt"] > 0.25), rtol=1e-9
    )
    for name in ("k_pt", "k_cl", "acquisition", "p_pt", "p_cl", "forgetting"):
        low, high = table[f"{name}_low"], table[f"{name}_high"]
        assert table[name].between(low - 1e-6, high + 1e-6).all(), name
    injected, control = table[table["injected"]], table[~table["injected"]]
    assert control["k_injection"].isna().all()
    due = injected["k_cl"].to_numpy() - control["k_cl"].to_numpy()
    np.testing.assert_allclose(injected["k_injection"], due, atol=1e-5)
    # trained at all: the losses of the first and last update, and that on held-out text
    assert (table["train_loss_last"] < table["train_loss_first"]).all()
    assert (table["loss_domain_cl"] < table["loss_domain_pt"]).all()


def test_intervals_are_those_of_items_and_take_tasks_of_any_size(done: Trajectory) -> None:
    first = continued.known_run(done, done.learning_revisions[0])
    run = continued.continued_runs(done, done.learning_revisions[0])[0]
    probes, asked = (
        [one.read_table(f"{name}.csv") for one in (first, run)] for name in ("probes", "questions")
    )
    bounds = item_intervals(*probes, *asked)
    gain, change = gain_interval(*probes), accuracy_interval(*asked)
    width = gain.high - gain.low
    assert bounds["k_gain_low"] == pytest.approx(gain.low, abs=0.1 * width)
    assert bounds["k_gain_high"] == pytest.approx(gain.high, abs=0.1 * width)
    # inside tasks alone: no wider than over all questions
    assert bounds["p_change_high"] - bounds["p_change_low"] <= change.high - change.low + 0.02
    same = item_intervals(probes[0], probes[0], asked[0], asked[0])
    for name in ("k_gain", "acquisition", "p_change", "forgetting"):
        assert same[f"{name}_low"] == same[f"{name}_high"] == 0
    # one task has a single question, always won: it moves P by its share of the tasks, surely
    lost = pd.DataFrame({"task": ["a"] * 4 + ["b"], "item": [0, 1, 2, 3, 0]})
    before, after = lost.assign(correct=True), lost.assign(correct=[True] * 4 + [False])
    two = item_intervals(*probes, before, after)
    assert two["p_change_low"] == two["p_change_high"] == -0.5
    assert two["forgetting_low"] == 0.5
    with pytest.raises(KelibError, match="do not hold the same questions"):
        item_intervals(*probes, before, after.iloc[1:])


# --- cache ------------------------------------------------------------------------------------


def test_a_checkpoint_that_several_runs_share_stays_until_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, other = "a" * 40, "b" * 40
    for name in (commit, other):
        (tmp_path / name).mkdir()
    with pytest.raises(OSError, match="full"), held(commit, tmp_path):
        release(commit, tmp_path)
        release(other, tmp_path)
        assert (tmp_path / commit).exists() and not (tmp_path / other).exists()
        raise OSError("full")
    assert not (tmp_path / commit).exists()
    # what a killed process held is held no longer
    (tmp_path / commit).mkdir()
    (tmp_path / f"{commit}.held").touch()
    monkeypatch.setattr(fetching, "needed", lambda repo, commit: {"model.safetensors": 100})
    fetching.make_room([("me/tiny", commit), ("me/tiny", other)], tmp_path, 150, 1)
    release(commit, tmp_path)
    assert not (tmp_path / commit).exists()


def test_a_stage_of_the_hub_is_fetched_once_for_all_its_runs(
    place: Path, done: Trajectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hub_server import Hub

    lock, audits = tmp_path / "lock.yaml", tmp_path / "audit"
    with Hub() as hub:
        hub.asked_by_this_process(monkeypatch, tmp_path / "cache")
        monkeypatch.setattr(trajectory, "execute", lambda runs, *_: do(runs))  # in this process
        for step in (0, *STEPS):
            folder = place / "checkpoints" / f"step{step or 100}"
            files = {path.name: path.read_bytes() for path in folder.iterdir()}
            hub.put("me/tiny", f"step{step}", files)
        size = sum(map(len, files.values()))
        audit("me/tiny", lock, audits)
        hub.asked.clear()
        model = {"source": "me/tiny", "steps": [0, *STEPS], "accept": ["step0", "step100"]}
        local = study_of(place, tmp_path, control=False).profile.parameters
        values = local | {"model": model, "cache_gib": 1.5 * size / GIB}
        study = Trajectory(trajectory_from(values), tmp_path / "data", lock, audits)
        tables = measure_trajectory(study)
        whole = [path for method, path, span in hub.asked if method == "GET" and span is None]
    assert set(tables) == {*TABLES, *continued.TABLES}
    assert len(tables["continual"]) == len(tables["known"]) == 2 and len(tables["revisions"]) == 3
    assert len([path for path in whole if path.endswith("model.safetensors")]) == 3
    assert all(path.suffix == ".lock" for path in study.cache.iterdir())
    note = read_provenance(study.measurements / "continual.csv")
    assert note["runs"] == 4 and note["seeds"] == [0]
    # the numbers are those of the same weights in a folder
    for one, there in zip(study.learning_revisions, done.learning_revisions, strict=True):
        hub_run, local_run = (
            continued.continued_runs(*p)[0] for p in ((study, one), (done, there))
        )
        assert hub_run.digest != local_run.digest
        assert hub_run.read()["losses"] == local_run.read()["losses"]


# --- figure -----------------------------------------------------------------------------------


def test_panels_show_rates_before_and_intervals(
    tables: tuple[pd.DataFrame, pd.DataFrame], ax: Any
) -> None:
    known, table = tables
    lines = plots_continued.stage_lines(table, "k_cl", "k_pt")
    assert set(lines["line"]) == {"0.003", plots_continued.BEFORE} and len(lines) == 4
    names, ticks = plots_continued.rate_names(table), plots_continued.stage_names(known)
    assert names == {"0.003": "CL rate 0.003", "before": "before CL"} and ticks[100] == "100"
    plots_continued.stage_panel(lines, ax, names, ticks, "K", 2, zero=True)
    bars = [c for c in ax.collections if c.get_label() == "_items"]
    ends = np.array([s[:, 1] for c in bars for s in c.get_segments()])
    given = lines.sort_values("line")[["low", "high"]].to_numpy()
    np.testing.assert_allclose(np.sort(ends, axis=None), np.sort(2 * given, axis=None))
    low, high = ax.get_ylim()
    assert low < ends.min() and high > 0
    assert [label.get_text() for label in ax.get_xticklabels()] == ["100", "400"]
    told = plots_continued.stage_names(known.assign(tokens_seen=1e9, stage_label="1B tokens"))
    assert told[400] == "400\n1B tokens"


def test_entries_and_tasks_of_the_hub_are_pinned_to_a_commit(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    from hub_server import Hub
    from huggingface_hub import constants

    from kelib import hub_sources
    from kelib.fictional import load_fictional_knowledge

    monkeypatch.setattr(hub_sources, "LOCK", tmp_path / "lock.yaml")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    study = study_of(place, tmp_path, entries="me/entries", tasks=["sciq", "generated:facts"])
    content = (place / "entries.json").read_bytes()
    fewer = json.dumps(json.loads(content)[:1]).encode()

    def settings() -> Any:
        return continued.known_run(study, study.learning_revisions[0]).settings

    with Hub() as hub:
        hub.asked_by_this_process(monkeypatch, tmp_path / "cache")
        first = hub.put("me/entries", "main", {"entries.json": content})
        sciq = hub.put("allenai/sciq", "main", {"README.md": b"first"})
        pinned = settings()
        hub.put("me/entries", "main", {"entries.json": fewer})
        hub.put("allenai/sciq", "main", {"README.md": b"second"})
        assert settings() == pinned
        assert pinned["entries"] == f"me/entries@{first}"
        assert pinned["task_commits"] == {"sciq": sciq}
        wanted = load_fictional_knowledge(place / "entries.json", 1)
        assert load_fictional_knowledge(pinned["entries"], 1) == wanted
        assert len(load_fictional_knowledge("me/entries", 1)[0]) == 0  # what is there now
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        (tmp_path / "lock.yaml").unlink()
        with pytest.raises(KelibError, match=r"commit of entries me/entries is not in .*lock.yaml"):
            settings()

"""Checkpoints along pretraining: fetched, measured and released one by one, and resumed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import SEEN
from hub_server import Hub
from safetensors import safe_open

from kelib import catalogue, fetching, plots_trajectory
from kelib.__main__ import main
from kelib.errors import KelibError
from kelib.fetching import GIB, fetching_ahead, make_room, release
from kelib.runs import perform
from kelib.tables import read_provenance, read_table
from kelib.trajectory import Trajectory, measure_trajectory, revisions_in
from kelib.trajectory_profile import load_trajectory, trajectory_from, trajectory_profiles
from kelib.trajectory_tables import TABLES

REPO = "me/tiny"
STEPS = [0, 100, 200, 400]
VALUES: dict[str, Any] = {
    "trajectory": "tiny",
    "workers": 1,
    "seed": 0,
    "model": {"source": REPO, "steps": STEPS, "accept": ["step200"], "tokens_per_step": 1000},
    "data": ["generated:one"],
    "sequences": 64,
    "sequence_length": 16,
    "batch_size": 32,
    "definitions": ["absolute", "relu"],
    "loss_sequences": 8,
    "cache_gib": 1.0,
}
DO = """
import json, sys
from pathlib import Path
from kelib.audit import audit
from kelib.trajectory import Trajectory, measure_trajectory
from kelib.trajectory_profile import trajectory_from
home, values = Path(sys.argv[1]), json.loads(sys.argv[2])
lock, audits = home / "lock.yaml", home / "audit"
if not lock.exists():
    audit(values["model"]["source"], lock, audits)
measure_trajectory(Trajectory(trajectory_from(values), home / "data", lock, audits))
"""


# --- profiles --------------------------------------------------------------------------------


def test_every_trajectory_profile_loads_and_its_model_is_known() -> None:
    assert {"paper", "paper_7b", "paper_pythia", "pythia", "trajectory_smoke"} <= set(
        trajectory_profiles()
    )
    known = catalogue.catalogue()
    for name in trajectory_profiles():
        profile = load_trajectory(name)
        assert trajectory_from(profile.parameters).parameters == profile.parameters
        assert load_trajectory(name, {"workers": 7}).digest == profile.digest
        assert profile.model.is_generated or profile.model.source in known
    paper = load_trajectory("paper")
    assert (paper.sequences, paper.sequence_length) == (2048, 2048)
    assert {18_000, 118_000, 369_000, 738_000} < set(paper.model.steps)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"sequences": 100}, "sequences = 100 must be a multiple of 64, the jackknife blocks"),
        ({"cache_gib": 0.0}, "cache_gib = 0.0 must be above 0"),
        ({"model.dtype": "float16"}, "dtype = 'float16' must be one of bfloat16, float32"),
        ({"model.choice": "near"}, "choice = 'near' must be one of above, below, exact, nearest"),
        ({"model.steps": [1, 1]}, "steps = (1, 1) must be a list of distinct steps"),
        ({"model.step": [1]}, "unknown key model.step: did you mean model.steps?"),
    ],
)
def test_settings_that_cannot_be(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(KelibError, match=re.escape(message)) as caught:
        trajectory_from(VALUES, overrides)
    assert "\n" not in str(caught.value)


def test_a_profile_is_known_to_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "trajectory_smoke"]) == 0
    assert "model generated:llama" in capsys.readouterr().out
    with pytest.raises(KelibError, match=r"unknown trajectory profile 'smoke'.*paper, paper_7b, "):
        load_trajectory("smoke")


# --- the whole path, against a hub on this machine -------------------------------------------


def finished(runs: Path) -> list[Path]:
    """The notes of finished runs; one that is being finished has its note under another name."""
    return [path for path in runs.glob("*/run.json") if path.parent.suffix != ".partial"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, model_of: Callable[[str], Any]) -> Path:
    """Folders step0 to step400 of a Llama whose weights differ, as save_pretrained writes them."""
    import copy

    import torch

    from kelib.packing import save_tokenizer, train_tokenizer

    home = tmp_path_factory.mktemp("checkpoints")
    tokenizer = train_tokenizer(SEEN, 400)
    for step in STEPS:
        model = copy.deepcopy(model_of("llama"))
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for weight in model.parameters():
                noise = torch.randn(weight.shape, generator=generator)
                weight += 0.05 * noise
        model.save_pretrained(home / f"step{step}")
        save_tokenizer(tokenizer, 32, home / f"step{step}")
    return home


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, folders: Path) -> Iterator[SimpleNamespace]:
    """The trajectory, killed after its first checkpoint and done again by a second process, with
    room for two of four checkpoints.
    """
    home = tmp_path_factory.mktemp("trajectory")
    with Hub() as hub:
        for step in STEPS:
            files = {path.name: path.read_bytes() for path in (folders / f"step{step}").iterdir()}
            hub.put(REPO, f"step{step}", files)
        hub.put(REPO, "step300", {p.name: p.read_bytes() for p in (folders / "step200").iterdir()})
        size = sum(len(content) for content in files.values())
        values = VALUES | {"cache_gib": 2.6 * size / GIB}
        script = [sys.executable, "-c", DO, str(home), json.dumps(values)]
        environment = hub.environment(home / "hub") | {"KELIB_PROGRESS": "lines"}
        runs = home / "data" / "measurements" / "tiny" / "trajectory"
        with Watched(home / "data" / "checkpoints" / "tiny" / "fetched") as most:
            with (home / "log").open("w") as log:
                first = subprocess.Popen(
                    script, env=environment, stdout=log, stderr=log, start_new_session=True
                )
            until(lambda: first.poll() is not None or any(finished(runs)))
            os.killpg(first.pid, signal.SIGKILL)
            first.wait()
            kept = {path: path.read_bytes() for path in finished(runs)}
            assert kept, (home / "log").read_text()
            again = subprocess.run(
                script, env=environment, capture_output=True, text=True, check=False, timeout=300
            )
        assert again.returncode == 0, again.stderr
        # the audit asks for ranges alone
        whole = [path for method, path, span in hub.asked if method == "GET" and span is None]
        weights = [path for path in whole if path.endswith("model.safetensors")]
    yield SimpleNamespace(home=home, values=values, kept=kept, most=most, weights=weights)


class Watched:
    """How many checkpoints a cache held at most while the block ran, as ``.count``."""

    def __init__(self, cache: Path) -> None:
        self.cache, self.count, self.over = cache, 0, threading.Event()

    def __enter__(self) -> Watched:
        def watch() -> None:
            while not self.over.wait(0.005):
                names = os.listdir(self.cache) if self.cache.exists() else []
                held = {n.removesuffix(".part") for n in names if not n.endswith(".lock")}
                self.count = max(self.count, len(held))

        self.thread = threading.Thread(target=watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()


def until(holds: Callable[[], bool]) -> None:
    for _ in range(12_000):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("it took more than two minutes")


def study_of(done: SimpleNamespace, **overrides: Any) -> Trajectory:
    profile = trajectory_from(done.values, overrides)
    return Trajectory(profile, done.home / "data", done.home / "lock.yaml", done.home / "audit")


def test_tables_have_a_row_for_each_checkpoint_text_and_layer(done: SimpleNamespace) -> None:
    study = study_of(done)
    entropy, totals, texts, revisions = (
        read_table(study.measurements / f"{name}.csv") for name in TABLES
    )
    assert list(revisions["step"]) == STEPS
    assert list(revisions["tokens_seen"]) == [1000.0 * step for step in STEPS]
    assert revisions["commit"].str.fullmatch("[0-9a-f]{40}").all()
    counts = entropy.groupby(["kind", "coefficient"]).size().to_dict()
    two = 2 * len(STEPS)  # layers
    assert counts == {
        **{("knowledge", "absolute"): two, ("knowledge", "relu"): two},
        **{("attention", "absolute"): two, ("next_token", "absolute"): len(STEPS)},
    }
    assert (entropy["standard_error"] > 0).all()
    assert (entropy["entropy_nats"] <= entropy["bound_nats"] + 1e-9).all()
    whole = entropy.groupby(["revision", "kind", "coefficient"])["entropy_nats"].sum()
    given = totals.set_index(["revision", "kind", "coefficient"])["entropy_nats"]
    pd.testing.assert_series_equal(given.sort_index(), whole.sort_index(), check_names=False)
    assert texts["tokens_sha256"].nunique() == 1 and texts["loss_nats"].nunique() == len(STEPS)
    note = read_provenance(study.measurements / "entropy.csv")
    assert note["runs"] == len(STEPS) and set(note["inputs"]) == set(revisions["revision"])


def test_what_was_measured_before_the_kill_is_not_measured_again(done: SimpleNamespace) -> None:
    assert len(done.kept) < len(STEPS)
    assert all(path.read_bytes() == content for path, content in done.kept.items())
    # nothing is fetched twice but what the kill cut off
    assert len(STEPS) <= len(done.weights) <= len(STEPS) + 2


def test_no_more_lies_on_the_disk_than_the_bound_and_nothing_at_the_end(
    done: SimpleNamespace,
) -> None:
    assert done.most.count == 2  # one measured, one fetched ahead
    left = [path.name for path in study_of(done).cache.iterdir()]
    assert all(name.endswith(".lock") for name in left)


def test_settings_of_a_run_name_repository_and_commit(done: SimpleNamespace) -> None:
    study = study_of(done)
    for run, revision in zip(study.runs(), study.revisions, strict=True):
        settings = json.loads((run.folder / "run.json").read_text())["settings"]
        assert settings["repo"] == REPO and settings["commit"] == revision.commit
    assert {"workers", "cache_gib", "trajectory"}.isdisjoint(settings)


def test_the_same_as_measuring_the_local_folder(
    done: SimpleNamespace, folders: Path, tmp_path: Path
) -> None:
    import torch

    import kelib
    from kelib.model_import import generated_documents
    from kelib.pretrained import load_model, read_tokenizer
    from kelib.published_jobs import draw_sequences

    study = study_of(done)
    entropy = read_table(study.measurements / "entropy.csv")
    place = str(folders / "step100")
    _, tokenizer, end = read_tokenizer(place, None)
    rows = draw_sequences(generated_documents("generated:one"), tokenizer, end, 16, 64, 0)
    model = load_model(place, None, torch.float32, head=True)
    batches = [{"input_ids": rows[i : i + 32]} for i in (0, 32)]
    measured = kelib.measure_entropy(model, batches, uncertainty=True)
    part = entropy.query("step == 100 and kind == 'knowledge' and coefficient == 'absolute'")
    np.testing.assert_allclose(part["entropy_nats"], measured.knowledge_entropy, rtol=1e-6)
    np.testing.assert_allclose(part["standard_error"], measured.knowledge_entropy_error, rtol=1e-3)
    with safe_open(study.measurements / "coefficients-step100.safetensors", "np") as file:
        assert len(file.keys()) == 4  # two definitions, two layers, one text
        stored = file.get_tensor("generated:one/absolute/01")
    np.testing.assert_allclose(stored, measured.mean_coefficients[1], rtol=1e-5)
    # and through the same job, from a folder of folders
    model_of_folder = VALUES["model"] | {"source": str(folders), "steps": [100], "accept": []}
    local = Trajectory(trajectory_from(VALUES | {"model": model_of_folder}), tmp_path)
    (run,) = local.runs()
    perform(run)
    mine = run.read_table("entropy.csv")
    theirs = entropy[entropy["step"] == 100]
    np.testing.assert_allclose(mine["entropy_nats"], theirs["entropy_nats"], rtol=1e-6)


def test_a_bad_revision_is_refused_unless_accepted(done: SimpleNamespace) -> None:
    study = study_of(done, **{"model.accept": []})
    with pytest.raises(KelibError, match=r"calls bad: step200 \(same weights as step300\)"):
        measure_trajectory(study)
    assert [run.digest for run in study.runs()] == [run.digest for run in study_of(done).runs()]


def test_a_step_that_is_not_there_is_said(done: SimpleNamespace) -> None:
    with pytest.raises(KelibError, match=r"has no revision at step 150; the nearest are step100"):
        _ = study_of(done, **{"model.steps": [150]}).revisions
    nearest = study_of(done, **{"model.steps": [150], "model.choice": "above"})
    assert [revision.name for revision in nearest.revisions] == ["step200"]


# --- a folder of checkpoints -----------------------------------------------------------------


def test_names_in_a_folder_are_read_for_their_step(tmp_path: Path) -> None:
    for name in ("checkpoint-1000", "checkpoint-500", "step0000020", "last"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "logs").mkdir()
    values = VALUES | {"model": {"source": str(tmp_path)}}
    study = Trajectory(trajectory_from(values), tmp_path / "data")
    assert [r.name for r in study.revisions] == ["step0000020", "checkpoint-500", "checkpoint-1000"]
    before = [run.digest for run in study.runs()]
    (tmp_path / "checkpoint-500" / "config.json").write_text('{"a": 1}')
    after = [run.digest for run in Trajectory(study.profile, study.data).runs()]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]
    with pytest.raises(KelibError, match=r"holds no checkpoint whose name has a step, as step1000"):
        revisions_in(tmp_path / "logs")
    with pytest.raises(KelibError, match=r"model.steps is empty: give steps of me/other"):
        values = VALUES | {"model": {"source": "me/other"}}
        _ = Trajectory(trajectory_from(values), tmp_path).revisions


# --- the cache -------------------------------------------------------------------------------

A, B, C = "a" * 40, "b" * 40, "c" * 40
WANTED = [(REPO, A), (REPO, B)]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds 100 bytes of C; A and B have 100 bytes on the hub."""
    monkeypatch.setattr(fetching, "needed", lambda repo, commit: {"model.safetensors": 100})
    (tmp_path / C).mkdir()
    (tmp_path / C / "model.safetensors").write_bytes(b"x" * 100)
    return tmp_path


def test_where_all_have_room_they_stay(cache: Path) -> None:
    assert make_room(WANTED, cache, 300, 1) == 2
    release(C, cache)
    assert (cache / C).exists()
    assert make_room(WANTED, cache, 150, 1) == 1  # less room now: what is not wanted goes
    assert not (cache / C).exists()


def test_too_small_a_bound_or_disk_is_refused_first(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KelibError, match=r"2 checkpoint\(s\) of up to 9.31e-08 GiB must fit at on"):
        make_room(WANTED, cache, 199, 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=99))
    shutil.rmtree(cache / C)
    with pytest.raises(KelibError, match=r"raise cache_gib, free space, or lower workers"):
        make_room(WANTED, cache, 1e9, 1)
    with pytest.raises(KelibError, match=r"lacks 9.31e-10 GiB for a checkpoint of me/tiny"):
        fetching.fetch(REPO, A, cache)


def test_the_next_is_fetched_when_there_is_room_and_not_before(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []
    monkeypatch.setattr(fetching, "fetch", lambda repo, commit, cache: fetched.append(commit))
    measured = {A: False, B: False, C: False}
    queue = [(REPO, commit, lambda commit=commit: measured[commit]) for commit in (A, B, C)]
    with fetching_ahead(queue, cache, 2):
        until(lambda: fetched == [A, B])
        time.sleep(0.5)
        assert fetched == [A, B]
        measured[A] = True
        until(lambda: fetched == [A, B, C])
        measured[C] = True
    assert not (cache / C).exists()  # measured, so released


# --- figure ----------------------------------------------------------------------------------


def test_figures_show_shares_intervals_and_changes(ax: Any) -> None:
    rows = [(step, layer, 2.0 - 0.1 * step * layer) for step in (0, 1, 4) for layer in (0, 1)]
    entropy = pd.DataFrame(rows, columns=["step", "layer", "entropy_nats"])
    plots_trajectory.layer_map(entropy, ax, "step")
    np.testing.assert_allclose(ax.images[0].get_array(), [[0, 0, 0], [0, -0.1, -0.4]], atol=1e-12)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "1", "4"]
    ax.figure.clf()
    ax = ax.figure.subplots()
    totals = entropy.groupby("step", as_index=False)["entropy_nats"].sum()
    totals = totals.assign(bound_nats=5.0, standard_error=0.1, data="news")
    plots_trajectory.along(totals, ax, "step", "data")
    assert ax.get_xscale() == "symlog" and ax.get_xlabel() == "step"
    line, _, (bars,) = ax.containers[0]
    np.testing.assert_allclose(line.get_ydata(orig=False).astype(float), [4.0, 3.9, 3.6])
    np.testing.assert_allclose(np.ptp(bars.get_segments()[0], axis=0), [0, 2 * 0.196])
    (right,) = ax.child_axes
    ax.set_ylim(0, 5)
    ax.figure.canvas.draw()
    assert right.get_ylim() == pytest.approx((0, 100))

"""Runs appear whole or not at all, whatever dies in between; what is done is never done again."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from short import TINY, pretrained_study, with_corpus_alone

from kelib import jobs, runs
from kelib.code_table import code_digest
from kelib.config import load_profile
from kelib.errors import KelibError
from kelib.runs import Run, count_states, execute, perform, with_inputs
from kelib.study import Study

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[1]
KEPT = [*range(3, 60, 3)]  # many checkpoints: many moments at which a kill may hurt
CHANGES = {**TINY, "workers": 1, "pretraining.steps": 60, "pretraining.checkpoints": KEPT}
DO = """
import pickle, signal, sys
# tests that run in the background hand an ignored interrupt on to their children
signal.signal(signal.SIGINT, signal.default_int_handler)
from kelib.runs import execute, perform
runs = pickle.loads(open(sys.argv[2], "rb").read())
if sys.argv[1] == "execute":
    execute(runs, 1)
else:
    import torch
    torch.set_num_threads(1)
    for run in runs:
        perform(run)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A data folder with the corpus of the tiny study and its pretraining run, done undisturbed."""
    return pretrained_study(tmp_path_factory.mktemp("made"), CHANGES)


@pytest.fixture
def study(made, tmp_path):
    """The same study in a data folder of its own, where only the corpus is done."""
    return with_corpus_alone(made, tmp_path / "data")


@pytest.fixture
def start(tmp_path):
    """Start a process that performs or executes runs; ended at the end of the test."""
    started = []

    def begin(how, *todo):
        file = tmp_path / "runs.pickle"
        file.write_bytes(pickle.dumps(todo))
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", DO, how, str(file)]
        log = (tmp_path / "log.txt").open("w")
        started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()


def until(condition, what, seconds=90):
    """Wait for something that another process does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s in vain until {what}"
        time.sleep(0.01)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")  # an orphan may wait for an init process to collect it
    return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")


def pid_of(run):
    """The process that works on a run, None before one has begun."""
    lock = run.partial / "lock"
    return int(lock.read_text()) if lock.exists() and lock.read_text() else None


def weights(folder):
    """Bytes of every checkpoint of a pretraining run, and its losses."""
    files = {path.parent.name: path.read_bytes() for path in folder.glob("step*/model.safetensors")}
    return files, json.loads((folder / "losses.json").read_text())


def assert_same_run(found, expected):
    (files, losses), (expected_files, expected_losses) = weights(found), weights(expected)
    assert losses == expected_losses
    assert sorted(files) == sorted(expected_files) == [f"step{s:07d}" for s in [0, *KEPT, 60]]
    assert [step for step in files if files[step] != expected_files[step]] == []
    left = [path.name for path in found.rglob("*")]
    assert not [name for name in left if name.endswith(".tmp") or name.startswith("state")]
    assert not {"lock", "progress", "error.txt"} & set(left)


def bare(home, **settings):
    return Run("corpus", home, settings)


# --- digests ------------------------------------------------------------------------------------


def test_the_digest_follows_kind_settings_inputs_and_nothing_else(tmp_path):
    one = bare(tmp_path, seed=1)
    assert one.digest == bare(tmp_path, seed=1).digest == bare(tmp_path / "b", seed=1).digest
    files = dataclasses.replace(one, files={"sources": tmp_path})
    assert one.digest == files.digest  # where fetched text lies is no setting
    different = [
        one,
        bare(tmp_path, seed=2),
        bare(tmp_path, seed=1.0),
        bare(tmp_path, seed=1, more=None),
        Run("pretrain", tmp_path, {"seed": 1}),
        Run("corpus", tmp_path, {"seed": 1}, {"corpus": one}),
        Run("corpus", tmp_path, {"seed": 1}, {"corpus": bare(tmp_path, seed=2)}),
    ]
    assert len({run.digest for run in different}) == len(different)


# --- what is done, and in which order -------------------------------------------------------------


def test_runs_are_placed_after_what_they_rest_on(study):
    change = {"name": "resuscitate", "ratio": 0.5, "factor": 1.0}
    plain = study.continual_run(100, 60, 1e-3, 0)
    woken = study.continual_run(100, 60, 1e-3, 0, True, change)
    levels = with_inputs([woken, plain, plain, study.corpus_run(100)])
    assert [[run.kind for run in level] for level in levels] == [
        ["corpus"],
        ["pretrain"],
        ["continual", "entropy"] if levels[2][0] == plain else ["entropy", "continual"],
        ["continual"],
    ]
    assert levels[3] == [woken]
    assert with_inputs([]) == []


def test_what_is_done_is_left_alone(made):
    run = made.pretrain_run(100)
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}
    assert perform(run) == 0
    outcome = execute([run, made.corpus_run(100)], workers=1)
    assert (outcome.done, outcome.skipped, outcome.seconds) == (0, 2, 0)
    assert {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")} == before
    assert execute([], workers=1).skipped == 0


def test_a_finished_run_says_what_it_was(made):
    run = made.pretrain_run(100)
    note = run.note()
    assert note["settings"] == dict(run.settings)
    assert note["inputs"] == {"corpus": made.corpus_run(100).digest}
    assert (note["kind"], note["digest"], note["code"]) == (
        "pretrain",
        run.folder.name,
        code_digest("pretrain"),
    )
    assert {"python", "torch", "transformers", "numpy"} <= set(note["versions"])
    assert note["seconds"] > 0 and note["cpu_seconds"] > 0


def test_checkpoints_of_a_run_carry_their_origin(made):
    from kelib.checkpoints import load_checkpoint, read_note

    run = made.pretrain_run(100)
    for step in (0, 3, 60):
        note = read_note(run.folder / f"step{step:07d}")
        assert (note["step"], note["tokens"], note["seed"]) == (step, step * 4 * 32, 100)
        assert note["parent"] is None
        assert note["digest"] == run.settings["digest"]
        assert note["versions"] == jobs.versions()
    load_checkpoint(run.folder / "step0000060", run.settings["digest"])
    losses = run.read("losses.json")
    assert len(losses) == 60 and losses[-1] < losses[0] - 0.5  # it learned


def test_states_are_counted(made, study, tmp_path):
    done, missing = study.corpus_run(100), study.entropy_run(100, 0)
    failed, running = study.entropy_run(100, 3), study.entropy_run(100, 6)
    failed.partial.mkdir(parents=True)
    (failed.partial / "error.txt").write_text("no")
    running.partial.mkdir(parents=True)
    with (running.partial / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        counts = count_states([done, missing, failed, running, missing])
    assert counts == {"done": 1, "running": 1, "failed": 1, "missing": 2}
    assert running.state() == "missing"  # who held the lock is gone: it was interrupted
    assert count_states([]) == dict.fromkeys(counts, 0)


def test_reading_a_run_that_is_not_done_is_refused(study, made):
    run = study.entropy_run(100, 3)
    message = rf"entropy run {run.digest} is missing: run its stage first"
    with pytest.raises(KelibError, match=message):
        run.read()
    with pytest.raises(KelibError, match=r"nothing.json cannot be read; delete that folder"):
        made.pretrain_run(100).read("nothing.json")


def test_a_folder_without_its_note_is_no_run(study, made):
    run = study.corpus_run(100)
    (run.folder / "run.json").unlink()
    assert not run.done
    with pytest.raises(KelibError, match="is missing"):
        run.read("manifest.json")


# --- interruptions --------------------------------------------------------------------------------


def test_kills_at_random_moments_change_no_bit(made, study, start):
    run = study.pretrain_run(100)
    seed = random.randrange(10**6)
    print("delays drawn from", seed)  # shown if the test fails
    dice = random.Random(seed)
    for _ in range(2):
        process = start("perform", run)
        steps = len(list(run.partial.glob("step*")))
        grown = lambda n=steps: len(list(run.partial.glob("step*"))) > n or run.done  # noqa: E731
        until(grown, "a checkpoint is written")
        time.sleep(dice.random() * 0.25)
        process.kill()
        process.wait()
        if run.done:
            break
        assert not run.folder.exists()
        assert run.state() == "missing"
        (run.partial / ".step0000099.1.tmp").mkdir(
            exist_ok=True
        )  # as a kill inside a save leaves it
    perform(run)
    assert_same_run(run.folder, made.pretrain_run(100).folder)


def test_workers_end_with_their_parent_and_the_next_call_completes(made, study, start):
    run = study.pretrain_run(100)
    parent = start("execute", run)
    until(lambda: (run.partial / "step0000003").exists(), "the worker trains")
    worker = pid_of(run)
    assert worker != parent.pid and alive(worker)
    assert run.state() == "running"
    parent.kill()
    parent.wait()
    until(lambda: not alive(worker), "the orphan ends", 30)
    # its other threads may hold the lock for a moment after its main one is gone
    until(lambda: run.state() == "missing", "the lock is free", 10)
    assert not run.folder.exists()
    left = len(list(run.partial.glob("step*")))
    assert 0 < left < len(KEPT) + 2  # it really was in the middle
    perform(run)
    assert_same_run(run.folder, made.pretrain_run(100).folder)


def test_an_interrupt_ends_the_workers_and_drops_the_queue(study, start):
    long = load_profile("smoke", {**CHANGES, "pretraining.steps": 5000})
    queue = [
        Study(dataclasses.replace(long, pretraining=plan), study.data).pretrain_run(100)
        for plan in (long.pretraining, dataclasses.replace(long.pretraining, learning_rate=1e-3))
    ]
    parent = start("execute", *queue)
    until(lambda: any(map(pid_of, queue)), "the worker begins")
    worker = next(filter(None, map(pid_of, queue)))
    parent.send_signal(signal.SIGINT)
    assert parent.wait(30) != 0
    until(lambda: not alive(worker), "the worker ends", 30)
    assert sum(run.partial.exists() for run in queue) == 1
    assert not any(run.done for run in queue)


def test_a_worker_that_the_system_kills_is_reported_with_its_run(made, study, monkeypatch):
    """What lack of memory does. The call ends, names the run, and the run resumes afterwards."""
    run, other = study.pretrain_run(100), study.entropy_run(100, 0)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    killed = []

    def kill():
        until(lambda: (run.partial / "step0000003").exists(), "the worker trains")
        killed.append(pid_of(run))
        os.kill(killed[0], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    message = (
        rf"^pretrain {run.digest}: its worker process was ended by the system \(exit code -9; "
        r".*lack of memory\): free memory or lower workers, then run again; .* finished is kept$"
    )
    with pytest.raises(KelibError, match=message):
        execute([other], workers=1)
    thread.join()
    assert not alive(killed[0])
    assert os.environ["OMP_NUM_THREADS"] == "7"  # left as it was found
    assert "MALLOC_TRIM_THRESHOLD_" not in os.environ
    assert run.state() == "failed" and not run.folder.exists()
    assert "lack of memory" in (run.partial / "error.txt").read_text()
    perform(run)
    assert_same_run(run.folder, made.pretrain_run(100).folder)


def test_workers_that_cannot_start_are_explained(study, tmp_path):
    """A script without the main guard: every worker would run it again, and Python refuses that."""
    (tmp_path / "runs.pickle").write_bytes(pickle.dumps([study.pretrain_run(100)]))
    script = tmp_path / "script.py"
    script.write_text(
        "import pickle\nfrom kelib.runs import execute\n"
        f"runs = pickle.loads(open({str(tmp_path / 'runs.pickle')!r}, 'rb').read())\n"
        "execute(runs, 1)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "the worker processes ended before they began a run (exit codes 1)" in last
    assert "under if __name__ == '__main__'" in last


# --- failures -------------------------------------------------------------------------------------


def test_a_failing_run_is_reported_and_the_others_are_finished(study, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("KELIB_PROGRESS", "lines")
    few = dataclasses.replace(study.profile.corpus, domain=(str(tmp_path / "nowhere"),))
    bad = Study(dataclasses.replace(study.profile, corpus=few), study.data).corpus_run(100)
    short = dataclasses.replace(
        study.profile.pretraining, steps=3, checkpoints=(), optimizer_states=()
    )
    quick = Study(dataclasses.replace(study.profile, pretraining=short), study.data)
    good = quick.corpus_run(100)
    assert not good.done

    with pytest.raises(KelibError) as caught:
        execute([bad, good], workers=1, title="texts")
    first, second = str(caught.value).splitlines()
    assert first == "1 of 2 runs failed; the others are kept."
    assert second.startswith(f"corpus {bad.digest}: ") and "nowhere" in second
    assert good.done and not bad.done and not bad.folder.exists()
    assert count_states([bad, good]) == {"done": 1, "running": 0, "failed": 1, "missing": 0}
    assert (bad.partial / "error.txt").read_text() in second
    assert "texts: corpus: 2.0 of 2" in capfd.readouterr().out
    outcome = execute([good], workers=1)
    assert (outcome.done, outcome.skipped) == (0, 1)


def test_a_loss_that_is_not_finite_keeps_what_was_saved_and_nothing_worse(study):
    from kelib.checkpoints import load_checkpoint

    plan = dataclasses.replace(study.profile.pretraining, learning_rate=1e36)
    wild = Study(dataclasses.replace(study.profile, pretraining=plan), study.data)
    run = wild.pretrain_run(100)
    with pytest.raises(KelibError, match=r"loss is (nan|inf) at step \d+ of 60 .*1e\+36"):
        perform(run)
    assert not run.folder.exists()
    kept = [path.name for path in run.partial.glob("step*")]
    assert kept == ["step0000000"]  # no checkpoint of the weights that gave no loss
    untrained, _ = load_checkpoint(run.partial / "step0000000")
    assert all(bool(p.isfinite().all()) for p in untrained.parameters())


def test_a_broken_state_is_refused_with_its_file(study, made):
    run = study.pretrain_run(100)
    run.partial.mkdir(parents=True)
    (run.partial / jobs.STATE).write_bytes(b"half a state")
    with pytest.raises(
        KelibError, match=rf"{jobs.STATE} is not a state of this run .*; delete it$"
    ):
        perform(run)
    (run.partial / jobs.STATE).unlink()
    perform(run)
    assert_same_run(run.folder, made.pretrain_run(100).folder)


def test_a_run_goes_on_from_checkpoints_that_are_as_it_saved_them(study, made):
    class Stopped(Exception):
        pass

    def stop(share):
        if share > 0.6:
            raise Stopped

    run = study.pretrain_run(100)
    run.partial.mkdir(parents=True)
    inputs = {name: before.folder for name, before in run.inputs.items()}
    with pytest.raises(Stopped):
        jobs.pretrain(run.settings, inputs, run.partial, stop)
    weights = sorted(run.partial.glob("step*"))[1] / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    where = re.escape(str(weights))
    with pytest.raises(KelibError, match=rf"{where} has sha256 .*delete .*partial and run again$"):
        perform(run)
    weights.write_bytes(whole)
    perform(run)
    assert_same_run(run.folder, made.pretrain_run(100).folder)


def test_an_impossible_home_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    run = bare(tmp_path / "file" / "corpus", seed=1)
    with pytest.raises(
        KelibError, match=r"cannot read or write .*file/corpus.*; free space or"
    ) as e:
        perform(run)
    assert "\n" not in str(e.value)
    assert run.state() == "missing"


def test_a_full_disk_is_one_clear_line_and_no_run(study, made):
    run = study.pretrain_run(100)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (20_000, before[1])
    )  # a writer cannot tell them apart
    try:
        with pytest.raises(
            KelibError, match=r"cannot read or write .*too large.*; free space or"
        ) as e:
            perform(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(e.value)
    assert not run.folder.exists()
    perform(run)
    assert_same_run(run.folder, made.pretrain_run(100).folder)


# --- two writers ----------------------------------------------------------------------------------


def test_a_lock_keeps_a_second_writer_out(study, made):
    run = study.pretrain_run(100)
    run.partial.mkdir(parents=True)
    with (run.partial / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("4321")
        lock.flush()
        message = rf"{run.digest}.partial is being written by another process \(pid 4321\); wait"
        with pytest.raises(KelibError, match=message):
            perform(run)
        seconds, reason = runs.attempt(run)
        assert seconds == 0 and "pid 4321" in reason
        assert run.state() == "running"  # the refused one did not mark the other's run as failed
        assert [path.name for path in run.partial.iterdir()] == ["lock"]
    perform(run)
    assert_same_run(run.folder, made.pretrain_run(100).folder)


def test_a_writer_that_comes_second_finds_the_run_done(study, made):
    run = study.pretrain_run(100)
    run.partial.mkdir(parents=True)
    spent = []
    second = threading.Thread(target=lambda: spent.append(perform(run)))
    with (run.partial / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second.start()
        time.sleep(0.1)  # it waits for the lock now
        shutil.copytree(made.pretrain_run(100).folder, run.folder)
    second.join()
    assert spent == [0]
    assert run.done and not run.partial.exists()
    assert_same_run(run.folder, made.pretrain_run(100).folder)

"""Runs as jobs: the script that Slurm gets, and what becomes of jobs that are stopped or killed.

Slurm itself is played by shell scripts in the PATH, which start each task of an array as a process
of this machine and put it back into the queue when asked to.
"""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import stat
import sys
import threading
import time
from pathlib import Path

import pytest
from short import TINY, pretrained_study, with_corpus_alone

from kelib import cluster
from kelib.cluster import COMMANDS, Cluster, Job, do_level, load_cluster, open_executor
from kelib.config import load_profile, repository_root
from kelib.errors import KelibError
from kelib.progress import Progress
from kelib.runs import execute
from kelib.study import Study

pytestmark = pytest.mark.usefixtures("one_thread")

GOLDEN = Path(__file__).parent / "goldens" / "slurm_array.sh"
SETTINGS = Cluster(
    minutes=5,
    memory_gb=3,
    cpus=1,
    parallel=7,
    requeues=1,
    warning_seconds=20,
    partition="short",
    account="physics",
    setup=("module load python",),
)
CHANGES = {
    **TINY,
    "pretraining.steps": 120,
    "pretraining.checkpoints": [*range(3, 120, 3)],
    "pretraining.optimizer_states": [],
}
SLURM = {
    "sbatch": """
cp "$1" "$HOME_OF_SLURM/script.sh"
echo "Submitted batch job 4242"
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\)%.*/\\1/p' "$1")
for task in $(seq 0 "$last"); do task "$task" > /dev/null 2>&1 & done
""",
    "task": """
export SLURM_JOB_ID=$((4242 + $1)) SLURM_ARRAY_JOB_ID=4242 SLURM_ARRAY_TASK_ID=$1 SLURM_PROCID=0
echo RUNNING > "$HOME_OF_SLURM/state-$1"
while :; do
  bash "$HOME_OF_SLURM/script.sh" && state=COMPLETED || state=OUT_OF_MEMORY
  rm "$HOME_OF_SLURM/requeue-$1" || break
done
echo "$state" > "$HOME_OF_SLURM/state-$1"
""",
    "srun": """
while case $1 in --*) ;; *) false;; esac; do
  case $1 in
    --output) output=$2; shift 2;;
    --error) error=$2; shift 2;;
    *) shift;;
  esac
done
name() { echo "$1" | sed "s/%A_%a/4242_$SLURM_ARRAY_TASK_ID/g; s/%t/0/g"; }
mkdir -p "$(dirname "$(name "$output")")"
exec "$@" >> "$(name "$output")" 2>> "$(name "$error")"
""",
    "scontrol": 'touch "$HOME_OF_SLURM/requeue-${2#4242_}"',
    "sacct": """
echo "JobID|State|NodeList"
for file in "$HOME_OF_SLURM"/state-*; do echo "4242_${file##*-}|$(cat "$file")|here"; done
""",
    "scancel": "exit 1",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny study whose corpus is built and whose pretraining is done undisturbed."""
    return pretrained_study(tmp_path_factory.mktemp("made"), CHANGES)


@pytest.fixture
def study(made, tmp_path):
    """The same study in a folder where only the corpus is done."""
    return with_corpus_alone(made, tmp_path / "data")


@pytest.fixture
def settings(tmp_path):
    return dataclasses.replace(SETTINGS, logs=str(tmp_path / "jobs"))


def install(commands, folder, monkeypatch):
    folder.mkdir()
    for name, text in commands.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}")
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HOME_OF_SLURM", str(folder))
    monkeypatch.setenv("PYTHONPATH", str(repository_root()))  # jobs import this very kelib
    return folder


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """The folder of a cluster of one machine, its commands in the PATH."""
    from submitit.slurm.slurm import SlurmJob

    monkeypatch.setattr(SlurmJob, "_results_timeout_s", 1)  # files appear at once here
    return install(SLURM, tmp_path / "slurm", monkeypatch)


def other(study, rate):
    """Pretraining of the study at another rate."""
    plan = dataclasses.replace(study.profile.pretraining, learning_rate=rate)
    return Study(dataclasses.replace(study.profile, pretraining=plan), study.data).pretrain_run(100)


def signal_when_begun(runs, script):
    """Send each run's process its signal, once, after it has kept some checkpoints; None stands for
    the signal that the script asks Slurm to send before the time is over."""

    def watch():
        left, end = list(runs), time.monotonic() + 300
        while left and time.monotonic() < end:
            for run, number in tuple(left):
                if (run.partial / "step0000006").exists():
                    if number is None:
                        name = re.search(r"--signal=(\w+)@20", script.read_text())[1]
                        number = signal.Signals[f"SIG{name}"]
                    os.kill(int((run.partial / "lock").read_text()), number)
                    left = [pair for pair in left if pair[0].digest != run.digest]
            time.sleep(0.01)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def weights(run):
    return {p.parent.name: p.read_bytes() for p in run.folder.glob("step*/model.safetensors")}


# --- the settings -------------------------------------------------------------------------------


def test_the_committed_settings_are_valid_and_other_files_are_refused_by_key(tmp_path):
    assert load_cluster().minutes > 0
    path = tmp_path / "cluster.yaml"
    for text, message in (
        ("minutes: 5\nmemory: 3", r"unknown key cluster.memory: did you mean cluster.memory_gb\?"),
        ("minutes: 5", r"missing key cluster.memory_gb: add it"),
        ("minutes: two\nmemory_gb: 3", r"cluster.minutes = 'two' must be of type int"),
        ("minutes: 0\nmemory_gb: 3", r"cluster.minutes = 0 must be at least 1"),
        ("minutes: 2\nmemory_gb: 3", r"cluster.warning_seconds = 120 must be below the 2 minutes"),
        ("[5, 3]", r"cluster.yaml must be a mapping"),
    ):
        path.write_text(text)
        with pytest.raises(KelibError, match=message):
            load_cluster(path)
    path.unlink()
    with pytest.raises(KelibError, match=r"cannot read .*cluster.yaml: No such file"):
        load_cluster(path)


def test_where_runs_are_done_is_part_of_the_profile_and_of_no_digest():
    here, there = load_profile("smoke"), load_profile("smoke", {"executor": "slurm"})
    assert (here.executor, there.executor) == ("local", "slurm")
    assert here.digest == there.digest and here.parameters == there.parameters
    with pytest.raises(KelibError, match=r"executor = 'pbs' must be one of local, slurm"):
        load_profile("smoke", {"executor": "pbs"})
    with pytest.raises(KelibError, match=r"executor = 'pbs' must be one of local, slurm"):
        execute([], 1, executor="pbs")


def test_a_machine_without_slurm_is_told_so(settings, study, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(cluster, "load_cluster", lambda: settings)
    message = (
        r"executor = 'slurm', but this machine has no sacct, sbatch, .*: start this on a login"
    )
    with pytest.raises(KelibError, match=message):
        execute([study.pretrain_run(100)], 1, executor="slurm")
    # nothing to do asks for nothing
    assert execute([study.corpus_run(100)], 1, executor="slurm").skipped == 1


def test_a_missing_submitit_is_named_with_its_extra(settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(KelibError, match=r"needs the package submitit.*\.\[cluster\]"):
        open_executor(settings)


def test_what_sbatch_refuses_is_passed_on(settings, study, monkeypatch, tmp_path):
    refusal = "echo 'sbatch: error: invalid partition specified: short' >&2; exit 1"
    install(dict.fromkeys(COMMANDS, refusal), tmp_path / "slurm", monkeypatch)
    runs = [study.pretrain_run(100), other(study, 1e-3)]
    message = r"did not take the jobs \(.*invalid partition specified: short.*\); correct noteb"
    with pytest.raises(KelibError, match=message):
        do_level(runs, settings, Progress("test", 2))


# --- jobs ---------------------------------------------------------------------------------------


def test_a_stopped_job_goes_on_and_a_killed_one_is_named(
    made, study, settings, slurm, monkeypatch, capsys
):
    monkeypatch.setattr(cluster, "load_cluster", lambda: settings)
    monkeypatch.setattr(cluster, "POLL", 0.1)
    monkeypatch.setenv("KELIB_PROGRESS", "lines")
    stopped, killed = study.pretrain_run(100), other(study, 1e-3)
    signals = [(stopped, None), (killed, signal.SIGKILL)]  # a time limit, and a lack of memory
    thread = signal_when_begun(signals, slurm / "script.sh")
    with pytest.raises(KelibError) as caught:
        execute([stopped, killed, study.corpus_run(100)], 1, "jobs", executor="slurm")
    thread.join()
    first, second = str(caught.value).splitlines()
    assert first == "1 of 2 runs failed; the others are kept."
    assert second.startswith(f"pretrain {killed.digest}: its job 4242_1 ended without a result")
    assert "(state OUT_OF_MEMORY)" in second and "memory_gb" in second
    assert killed.state() == "failed" and not killed.folder.exists()
    assert "2.0 of 2" in capsys.readouterr().out
    # the other was told to stop, queued itself again, and ended where an undisturbed run does
    log = (Path(settings.logs) / "4242_0" / "4242_0_0_log.err").read_text()
    log += (Path(settings.logs) / "4242_0" / "4242_0_0_log.out").read_text()
    assert "Requeued job 4242_0 (0 remaining timeouts)" in log
    assert stopped.done and weights(stopped) == weights(made.pretrain_run(100))
    assert stopped.read("losses.json") == made.pretrain_run(100).read("losses.json")

    script = (slurm / "script.sh").read_text()
    for place, name in ((settings.logs, "LOGS"), (sys.executable, "PYTHON")):
        script = script.replace(place, name)
    assert script == GOLDEN.read_text(), (
        "submitit writes another script than the golden: look at the difference, then replace "
        f"{GOLDEN.name} by it"
    )


def test_submitit_on_local_processes_does_the_same_run(made, study, settings, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(repository_root()))
    monkeypatch.setattr(cluster, "POLL", 0.1)
    run = study.pretrain_run(100)
    ((found, seconds, reason),) = do_level([run], settings, Progress("test", 1), system="local")
    assert (found, reason) == (run, "") and seconds > 0
    assert weights(run) == weights(made.pretrain_run(100))


def test_a_job_says_why_its_run_failed_and_when_it_was_given_up(study, monkeypatch):
    from submitit.core.utils import UncompletedJobError

    run = study.pretrain_run(100)

    def refuse(run):
        raise KelibError("no space left")

    monkeypatch.setattr(cluster, "perform", refuse)
    assert Job()(run, 1) == (0.0, "no space left")

    def give_up(run):
        raise UncompletedJobError("Job not requeued because: timed-out too many times.")

    monkeypatch.setattr(cluster, "perform", give_up)
    seconds, reason = Job()(run, 1)
    assert seconds == 0 and re.match(r"its job reached its time limit once more than", reason)
    again = Job().checkpoint(run, 3)
    assert isinstance(again.function, Job) and again.args == (run, 3)


def test_a_run_that_does_not_appear_here_is_a_failure(study, settings, monkeypatch):
    class Finished:
        job_id = "4242"

        def done(self):
            return True

        def result(self):
            return 3.0, ""

    class Executor:
        def map_array(self, work, runs, threads):
            return [Finished() for _ in runs]

    monkeypatch.setattr(cluster, "open_executor", lambda settings, system: Executor())
    monkeypatch.setattr(cluster, "PATIENCE", 0.0)
    runs = [study.pretrain_run(100), study.corpus_run(100)]
    unseen, seen = do_level(runs, settings, Progress("test", 2))
    assert seen == (runs[1], 3.0, "")
    assert unseen[:2] == (runs[0], 0.0) and "on a file system that the nodes share" in unseen[2]


def test_an_interrupt_cancels_the_jobs(study, settings, monkeypatch):
    cancelled = []

    class Waiting:
        def __init__(self, name):
            self.name = name

        def done(self):
            return False

        def cancel(self, check):
            cancelled.append(self.name)

    class Executor:
        def map_array(self, work, runs, threads):
            return [Waiting(name) for name in "ab"]

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(cluster, "open_executor", lambda settings, system: Executor())
    monkeypatch.setattr(cluster.time, "sleep", interrupt)
    runs = [study.pretrain_run(100), other(study, 1e-3)]
    with pytest.raises(KeyboardInterrupt):
        do_level(runs, settings, Progress("test", 2))
    assert cancelled == ["a", "b"]


def test_the_script_asks_for_accelerators_where_the_settings_do(settings, slurm):
    chosen = dataclasses.replace(settings, gpus=2, constraint="h100", qos="long")
    parameters = open_executor(chosen).parameters
    assert parameters["gpus_per_node"] == 2
    assert (parameters["constraint"], parameters["qos"]) == ("h100", "long")
    assert "gpus_per_node" not in open_executor(settings).parameters

"""Runs as jobs of a Slurm cluster, handed over by ``submitit``.

The runs of a level become one array of jobs. A job does what a local worker does: it calls
:func:`kelib.runs.perform`, whose folder resumes, so a job that reaches its time limit, or has to
make way, is queued again and goes on from the last state of its run. The process that submits waits
and shows progress; when it is interrupted, so are its jobs. Nodes and that process must see the
same files, environment included. Settings stand in ``notebooks/params/cluster.yaml``.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any

from kelib.config import repository_root
from kelib.errors import KelibError, listing
from kelib.progress import Progress
from kelib.run import Run
from kelib.runs import Attempts, attempt, note_failure, perform, read_progress
from kelib.schema import at_least, build, read_yaml, require
from kelib.workers import prepare_process, worker_environment

COMMANDS = ("sbatch", "srun", "sacct", "scontrol", "scancel")  # what submitit calls
POLL = 1.0  # seconds between two looks at the jobs
PATIENCE = 60.0  # seconds until a shared file system shows what a node has written


@dataclasses.dataclass(frozen=True)
class Cluster:
    """What every job asks for. None: what the cluster gives unasked."""

    minutes: int  # time limit of a job; a run that takes longer goes on in the next
    memory_gb: int
    cpus: int = 1  # also the threads of a run
    gpus: int = 0
    parallel: int = 64  # jobs of an array that run at once
    requeues: int = 10  # times that a job which reached its limit is queued again
    warning_seconds: int = 120  # between the signal to stop and the end of a job
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    setup: tuple[str, ...] = ()  # lines of shell before a job, such as "module load cuda"
    logs: str = "data/measurements/jobs"  # scripts and logs, from the repository's root

    def __post_init__(self) -> None:
        at_least(self, minutes=1, memory_gb=1, cpus=1, gpus=0, parallel=1, requeues=0)
        at_least(self, warning_seconds=1)
        require(
            self.warning_seconds < 60 * self.minutes,
            "cluster.warning_seconds",
            self.warning_seconds,
            f"below the {self.minutes} minutes of a job",
        )


def load_cluster(path: Path | None = None) -> Cluster:
    """The settings in ``notebooks/params/cluster.yaml``, or in ``path``.

    Raises KelibError for a file that is missing or no mapping, and for an unknown, missing or
    mistyped key, naming the valid ones.
    """
    path = path or repository_root() / "notebooks" / "params" / "cluster.yaml"
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise KelibError(f"{path.name} must be a mapping, such as {{minutes: 240, memory_gb: 16}}")
    settings: Cluster = build(Cluster, values, "cluster")
    logs = Path(settings.logs)  # by its name: a folder inside may be a link to another disk
    inside = not logs.is_absolute() and ".." not in logs.parts
    require(inside, "cluster.logs", settings.logs, "a folder inside the repository, without '..'")
    return settings


class Job:
    """What submitit runs on a node, and again after the job was stopped."""

    def __call__(self, run: Run, threads: int) -> tuple[float, str]:
        prepare_process(threads)
        return attempt(run, _perform)

    def checkpoint(self, run: Run, threads: int) -> Any:
        """The submission that takes this one's place: the same, as the folder of a run resumes."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(Job(), run, threads)


def _perform(run: Run) -> float:
    """:func:`kelib.runs.perform`, out of which submitit raises when it gives up a job."""
    from submitit.core.utils import UncompletedJobError

    try:
        return perform(run)
    except UncompletedJobError as error:
        raise KelibError(
            "its job reached its time limit once more than cluster.requeues allows; raise minutes "
            "or requeues, then run again: it goes on from its last state"
        ) from error


def open_executor(settings: Cluster, system: str = "slurm") -> Any:
    """submitit's executor with these settings; ``system`` may also be one of its stand-ins for a
    cluster, ``local`` (processes here) or ``debug`` (this process).

    Raises KelibError if submitit is not installed, or this machine has no Slurm.
    """
    try:
        import submitit
    except ImportError as error:
        raise KelibError(
            "executor = 'slurm' needs the package submitit, which is not installed; install the "
            "extra cluster (pip install '.[cluster]'), or set executor to local"
        ) from error
    missing = [command for command in COMMANDS if shutil.which(command) is None]
    if system == "slurm" and missing:
        raise KelibError(
            f"executor = 'slurm', but this machine has no {listing(missing)}: start this on a "
            "login node of a Slurm cluster, or set executor to local"
        )
    executor = submitit.AutoExecutor(
        repository_root() / settings.logs / "%j",
        cluster=system,
        **{f"{kind}_max_num_timeout": settings.requeues for kind in ("slurm", "local")},
    )
    optional = {"slurm_setup": list(settings.setup) or None}
    for name in ("partition", "account", "qos", "constraint"):
        optional[f"slurm_{name}"] = getattr(settings, name)
    executor.update_parameters(
        name="kelib",
        timeout_min=settings.minutes,
        mem_gb=settings.memory_gb,
        nodes=1,
        tasks_per_node=1,
        cpus_per_task=settings.cpus,
        slurm_array_parallelism=settings.parallel,
        slurm_signal_delay_s=settings.warning_seconds,
        **({"gpus_per_node": settings.gpus} if settings.gpus else {}),
        **{name: value for name, value in optional.items() if value is not None},
    )
    return executor


def do_level(
    missing: list[Run], settings: Cluster, bar: Progress, system: str = "slurm"
) -> Attempts:
    """Do runs that do not rest on each other, as jobs; what :func:`kelib.workers.do_level` is for
    local processes.

    Raises KelibError as :func:`open_executor`, and if the cluster does not take the jobs.
    """
    executor = open_executor(settings, system)
    with worker_environment(settings.cpus):  # which Slurm hands on to the jobs
        try:
            threads = [settings.cpus] * len(missing)
            waiting = dict(zip(executor.map_array(Job(), missing, threads), missing, strict=True))
        except RuntimeError as error:  # as submitit reports what sbatch said
            reason = " ".join(str(error).split())
            raise KelibError(
                f"the cluster did not take the jobs ({reason}); correct "
                "notebooks/params/cluster.yaml"
            ) from error
    done: Attempts = []
    try:
        while waiting:
            for job in [job for job in waiting if job.done()]:
                done.append((waiting[job], *_ended(job, waiting[job])))
                del waiting[job]
            bar.show(len(done) + sum(map(read_progress, waiting.values())))
            time.sleep(POLL if waiting else 0)
    except BaseException:
        for job in waiting:
            job.cancel(check=False)
        raise
    return done


def _ended(job: Any, run: Run) -> tuple[float, str]:
    """(seconds, why it failed) of a job that is over."""
    try:
        seconds, reason = job.result()
        if reason or _appears(run):
            return float(seconds), str(reason)
        return 0.0, (
            f"its job {job.job_id} finished, but {run.folder} does not appear here: keep data on a "
            "file system that the nodes share with this machine"
        )
    except RuntimeError:  # no result: the system ended it
        if run.done:
            return 0.0, ""
        reason = (
            f"its job {job.job_id} ended without a result (state {job.state}), see "
            f"{job.paths.stderr}; give it more memory_gb, minutes or requeues, then run again; "
            "what is finished is kept"
        )
        note_failure(run, reason)
        return 0.0, reason


def _appears(run: Run) -> bool:
    end = time.monotonic() + PATIENCE
    while not run.done and time.monotonic() < end:
        time.sleep(POLL)
    return run.done

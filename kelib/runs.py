"""A grid of runs (:mod:`kelib.run`) on local processes or a cluster: what is done is skipped, what
was interrupted resumes.
"""

from __future__ import annotations

import json
import shutil
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from kelib import seals
from kelib.code_table import code_digest, work_of
from kelib.config import EXECUTORS
from kelib.errors import KelibError, first_line, lacks_memory, listing
from kelib.progress import Progress
from kelib.redaction import hidden
from kelib.run import Run, is_locked, locked
from kelib.versions import versions

if TYPE_CHECKING:
    from kelib.workers import Workers

# glibc hands large blocks back to the system at once and pays for fresh pages at every step;
# keeping them made a training step of the small model up to 1.9 times faster with both cores busy.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000"}


def perform(run: Run) -> float:
    """Do one run in this process; return its seconds (0 for a run that is done already).

    Raises KelibError if another process is writing it, or its folder cannot be written.
    """
    from kelib.hub_sources import with_paths

    if run.done:
        return 0.0
    start, processor = time.perf_counter(), time.process_time()
    try:
        run.partial.mkdir(parents=True, exist_ok=True)
        with locked(run.partial):
            if run.done:  # by another process, while this one was about to begin
                shutil.rmtree(run.partial, ignore_errors=True)
                return 0.0
            (run.partial / "error.txt").unlink(missing_ok=True)
            for left in run.partial.glob("*.tmp"):  # by a process that was killed while writing
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            for made in run.inputs.values():
                made.check()
            inputs = {name: made.folder for name, made in run.inputs.items()} | dict(run.files)
            settings = with_paths({**run.settings}, inputs)
            # its module imports torch, which the process that only hands out runs does not need
            work_of(run.kind)(settings, inputs, run.partial, _reporter(run.partial))
            seconds = time.perf_counter() - start
            finish(run, seconds, time.process_time() - processor)
    except (OSError, SafetensorError, MemoryError, RuntimeError) as error:
        if lacks_memory(error):
            raise KelibError(
                f"memory for {run.kind} {run.digest} is not enough ({first_line(error)}); free "
                "memory, or lower workers or batch_size, then run again"
            ) from error
        if not isinstance(error, (OSError, SafetensorError)):
            raise
        where, why = getattr(error, "filename", None), getattr(error, "strerror", None)
        raise KelibError(
            f"cannot read or write {where or run.partial}: {why or error}; free space or choose a "
            "folder that can be written, then run again"
        ) from error
    return time.perf_counter() - start


def finish(run: Run, seconds: float, cpu_seconds: float) -> None:
    """Note and seal what a run left in its folder, and give that its final name.

    ``seconds`` it took, ``cpu_seconds`` of this process's threads, whatever else the machine does.
    """
    note = {
        "kind": run.kind,
        "digest": run.digest,
        "code": code_digest(run.kind),
        "settings": dict(run.settings),
        "inputs": {name: made.digest for name, made in run.inputs.items()},
        "versions": versions(),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),
    }
    (run.partial / "progress").unlink(missing_ok=True)
    note["files"] = seals.seal(run.partial, besides=("lock",))
    text = json.dumps(seals.sealed(note), indent=1, sort_keys=True)
    (run.partial / "run.json").write_text(text)
    shutil.rmtree(run.folder, ignore_errors=True)  # a folder without run.json is no run
    run.partial.rename(run.folder)
    (run.folder / "lock").unlink(missing_ok=True)


def _reporter(folder: Path) -> Any:
    last = 0.0

    def report(share: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > 2:
            last = now
            (folder / "progress").write_text(f"{share:.4f}")

    return report


def read_progress(run: Run) -> float:
    """The share of a run under way that is done, 0 before one has begun."""
    try:
        return float((run.partial / "progress").read_text())
    except (OSError, ValueError):
        return 0.0


def attempt(run: Run, work: Callable[[Run], float] = perform) -> tuple[float, str]:
    """(seconds, why it failed) of ``work``, whose errors are not raised: the reason, empty where
    there is none, is kept in the run's folder.
    """
    try:
        return work(run), ""
    except KelibError as error:
        reason = str(error)
    except Exception:
        reason = hidden(traceback.format_exc())
    note_failure(run, reason)
    return 0.0, reason


def note_failure(run: Run, reason: str) -> None:
    """Mark a run as failed, unless a process is writing it."""
    with suppress(OSError):  # a full disk is reported already
        if run.partial.exists() and not is_locked(run.partial):  # not into another's folder
            (run.partial / "error.txt").write_text(reason)


@dataclass
class Outcome:
    """How a call of :func:`execute` went; ``seconds`` is the sum over the runs it did."""

    done: int
    skipped: int
    seconds: float


Attempts = list[tuple[Run, float, str]]  # run, seconds, why it failed (empty if it did not)


def with_inputs(runs: Iterable[Run]) -> list[list[Run]]:
    """The runs and everything they rest on, in levels that can be done one after another."""
    levels: dict[str, tuple[int, Run]] = {}

    def place(run: Run) -> int:
        if run.digest not in levels:
            level = 1 + max((place(made) for made in run.inputs.values()), default=-1)
            levels[run.digest] = (level, run)
        return levels[run.digest][0]

    for run in runs:
        place(run)
    deepest = max((level for level, _ in levels.values()), default=-1)
    return [[r for at, r in levels.values() if at == level] for level in range(deepest + 1)]


def execute(
    runs: Iterable[Run], workers: int | Workers, title: str = "runs", executor: str = "local"
) -> Outcome:
    """Do what is missing of ``runs`` and of their inputs, on ``workers`` local processes, or with
    ``executor="slurm"`` as jobs of a cluster (see :mod:`kelib.cluster`).

    A :class:`kelib.workers.Workers` is used and kept; a number of processes start when there is
    something to do, and end with the call.

    Each process has one thread (two runs on one thread each beat one run on two); a level with
    fewer runs than workers shares the threads out. A failed run does not stop the others; at the
    end a KelibError names each. Only a worker that the system ended (out of memory, most often)
    stops all, as the others would meet the same end. An interrupt ends the workers;
    what they had begun resumes in the next call. Levels, failures and interrupts are the same on a
    cluster.
    """
    if executor not in EXECUTORS:
        raise KelibError(f"executor = {executor!r} must be one of {listing(EXECUTORS)}")
    from kelib import cluster
    from kelib import workers as local

    total = Outcome(0, 0, 0.0)
    with ExitStack() as ended:
        crew = ended.enter_context(local.Workers(workers)) if isinstance(workers, int) else workers
        for level in with_inputs(runs):
            missing = [run for run in level if not run.done]
            total.skipped += len(level) - len(missing)
            if not missing:
                continue
            kinds = "/".join(dict.fromkeys(run.kind for run in missing))
            with Progress(f"{title}: {kinds}", len(missing)) as bar:
                if executor == "slurm":
                    done = cluster.do_level(missing, cluster.load_cluster(), bar)
                else:
                    done = local.do_level(missing, crew, max(1, crew.count // len(level)), bar)
            if failed := [f"{run.kind} {run.digest}: {why}" for run, _, why in done if why]:
                raise KelibError(
                    f"{len(failed)} of {len(missing)} runs failed; the others are kept.\n"
                    + "\n".join(failed)
                )
            total.done += len(missing)
            total.seconds += sum(seconds for _, seconds, _ in done)
    return total


def count_states(runs: Iterable[Run]) -> dict[str, int]:
    """How many runs are done, running, failed, missing."""
    counts = dict.fromkeys(("done", "running", "failed", "missing"), 0)
    for run in runs:
        counts[run.state()] += 1
    return counts

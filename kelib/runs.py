"""A grid of runs: digests, what is done is skipped, what was interrupted resumes, local processes work.

A run is named by the digest of its settings, its inputs and the code it rests on. Its folder appears
under the final name in one rename when it is finished; until then it is ``<digest>.partial``, held by
a lock, so that nothing half-written is ever taken for whole and two writers never meet.
"""

from __future__ import annotations

import ast
import fcntl
import functools
import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from kelib.config import digest
from kelib.errors import KelibError

# Modules of each kind of run whose code its numbers rest on (beside those of its inputs).
CODE = {
    "corpus": ("sources", "world", "wordings", "corpus"),
    "pretrain": ("training", "checkpoints"),
    "measure": ("ffn", "entropy", "scoring", "evaluation"),
    "continual": (
        "training",
        "injection",
        "interventions",
        "ffn",
        "entropy",
        "scoring",
        "evaluation",
    ),
}
# glibc hands large blocks back to the system at once and pays for fresh pages at every step; keeping
# them made a training step of the small model up to 1.9 times faster with both cores busy.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000"}


@functools.cache
def code_digest(kind: str) -> str:
    """Digest of the code a kind of run rests on, without comments, docstrings and layout."""
    parts = {name: _plain_code(Path(__file__).with_name(f"{name}.py")) for name in CODE[kind]}
    return digest(parts)


def _plain_code(path: Path) -> str:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(
            node
        ):
            node.body = node.body[1:]
    return ast.dump(tree)


@dataclass(frozen=True)
class Run:
    """One run: ``kind`` says what is done, ``settings`` (JSON values) how, ``inputs`` from which runs.

    ``home`` is the folder for runs of this kind; ``files`` are inputs that no run makes (fetched text).
    """

    kind: str
    home: Path
    settings: Mapping[str, Any]
    inputs: Mapping[str, Run] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)

    @functools.cached_property
    def digest(self) -> str:
        inputs = {name: run.digest for name, run in self.inputs.items()}
        return digest([self.kind, code_digest(self.kind), dict(self.settings), inputs])

    @property
    def folder(self) -> Path:
        return self.home / self.digest

    @property
    def partial(self) -> Path:
        return self.home / f"{self.digest}.partial"

    @property
    def done(self) -> bool:
        return (self.folder / "run.json").exists()

    def state(self) -> str:
        """done, running, failed or missing."""
        if self.done:
            return "done"
        if (self.partial / "error.txt").exists():
            return "failed"
        return "running" if self.partial.exists() and _is_locked(self.partial) else "missing"

    def read(self, name: str = "result.json") -> Any:
        """A JSON file of a finished run. Raises KelibError if the run is not done or the file is broken."""
        if not self.done:
            raise KelibError(
                f"{self.kind} run {self.digest} is {self.state()}: run its stage first"
            )
        try:
            return json.loads((self.folder / name).read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise KelibError(
                f"{self.folder / name} cannot be read; delete that folder, run again"
            ) from error


def _is_locked(folder: Path) -> bool:
    try:
        with (folder / "lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the run's lock; the system frees it when the process dies, however it dies."""
    with (folder / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise KelibError(
                f"{folder} is being written by another process; wait for it, or stop it, then run again"
            ) from None
        yield


def perform(run: Run) -> float:
    """Do one run in this process; return its seconds. A run that is done is left alone (0 seconds)."""
    from kelib import (
        jobs,
    )  # imports torch, which the process that only hands out runs does not need

    if run.done:
        return 0.0
    start = time.perf_counter()
    try:
        run.partial.mkdir(parents=True, exist_ok=True)
        with _locked(run.partial):
            (run.partial / "error.txt").unlink(missing_ok=True)
            inputs = {name: made.folder for name, made in run.inputs.items()} | dict(run.files)
            work = getattr(jobs, run.kind)
            work({**run.settings}, inputs, run.partial, _reporter(run.partial))
            seconds = time.perf_counter() - start
            note = {
                "kind": run.kind,
                "digest": run.digest,
                "code": code_digest(run.kind),
                "settings": dict(run.settings),
                "inputs": {name: made.digest for name, made in run.inputs.items()},
                "versions": jobs.versions(),
                "seconds": round(seconds, 2),
            }
            (run.partial / "progress").unlink(missing_ok=True)
            (run.partial / "run.json").write_text(json.dumps(note, indent=1, sort_keys=True))
            (run.partial / "lock").unlink()
            shutil.rmtree(run.folder, ignore_errors=True)  # a folder without run.json is no run
            run.partial.rename(run.folder)
    except OSError as error:
        raise KelibError(
            f"cannot write {error.filename or run.partial}: {error.strerror}; free space or choose a folder "
            "that can be written, then run again"
        ) from error
    return time.perf_counter() - start


def _reporter(folder: Path) -> Any:
    last = 0.0

    def report(share: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > 2:
            last = now
            (folder / "progress").write_text(f"{share:.4f}")

    return report


def _read_progress(run: Run) -> float:
    try:
        return float((run.partial / "progress").read_text())
    except (OSError, ValueError):
        return 0.0


def _begin_worker(threads: int) -> None:
    """Start-up of a worker: its threads, silence, and an end when its parent dies."""
    import torch

    torch.set_num_threads(threads)
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _perform_safely(run: Run) -> tuple[float, str]:
    try:
        return perform(run), ""
    except KelibError as error:
        reason = str(error)
    except Exception:
        reason = traceback.format_exc()
    if run.partial.exists():
        (run.partial / "error.txt").write_text(reason)
    return 0.0, reason


@dataclass
class Outcome:
    """How a call of :func:`execute` went. ``seconds`` is the sum over the runs done in this call."""

    done: int
    skipped: int
    seconds: float


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


def execute(runs: Iterable[Run], workers: int, title: str = "runs") -> Outcome:
    """Do what is missing of ``runs`` and of their inputs, on ``workers`` local processes.

    Each process has one thread (two runs on one thread each beat one run on two); a level with fewer runs
    than workers shares the threads out. A failed run does not stop the others; at the end a KelibError names each.
    """
    total = Outcome(0, 0, 0.0)
    for level in with_inputs(runs):
        threads = max(1, workers // len(level))
        missing = [run for run in level if not run.done]
        total.skipped += len(level) - len(missing)
        if missing:
            seconds = _execute_level(missing, min(workers, len(missing)), threads, title)
            total.done, total.seconds = total.done + len(missing), total.seconds + seconds
    return total


def _execute_level(missing: list[Run], workers: int, threads: int, title: str) -> float:
    kinds = "/".join(dict.fromkeys(run.kind for run in missing))
    saved = {name: os.environ.get(name) for name in (*KEEP_MEMORY, "OMP_NUM_THREADS")}
    os.environ.update(KEEP_MEMORY, OMP_NUM_THREADS=str(threads))  # read when a worker starts
    failures: list[str] = []
    seconds = 0.0
    try:
        with (
            ProcessPoolExecutor(
                workers, multiprocessing.get_context("spawn"), _begin_worker, (threads,)
            ) as pool,
            Progress(f"{title}: {kinds}", len(missing)) as bar,
        ):
            waiting: dict[Future[tuple[float, str]], Run] = {
                pool.submit(_perform_safely, run): run for run in missing
            }
            while waiting:
                finished, _ = wait(waiting, timeout=1, return_when=FIRST_COMPLETED)
                for future in finished:
                    run = waiting.pop(future)
                    spent, reason = future.result()
                    seconds += spent
                    if reason:
                        failures.append(f"{run.kind} {run.digest}: {reason}")
                bar.show(len(missing) - len(waiting) + sum(map(_read_progress, waiting.values())))
    finally:
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
    if failures:
        raise KelibError(
            f"{len(failures)} of {len(missing)} runs failed; the others are kept.\n"
            + "\n".join(failures)
        )
    return seconds


class Progress:
    """A bar with rate and time left in a terminal or an open notebook, else a line per interval."""

    def __init__(self, title: str, total: int, interval: float = 20.0) -> None:
        self.title, self.total, self.interval = title, total, interval
        self.start = self.last = time.monotonic()
        lines = os.environ.get("KELIB_PROGRESS") == "lines"
        interactive = not lines and (sys.stderr.isatty() or "ipykernel" in sys.modules)
        self.bar = tqdm(total=total, desc=title, unit="run") if interactive else None

    def __enter__(self) -> Progress:
        return self

    def show(self, done: float) -> None:
        """Show that ``done`` (a fraction counts) of the runs are finished."""
        if self.bar is not None:
            self.bar.n = round(done, 2)
            self.bar.refresh()
        elif time.monotonic() - self.last > self.interval or done == self.total:
            self.last = time.monotonic()
            passed = self.last - self.start
            left = f"{passed * (self.total - done) / done:.0f} s left" if done > 0 else "starting"
            print(f"{self.title}: {done:.1f} of {self.total}, {passed:.0f} s, {left}", flush=True)

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()


def count_states(runs: Iterable[Run]) -> dict[str, int]:
    """How many runs are done, running, failed, missing."""
    counts = dict.fromkeys(("done", "running", "failed", "missing"), 0)
    for run in runs:
        counts[run.state()] += 1
    return counts

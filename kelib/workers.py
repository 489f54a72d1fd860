"""Runs on local processes, each with threads of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.process import BaseProcess

from kelib.errors import KelibError, first_line, lacks_memory, listing
from kelib.progress import Progress
from kelib.redaction import hide_in_logs
from kelib.run import Run, writer
from kelib.runs import KEEP_MEMORY, Attempts, attempt, note_failure, read_progress


@contextmanager
def worker_environment(threads: int) -> Iterator[None]:
    """What processes read when they start, set in this one's environment for those begun inside."""
    saved = {name: os.environ.get(name) for name in (*KEEP_MEMORY, "OMP_NUM_THREADS")}
    os.environ.update(KEEP_MEMORY, OMP_NUM_THREADS=str(threads))
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def prepare_process(threads: int) -> None:
    """What a process that does runs sets before the first: its threads, and silence."""
    import torch

    torch.set_num_threads(threads)
    hide_in_logs()
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["PIP_NO_COLOR"] = "1"  # kernels ask for colours, its last error is quoted in ours


def begin_worker(threads: int) -> None:
    """Start-up of a local worker, which ends when its parent dies."""
    try:
        prepare_process(threads)
    except (ImportError, MemoryError, OSError) as error:
        if not lacks_memory(error):
            raise
        print(
            f"kelib: memory is not enough to start a worker process ({first_line(error)}); free "
            "some or lower workers, then run again",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted and ends its workers
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Workers:
    """At most ``count`` local processes. They start when there is something to do, which takes
    seconds each, and are kept while their threads stay the same.
    """

    def __init__(self, count: int) -> None:
        self.count, self.threads = count, 0
        self._pool: ProcessPoolExecutor | None = None
        self._others = set(multiprocessing.active_children())

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Wait until all of them have ended."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def pool(self, threads: int) -> ProcessPoolExecutor:
        """The processes, with so many threads each."""
        if self._pool is None or threads != self.threads:
            self.end()
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.count, spawn, begin_worker, (threads,))
            self.threads = threads
        return self._pool

    def children(self) -> set[BaseProcess]:
        """Those that run now."""
        return set(multiprocessing.active_children()) - self._others


def do_level(missing: list[Run], workers: Workers, threads: int, bar: Progress) -> Attempts:
    """Do runs that do not rest on each other, see :func:`kelib.runs.execute`.

    Raises KelibError if a worker was ended by the system, or could not start.
    """
    done: Attempts = []
    waiting: dict[Future[tuple[float, str]], Run] = {}
    pool, children = workers.pool(threads), set[BaseProcess]()
    try:
        with worker_environment(threads):
            try:
                for run in missing:
                    waiting[pool.submit(attempt, run)] = run
                    children = workers.children()
                while waiting:
                    finished, _ = wait(waiting, timeout=1, return_when=FIRST_COMPLETED)
                    for future in finished:
                        run = waiting[future]
                        done.append((run, *future.result()))
                        del waiting[future]
                    bar.show(len(done) + sum(map(read_progress, waiting.values())))
            except BaseException:  # else an interrupt would wait for the whole queue
                for child in children:
                    child.terminate()
                raise
    except BrokenProcessPool as error:
        workers.end()  # only then are the exit codes known
        raise KelibError(_broken(waiting.values(), children)) from error
    return done


def _broken(waiting: Iterable[Run], children: Iterable[BaseProcess]) -> str:
    """What to tell when a worker ended without a word; the run it was at is marked as failed."""
    codes = {child.pid: child.exitcode for child in children}
    # the pool itself ends the other workers by SIGTERM
    odd = {pid for pid, code in codes.items() if code not in (0, None, -signal.SIGTERM)}
    begun = [run for run in waiting if writer(run.partial) in (odd or codes)]
    if not begun:
        return (
            "the worker processes ended before they began a run (exit codes "
            f"{listing(codes.values())}): either memory is lacking, so free some or lower workers; "
            "or the script that calls kelib, which workers import, does not do that under "
            "if __name__ == '__main__'"
        )
    ends = {code for pid, code in codes.items() if pid in odd} or {-signal.SIGTERM}
    reason = (
        f"its worker process was ended by the system (exit code {listing(ends)}; -9 is most often "
        "a lack of memory): free memory or lower workers, then run again; what is finished is kept"
    )
    for run in begun:
        note_failure(run, reason)
    return "; ".join(f"{run.kind} {run.digest}" for run in begun) + f": {reason}"

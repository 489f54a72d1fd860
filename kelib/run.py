"""One run: what names it, where it is, what state it is in, and what it left.

A run is named by the digest of its settings, its inputs and the code it rests on. Its folder
appears under the final name in one rename when it is finished; until then it is
``<digest>.partial``, held by a lock, so that nothing half-written is ever taken for whole and two
writers never meet. What a finished run left is sealed (:mod:`kelib.seals`).
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from kelib import seals
from kelib.code_table import code_digest
from kelib.config import digest
from kelib.errors import KelibError
from kelib.tables import provenance


@dataclass(frozen=True)
class Run:
    """One run: ``kind`` says what is done, ``settings`` (JSON values) how, ``inputs`` from what.

    ``home`` is the folder for runs of this kind; ``files`` are inputs that no run makes (fetched
    text).
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
        return "running" if self.partial.exists() and is_locked(self.partial) else "missing"

    def note(self) -> dict[str, Any]:
        """What a finished run says of itself (``run.json``).

        Raises KelibError if it is not done, or if that file is not the one it wrote.
        """
        if not self.done:
            raise KelibError(
                f"{self.kind} run {self.digest} is {self.state()}: run its stage first"
            )
        path = self.folder / "run.json"
        try:
            note = seals.unsealed(json.loads(path.read_text()))
            if note["digest"] != self.digest:
                raise ValueError(f"it is that of run {note['digest']}")
            return note
        except (OSError, LookupError, ValueError, TypeError, RecursionError) as error:
            raise KelibError(
                f"{path} is not what the run wrote ({error}); delete {self.folder} and run again"
            ) from error

    def check(self, names: Iterable[str] | None = None) -> None:
        """Raise KelibError unless the files of a finished run are what it wrote, see
        :func:`kelib.seals.check`."""
        seals.check(self.folder, self.note().get("files", {}), names)

    def read(self, name: str = "result.json") -> Any:
        """A JSON file of a finished run.

        Raises KelibError if the run is not done or the file is not what it wrote.
        """
        return self._parsed(name, lambda path: json.loads(path.read_text()))

    def read_table(self, name: str) -> pd.DataFrame:
        """A CSV file of a finished run; raises as :meth:`read`."""
        return self._parsed(name, pd.read_csv)

    def _parsed(self, name: str, parse: Callable[[Path], Any]) -> Any:
        self.check([name])
        try:
            return parse(self.folder / name)
        except (OSError, ValueError) as error:  # neither JSON nor CSV
            raise KelibError(
                f"{self.folder / name} cannot be read; delete that folder, run again"
            ) from error


def is_locked(folder: Path) -> bool:
    """Whether a process holds the lock of a run's folder."""
    try:
        with (folder / "lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run's lock; the system frees it when the process dies, however it dies."""
    with (folder / "lock").open("a+") as file:
        for patience in (0.2, 0.2, 0):  # a look at the state holds the lock for a moment, too
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(patience)
        else:
            file.seek(0)
            raise KelibError(
                f"{folder} is being written by another process (pid {file.read() or 'unknown'}); "
                "wait for it, or stop it, then run again"
            )
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def writer(folder: Path) -> int | None:
    """The process that holds or last held the lock of a folder."""
    try:
        return int((folder / "lock").read_text())
    except (OSError, ValueError):
        return None


def provenance_of_runs(
    parameters: Mapping[str, Any], seeds: list[int], inputs: Mapping[str, str], runs: Sequence[Run]
) -> dict[str, Any]:
    """:func:`kelib.tables.provenance` with how many ``runs`` are behind a table and the seconds
    that they took, summed over processes. Neither is part of the digest.
    """
    seconds = round(sum(run.note()["seconds"] for run in runs), 1)
    return {**provenance(parameters, seeds, inputs), "run_seconds": seconds, "runs": len(runs)}

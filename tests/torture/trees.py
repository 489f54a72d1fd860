"""Copies of the repository in which make is run and disturbed, and what they come to."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from kelib import seals
from kelib.config import repository_root
from kelib.errors import KelibError
from kelib.tables import read_table

OUTPUTS = ("data/measurements/smoke/*.csv", "figures/smoke/*.csv")
COMPUTED = ("data/corpus", "data/checkpoints", "data/measurements", "figures/smoke")  # in order
LEFTOVERS = ("*.tmp", "*.tmp.*", "*.partial", "*.part", ".*.ipynb")
# What --short makes of profile smoke: one model, seed and worker; None leaves a section out.
SHORT: dict[str, Any] = {
    "seeds": [100],
    "workers": 1,
    "comparison": None,
    "pretraining.checkpoints": [1, 4, 15, 30],
    "continual.steps": 10,
    "continual.seeds": [0],
}


@dataclass
class Tree:
    """A copy of the tracked files of the repository; ``short`` cuts its profile smoke down."""

    folder: Path
    targets: list[str]
    short: bool = False
    log: Path = field(init=False)

    def __post_init__(self) -> None:
        self.log = self.folder.with_suffix(".log")
        if self.folder.exists():
            return
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        done = subprocess.run(listed, cwd=repository_root(), capture_output=True, check=True)
        for name in done.stdout.decode().split("\0"):
            source = repository_root() / name
            if name and source.is_file():
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, self.folder / name)
        if self.short:
            self._shorten()

    def _shorten(self) -> None:
        path = self.folder / "notebooks" / "params" / "smoke.yaml"
        values = yaml.safe_load(path.read_text())
        for dotted, value in SHORT.items():
            *sections, key = dotted.split(".")
            at = values
            for section in sections:
                at = at[section]
            at[key] = value
            if value is None:
                del at[key]
        path.write_text(yaml.safe_dump(values, sort_keys=False))

    def edit(self, name: str, old: str, new: str) -> None:
        """Put ``new`` in the place of ``old`` in one file of the copy. KelibError if it is not
        there, as the fault would then be none."""
        path = self.folder / name
        text = path.read_text()
        if old not in text:
            raise KelibError(f"{path} has no {old!r}: the harness is older than the code")
        path.write_text(text.replace(old, new))

    def start(
        self,
        *more: str,
        jobs: int = 2,
        prefix: tuple[str, ...] = (),
        environment: Mapping[str, str] | None = None,
        from_outside: bool = False,
    ) -> subprocess.Popen[bytes]:
        """make, in a process group of its own, with this interpreter and the copy of kelib.

        ``more``: arguments instead of the targets at profile smoke; ``prefix``: a command that
        starts make; ``environment``: on top of this process's; ``from_outside``: called by
        ``make -C`` from another folder.
        """
        chosen = more or (f"-j{jobs}", *self.targets, "PROFILE=smoke")
        place = ("-C", str(self.folder)) if from_outside else ()
        command = [*prefix, "make", *place, *chosen, "USE_ENV=1", f"PYTHON={sys.executable}"]
        base = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        with self.log.open("ab") as log:
            return subprocess.Popen(
                command,
                cwd=self.folder.parent if from_outside else self.folder,
                env={**base, "PYTHONPATH": str(self.folder), **(environment or {})},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def make(self, *more: str, **how: Any) -> tuple[int, str]:
        """(exit status, what it wrote) of :meth:`start`, waited for; an interrupt ends it."""
        before = self.log.stat().st_size if self.log.exists() else 0
        process = self.start(*more, **how)
        try:
            status = process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # kernels and workers end with make
            process.wait()
            raise
        return status, self.log.read_bytes()[before:].decode(errors="replace")

    def said(self) -> str:
        """The last lines that make and what it called wrote."""
        return self.log.read_text(errors="replace")[-2000:]

    def outputs(self) -> dict[str, bytes]:
        """Content of all measurements and figures' numbers, by path."""
        found = sorted(path for pattern in OUTPUTS for path in self.folder.glob(pattern))
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in found}

    def runs(self) -> dict[str, bytes]:
        """The note of every finished run, by path: the seconds it took stand in it, so that a run
        that was done again has another."""
        found = sorted((self.folder / "data").rglob("run.json"))
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in found}

    def leftovers(self) -> list[str]:
        """What processes wrote under temporary names and left."""
        places = (self.folder / "data", self.folder / "figures")
        found = {path for place in places for pattern in LEFTOVERS for path in place.rglob(pattern)}
        return sorted(str(path.relative_to(self.folder)) for path in found)

    def unsound(self) -> list[str]:
        """Runs and tables under their final names that are not what was written."""
        bad = []
        for note in (self.folder / "data").rglob("run.json"):
            try:
                seals.check(note.parent, seals.unsealed(json.loads(note.read_text()))["files"])
            except (KelibError, ValueError, LookupError) as error:
                bad.append(str(error))
        for path in self.folder.glob(OUTPUTS[0]):
            try:
                read_table(path)
            except KelibError as error:
                bad.append(str(error))
        return bad

    def clear(self) -> None:
        """Forget all that was computed."""
        for name in COMPUTED:
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def begin(self, other: Tree, until: str) -> None:
        """Forget what was computed, and have what another tree has in the folders of
        :data:`COMPUTED` before ``until``."""
        self.clear()
        for name in COMPUTED[: COMPUTED.index(until)]:
            shutil.copytree(other.folder / name, self.folder / name)


def undisturbed(tree: Tree) -> dict[str, bytes]:
    """The outputs of a run that nothing disturbs. KelibError if it fails."""
    status, said = tree.make()
    if status != 0:
        raise KelibError(f"make fails undisturbed, in {tree.folder}:\n{said[-2000:]}")
    return tree.outputs()


def compare(tree: Tree, expected: Mapping[str, bytes]) -> list[str]:
    """What a run left otherwise than an undisturbed one, in words; nothing if all is the same."""
    found = tree.outputs()
    changed = [name for name in expected if found.get(name) != expected[name]]
    bad = [f"{len(changed)} tables differ, {changed[0]} first"] if changed else []
    if more := sorted(set(found) - set(expected)):
        bad.append(f"{len(more)} tables more, {more[0]} first")
    if left := tree.leftovers():
        bad.append(f"{len(left)} leftovers, {left[0]} first")
    return bad


def own_words(said: str) -> str:
    """The refusal of kelib's in what make wrote, in one line; empty if there is none, or if a
    traceback of a library stands in the output."""
    told = re.search(r"^kelib: (.+?)(?=\n(?:the failed copy|make|kelib): |\Z)", said, re.M | re.S)
    if told is None or "Traceback (most recent call last)" in said:
        return ""
    return " ".join(told[1].split())

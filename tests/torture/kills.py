"""Kill ``make figures`` at random moments, start it again until it ends, compare with a run that
nobody disturbed.

Three ways to kill, with SIGKILL: the process group of make (what a closed terminal or a batch
system does; kernels have sessions of their own), one process of its family, or every one of them in
random order. Within :data:`GRACE` seconds nothing of the family may be left: workers and kernels
die with their parent. In the end measurements and the figures' numbers must be the same to the
byte, and nothing that a process left half-written may lie around.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from kelib.config import repository_root
from kelib.errors import KelibError

GRACE = 20.0  # seconds
WAYS = ("group", "one", "all")
OUTPUTS = ("data/measurements/smoke/*.csv", "figures/smoke/*.csv")
LEFTOVERS = ("*.tmp", "*.tmp.*", "*.partial", "*.part")


@dataclass
class Tree:
    """A copy of the tracked files of the repository, in which make is run and killed."""

    folder: Path
    targets: list[str]
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

    def start(self) -> subprocess.Popen[bytes]:
        """make, in a process group of its own, with this interpreter and the copy of kelib."""
        command = ["make", "-j2", *self.targets, "PROFILE=smoke", "USE_ENV=1"]
        command.append(f"PYTHON={sys.executable}")
        environment = {n: v for n, v in os.environ.items() if not n.startswith("MAKE")}
        environment["PYTHONPATH"] = str(self.folder)
        with self.log.open("ab") as log:
            return subprocess.Popen(
                command,
                cwd=self.folder,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def said(self) -> str:
        """The last lines that make and what it called wrote."""
        return self.log.read_text(errors="replace")[-2000:]

    def outputs(self) -> dict[str, bytes]:
        """Content of all measurements and figures' numbers, by path."""
        found = sorted(path for pattern in OUTPUTS for path in self.folder.glob(pattern))
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in found}

    def leftovers(self) -> list[str]:
        """What processes wrote under temporary names and left."""
        places = (self.folder / "data", self.folder / "figures")
        found = {path for place in places for pattern in LEFTOVERS for path in place.rglob(pattern)}
        return sorted(str(path.relative_to(self.folder)) for path in found)

    def clear(self) -> None:
        """Forget all that was computed."""
        for name in ("data/measurements", "data/checkpoints", "data/corpus", "figures/smoke"):
            shutil.rmtree(self.folder / name, ignore_errors=True)


def family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """A process and all that descend from it, now."""
    try:
        head = psutil.Process(process.pid)
        return [head, *head.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill(process: subprocess.Popen[bytes], way: str, dice: random.Random) -> tuple[str, list[str]]:
    """(command line of what was killed first, those of its family that outlived the grace)."""
    members = family(process)
    if not members:
        return "", []
    order = members if way == "group" else dice.sample(members, len(members))
    line = _line(order[0])
    if way == "group":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        for member in order[: 1 if way == "one" else None]:
            with suppress(psutil.NoSuchProcess):
                member.kill()
    process.wait()  # of one killed process make may go on with what it can, and then stop
    _, alive = psutil.wait_procs(members, timeout=GRACE)
    return line, [_line(member) for member in alive]


def _line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())[:120]
    except psutil.Error:
        return process.name() if process.is_running() else "gone"


def undisturbed(tree: Tree) -> dict[str, bytes]:
    """The outputs of a run that is not killed. KelibError if it fails."""
    if tree.start().wait() != 0:
        raise KelibError(f"make fails without being killed, in {tree.folder}:\n{tree.said()}")
    return tree.outputs()


def kills(
    tree: Tree, expected: dict[str, bytes], count: int, seed: int, pause: float
) -> Iterator[dict[str, Any]]:
    """Kill ``count`` times, after exponentially distributed times of mean ``pause`` seconds; a row
    for every kill, and one for every time that make came to its end.

    Columns: what (``killed`` or ``ended``), way, after (seconds), victim, alive (how many outlived
    the grace), same (outputs as expected), leftovers.
    """
    dice, done = random.Random(seed), 0
    tree.clear()
    while True:
        process, start = tree.start(), time.monotonic()
        limit = dice.expovariate(1 / pause) if done < count else None
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            way = dice.choice(WAYS)
            victim, alive = kill(process, way, dice)
            done += 1
            after = round(time.monotonic() - start, 1)
            row = {"what": "killed", "way": way, "after": after, "victim": victim}
            yield {**row, "alive": len(alive), "same": None, "leftovers": None}
            continue
        if status != 0:
            raise KelibError(f"make fails after {done} kills, seed {seed}:\n{tree.said()}")
        same, left = tree.outputs() == expected, tree.leftovers()
        row = {"what": "ended", "way": "", "after": round(time.monotonic() - start, 1)}
        yield {**row, "victim": "", "alive": 0, "same": same, "leftovers": len(left)}
        if done >= count:
            return
        tree.clear()

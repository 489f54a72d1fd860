"""Kill ``make figures`` at random moments, start it again until it ends, compare with a run that
nobody disturbed.

Three ways to kill, with SIGKILL: the process group of make (what a closed terminal or a batch
system does; kernels have sessions of their own), one process of its family, or every one of them in
random order. Within :data:`GRACE` seconds nothing of the family may be left: workers and kernels
die with their parent. Of one killed process those are meant that descend from it; make may go on
without it, and is then killed again. In the end measurements and the figures' numbers must be the
same to the byte, and nothing that a process left half-written may lie around.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import psutil

from kelib.errors import KelibError

from .trees import Tree, compare, undisturbed

GRACE = 20.0  # seconds
WAYS = ("group", "one", "all")


def family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """A process and all that descend from it, now."""
    try:
        head = psutil.Process(process.pid)
        return [head, *head.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill(process: subprocess.Popen[bytes], way: str, dice: random.Random) -> tuple[str, list[str]]:
    """(command line of what was killed first, those of its family that outlived the grace).

    Where one process was killed, make may still run afterwards.
    """
    members = family(process)
    if not members:
        return "", []
    order = members if way == "group" else dice.sample(members, len(members))
    line = _line(order[0])
    if way == "group":
        os.killpg(process.pid, signal.SIGKILL)
    elif way == "all":
        for member in order:
            with suppress(psutil.NoSuchProcess):
                member.kill()
    else:
        members = []  # none, where it has just ended by itself
        with suppress(psutil.NoSuchProcess):
            members = [*order[0].children(recursive=True), order[0]]
            order[0].kill()
    if way != "one" or order[0].pid == process.pid:
        process.wait()
    limit = time.monotonic() + GRACE
    while (alive := [member for member in members if _runs(member)]) and time.monotonic() < limit:
        time.sleep(0.05)
    return line, [_line(member) for member in alive]


def _runs(process: psutil.Process) -> bool:
    """Not where only its parent has not yet asked how it ended."""
    try:
        return process.is_running() and bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())[:120]
    except psutil.Error:
        return process.name() if process.is_running() else "gone"


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Kill ``options.count`` times, after exponentially distributed times of mean ``options.pause``
    seconds; a row for every kill, survived if nothing outlived the grace, and one for every time
    that make came to its end, survived if the outputs are those of an undisturbed run.
    """
    expected = undisturbed(Tree(options.folder / "undisturbed", options.targets, options.short))
    tree = Tree(options.folder / "killed", options.targets, options.short)
    dice, done = random.Random(options.seed), 0
    tree.clear()
    process: subprocess.Popen[bytes] | None = None
    hurt = False  # whether make goes on without one of its processes
    try:
        while True:
            process, start = process or tree.start(), time.monotonic()
            limit = dice.expovariate(1 / options.pause) if done < options.count else None
            try:
                status = process.wait(limit)
            except subprocess.TimeoutExpired:
                way = dice.choice(WAYS)
                victim, alive = kill(process, way, dice)
                done += 1
                note = f"after {time.monotonic() - start:.1f} s: {victim}"
                if alive:
                    note += f"; outlived by {'; '.join(alive)}"
                yield {"case": f"kill {way}", "survived": int(not alive), "note": note}
                hurt = process.poll() is None
                process = process if hurt else None
                continue
            process, lacked, hurt = None, hurt, False
            if status != 0 and lacked:
                continue
            if status != 0:
                raise KelibError(
                    f"make fails after {done} kills, seed {options.seed}:\n{tree.said()}"
                )
            bad = compare(tree, expected)
            yield {"case": "run to the end", "survived": int(not bad), "note": "; ".join(bad)}
            if done >= options.count:
                return
            tree.clear()
    finally:  # an interrupt ends make as well
        if process is not None and process.poll() is None:
            kill(process, "group", dice)

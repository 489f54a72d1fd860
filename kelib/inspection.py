"""What the model hub says of commits of a published model: files, headers, configuration. No torch.

Nothing is judged here, see :mod:`kelib.soundness`. No weights are fetched.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from kelib import hub
from kelib.checkpoint_files import (
    CONFIG,
    TOKENIZER,
    Weights,
    broken_parts,
    dtype_of,
    find_weights,
    index_of,
)
from kelib.hub import HubFile
from kelib.progress import Progress

Key = TypeVar("Key")
Item = TypeVar("Item")
Value = TypeVar("Value")
AT_ONCE = 8  # requests
NOT_COMPARED = ("transformers_version", "_name_or_path")  # of a configuration


@dataclass(frozen=True)
class Inspected:
    """One commit. ``config`` and ``tokenizer`` are values to compare, empty if there is none."""

    weights: Weights
    files: tuple[str, ...]  # those that loading needs
    broken: tuple[str, ...]  # what sizes and headers tell of the parts
    dtype: str  # as F32, or F16+U8
    parameters: int  # by the headers; 0 if one is not known
    data: int | None  # bytes of all tensors by the headers; None if one is not known
    config: str  # JSON
    tokenizer: tuple[tuple[str, str], ...]  # (name, hash) of its files


def inspect(repo: str, commits: Collection[str], title: str) -> dict[str, Inspected]:
    """Ask the hub about each commit. A file that several commits share is asked about once.

    ``title`` stands in front of the progress. Raises KelibError, see :func:`kelib.hub.ask`.
    """
    files = _each(
        {commit: commit for commit in sorted(commits)},
        lambda commit: hub.list_files(repo, commit),
        f"{title}, files of each revision",
    )
    small: dict[str, tuple[str, str]] = {}  # hash: where one such file is
    for commit, there in files.items():
        for wanted in (CONFIG, index_of(there)):
            if wanted is not None and wanted in there:
                small[there[wanted].sha] = (commit, wanted)
    read = _each(
        small, lambda place: hub.read_json(repo, *place), f"{title}, configurations and indices"
    )
    weights = {}
    for commit, there in files.items():
        index = index_of(there)
        weights[commit] = find_weights(there, None if index is None else read[there[index].sha])
    parts = {
        part.sha: (commit, part)
        for commit, found in weights.items()
        for part in found.parts
        if found.form == "safetensors"
    }
    headers = _each(parts, lambda place: hub.read_header(repo, *place), f"{title}, headers")
    inspected = {}
    for commit, there in files.items():
        found = weights[commit]
        config = read[there[CONFIG].sha] if CONFIG in there else None
        if isinstance(config, dict):
            config = {key: value for key, value in config.items() if key not in NOT_COMPARED}
        known = [h for h in (headers.get(part.sha) for part in found.parts) if h is not None]
        complete = len(known) == len(found.parts) and not found.missing
        inspected[commit] = Inspected(
            found,
            _needed(there, found),
            tuple(broken_parts(found, headers)),
            dtype_of(known),
            sum(sum(h.parameters.values()) for h in known) if complete else 0,
            sum(h.data for h in known) if complete else None,
            json.dumps(config, sort_keys=True) if isinstance(config, dict) else "",
            tuple((name, there[name].sha) for name in TOKENIZER if name in there),
        )
    return inspected


def _needed(files: Mapping[str, HubFile], weights: Weights) -> tuple[str, ...]:
    index = index_of(files)
    others = [name for name in (CONFIG, *TOKENIZER, index) if name is not None and name in files]
    return (*others, *(part.name for part in weights.parts), *weights.missing)


def _each(items: Mapping[Key, Item], work: Callable[[Item], Value], title: str) -> dict[Key, Value]:
    """``work`` done on each item, several at once; the first refusal ends it."""
    if not items:
        return {}
    found = {}
    with ThreadPoolExecutor(AT_ONCE) as pool, Progress(title, len(items)) as progress:
        for key, value in zip(items, pool.map(work, items.values()), strict=True):
            found[key] = value
            progress.show(len(found))
    return found

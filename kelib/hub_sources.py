"""Corpora of the data hub as sources: ``hub:NAME``, pinned to a commit, kept by a run. No torch.

``data/hub_sources.yaml`` says what the names are. A run that reads such a source has the run that
keeps its text (:mod:`kelib.hub_text`) among its inputs, under the source's own name; when it is
done, the name in its settings gives way to the path of the file, and its job reads that like a
user's own text. So the commit is in the name of every run that rests on the text.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kelib import hub, source_text
from kelib.catalogue import DATA, read_lock, write_lock
from kelib.errors import KelibError, listing
from kelib.hub_text import how_to_bring, text_file
from kelib.run import Run
from kelib.runs import perform
from kelib.schema import read_rows, require

PREFIX = "hub:"
MANIFEST = DATA / "hub_sources.yaml"
LOCK = DATA / "hub_sources.lock.yaml"
BRANCH = "main"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LOCK_HEAD = """\
# The commits of data sets that the hub listed when a source was first used.
# Written by kelib/hub_sources.py. Commit this file: it says which text a measurement means.
"""


@dataclass(frozen=True)
class HubSource:
    """One row of ``data/hub_sources.yaml``; ``remarks`` are for the reader only."""

    name: str
    repo: str  # owner/name on the hub
    config: str | None
    split: str
    field: str  # the column of text
    revision: str | None  # the commit; None: pinned at the first use
    shuffle_seed: int | None  # of the order of documents; None: that of the files
    characters: int  # read unless the name of the source says otherwise
    remarks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        safe = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name) is not None
        require(safe, "name", self.name, "of letters, digits and ._-")
        require(self.repo.count("/") == 1, "repo", self.repo, "owner/name")
        require(self.characters >= 1, "characters", self.characters, "at least 1")
        pinned = self.revision is None or _COMMIT.fullmatch(self.revision) is not None
        require(pinned, "revision", self.revision, "a commit of 40 hexadecimal digits, or null")


def hub_sources(path: Path | None = None) -> dict[str, HubSource]:
    """The rows of ``data/hub_sources.yaml`` (or of ``path``) by name. Raises KelibError."""
    return read_rows(MANIFEST if path is None else path, "sources", HubSource)


def hub_source(name: str) -> tuple[HubSource, int]:
    """The row and the number of characters that ``hub:NAME`` or ``hub:NAME:CHARACTERS`` means.

    Raises KelibError for an unknown name, with those there are, and a number that is none.
    """
    key, _, size = name.removeprefix(PREFIX).partition(":")
    known = hub_sources()
    if key not in known:
        raise KelibError(
            f"unknown source {name!r}: the hub sources are "
            f"{listing(PREFIX + row for row in known)}; add a row to data/hub_sources.yaml"
        )
    if size and not (size.isdecimal() and int(size) > 0):
        raise KelibError(f"{name}: {size!r} must be a number of characters above 0")
    return known[key], int(size) if size else known[key].characters


def commit_of(source: HubSource, home: Path, lock: Path | None = None) -> str:
    """The commit of a source: of its row, of the lock file, or else listed and pinned there.

    ``home``: where its texts are kept, for the remedy. Raises KelibError where the hub refuses or
    cannot be reached, and for a lock that means another repository.
    """
    if source.revision is not None:
        return source.revision
    return pinned(source.name, source.repo, how_to_bring(home), lock)


def pinned(name: str, repo: str, bring: str | None = None, lock: Path | None = None) -> str:
    """The commit of the data set ``repo`` that the lock file has under ``name``, or else the one
    its branch main is at now, which goes into the lock file.

    ``bring``: the remedy without a network. Raises KelibError as :func:`commit_of`.
    """
    lock = LOCK if lock is None else lock
    content = read_lock(lock)
    entry = content.get(name)
    if entry is not None and entry["repo"] != repo:
        raise KelibError(
            f"{lock} pins {name} in {entry['repo']}, but it is {repo} now; delete that entry, and "
            "measure again what was measured with it"
        )
    if entry is not None and BRANCH in entry["revisions"]:
        return str(entry["revisions"][BRANCH])
    known = [row.repo for row in hub_sources().values()]
    try:
        listed = hub.list_refs(repo, known, kind="dataset", bring=bring)
    except hub.Unreachable as error:
        raise KelibError(f"the commit of {name} is not in {lock}, and {error}") from error
    if BRANCH not in listed:
        raise KelibError(
            f"{repo} has no branch {BRANCH}, it has {listing(listed)}; give the commit as "
            "revision in data/hub_sources.yaml"
        )
    write_lock(lock, _LOCK_HEAD, name, repo, {BRANCH: listed[BRANCH]})
    return listed[BRANCH]


# --- as inputs of runs --------------------------------------------------------------------------


def text_run(name: str, data: Path) -> Run:
    """The run that keeps the text of ``hub:NAME`` in ``data/sources/hub``."""
    source, characters = hub_source(name)
    home = data / "sources" / "hub" / source.name
    settings = {
        "repo": source.repo,
        "commit": commit_of(source, home),
        "config": source.config,
        "split": source.split,
        "field": source.field,
        "shuffle_seed": source.shuffle_seed,
        "characters": characters,
    }
    return Run("hub_text", home, settings)


def text_runs(names: Iterable[str], data: Path) -> dict[str, Run]:
    """By name, the runs that the hub sources among ``names`` need; other sources need none."""
    return {name: text_run(name, data) for name in names if name.startswith(PREFIX)}


def packed_run(
    name: str, place: str, commit: str | None, length: int, sequences: int, data: Path
) -> Run:
    """The run that packs ``hub:NAME`` to ``sequences`` of ``length`` tokens, see
    :mod:`kelib.packed_text`.

    ``place`` and ``commit`` of the model whose tokenizer it is, as
    :func:`kelib.pretrained.locate` gives them: a folder without a commit, or a hub id with one.
    Raises KelibError for a folder without a tokenizer, and as :func:`text_run`.
    """
    require(length >= 8, "length", length, "at least 8")
    require(sequences >= 1, "sequences", sequences, "at least 1")
    settings: dict[str, Any] = {"place": place, "commit": commit}
    if commit is None:  # what is in a folder may change
        try:
            content = (Path(place) / "tokenizer.json").read_bytes()
        except OSError as error:
            raise KelibError(
                f"no tokenizer.json in {place}: {error.strerror}; give a folder with the "
                "model's own tokenizer, or a hub id and its commit"
            ) from error
        settings["tokenizer"] = hashlib.sha256(content).hexdigest()
    settings |= {"sequence_length": length, "sequences": sequences}
    home = data / "sources" / "packed"
    return Run("packed_text", home, settings, {"text": text_run(name, data)})


def with_paths(settings: Any, inputs: Mapping[str, Path]) -> Any:
    """``settings`` with the names of hub sources that are among ``inputs`` replaced by the paths of
    their files, each checked against its sha256. Raises KelibError for a broken one.
    """
    paths = {
        name: str(text_file(folder)) for name, folder in inputs.items() if name.startswith(PREFIX)
    }
    return _replaced(settings, paths) if paths else settings


def _replaced(value: Any, paths: Mapping[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {key: _replaced(item, paths) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_replaced(item, paths) for item in value]
    return paths.get(value, value) if isinstance(value, str) else value


def read_documents(name: str, data: Path) -> list[str]:
    """The documents of ``hub:NAME``, kept in ``data/sources/hub`` first if they are not there yet.

    Cleaned and without duplicates like a user's own text. Raises KelibError.
    """
    run = text_run(name, data)
    perform(run)
    return source_text.local_documents(text_file(run.folder))

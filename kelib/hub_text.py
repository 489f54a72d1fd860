"""Documents of a data set of the hub, read once and kept: what the run ``hub_text`` does.

``datasets`` streams the pinned commit, so that no more is fetched than is read. What is kept is a
file of JSON lines, which every later run reads like a user's own text: the documents are the same
for any number of processes, and without a network.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kelib import hub
from kelib.errors import KelibError, listing
from kelib.parsing import clean, one_line

TEXT = "text.jsonl"
BUFFER = 10_000  # documents that a drawn order is drawn from at a time
SOURCES = "data/hub_sources.yaml"


def keep_documents(
    settings: Mapping[str, Any],
    inputs: Mapping[str, Path],
    folder: Path,
    progress: Callable[[float], None],
) -> None:
    """Write ``text.jsonl``, one ``{"text": ...}`` a line, and ``result.json`` into ``folder``.

    ``settings``: repo, commit, config, split, field, shuffle_seed and characters; ``inputs``: none
    is used. Documents are
    cleaned as :func:`kelib.parsing.local_documents` does it, those without text and exact
    duplicates passed over; reading stops with the one that completes ``characters``.
    ``result.json`` counts documents, characters and those passed over, with the sha256 of the file.

    Raises KelibError: the hub refuses or cannot be reached, the field is missing, or the data set
    ends before ``characters``.
    """
    wanted, sha256 = settings["characters"], hashlib.sha256()
    counts = {"documents": 0, "characters": 0, "without_text": 0, "duplicates": 0}
    seen: set[bytes] = set()  # digests: the texts themselves would not fit into memory
    _ask_first(settings, folder)
    cache = folder / "datasets.tmp"  # of its own: a cached other commit must never stand in
    texts = documents(**{key: settings[key] for key in READING}, cache=cache)
    with (folder / TEXT).open("wb") as file:
        for text in map(clean, texts):
            key = hashlib.sha256(text.encode()).digest()[:16]
            if not text or key in seen:
                counts["duplicates" if text else "without_text"] += 1
                continue
            seen.add(key)
            line = json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"
            file.write(line)
            sha256.update(line)
            counts["documents"] += 1
            counts["characters"] += len(text)
            progress(counts["characters"] / wanted)
            if counts["characters"] >= wanted:
                break
    shutil.rmtree(cache, ignore_errors=True)
    if counts["characters"] < wanted:
        raise KelibError(
            f"split {settings['split']} of {settings['repo']} has {counts['characters']} "
            f"characters in {counts['documents']} documents, {wanted} are wanted; "
            "ask for no more than it has"
        )
    note = {**counts, "sha256": sha256.hexdigest(), "datasets": version("datasets")}
    (folder / "result.json").write_text(json.dumps(note, indent=1, sort_keys=True))


READING = ("repo", "commit", "config", "split", "field", "shuffle_seed")


def documents(
    repo: str,
    commit: str | None,
    config: str | None,
    split: str,
    field: str,
    shuffle_seed: int | None = None,
    cache: Path | None = None,
) -> Iterator[str]:
    """The texts of a data set in a pinned order, streamed; an empty text where a row has none.

    ``repo`` is a hub id, read at ``commit``, or a folder laid out like one (``commit`` None). The
    order is that of the files, or with ``shuffle_seed`` one drawn over files and, among ``BUFFER``
    documents, within them. Raises KelibError.
    """
    try:
        import datasets
    except ImportError as error:
        raise KelibError(
            f"{repo} needs the package datasets: pip install '.[hub]', or give a text file"
        ) from error
    where = f"{repo}, config {config}, split {split}"
    try:
        rows = datasets.load_dataset(
            repo, config, split=split, streaming=True, revision=commit, cache_dir=cache
        )
        if shuffle_seed is not None:
            rows = rows.shuffle(seed=shuffle_seed, buffer_size=BUFFER)
        for number, row in enumerate(rows):
            if field not in row or not isinstance(row[field], str | None):
                raise KelibError(
                    f"{where}, row {number}: no text in the field {field!r}; the fields are "
                    f"{listing(row)}; correct field in {SOURCES}"
                )
            yield row[field] or ""
    except KelibError:
        raise
    except Exception as error:  # of many classes: no such config or split, no readable file
        raise KelibError(
            f"datasets cannot read {where} ({hub.reason(error)}); correct the row in {SOURCES}, "
            "and try again if the connection broke"
        ) from error


def kept_documents(folder: Path) -> Iterator[str]:
    """The documents of a finished run, one after the other. Raises as :func:`text_file`."""
    with text_file(folder).open(encoding="utf-8", newline="\n") as file:
        for line in file:
            yield json.loads(line)["text"]


def text_file(folder: Path) -> Path:
    """The file of a finished run, checked against its sha256. Raises KelibError if it differs."""
    try:
        wanted = json.loads((folder / "result.json").read_text())["sha256"]
        with (folder / TEXT).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise KelibError(
            f"no whole text of the hub in {folder} ({one_line(error)}); delete that folder and run "
            "again where there is a network"
        ) from error
    if found != wanted:
        raise KelibError(
            f"{folder / TEXT} has sha256 {found[:12]}, its result.json says {wanted[:12]}: it was "
            "changed or copied in part; delete that folder and run again where there is a network"
        )
    return folder / TEXT


def how_to_bring(folder: Path) -> str:
    """The remedy without a network, given where the texts of a source are kept; it names the
    commits that are there.
    """
    held = set()
    for note in sorted(folder.glob("*/run.json")):
        try:
            held.add(str(json.loads(note.read_text())["settings"]["commit"])[:12])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    there = f"; what is there is of commit {listing(held)}, or of another length" if held else ""
    place = "/".join(folder.parts[-4:])
    return (
        "where there is a network, run 'python -m kelib data PROFILE', or the command that named "
        f"the source; then bring data/hub_sources.lock.yaml and the folder {place}{there}"
    )


def _ask_first(settings: Mapping[str, Any], folder: Path) -> None:
    """Whether the hub gives the commit to this user: datasets says less about a refusal."""
    from huggingface_hub import HfApi

    repo, commit = settings["repo"], settings["commit"]
    options: dict[str, Any] = {"kind": "dataset", "bring": how_to_bring(folder.parent)}
    hub.ask(
        lambda: HfApi().dataset_info(repo, revision=commit, timeout=60), repo, commit, **options
    )
    # the page of a gated data set is public, its files are not
    hub.ask(lambda: HfApi().auth_check(repo, repo_type="dataset"), repo, commit, **options)

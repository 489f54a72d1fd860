"""A text of the hub as token blocks of a model's own tokenizer, packed once: run ``packed_text``.

One process packs, all others open the file, so that the blocks do not depend on how many there are:
1,024 tokens for continual learning, 2,048 for entropy. A study that trains its own tokenizer needs
none of this: its corpus run packs and hashes its blocks itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from kelib.errors import KelibError
from kelib.hub_text import kept_documents
from kelib.parsing import one_line

TOKENS = "tokens.npy"
CHUNK = 256  # documents tokenised at a time


def pack_hub_text(
    settings: Mapping[str, Any],
    inputs: Mapping[str, Path],
    folder: Path,
    progress: Callable[[float], None],
) -> None:
    """Write ``tokens.npy``, (sequences, sequence_length) in the order of the documents, and
    ``result.json`` with its sha256.

    ``settings``: sequences, sequence_length, and the tokenizer as place (folder or hub id) and
    commit. ``inputs["text"]``: the folder of a run ``hub_text``. Each document is followed by the
    end-of-text token, none is padded. Raises KelibError for a text that is too short, saying what
    it gives.
    """
    from kelib.pretrained import quiet, read_tokenizer  # heavy: opening blocks needs no torch

    length, wanted = settings["sequence_length"], settings["sequences"]
    with quiet():
        _, tokenizer, end = read_tokenizer(settings["place"], settings["commit"])
    kind = np.uint16 if max(len(tokenizer), end + 1) <= 2**16 else np.uint32
    # filled from the front: as a list, the tokens of the paper's corpus take many gigabytes
    blocks = np.lib.format.open_memmap(folder / TOKENS, "w+", kind, (wanted, length))
    flat, filled, read = blocks.reshape(-1), 0, 0
    for ids, count in _encoded(kept_documents(inputs["text"]), tokenizer, end):
        taken = ids[: len(flat) - filled]
        flat[filled : filled + len(taken)] = taken
        filled, read = filled + len(taken), read + count
        progress(filled / len(flat))
        if filled == len(flat):
            break
    if filled < len(flat):
        raise KelibError(
            f"the text gives {filled // length} sequences of {length} tokens from {read} "
            f"documents, {wanted} are wanted; ask for fewer, or for more text as "
            "hub:NAME:CHARACTERS"
        )
    blocks.flush()
    note = {"sequences": wanted, "sequence_length": length, "documents": read, "end": end}
    note["sha256"] = _sha256(folder / TOKENS)
    (folder / "result.json").write_text(json.dumps(note, indent=1, sort_keys=True))


def open_blocks(folder: Path) -> np.ndarray:
    """The blocks of a finished run, (sequences, sequence_length), memory-mapped.

    Raises KelibError if the file is missing or its sha256 is not what was written.
    """
    try:
        wanted, found = json.loads((folder / "result.json").read_text())["sha256"], "missing"
        if (folder / TOKENS).exists():
            found = _sha256(folder / TOKENS)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise KelibError(
            f"no whole packed text in {folder} ({one_line(error)}); delete it and run again"
        ) from error
    if found != wanted:
        raise KelibError(
            f"{folder / TOKENS} has sha256 {found[:12]}, its result.json says {wanted[:12]}; "
            f"delete {folder} and run again"
        )
    return np.load(folder / TOKENS, mmap_mode="r")


def _encoded(
    documents: Iterator[str], tokenizer: Any, end: int
) -> Iterator[tuple[np.ndarray, int]]:
    """Token ids of chunks of documents, each document followed by ``end``, and how many these are.

    Raises KelibError if the tokenizer knows nothing of the text.
    """
    special, known = set(tokenizer.all_special_ids), False
    while chunk := list(islice(documents, CHUNK)):
        # verbose: documents longer than the window are no mistake here
        encoded = tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]
        known = known or any(not special.issuperset(ids) for ids in encoded)
        if not known:  # transformers makes an empty tokenizer where the files are missing
            raise KelibError(
                f"{tokenizer.name_or_path} has no tokenizer, or one that knows nothing of this "
                "text; put the model's own tokenizer files beside its weights"
            )
        yield np.concatenate([np.array([*ids, end], dtype=np.int64) for ids in encoded]), len(chunk)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

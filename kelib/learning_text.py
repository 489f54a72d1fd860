"""The text that published checkpoints are continued on, packed with their tokenizer: run
``learning_text``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kelib import source_text, sources
from kelib.errors import KelibError
from kelib.model_import import generated_documents
from kelib.packed_text import TOKENS, open_blocks, pack_hub_text
from kelib.packing import pack_text
from kelib.pretrained import quiet, read_tokenizer

TEXT, HELDOUT = "domain", "heldout"  # blocks; the first as kelib.learning_inputs reads it
Progress = Callable[[float], None]


def learning_text(
    settings: Mapping[str, Any], inputs: Mapping[str, Path], folder: Path, progress: Progress
) -> None:
    """Write ``domain.npy`` and ``heldout.npy`` ``(n, sequence_length)``, with their sha256 and that
    of the tokenizer's vocabulary in ``manifest.json``.

    Both are cut from one stream of documents, in their order. Raises KelibError for a text that is
    too short, and for sequences beyond the window of the model.
    """
    length, wanted = settings["sequence_length"], settings["sequences"]
    whole = wanted + settings["heldout_sequences"]
    place, commit = settings["repo"], settings["commit"]
    if place is None:
        place, commit = str(inputs["checkpoints"] / settings["revision"]), None
    with quiet():
        window, tokenizer, end = read_tokenizer(place, commit)
    if window is not None and length > window:
        raise KelibError(
            f"learning.sequence_length = {length} is beyond the window of the model; at most "
            f"{window}"
        )
    kept = [path for name, path in inputs.items() if name.startswith("hub:")]
    if kept:
        options = {"sequences": whole, "sequence_length": length}
        options |= {"place": place, "commit": commit}
        pack_hub_text(options, {"text": kept[0]}, folder, progress)
        blocks = open_blocks(folder)
    else:
        documents = _documents(settings["text"], inputs["sources"])
        blocks, _ = pack_text(documents, tokenizer, end, length, whole)
        if len(blocks) < whole:
            raise KelibError(
                f"the text gives {len(blocks)} sequences of {length} tokens, {whole} are wanted "
                f"({wanted} to learn from); set learning.sequences lower, which reads them again, "
                "or take a longer text"
            )
        blocks = blocks.astype(np.uint16 if blocks.max() < 2**16 else np.uint32)
    found = {}
    for name, part in ((TEXT, blocks[:wanted]), (HELDOUT, blocks[wanted:])):
        path = folder / f"{name}.npy"
        np.save(path, part)
        with path.open("rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    (folder / TOKENS).unlink(missing_ok=True)
    note = {"sha256": found, "tokenizer": vocabulary_digest(tokenizer)}
    (folder / "manifest.json").write_text(json.dumps(note, indent=1))
    sizes = {"sequences": wanted, "heldout_sequences": whole - wanted, "sequence_length": length}
    (folder / "result.json").write_text(json.dumps(sizes, indent=1))


def _documents(name: str, folder: Path) -> list[str]:
    """Of a source of ``data/sources.yaml``, ``generated:NAME``, or a file or folder."""
    if name.startswith("generated:"):
        return generated_documents(name)
    known = sources.manifest()
    if name in known:
        sources.fetch(known[name], folder)
        return source_text.documents(name, folder)
    return source_text.local_documents(Path(name))


def vocabulary_digest(tokenizer: Any) -> str:
    """Digest of a tokenizer's tokens and their ids."""
    known = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(known.encode()).hexdigest()[:16]


def require_tokenizer(place: Path, settings: Mapping[str, Any], inputs: Mapping[str, Path]) -> None:
    """Raise KelibError if a checkpoint has another tokenizer than the text was packed with."""
    _, tokenizer, _ = read_tokenizer(str(place), None)
    packed = json.loads((inputs["text"] / "manifest.json").read_text())["tokenizer"]
    if vocabulary_digest(tokenizer) != packed:
        raise KelibError(
            f"{settings['revision']} has another tokenizer than the first of learning.steps, with "
            "whose the text was packed; continue it in a profile of its own"
        )


def heldout_blocks(folder: Path) -> np.ndarray:
    """The held-out sequences ``(n, T)`` of a finished run, memory-mapped."""
    return np.load(folder / f"{HELDOUT}.npy", mmap_mode="r")

"""The files of one published checkpoint: which of them are its weights, and whether they are whole.

Told from names, sizes, the index of the parts and the headers of the parts, all given; nothing is
asked or fetched here. transformers prefers one safetensors file, then safetensors parts with an
index, then pickles; so does this. No torch.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kelib.errors import listing
from kelib.hub import Header, HubFile

CONFIG = "config.json"
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json"),
)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_PART = re.compile(r"model-\d+-of-\d+\.safetensors")


@dataclass(frozen=True)
class Weights:
    """``form``: safetensors, pickle or none. ``parts`` are there, ``missing`` are not though the
    index names them. By the index, ``tensors`` are in each part, ``total`` bytes in all of them.
    """

    form: str
    parts: tuple[HubFile, ...] = ()
    missing: tuple[str, ...] = ()
    tensors: Mapping[str, frozenset[str]] | None = None
    total: int | None = None
    problems: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """Hash of all weights: of the file, or of the list of parts with their hashes. Empty if a
        part is missing or there are none."""
        if self.missing or not self.parts:
            return ""
        if len(self.parts) == 1:
            return self.parts[0].sha
        lines = "".join(f"{part.sha}  {part.name}\n" for part in self.parts)
        return hashlib.sha256(lines.encode()).hexdigest()


def index_of(files: Mapping[str, HubFile]) -> str | None:
    """The name of the index that says which parts the weights have; None if it is one file."""
    if SINGLE in files:
        return None
    if INDEX in files:
        return INDEX
    return PICKLE_INDEX if PICKLE not in files and PICKLE_INDEX in files else None


def find_weights(files: Mapping[str, HubFile], index: Any) -> Weights:
    """The weights among ``files``; ``index`` is the content of :func:`index_of`, if there is one.

    ``problems`` say why they cannot be used: there are none, only pickles (kelib opens safetensors
    alone), parts without an index, an index that is none, or missing parts.
    """
    name = index_of(files)
    form = "safetensors" if SINGLE in files or name == INDEX else "pickle"
    if name is not None:
        return _by_index(files, name, index, form)
    if SINGLE in files:
        return Weights(form, (files[SINGLE],))
    parts = tuple(files[part] for part in sorted(files) if _PART.fullmatch(part))
    if parts:
        return Weights("safetensors", parts, problems=(f"its parts have no {INDEX}",))
    if PICKLE in files:
        return Weights(form, (files[PICKLE],), problems=(f"no safetensors, only {PICKLE}",))
    return Weights("none", problems=("no weights",))


def _by_index(files: Mapping[str, HubFile], name: str, index: Any, form: str) -> Weights:
    content = index if isinstance(index, dict) else {}
    places = content.get("weight_map")
    problems = [f"no safetensors, only the pickles of {name}"] if form == "pickle" else []
    if not isinstance(places, dict) or not all(isinstance(p, str) for p in places.values()):
        return Weights(form, problems=(*problems, f"{name} is not an index"))
    tensors: dict[str, set[str]] = {}
    for tensor, part in places.items():
        tensors.setdefault(part, set()).add(tensor)
    missing = tuple(part for part in sorted(tensors) if part not in files)
    if missing:
        problems.append(f"missing {listing(missing, 3)} of {len(tensors)} parts")
    metadata = content.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return Weights(
        form,
        tuple(files[part] for part in sorted(tensors) if part in files),
        missing,
        {part: frozenset(names) for part, names in tensors.items()},
        total if isinstance(total, int) else None,
        tuple(problems),
    )


def broken_parts(weights: Weights, headers: Mapping[str, Header | None]) -> list[str]:
    """What the sizes of the parts tell, a sentence each.

    A safetensors file must have the bytes that its header says, and the tensors that the index
    says; ``headers`` are by hash. Of pickles only the sum can be held against the index.
    """
    if weights.form == "pickle":
        held = sum(part.size for part in weights.parts)
        short = weights.total is not None and not weights.missing and held < weights.total
        return [f"cut short: {held:,} of {weights.total:,} bytes"] if short else []
    found = []
    for part in weights.parts:
        header = headers.get(part.sha)
        if header is None:
            found.append(f"{part.name} has no whole header ({part.size:,} bytes)")
        elif part.size < header.size:
            found.append(f"{part.name} is cut short: {part.size:,} of {header.size:,} bytes")
        elif part.size > header.size:
            found.append(f"{part.name} has {part.size:,} bytes, its header says {header.size:,}")
        of_index = (weights.tensors or {}).get(part.name, frozenset())
        if header is not None and (lacking := of_index - header.tensors):
            found.append(f"{part.name} lacks {listing(lacking, 3)}, which the index has in it")
    return found


def dtype_of(headers: Iterable[Header]) -> str:
    """The dtypes of the tensors, as F32 or F16+U8: that of most parameters first."""
    counts: Counter[str] = Counter()
    for header in headers:
        counts.update(header.parameters)
    return "+".join(sorted(counts, key=lambda dtype: (-counts[dtype], dtype)))

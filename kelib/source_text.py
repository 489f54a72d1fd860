"""The documents of a text that was fetched, and the split that each belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from kelib import sources
from kelib.errors import KelibError, listing
from kelib.parsing import local_documents as local_documents  # the user's own, a source like others
from kelib.parsing import parse_files


def parse(source: sources.Source, folder: Path) -> list[str]:
    """The documents of a fetched source: see ``documents``."""
    paths = source.paths(folder)
    if not sources.is_whole(source, paths):
        raise KelibError(
            f"source {source.name!r} is not whole in {paths[0].parent}; run 'make data' to fetch it"
        )
    found = parse_files(paths, source.format, source.longer_than)
    counted = (len(found), sum(len(text.encode()) for text in found))
    if counted != (source.documents, source.text_bytes):
        raise KelibError(
            f"source {source.name!r} parsed into {counted[0]} documents of {counted[1]} bytes, "
            f"data/sources.yaml says {source.documents} of {source.text_bytes}; "
            "measure again when the parser was changed on purpose"
        )
    return found


def documents(name: str, folder: Path) -> list[str]:
    """The documents of a source of the manifest, fetched into ``folder`` before.

    Text is stripped, white space normalised, exact duplicates removed, in the order of the files.
    Raises KelibError: unknown name, source not fetched whole, content that does not parse, or
    counts other than the manifest's.
    """
    known = sources.manifest()
    if name not in known:
        raise KelibError(f"unknown source {name!r}; choose one of {listing(known)}")
    return parse(known[name], Path(folder))


def split_of(document: str, shares: Mapping[str, float]) -> str:
    """The split a document belongs to: a function of its text and of ``shares`` alone.

    The first 8 bytes of the text's sha256 as a fraction of 2^64 fall into one of consecutive
    intervals as long as the shares, in their order. Nothing else in the corpus matters,
    so splits stay disjoint when sources come or go. Raises KelibError unless the shares are at
    least 0 and sum to 1 within 1e-9.

    >>> split_of("Some text.", {"train": 1.0, "held_out": 0.0})
    'train'
    """
    if not (all(share >= 0 for share in shares.values()) and abs(sum(shares.values()) - 1) <= 1e-9):
        raise KelibError(f"shares {dict(shares)} must be at least 0 and sum to 1; correct them")
    digest = hashlib.sha256(document.encode("utf-8")).digest()
    fraction = int.from_bytes(digest[:8], "big") / 2**64
    end = 0.0
    for name, share in shares.items():
        end += share
        if fraction < end:
            return name
    # Rounding of the sum may leave the last sliver out: it goes to the last split with a share.
    return [name for name, share in shares.items() if share > 0][-1]

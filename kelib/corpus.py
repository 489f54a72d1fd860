"""From documents to blocks of tokens: splits, a byte-level BPE tokenizer, packing, deterministic
streams.

Documents of text are split once, by the digest of their text, so that none is both trained on and
measured on; sentences about generated facts have few wordings and do recur. Inside a split they
are tokenised, joined by the end-of-text token and cut into blocks of one length: nothing is
padded, and only the tail shorter than a block is dropped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kelib import source_text, sources
from kelib.config import Corpus
from kelib.errors import KelibError, listing
from kelib.packing import pack, save_tokenizer, train_tokenizer
from kelib.world import World, build_world

GENERAL_SPLITS = {"pretrain": 0.84, "entropy": 0.08, "heldout": 0.08}
DOMAIN_SPLITS = {"continual": 0.9, "heldout": 0.1}
GENERATED_DOCUMENTS = (
    6000  # a `generated:NAME` source, some 240,000 tokens of the study's own tokenizer
)
TOKENIZER_CHARACTERS = 4_000_000  # BPE merges settle long before; more text only costs time
BLOCKS = (
    *("general", "facts", "domain"),  # trained on
    *("unread", "heldout_general", "heldout_domain"),
    *("entropy", "entropy_facts", "entropy_general", "entropy_domain", "convergence"),
)


def source_documents(name: str, folder: Path, settings: Corpus, seed: int) -> list[str]:
    """Documents of one source; ``generated:NAME`` is another world, whose people the study never
    asks about.
    """
    if name.startswith("generated:"):
        other = int(hashlib.sha256(f"{name}/{seed}".encode()).hexdigest()[:8], 16)
        world = build_world(settings.world, other)
        stream = world.documents(other)
        return list(dict.fromkeys(next(stream) for _ in range(GENERATED_DOCUMENTS)))
    if name in sources.manifest():
        return source_text.documents(name, folder)
    if not Path(name).exists():
        raise KelibError(
            f"unknown source {name!r}: use {listing(sources.manifest())}, generated:NAME, or "
            "a file or folder that exists"
        )
    return source_text.local_documents(Path(name))


def split_documents(
    names: Iterable[str], shares: dict[str, float], folder: Path, settings: Corpus, seed: int
) -> dict[str, list[str]]:
    """All documents of the sources by split, each in an order drawn from ``seed``; duplicates fall
    together.
    """
    splits: dict[str, list[str]] = {split: [] for split in shares}
    for name in names:
        for document in source_documents(name, folder, settings, seed):
            splits[source_text.split_of(document, shares)].append(document)
    generator = np.random.default_rng([seed, 11])
    for split, documents in splits.items():
        unique = list(dict.fromkeys(documents))
        splits[split] = [unique[i] for i in generator.permutation(len(unique))]
    return splits


def _mention_free(documents: list[str], world: World) -> list[str]:
    """Drop documents that mention an entry: what is injected later must be new."""
    names = [entry.name for entry in (*world.once, *world.paraphrase)]
    return [text for text in documents if not any(name in text for name in names)]


def build_corpus(
    settings: Corpus, seed: int, wanted: dict[str, int], fetched: Path, folder: Path
) -> dict[str, Any]:
    """Write the tokenizer and the blocks of one pretraining seed into ``folder``; return the
    manifest.

    ``wanted`` gives the number of blocks of ``general``, ``facts`` and ``domain`` that training
    will read; real text that is shorter is read again (the manifest gives the passes), never
    silently cut. ``unread`` is general text that pretraining does not reach, for continual learning
    on it. Of ``unread``, ``convergence`` and the ``entropy_*`` of single kinds of text there is as
    much as the text gives, up to what the settings ask for.
    """
    world = build_world(settings.world, seed)
    general = split_documents(settings.general, GENERAL_SPLITS, fetched, settings, seed)
    domain = split_documents(settings.domain, DOMAIN_SPLITS, fetched, settings, seed)
    general = {split: _mention_free(texts, world) for split, texts in general.items()}
    # a document that two sources share has been pretrained on: it is no news to continual learning
    known = set().union(*general.values())
    domain = {
        split: [text for text in _mention_free(texts, world) if text not in known]
        for split, texts in domain.items()
    }

    def facts(purpose: int) -> Iterator[str]:
        # draws of their own; a fact has few wordings, so that some sentences do recur in
        # pretraining
        return world.documents(seed * 10 + purpose)

    share = settings.facts_share
    tokenizer = train_tokenizer(
        [
            *_first(facts(0), int(TOKENIZER_CHARACTERS * share)),
            *_first(iter(general["pretrain"]), int(TOKENIZER_CHARACTERS * (1 - share))),
        ],
        settings.vocabulary_size,
    )
    length = settings.sequence_length

    def mixed(split: str, purpose: int, blocks: int) -> np.ndarray:
        from_facts = round(blocks * share)
        parts = [pack(facts(purpose), tokenizer, length, from_facts)] if from_facts else []
        if blocks > from_facts:
            parts.append(pack(general[split], tokenizer, length, blocks - from_facts))
        return np.concatenate(parts)

    # documents are packed in order, so that what pretraining leaves unread stays in the iterator
    pretraining, heldout = iter(general["pretrain"]), iter(domain["heldout"])
    arrays = {
        "facts": pack(facts(0), tokenizer, length, wanted["facts"]),
        "general": pack(pretraining, tokenizer, length, wanted["general"]),
        "unread": pack(pretraining, tokenizer, length, settings.domain_sequences),
        "entropy": mixed("entropy", 1, settings.entropy_sequences),
        "heldout_general": mixed("heldout", 2, settings.heldout_sequences),
        "domain": pack(domain["continual"], tokenizer, length, wanted["domain"]),
        "heldout_domain": pack(heldout, tokenizer, length, settings.heldout_sequences),
        "entropy_facts": pack(facts(3), tokenizer, length, settings.entropy_sequences),
        "entropy_general": pack(general["entropy"], tokenizer, length, settings.entropy_sequences),
        "entropy_domain": pack(heldout, tokenizer, length, settings.entropy_sequences),
        "convergence": mixed("entropy", 1, settings.convergence_sequences),
    }
    passes = _passes(settings, wanted, arrays)

    save_tokenizer(tokenizer, length, folder / "tokenizer")
    hashes = {}
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
        hashes[name] = hashlib.sha256((folder / f"{name}.npy").read_bytes()).hexdigest()
    written = {
        "seed": seed,
        "sequence_length": length,
        "blocks": {name: len(array) for name, array in arrays.items()},
        "passes": passes,
        "sha256": hashes,
    }
    (folder / "manifest.json").write_text(json.dumps(written, indent=1, sort_keys=True))
    return written


def _passes(
    settings: Corpus, wanted: dict[str, int], arrays: dict[str, np.ndarray]
) -> dict[str, float]:
    """How often training reads each array. KelibError for one that is empty or must not repeat."""
    heldout = settings.heldout_sequences
    measured = {"heldout_general": heldout, "heldout_domain": heldout}
    measured |= {"entropy": settings.entropy_sequences}
    passes = {}
    for name, need in {**wanted, **measured}.items():
        have, length = len(arrays[name]), settings.sequence_length
        wants = f"corpus {name}: {need} sequences of {length} tokens wanted, "
        if have == 0 and need > 0:
            raise KelibError(wants + "the text gives none; add a source or shorten sequence_length")
        if name in measured and have < need:
            raise KelibError(
                f"{wants}there are {have}; lower corpus.{name.split('_')[0]}_sequences or add a "
                "source"
            )
        passes[name] = round(need / have, 3) if have else 0.0
    return passes


def _first(documents: Iterator[str], characters: int) -> Iterator[str]:
    """Documents until about ``characters`` characters are read (none if 0)."""
    read = 0
    while read < characters:
        document = next(documents, None)
        if document is None:
            return
        read += len(document)
        yield document


@dataclass(frozen=True)
class PackedCorpus:
    """A corpus on disk, its blocks memory-mapped: ``blocks["domain"]`` is ``(n, sequence_length)``
    uint16.
    """

    folder: Path
    blocks: dict[str, np.ndarray]
    manifest: dict[str, Any]

    @property
    def tokenizer_folder(self) -> Path:
        return self.folder / "tokenizer"


def load_corpus(folder: Path) -> PackedCorpus:
    """Open a packed corpus; every file is checked against the manifest's sha256 before it is
    used.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        expected = {name: str(manifest["sha256"][name]) for name in BLOCKS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise KelibError(
            f"no readable packed corpus in {folder}: delete it and run again"
        ) from error
    blocks = {}
    for name in BLOCKS:
        path = folder / f"{name}.npy"
        found = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "missing"
        if found != expected[name]:
            raise KelibError(
                f"{path} has sha256 {found[:12]}, the manifest says {expected[name][:12]}; "
                f"delete {folder} and run again"
            )
        blocks[name] = np.load(path, mmap_mode="r")
    return PackedCorpus(folder, blocks, manifest)


def sequence_order(available: int, wanted: int, seed: int) -> np.ndarray:
    """Indices ``(wanted,)`` of the blocks in reading order: one permutation a pass, drawn from
    ``seed``.

    A pure function of its arguments, so that a resumed run reads what the undisturbed one would
    have.
    """
    if available == 0 and wanted > 0:
        raise KelibError(f"{wanted} sequences wanted from a corpus that has none")
    generator = np.random.default_rng([seed, 12])
    passes = [generator.permutation(available) for _ in range(-(-wanted // max(available, 1)))]
    return np.concatenate(passes)[:wanted] if passes else np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Mixture:
    """The pretraining stream: ``batch(step)`` is ``(batch_size, T)``, facts and text in the stated
    share.
    """

    general: np.ndarray
    facts: np.ndarray
    batch_size: int
    order: np.ndarray  # indices into general, then (offset by len(general)) into facts

    @classmethod
    def build(
        cls, corpus: PackedCorpus, share: float, steps: int, batch_size: int, seed: int
    ) -> Mixture:
        general, facts = corpus.blocks["general"], corpus.blocks["facts"]
        total = steps * batch_size
        from_facts = round(total * share)
        order = np.concatenate(
            [
                sequence_order(len(general), total - from_facts, seed),
                sequence_order(len(facts), from_facts, seed + 1) + len(general),
            ]
        )
        np.random.default_rng([seed, 13]).shuffle(order)
        return cls(general, facts, batch_size, order)

    def batch(self, step: int) -> np.ndarray:
        rows = self.order[step * self.batch_size : (step + 1) * self.batch_size]
        text = len(self.general)
        return np.stack([self.facts[r - text] if r >= text else self.general[r] for r in rows])

"""How well a model predicts the names in a text: the perplexity of every mention (Fig. 10).

A mention of tokens a to b - 1 has ln perplexity 1 / (b - a) sum_i -ln p(token_i | what comes before
it in its sequence). The paper finds entities by a model for that; here they are names that the
sources carry (:mod:`kelib.gazetteer`). What is measured beside them are the tokens outside.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kelib.config import TEXTS, Corpus
from kelib.corpus import PackedCorpus
from kelib.errors import KelibError
from kelib.gazetteer import Names, common_words, names_of

SEQUENCES = 1024  # read of each text
LOGITS = 2**22  # held at once
BETWEEN = b"\n"  # in place of a special token: no name runs across it


def token_bytes(tokenizer: Any) -> list[bytes]:
    """The bytes of every token of a byte-level BPE; for special tokens a line break.

    Raises KelibError for a tokenizer of another kind.
    """
    # the alphabet of byte-level BPE: printable bytes stand for themselves, the others follow 255
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [value for value in range(256) if value not in printable]
    byte_of = {chr(value): value for value in printable}
    byte_of |= {chr(256 + place): value for place, value in enumerate(others)}
    special = set(tokenizer.all_special_ids)
    words = []
    for number, token in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))):
        if number not in special and not set(token) <= byte_of.keys():
            raise KelibError(
                f"token {number} of {tokenizer.name_or_path} is {token!r}, in no byte-level "
                "alphabet; train the tokenizer with kelib.packing.train_tokenizer"
            )
        words.append(BETWEEN if number in special else bytes(byte_of[c] for c in token))
    return words


def text_of(ids: Any, words: list[bytes]) -> str:
    """What the tokens ``ids`` ``(T,)`` say; ``words`` are the bytes of every token.

    Bytes that are no UTF-8 (a character cut at the edge) become one character each, as Python's
    ``surrogateescape`` has it.
    """
    return b"".join([words[i] for i in ids]).decode("utf-8", "surrogateescape")


def read_tokens(ids: Any, words: list[bytes]) -> tuple[str, np.ndarray, np.ndarray]:
    """(text, first, last): :func:`text_of` and, for each of its characters, the places of the first
    and of the last token that it is made of.
    """
    text, pieces = text_of(ids, words), [words[i] for i in ids]
    of_byte = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])
    lengths = [len(c.encode("utf-8", "surrogateescape")) for c in text]
    ends = np.cumsum(lengths, dtype=np.int64)
    return text, of_byte[ends - lengths], of_byte[ends - 1]


def sample(blocks: np.ndarray, most: int = SEQUENCES) -> np.ndarray:
    """At most ``most`` of the blocks ``(n, T)``, evenly spread: neighbours share documents."""
    count = min(most, len(blocks))
    rows = np.arange(count) * len(blocks) // max(count, 1)
    return np.asarray(blocks[rows], dtype=np.int64)


@dataclass(frozen=True)
class Mentions:
    """Where the names are in blocks ``(n, T)``.

    spans: columns sequence, first, end (tokens ``first`` to ``end - 1``) and name, the number of
        the name in order of first mention; sorted by place.
    outside: ``(n, T)`` bool, the tokens of no name.
    """

    spans: pd.DataFrame
    outside: np.ndarray


def find_mentions(blocks: np.ndarray, words: list[bytes], names: Names, end: int) -> Mentions:
    """Mentions of ``names`` in token blocks ``(n, T)``; ``end`` is the end-of-text token.

    A name that begins with the first token of a sequence or of a document is left out: nothing of
    its document comes before it (and a Wikipedia summary begins with its own title). The tokens at
    these places and ``end`` itself do not count as outside either.
    """
    rows: list[tuple[int, ...]] = []
    numbers: dict[str, int] = {}
    before = np.concatenate([np.full((len(blocks), 1), end), blocks[:, :-1]], axis=1)
    outside = (blocks != end) & (before != end)
    for sequence, ids in enumerate(blocks):
        text, firsts, lasts = read_tokens(ids, words)
        for start, stop, name in names.find(text):
            first, last = int(firsts[start]), int(lasts[stop - 1])
            outside[sequence, first : last + 1] = False
            if before[sequence, first] != end:
                number = numbers.setdefault(name, len(numbers))
                rows.append((sequence, first, last + 1, number))
    return Mentions(pd.DataFrame(rows, columns=["sequence", "first", "end", "name"]), outside)


def mentions_by_text(
    corpus: PackedCorpus, settings: Corpus, fetched: Path, seed: int
) -> dict[str, tuple[np.ndarray, Mentions]]:
    """(blocks, mentions) of ``general`` and of ``domain`` text that pretraining has not read.

    Of each as much as there is up to :data:`SEQUENCES`: what continual learning will read, or the
    sequences kept for entropy if there are more of these. The names are those of the sources of
    each text (``fetched``), without the words that are common in general text.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(corpus.tokenizer_folder)
    words = token_bytes(tokenizer)
    common = common_words(text_of(corpus.blocks["general"].ravel(), words))
    found = {}
    for data, listed in (("general", settings.general), ("domain", settings.domain)):
        kinds = [corpus.blocks[TEXTS[data]], corpus.blocks[f"entropy_{data}"]]
        blocks = sample(max(kinds, key=len))
        names = names_of(listed, fetched, settings, seed).without(common)
        found[data] = blocks, find_mentions(blocks, words, names, tokenizer.eos_token_id)
    return found


def token_nats(model: Any, blocks: np.ndarray) -> np.ndarray:
    """-ln p(token | what comes before it in its block), nats, ``(n, T)`` float64.

    Nothing comes before the first token: its column is NaN.
    """
    import torch
    from torch.nn import functional

    from kelib.batches import block_batches

    nats = np.full(blocks.shape, np.nan)
    device = next(model.parameters()).device
    vocabulary = model.get_output_embeddings().weight.shape[0]
    size = max(1, LOGITS // (vocabulary * blocks.shape[1]))
    with torch.inference_mode():
        for number, batch in enumerate(block_batches(blocks, size)):
            ids = batch.to(device)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            lost = functional.cross_entropy(logits.mT, ids[:, 1:], reduction="none")
            nats[number * size : number * size + len(ids), 1:] = lost.cpu().numpy()
    return nats


def mention_nats(mentions: Mentions, nats: np.ndarray) -> pd.DataFrame:
    """Columns mention, name (numbers), tokens and nats (sum over its tokens) of every mention."""
    spans = mentions.spans
    totals = [
        nats[sequence, first:end].sum()
        for sequence, first, end in spans[["sequence", "first", "end"]].itertuples(index=False)
    ]
    numbers = {"mention": range(len(spans)), "name": spans["name"]}
    numbers["tokens"] = spans["end"] - spans["first"]
    return pd.DataFrame(numbers).assign(nats=np.array(totals, dtype=float))


def outside_nats(mentions: Mentions, nats: np.ndarray) -> dict[str, float]:
    """``tokens`` outside the mentions and their ``nats`` (sum)."""
    return {"tokens": int(mentions.outside.sum()), "nats": float(nats[mentions.outside].sum())}

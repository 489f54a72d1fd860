"""A byte-level BPE tokenizer, and documents packed to blocks of tokens with it or another one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from kelib.errors import KelibError

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(documents: Iterable[str], vocabulary_size: int) -> Tokenizer:
    """A byte-level BPE: every text encodes, nothing is unknown, and id 0 is the end-of-text
    token.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def pack(
    documents: Iterable[str], tokenizer: Tokenizer, length: int, blocks: int | None = None
) -> np.ndarray:
    """Token blocks ``(n, length)`` uint16: documents each followed by end-of-text, joined and cut.

    Stops reading once ``blocks`` are full (an iterator keeps the documents that come after, but
    for the rest of a chunk of 32); without it reads everything.
    """
    end = tokenizer.token_to_id(END_OF_TEXT)
    want = None if blocks is None else blocks * length
    ids: list[int] = []
    for chunk in _chunks(documents, 32):
        for encoding in tokenizer.encode_batch(chunk):
            ids.extend(encoding.ids)
            ids.append(end)  # type: ignore[arg-type]  # train_tokenizer adds it to every tokenizer
        if want is not None and len(ids) >= want:
            break
    full = len(ids) // length if want is None else min(len(ids), want) // length
    return np.asarray(ids[: full * length], dtype=np.uint16).reshape(full, length)


def _chunks(items: Iterable[str], size: int) -> Iterator[list[str]]:
    chunk: list[str] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def save_tokenizer(tokenizer: Tokenizer, length: int, folder: Path) -> None:
    """Write the tokenizer as ``AutoTokenizer.from_pretrained`` reads it."""
    from transformers import (
        PreTrainedTokenizerFast,
    )  # a heavy import that packing alone does not need

    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=length,
    )
    wrapped.save_pretrained(folder)


def pack_text(
    documents: list[str], tokenizer: Any, end: int, length: int, sequences: int
) -> tuple[np.ndarray, int]:
    """Token ids ``(n, length)`` int64, n at most ``sequences``, and how many documents were read.

    Documents, each followed by ``end``, are joined and cut; the rest shorter than ``length`` is
    dropped. Raises KelibError if the tokenizer knows nothing of the text.
    """
    special = set(tokenizer.all_special_ids)
    ids: list[int] = []
    read, known = 0, False
    while read < len(documents) and len(ids) < sequences * length:
        chunk = documents[read : read + 64]
        # verbose: documents longer than the window are no mistake here
        options = {"add_special_tokens": False, "verbose": False}
        for encoded in tokenizer(chunk, **options)["input_ids"]:
            known = known or not special.issuperset(encoded)
            ids += [*encoded, end]
        read += len(chunk)
        if not known:  # transformers makes an empty tokenizer where the files are missing
            raise KelibError(
                f"{tokenizer.name_or_path} has no tokenizer, or one that knows nothing of this "
                "text; put the model's own tokenizer files (tokenizer.json and "
                "tokenizer_config.json) beside its weights"
            )
    count = min(sequences, len(ids) // length)
    return np.array(ids[: count * length], dtype=np.int64).reshape(count, length), read

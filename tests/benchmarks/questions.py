"""Four-way questions of random words whose lengths in tokens are chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kelib.packing import END_OF_TEXT
from kelib.world import CHOICES

Settings = Mapping[str, Any]


def lengths(settings: Settings) -> tuple[list[int], list[int]]:
    """Tokens of every context, spread evenly from the least to the most, and of every choice."""
    number, (least, most) = settings["questions"], settings["choice"]
    contexts = np.linspace(*settings["context"], number).round().astype(int).tolist()
    return contexts, [least + i % (most - least + 1) for i in range(CHOICES * number)]


def token_bound(settings: Settings) -> float:
    """How many times fewer tokens are read when a context is read once, ``4 (C + a) / (C + 4 a)``
    with C and a the mean tokens of a context and of a choice.
    """
    context, choice = (float(np.mean(tokens)) for tokens in lengths(settings))
    return CHOICES * (context + choice) / (context + CHOICES * choice)


def word_tokenizer(words: int) -> PreTrainedTokenizerFast:
    """One token a word, ``w1`` to ``w<words - 1>``, so that lengths of texts are what is wanted."""
    vocabulary = {END_OF_TEXT: 0} | {f"w{number}": number for number in range(1, words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=END_OF_TEXT))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends)


@torch.no_grad()
def questions(model: Any, tokenizer: Any, settings: Settings) -> list[tuple[str, str]]:
    """(context, choice) pairs of random words, four a question in a row.

    The last choice of a question is what the model finds most probable word by word: without it no
    continuation would be greedy, and comparing that would compare nothing.
    """
    generator = np.random.default_rng(2)
    contexts, choices = lengths(settings)
    words, requests = settings["model"]["vocab_size"], []
    for number, tokens in enumerate(contexts):
        context = generator.integers(1, words, tokens).tolist()
        *others, last = choices[CHOICES * number : CHOICES * (number + 1)]
        tails = [generator.integers(1, words, size).tolist() for size in others]
        read = list(context)
        for _ in range(last):
            logits = model(input_ids=torch.tensor([read]), use_cache=False).logits
            read.append(int(logits[0, -1].argmax()))
        for tail in (*tails, read[tokens:]):
            requests.append((tokenizer.decode(context), " " + tokenizer.decode(tail)))
    return requests


def described(settings: Settings) -> dict[str, Any]:
    """Settings of a scoring row with the sizes of its questions in words."""
    context, choice = (float(np.mean(tokens)) for tokens in lengths(settings))
    text = (
        f"{settings['questions']} questions of {CHOICES}, C={context:g} a={choice:g}, token bound "
        f"{token_bound(settings):.2f}"
    )
    return {**settings, "data": text}

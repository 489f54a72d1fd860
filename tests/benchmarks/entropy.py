"""Rows of the group ``entropy``: what a measurement costs, beside doing without kelib."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import kelib
from kelib.config import load_profile

from .rows import Comparison, Row, Variant

Batches = list[dict[str, torch.Tensor]]

SIZES = (4, 8, 16, 32)  # batches of the four data sets that show growth
_small = load_profile("small")
# The model of the study and its batches.
SMALL = {
    "model": {**asdict(_small.model), "vocab_size": _small.corpus.vocabulary_size},
    "tokens": _small.corpus.sequence_length,
    "batch": 64,
    "batches": 4,
    "repeats": 30,
}
# OLMo's architecture and vocabulary at a fraction of its depth and width.
D512 = {
    "model": {
        "model_type": "olmo",
        "vocab_size": 50304,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
    },
    "tokens": 1024,
    "batch": 1,
    "batches": 1,
    "repeats": 15,
}
# SmolLM2-135M.
LLAMA_135M = {
    "model": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "tokens": 1024,
    "batch": 1,
    "batches": 1,
    "repeats": 4,
}
TINY = {
    "model": {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
    "tokens": 16,
    "batch": 2,
    "batches": 2,
    "repeats": 2,
}


def random_model(settings: Mapping[str, Any]) -> Any:
    """A model of the given shape with random weights, float32, the same ones every time."""
    torch.manual_seed(0)
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    config = AutoConfig.for_model(
        **settings["model"], max_position_embeddings=settings["tokens"], **ends
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def random_batches(settings: Mapping[str, Any]) -> Batches:
    """``batches`` times ``batch`` sequences of ``tokens`` random tokens, nothing padded."""
    torch.manual_seed(1)
    shape, words = (settings["batch"], settings["tokens"]), settings["model"]["vocab_size"]
    return [{"input_ids": torch.randint(words, shape)} for _ in range(settings["batches"])]


@torch.no_grad()
def trunk(model: Any, batches: Batches) -> None:
    """The bare forward pass without the vocabulary projection."""
    for batch in batches:
        model.model(**batch, use_cache=False)


@torch.no_grad()
def logits(model: Any, batches: Batches) -> None:
    """The plain forward pass, float32 logits of every token."""
    for batch in batches:
        model(**batch, use_cache=False)


def cache_activations(model: Any, batches: Batches) -> torch.Tensor:
    """Knowledge entropy from a cache: every input of every down projection first, the rest after.

    It is frugal otherwise: the cached tensors are never joined, and read once.
    """
    cached: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    with ExitStack() as hooks:
        for kept, layer in zip(cached, model.model.layers, strict=True):

            def keep(_module: Any, inputs: Any, kept: list[torch.Tensor] = kept) -> None:
                kept.append(inputs[0].cpu())

            hooks.callback(layer.mlp.down_proj.register_forward_pre_hook(keep).remove)
        trunk(model, batches)
    entropies = []
    for kept in cached:
        total = sum(c.abs().mean(dim=1).double().sum(dim=0) for c in kept)
        assert isinstance(total, torch.Tensor)
        entropies.append(torch.special.entr(total / total.sum()).sum())
    return torch.stack(entropies)


def plain_entropy(weights: torch.Tensor) -> torch.Tensor:
    """Entropy over the last axis by the usual formula, with the 1e-9 of the paper's release."""
    return -(weights * (weights + 1e-9).log()).sum(dim=-1)


def lean_entropy(weights: torch.Tensor) -> torch.Tensor:
    """The same in the least time and memory that torch offers: one pass, one temporary tensor."""
    return torch.special.entr(weights).sum(dim=-1)


@contextmanager
def eager(model: Any) -> Iterator[None]:
    """Eager attention while the scope lasts."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def eager_attention(
    entropy: Callable[[torch.Tensor], torch.Tensor], model: Any, batches: Batches
) -> torch.Tensor:
    """Attention entropy by layer and head from the weights that eager attention hands out.

    Each layer's weights are used and let go before the next layer runs.
    """
    sums = [torch.zeros(model.config.num_attention_heads) for _ in model.model.layers]
    with ExitStack() as undo:
        undo.enter_context(eager(model))
        for total, layer in zip(sums, model.model.layers, strict=True):

            def add(_module: Any, _inputs: Any, output: Any, total: torch.Tensor = total) -> None:
                total += entropy(output[1]).mean(dim=-1).sum(dim=0)

            undo.callback(layer.self_attn.register_forward_hook(add).remove)
        trunk(model, batches)
    return torch.stack(sums)


@torch.no_grad()
def output_attentions(model: Any, batches: Batches) -> torch.Tensor:
    """The same as transformers documents it: the weights of all layers, handed out at the end."""
    total = torch.zeros(len(model.model.layers), model.config.num_attention_heads)
    with eager(model):
        for batch in batches:
            weights = model.model(**batch, use_cache=False, output_attentions=True).attentions
            total += torch.stack([lean_entropy(w).mean(dim=-1).sum(dim=0) for w in weights])
    return total


def measurements(settings: Mapping[str, Any]) -> dict[str, Variant]:
    """Each kind of measurement and what it is compared with, over the same data."""
    model, batches = random_model(settings), random_batches(settings)
    alone: dict[str, Any] = {"knowledge": False}
    works = {
        "trunk": trunk,
        "logits": logits,
        "caching": cache_activations,
        "eager": partial(eager_attention, plain_entropy),
        "lean eager": partial(eager_attention, lean_entropy),
        "output_attentions": output_attentions,
        "knowledge": kelib.measure_entropy,
        "attention": partial(kelib.measure_entropy, **alone, attention=True),
        "next token": partial(kelib.measure_entropy, **alone, next_token=True),
        "all three": partial(kelib.measure_entropy, attention=True, next_token=True),
    }
    sequences = settings["batch"] * settings["batches"]
    return {name: Variant(partial(work, model, batches), sequences) for name, work in works.items()}


def growth(settings: Mapping[str, Any]) -> dict[str, Variant]:
    """Knowledge entropy over data sets of growing size, the first of them 1 of the batches."""
    model, batches = random_model(settings), random_batches(settings)
    return {
        f"{size} batches": Variant(
            partial(kelib.measure_entropy, model, batches[:size]), size * settings["batch"]
        )
        for size in SIZES
    }


def _knowledge(time: float, memory: float) -> tuple[Comparison, ...]:
    return (
        Comparison("time", "knowledge", "trunk", "<=", time),
        Comparison("memory", "knowledge", "trunk", "<=", memory),
    )


def _caching(batches: int) -> tuple[Comparison, ...]:
    """Never slower, and less memory by the number of batches."""
    return (
        Comparison("time", "knowledge", "caching", "<=", 1.0),
        Comparison("memory", "knowledge", "caching", ">=", batches),
    )


ROWS = (
    Row("knowledge-512", measurements, _knowledge(1.05, 1.10), D512, TINY),
    Row("knowledge-small", measurements, _knowledge(1.2, 1.2), SMALL, TINY),
    Row(
        "all-three-512",
        measurements,
        [Comparison("time", "all three", "logits", "<=", 2.0)],
        {**D512, "repeats": 5},
        TINY,
    ),
    Row(
        "all-three-small",
        measurements,
        [Comparison("time", "all three", "logits", "<=", 2.0)],
        SMALL,
        TINY,
    ),
    Row("caching-512", measurements, _caching(4), {**D512, "batches": 4, "repeats": 5}, TINY),
    Row("caching-small", measurements, _caching(16), {**SMALL, "batches": 16, "repeats": 5}, TINY),
    Row(
        "attention-135m",
        measurements,
        [
            Comparison("time", "attention", "lean eager", ">=", 2, floor="trunk"),
            Comparison("memory", "attention", "eager", ">=", 4),
            Comparison("memory", "attention", "output_attentions", ">=", 4),
            # The trunk alone takes as much as ours, so that no measurement could do better here.
            Comparison("memory", "attention", "lean eager", ">=", None),
            Comparison("memory", "attention", "trunk", "<=", None),
        ],
        LLAMA_135M,
        TINY,
    ),
    Row(
        "next-token-50k",
        measurements,
        [Comparison("memory", "next token", "logits", ">=", 4)],
        {**D512, "tokens": 2048},
        TINY,
    ),
    Row(
        "growth-small",
        growth,
        [
            Comparison(quantity, f"{size} batches", f"{SIZES[0]} batches", "<=", 1.05)
            for quantity in ("time", "memory")
            for size in SIZES[1:]
        ],
        {**SMALL, "batches": SIZES[-1], "repeats": 5},
        TINY,
    ),
)

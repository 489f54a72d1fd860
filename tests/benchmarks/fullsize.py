"""Rows of the group ``fullsize``: OLMo-1B in its published shape, random weights, on this machine.

Nothing is downloaded: the weights are drawn in place, in float32, 4.7 GB without a second copy.

**Time** stands beside a floor: as many FLOPs as :mod:`kelib.scale` counts for the same tokens, as
matrix products of the shape of a feed-forward layer, at the rate that they reach in the same
rounds. Only a part of them is done, and ``units`` says which, so that seconds are of the whole.

- ``entropy``: the knowledge entropy of sequences of 2,048 tokens, as the paper measures it. The
  vocabulary projection is not part of it, so that its FLOPs are not part of the floor.
- ``step``: a step of continual learning through ``kelib.training.Trainer`` with AdamW: one sequence
  of 1,024 tokens, activations recomputed. The forward pass that is computed again does not count in
  the floor, as model FLOPs have it: 4 / 3 is the least that a step can take of it.

**Memory** is all of it: a process makes the model within what is measured. The baseline is one
float32 copy of the weights, so that the ratio of a step is at least 4 (weights, gradients and two
moments). Rows that the free memory does not hold are not begun, and their record says why.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from transformers import AutoConfig

import kelib
from kelib.scale import Memory, Shape, forward_flops, shape_of, training_flops, training_memory
from kelib.sharding import recompute_activations
from kelib.training import Trainer

from . import entropy
from .entropy import random_batches, random_model
from .learning import CONSTANT, MANY, RATE
from .rows import Comparison, Row, Variant

Settings = Mapping[str, Any]

# allenai/OLMo-1B-hf
OLMO_1B = {
    "model_type": "olmo",
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "tie_word_embeddings": True,
}
FLOAT32 = 4  # bytes
# Python and its libraries, and what the formula leaves out: the gradients of the logits and of the
# tied matrix while they are computed
BESIDE = 1.5e9
PRODUCTS = 4  # matrix products a round of the floor


def shape(settings: Settings) -> Shape:
    """Shape of the model of a row, for counting."""
    return shape_of(AutoConfig.for_model(**settings["model"]))


def weights(settings: Settings) -> list[torch.Tensor]:
    """As many float32 numbers as the model has weights, written once."""
    count, piece = shape(settings).parameters, 2**26
    return [torch.ones(min(piece, count - first)) for first in range(0, count, piece)]


def products(settings: Settings, flops: float) -> Variant:
    """Matrix products of tokens and the weights of a feed-forward layer, for ``flops`` in all."""
    model, tokens = settings["model"], settings["tokens"]
    rows = torch.ones(tokens, model["hidden_size"])
    matrix = torch.ones(model["hidden_size"], model["intermediate_size"])
    made = torch.empty(tokens, model["intermediate_size"])

    def run() -> None:
        for _ in range(PRODUCTS):
            torch.mm(rows, matrix, out=made)

    return Variant(run, units=PRODUCTS * 2 * rows.numel() * matrix.shape[1] / flops)


def measuring(settings: Settings) -> dict[str, Variant]:
    """Knowledge entropy of a model and sequences, beside its floor and the weights."""
    batches, counted = random_batches(settings), shape(settings)
    sequences = settings["batch"] * settings["batches"]
    model = functools.cache(partial(random_model, settings))  # not twice in one process
    head = 2 * counted.vocabulary_size * counted.hidden_size
    flops = settings["tokens"] * (forward_flops(counted, settings["tokens"]) - head)
    return {
        "entropy": Variant(lambda: kelib.measure_entropy(model(), batches), sequences),
        "matrix products": products(settings, flops),
        "model and entropy": Variant(
            lambda: kelib.measure_entropy(random_model(settings), batches)
        ),
        "weights": Variant(partial(weights, settings)),
    }


def trainer(settings: Settings) -> Trainer:
    """A trainer of a new model that recomputes activations."""
    model = recompute_activations(random_model(settings))
    blocks = [batch["input_ids"].numpy().astype(np.uint16) for batch in random_batches(settings)]
    return Trainer(
        model,
        lambda step: blocks[step % len(blocks)],
        MANY,
        RATE,
        CONSTANT,
        Accelerator(cpu=True),
        micro_batch_size=1,
    )


def learning_step(settings: Settings) -> dict[str, Variant]:
    """A step of continual learning, beside its floor and the weights."""
    made = functools.cache(partial(trainer, settings))

    def step(of: Callable[[], Trainer]) -> None:
        chosen = of()
        chosen.run(chosen.step + 1)

    tokens = settings["batch"] * settings["tokens"]
    flops = tokens * training_flops(shape(settings), settings["tokens"])
    return {
        "step": Variant(partial(step, made)),
        "matrix products": products(settings, flops),
        "model and step": Variant(partial(step, partial(trainer, settings))),
        "weights": Variant(partial(weights, settings)),
    }


def memory_of_entropy(settings: Settings) -> float:
    """Bytes that measuring takes: the weights, and a few activations of one layer."""
    row = settings["batch"] * settings["tokens"] * settings["model"]["intermediate_size"]
    return FLOAT32 * (shape(settings).parameters + 8 * row) + BESIDE


def memory_of_step(settings: Settings) -> float:
    """Bytes that a step takes, see :func:`kelib.scale.training_memory`."""
    planned: Memory = training_memory(shape(settings), settings["tokens"], precision="float32")
    return planned.total + BESIDE


def _beside(ours: str) -> tuple[Comparison, ...]:
    return (
        Comparison("time", ours, "matrix products", "<=", None),
        Comparison("memory", f"model and {ours}", "weights", "<=", None),
    )


ROWS = (
    Row(
        "entropy-olmo-1b",
        measuring,
        _beside("entropy"),
        {"model": OLMO_1B, "tokens": 2048, "batch": 1, "batches": 2, "repeats": 1},
        entropy.TINY,
        needs=memory_of_entropy,
    ),
    Row(
        "step-olmo-1b",
        learning_step,
        _beside("step"),
        {"model": OLMO_1B, "tokens": 1024, "batch": 1, "batches": 1, "repeats": 1},
        {**entropy.TINY, "batch": 1, "batches": 1},
        needs=memory_of_step,
    ),
)

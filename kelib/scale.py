"""What a model costs by formula: parameters, FLOPs, memory and hours of a device. No torch.

The counts behind the formulas: Kaplan et al. 2020 (arXiv:2001.08361) for 2 N FLOPs a token in a
forward pass and three times as many in training; Chowdhery et al. 2022 (arXiv:2204.02311, appendix
B) for attention and for model FLOPs utilisation (MFU); Rajbhandari et al. 2020 (arXiv:1910.02054)
for the states of mixed-precision AdamW; Korthikanti et al. 2022 (arXiv:2205.05198) for activations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from kelib.errors import KelibError, listing
from kelib.schema import require

# bytes of a parameter in bf16 training with AdamW: weight and gradient in bfloat16, and in float32
# the weight that is updated and its two moments
BF16_ADAMW = 2 + 2 + 4 + 2 * 4
# the same in float32: weight, gradient and two moments
FLOAT32_ADAMW = 4 + 4 + 2 * 4


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the costs of a decoder-only transformer depend on."""

    model_type: str
    hidden_size: int  # d
    intermediate_size: int  # m
    layers: int
    heads: int
    key_value_heads: int
    head_size: int
    vocabulary_size: int
    tied: bool  # one matrix for looking tokens up and for predicting them

    @property
    def layer_matrices(self) -> int:
        """Weights of the matrices of one layer: d m for each of the two or, with a gate, three of
        the feed-forward layer, and the four of attention."""
        attention = 2 * (self.heads + self.key_value_heads) * self.head_size
        feed_forward = (3 if _family(self.model_type).gated else 2) * self.intermediate_size
        return self.hidden_size * (attention + feed_forward)

    @property
    def parameters(self) -> int:
        """All weights; a tied matrix counts once."""
        embeddings = (1 if self.tied else 2) * self.vocabulary_size * self.hidden_size
        vectors = _family(self.model_type).vectors(self)
        return self.layers * self.layer_matrices + embeddings + vectors

    @property
    def multiplied(self) -> int:
        """N of the formulas: the weights of matrices that tokens are multiplied with, which are all
        but those that are only looked up."""
        return self.layers * self.layer_matrices + self.vocabulary_size * self.hidden_size


@dataclasses.dataclass(frozen=True)
class Family:
    """How the models of a type differ in what is counted."""

    gated: bool  # three matrices in a feed-forward layer
    vectors: Callable[[Shape], int]  # weights of norms and biases
    tied: bool = False  # where a configuration does not say


FAMILIES = {
    "olmo": Family(True, lambda s: 0),
    "olmo2": Family(
        True,
        lambda s: (
            (2 * s.layers + 1) * s.hidden_size
            + s.layers * (s.heads + s.key_value_heads) * s.head_size
        ),
    ),
    **dict.fromkeys(
        ("llama", "mistral"), Family(True, lambda s: (2 * s.layers + 1) * s.hidden_size)
    ),
    "gpt_neox": Family(
        False,
        lambda s: s.layers * (9 * s.hidden_size + s.intermediate_size) + 2 * s.hidden_size,
    ),
}


def _family(model_type: str) -> Family:
    """Of a type that is not listed, the weights of the matrices alone are counted, with a gate:
    estimates need no more."""
    return FAMILIES.get(model_type, Family(True, lambda s: 0))


def shape_of(config: Any, vocabulary_size: int | None = None) -> Shape:
    """The shape that a configuration of transformers, or a ``model`` section of a profile, gives;
    the vocabulary of the latter is that of its corpus.
    """
    heads = config.num_attention_heads
    tied = getattr(config, "tie_word_embeddings", None)
    return Shape(
        model_type=config.model_type,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=heads,
        key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocabulary_size=vocabulary_size or config.vocab_size,
        tied=_family(config.model_type).tied if tied is None else bool(tied),
    )


def forward_flops(shape: Shape, length: int) -> int:
    """FLOPs of a forward pass, per token of a sequence of ``length`` T: ``2 N + 4 L a T``.

    N: :attr:`Shape.multiplied`; the second term is scores and their products with values in L
    layers with a = heads x head size, of all T positions, causal or not, as MFU is usually stated.
    """
    attention = shape.layers * shape.heads * shape.head_size * length
    return 2 * shape.multiplied + 4 * attention


def training_flops(shape: Shape, length: int) -> int:
    """FLOPs of a training step per token: ``6 N + 12 L a T``, three forward passes. A pass that is
    computed twice to save memory does not count, as MFU has it."""
    return 3 * forward_flops(shape, length)


# --- devices ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Device:
    """An accelerator: peak FLOP/s of dense bfloat16 matrix products, and bytes of memory."""

    flops: float
    memory: float


# NVIDIA's data sheets, H100 and H200 as SXM modules, without the doubling by sparsity
DEVICES = {
    "A100": Device(312e12, 80e9),
    "H100": Device(989e12, 80e9),
    "H200": Device(989e12, 141e9),
    "L40S": Device(362e12, 48e9),
}
USABLE = 0.8  # of the memory of a device


def device_hours(flops: float, device: str, mfu: float) -> float:
    """Hours of one device for ``flops``: ``flops / (peak mfu)``.

    Raises KelibError for a device that is not listed and for an MFU outside (0, 1].
    """
    if device not in DEVICES:
        raise KelibError(f"device {device!r} must be one of {listing(DEVICES)}")
    require(0 < mfu <= 1, "mfu", mfu, "above 0 and at most 1")
    return flops / (DEVICES[device].flops * mfu) / 3600


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device in a training step."""

    states: float  # its part of weights, gradients and what AdamW keeps
    gathered: float  # weights that are whole for the moment
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return self.states + self.gathered + self.activations + self.logits


def training_memory(
    shape: Shape,
    tokens: int,
    devices: int = 1,
    recompute: bool = True,
    precision: str = "bf16",
) -> Memory:
    """Memory of each of ``devices`` that share a model by FSDP, with ``tokens`` on each at once.

    * states: 16 N bytes over all devices, N all parameters (:data:`BF16_ADAMW`).
    * gathered: with several devices, the matrices of two layers, the one that is computed and the
      next, and of the head.
    * activations: ``34 d`` bytes a token and layer in 16 bits, without the scores of attention,
      which fused attention does not keep. With ``recompute`` the input of every layer, ``2 d``, and
      all of one layer.
    * logits: in 16 bits and in float32, ``6 V`` bytes a token.

    With ``precision="float32"`` activations are twice as large and logits ``4 V``. Buffers of
    libraries and what the allocator wastes come on top. Raises KelibError for counts below 1 and
    another precision.
    """
    require(tokens >= 1, "tokens", tokens, "at least 1")
    require(devices >= 1, "devices", devices, "at least 1")
    require(precision in ("bf16", "float32"), "precision", precision, "bf16 or float32")
    wide = precision == "float32"
    width = 4 if wide else 2
    state = FLOAT32_ADAMW if wide else BF16_ADAMW
    head = shape.vocabulary_size * shape.hidden_size
    whole = width * (2 * shape.layer_matrices + head) if devices > 1 else 0
    layer = 17 * width * shape.hidden_size
    kept = shape.layers * width * shape.hidden_size + layer if recompute else shape.layers * layer
    return Memory(
        states=state * shape.parameters / devices,
        gathered=whole,
        activations=tokens * kept,
        logits=tokens * shape.vocabulary_size * (4 if wide else 6),
    )


def fsdp2_memory(shape: Shape, tokens: int, devices: int) -> Memory:
    """Memory of each of ``devices`` that share a training as :mod:`kelib.sharding` divides it, in
    bf16 with recomputed activations and ``tokens`` on each at once.

    * states: 16 N bytes over all devices. Weights, gradients and both moments stay float32: as many
      times the bytes of a number as processes were found to hold (``tests/test_sharding.py``).
    * gathered, in float32: the weights of embeddings and head, which stay whole for a step, and of
      two layers, the one that is computed and the next; gradients, whole until they are divided, of
      embeddings and head and of one layer. Beside them ``2 N`` bytes, the copies in 16 bits that
      autocast makes of weights and may keep until the end of the forward pass.
    * activations: the input of every layer in float32, ``4 d`` bytes a token, and all of one layer
      in 16 bits, ``34 d``.
    * logits: in 16 bits and in float32, ``6 V`` bytes a token.

    By formula, but for the states. Buffers of nccl and what the allocator wastes come on top.
    Raises KelibError for counts below 1.
    """
    plain = training_memory(shape, tokens, devices)
    ends = (1 if shape.tied else 2) * shape.vocabulary_size * shape.hidden_size
    weights, gradients = ends + 2 * shape.layer_matrices, ends + shape.layer_matrices
    return Memory(
        states=FLOAT32_ADAMW * shape.parameters / devices,
        gathered=4 * (weights + gradients) + 2 * shape.parameters,
        activations=tokens * (4 * shape.layers + 34) * shape.hidden_size,
        logits=plain.logits,
    )


# --- the paper's scale --------------------------------------------------------------------------

PAPER = {
    "OLMo-1B": Shape("olmo", 2048, 8192, 16, 16, 16, 128, 50304, tied=True),
    "OLMo-7B": Shape("olmo", 4096, 11008, 32, 32, 32, 128, 50304, tied=False),
}
# by their name in data/catalogue.yaml; Pythia's: Biderman et al. 2023 (arXiv:2304.01373), Table 1
PUBLISHED = {
    "olmo-1b": PAPER["OLMo-1B"],
    "olmo-7b": PAPER["OLMo-7B"],
    **{
        f"pythia-{name}": Shape(
            "gpt_neox", d, 4 * d, layers, heads, heads, d // heads, words, False
        )
        for name, d, layers, heads, words in (
            ("70m", 512, 6, 8, 50304),
            ("160m", 768, 12, 12, 50304),
            ("410m", 1024, 24, 16, 50304),
            ("1b", 2048, 16, 8, 50304),
            ("1.4b", 2048, 24, 16, 50304),
            ("2.8b", 2560, 32, 32, 50304),
            ("6.9b", 4096, 32, 32, 50432),
            ("12b", 5120, 36, 40, 50688),
        )
    },
}
PAPER_LEARNING = (204_800, 1024)  # sequences of continual learning, tokens of each
PAPER_ENTROPY = (2048, 2048)  # sequences that entropy is measured on, tokens of each


def paper_flops(shape: Shape) -> dict[str, float]:
    """FLOPs of the paper's protocol (section 5 and appendix B): one run of continual learning
    (``learning``), and one measurement of the entropy of a checkpoint (``entropy``)."""
    (learned, length), (measured, window) = PAPER_LEARNING, PAPER_ENTROPY
    return {
        "learning": float(learned * length * training_flops(shape, length)),
        "entropy": float(measured * window * forward_flops(shape, window)),
    }

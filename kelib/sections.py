"""Sections of a profile: text, model, pretraining, continual learning and what looks into it.

Each checks its own values; what concerns several of them is checked by ``kelib.config.Profile``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

from kelib.errors import listing
from kelib.schema import at_least, at_least_each, require, unique, within
from kelib.world import WorldSize

PROTOCOL = "protocol"  # continual learning as the paper does it
TEXTS = {"domain": "domain", "general": "unread"}  # what is continued on -> its blocks


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Text, tokenizer and packing. A source is a name in ``data/sources.yaml``, ``hub:NAME`` of
    ``data/hub_sources.yaml``, ``generated:NAME`` (another generated world, needs no network) or the
    path of a local file or folder."""

    general: tuple[str, ...]  # what is pretrained on beside the generated facts
    domain: tuple[str, ...]  # what continual learning reads
    vocabulary_size: int
    sequence_length: int  # tokens
    facts_share: float  # of the pretraining sequences, the rest is `general`
    entropy_sequences: int  # |D| of Eq. 2, same mixture as pretraining, text documents of their own
    domain_sequences: int  # packed for continual learning; a longer run reads them again
    heldout_sequences: int  # per corpus, for the loss before and after
    world: WorldSize
    convergence_sequences: int = 2048  # as entropy_sequences: how the estimate depends on |D|

    @property
    def generated(self) -> bool:
        """Whether all text that models are pretrained on is made up, as for trying out."""
        return all(source.startswith("generated:") for source in self.general)

    def __post_init__(self) -> None:
        within(self, 300, 65536, "vocabulary_size")  # blocks are stored as uint16
        at_least(self, sequence_length=8, entropy_sequences=1, convergence_sequences=1)
        at_least(self, domain_sequences=1, heldout_sequences=1)
        within(self, 0, 1, "facts_share")
        require(self.domain != (), "corpus.domain", self.domain, "at least one source")
        require(
            self.general != () or self.facts_share == 1,
            "corpus.general",
            self.general,
            "at least one source unless facts_share is 1",
        )
        both = sorted(set(self.general) & set(self.domain))
        require(both == [], "corpus.domain", self.domain, f"other sources than general: {both}")
        for name in ("once_entries", "paraphrase_entries"):
            count = getattr(self.world, name)
            require(count >= 1, f"corpus.world.{name}", count, "at least 1: K needs both sets")


@dataclasses.dataclass(frozen=True)
class Model:
    """Shape of the language model, in the names of transformers' configurations."""

    model_type: str  # any causal language model of transformers: olmo, llama, gpt_neox ...
    hidden_size: int
    intermediate_size: int  # m, memories a layer
    num_hidden_layers: int
    num_attention_heads: int

    def __post_init__(self) -> None:
        at_least(self, intermediate_size=2, num_hidden_layers=1, num_attention_heads=1)
        at_least(self, hidden_size=1)
        heads = self.num_attention_heads
        require(
            self.hidden_size % (2 * heads) == 0,
            "model.hidden_size",
            self.hidden_size,
            f"a multiple of 2 x {heads} heads (rotary halves)",
        )


@dataclasses.dataclass(frozen=True)
class Training:
    """How a training step is computed; the global batch stays what it is."""

    precision: str = "float32"  # or bf16: autocast, weights stay float32
    micro_batch_size: int | None = None  # sequences at once in a process; None: its whole share
    compile: bool = False  # torch.compile

    def __post_init__(self) -> None:
        require(
            self.precision in ("float32", "bf16"),
            "training.precision",
            self.precision,
            "float32 or bf16",
        )
        if self.micro_batch_size is not None:
            at_least(self, micro_batch_size=1)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW with linear warm-up and cosine decay."""

    weight_decay: float
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0  # global gradient norm
    warmup_share: float = 0.05  # of the steps
    final_share: float = 0.1  # of the peak learning rate

    def __post_init__(self) -> None:
        within(self, 0, 1, "warmup_share", "final_share")
        within(self, 0, math.inf, "weight_decay")
        require(self.clip > 0, "optimizer.clip", self.clip, "above 0")
        require(
            all(0 <= beta < 1 for beta in self.betas),
            "optimizer.betas",
            self.betas,
            "between 0 and 1 (exclusive)",
        )


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """Training from scratch; ``checkpoints`` lie densely where entropy moves fast."""

    steps: int
    batch_size: int  # sequences
    learning_rate: float  # peak
    optimizer: Optimizer
    checkpoints: tuple[int, ...]  # steps; 0 and the last step are always kept
    optimizer_states: tuple[int, ...] = ()  # steps whose moments are kept beside the checkpoint

    def __post_init__(self) -> None:
        at_least(self, steps=1, batch_size=1)
        require(self.learning_rate > 0, "pretraining.learning_rate", self.learning_rate, "above 0")
        kept = tuple(sorted({0, *self.checkpoints, self.steps}))
        require(
            kept[0] == 0 and kept[-1] == self.steps,
            "pretraining.checkpoints",
            self.checkpoints,
            f"steps between 0 and {self.steps}",
        )
        object.__setattr__(self, "checkpoints", kept)
        require(
            set(self.optimizer_states) <= set(kept),
            "pretraining.optimizer_states",
            self.optimizer_states,
            f"steps among the checkpoints {kept}",
        )

    def nearest_steps(self, shares: Iterable[float]) -> list[int]:
        """Steps of the checkpoints nearest to shares of pretraining, in order, each once."""
        found = [
            min(self.checkpoints, key=lambda step: abs(step - share * self.steps))
            for share in sorted(shares)
        ]
        return list(dict.fromkeys(found))

    def rate_at(self, step: int) -> float:
        """Learning rate of ``step`` (from 0) for those who must not import torch; the same as
        :func:`kelib.training.learning_rate_at`.
        """
        settings, peak = self.optimizer, self.learning_rate
        warmup = math.ceil(settings.warmup_share * self.steps)
        if step < warmup:
            return peak * (step + 1) / warmup
        done = (step - warmup) / max(self.steps - warmup, 1)
        low = settings.final_share
        return peak * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done)))


@dataclasses.dataclass(frozen=True)
class Variant:
    """One departure from the protocol of continual learning (Table 1, Fig. 13), at every stage."""

    name: str
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    text: str = "domain"  # or general: what pretraining left unread of it
    batch_size: int | None = None  # None: as the protocol
    steps: int | None = None
    epochs: int = 1  # the same sequences, read so often in the steps given
    optimizer: Optimizer | None = None  # None: as the protocol
    own_moments: bool = False  # begin with the moments of pretraining, not with a fresh optimizer
    stages: tuple[float, ...] | None = None  # None: as the protocol; else before the peak as well

    def __post_init__(self) -> None:
        at_least(self, epochs=1)
        for share in self.stages or ():
            require(0 < share <= 1, "variant.stages", share, "between 0 (exclusive) and 1")
        require(self.text in TEXTS, "variant.text", self.text, f"one of {listing(TEXTS)}")
        require(self.name != PROTOCOL, "variant.name", self.name, "another name")
        unique(self, "learning_rates", "seeds")


@dataclasses.dataclass(frozen=True)
class Continual:
    """Continual knowledge learning. ``stages`` are shares of pretraining, each met by the nearest
    checkpoint; those before the entropy peak are left out, so that the first one is the first
    stage after it."""

    steps: int
    batch_size: int
    learning_rates: tuple[
        float, ...
    ]  # peak; the first one is the paper's protocol (pretraining peak)
    seeds: tuple[int, ...]
    stages: tuple[float, ...]
    injections: int
    optimizer: Optimizer
    control_seeds: tuple[int, ...] | None = None  # also run without injection; None: all seeds
    curve_seeds: tuple[int, ...] = ()  # probes are scored at every injection
    variants: tuple[Variant, ...] = ()
    save_every: int | None = None  # steps; None: a run that was killed begins again

    def __post_init__(self) -> None:
        at_least(self, steps=1, batch_size=1, injections=1)
        if self.save_every is not None:
            at_least(self, save_every=1)
        require(
            self.steps % self.injections == 0,
            "continual.steps",
            self.steps,
            f"a multiple of the {self.injections} injections",
        )
        for share in self.stages:
            require(0 < share <= 1, "continual.stages", share, "between 0 (exclusive) and 1")
        require(
            1.0 in self.stages, "continual.stages", self.stages, "a list with 1.0, the last stage"
        )
        for rate in self.learning_rates:
            require(rate > 0, "continual.learning_rates", rate, "above 0")
        unique(self, "learning_rates", "seeds", "stages")
        at_least_each(self, 0, "seeds")
        for name in ("control_seeds", "curve_seeds"):
            seeds = getattr(self, name) or ()
            require(
                set(seeds) <= set(self.seeds), f"continual.{name}", seeds, f"among {self.seeds}"
            )
        for variant in self.variants:
            steps, size = variant.steps or self.steps, variant.batch_size or self.batch_size
            require(
                steps % self.injections == 0,
                "variant.steps",
                steps,
                f"a multiple of the {self.injections} injections",
            )
            require(
                (steps * size) % variant.epochs == 0,
                "variant.epochs",
                variant.epochs,
                f"a divisor of the {steps * size} sequences read",
            )
        names = [variant.name for variant in self.variants]
        require(
            len(set(names)) == len(names), "continual.variants", names, "a list of distinct names"
        )


@dataclasses.dataclass(frozen=True)
class Mechanism:
    """Where gradients, updates and new facts go (A.1 of the paper), measured at every stage for the
    first of ``continual.curve_seeds``, whose runs keep their weights."""

    learning_rates: tuple[float, ...]  # of the continual learning that is looked into

    def __post_init__(self) -> None:
        unique(self, "learning_rates")


@dataclasses.dataclass(frozen=True)
class Retention:
    """What other text leaves of new knowledge: continual learning of ``continual.curve_seeds`` goes
    on for as long on general text, without passages, from every stage and after resuscitation."""

    learning_rates: tuple[float, ...]  # of the continual learning that goes on, and of what follows

    def __post_init__(self) -> None:
        unique(self, "learning_rates")


@dataclasses.dataclass(frozen=True)
class Reactivation:
    """Whether the memories that resuscitation wakes stay awake, change and carry new knowledge, at
    the last stage and for ``continual.curve_seeds``."""

    learning_rates: tuple[float, ...]  # of the continual learning that is looked into
    draws: int = 5  # random sets of memories to compare with

    def __post_init__(self) -> None:
        unique(self, "learning_rates")
        at_least(self, draws=1)

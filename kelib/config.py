"""Profiles: frozen, validated, digested configurations read from ``notebooks/params/*.yaml``.

A profile differs from another one in parameters only, never in code. Everything a run depends on
is a dataclass here, so that its digest names the run: change a value and only what depends on it
is run again.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import hashlib
import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from kelib.errors import KelibError, listing
from kelib.world import WorldSize


def repository_root() -> Path:
    """The folder that holds ``notebooks/params``: the checkout kelib was installed from, else a
    parent of the current folder (kelib installed alone, notebooks elsewhere)."""
    for start in (Path(__file__).resolve().parent, Path.cwd()):
        for folder in (start, *start.parents):
            if (folder / "notebooks" / "params").is_dir():
                return folder
    raise KelibError(
        f"no folder notebooks/params above {Path.cwd()}; run this inside a checkout of kelib"
    )


def digest(value: Any, length: int = 12) -> str:
    """Short sha256 of a JSON-able value or dataclass; equal values have equal digests on every
    platform.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Text, tokenizer and packing. A source is a name in ``data/sources.yaml``, ``generated:NAME``
    (another generated world, needs no network) or the path of a local file or folder."""

    general: tuple[str, ...]  # what is pretrained on beside the generated facts
    domain: tuple[str, ...]  # what continual learning reads
    vocabulary_size: int
    sequence_length: int  # tokens
    facts_share: float  # of the pretraining sequences, the rest is `general`
    entropy_sequences: int  # |D| of Eq. 2, same mixture as pretraining, text documents of their own
    domain_sequences: int  # packed for continual learning; a longer run reads them again
    heldout_sequences: int  # per corpus, for the loss before and after
    world: WorldSize

    def __post_init__(self) -> None:
        _within(self, 300, 65536, "vocabulary_size")  # blocks are stored as uint16
        _at_least(self, sequence_length=8, entropy_sequences=1)
        _at_least(self, domain_sequences=1, heldout_sequences=1)
        _within(self, 0, 1, "facts_share")
        _require(self.domain != (), "corpus.domain", self.domain, "at least one source")
        _require(
            self.general != () or self.facts_share == 1,
            "corpus.general",
            self.general,
            "at least one source unless facts_share is 1",
        )
        both = sorted(set(self.general) & set(self.domain))
        _require(both == [], "corpus.domain", self.domain, f"other sources than general: {both}")
        for name in ("once_entries", "paraphrase_entries"):
            count = getattr(self.world, name)
            _require(count >= 1, f"corpus.world.{name}", count, "at least 1: K needs both sets")


@dataclasses.dataclass(frozen=True)
class Model:
    """Shape of the language model, in the names of transformers' configurations."""

    model_type: str  # any causal language model of transformers: olmo, llama, gpt_neox ...
    hidden_size: int
    intermediate_size: int  # m, memories a layer
    num_hidden_layers: int
    num_attention_heads: int

    def __post_init__(self) -> None:
        _at_least(self, intermediate_size=2, num_hidden_layers=1, num_attention_heads=1)
        _at_least(self, hidden_size=1)
        heads = self.num_attention_heads
        _require(
            self.hidden_size % (2 * heads) == 0,
            "model.hidden_size",
            self.hidden_size,
            f"a multiple of 2 x {heads} heads (rotary halves)",
        )


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW with linear warm-up and cosine decay."""

    weight_decay: float
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0  # global gradient norm
    warmup_share: float = 0.05  # of the steps
    final_share: float = 0.1  # of the peak learning rate

    def __post_init__(self) -> None:
        _within(self, 0, 1, "warmup_share", "final_share")
        _within(self, 0, math.inf, "weight_decay")
        _require(self.clip > 0, "optimizer.clip", self.clip, "above 0")
        _require(
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

    def __post_init__(self) -> None:
        _at_least(self, steps=1, batch_size=1)
        _require(self.learning_rate > 0, "pretraining.learning_rate", self.learning_rate, "above 0")
        kept = tuple(sorted({0, *self.checkpoints, self.steps}))
        _require(
            kept[0] == 0 and kept[-1] == self.steps,
            "pretraining.checkpoints",
            self.checkpoints,
            f"steps between 0 and {self.steps}",
        )
        object.__setattr__(self, "checkpoints", kept)


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

    def __post_init__(self) -> None:
        _at_least(self, steps=1, batch_size=1, injections=1)
        _require(
            self.steps % self.injections == 0,
            "continual.steps",
            self.steps,
            f"a multiple of the {self.injections} injections",
        )
        for share in self.stages:
            _require(0 < share <= 1, "continual.stages", share, "between 0 (exclusive) and 1")
        _require(
            1.0 in self.stages, "continual.stages", self.stages, "a list with 1.0, the last stage"
        )
        for rate in self.learning_rates:
            _require(rate > 0, "continual.learning_rates", rate, "above 0")
        _unique(self, "learning_rates", "seeds", "stages")
        _at_least_each(self, 0, "seeds")


@dataclasses.dataclass(frozen=True)
class Interventions:
    """Resuscitation of the last stage: every p with every q at every learning rate."""

    ratios: tuple[float, ...]  # p of Algorithm 1
    factors: tuple[float, ...]  # q of Algorithm 1
    learning_rates: tuple[float, ...]  # of the continual learning that follows

    def __post_init__(self) -> None:
        for ratio in self.ratios:
            _require(0 <= ratio <= 1, "interventions.ratios", ratio, "between 0 and 1")
        for factor in self.factors:
            _require(factor > 0, "interventions.factors", factor, "above 0")
        _unique(self, "ratios", "factors", "learning_rates")


@dataclasses.dataclass(frozen=True)
class Profile:
    """Everything one study needs. ``seeds`` are pretraining seeds: initialisation, data order,
    facts, entries.
    """

    profile: str
    seeds: tuple[int, ...]
    workers: int  # local processes, one thread each
    corpus: Corpus
    model: Model
    pretraining: Pretraining
    continual: Continual
    interventions: Interventions

    def __post_init__(self) -> None:
        _at_least(self, workers=1)
        _unique(self, "seeds")
        _at_least_each(self, 0, "seeds")
        missing = set(self.interventions.learning_rates) - set(self.continual.learning_rates)
        _require(
            not missing,
            "interventions.learning_rates",
            self.interventions.learning_rates,
            f"rates of continual.learning_rates {self.continual.learning_rates}, "
            "else there is no original to compare with",
        )

    @property
    def digest(self) -> str:
        """Digest of the parameters alone: no versions, no commit, not how many workers share the
        work.
        """
        return digest(dataclasses.asdict(dataclasses.replace(self, workers=1)))


def _require(holds: bool, name: str, value: object, constraint: str) -> None:
    if not holds:
        raise KelibError(f"{name} = {value!r} must be {constraint}")


def _where(instance: object, name: str) -> str:
    kind = type(instance).__name__
    return name if kind == "Profile" else f"{kind.lower()}.{name}"


def _at_least(instance: object, **bounds: int) -> None:
    for name, low in bounds.items():
        value = getattr(instance, name)
        _require(value >= low, _where(instance, name), value, f"at least {low}")


def _at_least_each(instance: object, low: int, name: str) -> None:
    for value in getattr(instance, name):
        _require(value >= low, _where(instance, name), value, f"at least {low}")


def _within(instance: object, low: float, high: float, *names: str) -> None:
    for name in names:
        value = getattr(instance, name)
        _require(low <= value <= high, _where(instance, name), value, f"between {low} and {high}")


def _unique(instance: object, *names: str) -> None:
    for name in names:
        values = getattr(instance, name)
        _require(
            len(values) > 0 and len(set(values)) == len(values),
            _where(instance, name),
            values,
            "a list of distinct values, not empty",
        )


def convert(kind: Any, value: Any, name: str) -> Any:
    """Check ``value`` (from YAML) against the annotation ``kind``; exact types, except int where
    float is due.
    """
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise KelibError(f"{name} = {value!r} must be a mapping with {listing(_fields(kind))}")
        return _build(kind, value, name)
    origin = typing.get_origin(kind)
    if origin is tuple:
        arguments = typing.get_args(kind)
        if not isinstance(value, (list, tuple)):
            raise KelibError(f"{name} = {value!r} must be a list, such as [1, 2]")
        if arguments[-1] is Ellipsis:
            return tuple(convert(arguments[0], v, f"{name}[{i}]") for i, v in enumerate(value))
        if len(value) != len(arguments):
            raise KelibError(f"{name} = {value!r} must have {len(arguments)} values")
        return tuple(convert(a, v, name) for a, v in zip(arguments, value, strict=True))
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        kind = next(a for a in typing.get_args(kind) if a is not type(None))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        hint = ""
        if kind is float and isinstance(value, str):
            hint = " (YAML reads 1e-4 as text: write 1.0e-4)"
        raise KelibError(f"{name} = {value!r} must be of type {kind.__name__}, finite{hint}")
    return value


def _fields(kind: Any) -> dict[str, dataclasses.Field[Any]]:
    return {field.name: field for field in dataclasses.fields(kind)}


def _build(kind: Any, values: Mapping[str, Any], prefix: str = "") -> Any:
    fields, hints = _fields(kind), typing.get_type_hints(kind)
    dotted = f"{prefix}." if prefix else ""
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            guess = f"did you mean {dotted}{near[0]}? " if near else ""
            raise KelibError(
                f"unknown key {dotted}{key}: {guess}valid keys are {listing(fields, 40)}"
            )
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            raise KelibError(
                f"missing key {dotted}{name}: add it; valid keys are {listing(fields, 40)}"
            )
    built = {key: convert(hints[key], value, f"{dotted}{key}") for key, value in values.items()}
    return kind(**built)


def read_yaml(path: Path) -> Any:
    """Parse YAML safely; a syntax error becomes one line with its place."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise KelibError(f"{path.name} is not valid YAML: {reason}") from error
    except OSError as error:
        raise KelibError(f"cannot read {path}: {error.strerror}") from error


def profile_from(values: Any, overrides: Mapping[str, Any] | None = None) -> Profile:
    """Build a profile from nested mappings; ``overrides`` are dotted keys such as
    ``{"continual.steps": 40}``.

    Raises KelibError for an unknown, missing or mistyped key, naming the valid ones.
    """
    if not isinstance(values, Mapping):
        raise KelibError(f"a profile must be a mapping with {listing(_fields(Profile))}")
    nested = copy.deepcopy(dict(values))  # the caller's mapping is never changed
    for dotted, value in (overrides or {}).items():
        *parents, last = dotted.split(".")
        place: Any = nested
        for parent in parents:
            place = place.get(parent) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            raise KelibError(
                f"unknown key {dotted}: valid sections are {listing(_fields(Profile))}"
            )
        place[last] = copy.deepcopy(value)
    return _build(Profile, nested)


def profiles(folder: Path | None = None) -> list[str]:
    """Names of the profiles: YAML files of ``notebooks/params`` that have a ``profile`` key."""
    folder = folder or repository_root() / "notebooks" / "params"
    return sorted(
        path.stem
        for path in folder.glob("*.yaml")
        if any(line.startswith("profile:") for line in path.read_text("utf-8").splitlines())
    )


def load_profile(name: str, overrides: Mapping[str, Any] | None = None) -> Profile:
    """Read ``notebooks/params/<name>.yaml``. Raises KelibError for an unknown name (lists what
    exists).
    """
    if name not in profiles():
        raise KelibError(f"unknown profile {name!r}: notebooks/params has {listing(profiles())}")
    path = repository_root() / "notebooks" / "params" / f"{name}.yaml"
    profile = profile_from(read_yaml(path), overrides)
    if profile.profile != name:
        raise KelibError(f"{path.name} calls itself {profile.profile!r}; it must be {name!r}")
    return profile

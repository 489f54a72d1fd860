"""Interventions of a profile: Algorithm 1 at every p and q, and the arms to hold against it.

Only names and settings stand here, so that a profile is checked before anything is computed; what
an intervention does is in ``kelib.interventions`` and ``kelib.alternatives``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from kelib.errors import KelibError, listing
from kelib.schema import require, unique

_SCALED = ("ratio", "factor")
# name of every intervention -> (settings it needs, settings it may have)
SETTINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    **{
        name: (_SCALED, ())
        for name in (
            *("resuscitate", "resuscitate_preserving", "resuscitate_top"),
            *("uniform_gain", "scale_value"),
        )
    },
    "resuscitate_random": ((*_SCALED, "seed"), ()),
    "attention_temperature": (("temperature",), ()),
    "redo": (("seed",), ("tau",)),
    "shrink_and_perturb": (("shrink", "noise_std", "seed"), ()),
    "plasticity_injection": (("memories", "seed"), ()),
    "continual_backprop_utility": (("ratio", "seed"), ()),
}
_SYMBOLS = {"ratio": "p", "factor": "q", "temperature": "T"}


@dataclasses.dataclass(frozen=True)
class Arm:
    """One intervention with its settings; see the function of that name."""

    name: str
    ratio: float | None = None  # p of Algorithm 1; share of the units that are reset
    factor: float | None = None  # q of Algorithm 1
    temperature: float | None = None  # of the softmax of attention
    tau: float | None = None  # a unit is dormant up to so many times its layer's mean
    shrink: float | None = None
    noise_std: float | None = None
    memories: int | None = None  # new ones a layer
    seed: int | None = None
    stages: tuple[float, ...] = (1.0,)  # shares of pretraining, the nearest checkpoints are changed

    def __post_init__(self) -> None:
        require(self.name in SETTINGS, "arm.name", self.name, f"one of {listing(SETTINGS, 20)}")
        unique(self, "stages")
        for share in self.stages:
            require(0 < share <= 1, "arm.stages", share, "between 0 (exclusive) and 1")
        needed, optional = SETTINGS[self.name]
        given = set(self.settings)
        if given - {*needed, *optional} or set(needed) - given:
            raise KelibError(
                f"intervention {self.name} has the settings {listing(given)}; it needs "
                f"{listing(needed)}" + (f" and may have {listing(optional)}" if optional else "")
            )

    @property
    def settings(self) -> dict[str, Any]:
        """What is set, without the name and the stages."""
        values = dataclasses.asdict(self).items()
        return {k: v for k, v in values if v is not None and k not in ("name", "stages")}

    @property
    def change(self) -> dict[str, Any]:
        """Name and settings, as runs keep them."""
        return {"name": self.name, **self.settings}

    @property
    def label(self) -> str:
        """Name and settings in words, without the seed."""
        words = [f"{_SYMBOLS.get(k, k)}={v:g}" for k, v in self.settings.items() if k != "seed"]
        return " ".join([self.name, *words])


@dataclasses.dataclass(frozen=True)
class Interventions:
    """Resuscitation of the last stage, every p with every q at every learning rate, and arms."""

    ratios: tuple[float, ...]  # p of Algorithm 1
    factors: tuple[float, ...]  # q of Algorithm 1
    learning_rates: tuple[float, ...]  # of the continual learning that follows
    arms: tuple[Arm, ...] = ()
    arm_learning_rates: tuple[float, ...] = ()  # none: as learning_rates

    def __post_init__(self) -> None:
        for ratio in self.ratios:
            require(0 <= ratio <= 1, "interventions.ratios", ratio, "between 0 and 1")
        for factor in self.factors:
            require(factor > 0, "interventions.factors", factor, "above 0")
        unique(self, "ratios", "factors", "learning_rates")
        labels = [arm.label for arm in self.arms]
        distinct = len(set(labels)) == len(labels)
        require(distinct, "interventions.arms", labels, "a list of distinct arms")
        for rate in self.arm_learning_rates:
            require(
                rate in self.learning_rates,
                "interventions.arm_learning_rates",
                rate,
                f"among learning_rates {self.learning_rates}",
            )

    @property
    def rates_of_arms(self) -> tuple[float, ...]:
        """The learning rates at which the arms are continued."""
        return self.arm_learning_rates or self.learning_rates

"""Sections of a profile on other ways of pretraining: branches of it, and other regimes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from kelib.schema import at_least, require, unique, within
from kelib.sections import Pretraining

TRUNK = "trunk"  # pretraining as the profile has it, beside branches and regimes
SAVED = "as saved"  # a checkpoint of pretraining itself, not annealed by a branch
NEAR_START = 0.02  # of pretraining: how far from its start a branch may begin


@dataclasses.dataclass(frozen=True)
class Branch:
    """A second way on from a checkpoint of pretraining (the trunk), with its weights, its moments
    and the next batches of its mixture."""

    name: str
    start: float  # share of pretraining, met by the nearest step of pretraining.optimizer_states
    steps: int | None = None  # None: to the end of pretraining
    weight_decay: float | None = None  # None: that of pretraining
    annealed: bool = False  # the rate decays over the branch to the final one of pretraining
    final_share: float | None = None  # of the peak, where annealing ends; None: pretraining's

    def __post_init__(self) -> None:
        require(self.name != "", "branch.name", self.name, "a name")
        require(0 < self.start <= 1, "branch.start", self.start, "between 0 (exclusive) and 1")
        if self.steps is not None:
            at_least(self, steps=1)
        if self.weight_decay is not None:
            within(self, 0, math.inf, "weight_decay")
        require(
            self.steps is not None or not self.annealed,
            "branch.steps",
            self.steps,
            f"a number of steps: {self.name!r} is annealed over them",
        )
        if self.final_share is not None:
            within(self, 0, 1, "final_share")
            require(
                self.annealed,
                "branch.final_share",
                self.final_share,
                f"left out: {self.name!r} is not annealed",
            )

    def span(self, pretraining: Pretraining) -> tuple[int, int]:
        """(step where it leaves the trunk, step where it ends).

        Raises KelibError if no moments were kept within 2 % of pretraining from ``start``, if the
        text of pretraining does not reach so far, and for a branch that would be the trunk again.
        """
        total, kept = pretraining.steps, pretraining.optimizer_states
        near = [s for s in kept if abs(s - self.start * total) <= NEAR_START * total]
        require(
            near != [],
            "branch.start",
            self.start,
            f"within {NEAR_START:g} of a step of pretraining.optimizer_states {kept}, which is "
            f"where {self.name!r} can begin; add the step {round(self.start * total)} to them",
        )
        start = min(near, key=lambda step: abs(step - self.start * total))
        end = total if self.steps is None else start + self.steps
        require(
            start < end <= total,
            "branch.steps",
            self.steps,
            f"at least 1 and at most {total - start}: {self.name!r} leaves at step {start}, and "
            f"pretraining has text for {total} steps",
        )
        decay = pretraining.optimizer.weight_decay
        require(
            self.annealed or self.weight_decay not in (None, decay),
            "branch.weight_decay",
            self.weight_decay,
            f"another one than {decay:g}, or annealed true: else {self.name!r} is pretraining "
            "itself",
        )
        return start, end


@dataclasses.dataclass(frozen=True)
class Branches:
    """Branches of every pretraining seed, and the continual learning from where they end."""

    learning_rates: tuple[float, ...]  # of continual learning, injected, with one CL seed
    branches: tuple[Branch, ...]

    def __post_init__(self) -> None:
        unique(self, "learning_rates", "branches")
        names = [branch.name for branch in self.branches]
        require(
            len(set(names)) == len(names), "branches.branches", names, "a list of distinct names"
        )


@dataclasses.dataclass(frozen=True)
class Regime:
    """Another recipe of pretraining from the first step, for the same initial weights and batches.
    What is left out stays as in pretraining."""

    name: str
    weight_decay: float | None = None
    learning_rate: float | None = None  # peak
    final_share: float | None = None  # of the peak; 1: a constant rate after the warm-up
    cooldown: int | None = None  # steps of annealing that end at every stage, as branches

    def __post_init__(self) -> None:
        require(self.name not in ("", TRUNK), "regime.name", self.name, f"a name, not {TRUNK!r}")
        if self.weight_decay is not None:
            within(self, 0, math.inf, "weight_decay")
        if self.learning_rate is not None:
            require(self.learning_rate > 0, "regime.learning_rate", self.learning_rate, "above 0")
        if self.final_share is not None:
            within(self, 0, 1, "final_share")
        if self.cooldown is not None:
            at_least(self, cooldown=1)

    def recipe(self, plan: Pretraining, stages: Sequence[int]) -> Pretraining:
        """Pretraining by this recipe, with moments kept where a cooldown to one of the steps
        ``stages`` begins.

        Raises KelibError if it is that of ``plan`` itself, and for a cooldown that would begin
        within the warm-up.
        """
        changes = {"weight_decay": self.weight_decay, "final_share": self.final_share}
        given: dict[str, Any] = {k: value for k, value in changes.items() if value is not None}
        optimizer = dataclasses.replace(plan.optimizer, **given)
        peak = self.learning_rate or plan.learning_rate
        found = dataclasses.replace(plan, optimizer=optimizer, learning_rate=peak)
        require(
            found != plan,
            "regime.name",
            self.name,
            "the name of something else than pretraining itself: change weight_decay, "
            "learning_rate or final_share",
        )
        if self.cooldown is None:
            return found
        warm = math.ceil(optimizer.warmup_share * plan.steps)
        starts = tuple(stage - self.cooldown for stage in stages)
        require(
            min(starts) >= max(warm, 1),
            "regime.cooldown",
            self.cooldown,
            f"at most {min(stages) - max(warm, 1)}, so that it begins after the warm-up of {warm} "
            f"steps and ends at the first stage, step {min(stages)}",
        )
        kept = (*plan.checkpoints, *starts)
        return dataclasses.replace(found, checkpoints=kept, optimizer_states=starts)

    def cooldown_to(self, stage: int, plan: Pretraining) -> Branch:
        """The branch of this regime that ends at a stage, at the share of the peak that ``plan``
        ends at."""
        start = (stage - (self.cooldown or 0)) / plan.steps
        final = plan.optimizer.final_share
        name = f"{self.name}, cooled to step {stage}"
        return Branch(name, start, steps=self.cooldown, annealed=True, final_share=final)


@dataclasses.dataclass(frozen=True)
class Regimes:
    """Regimes of pretraining on every seed, and continual learning from their stages."""

    learning_rates: tuple[float, ...]  # of continual learning, first CL seed
    regimes: tuple[Regime, ...]

    def __post_init__(self) -> None:
        unique(self, "learning_rates", "regimes")
        names = [regime.name for regime in self.regimes]
        require(len(set(names)) == len(names), "regimes.regimes", names, "a list of distinct names")

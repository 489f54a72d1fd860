"""From a profile to the grids of its runs. No model is loaded here."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kelib.config import PROTOCOL
from kelib.errors import KelibError
from kelib.run import Run
from kelib.runs import execute
from kelib.study_runs import StudyRuns


class Study(StudyRuns):
    """A profile and the folder its data goes to: every stage, learning rate, seed and intervention
    that the profile asks for.
    """

    def stages(self, entropy: pd.DataFrame, seed: int) -> dict[str, int]:
        """Checkpoints that continual learning starts from, label -> step, in order.

        The checkpoints nearest to the shares of ``continual.stages`` that lie after the entropy
        peak, so that the first of them is the first stage after it. Where fewer than two do, all
        stages are kept: there is no fall to follow, which the claims table then says.
        """
        peak = peak_step(entropy, seed)
        steps = np.sort(entropy.loc[entropy["seed"] == seed, "step"].unique())
        nearest: dict[int, str] = {}
        for share in sorted(self.profile.continual.stages):
            near = int(steps[np.abs(steps - share * self.profile.pretraining.steps).argmin()])
            nearest[near] = f"{share:.0%}"
        after = {label: step for step, label in nearest.items() if step > peak}
        return after if len(after) > 1 else {label: step for step, label in nearest.items()}

    def marks(self, entropy: pd.DataFrame) -> tuple[dict[int, int], dict[int, dict[str, int]]]:
        """(step of the entropy peak, stages as of :meth:`stages`) of every pretraining seed."""
        seeds = self.profile.seeds
        return (
            {seed: peak_step(entropy, seed) for seed in seeds},
            {seed: self.stages(entropy, seed) for seed in seeds},
        )

    def continual_grid(self, entropy: pd.DataFrame) -> list[tuple[str, Run]]:
        """(name of the variant, run): every stage at every learning rate and CL seed, with and for
        the control seeds without injection; then the variants.
        """
        plan = self.profile.continual
        controls = plan.seeds if plan.control_seeds is None else plan.control_seeds
        places = [
            (seed, step)
            for seed in self.profile.seeds
            for step in self.stages(entropy, seed).values()
        ]
        grid = [
            (PROTOCOL, self.continual_run(*place, rate, cl_seed, injected))
            for rate in plan.learning_rates
            for cl_seed in plan.seeds
            for injected in (True, False)
            if injected or cl_seed in controls
            for place in places
        ]
        grid += [
            (variant.name, self.continual_run(*place, rate, cl_seed, variant=variant))
            for variant in plan.variants
            for rate in variant.learning_rates
            for cl_seed in variant.seeds
            for place in (self._places(variant.stages) if variant.stages else places)
        ]
        return grid

    def _places(self, shares: Iterable[float]) -> list[tuple[int, int]]:
        steps = self.profile.pretraining.nearest_steps(shares)
        return [(seed, step) for seed in self.profile.seeds for step in steps]

    def intervention_grid(self) -> list[tuple[str, Run]]:
        """Resuscitation of the last checkpoint at every p, q, learning rate and CL seed."""
        rates, places = self.profile.interventions.learning_rates, self._places([1.0])
        return self._continued(PROTOCOL, self.resuscitations(), rates, places)

    def arms_grid(self) -> list[tuple[str, Run]]:
        """(label of the arm, run): the other interventions, each on the stages it asks for."""
        plan = self.profile.interventions
        return [
            named
            for arm in plan.arms
            for named in self._continued(
                arm.label, [arm.change], plan.rates_of_arms, self._places(arm.stages)
            )
        ]

    def _continued(
        self,
        name: str,
        changes: list[dict[str, Any]],
        rates: Iterable[float],
        places: list[tuple[int, int]],
    ) -> list[tuple[str, Run]]:
        return [
            (name, self.continual_run(*place, rate, cl_seed, True, change))
            for rate in rates
            for cl_seed in self.profile.continual.seeds
            for change in changes
            for place in places
        ]

    def resuscitations(self) -> list[dict[str, Any]]:
        """Resuscitation as settings: every p with every q."""
        plan = self.profile.interventions
        return [
            {"name": "resuscitate", "ratio": p, "factor": q}
            for p in plan.ratios
            for q in plan.factors
        ]

    def intervene_runs(self) -> list[Run]:
        """Every intervention before continual learning, on every seed and stage it is asked for."""
        changes = [(change, self._places([1.0])) for change in self.resuscitations()]
        changes += [
            (arm.change, self._places(arm.stages)) for arm in self.profile.interventions.arms
        ]
        return [
            self.intervene_run(*place, change) for change, places in changes for place in places
        ]

    def run(self, runs: Iterable[Run], title: str) -> None:
        """Do what is missing; see :func:`kelib.runs.execute`."""
        execute(runs, self.profile.workers, title, self.profile.executor)


def peak_step(entropy: pd.DataFrame, seed: int) -> int:
    """Step of the checkpoint with the highest knowledge entropy after the collapse at the start.

    The untrained model is near the bound by construction, so the search begins at the lowest
    checkpoint of the first tenth of training, where the collapse lies.
    """
    total = entropy[entropy["seed"] == seed].groupby("step")["entropy_nats"].sum()
    if total.empty:
        raise KelibError(f"the entropy table has no seed {seed}: run stage 2 first")
    early = total[total.index <= max(0.1 * total.index.max(), total.index.min())]
    return int(total[total.index >= early.idxmin()].idxmax())


def clean(profile: str, data: Path) -> None:
    """Delete all that a profile computed (not the fetched text, nor the committed reference)."""
    for kind in ("corpus", "checkpoints", "measurements"):
        shutil.rmtree(data / kind / profile, ignore_errors=True)

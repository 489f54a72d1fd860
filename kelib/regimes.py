"""Other recipes of pretraining for the same weights, batches and steps: their checkpoints and what
continual learning makes of them. No model is loaded here.

Stages of one run differ in entropy and in all else that training changes. Regimes differ in entropy
at one and the same stage, after the same tokens in the same order.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import pandas as pd

from kelib.beyond import branch_run
from kelib.branch_tables import NORMS, knowledge_rows
from kelib.config import PROTOCOL
from kelib.errors import KelibError
from kelib.recipes import SAVED, TRUNK, Regimes
from kelib.run import Run
from kelib.study import Study
from kelib.study_tables import learning_row, learning_table

PLACE = ["regime", "arm", "seed", "step"]


@dataclass(frozen=True)
class Place:
    """A checkpoint of a regime: of its pretraining, or where a ``branch`` of that cooled down.

    ``study`` is the one whose pretraining is the regime's.
    """

    regime: str
    arm: str
    study: Study
    seed: int
    step: int
    branch: Run | None = None

    @property
    def named(self) -> dict[str, Any]:
        """The columns that say which checkpoint it is."""
        return {name: getattr(self, name) for name in PLACE}

    @property
    def entropy(self) -> Run:
        """The run that measures entropies there."""
        return self.study.entropy_run(self.seed, self.step, branch=self.branch)

    @property
    def evaluated(self) -> Run:
        """The run that scores probes, questions and text there."""
        return self.study.evaluate_run(self.seed, self.step, branch=self.branch)

    def learned(self, rate: float, cl_seed: int, injected: bool) -> Run:
        """Continual learning from there."""
        of = (self.seed, self.step, rate, cl_seed, injected)
        return self.study.continual_run(*of, branch=self.branch)

    @property
    def rate(self) -> float:
        """Learning rate of the last step before the checkpoint, of the first step for step 0."""
        if self.branch is not None:
            return self.branch.read()["rates"][str(self.step)]
        return self.study.profile.pretraining.rate_at(max(self.step - 1, 0))


def _section(study: Study) -> Regimes:
    if study.profile.regimes is None:
        raise KelibError(
            f"profile {study.profile.profile!r} has no section regimes: add it, with "
            "learning_rates among those of continual, to pretrain by other recipes"
        )
    return study.profile.regimes


def regime_studies(study: Study) -> dict[str, Study]:
    """The study with the pretraining of each regime, by name; that of :data:`TRUNK` is its own.

    All seeds, text and continual learning are the same. Raises KelibError for a profile without
    the section.
    """
    section, profile = _section(study), study.profile
    alone = dataclasses.replace(profile, regimes=None, branches=None)
    found = {TRUNK: Study(alone, study.data)}
    for regime in section.regimes:
        plan = regime.recipe(profile.pretraining, study.near_stages())
        found[regime.name] = Study(dataclasses.replace(alone, pretraining=plan), study.data)
    return found


def regime_places(study: Study) -> list[Place]:
    """Every checkpoint of every regime and seed, then its cooled-down stages where it has some."""
    plan, found = study.profile.pretraining, []
    cooled = {r.name: r for r in _section(study).regimes if r.cooldown is not None}
    for name, of in regime_studies(study).items():
        for seed in study.profile.seeds:
            found += [Place(name, SAVED, of, seed, step) for step in plan.checkpoints]
            if (regime := cooled.get(name)) is not None:
                arm = f"cooled down in {regime.cooldown} steps"
                for step in study.near_stages():
                    branch = branch_run(of, seed, regime.cooldown_to(step, plan))
                    found.append(Place(name, arm, of, seed, step, branch))
    return found


def regime_grid(study: Study) -> list[tuple[Place, Run]]:
    """Continual learning from every stage of every regime, as saved and cooled down, at the rates
    of the section and with the first CL seed; where that is a control seed, without injection too.

    No stage is left out, as each regime has its own entropy peak.
    """
    plan, stages = study.profile.continual, study.near_stages()
    cl_seed = (*plan.curve_seeds, *plan.seeds)[0]
    controls = plan.seeds if plan.control_seeds is None else plan.control_seeds
    return [
        (place, place.learned(rate, cl_seed, injected))
        for rate in _section(study).learning_rates
        for injected in (True, False)[: 1 + (cl_seed in controls)]
        for place in regime_places(study)
        if place.step in stages
    ]


def regime_runs(study: Study) -> list[Run]:
    """All runs of stage 9; none without the section ``regimes``."""
    if study.profile.regimes is None:
        return []
    measured = [run for at in regime_places(study) for run in (at.entropy, at.evaluated)]
    return [*measured, *(run for _, run in regime_grid(study))]


# --- tables ---------------------------------------------------------------------------------------


def regimes_table(study: Study) -> pd.DataFrame:
    """A row for every checkpoint of :func:`regime_places`: ``regime, arm, seed, step``; of its
    recipe ``weight_decay`` and ``peak_rate``; ``learning_rate`` of the last step before; ``share``,
    ``tokens``, ``tokens_per_parameter``; knowledge, accuracy and losses as in the table
    checkpoints; ``entropy`` (nats, summed over layers) with ``bound``; ``value_norm`` and
    ``key_norm``, Frobenius norms of V and of the up projection, means over layers."""
    corpus, rows = study.profile.corpus, []
    for place in regime_places(study):
        plan, known = place.study.profile.pretraining, place.evaluated.read()
        tokens = place.step * plan.batch_size * corpus.sequence_length
        layers = knowledge_rows(place.entropy)
        row = {
            **place.named,
            "weight_decay": plan.optimizer.weight_decay,
            "peak_rate": plan.learning_rate,
            "learning_rate": place.rate,
            "share": place.step / plan.steps,
            "tokens": tokens,
            "tokens_per_parameter": tokens / known["parameters"],
            **known,
            "entropy": layers["entropy_nats"].sum(),
            "bound": layers["bound_nats"].sum(),
        }
        rows.append({**row, **place.entropy.read_table("panel.csv")[NORMS].mean()})
    return pd.DataFrame(rows)


def regime_learning_table(study: Study, known: pd.DataFrame) -> pd.DataFrame:
    """Continual learning of :func:`regime_grid`: the columns of
    :func:`kelib.study_tables.continual_table` behind ``regime`` and ``arm``, and ``k_cl_none``,
    K_CL of the same run without injection (NaN where that was not asked for). ``known`` is the
    table of :func:`regimes_table`."""
    before: Any = known.set_index(PLACE, drop=False).to_dict("index")
    rows = []
    for place, run in regime_grid(study):
        start = before[tuple(place.named.values())]
        label = f"{place.step / study.profile.pretraining.steps:.0%}"
        row = learning_row(run, start, place.evaluated, label, PROTOCOL)
        rows.append({"regime": place.regime, "arm": place.arm, **row})
    table = learning_table(rows)
    same = ["regime", "arm", "seed", "stage_step", "learning_rate", "cl_seed"]
    without = table[~table["injected"]].rename(columns={"k_cl": "k_cl_none"})
    return table.merge(without[[*same, "k_cl_none"]], on=same, how="left")

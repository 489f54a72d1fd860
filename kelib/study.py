"""From a profile to its runs, and from finished runs to tidy tables. No model is loaded here."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kelib.config import Profile, digest
from kelib.errors import KelibError
from kelib.metrics import acquisition, forgetting, forgetting_over_chance
from kelib.runs import Run, execute
from kelib.tables import stack_coefficients

CHANCE = 0.25


@dataclass(frozen=True)
class Study:
    """A profile and the folder its data goes to."""

    profile: Profile
    data: Path

    @property
    def measurements(self) -> Path:
        return self.data / "measurements" / self.profile.profile

    def _home(self, kind: str) -> Path:
        name = self.profile.profile
        top = {"corpus": self.data / "corpus" / name, "pretrain": self.data / "checkpoints" / name}
        return top.get(kind, self.measurements / kind)

    def corpus_run(self, seed: int) -> Run:
        p = self.profile
        read = p.pretraining.steps * p.pretraining.batch_size
        facts = round(read * p.corpus.facts_share)
        wanted = {
            "facts": facts,
            "general": read - facts,
            "domain": p.corpus.domain_sequences,
        }
        settings = {"corpus": _plain(p.corpus), "seed": seed, "wanted": wanted}
        sources = {"sources": self.data / "sources"}
        return Run("corpus", self._home("corpus"), settings, files=sources)

    def pretrain_run(self, seed: int) -> Run:
        p, corpus = self.profile, self.corpus_run(seed)
        settings = {
            "model": _plain(p.model),
            "pretraining": _plain(p.pretraining),
            "vocabulary_size": p.corpus.vocabulary_size,
            "facts_share": p.corpus.facts_share,
            "seed": seed,
        }
        settings["digest"] = digest([settings, corpus.digest])
        return Run("pretrain", self._home("pretrain"), settings, {"corpus": corpus})

    def _from_checkpoint(self, kind: str, seed: int, step: int, more: dict[str, Any]) -> Run:
        corpus, pretrain = self.corpus_run(seed), self.pretrain_run(seed)
        settings = {
            "seed": seed,
            "step": step,
            "corpus": _plain(self.profile.corpus),
            "pretrain": pretrain.settings["digest"],
            **more,
        }
        return Run(kind, self._home(kind), settings, {"corpus": corpus, "pretrain": pretrain})

    def measure_run(self, seed: int, step: int) -> Run:
        return self._from_checkpoint("measure", seed, step, {})

    def measure_runs(self) -> list[Run]:
        steps = self.profile.pretraining.checkpoints
        return [self.measure_run(seed, step) for seed in self.profile.seeds for step in steps]

    def continual_run(
        self,
        seed: int,
        step: int,
        rate: float,
        cl_seed: int,
        injected: bool = True,
        intervention: dict[str, Any] | None = None,
    ) -> Run:
        plan = _plain(self.profile.continual)
        for unused in ("learning_rates", "seeds", "stages"):  # the lists the grid is made of
            plan[unused] = [1.0]
        more = {
            "continual": plan | {"seeds": [cl_seed]},
            "learning_rate": rate,
            "cl_seed": cl_seed,
            "injected": injected,
            "intervention": intervention,
        }
        run = self._from_checkpoint("continual", seed, step, more)
        if intervention is None:
            return run
        inputs = {**run.inputs, "measure": self.measure_run(seed, step)}
        return dataclasses.replace(run, inputs=inputs)

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

    def continual_runs(self, entropy: pd.DataFrame) -> list[Run]:
        """Every stage at every learning rate and CL seed, with and without injection."""
        plan = self.profile.continual
        return [
            self.continual_run(seed, step, rate, cl_seed, injected)
            for rate in plan.learning_rates
            for cl_seed in plan.seeds
            for injected in (True, False)
            for seed in self.profile.seeds
            for step in self.stages(entropy, seed).values()
        ]

    def intervention_runs(self) -> list[Run]:
        """Resuscitation of the last checkpoint at every p, q, learning rate and CL seed."""
        plan, last = self.profile.interventions, self.profile.pretraining.steps
        return [
            self.continual_run(
                seed, last, rate, cl_seed, True, {"name": "resuscitate", "ratio": p, "factor": q}
            )
            for rate in plan.learning_rates
            for cl_seed in self.profile.continual.seeds
            for p in plan.ratios
            for q in plan.factors
            for seed in self.profile.seeds
        ]

    def run(self, runs: Iterable[Run], title: str) -> None:
        """Do what is missing; see :func:`kelib.runs.execute`."""
        execute(runs, self.profile.workers, title)


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


def _plain(value: Any) -> dict[str, Any]:
    """A dataclass as JSON values (lists for tuples)."""
    return json.loads(json.dumps(dataclasses.asdict(value)))


def pretraining_table(study: Study, every: int = 25) -> pd.DataFrame:
    """Training loss (nats per token, mean of ``every`` steps) along pretraining, per seed."""
    rows = []
    for seed in study.profile.seeds:
        losses = np.array(study.pretrain_run(seed).read("losses.json"))
        for end in range(every, len(losses) + 1, every):
            rows.append((seed, end, losses[end - every : end].mean()))
    return pd.DataFrame(rows, columns=["seed", "step", "loss"])


def checkpoint_tables(study: Study) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(entropy by seed, step and layer; knowledge, accuracy and losses by seed and step)."""
    p = study.profile
    per_step = p.pretraining.batch_size * p.corpus.sequence_length
    entropy, stages = [], []
    for run in study.measure_runs():
        seed, step = run.settings["seed"], run.settings["step"]
        result = run.read()
        for layer, nats in enumerate(result.pop("entropy_nats")):
            entropy.append((seed, step, layer, nats, float(np.log(p.model.intermediate_size))))
        tokens = step * per_step
        head = {"seed": seed, "step": step, "share": step / p.pretraining.steps, "tokens": tokens}
        head["tokens_per_parameter"] = tokens / result["parameters"]
        stages.append({**head, **result})
    columns = ["seed", "step", "layer", "entropy_nats", "bound_nats"]
    return pd.DataFrame(entropy, columns=columns), pd.DataFrame(stages)


def save_coefficients(study: Study) -> None:
    """Mean coefficients of every checkpoint, a safetensors file a seed (tensors ``step/layer``)."""
    for seed in study.profile.seeds:
        steps = study.profile.pretraining.checkpoints
        files = {s: study.measure_run(seed, s).folder / "coefficients.safetensors" for s in steps}
        stack_coefficients(files, study.measurements / f"coefficients-seed{seed}.safetensors")


def continual_table(
    study: Study, runs: Iterable[Run], checkpoints: pd.DataFrame, entropy: pd.DataFrame
) -> pd.DataFrame:
    """One row per continual-learning run: before (``_pt``), after (``_cl``), A, F and settings.

    ``_pt`` is the checkpoint as pretrained; after an intervention ``_modified`` is the changed
    model before continual learning, and ``acquisition_modified`` / ``forgetting_modified`` take it
    as the baseline.
    """
    before = checkpoints.set_index(["seed", "step"])
    labels = {seed: study.stages(entropy, seed) for seed in study.profile.seeds}
    totals = entropy.groupby(["seed", "step"])["entropy_nats"].sum()
    rows = []
    for run in runs:
        s, result = run.settings, run.read()
        start = before.loc[(s["seed"], s["step"])]
        names = {step: label for label, step in labels[s["seed"]].items()}
        change = s["intervention"] or {"name": "none", "ratio": np.nan, "factor": np.nan}
        row = {
            "seed": s["seed"],
            "stage_step": s["step"],
            "stage_label": names[s["step"]],
            "learning_rate": s["learning_rate"],
            "cl_seed": s["cl_seed"],
            "injected": s["injected"],
            "intervention": change["name"],
            "ratio": change["ratio"],
            "factor": change["factor"],
            "chance": CHANCE,
            "tokens_per_parameter": start["tokens_per_parameter"],
            "entropy_pt": totals[(s["seed"], s["step"])],
            "entropy_cl": sum(result["after"].pop("entropy_nats")),
        }
        modified = result.get("modified")
        if modified is not None:
            row["entropy_modified"] = sum(modified.pop("entropy_nats"))
        for name, value in result["after"].items():
            row[f"{name}_pt"], row[f"{name}_cl"] = start[name], value
            if modified is not None:
                row[f"{name}_modified"] = modified[name]
        rows.append(row)
    keys = ["seed", "stage_step", "learning_rate", "intervention", "ratio", "factor", "cl_seed"]
    table = pd.DataFrame(rows).sort_values([*keys, "injected"], ignore_index=True)
    table["acquisition"] = acquisition(table["k_pt"], table["k_cl"])
    table["forgetting"] = forgetting(table["p_pt"], table["p_cl"])
    # NaN where a model knows no more than chance, so that there is nothing to forget
    table["forgetting_over_chance"] = forgetting_over_chance(table["p_pt"], table["p_cl"], CHANCE)
    if "k_modified" in table:
        changed = table["k_modified"].notna()  # runs without intervention may stand in between
        t = table[changed]
        table.loc[changed, "acquisition_modified"] = acquisition(t["k_modified"], t["k_cl"])
        table.loc[changed, "forgetting_modified"] = forgetting(t["p_modified"], t["p_cl"])
    return table


def clean(study: Study) -> None:
    """Delete all that this profile computed (not the fetched text, nor the committed reference)."""
    for kind in ("corpus", "checkpoints", "measurements"):
        shutil.rmtree(study.data / kind / study.profile.profile, ignore_errors=True)

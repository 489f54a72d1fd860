"""The runs of a profile one by one, each from what it rests on. No model is loaded here."""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kelib.config import TEXTS, Profile, Variant, digest
from kelib.errors import KelibError, listing
from kelib.hub_sources import text_runs
from kelib.run import Run


@dataclass(frozen=True)
class StudyRuns:
    """A profile and the folder its data goes to."""

    profile: Profile
    data: Path

    @functools.cached_property
    def measurements(self) -> Path:
        return self.data / "measurements" / self.profile.profile

    @functools.cached_property
    def _runs(self) -> dict[tuple[Any, ...], Run]:
        """Runs that thousands of others rest on, each made once."""
        return {}

    @functools.cached_property
    def _corpus_settings(self) -> dict[str, Any]:
        return _plain(self.profile.corpus)

    @functools.cached_property
    def _homes(self) -> dict[str, Path]:
        name = self.profile.profile
        weights = self.data / "checkpoints" / name
        return {"corpus": self.data / "corpus" / name, "pretrain": weights, "branch": weights}

    def _home(self, kind: str) -> Path:
        if kind not in self._homes:
            self._homes[kind] = self.measurements / kind
        return self._homes[kind]

    def corpus_run(self, seed: int) -> Run:
        """The packed text of a seed."""
        if ("corpus", seed) not in self._runs:
            self._runs["corpus", seed] = self._corpus_run(seed)
        return self._runs["corpus", seed]

    def _corpus_run(self, seed: int) -> Run:
        p = self.profile
        read = p.pretraining.steps * p.pretraining.batch_size
        facts = round(read * p.corpus.facts_share)
        wanted = {
            "facts": facts,
            "general": read - facts,
            "domain": p.corpus.domain_sequences,
        }
        settings = {"corpus": self._corpus_settings, "seed": seed, "wanted": wanted}
        sources = {"sources": self.data / "sources"}
        texts = text_runs((*p.corpus.general, *p.corpus.domain), self.data)
        return Run("corpus", self._home("corpus"), settings, texts, sources)

    @property
    def models(self) -> list[str]:
        """Types of the models that are pretrained: the study's own, then the one to compare."""
        p = self.profile
        return [p.model.model_type, *([p.comparison.model_type] if p.comparison else [])]

    def pretrain_run(self, seed: int, model: str = "") -> Run:
        """Pretraining of ``model`` (one of :attr:`models`, by default the study's own)."""
        if (key := ("pretrain", seed, model)) not in self._runs:
            self._runs[key] = self._pretrain_run(seed, model)
        return self._runs[key]

    def _pretrain_run(self, seed: int, model: str) -> Run:
        p, corpus = self.profile, self.corpus_run(seed)
        shape = p.model if model in ("", p.model.model_type) else p.comparison
        if shape is None or model not in ("", shape.model_type):
            raise KelibError(f"no model {model!r} in this study; it has {listing(self.models)}")
        settings = {
            "model": _plain(shape),
            "training": _plain(p.training),
            "pretraining": _plain(p.pretraining),
            "vocabulary_size": p.corpus.vocabulary_size,
            "facts_share": p.corpus.facts_share,
            "seed": seed,
        }
        settings["digest"] = digest([settings, corpus.digest])
        return Run("pretrain", self._home("pretrain"), settings, {"corpus": corpus})

    def pretrain_runs(self) -> list[Run]:
        """Every model on every seed."""
        return [self.pretrain_run(seed, m) for m in self.models for seed in self.profile.seeds]

    def from_checkpoint(
        self,
        kind: str,
        seed: int,
        step: int,
        more: dict[str, Any],
        model: str = "",
        branch: Run | None = None,
    ) -> Run:
        """A run of ``kind`` with a checkpoint (of pretraining, or of a ``branch`` of it, see
        :mod:`kelib.beyond`) and the corpus of its seed as inputs."""
        corpus, pretrain = self.corpus_run(seed), branch or self.pretrain_run(seed, model)
        settings = {"seed": seed, "step": step, "pretrain": pretrain.settings["digest"], **more}
        return Run(kind, self._home(kind), settings, {"corpus": corpus, "pretrain": pretrain})

    def entropy_run(self, seed: int, step: int, model: str = "", branch: Run | None = None) -> Run:
        """All entropies of one checkpoint (of which only those near a stage show convergence)."""
        own = model in ("", self.profile.model.model_type) and branch is None
        more = {"converge": own and step in self.near_stages()}
        return self.from_checkpoint("entropy", seed, step, more, model, branch)

    def evaluate_run(self, seed: int, step: int, branch: Run | None = None) -> Run:
        """Probes, questions and losses of one checkpoint."""
        more = {"corpus": self._corpus_settings}
        return self.from_checkpoint("evaluate", seed, step, more, branch=branch)

    def measure_runs(self) -> list[Run]:
        """Entropies of every checkpoint of every model, and what the study's own knows at it."""
        p = self.profile
        places = [(seed, step) for seed in p.seeds for step in p.pretraining.checkpoints]
        entropies = [self.entropy_run(*place, model) for model in self.models for place in places]
        return [*entropies, *(self.evaluate_run(*place) for place in places)]

    def entities_run(self, seed: int) -> Run:
        """Perplexity of names at the checkpoints near the stages: one run, as the texts and names
        of a seed are the same at all of them.
        """
        corpus, pretrain = self.corpus_run(seed), self.pretrain_run(seed)
        settings = {
            "seed": seed,
            "steps": self.near_stages(),
            "corpus": self._corpus_settings,
            "pretrain": pretrain.settings["digest"],
        }
        made = {"corpus": corpus, "pretrain": pretrain}
        return Run("entities", self._home("entities"), settings, made, corpus.files)

    def entities_runs(self) -> list[Run]:
        """Perplexity of names for every seed."""
        return [self.entities_run(seed) for seed in self.profile.seeds]

    def near_stages(self) -> list[int]:
        """Steps of the checkpoints nearest to the shares of ``continual.stages``, in order."""
        return list(self._near)

    @functools.cached_property
    def _near(self) -> list[int]:
        return self.profile.pretraining.nearest_steps(self.profile.continual.stages)

    def continual_run(
        self,
        seed: int,
        step: int,
        rate: float,
        cl_seed: int,
        injected: bool = True,
        intervention: dict[str, Any] | None = None,
        variant: Variant | None = None,
        branch: Run | None = None,
    ) -> Run:
        """Continual learning from one checkpoint, by the protocol or a ``variant`` of it.

        Runs of the curve seeds that follow the protocol and read passages keep their last weights;
        their learning curve is scored where no intervention came before. From a ``branch`` of
        pretraining neither is done.
        """
        plan, of = self.profile.continual, variant or Variant("", (rate,), (cl_seed,))
        kept: dict[str, int | None] = {
            "steps": of.steps or plan.steps,
            "batch_size": of.batch_size or plan.batch_size,
        }
        kept |= {"injections": plan.injections, "save_every": plan.save_every}
        # the lists that the grid is made of are no settings of a run
        lists = {"learning_rates": [rate], "seeds": [cl_seed], "stages": [1.0]}
        trunk = variant is None and branch is None
        looked_at = trunk and injected and cl_seed in plan.curve_seeds
        more = {
            "corpus": self._corpus_settings,
            "training": _plain(self.profile.training),
            "continual": {**kept, **lists, "optimizer": _plain(of.optimizer or plan.optimizer)},
            "text": TEXTS[of.text],
            "epochs": of.epochs,
            "own_moments": of.own_moments,
            "learning_rate": rate,
            "cl_seed": cl_seed,
            "injected": injected,
            "intervention": intervention,
            "curve": looked_at and intervention is None,
            "keep": looked_at,
        }
        run = self.from_checkpoint("continual", seed, step, more, branch=branch)
        return run if intervention is None else self._with_coefficients(run, branch)

    def intervene_run(self, seed: int, step: int, intervention: dict[str, Any]) -> Run:
        """What an intervention alone does to a checkpoint."""
        more = {"corpus": self._corpus_settings, "intervention": intervention}
        return self._with_coefficients(self.from_checkpoint("intervene", seed, step, more))

    def _with_coefficients(self, run: Run, branch: Run | None = None) -> Run:
        s = run.settings
        entropy = self.entropy_run(s["seed"], s["step"], branch=branch)
        return dataclasses.replace(run, inputs={**run.inputs, "entropy": entropy})


def _plain(value: Any) -> dict[str, Any]:
    """A dataclass as JSON values (lists for tuples)."""
    return json.loads(json.dumps(dataclasses.asdict(value)))

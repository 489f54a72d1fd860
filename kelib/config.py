"""Profiles: frozen, validated, digested configurations read from ``notebooks/params/*.yaml``.

A profile differs from another one in parameters only, never in code. Everything a run depends on
is a dataclass here, so that its digest names the run: change a value and only what depends on it
is run again.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kelib.arms import Interventions
from kelib.errors import KelibError, listing
from kelib.recipes import Branch, Branches, Regime, Regimes
from kelib.schema import (
    at_least,
    at_least_each,
    build,
    convert,
    digest,
    field_names,
    read_yaml,
    require,
    require_name,
    unique,
)
from kelib.sections import (
    PROTOCOL,
    TEXTS,
    Continual,
    Corpus,
    Mechanism,
    Model,
    Optimizer,
    Pretraining,
    Reactivation,
    Retention,
    Training,
    Variant,
)

__all__ = [
    "PROTOCOL",
    "TEXTS",
    "Branch",
    "Branches",
    "Continual",
    "Corpus",
    "Mechanism",
    "Model",
    "Optimizer",
    "Pretraining",
    "Profile",
    "Reactivation",
    "Regime",
    "Regimes",
    "Retention",
    "Training",
    "Variant",
    "convert",
    "digest",
    "load_profile",
    "profile_from",
    "profiles",
    "read_yaml",
    "repository_root",
]


EXECUTORS = ("local", "slurm")  # where runs are done, see kelib.runs.execute
# Sections that a profile need not have, and whose rates they must be among
OPTIONAL = {
    "mechanism": "continual",
    "retention": "continual",
    "reactivation": "interventions",
    "branches": "continual",
    "regimes": "continual",
}
KEPT = ("mechanism", "retention", "reactivation")  # of these, what looks into kept weights


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
    comparison: Model | None = None  # another family, trained and measured beside (Fig. 6)
    training: Training = dataclasses.field(default_factory=Training)
    mechanism: Mechanism | None = None
    retention: Retention | None = None
    reactivation: Reactivation | None = None
    branches: Branches | None = None
    regimes: Regimes | None = None
    executor: str = "local"  # or slurm: jobs of a cluster, with notebooks/params/cluster.yaml
    figures: tuple[str, ...] = ()  # what make figures draws; none: all that the sections allow

    def __post_init__(self) -> None:
        require_name("profile", self.profile)
        at_least(self, workers=1)
        require(
            self.executor in EXECUTORS, "executor", self.executor, f"one of {listing(EXECUTORS)}"
        )
        if self.comparison is not None:
            require(
                self.comparison.model_type != self.model.model_type,
                "comparison.model_type",
                self.comparison.model_type,
                f"another family than {self.model.model_type}",
            )
        unique(self, "seeds")
        at_least_each(self, 0, "seeds")
        missing = set(self.interventions.learning_rates) - set(self.continual.learning_rates)
        require(
            not missing,
            "interventions.learning_rates",
            self.interventions.learning_rates,
            f"rates of continual.learning_rates {self.continual.learning_rates}, "
            "else there is no original to compare with",
        )
        for name, of in OPTIONAL.items():
            if (section := getattr(self, name)) is None:
                continue
            allowed = getattr(self, of).learning_rates
            require(
                set(section.learning_rates) <= set(allowed),
                f"{name}.learning_rates",
                section.learning_rates,
                f"rates of {of}.learning_rates {allowed}",
            )
            require(
                name not in KEPT or self.continual.curve_seeds != (),
                "continual.curve_seeds",
                self.continual.curve_seeds,
                f"at least one seed where there is a section {name}: only their runs keep the "
                "weights that it looks into",
            )

        for branch in self.branches.branches if self.branches is not None else ():
            branch.span(self.pretraining)  # refused here, before anything is computed
        for regime in self.regimes.regimes if self.regimes is not None else ():
            stages = self.pretraining.nearest_steps(self.continual.stages)
            regime.recipe(self.pretraining, stages)

    @property
    def parameters(self) -> dict[str, Any]:
        """All that can change a number: not who shares the work, nor where, nor what is drawn."""
        values = dataclasses.asdict(dataclasses.replace(self, workers=1))
        del values["executor"], values["figures"]
        return values

    @property
    def digest(self) -> str:
        """Digest of the parameters alone: no versions, no commit."""
        values = self.parameters
        for name in OPTIONAL:  # profiles older than a section keep their digest
            if values[name] is None:
                del values[name]
        for branch in (values.get("branches") or {}).get("branches", ()):  # nor than a key
            if branch["final_share"] is None:
                del branch["final_share"]
        return digest(values)


def profile_from(values: Any, overrides: Mapping[str, Any] | None = None) -> Profile:
    """Build a profile from nested mappings; ``overrides`` are dotted keys such as
    ``{"continual.steps": 40}``.

    Raises KelibError for an unknown, missing or mistyped key, naming the valid ones.
    """
    if not isinstance(values, Mapping):
        raise KelibError(f"a profile must be a mapping with {listing(field_names(Profile))}")
    nested = copy.deepcopy(dict(values))  # the caller's mapping is never changed
    for dotted, value in (overrides or {}).items():
        *parents, last = dotted.split(".")
        place: Any = nested
        for parent in parents:
            # a section with defaults only need not be in the file
            optional = dotted.startswith("training.")
            if not isinstance(place, dict):
                break
            place = place.setdefault(parent, {}) if optional else place.get(parent)
        if not isinstance(place, dict):
            raise KelibError(
                f"unknown key {dotted}: valid sections are {listing(field_names(Profile))}"
            )
        place[last] = copy.deepcopy(value)
    return build(Profile, nested)


def profiles(folder: Path | None = None) -> list[str]:
    """Names of the profiles: YAML files of ``notebooks/params`` that have a ``profile`` key."""
    folder = folder or repository_root() / "notebooks" / "params"
    return sorted(
        path.stem
        for path in folder.glob("*.yaml")
        if any(
            line.startswith("profile:") for line in path.read_text("utf-8", "replace").splitlines()
        )
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

"""Settings of a measurement along the pretraining of a model that others trained. No torch.

The file in ``notebooks/params`` has the key ``trajectory`` where a study has ``profile``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kelib.continued_profile import NOT_OF_A_RUN, Learning
from kelib.errors import listing
from kelib.own_model import place_of
from kelib.profile_kinds import load_kind, profile_from_values, profiles_of_kind
from kelib.published import GENERATED, PublishedModel, PublishedProfile
from kelib.revisions import CHOICES
from kelib.schema import digest, require

KEY = "trajectory"
DTYPES = ("float32", "bfloat16")
OF_A_RUN = (
    *("data", "seed", "sequences", "sequence_length", "batch_size", "definitions"),
    "loss_sequences",
)
_SHARED = ("workers", "executor", *OF_A_RUN)


@dataclass(frozen=True)
class TrajectoryModel:
    """``source``: a model of ``data/catalogue.yaml``, a hub id, a folder of folders or
    ``generated:TYPE``. ``steps``, ``choice``, ``stage``: see :func:`kelib.revisions.pick`; without
    ``steps`` all of a folder. ``accept``: revisions taken whatever the audit says. ``separator``:
    as for a published model. ``tokens_per_step``: where the catalogue has none.
    """

    source: str
    steps: tuple[int, ...] = ()
    choice: str = "exact"
    stage: str | None = None
    accept: tuple[str, ...] = ()
    separator: str | None = None
    tokens_per_step: int | None = None
    dtype: str = "float32"  # of the weights and the forward pass; sums are float64 in any case

    def __post_init__(self) -> None:
        require(self.choice in CHOICES, "choice", self.choice, f"one of {listing(CHOICES)}")
        require(self.dtype in DTYPES, "dtype", self.dtype, f"one of {listing(DTYPES)}")
        distinct = len(set(self.steps)) == len(self.steps) and all(s >= 0 for s in self.steps)
        require(distinct, "steps", self.steps, "a list of distinct steps, none below 0")

    @property
    def is_generated(self) -> bool:
        return self.source.startswith(GENERATED)

    @property
    def is_folder(self) -> bool:
        return place_of(self.source).is_dir()


@dataclass(frozen=True)
class TrajectoryProfile:
    """Everything the measurement of one trajectory needs; most fields are those of
    :class:`kelib.published.PublishedProfile`.
    """

    trajectory: str  # the name of the profile
    workers: int  # checkpoints measured at once
    seed: int
    model: TrajectoryModel
    data: tuple[str, ...]
    sequences: int
    sequence_length: int
    batch_size: int
    definitions: tuple[str, ...]
    loss_sequences: int
    cache_gib: float  # bound of the checkpoints that lie on the disk at once
    executor: str = "local"  # or slurm: jobs of a cluster, with notebooks/params/cluster.yaml
    learning: Learning | None = None  # continual learning from some of the checkpoints

    def __post_init__(self) -> None:
        shared = {name: getattr(self, name) for name in _SHARED}
        model = PublishedModel(self.model.source)
        PublishedProfile(published=self.trajectory, model=model, **shared)  # refuses what cannot be
        require(self.cache_gib > 0, "cache_gib", self.cache_gib, "above 0")
        if self.learning is not None and self.model.steps:
            for step in self.learning.steps:
                among = f"among model.steps, {listing(map(str, self.model.steps), 20)}"
                require(step in self.model.steps, "learning.steps", step, among)

    @property
    def parameters(self) -> dict[str, Any]:
        """All that can change a number, as JSON values, with the name under ``profile`` too."""
        plain = json.loads(json.dumps(dataclasses.asdict(dataclasses.replace(self, workers=1))))
        del plain["executor"]
        if self.learning is None:  # profiles older than the section keep their digest
            del plain["learning"]
        else:
            for name in NOT_OF_A_RUN:
                del plain["learning"][name]
        return {"profile": self.trajectory, **plain}

    @property
    def digest(self) -> str:
        """Digest of the parameters alone: no versions, no commit, not the number of workers."""
        return digest(self.parameters)


def trajectory_profiles() -> list[str]:
    """Names of the trajectory profiles: YAML files of ``notebooks/params`` with that key."""
    return profiles_of_kind(KEY)


def load_trajectory(name: str, overrides: Mapping[str, Any] | None = None) -> TrajectoryProfile:
    """Read ``notebooks/params/<name>.yaml``; as :func:`kelib.published.load_published`."""
    profile: TrajectoryProfile = load_kind(TrajectoryProfile, KEY, name, overrides)
    return profile


def trajectory_from(values: Any, overrides: Mapping[str, Any] | None = None) -> TrajectoryProfile:
    """Build a trajectory profile from nested mappings and dotted ``overrides``."""
    profile: TrajectoryProfile = profile_from_values(TrajectoryProfile, KEY, values, overrides)
    return profile

"""Entropies along the pretraining of a model that others trained: its runs. No torch.

A trajectory profile names a model and steps. Each step is one run: its checkpoint is fetched at a
pinned commit, measured on every text (see :mod:`kelib.trajectory_jobs`) and released, while the
next one is fetched; what stays are numbers and mean-coefficient vectors. The model is one of
``data/catalogue.yaml`` or a hub id, a folder that holds a folder for each checkpoint, or
``generated:TYPE``, tiny untrained models for trying out.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from kelib import continued
from kelib.audit import refuse_bad
from kelib.catalogue import catalogued, revisions_of
from kelib.errors import KelibError, listing
from kelib.fetching import GIB, fetching_ahead, held, make_room
from kelib.hub_sources import text_runs
from kelib.own_model import place_of, state_of, with_places
from kelib.published import GENERATED, data_folder
from kelib.revisions import Revision, pick, read_name
from kelib.run import Run
from kelib.runs import execute
from kelib.trajectory_profile import KEY, OF_A_RUN, TrajectoryProfile, load_trajectory
from kelib.trajectory_tables import write_tables


@dataclass(frozen=True)
class Trajectory:
    """A profile and the folder its data goes to. ``lock`` and ``audits`` are where revisions are
    pinned and audits lie, by default those of ``data/``.
    """

    profile: TrajectoryProfile
    data: Path
    lock: Path | None = None
    audits: Path | None = None

    @property
    def measurements(self) -> Path:
        return self.data / "measurements" / self.profile.trajectory

    @property
    def cache(self) -> Path:
        """Where checkpoints lie while they are measured."""
        return self.data / "checkpoints" / self.profile.trajectory / "fetched"

    @functools.cached_property
    def revisions(self) -> list[Revision]:
        """The checkpoints to measure, in order of their steps.

        Raises KelibError for a model or a step that is not there; where the revisions of a hub
        model are not pinned yet, the hub is asked.
        """
        model = self.profile.model
        if not model.steps and not model.is_folder:
            raise KelibError(f"model.steps is empty: give steps of {model.source} to measure")
        steps = model.steps or [r.step for r in self._known if r.step is not None]
        return self._picked(steps)

    @functools.cached_property
    def learning_revisions(self) -> list[Revision]:
        """The checkpoints that are continued, of :attr:`revisions`, in order of their steps."""
        learning = self.profile.learning
        return [] if learning is None else self._picked(learning.steps)

    @functools.cached_property
    def _known(self) -> list[Revision]:
        model = self.profile.model
        if model.is_generated:
            return [Revision(model.source, f"step{n}", "", step=n) for n in model.steps]
        if model.is_folder:
            return revisions_in(place_of(model.source))
        return revisions_of(model.source, self.lock)

    def _picked(self, steps: Iterable[int]) -> list[Revision]:
        model = self.profile.model
        found = pick(self._known, list(steps), model.choice, model.stage)
        return sorted(found, key=lambda revision: revision.step or 0)

    def tokens_seen(self, revision: Revision) -> float:
        """Tokens of training at a revision, NaN where neither steps nor name tell."""
        model = self.profile.model
        each = model.tokens_per_step
        if each is None and not model.is_generated and not model.is_folder:
            each = catalogued(model.source).tokens_per_step
        if each is not None and revision.step is not None:
            return float(each * revision.step)
        return float("nan") if revision.tokens is None else revision.tokens * 1e9

    def run_of(self, revision: Revision) -> Run:
        """All entropies of one checkpoint."""
        profile = self.profile
        settings = {name: profile.parameters[name] for name in OF_A_RUN}
        # names for the tables, and sources, in whose place a file may be put
        settings["data"], texts = with_places(profile.data)
        if texts:  # files of the reader's may change
            settings["texts"] = texts
        settings |= {"dtype": profile.model.dtype, "separator": profile.model.separator}
        place, made, files = self.place_of(revision)
        inputs = {**text_runs(profile.data, self.data), **made}
        files = {"sources": self.data / "sources", **files}
        return Run(KEY, self.measurements / KEY, settings | place, inputs, files)

    def place_of(
        self, revision: Revision
    ) -> tuple[dict[str, Any], dict[str, Run], dict[str, Path]]:
        """What a run needs to find a checkpoint: settings, runs and files among its inputs."""
        model = self.profile.model
        place: dict[str, Any] = {"revision": revision.name, "commit": revision.commit, "repo": None}
        if model.is_generated:
            return place, {"checkpoints": self._generated()}, {}
        if model.is_folder:
            return place, {}, {"checkpoints": place_of(model.source)}
        return place | {"repo": revision.repo}, {}, {"cache": self.cache}

    def runs(self) -> list[Run]:
        return [self.run_of(revision) for revision in self.revisions]

    def runs_by_revision(self) -> dict[str, list[Run]]:
        """All runs, those of continual learning too, by the name of their checkpoint."""
        continued_ones = {revision.name for revision in self.learning_revisions}
        return {
            revision.name: [
                self.run_of(revision),
                *(
                    continued.learning_runs(self, revision)
                    if revision.name in continued_ones
                    else ()
                ),
            ]
            for revision in self.revisions
        }

    def _generated(self) -> Run:
        settings = {
            "model_type": self.profile.model.source.removeprefix(GENERATED),
            "sequence_length": self.profile.sequence_length,
            "steps": list(self.profile.model.steps),
        }
        return Run("untrained", self.data / "checkpoints" / self.profile.trajectory, settings)


def revisions_in(folder: Path) -> list[Revision]:
    """The checkpoints in a folder: folders with a config.json and a step in their name, as
    ``step1000`` or ``checkpoint-1000``.

    In place of a commit stands a digest of the names, sizes and times of the files. Raises
    KelibError if there is none.
    """
    found = []
    for place in sorted(folder.iterdir()):
        if (place / "config.json").is_file():
            name = place.name.replace("checkpoint-", "step")
            read = read_name(str(folder), name, state_of(place))
            found.append(dataclasses.replace(read, name=place.name))
    if not any(revision.step is not None for revision in found):
        raise KelibError(
            f"{folder} holds no checkpoint whose name has a step, as step1000 or checkpoint-1000; "
            f"it has {listing(path.name for path in folder.iterdir())}"
        )
    return found


def open_trajectory(
    name: str, overrides: Mapping[str, Any] | None = None, scratch: bool = False
) -> Trajectory:
    """A trajectory profile whose data goes to ``data/``, or with ``scratch`` to a temporary folder,
    the same for the same code and parameters.
    """
    profile = load_trajectory(name, overrides)
    return Trajectory(profile, data_folder(profile.digest, scratch))


def measure_trajectory(study: Trajectory) -> dict[str, pd.DataFrame]:
    """Do the missing runs, write the tables of :data:`kelib.trajectory_tables.TABLES`, return them.

    ``entropy``, ``totals`` and ``texts``: as of :func:`kelib.published.measure_published`, with
    revision, step and tokens_seen (of training) in front. ``revisions``: stage, repository, commit
    and what the audit remarks of each. Mean coefficients go to
    ``coefficients-<revision>.safetensors``. With a section ``learning`` also those of
    :data:`kelib.continued.TABLES`. Raises KelibError for revisions that the audit calls bad, and if
    ``cache_gib`` or the disk is too small.
    """
    profile, model = study.profile, study.profile.model
    remarks: dict[str, str] = {}
    if profile.learning is not None:
        continued.refuse_missing(profile.learning)
    fetched = not (model.is_generated or model.is_folder)
    if fetched:
        remarks = refuse_bad(model.source, study.revisions, model.accept, study.audits)
    if profile.learning is not None:
        continued.write_launch(study)
    groups = study.runs_by_revision()
    if not fetched:
        runs = [run for group in groups.values() for run in group]
        execute(runs, profile.workers, KEY, profile.executor)
    else:
        _fetch_and_do(study, groups)
    tables = write_tables(study, study.runs(), remarks)
    if profile.learning is not None:
        tables |= continued.write_tables(study, tables["totals"])
    return tables


def _fetch_and_do(study: Trajectory, groups: Mapping[str, list[Run]]) -> None:
    """Checkpoints that one run wants, ``workers`` at once; then, one by one, those that several
    runs share, each of which stays until all of them are done."""
    profile = study.profile
    single = [group[0] for group in groups.values() if len(group) == 1]
    shared = [group for group in groups.values() if len(group) > 1]
    missing = [[run] for run in single if not run.done]
    with _ahead(study, missing, profile.workers) if missing else nullcontext():
        execute(single, profile.workers, KEY, profile.executor)
    missing = [group for group in shared if not all(run.done for run in group)]
    with _ahead(study, missing, 1) if missing else nullcontext():
        for group in shared:
            there = all(run.done for run in group)
            commit = group[0].settings["commit"]
            with nullcontext() if there else held(commit, study.cache):
                execute(group, profile.workers, KEY, profile.executor)


def _ahead(study: Trajectory, missing: list[list[Run]], workers: int) -> Any:
    wanted = [(group[0].settings["repo"], group[0].settings["commit"]) for group in missing]
    at_once = min(workers, len(missing))
    slots = make_room(wanted, study.cache, study.profile.cache_gib * GIB, at_once)
    # a run is measured after its checkpoint was released
    states = [functools.partial(_all_done, group) for group in missing]
    queue = [(*one, state) for one, state in zip(wanted, states, strict=True)]
    return fetching_ahead(queue, study.cache, slots)


def _all_done(runs: list[Run]) -> bool:
    return all(run.done for run in runs)

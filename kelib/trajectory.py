"""Entropies along the pretraining of a model that others trained: runs and tables. No torch.

A trajectory profile names a model and steps. Each step is one run: its checkpoint is fetched at a
pinned commit, measured on every text (see :mod:`kelib.trajectory_jobs`) and released, while the
next one is fetched; what stays are numbers and mean-coefficient vectors. The model is one of
``data/catalogue.yaml`` or a hub id, a folder that holds a folder for each checkpoint, or
``generated:TYPE``, tiny untrained models for trying out.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from kelib.audit import refuse_bad
from kelib.catalogue import catalogued, revisions_of
from kelib.errors import KelibError, listing
from kelib.fetching import GIB, fetching_ahead, make_room
from kelib.hub_sources import text_runs
from kelib.own_model import place_of, state_of, with_places
from kelib.published import GENERATED, data_folder
from kelib.results import Tables, open_tables
from kelib.revisions import Revision, pick, read_name
from kelib.run import Run
from kelib.runs import execute
from kelib.tables import provenance, read_table, write_table
from kelib.trajectory_profile import (
    KEY,
    OF_A_RUN,
    TrajectoryProfile,
    load_trajectory,
    trajectory_from,
)

TABLES = ("entropy", "totals", "texts", "revisions")


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
        if model.is_generated:
            found = [Revision(model.source, f"step{n}", "", step=n) for n in model.steps]
        else:
            known = (
                revisions_in(place_of(model.source))
                if model.is_folder
                else revisions_of(model.source, self.lock)
            )
            steps = model.steps or [r.step for r in known if r.step is not None]
            found = pick(known, steps, model.choice, model.stage)
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
        settings |= {"revision": revision.name, "commit": revision.commit, "repo": None}
        home, files = self.measurements / KEY, {"sources": self.data / "sources"}
        inputs: dict[str, Run] = dict(text_runs(profile.data, self.data))
        if profile.model.is_generated:
            inputs["checkpoints"] = self._generated()
        elif profile.model.is_folder:
            files["checkpoints"] = place_of(profile.model.source)
        else:
            settings["repo"], files["cache"] = revision.repo, self.cache
        return Run(KEY, home, settings, inputs, files)

    def runs(self) -> list[Run]:
        return [self.run_of(revision) for revision in self.revisions]

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
    """Do the missing runs and write the tables of :data:`TABLES`, which are returned.

    ``entropy``, ``totals`` and ``texts``: as of :func:`kelib.published.measure_published`, with
    revision, step and tokens_seen (of training) in front. ``revisions``: stage, repository, commit
    and what the audit remarks of each. Mean coefficients go to
    ``coefficients-<revision>.safetensors``. Raises KelibError for revisions that the audit calls
    bad, and if ``cache_gib`` or the disk is too small.
    """
    profile, runs = study.profile, study.runs()
    on_hub = [run.settings["repo"] is not None for run in runs]
    remarks: dict[str, str] = {}
    if any(on_hub):
        model = profile.model
        remarks = refuse_bad(model.source, study.revisions, model.accept, study.audits)
    missing = [run for run, fetched in zip(runs, on_hub, strict=True) if fetched and not run.done]
    with _ahead(study, missing) if missing else nullcontext():
        execute(runs, profile.workers, KEY, profile.executor)
    return _write(study, runs, remarks)


def _ahead(study: Trajectory, missing: list[Run]) -> Any:
    wanted = [(run.settings["repo"], run.settings["commit"]) for run in missing]
    at_once = min(study.profile.workers, len(missing))
    slots = make_room(wanted, study.cache, study.profile.cache_gib * GIB, at_once)
    # a run is measured after its checkpoint was released
    states = [functools.partial(getattr, run, "done") for run in missing]
    queue = [(*one, state) for one, state in zip(wanted, states, strict=True)]
    return fetching_ahead(queue, study.cache, slots)


def _write(
    study: Trajectory, runs: list[Run], remarks: Mapping[str, str]
) -> dict[str, pd.DataFrame]:
    rows = [
        {
            "revision": revision.name,
            "step": revision.step,
            "tokens_seen": study.tokens_seen(revision),
            "stage": revision.stage,
            "repo": run.settings["repo"],
            "commit": run.settings["repo"] and revision.commit,
            "remarks": remarks.get(revision.name, ""),
        }
        for revision, run in zip(study.revisions, runs, strict=True)
    ]
    parts = {name: _below_each_other(rows, runs, name) for name in TABLES[:-1]}
    parts["revisions"] = pd.DataFrame(rows)
    inputs = {run.settings["revision"]: run.digest for run in runs}
    note = provenance(study.profile.parameters, [study.profile.seed], inputs)
    note["run_seconds"] = round(sum(run.note()["seconds"] for run in runs), 1)
    note["runs"] = len(runs)
    for run in runs:
        name = f"coefficients-{run.settings['revision'].replace('/', '-')}.safetensors"
        shutil.copyfile(run.folder / "coefficients.safetensors", study.measurements / name)
    tables = {}
    for name, part in parts.items():
        path = study.measurements / f"{name}.csv"
        write_table(part, path, note)
        tables[name] = read_table(path)
    return tables


def _below_each_other(
    rows: Iterable[Mapping[str, Any]], runs: Iterable[Run], name: str
) -> pd.DataFrame:
    parts = []
    for row, run in zip(rows, runs, strict=True):
        part = run.read_table(f"{name}.csv")
        part.insert(0, "data", part.pop("data"))
        for place, key in enumerate(("revision", "step", "tokens_seen")):
            part.insert(place, key, row[key])
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


class TrajectoryTables(Tables):
    """Tables of a trajectory profile, opened for drawing."""

    @property
    def label(self) -> str:
        """Profile, model and seed, as figures show them."""
        chosen = self.trajectory
        return f"profile {self.name} · {chosen.model.source} · seed {chosen.seed}"

    @property
    def trajectory(self) -> TrajectoryProfile:
        """What the tables were made with, read from their provenance."""
        return trajectory_from(self.parameters)


def open_trajectory_tables(name: str, source: str = "reference") -> TrajectoryTables:
    """As :func:`kelib.results.open_tables`, for a trajectory profile."""
    found = open_tables(name, source)
    return TrajectoryTables(
        **{field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    )

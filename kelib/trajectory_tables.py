"""The tables of entropies along pretraining: written from runs, opened for drawing."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from kelib.results import Tables, open_tables
from kelib.run import Run, provenance_of_runs
from kelib.tables import read_table, seal_vectors, write_table
from kelib.trajectory_profile import TrajectoryProfile, trajectory_from

if TYPE_CHECKING:
    from kelib.trajectory import Trajectory

TABLES = ("entropy", "totals", "texts", "revisions")


def write_tables(
    study: Trajectory, runs: list[Run], remarks: Mapping[str, str]
) -> dict[str, pd.DataFrame]:
    """Write the tables of :data:`TABLES` from a finished run for each checkpoint, and return them.

    ``remarks`` of the audit by revision. For what is in them see
    :func:`kelib.trajectory.measure_trajectory`.
    """
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
    note = provenance_of_runs(study.profile.parameters, [study.profile.seed], inputs, runs)
    vectors = []
    for run in runs:
        run.check(["coefficients.safetensors"])
        name = f"coefficients-{run.settings['revision'].replace('/', '-')}.safetensors"
        vectors.append(study.measurements / name)
        shutil.copyfile(run.folder / "coefficients.safetensors", vectors[-1])
    files = {"entropy": seal_vectors(vectors)}
    tables = {}
    for name, part in parts.items():
        path = study.measurements / f"{name}.csv"
        write_table(part, path, note | ({"files": files[name]} if name in files else {}))
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
    return TrajectoryTables.of(open_tables(name, source))

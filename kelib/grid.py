"""All runs of a profile by stage, and whether the disk has room for them. No torch."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd

from kelib import beyond, regimes, sources
from kelib.errors import KelibError
from kelib.figure_stages import stages_behind
from kelib.run import Run
from kelib.runs import with_inputs
from kelib.study import Study
from kelib.tables import read_table
from kelib.workload import Work, shape_of_run, work_of

STAGES = {
    1: "pretrain",
    2: "measure",
    3: "continual",
    4: "interventions",
    5: "published",
    6: "mechanism",
    7: "branches",
    8: "trajectory",
    9: "regimes",
}


def stage_runs(study: Study, entropy: pd.DataFrame | None) -> dict[int, list[Run]]:
    """The runs that each stage asks for, without those they rest on; only of the stages behind the
    figures, where the profile names some.

    Stages 3 and 6 begin at the stages of continual learning, which ``entropy`` says; they are left
    out without it.
    """
    continued = [run for _, run in [*study.intervention_grid(), *study.arms_grid()]]
    runs = {
        1: study.pretrain_runs(),
        2: [*study.measure_runs(), *study.entities_runs()],
        4: [*study.intervene_runs(), *continued],
        7: beyond.departures(study),
        9: regimes.regime_runs(study),
    }
    if entropy is not None:
        runs[3] = [run for _, run in study.continual_grid(entropy)]
        runs[6] = beyond.looks(study, entropy)
    named = study.profile.figures
    wanted = stages_behind(named) if named else set(runs)
    return {stage: asked for stage, asked in sorted(runs.items()) if stage in wanted}


def entropy_so_far(study: Study) -> pd.DataFrame | None:
    """The entropy table of stage 2, None before it is there."""
    path = study.measurements / "entropy.csv"
    return read_table(path) if path.exists() else None


def flat_entropy(study: Study) -> pd.DataFrame:
    """An entropy table in which no stage lies before the peak, for plans made before there is one:
    columns seed, step, entropy_nats."""
    steps = study.profile.pretraining.checkpoints
    rows = [(seed, step, 0.0) for seed in study.profile.seeds for step in steps]
    return pd.DataFrame(rows, columns=["seed", "step", "entropy_nats"])


def planned_runs(study: Study) -> dict[int, list[Run]]:
    """Every run by the stage that does it first, those it rests on before it; each once.

    Before stage 2 is done, with the most stages of continual learning that there can be.
    """
    entropy = entropy_so_far(study)
    return once(stage_runs(study, flat_entropy(study) if entropy is None else entropy))


def once(stages: Mapping[int, list[Run]]) -> dict[int, list[Run]]:
    """The runs of all stages with what they rest on, each at the first stage that needs it."""
    seen: set[str] = set()
    found: dict[int, list[Run]] = {}
    for stage, asked in sorted(stages.items()):
        found[stage] = []
        for run in (run for level in with_inputs(asked) for run in level):
            if run.digest not in seen:
                seen.add(run.digest)
                found[stage].append(run)
    return {stage: runs for stage, runs in found.items() if runs}


def missing_text(names: Iterable[str], folder: Path) -> dict[str, int]:
    """Bytes to fetch of the sources of ``data/sources.yaml`` among ``names``: of the files that are
    taken out of their archives, which are about as large."""
    known = sources.manifest()
    return missing_files({name: known[name] for name in names if name in known}, folder)


def missing_files(rows: Mapping[str, sources.Source], folder: Path) -> dict[str, int]:
    """Bytes of the members, by name of the row, that are not in ``folder``."""
    lacking = {}
    for name, row in rows.items():
        there = [path.is_file() for path in row.paths(folder)]
        lacking[name] = sum(m.bytes for m, here in zip(row.members, there, strict=True) if not here)
    return {name: count for name, count in lacking.items() if count}


def needed_bytes(works: Iterable[Work], workers: int, fetched: Iterable[int]) -> int:
    """Bytes of what runs leave, of what the largest keep while they run, and of text with the
    archive it comes out of."""
    works = list(works)
    scratch = sorted((work.scratch for work in works), reverse=True)[:workers]
    return sum(work.stored for work in works) + sum(scratch) + 2 * sum(fetched)


def free_bytes(folder: Path) -> int:
    """Bytes that may still be written in a folder, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def require_space(study: Study) -> None:
    """Raise KelibError if the disk is too small for what is missing of a study."""
    profile, folder = study.profile, study.data
    works = [
        work_of(profile, run.kind, run.settings, shape_of_run(profile, run))
        for runs in planned_runs(study).values()
        for run in runs
        if not run.done
    ]
    names = (*profile.corpus.general, *profile.corpus.domain)
    text = missing_text(names, folder / "sources").values()
    refuse_small_disk(profile.profile, needed_bytes(works, profile.workers, text), folder)


def refuse_small_disk(name: str, needed: int, folder: Path) -> None:
    """Raise KelibError if ``needed`` bytes are more than ``folder`` has free."""
    free = free_bytes(folder)
    if needed > free:
        raise KelibError(
            f"profile {name} needs {needed / 1e9:.2f} GB more in {folder}, {free / 1e9:.2f} GB are "
            "free there: free space, choose another folder, or lower seeds or checkpoints"
        )

"""What the stage notebooks call: do the missing runs of a stage, then write its measurement tables.

Each stage reads the tables of the one before it and nothing else; calling one twice does nothing
twice.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from kelib.beyond import (
    branch_grid,
    branch_measure_runs,
    branch_runs,
    looks,
    mechanism_runs,
    reactivation_runs,
    retention_runs,
)
from kelib.beyond_tables import over_layers, reactivation_table, retention_table
from kelib.branch_tables import branch_entropy_table, branch_learning_table, branch_table
from kelib.config import PROTOCOL, load_profile, repository_root
from kelib.errors import KelibError
from kelib.figure_stages import BRANCHES, MEASURED, MECHANISM
from kelib.grid import require_space
from kelib.regimes import (
    regime_grid,
    regime_learning_table,
    regime_places,
    regime_runs,
    regimes_table,
)
from kelib.run import Run, provenance_of_runs
from kelib.study import Study
from kelib.study_tables import (
    checkpoints_table,
    continual_table,
    curves_table,
    entities_table,
    entropy_tables,
    pretraining_table,
    save_coefficients,
)
from kelib.tables import (
    library_digest,
    read_provenance,
    read_table,
    seal_vectors,
    write_table,
)


def open_study(
    profile: str, overrides: Mapping[str, Any] | None = None, scratch: bool = False
) -> Study:
    """A study whose data goes to ``data/`` of the repository, or with ``scratch`` to a temporary
    folder.

    The temporary folder is the same for the same code, so that opening one stage notebook after
    another does not pretrain each time.
    """
    chosen = load_profile(profile, overrides)
    if scratch:
        data = Path(tempfile.gettempdir()) / f"kelib-scratch-{library_digest()}-{chosen.digest}"
    else:
        data = repository_root() / "data"
    return Study(chosen, data)


def _write(
    study: Study,
    name: str,
    table: pd.DataFrame,
    inputs: list[str],
    runs: list[Run],
    vectors: Iterable[Path] = (),
) -> pd.DataFrame:
    path = study.measurements / f"{name}.csv"
    read = {n: read_provenance(study.measurements / f"{n}.csv")["sha256"] for n in inputs}
    note = provenance_of_runs(study.profile.parameters, list(study.profile.seeds), read, runs)
    if files := seal_vectors(vectors):
        note["files"] = files
    write_table(table, path, note)
    return read_table(path)


def table(study: Study, name: str) -> pd.DataFrame:
    """A measurement table of the study. KelibError if its stage was not run."""
    return read_table(study.measurements / f"{name}.csv")


def pretrain(study: Study) -> pd.DataFrame:
    """Stage 1: corpora and checkpoints; the table is the training loss by model, seed and step.

    Raises KelibError, before anything is done, if the disk is too small for the whole study.
    """
    require_space(study)
    runs = study.pretrain_runs()
    study.run(runs, "pretrain")
    return _write(study, "pretraining", pretraining_table(study), [], runs)


def measure(study: Study) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Stage 2: (entropy by seed, step, layer; probes, tasks and losses by seed and step).

    Writes all tables of :data:`MEASURED`, see :mod:`kelib.study_tables`.
    """
    runs = [*study.measure_runs(), *study.entities_runs()]
    study.run(runs, "measure")
    tables = {**entropy_tables(study), "checkpoints": checkpoints_table(study)}
    tables["entities"] = entities_table(study)
    vectors = {"entropy": save_coefficients(study)}
    made = {"checkpoints": "evaluate", "entities": "entities"}
    for name in MEASURED:
        of_it = [run for run in runs if run.kind == made.get(name, "entropy")]
        of_name = vectors.get(name, [])
        tables[name] = _write(study, name, tables[name], ["pretraining"], of_it, of_name)
    return tables["entropy"], tables["checkpoints"]


def continual(study: Study) -> pd.DataFrame:
    """Stage 3: continual learning from every stage, rate and seed, with and without injection.

    Learning curves and variants of the protocol, where the profile asks for them, are tables of
    their own.
    """
    entropy = table(study, "entropy")
    grid = study.continual_grid(entropy)
    runs = [run for _, run in grid]
    study.run(runs, "continual learning")
    curves = curves_table(grid)
    if not curves.empty:
        _write(study, "curves", curves, ["entropy"], [r for r in runs if r.settings["curve"]])
    checkpoints, inputs = table(study, "checkpoints"), ["entropy", "checkpoints"]
    tables = {}
    for name, wanted in (("variants", False), ("continual", True)):
        part = [(variant, run) for variant, run in grid if (variant == PROTOCOL) == wanted]
        if part:
            rows = continual_table(study, part, checkpoints, entropy)
            tables[name] = _write(study, name, rows, inputs, [run for _, run in part])
    return tables["continual"]


def intervene(study: Study) -> pd.DataFrame:
    """Stage 4: resuscitation of the last stage, then continual learning. Originals stand in the
    same table. Other interventions, where the profile has some, are a table of their own (arms).
    """
    grid, arms = study.intervention_grid(), study.arms_grid()
    runs = [*study.intervene_runs(), *(run for _, run in [*grid, *arms])]
    study.run(runs, "interventions")
    entropy, checkpoints = table(study, "entropy"), table(study, "checkpoints")
    inputs = ["entropy", "checkpoints", "continual"]
    if arms:
        rows = continual_table(study, arms, checkpoints, entropy)
        _write(study, "arms", rows, inputs, [run for _, run in arms])
    resuscitated = continual_table(study, grid, checkpoints, entropy)
    originals = table(study, "continual")
    last = originals["stage_step"] == study.profile.pretraining.steps
    rates = originals["learning_rate"].isin(study.profile.interventions.learning_rates)
    rows = pd.concat([originals[last & rates & originals["injected"]], resuscitated])
    return _write(study, "interventions", rows, inputs, [run for _, run in grid])


def look(study: Study) -> None:
    """All runs of stage 6 at once: the workers start once, and :func:`mechanism`, :func:`retain`
    and :func:`reactivate` have nothing left to run.
    """
    study.run(looks(study, table(study, "entropy")), "looking into weights")


def mechanism(study: Study) -> dict[str, pd.DataFrame]:
    """Stage 6: where gradients, updates and new facts go at every stage, see
    :mod:`kelib.mechanism`; the tables of :data:`MECHANISM` by name.

    Reads the weights that stage 3 kept. Raises KelibError for a profile without that section.
    """
    _require_section(study, "mechanism", "continual", "measure gradients and updates")
    entropy = table(study, "entropy")
    runs = mechanism_runs(study, entropy)
    study.run(runs, "mechanism")
    labels = {seed: study.stages(entropy, seed) for seed in study.profile.seeds}
    parts: dict[str, list[pd.DataFrame]] = {name: [] for name in MECHANISM}
    for run in runs:
        s = run.settings
        label = next(name for name, step in labels[s["seed"]].items() if step == s["step"])
        head = {"seed": s["seed"], "stage_step": s["step"], "stage_label": label}
        head["learning_rate"] = s["learning_rate"]
        for name, of_name in parts.items():
            rows = run.read_table(f"{name}.csv")
            if name == "shares":  # by layer it would be the largest table by far
                rows = over_layers(rows)
            of_name.append(rows.assign(**head)[[*head, *rows.columns]])
    return {
        name: _write(study, name, pd.concat(of_name, ignore_index=True), ["entropy"], runs)
        for name, of_name in parts.items()
    }


def branches(study: Study) -> dict[str, pd.DataFrame]:
    """Stage 7: other ways on from a checkpoint of pretraining, see :mod:`kelib.branches`; what they
    know, their entropy, and continual learning from their ends. The tables of :data:`BRANCHES`.

    Reads the tables of stage 2. Raises KelibError for a profile without that section.
    """
    _require_section(study, "branches", "continual", "leave pretraining on another way")
    grid = branch_grid(study)
    runs = {
        "branches": [run for _, run in branch_runs(study)],
        "branch_entropy": branch_measure_runs(study),
        "branch_learning": [run for _, run in grid],
    }
    study.run([run for of_table in runs.values() for run in of_table], "branches")
    inputs = ["entropy", "checkpoints", "panel"]
    entropy, checkpoints, panel = (table(study, name) for name in inputs)
    layers = branch_entropy_table(study, entropy)
    known = branch_table(study, checkpoints, layers, panel)
    learned = branch_learning_table(study, grid, known)
    return {
        name: _write(study, name, rows, inputs, runs[name])
        for name, rows in zip(BRANCHES, (known, layers, learned), strict=True)
    }


def regimes(study: Study) -> dict[str, pd.DataFrame]:
    """Stage 9: pretraining by other recipes from the first step, see :mod:`kelib.regimes`; what
    is known at every checkpoint, and continual learning from every stage. The tables of
    :data:`kelib.figure_stages.REGIMES`.

    Rests on no other stage; what stage 1 pretrained is not pretrained again. Raises KelibError for
    a profile without that section.
    """
    grid = regime_grid(study)
    require_space(study)
    study.run(regime_runs(study), "regimes")
    measured = [run for at in regime_places(study) for run in (at.entropy, at.evaluated)]
    known = _write(study, "regimes", regimes_table(study), [], measured)
    rows, runs = regime_learning_table(study, known), [run for _, run in grid]
    learned = _write(study, "regime_learning", rows, [], runs)
    return {"regimes": known, "regime_learning": learned}


def retain(study: Study) -> pd.DataFrame:
    """Stage 6: what is left of new knowledge after as much training on other text, see
    :mod:`kelib.retention`; the table retention of :func:`kelib.beyond_tables.retention_table`.

    Reads the weights that stages 3 and 4 kept. Raises KelibError for a profile without that
    section.
    """
    _require_section(study, "retention", "continual", "train on other text afterwards")
    entropy = table(study, "entropy")
    runs = retention_runs(study, entropy)
    study.run(runs, "retention")
    rows = retention_table(study, runs, table(study, "checkpoints"), entropy)
    return _write(study, "retention", rows, ["entropy", "checkpoints"], runs)


def reactivate(study: Study) -> pd.DataFrame:
    """Stage 6: what becomes of the memories that resuscitation wakes, see
    :mod:`kelib.reactivation`; the table reactivation, in long form.

    Reads the weights that stages 3 and 4 kept. Raises KelibError for a profile without that
    section.
    """
    _require_section(study, "reactivation", "interventions", "look into woken memories")
    entropy = table(study, "entropy")
    runs = reactivation_runs(study)
    study.run(runs, "reactivation")
    rows = reactivation_table(study, runs, entropy)
    return _write(study, "reactivation", rows, ["entropy"], runs)


def _require_section(study: Study, name: str, of: str, purpose: str) -> None:
    if getattr(study.profile, name) is None:
        raise KelibError(
            f"profile {study.profile.profile!r} has no section {name}: add it, with "
            f"learning_rates among those of {of}, to {purpose}"
        )


def until(study: Study, stage: int) -> None:
    """Do stages 1 to ``stage`` (for notebooks opened on their own in a scratch folder)."""
    for do in (pretrain, measure, continual, intervene)[:stage]:
        do(study)

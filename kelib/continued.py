"""Continual learning from published checkpoints: grid of runs and tables. No torch.

For every stage of the section ``learning`` of a trajectory profile there is a run ``known``, what
the checkpoint knows, and for each rate, seed, with passages and without, a run ``continued``, what
it knows after continual learning (see :mod:`kelib.continued_jobs`). They share the checkpoint with
the entropies of the same revision, which lies on the disk while any of them wants it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from kelib.continued_intervals import item_intervals
from kelib.continued_profile import GENERATED_ENTRIES, NOT_OF_A_RUN, Learning, protocol_values
from kelib.errors import KelibError
from kelib.fictional import HUB_ID, HUB_PLACE
from kelib.hub_sources import pinned, text_runs
from kelib.items import gain_interval
from kelib.metrics import forgetting_over_chance
from kelib.own_model import with_places
from kelib.revisions import Revision
from kelib.run import Run, provenance_of_runs
from kelib.study_tables import learning_table
from kelib.tables import read_table, write_atomically, write_table
from kelib.task_files import PUBLIC_TASKS

if TYPE_CHECKING:
    from kelib.trajectory import Trajectory

TABLES = ("known", "continual")
SEED = 0  # a published model is one pretraining run


def learning_of(study: Trajectory) -> Learning:
    """The section of the profile, which must be there."""
    learning = study.profile.learning
    assert learning is not None
    return learning


def text_run(study: Trajectory) -> Run:
    """The text, packed with the tokenizer of the first stage."""
    learning, first = learning_of(study), study.learning_revisions[0]
    places, states = with_places([learning.text])
    settings: dict[str, Any] = {
        "text": places[learning.text],
        "sequence_length": learning.sequence_length,
        "sequences": learning.packed,
        "heldout_sequences": learning.heldout_sequences,
    }
    if states:  # a file of the reader's may change
        settings["state"] = states[learning.text]
    place, inputs, files = study.place_of(first)
    inputs |= text_runs([learning.text], study.data)
    files = {"sources": study.data / "sources", **files}
    files.pop("cache", None)  # the tokenizer alone is fetched, by transformers
    home = study.data / "sources" / "learning"
    return Run("learning_text", home, settings | place, inputs, files)


def known_run(study: Trajectory, revision: Revision) -> Run:
    """What a checkpoint knows."""
    return _run(study, revision, "known", {})


def continued_runs(study: Trajectory, revision: Revision) -> list[Run]:
    """Continual learning from a checkpoint: each rate and seed, injected and, with ``control``,
    not.
    """
    learning = learning_of(study)
    shown = (True, False) if learning.control else (True,)
    return [
        _run(
            study,
            revision,
            "continued",
            {
                "protocol": protocol_values(learning),
                "learning_rate": rate,
                "cl_seed": seed,
                "injected": injected,
            },
        )
        for rate in learning.learning_rates
        for seed in learning.seeds
        for injected in shown
    ]


def learning_runs(study: Trajectory, revision: Revision) -> list[Run]:
    """All of one stage."""
    return [known_run(study, revision), *continued_runs(study, revision)]


def refuse_missing(learning: Learning) -> None:
    """Raise KelibError if entries are named that can be nowhere, before anything is computed."""
    named = learning.entries
    on_hub = HUB_PLACE.fullmatch(named) is not None
    if named != GENERATED_ENTRIES and learning.entries_path is None and not on_hub:
        raise KelibError(
            f"learning.entries: there is no file or folder {named}; bring the data there, or give "
            f"'{GENERATED_ENTRIES}' or the id of a data set on the hub, such as {HUB_ID}"
        )


def write_launch(study: Trajectory) -> None:
    """How runs share the work out, beside them: it is no part of what names them."""
    learning = learning_of(study)
    launch = {name: getattr(learning, name) for name in NOT_OF_A_RUN}
    write_atomically(study.measurements / "launch.json", json.dumps(launch, indent=1) + "\n")


def _run(study: Trajectory, revision: Revision, kind: str, more: Mapping[str, Any]) -> Run:
    learning = learning_of(study)
    place, inputs, files = study.place_of(revision)
    entries, task_commits = _pins(learning)
    settings = {
        "seed": study.profile.seed,
        "step": revision.step,
        "entries": entries,
        "paraphrase_entries": learning.paraphrase_entries,
        "tasks": list(learning.tasks),
        "task_commits": task_commits,
        "task_limit": learning.task_limit,
        "score_batch": learning.score_batch,
        **learning.content(),
        **place,
        **more,
    }
    inputs["text"] = text_run(study)
    files = {"sources": study.data / "sources", **files}
    named = {"entries": learning.entries_path, "tasks": learning.task_folder}
    files |= {name: path.resolve() for name, path in named.items() if path is not None}
    if kind == "continued":
        files["launch"] = study.measurements / "launch.json"
    return Run(kind, study.measurements / kind, settings, inputs, files)


def hub_data_sets(learning: Learning) -> dict[str, str]:
    """Data sets of the hub that entries and public tasks come from, by their name in the lock file:
    ``entries ID`` and ``task NAME``. None for what lies in a folder or names its commit.
    """
    found = {}
    on_hub = None if learning.entries_path else HUB_PLACE.fullmatch(learning.entries)
    if on_hub is not None and on_hub["commit"] is None:
        found[f"entries {learning.entries}"] = learning.entries
    if learning.task_folder is None:
        public = [name for name in learning.tasks if name in PUBLIC_TASKS]
        found |= {f"task {name}": PUBLIC_TASKS[name].repo for name in public}
    return found


def _pins(learning: Learning) -> tuple[str, dict[str, str]]:
    """Where entries come from, with its commit on the hub, and commits of public tasks by name."""
    commits = {name: pinned(name, repo) for name, repo in hub_data_sets(learning).items()}
    entries = commits.pop(f"entries {learning.entries}", None)
    place = learning.entries if entries is None else f"{learning.entries}@{entries}"
    return place, {name.removeprefix("task "): commit for name, commit in commits.items()}


# --- tables -------------------------------------------------------------------------------------


def write_tables(study: Trajectory, totals: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Write the tables of :data:`TABLES` from the finished runs, and return them."""
    known = known_table(study, totals)
    parts = {"known": known, "continual": continual_table(study, known)}
    runs = [run for one in study.learning_revisions for run in learning_runs(study, one)]
    inputs = {f"{run.kind} {run.digest}": run.digest for run in runs}
    note = provenance_of_runs(study.profile.parameters, [SEED], inputs, runs)
    tables = {}
    for name, part in parts.items():
        path = study.measurements / f"{name}.csv"
        write_table(part, path, note)
        tables[name] = read_table(path)
    return tables


def known_table(study: Trajectory, totals: pd.DataFrame) -> pd.DataFrame:
    """A row for each stage: revision, step, tokens_seen, stage_label, all that the run found, and
    entropy, its entropy_error (knowledge entropy of the first definition on the first text, nats).
    """
    profile = study.profile
    chosen = totals[totals["kind"] == "knowledge"]
    chosen = chosen[chosen["coefficient"] == profile.definitions[0]]
    chosen = chosen[chosen["data"] == profile.data[0]].set_index("revision")
    rows = []
    for revision in study.learning_revisions:
        tokens = study.tokens_seen(revision)
        row: dict[str, Any] = {
            "revision": revision.name,
            "step": revision.step,
            "tokens_seen": tokens,
        }
        row["stage_label"] = revision.name if np.isnan(tokens) else f"{tokens / 1e9:.3g}B tokens"
        row |= known_run(study, revision).read()
        row["entropy"] = chosen.loc[revision.name, "entropy_nats"]
        row["entropy_error"] = chosen.loc[revision.name, "standard_error"]
        rows.append(row)
    return pd.DataFrame(rows).drop(columns="device")


def continual_table(study: Trajectory, known: pd.DataFrame) -> pd.DataFrame:
    """A row for each run, with the columns of :func:`kelib.study_tables.continual_table` that have
    a meaning here: settings, before (``_pt``), after (``_cl``), A and F.

    ``seed`` is that of pretraining and always 0. ``chance`` is the mean over tasks. ``_low`` and
    ``_high`` bound K, A, P and F over the entries and questions of that one run, see
    :func:`kelib.continued_intervals.item_intervals`; and k_gain and p_change, the differences.
    ``k_injection`` is K_CL minus that of the same run without passages, NaN where there is none.
    """
    before: Any = known.set_index("revision")  # rows have no types of their own
    rows = []
    for revision in study.learning_revisions:
        first, start = known_run(study, revision), before.loc[revision.name]
        runs = {_of(run): run for run in continued_runs(study, revision)}
        for (rate, seed, injected), run in runs.items():
            control = runs.get((rate, seed, False)) if injected else None
            rows.append(_row(run, first, start) | _injection(run, control))
    table = learning_table(rows)
    shares = forgetting_over_chance(table["p_pt"], table["p_cl"], table["chance"])
    return table.assign(forgetting_over_chance=shares).drop(columns=["ratio", "factor"])


def _of(run: Run) -> tuple[float, int, bool]:
    s = run.settings
    return s["learning_rate"], s["cl_seed"], s["injected"]


def _injection(run: Run, control: Run | None) -> dict[str, float]:
    names = ("k_injection", "k_injection_low", "k_injection_high")
    if control is None:
        return dict.fromkeys(names, np.nan)
    without, shown = (one.read_table("probes.csv") for one in (control, run))
    found = gain_interval(without, shown)
    return dict(zip(names, (found.mean, found.low, found.high), strict=True))


def _row(run: Run, first: Run, start: Mapping[str, Any]) -> dict[str, Any]:
    s, after = run.settings, run.read()
    losses = after.pop("losses")
    for name in ("device", "processes", "bytes", "parameters", "chance"):
        after.pop(name)
    row = {
        "seed": SEED,
        "stage_step": s["step"],
        "stage_label": start["stage_label"],
        "variant": "protocol",
        "learning_rate": s["learning_rate"],
        "cl_seed": s["cl_seed"],
        "injected": s["injected"],
        "intervention": "none",
        "ratio": np.nan,
        "factor": np.nan,
        "chance": start["chance"],
        "tokens_per_parameter": start["tokens_seen"] / start["parameters"],
        "entropy_pt": start["entropy"],
        "train_loss_first": losses[0],
        "train_loss_last": losses[-1],
    }
    row |= {f"{name}_pt": start[name] for name in after}
    row |= {f"{name}_cl": value for name, value in after.items()}
    items = [[one.read_table(f"{n}.csv") for one in (first, run)] for n in ("probes", "questions")]
    return row | item_intervals(*items[0], *items[1])

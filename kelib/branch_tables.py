"""From finished branches of pretraining to tidy tables. No model is loaded here.

In all of them the rows of a branch begin with the checkpoint of the trunk that it left from, and
``step`` counts as the trunk does.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd

from kelib.beyond import branch_runs, steps_of
from kelib.config import PROTOCOL, Branch
from kelib.run import Run
from kelib.study import Study
from kelib.study_tables import learning_row, learning_table

WHICH = ["seed", "branch", "step"]
NORMS = ["value_norm", "key_norm"]  # of the plasticity panel: weight decay moves these first


def knowledge_rows(run: Run) -> pd.DataFrame:
    """Of the entropies that a run measured, the study's own: knowledge entropy on the mixture."""
    wanted = {"data": "mixture", "kind": "knowledge", "coefficient": "absolute"}
    rows = run.read_table("entropies.csv")
    return rows[(rows[list(wanted)] == list(wanted.values())).all(axis=1)]


def branch_entropy_table(study: Study, entropy: pd.DataFrame) -> pd.DataFrame:
    """Knowledge entropy by seed, branch, step and layer (nats, with its bound).

    ``entropy`` is the trunk's table.
    """
    columns = ["layer", "entropy_nats", "bound_nats"]
    parts = []
    for branch, run in branch_runs(study):
        seed, start = run.settings["seed"], run.settings["step"]
        of_start = entropy[(entropy["seed"] == seed) & (entropy["step"] == start)]
        found = {start: of_start}
        for step in steps_of(run):
            found[step] = knowledge_rows(study.entropy_run(seed, step, branch=run))
        for step, rows in found.items():
            place = {"seed": seed, "branch": branch.name, "step": step}
            parts.append(rows[columns].assign(**place)[[*place, *columns]])
    return pd.concat(parts, ignore_index=True)


def branch_table(
    study: Study, checkpoints: pd.DataFrame, layers: pd.DataFrame, panel: pd.DataFrame
) -> pd.DataFrame:
    """Knowledge, accuracy, losses, entropy and norms by seed, branch and step.

    ``start_step, end_step, weight_decay, annealed`` describe the branch; ``learning_rate`` is that
    of the last step before the checkpoint, ``entropy`` (nats) the sum over layers of ``layers``,
    from :func:`branch_entropy_table`, and ``value_norm`` and ``key_norm`` are Frobenius norms of V
    and of the up projection, means over layers. ``checkpoints`` and ``panel`` are the trunk's.
    """
    p = study.profile
    per_step = p.pretraining.batch_size * p.corpus.sequence_length
    totals = layers.groupby(WHICH)["entropy_nats"].sum()
    trunk = checkpoints.set_index(["seed", "step"])
    own = panel[panel["model"] == study.models[0]].groupby(["seed", "step"])[NORMS].mean()
    rows = []
    for branch, run in branch_runs(study):
        s, rates = run.settings, run.read()["rates"]
        about = {name: s[name] for name in ("weight_decay", "annealed")}
        for step in (s["step"], *steps_of(run)):
            place = (s["seed"], branch.name, step)
            row: dict[str, Any] = dict(zip(WHICH, place, strict=True))
            row |= {"start_step": s["step"], "end_step": s["end"], **about}
            row["learning_rate"] = rates[str(step)]
            tokens = {"share": step / p.pretraining.steps, "tokens": step * per_step}
            if step == s["step"]:
                known = {**trunk.loc[(s["seed"], step)], **own.loc[(s["seed"], step)]}
            else:
                known = study.evaluate_run(s["seed"], step, branch=run).read()
                norms = study.entropy_run(s["seed"], step, branch=run).read_table("panel.csv")
                known |= norms[NORMS].mean().to_dict()
                tokens["tokens_per_parameter"] = tokens["tokens"] / known["parameters"]
            rows.append({**row, **known, **tokens, "entropy": totals[place]})
    return pd.DataFrame(rows)


def branch_learning_table(
    study: Study, grid: Iterable[tuple[Branch, Run]], known: pd.DataFrame
) -> pd.DataFrame:
    """Continual learning from the end of every branch: the columns of
    :func:`kelib.study_tables.continual_table` behind ``branch`` and ``start_step``.

    ``known`` is from :func:`branch_table`. ``stage_step`` is the checkpoint continued from,
    ``stage_label`` the share of pretraining where the branch began.
    """
    before: Any = known.set_index(WHICH, drop=False).to_dict("index")
    rows = []
    for branch, run in grid:
        seed, end = run.settings["seed"], run.settings["step"]
        made = run.inputs["pretrain"]
        start = before[(seed, branch.name, end)]
        evaluated = study.evaluate_run(seed, end, branch=made)
        rows.append(learning_row(run, start, evaluated, f"{branch.start:.0%}", branch.name))
        rows[-1]["start_step"] = made.settings["step"]
    table = learning_table(rows)
    table.insert(0, "branch", table.pop("variant"))
    table.insert(1, "start_step", table.pop("start_step"))
    table.insert(5, "variant", PROTOCOL)
    return table

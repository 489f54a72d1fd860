"""From finished runs beyond the protocol to tidy tables. No model is loaded here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from kelib.errors import KelibError
from kelib.run import Run
from kelib.study import Study

SMALLEST_GAIN = 0.05  # nats: less than that acquired is too little to ask what is left of it


def retention(k_before: Any, k_after: Any, k_later: Any, smallest: float = SMALLEST_GAIN) -> Any:
    """R = (K_later - K_PT) / (K_CL - K_PT), the part of the acquired knowledge that is left.

    Numbers or arrays that broadcast, in nats; an array of floats comes back: 1 where all is left, 0
    back at K_PT, above 1 where K grew further, below 0 where it fell under K_PT. NaN where no more
    than ``smallest`` nats were acquired, as the ratio would be that of two noises: look at the
    differences there. Raises KelibError for NaN or infinity and for ``smallest`` below 0.
    """
    arrays = [np.asarray(values, dtype=float) for values in (k_before, k_after, k_later)]
    if not all(np.isfinite(values).all() for values in arrays):
        raise KelibError("K holds NaN or infinity: repair or remove those runs")
    if not smallest >= 0:
        raise KelibError(f"smallest = {smallest} must be at least 0 nats, as {SMALLEST_GAIN}")
    before, after, later = np.broadcast_arrays(*arrays)
    gain, left = after - before, later - before
    defined = gain > smallest
    return np.divide(left, gain, out=np.full(gain.shape, np.nan), where=defined)


def retention_table(
    study: Study, runs: Iterable[Run], checkpoints: pd.DataFrame, entropy: pd.DataFrame
) -> pd.DataFrame:
    """One row for each run of kind ``later``: the checkpoint as pretrained (``_pt``, also after an
    intervention), after continual learning (``_cl``) and after the other text (``_later``).

    K and its parts in nats per target token, P as fractions, losses in nats per token, entropy in
    nats. gained = K_CL - K_PT, left = K_later - K_PT, lost = K_CL - K_later, retention = left /
    gained, NaN where gained is not above 0.05 nats, see :func:`retention`.
    """
    before = checkpoints.set_index(["seed", "step"])
    totals = entropy.groupby(["seed", "step"])["entropy_nats"].sum()
    rows = []
    for run in runs:
        place = (run.settings["seed"], run.settings["step"])
        learned, later = run.inputs["continual"].read(), run.read()
        start = {**before.loc[place], "entropy": totals[place]}
        row = _head(study, run, entropy)
        for name in (name for name in later if name != "losses"):
            values = {"pt": start[name], "cl": learned[name], "later": later[name]}
            row |= {f"{name}_{when}": value for when, value in values.items()}
        rows.append(row)
    table = pd.DataFrame(rows)
    k_pt, k_cl, k_later = (table[f"k_{when}"] for when in ("pt", "cl", "later"))
    table["gained"], table["left"], table["lost"] = k_cl - k_pt, k_later - k_pt, k_cl - k_later
    table["retention"] = retention(k_pt, k_cl, k_later)
    keys = ["seed", "stage_step", "learning_rate", "intervention", "ratio", "factor", "cl_seed"]
    return table.sort_values(keys, ignore_index=True)


def reactivation_table(study: Study, runs: Iterable[Run], entropy: pd.DataFrame) -> pd.DataFrame:
    """The tables of all runs of kind ``reactivation``, in long form: the run, then measure, when,
    of, layer (-1: all), draw (-1: none) and value.

    ratio is that of the woken memories, which the original has, too; its factor is NaN.
    """
    parts = []
    for run in runs:
        rows = run.read_table("reactivation.csv")
        head = _head(study, run, entropy)
        names = [name for name in head if name not in ("ratio", "factor")]
        found = rows.assign(**head | {"ratio": rows["ratio"]})
        own = [name for name in rows.columns if name != "ratio"]
        parts.append(found[[*names, "ratio", "factor", *own]])
    return pd.concat(parts, ignore_index=True)


def over_layers(shares: pd.DataFrame) -> pd.DataFrame:
    """Tables of :func:`kelib.attribution.share_table` with batches, without their layers: value is
    the mean over layers, total the sum; rows in the order of their first layer.
    """
    keys = ["batch", "quantity", "part", "ranked_by", "share"]
    pooled = shares.groupby(keys, sort=False).agg(value=("value", "mean"), total=("total", "sum"))
    return pooled.reset_index()


def _head(study: Study, run: Run, entropy: pd.DataFrame) -> dict[str, Any]:
    settings, learned = run.settings, run.inputs["continual"].settings
    stages = study.stages(entropy, settings["seed"])
    change = learned["intervention"] or {"name": "none"}
    return {
        "seed": settings["seed"],
        "stage_step": settings["step"],
        "stage_label": next(n for n, step in stages.items() if step == settings["step"]),
        "learning_rate": settings["learning_rate"],
        "cl_seed": settings["cl_seed"],
        "intervention": change["name"],
        "ratio": change.get("ratio", np.nan),
        "factor": change.get("factor", np.nan),
    }

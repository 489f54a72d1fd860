"""How closely entropy goes with what continual learning does, and what else goes with that.

The paper correlates entropy with A and F over the checkpoints of one run. There everything that
changes with training time goes with everything else that does. Two questions are asked here:
whether step, learning rate and loss do as well inside a run, and whether entropy does anything at
a fixed stage, across pretraining seeds, where step and learning rate do not vary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import special

from kelib.config import Pretraining
from kelib.errors import KelibError, listing
from kelib.metrics import check_table, correlations

PREDICTORS = {
    "entropy": "knowledge entropy",
    "step": "step",
    "rate": "learning rate there",
    "loss": "loss (general text)",
}
OUTCOMES = {
    "acquisition": "A",
    "forgetting_over_chance": "F over chance",
    "k_cl": "K_CL",
    "p_cl": "P_CL",
}
CELL = ["seed", "step"]
CLOSEST = 0.999999  # a correlation of 1 has no finite z


def stage_cells(runs: pd.DataFrame, plan: Pretraining) -> pd.DataFrame:
    """One row per pretraining seed and stage: predictors at the checkpoint and outcomes after CL.

    ``runs`` holds injected runs of one CL rate (columns as continual.csv); CL seeds are averaged.
    entropy in nats over all layers, rate is that of the pretraining step that made the checkpoint,
    loss in nats per token. Raises KelibError for runs of several rates.
    """
    if (rates := set(runs["learning_rate"])) and len(rates) > 1:
        raise KelibError(f"runs of CL rates {listing(rates)} are mixed: take one")
    names = {"stage_step": "step", "entropy_pt": "entropy", "loss_general_pt": "loss"}
    table = runs.rename(columns=names)
    cells = table.groupby(CELL, as_index=False)[["entropy", "loss", *OUTCOMES]].mean()
    steps = cells["step"].to_numpy()
    return cells.assign(rate=[plan.rate_at(max(int(step) - 1, 0)) for step in steps])


def defined_outcomes(cells: pd.DataFrame) -> list[str]:
    """Outcomes that every cell has: F over chance is none where nothing was known."""
    return [name for name in OUTCOMES if cells[name].notna().all()]


def within_runs(cells: pd.DataFrame) -> pd.DataFrame:
    """Pearson correlations over the stages of each seed: seed, x, y, n, pearson, for the outcomes
    that every cell has.

    Descriptive: a few stages of one run are no independent sample. NaN below three stages.
    """
    parts = [
        correlations(part, list(PREDICTORS), defined_outcomes(cells)).assign(seed=seed)
        for seed, part in cells.groupby("seed")
    ]
    return pd.concat(parts)[["seed", "x", "y", "n", "pearson"]].reset_index(drop=True)


def over_runs(within: pd.DataFrame) -> pd.DataFrame:
    """The correlations inside runs, averaged over seeds on Fisher's z scale, with a 95 % t interval
    over seeds: x, y, n (seeds), r, low, high. NaN bounds for one seed.
    """
    rows = []
    place: Any  # keys of groups have no types of their own
    for place, part in within.groupby(["x", "y"], sort=False):
        z = np.arctanh(part["pearson"].to_numpy().clip(-CLOSEST, CLOSEST))
        rows.append((*place, len(z), *_back(z.mean(), _spread(z), len(z) - 1)))
    return pd.DataFrame(rows, columns=["x", "y", "n", "r", "low", "high"])


def at_fixed_stage(cells: pd.DataFrame, x: str, y: str, given: Sequence[str] = ()) -> dict:
    """Correlation of ``x`` and ``y`` after the mean of every stage is taken from both, hence at a
    fixed step and learning rate; ``given`` names further columns to hold fixed (partial).

    The interval is a jackknife over seeds on Fisher's z scale, 95 %, n - 1 degrees of freedom.
    Keys x, y, given, n (seeds), r, low, high, note. ``r`` is NaN with the note "not identifiable"
    where ``x`` does not vary at a fixed stage, or the columns in ``given`` leave nothing of it.
    Raises KelibError for NaN.
    """
    check_table(cells, [x, y, *given], ["seed", "step"], "cells")
    seeds = cells["seed"].unique()
    found = {"x": x, "y": y, "given": ", ".join(given), "n": len(seeds)}
    nothing = {"r": np.nan, "low": np.nan, "high": np.nan}
    whole = _partial(cells, x, y, given)
    if np.isnan(whole):
        return {**found, **nothing, "note": "not identifiable"}
    left_out = np.array([_partial(cells[cells["seed"] != s], x, y, given) for s in seeds])
    if len(seeds) < 3 or np.isnan(left_out).any():
        return {**found, **nothing, "r": whole, "note": "too few seeds for an interval"}
    n, (z, zs) = len(seeds), (np.arctanh(np.clip(v, -CLOSEST, CLOSEST)) for v in (whole, left_out))
    error = np.sqrt((n - 1) / n * ((zs - zs.mean()) ** 2).sum())
    r, low, high = _back(float(z), float(error), n - 1)
    return {**found, "r": r, "low": low, "high": high, "note": ""}


def _partial(cells: pd.DataFrame, x: str, y: str, given: Sequence[str]) -> float:
    columns = [x, y, *given]
    table = cells[columns]
    apart = (table - cells.groupby("step")[columns].transform("mean")).to_numpy(float)
    size = apart.std(axis=0)
    if (size <= 1e-9 * np.abs(table.to_numpy(float)).max(axis=0)).any():  # rounding is no variation
        return float("nan")
    apart = apart / size
    pair, held = apart[:, :2], apart[:, 2:]
    # what is left of the rows after a mean for each stage and a slope for each column held fixed
    freedom = len(cells) - cells["step"].nunique() - held.shape[1]
    if freedom < 2 or np.linalg.matrix_rank(np.delete(apart, 1, axis=1)) <= held.shape[1]:
        return float("nan")
    if held.size:
        pair = pair - held @ np.linalg.lstsq(held, pair, rcond=None)[0]
    return float(np.corrcoef(pair[:, 0], pair[:, 1])[0, 1])


def _spread(z: np.ndarray) -> float:
    return float(z.std(ddof=1) / np.sqrt(len(z))) if len(z) > 1 else float("nan")


def _back(z: float, error: float, freedom: int) -> tuple[float, float, float]:
    half = float(special.stdtrit(freedom, 0.975)) * error if freedom > 0 else float("nan")
    return float(np.tanh(z)), float(np.tanh(z - half)), float(np.tanh(z + half))


def given_step_and_more(cells: pd.DataFrame) -> str:
    """Whether the correlation inside one run could be cleared of step, learning rate and loss: it
    takes more stages than columns held fixed, the constant and the two that are correlated.
    """
    stages, fixed = cells.groupby("seed")["step"].nunique().max(), len(PREDICTORS) - 1
    if stages - 1 - fixed < 2:
        return f"not identifiable: {stages} stages, {fixed} columns to hold fixed and a constant"
    return "identifiable"

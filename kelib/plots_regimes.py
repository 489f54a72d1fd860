"""Figures of regimes, which are recipes of pretraining from the first step: the tables that they
need. They are drawn with the axes of :mod:`kelib.plots_branches` and :mod:`kelib.plots_learning`.

Pretraining seeds are the unit throughout.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from kelib.config import Pretraining
from kelib.metrics import with_gain
from kelib.plots_branches import at_matched_loss, slopes
from kelib.recipes import SAVED, TRUNK

MARGIN = 0.15  # a fraction; below it the claims on accuracy are not testable either (claims.yaml)


def regime_names(known: pd.DataFrame, plan: Pretraining) -> dict[str, str]:
    """Regimes in the order of the table ``regimes``, with names for a legend: the trunk is called
    by its weight decay."""
    trunk = f"weight decay {plan.optimizer.weight_decay:g} (trunk)"
    return {name: trunk if name == TRUNK else name for name in known["regime"].unique()}


def with_gains(learned: pd.DataFrame) -> pd.DataFrame:
    """Injected runs of the table ``regime_learning`` with ``k_gain`` = K_CL - K_PT and
    ``k_injected`` = K_CL minus that of the same run without passages (nats per target token).

    Forgetting over chance is left out (NaN) where P_PT lies less than :data:`MARGIN` above chance:
    it would be a ratio of next to nothing.
    """
    runs = learned[learned["injected"].astype(bool)]
    known = runs["p_pt"] - runs["chance"] >= MARGIN
    runs = runs.assign(forgetting_over_chance=runs["forgetting_over_chance"].where(known))
    return with_gain(runs).assign(k_injected=runs["k_cl"] - runs["k_cl_none"])


def cooled_arms(
    runs: pd.DataFrame, names: Mapping[str, str]
) -> tuple[pd.DataFrame, dict[str, str], dict[str, str]]:
    """The trunk, and regimes that were cooled down, as saved and cooled.

    Returned are the runs of these with a column ``line``; lines with names for a legend, of which
    those as saved have that of the regime in ``names``; and cooled line -> the line as saved.
    """
    cooled = set(runs.loc[runs["arm"] != SAVED, "regime"])
    part = runs[runs["regime"].isin({TRUNK, *cooled})]
    part = part.assign(line=part["regime"] + ", " + part["arm"])
    lines, saved_of = {}, {}
    for name in names:
        for regime, arm, line in part[["regime", "arm", "line"]].drop_duplicates().to_numpy():
            if regime == name:
                lines[line] = names[name] if arm == SAVED else f"{names[name]}, {arm}"
                if arm != SAVED:
                    saved_of[line] = f"{regime}, {SAVED}"
    return part, lines, saved_of


def regime_slopes(
    runs: pd.DataFrame, value: str, names: Mapping[str, str]
) -> dict[str, pd.DataFrame]:
    """Slopes of ``value`` on knowledge entropy within each seed (:func:`plots_branches.slopes`), by
    name: over the stages of each regime, then over the regimes at each stage. Checkpoints as saved.
    """
    saved = runs[runs["arm"] == SAVED]
    found = {}
    for regime, name in names.items():
        part = saved[saved["regime"] == regime].drop(columns="arm")
        found[f"stages: {name}"] = slopes(part, value)
    for _, part in saved.groupby("stage_step"):
        label = part["stage_label"].iloc[0]
        found[f"regimes at {label}"] = slopes(part.assign(arm=part["regime"]), value)
    return found


def matched_in_loss(runs: pd.DataFrame, value: str) -> pd.DataFrame:
    """``value`` of every other regime and stage minus that of the trunk where its held-out loss was
    the same, between its stages (:func:`plots_branches.at_matched_loss`); with ``stage_label``.
    Checkpoints as saved."""
    saved = runs[runs["arm"] == SAVED]
    trunk = saved[saved["regime"] == TRUNK]
    others = saved[saved["regime"] != TRUNK]
    parts = [
        at_matched_loss(part.assign(arm=part["regime"]), trunk, value).assign(stage_label=label)
        for label, part in others.groupby("stage_label", sort=False)
    ]
    return pd.concat(parts, ignore_index=True)

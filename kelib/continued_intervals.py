"""How well one run of continual learning was measured: intervals over its entries and questions.

They say what other entries and questions of the same kind would have given for this model. What
another pretraining or another order of the text would have given they do not say.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from kelib.items import entry_gains, question_changes

RESAMPLES, SEED = 2000, 0
CONFIDENCE = 0.95


def item_intervals(
    probes_before: pd.DataFrame,
    probes_after: pd.DataFrame,
    questions_before: pd.DataFrame,
    questions_after: pd.DataFrame,
) -> dict[str, float]:
    """95 % bounds, percentile bootstrap: ``<name>_low`` and ``<name>_high`` of

    * k_pt, k_cl (nats per target token), k_gain, their difference, and acquisition
      A = (K_CL - K_PT) / \\|K_PT\\|, over entries;
    * p_pt, p_cl (fractions), p_change, their difference, and forgetting
      F = (P_PT - P_CL) / P_PT, over the questions inside each task: P is the mean over tasks,
      which may have different numbers of them. NaN if a resample answers nothing before.

    The same items are drawn before and after, and for all quantities. Tables are those of
    :class:`kelib.evaluation.Evaluation`. Raises KelibError if the two moments do not hold the same
    probes and questions.
    """
    gains = entry_gains(probes_before, probes_after).sort_index()
    start = _by_entry(probes_before).reindex(gains.index).to_numpy()
    changes = question_changes(questions_before, questions_after)
    asked = questions_before.set_index(["task", "item"])["correct"].reindex(changes.index)
    generator = np.random.default_rng(SEED)
    places = generator.integers(len(gains), size=(RESAMPLES, len(gains)))
    k_pt, k_gain = start[places].mean(axis=1), gains.to_numpy()[places].mean(axis=1)
    p_pt, p_change = np.zeros(RESAMPLES), np.zeros(RESAMPLES)
    tasks = sorted(set(changes.index.get_level_values("task")))
    for task in tasks:
        before, change = asked.loc[task].to_numpy(float), changes.loc[task].to_numpy(float)
        places = generator.integers(len(before), size=(RESAMPLES, len(before)))
        p_pt += before[places].mean(axis=1) / len(tasks)
        p_change += change[places].mean(axis=1) / len(tasks)
    with np.errstate(divide="ignore", invalid="ignore"):
        forgotten = np.where(p_pt > 0, -p_change / p_pt, np.nan)
    found = {
        "k_pt": k_pt,
        "k_cl": k_pt + k_gain,
        "k_gain": k_gain,
        "acquisition": k_gain / np.abs(k_pt),
        "p_pt": p_pt,
        "p_cl": p_pt + p_change,
        "p_change": p_change,
        "forgetting": forgotten,
    }
    tail = (1 - CONFIDENCE) / 2
    bounds: dict[str, float] = {}
    for name, draws in found.items():
        low, high = np.quantile(draws, [tail, 1 - tail])
        bounds |= {f"{name}_low": float(low), f"{name}_high": float(high)}
    return bounds


def _by_entry(probes: pd.DataFrame) -> pd.Series:
    """K (Eq. 4) of every entry, nats per target token."""
    scores = probes["log_probability"] / probes["tokens"]
    return scores.groupby([probes["entry_set"], probes["entry"]]).mean()

"""Figures of continual learning from published checkpoints: table and Axes in, Axes out, on the
axes of :mod:`kelib.plots_learning`.

A published model is one pretraining run, so there is no spread over pretraining seeds to draw:
bars are 95 % intervals over the entries or questions of a run, averaged over the seeds of continual
learning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from kelib.plots import COLOURS
from kelib.plots_learning import against_stage

BEFORE = "before"


def stage_names(known: pd.DataFrame) -> dict[int, str]:
    """Stage step -> label for the axis: the step, and the tokens of training where known."""
    steps, labels = known["step"].astype(int), known["stage_label"]
    tokens = known["tokens_seen"].notna()
    return {
        step: f"{step:,}\n{label}" if told else f"{step:,}"
        for step, label, told in zip(steps, labels, tokens, strict=True)
    }


def rate_names(continual: pd.DataFrame) -> dict[str, str]:
    """Key of a line in :func:`stage_lines` -> its name: every rate, and the checkpoint before."""
    rates = sorted(set(continual["learning_rate"]), reverse=True)
    return {f"{rate:g}": f"CL rate {rate:g}" for rate in rates} | {BEFORE: "before CL"}


def stage_lines(continual: pd.DataFrame, after: str, before: str | None = None) -> pd.DataFrame:
    """Columns seed, stage_step, line, value, low, high of the runs with passages: ``after`` by
    rate, and ``before``, which is the same for all of them, as line :data:`BEFORE`.
    """
    runs = continual[continual["injected"].astype(bool)]
    columns = [(after, runs["learning_rate"].map("{:g}".format))]
    if before is not None:
        columns.append((before, pd.Series(BEFORE, index=runs.index)))
    parts = []
    for name, line in columns:
        values = {"value": runs[name], "low": runs[f"{name}_low"], "high": runs[f"{name}_high"]}
        parts.append(runs[["seed", "stage_step"]].assign(line=line, **values))
    keys = ["seed", "stage_step", "line"]
    return pd.concat(parts).groupby(keys, sort=False).mean().reset_index()


def stage_panel(
    lines: pd.DataFrame,
    ax: Axes,
    names: Mapping[str, str],
    ticks: Mapping[int, str],
    ylabel: str,
    scale: float = 1,
    zero: bool = False,
) -> Axes:
    """A line for each of ``names`` that :func:`stage_lines` gave, against the stage, with its
    intervals; ``zero`` draws a line at 0.
    """
    there = {key: name for key, name in names.items() if (lines["line"] == key).any()}
    against_stage(lines, ax, "value", "line", there, ticks, ylabel, scale, zero=zero)
    steps = sorted(ticks)
    for index, key in enumerate(there):
        part = lines[lines["line"] == key]
        x = [steps.index(s) + 0.07 * (index - (len(there) - 1) / 2) for s in part["stage_step"]]
        bars: dict[str, Any] = {"color": COLOURS[index % 7], "lw": 0.9}
        ax.vlines(x, scale * part["low"], scale * part["high"], label="_items", **bars)
    ends = scale * lines[["value", "low", "high"]].to_numpy(float).ravel()
    ends = np.append(ends, 0.0) if zero else ends
    if (ends := ends[np.isfinite(ends)]).size:
        margin = 0.08 * np.ptp(ends) or 0.5
        ax.set_ylim(ends.min() - margin, ends.max() + margin)
    ax.ticklabel_format(axis="y", useOffset=False)
    ax.set_xlabel("stage (step of pretraining)")
    return ax

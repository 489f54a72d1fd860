"""Quantities along pretraining, seed by seed: changes between stages, correlations, and words.

Pretraining seeds are the unit: a 95 % t interval over them where there are at least two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from kelib.metrics import correlations
from kelib.plots import bounds, summarise

Stages = Mapping[int, Mapping[str, int]]  # seed -> label -> step, as Study.stages gives them


def over_seeds(table: pd.DataFrame, value: str, by: list[str]) -> pd.DataFrame:
    """Mean of ``value`` and 95 % t interval over pretraining seeds (columns as of ``summarise``).

    With one seed the bounds are NaN: it says nothing about others.
    """
    return summarise(table, value, by).assign(unit="pretraining seeds")


def row_words(mean: Any, scale: float = 1, decimals: int = 3, unit: str = "") -> str:
    """A row of :func:`over_seeds` as ``+0.12 nats [-0.10, +0.34]``; the mean alone where there is
    no interval, as of one seed or of ties. A mean that rounds to 0 has no minus.
    """
    text = f"{round(scale * mean['mean'], decimals) + 0.0:+.{decimals}f} {unit}".rstrip()
    if np.isnan(mean["low"]):
        return text
    return f"{text} {bounds(scale * mean['low'], scale * mean['high'], decimals)}"


def mean_words(
    part: pd.DataFrame, value: str, scale: float = 1, decimals: int = 3, unit: str = ""
) -> str:
    """Mean of ``value`` over the seeds of ``part`` with its interval, see :func:`row_words`."""
    return row_words(over_seeds(part.assign(all=0), value, ["all"]).iloc[0], scale, decimals, unit)


def stage_changes(table: pd.DataFrame, value: str, by: list[str], stages: Stages) -> pd.DataFrame:
    """``value`` at the first and at the last stage of each seed and their difference.

    Columns ``by``, seed, first, last, change (last minus first). ``table`` has the columns ``by``,
    seed, step and ``value``, one row each.
    """
    rows = []
    group: Any  # keys of groups have no types of their own
    for group, part in table.groupby([*by, "seed"], observed=True, sort=False):
        steps = stages[group[-1]].values()
        line = part.set_index("step")[value]
        first, last = float(line[min(steps)]), float(line[max(steps)])
        rows.append((*group, first, last, last - first))
    return pd.DataFrame(rows, columns=[*by, "seed", "first", "last", "change"])


def change_words(changes: pd.DataFrame, unit: str, decimals: int = 3, scale: float = 1) -> str:
    """Changes of one quantity (column change, a row a seed) in words, with how many seeds fall."""
    change = changes["change"] * scale
    summary = over_seeds(changes.assign(change=change, all=0), "change", ["all"]).iloc[0]
    words = f"falls in {(change < 0).sum()} of {len(change)} seed(s), mean change "
    words += f"{summary['mean']:+.{decimals}f} {unit}"
    if len(change) == 1:
        return words
    return f"{words} {bounds(summary['low'], summary['high'], decimals)}"


def change_table(
    changes: pd.DataFrame, by: str, names: Mapping[Any, str], decimals: int = 3, scale: float = 1
) -> pd.DataFrame:
    """A row for each name of ``by``: means at both stages, their change with its interval, and in
    how many seeds it falls.
    """
    rows = []
    for key, name in names.items():
        part = changes[changes[by] == key]
        change = over_seeds(part, "change", [by]).iloc[0]
        row = {"": name, "n": len(part)}
        row |= {"first": scale * part["first"].mean(), "last": scale * part["last"].mean()}
        row |= {"change": scale * change["mean"]}
        row["95 % t"] = bounds(scale * change["low"], scale * change["high"], decimals)
        rows.append(row | {"falls": f"{(part['change'] < 0).sum()} of {len(part)}"})
    return pd.DataFrame(rows).round(decimals)


def rank_correlations(table: pd.DataFrame, x: str, y: list[str], peaks: Any) -> pd.DataFrame:
    """Spearman's correlation of ``x`` with every column of ``y`` over the checkpoints of each seed.

    Columns seed, phase ("all" checkpoints, or those "after" the peak, it included), y, n, spearman.
    Descriptive: the checkpoints of one run are no independent sample. NaN for fewer than three
    checkpoints and where a column does not vary.
    """
    found = []
    for seed, part in table.groupby("seed"):
        for phase, rows in (("all", part), ("after", part[part["step"] >= peaks[seed]])):
            found.append(correlations(rows, [x], y).assign(seed=seed, phase=phase))
    return pd.concat(found)[["seed", "phase", "y", "n", "spearman"]].reset_index(drop=True)


def layer_correlations(panel: pd.DataFrame, x: str, y: list[str], peaks: Any) -> pd.DataFrame:
    """As :func:`rank_correlations`, but over the layers of one checkpoint, where training time
    plays no part: the mean over the checkpoints of each seed from its peak on (phase "layers").

    NaN for fewer than three layers; checkpoints where a column does not vary are left out.
    """
    found = []
    seed: Any  # keys of groups have no types of their own
    for (seed, step), part in panel.groupby(["seed", "step"]):
        if step >= peaks[seed]:
            found.append(correlations(part, [x], y).assign(seed=seed))
    means = pd.concat(found).groupby(["seed", "y"], as_index=False)[["n", "spearman"]].mean()
    return means.assign(phase="layers")[["seed", "phase", "y", "n", "spearman"]]


def marks_table(peaks: Mapping[int, int], stages: Stages) -> pd.DataFrame:
    """Steps of the peak and of the stages, a row for each seed."""
    rows = []
    for seed, peak in peaks.items():
        steps = ", ".join(f"{step} ({label})" for label, step in stages[seed].items())
        rows.append({"seed": seed, "peak": peak, "stages": steps})
    return pd.DataFrame(rows)


def interval_words(n: int) -> str:
    """What brackets behind a mean over ``n`` pretraining seeds are."""
    return f"95 % t interval over n = {n} pretraining seeds" if n > 1 else "one pretraining seed"


def unfallen_words(peaks: Mapping[int, int], stages: Stages) -> str:
    """A sentence for the seeds whose first stage does not lie after the peak; empty without any."""
    early = sum(min(stages[seed].values()) <= peak for seed, peak in peaks.items())
    if not early:
        return ""
    return (
        f" In {early} of {len(peaks)} seed(s) fewer than two stages lie after the peak: there the "
        "change between the stages is no fall from it."
    )


def seeds_note(n: int) -> str:
    """What lines, bands, bars and rings are, for ``n`` pretraining seeds."""
    if n < 2:
        return "one pretraining seed (n = 1): no interval over seeds"
    note = "thin, rings: single pretraining seeds; thick, filled: their mean; "
    note += f"bands, bars: 95 % t interval over n = {n} seeds"
    # t is 12.7 for two seeds, 4.3 for three
    return note if n > 3 else f"{note} (cut at the axes)"

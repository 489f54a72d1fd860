"""Differences between two moments of a model, item by item, with paired bootstrap intervals.

Entries and questions of one model are no independent models: these intervals say how well a
difference of that model was measured. What another pretraining would have given is for the spread
over pretraining seeds to say.
"""

from __future__ import annotations

import pandas as pd

from kelib.errors import KelibError
from kelib.metrics import Interval, bootstrap_interval


def entry_gains(before: pd.DataFrame, after: pd.DataFrame) -> pd.Series:
    """``K_after - K_before`` of every entry (nats per target token), indexed by set and entry.

    Tables of probes as :class:`kelib.evaluation.Evaluation` holds them. Their plain mean is the
    difference of K (Eq. 4), whose two sets are weighted by their number of entries. Raises
    KelibError if the two do not hold the same probes.
    """
    keys = ["entry_set", "entry", "level", "probe"]
    one, two = (table.set_index(keys) for table in (before, after))
    _require_same(one.index, two.index, "probes")
    gain = (two["log_probability"] - one["log_probability"]) / one["tokens"]
    return gain.groupby(level=["entry_set", "entry"]).mean()


def question_changes(before: pd.DataFrame, after: pd.DataFrame) -> pd.Series:
    """-1 for every question that was lost, +1 for one that was won, else 0; by task and item.

    Tables of questions as :class:`kelib.evaluation.Evaluation` holds them. Raises KelibError if
    the two do not hold the same questions.
    """
    one, two = (table.set_index(["task", "item"])["correct"] for table in (before, after))
    _require_same(one.index, two.index, "questions")
    return two.astype(int) - one.astype(int)


def gain_interval(before: pd.DataFrame, after: pd.DataFrame) -> Interval:
    """``K_after - K_before`` with a paired 95 % percentile bootstrap over entries, in nats."""
    return bootstrap_interval(entry_gains(before, after))


def accuracy_interval(before: pd.DataFrame, after: pd.DataFrame) -> Interval:
    """``P_after - P_before`` with a paired 95 % percentile bootstrap over questions, a fraction.

    P is the mean over tasks, so the tasks must have equally many questions, as those of the
    generated world do. Raises KelibError otherwise.
    """
    changes = question_changes(before, after)
    sizes = changes.groupby(level="task").size()
    if sizes.nunique() > 1:
        raise KelibError(
            f"the tasks have between {sizes.min()} and {sizes.max()} questions, equally many are "
            "needed: bootstrap each task on its own with kelib.metrics.bootstrap_interval"
        )
    return bootstrap_interval(changes)


def _require_same(one: pd.Index, two: pd.Index, what: str) -> None:
    if not (one.is_unique and two.is_unique and one.sort_values().equals(two.sort_values())):
        raise KelibError(
            f"the two tables do not hold the same {what} ({len(one)} and {len(two)} rows): compare "
            "two moments of one study"
        )

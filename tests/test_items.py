"""Paired differences of entries and questions."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from kelib.errors import KelibError
from kelib.items import accuracy_interval, entry_gains, gain_interval, question_changes
from kelib.metrics import bootstrap_interval, knowledge_score


def probes(seed: int) -> pd.DataFrame:
    draw = np.random.default_rng(seed)
    rows = [
        (f"{entry_set}-{entry}", entry_set, level, probe)
        for entry_set, count in (("once", 5), ("paraphrase", 9))
        for entry in range(count)
        for level in ("memorisation", "semantic")
        for probe in range(2)
    ]
    table = pd.DataFrame(rows, columns=["entry", "entry_set", "level", "probe"])
    table["log_probability"] = -draw.exponential(4, len(table))
    return table.assign(tokens=np.random.default_rng(9).integers(1, 6, len(table)))


def questions(seed: int, sizes: tuple[int, ...] = (20, 20)) -> pd.DataFrame:
    draw = np.random.default_rng(seed)
    rows = [(f"task {task}", item) for task, size in enumerate(sizes) for item in range(size)]
    table = pd.DataFrame(rows, columns=["task", "item"])
    return table.assign(correct=draw.random(len(table)) < 0.6)


def test_the_mean_gain_of_entries_is_the_difference_of_k() -> None:
    before, after = probes(0), probes(1)
    expected = knowledge_score(after) - knowledge_score(before)
    assert gain_interval(before, after).mean == pytest.approx(expected, abs=1e-12)
    assert len(entry_gains(before, after)) == 14


def test_pairs_do_not_depend_on_the_order_of_rows() -> None:
    before, after = probes(0), probes(1)
    mixed = after.sample(frac=1, random_state=3)
    assert gain_interval(before, mixed) == gain_interval(before, after)
    questions_mixed = questions(1).sample(frac=1, random_state=3)
    assert accuracy_interval(questions(0), questions_mixed) == accuracy_interval(
        questions(0), questions(1)
    )


def test_pairing_narrows_what_two_separate_samples_would_give() -> None:
    before = probes(0)
    after = before.assign(log_probability=before["log_probability"] * 0.9)
    paired = gain_interval(before, after)
    levels = (after["log_probability"] / after["tokens"]).groupby(after["entry"]).mean()
    alone = bootstrap_interval(levels)
    assert paired.high - paired.low < 0.5 * (alone.high - alone.low)


def test_lost_and_won_questions() -> None:
    before = pd.DataFrame({"task": ["a"] * 3, "item": [0, 1, 2], "correct": [True, False, True]})
    after = before.assign(correct=[False, True, True])
    assert question_changes(before, after).tolist() == [-1, 1, 0]
    found = accuracy_interval(questions(0), questions(1))
    difference = questions(1)["correct"].mean() - questions(0)["correct"].mean()
    assert found.mean == pytest.approx(difference) and found.low < found.mean < found.high


def test_what_cannot_be_paired_is_refused() -> None:
    with pytest.raises(KelibError, match=r"do not hold the same probes \(56 and 55 rows\)"):
        entry_gains(probes(0), probes(1).iloc[1:])
    with pytest.raises(KelibError, match="do not hold the same questions"):
        question_changes(questions(0), questions(0, (20, 19)))
    with pytest.raises(KelibError, match="between 19 and 20 questions, equally many are needed"):
        accuracy_interval(questions(0, (20, 19)), questions(1, (20, 19)))

"""Reading order and learning curve of continual learning."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from kelib.continual import LearningCurve, reading_order
from kelib.corpus import sequence_order
from kelib.evaluation import score_probes
from kelib.injection import injection_schedule
from kelib.metrics import knowledge_by


def test_one_epoch_is_the_order_of_the_corpus():
    assert np.array_equal(reading_order(50, 30, 1, 4), sequence_order(50, 30, 1004))


def test_further_epochs_read_the_same_sequences_in_other_orders():
    order = reading_order(100, 90, 3, 4).reshape(3, 30)
    assert np.array_equal(order[0], reading_order(100, 30, 1, 4))
    assert all(set(epoch) == set(order[0]) for epoch in order)
    assert len({tuple(epoch) for epoch in order}) == 3
    assert np.array_equal(order, reading_order(100, 90, 3, 4).reshape(3, 30))
    assert not np.array_equal(order[1], reading_order(100, 90, 3, 5).reshape(3, 30)[1])


@pytest.mark.parametrize(
    ("batch", "moments"),
    [
        (8, {4: "before", 5: "after", 9: "before", 10: "after"}),
        (2, {2: "before", 5: "after", 7: "before", 10: "after"}),  # spread over three steps
    ],
)
def test_probes_are_scored_around_every_injection(model_of, tokenizer, world, batch, moments):
    schedule = injection_schedule(2, 4, 2, 10, batch, 0)
    model = model_of("olmo")
    curve = LearningCurve(model, tokenizer, world, schedule)
    for done in range(1, 11):
        curve.on_step(done)
    table = curve.table()
    found = table.drop_duplicates("step").set_index("step")["phase"].to_dict()
    assert found == moments
    rows = table[table["step"] == 10].drop(columns=["step", "phase"]).reset_index(drop=True)
    now = knowledge_by(score_probes(model, tokenizer, world), ["entry_set", "level"])
    pd.testing.assert_frame_equal(rows, now[rows.columns])
    assert len(rows) == 2 * 3  # sets and levels

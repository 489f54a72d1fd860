"""The injection table against the paper's numbers, and what really lands in the batches."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from kelib.errors import KelibError
from kelib.injection import Injector, encode_passages, injection_schedule

PAPER = {"once": 60, "paraphrase": 70, "injections": 10, "steps": 1600, "batch_size": 128}
LENGTH = 12


@pytest.fixture(scope="module")
def paper():
    return injection_schedule(**PAPER, seed=0)


@pytest.fixture
def small():
    """Ten injections of two paraphrase entries and, over the ten, three once entries."""
    return injection_schedule(3, 2, injections=10, steps=20, batch_size=4, seed=0)


def passages_of(wordings=10, tokens=3):
    """Passages of distinct token ids, so that one can be told from another: 1000, 1001 ..."""
    keys = [("once", n) for n in range(3)] + [("paraphrase", n) for n in range(2)]
    ids = iter(range(1000, 60_000))
    return {key: [[next(ids) for _ in range(tokens)] for _ in range(wordings)] for key in keys}


def batch_at(step, rows=4):
    """A batch whose tokens say where they were: step, row and column."""
    start = step * rows * LENGTH
    return np.arange(start, start + rows * LENGTH, dtype=np.uint16).reshape(rows, LENGTH)


# --- the table ----------------------------------------------------------------------------------


def test_the_papers_moments_and_counts(paper):
    assert sorted(paper["step"].unique()) == list(range(159, 1600, 160))  # from 0: 159 ... 1599
    assert (paper.groupby("step").size() == 76).all()
    kinds = paper.groupby(["step", "entry_set"]).size().unstack()
    assert (kinds["paraphrase"] == 70).all()
    assert (kinds["once"] == 6).all()
    assert (paper["moved"] == 0).all()


def test_every_wording_of_a_paraphrase_entry_comes_once(paper):
    shown = paper[paper["entry_set"] == "paraphrase"]
    assert sorted(shown["entry"].unique()) == list(range(70))
    for _, lines in shown.groupby("entry"):
        assert sorted(lines["passage"]) == list(range(10))
        assert lines["step"].is_unique


def test_every_once_entry_comes_once_in_its_original_wording(paper):
    shown = paper[paper["entry_set"] == "once"]
    assert sorted(shown["entry"]) == list(range(60))
    assert (shown["passage"] == 0).all()
    assert shown.sort_values("step")["entry"].to_list() != list(range(60))  # in a drawn order


def test_rows_are_distinct_within_a_batch_and_drawn(paper):
    assert not paper.duplicated(["step", "row"]).any()
    assert paper["row"].between(0, 127).all()
    rows = [tuple(lines["row"]) for _, lines in paper.groupby("step")]
    assert len(set(rows)) == 10
    assert rows[0] != tuple(range(76))


def test_the_table_is_a_function_of_its_seed(paper):
    pd.testing.assert_frame_equal(paper, injection_schedule(**PAPER, seed=0))
    assert not paper.equals(injection_schedule(**PAPER, seed=1))


def test_large_batches_keep_all_in_one_step():
    """The paper's batch of 2048: a hundred steps, an injection every ten."""
    table = injection_schedule(60, 70, injections=10, steps=100, batch_size=2048, seed=0)
    assert sorted(table["step"].unique()) == list(range(9, 100, 10))
    assert (table.groupby("step").size() == 76).all()


def test_once_entries_are_shared_out_evenly():
    table = injection_schedule(13, 0, injections=5, steps=5, batch_size=8, seed=0)
    counts = table.groupby("step").size()
    assert set(counts) == {2, 3}
    assert counts.sum() == 13


@pytest.mark.parametrize("batch_size", [32, 38, 75, 76])
def test_what_does_not_fit_moves_to_the_steps_before_and_is_not_dropped(paper, batch_size):
    table = injection_schedule(**PAPER | {"batch_size": batch_size}, seed=0)
    keys = ["entry_set", "entry", "passage"]
    assert sorted(map(tuple, table[keys].to_numpy())) == sorted(map(tuple, paper[keys].to_numpy()))
    assert not table.duplicated(["step", "row"]).any()
    assert table["row"].between(0, batch_size - 1).all()
    # nothing leaves its moment: `moved` says by how many steps it came early
    assert (((table["step"] + table["moved"]) % 160) == 159).all()
    assert sorted(table["moved"].unique()) == list(range(-(-76 // batch_size)))
    assert table["step"].is_monotonic_increasing


def test_no_entries_no_lines():
    table = injection_schedule(0, 0, injections=10, steps=20, batch_size=4, seed=0)
    assert len(table) == 0
    assert list(table) == ["step", "row", "entry_set", "entry", "passage", "moved"]


def test_steps_that_do_not_divide_are_refused():
    with pytest.raises(KelibError, match="steps = 25 must be a multiple of injections = 10"):
        injection_schedule(1, 1, injections=10, steps=25, batch_size=4, seed=0)


def test_more_passages_than_sequences_are_refused():
    said = "9 passages are due every 2 steps of 4 sequences; raise continual.batch_size or steps"
    with pytest.raises(KelibError, match=said):
        injection_schedule(0, 9, injections=10, steps=20, batch_size=4, seed=0)
    full = injection_schedule(0, 8, injections=10, steps=20, batch_size=4, seed=0)
    assert len(full) == 80  # just fits: every sequence begins with a passage


# --- the batches --------------------------------------------------------------------------------


def test_a_passage_comes_first_and_the_sequence_follows(small):
    passages = passages_of()
    injector = Injector(small, passages)
    for step in range(20):
        before = batch_at(step)
        after = injector.apply(before, step)
        due = small[small["step"] == step].set_index("row")
        for row in range(4):
            if row not in due.index:
                assert np.array_equal(after[row], before[row])
                continue
            line = due.loc[row]
            ids = passages[line["entry_set"], line["entry"]][line["passage"]]
            assert after[row, :3].tolist() == ids
            assert np.array_equal(after[row, 3:], before[row, :-3])
    injector.check()


def test_the_original_batch_is_left_alone(small):
    injector = Injector(small, passages_of())
    step = int(small["step"].iloc[0])
    batch = batch_at(step)
    batch.setflags(write=False)  # as memory-mapped blocks are
    changed = injector.apply(batch, step)
    assert changed is not batch
    assert (changed.dtype, changed.shape) == (batch.dtype, batch.shape)
    assert np.array_equal(batch, batch_at(step))
    assert injector.apply(batch, step - 1) is batch  # nothing due: no copy


@pytest.mark.parametrize("tokens", [LENGTH, LENGTH + 5])
def test_a_passage_as_long_as_the_sequence_or_longer_is_cut(small, tokens):
    passages = passages_of(tokens=tokens)
    injector = Injector(small, passages)
    line = small.iloc[0]
    after = injector.apply(batch_at(line["step"]), line["step"])
    ids = passages[line["entry_set"], line["entry"]][line["passage"]]
    assert after[line["row"]].tolist() == ids[:LENGTH]


def test_fewer_wordings_than_injections_start_over(small):
    passages = passages_of(wordings=4)
    injector = Injector(small, passages)
    line = small[(small["entry_set"] == "paraphrase") & (small["passage"] == 7)].iloc[0]
    after = injector.apply(batch_at(line["step"]), line["step"])
    assert after[line["row"], :3].tolist() == passages["paraphrase", line["entry"]][7 % 4]


def test_exposures_are_counted_and_checked(small):
    injector = Injector(small, passages_of())
    for step in range(19):
        injector.apply(batch_at(step), step)
    assert injector.exposures["paraphrase", 0] == 9
    said = "3 of 5 entries were not shown as scheduled, such as once 2: 0 times for 1; train from"
    with pytest.raises(KelibError, match=said):  # the tenth injection falls into the last step
        injector.check()
    injector.apply(batch_at(19), 19)
    injector.check()
    once = {key: n for key, n in injector.exposures.items() if key[0] == "once"}
    assert once == {("once", n): 1 for n in range(3)}
    assert injector.exposures["paraphrase", 1] == 10
    injector.apply(batch_at(19), 19)
    with pytest.raises(KelibError, match="such as once 2: 2 times for 1"):
        injector.check()


def test_an_empty_schedule_injects_nothing_and_passes_its_check(small):
    injector = Injector(small.iloc[:0], passages_of())
    for step in range(20):
        batch = batch_at(step)
        assert injector.apply(batch, step) is batch
    injector.check()
    assert set(injector.exposures.values()) == {0}


def test_a_passage_without_tokens_is_refused(small):
    passages = passages_of() | {("once", 1): [[5], []]}
    with pytest.raises(KelibError, match=r"entry \('once', 1\) has a passage without tokens"):
        Injector(small, passages)


def test_passages_of_a_world_are_encoded_one_by_one(world, tokenizer):
    entries = {"once": world.once, "paraphrase": world.paraphrase}
    encoded = encode_passages(tokenizer, entries)
    assert list(encoded) == [
        *(("once", n) for n in range(3)),
        *(("paraphrase", n) for n in range(2)),
    ]
    for (entry_set, index), wordings in encoded.items():
        texts = [tokenizer.decode(ids) for ids in wordings]
        assert texts == list(entries[entry_set][index].passages)


def test_what_a_model_would_read_is_the_passage(world, tokenizer, packed):
    """From the world to the batch: every exposure can be read back as text."""
    entries = {"once": world.once, "paraphrase": world.paraphrase}
    table = injection_schedule(3, 2, injections=10, steps=10, batch_size=6, seed=0)
    injector = Injector(table, encode_passages(tokenizer, entries))
    for step in range(10):
        blocks = np.tile(packed.blocks["domain"][:6], (1, 4))  # long enough for any passage
        after = injector.apply(blocks, step)
        for line in table[table["step"] == step].itertuples():
            passage = entries[line.entry_set][line.entry].passages[line.passage]
            follows = tokenizer.decode(blocks[line.row][:8].tolist())
            assert tokenizer.decode(after[line.row].tolist()).startswith(passage + follows[:4])
    injector.check()

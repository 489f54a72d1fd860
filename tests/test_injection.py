"""The injection table against the paper's numbers, and what really lands in the batches."""

from __future__ import annotations

import hashlib
import json
from itertools import chain

import numpy as np
import pandas as pd
import pytest

from kelib.errors import KelibError
from kelib.injection import (
    Injector,
    describe_schedule,
    encode_passages,
    format_schedule,
    injection_schedule,
)

COLUMNS = ["step", "row", "entry_set", "entry", "passage", "moved", "part", "parts"]
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
    assert list(table) == COLUMNS
    assert describe_schedule(table) == "Nothing is injected."
    assert format_schedule(table) == "injection schedule\nNothing is injected."


def test_steps_that_do_not_divide_are_refused():
    with pytest.raises(KelibError, match="steps = 25 must be a multiple of injections = 10"):
        injection_schedule(1, 1, injections=10, steps=25, batch_size=4, seed=0)


def test_more_passages_than_sequences_are_refused():
    said = "9 passages are due every 2 steps of 4 sequences; raise continual.batch_size or steps"
    with pytest.raises(KelibError, match=said):
        injection_schedule(0, 9, injections=10, steps=20, batch_size=4, seed=0)
    full = injection_schedule(0, 8, injections=10, steps=20, batch_size=4, seed=0)
    assert len(full) == 80  # just fits: every sequence begins with a passage


def test_counts_that_cannot_be_are_refused():
    for name in ("injections", "steps", "batch_size"):
        with pytest.raises(KelibError, match=f"{name} = 0 must be at least 1"):
            injection_schedule(**PAPER | {name: 0}, seed=0)
    with pytest.raises(KelibError, match="once = -1 must be at least 0"):
        injection_schedule(**PAPER | {"once": -1}, seed=0)
    for more in ({"sequence_length": 8}, {"passages": {}}):
        with pytest.raises(KelibError, match="must be given together, or neither"):
            injection_schedule(**PAPER, seed=0, **more)
    with pytest.raises(KelibError, match="sequence_length = 0 must be at least 1"):
        injection_schedule(**PAPER, seed=0, passages={}, sequence_length=0)
    with pytest.raises(KelibError, match=r"entry \('paraphrase', 0\) has a passage without tokens"):
        injection_schedule(**PAPER, seed=0, passages={}, sequence_length=8)


# Of tables and batches as they were before passages could be split (commit 0119882), where nothing
# is: the same runs must come out. Regenerate by printing `digests` in the test.
GOLDEN = {
    # once, paraphrase, injections, steps, batch_size, tokens of a sequence, seed
    (4, 4, 10, 20, 16, 64, 0): ("506f592508424a97", "bae228ca3815122a"),  # smoke
    (4, 4, 10, 20, 16, 64, 1): ("83e55e9ecec318f5", "0989b8815bc49c16"),
    (20, 16, 10, 120, 32, 64, 0): ("406d1b41866f9676", "71d7f035faeefc71"),  # small and study
    (20, 16, 10, 120, 32, 64, 1): ("ecc07f4c8bf8c924", "e289eb8bbc8b7388"),
    (60, 70, 10, 1600, 32, 64, 0): ("b21c24583635e164", "35cb2468192b6fe0"),  # more than a batch
}


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("case", GOLDEN)
def test_where_all_passages_fit_nothing_changed(case, planned):
    once, paraphrase, injections, steps, size, length, seed = case
    draw = np.random.default_rng(seed)
    passages = {
        (entry_set, entry): [
            draw.integers(0, 1000, int(draw.integers(length // 2, length + 1))).tolist()
            for _ in range(10)
        ]
        for entry_set, count in (("once", once), ("paraphrase", paraphrase))
        for entry in range(count)
    }
    known = {"passages": passages, "sequence_length": length} if planned else {}
    table = injection_schedule(once, paraphrase, injections, steps, size, seed, **known)
    assert (table["part"] == 0).all() and (table["parts"] == 1).all()
    injector, batches = Injector(table, passages), hashlib.sha256()
    for step in range(steps):
        start = step * size * length
        batch = (np.arange(start, start + size * length) % 60_000).astype(np.uint16)
        batches.update(injector.apply(batch.reshape(size, length), step).tobytes())
    injector.check()
    lines = table[COLUMNS[:6]].to_csv(index=False, lineterminator="\n").encode()
    digests = hashlib.sha256(lines).hexdigest()[:16], batches.hexdigest()[:16]
    assert digests == GOLDEN[case]


# --- passages longer than a sequence ------------------------------------------------------------


def long_passages(once=3, paraphrase=2, seed=0):
    """Two wordings of 1 to 40 tokens each, all tokens distinct."""
    draw, ids = np.random.default_rng(seed), iter(range(1000, 60_000))
    return {
        (entry_set, entry): [
            [next(ids) for _ in range(int(draw.integers(1, 41)))] for _ in range(2)
        ]
        for entry_set, count in (("once", once), ("paraphrase", paraphrase))
        for entry in range(count)
    }


@pytest.mark.parametrize("size", [1, 2, 3, 4, 64])
@pytest.mark.parametrize("length", [3, 12, 41])
def test_every_token_is_shown_once_in_reading_order(size, length):
    """Whatever the batch size and length: put together, the parts are the passage."""
    passages = long_passages()
    table = injection_schedule(3, 2, 10, 1000, size, 0, passages, length)
    injector = Injector(table, passages)
    assert not table.duplicated(["step", "row"]).any()
    assert table["row"].between(0, size - 1).all()
    assert (((table["step"] + table["moved"]) % 100) == 99).all()
    read = {}
    for step in sorted(table["step"].unique()):
        start = 100 + np.zeros((size, length), dtype=np.uint16)
        after = injector.apply(start, step)
        for line in table[table["step"] == step].itertuples():
            tokens = [token for token in after[line.row].tolist() if token >= 1000]
            assert after[line.row].tolist()[: len(tokens)] == tokens
            read.setdefault((line.entry_set, line.entry, line.passage), []).append(tokens)
    expected = {("once", n, 0): passages["once", n][0] for n in range(3)}
    expected |= {
        ("paraphrase", n, moment): passages["paraphrase", n][moment % 2]
        for n in range(2)
        for moment in range(10)
    }
    assert {key: list(chain(*parts)) for key, parts in read.items()} == expected
    assert all(len(part) == length for parts in read.values() for part in parts[:-1])
    injector.check()
    assert sum(injector.exposures.values()) == len(table) == sum(map(len, read.values()))


def test_parts_are_numbered_in_reading_order_across_steps():
    passages = {("paraphrase", 0): [list(range(50))]}
    table = injection_schedule(0, 1, 1, 4, 2, 0, passages, 8)
    assert table["part"].to_list() == [0, 1, 2, 3, 4, 5, 6]
    assert (table["parts"] == 7).all()
    assert table["step"].to_list() == [0, 1, 1, 2, 2, 3, 3]
    assert table["moved"].to_list() == [3, 2, 2, 1, 1, 0, 0]


def test_a_part_that_was_not_shown_is_named():
    passages = {("once", 0): [list(range(20))]}
    table = injection_schedule(1, 0, 1, 3, 1, 0, passages, 8)
    injector = Injector(table, passages)
    for step in (0, 2):
        injector.apply(np.zeros((1, 8), dtype=np.uint16), step)
    assert injector.exposure_table()["shown"].to_list() == [1, 0, 1]
    with pytest.raises(KelibError, match=r"once 0, wording 0, part 2 of 3 at step 1: 0 times for"):
        injector.check()


def test_too_many_parts_are_refused_with_their_number():
    passages = {("once", 0): [list(range(20))]}
    said = r"1 passages \(3 sequences\) are due every 2 steps of 1 sequences; raise .* lengthen"
    with pytest.raises(KelibError, match=said):
        injection_schedule(1, 0, 1, 2, 1, 0, passages, 8)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_see_the_batch_of_one(processes):
    """Each applies its own injector to the global batch and takes its share of the rows."""
    passages = long_passages()
    table = injection_schedule(3, 2, 10, 400, 8, 0, passages, LENGTH)
    alone = Injector(table, passages)
    group = [Injector(table.copy(), passages) for _ in range(processes)]
    share = 8 // processes
    for step in range(400):
        whole = alone.apply(batch_at(step % 100, 8), step)
        parts = [
            injector.apply(batch_at(step % 100, 8), step)[rank * share : (rank + 1) * share]
            for rank, injector in enumerate(group)
        ]
        assert np.array_equal(np.concatenate(parts), whole)
    for injector in (alone, *group):
        injector.check()
        assert injector.exposures == alone.exposures


# --- what is said of it -------------------------------------------------------------------------


def test_the_schedule_in_a_sentence(paper):
    assert describe_schedule(paper) == (
        "760 passages (60 of 60 once entries, 700 of 70 paraphrase entries) take 760 sequences in "
        "10 injections, steps 159 to 1599 counted from 0; no passage split; all in the "
        "batch of their step; none dropped."
    )
    table = injection_schedule(**PAPER | {"batch_size": 32}, seed=0)
    assert describe_schedule(table).endswith(
        "; 440 sequences beyond the batch of their step spread over the steps just before "
        "it, 2 at most; none dropped."
    )
    passages = {("once", 0): [list(range(20))], ("once", 1): [[1]]}
    table = injection_schedule(2, 0, 1, 3, 2, 0, passages, 8)
    assert describe_schedule(table) == (
        "2 passages (2 of 2 once entries) take 4 sequences in 1 injection, step 2 counted from 0; "
        "1 passage longer than a sequence split into 3 parts, each in a sequence of its own, "
        "in reading order; 2 sequences beyond the batch of their step spread over the "
        "steps just before it, 1 at most; none dropped."
    )


def test_the_printed_table_has_every_line(small):
    text = format_schedule(small)
    title, sentence, blank, head, *lines = text.splitlines()
    assert (title, blank) == ("injection schedule", "")
    assert sentence == describe_schedule(small)
    assert head.split() == COLUMNS
    assert [line.split() for line in lines] == [list(map(str, row)) for row in small.to_numpy()]


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


def test_a_passage_as_long_as_the_sequence_fills_it(small):
    passages = passages_of(tokens=LENGTH)
    injector = Injector(small, passages)
    line = small.iloc[0]
    after = injector.apply(batch_at(line["step"]), line["step"])
    assert after[line["row"]].tolist() == passages[line["entry_set"], line["entry"]][0]


def test_a_longer_passage_is_refused_in_the_first_step_unless_it_was_planned(small):
    injector = Injector(small, passages_of(tokens=LENGTH + 5))
    said = (
        "paraphrase 0, wording 0 has 17 tokens: sequences of 12 take it in 2 parts, the schedule "
        r"has 1 \(step 1\); give passages and sequence_length"
    )
    assert small["step"].min() == 1
    with pytest.raises(KelibError, match=said):
        injector.apply(batch_at(0), 0)


def test_batches_of_another_size_or_vocabulary_are_refused(small):
    injector = Injector(small, passages_of())
    at = small[small["row"] == 3].iloc[0]
    with pytest.raises(KelibError, match=rf"step {at['step']} has 3 sequences, .* fills row 3"):
        injector.apply(batch_at(at["step"])[:3], at["step"])
    injector = Injector(small, passages_of())
    with pytest.raises(KelibError, match=r"has token 11\d\d, the batch holds tokens up to 255"):
        injector.apply(np.zeros((4, LENGTH), dtype=np.uint8), 19)
    with pytest.raises(KelibError, match=r"entry \('once', 2\) has a passage without .* none at"):
        Injector(small, {key: ids for key, ids in passages_of().items() if key != ("once", 2)})


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
    said = (
        "3 of 5 entries were not shown as scheduled, such as paraphrase 0, wording 9 at step 19: "
        "0 times for 1; train every step"
    )
    with pytest.raises(KelibError, match=said):  # the tenth injection falls into the last step
        injector.check()
    injector.apply(batch_at(19), 19)
    injector.check()
    once = {key: n for key, n in injector.exposures.items() if key[0] == "once"}
    assert once == {("once", n): 1 for n in range(3)}
    assert injector.exposures["paraphrase", 1] == 10
    assert (injector.exposure_table()["shown"] == 1).all()
    injector.apply(batch_at(19), 19)
    with pytest.raises(KelibError, match="wording 9 at step 19: 2 times for 1"):
        injector.check()


def test_counts_survive_a_kill(small):
    """Counts are kept with the state at step 11, while a loader had read step 11 already."""
    first = Injector(small, passages_of())
    for step in range(12):
        first.apply(batch_at(step), step)
    state = json.loads(json.dumps(first.state_dict()))
    ahead, resumed = Injector(small, passages_of()), Injector(small, passages_of())
    ahead.load_state_dict(state)
    resumed.load_state_dict(state, step=11)
    for step in range(11, 20):
        ahead.apply(batch_at(step), step)
        resumed.apply(batch_at(step), step)
    resumed.check()
    with pytest.raises(KelibError, match="at step 11: 2 times for 1"):
        ahead.check()
    other = Injector(small.iloc[:-1], passages_of())
    with pytest.raises(KelibError, match="counts have 23 lines, the schedule 22; continue with"):
        other.load_state_dict(state)


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

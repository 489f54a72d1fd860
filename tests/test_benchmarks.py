"""The benchmarks run end to end at a tiny shape; what they measure is exact. No clock is judged."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from benchmarks import case, contact, entropy, fullsize, harness, learning
from benchmarks.__main__ import main
from benchmarks.questions import lengths, questions, token_bound, word_tokenizer
from benchmarks.rows import GROUPS, Comparison, Row, Variant, find_row, rows_of
from transformers import AutoConfig, AutoModelForCausalLM

import kelib
from kelib.config import repository_root
from kelib.errors import KelibError
from kelib.requests import encode_request
from kelib.runs import KEEP_MEMORY
from kelib.scale import PAPER
from kelib.scoring import Score
from kelib.tables import read_provenance, read_table

ROOT = repository_root()
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="peak memory is measured on Linux")


def test_a_row_end_to_end_through_a_subprocess(tmp_path) -> None:
    row = find_row("knowledge-512")
    row = dataclasses.replace(row, comparisons=row.comparisons[:1])
    records = harness.run_row(row, row.tiny)
    assert [record["quantity"] for record in records] == ["time"]
    (timed,) = records
    assert timed["ours"] > 0 and timed["baseline"] > 0 and timed["repeats"] == 2
    # two rounds: their median is their mean, and that of ratios is near the ratio of medians
    assert timed["ratio_low"] <= timed["ratio"] <= timed["ratio_high"]
    assert timed["ratio"] == pytest.approx((timed["ratio_low"] + timed["ratio_high"]) / 2)
    assert timed["model"] == "llama d=16 m=32 2 layers V=64, 2 x 2 x 16 tokens"
    path = tmp_path / "bench.csv"
    harness.write(records, path, {"threads": 1}, load=0.5)
    table = read_table(path)
    assert list(table.columns) == list(harness.COLUMNS)
    assert table.ratio.to_numpy() == pytest.approx([record["ratio"] for record in records])
    note = read_provenance(path)
    assert note["machine"]["cores"] >= 1 and note["machine"]["load_at_start"] == 0.5
    assert note["parameters"] == {"threads": 1} and note["versions"]["torch"]


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n == "grid" else []) for n in rows_of()],
)
def test_every_row_prepares_what_it_compares(name) -> None:
    row = find_row(name)
    variants = row.prepare({**row.settings, **row.tiny})
    for comparison in row.comparisons:
        for needed in comparison.variants:
            variants[needed].run()


def test_variants_that_are_compared_compute_the_same() -> None:
    model, batches = entropy.random_model(entropy.TINY), entropy.random_batches(entropy.TINY)
    measured = kelib.measure_entropy(model, batches, attention=True)
    cached = entropy.cache_activations(model, batches)
    assert cached.numpy() == pytest.approx(measured.knowledge_entropy, rel=1e-6)
    sequences = sum(len(batch["input_ids"]) for batch in batches)
    for other in (
        entropy.eager_attention(entropy.lean_entropy, model, batches),
        entropy.eager_attention(entropy.plain_entropy, model, batches),
        entropy.output_attentions(model, batches),
    ):
        assert measured.attention_entropy == pytest.approx(other.numpy() / sequences, abs=1e-5)
    assert model.config._attn_implementation == "sdpa"


def test_sides_of_a_training_row_take_the_same_step() -> None:
    """Adam's first step is the rate, but for gradients near its epsilon: clipping hardly shows."""
    settings = {**learning.TINY, "batches": 1}  # transformers shuffles: one batch is the same one
    start = entropy.random_model(settings).state_dict()
    after = []
    for prepare in (learning.theirs, learning.ours, learning.bare):
        model, run = prepare(settings)
        run(1)
        after.append({name: value.detach().clone() for name, value in model.state_dict().items()})
    assert all((after[0][name] != start[name]).any() for name in start)
    for other in after[1:]:
        torch.testing.assert_close(other, after[0], rtol=0, atol=0.05 * learning.RATE)


def test_questions_have_the_lengths_that_the_bound_is_computed_from() -> None:
    settings = learning.SCORING_TINY
    model = entropy.random_model(settings)
    tokenizer = word_tokenizer(settings["model"]["vocab_size"])
    requests = questions(model, tokenizer, settings)
    contexts, choices = lengths(settings)
    assert (contexts[0], contexts[-1]) == settings["context"]
    assert (min(choices), max(choices)) == settings["choice"]
    encoded = [encode_request(tokenizer, *request) for request in requests]
    assert [target for _, target in encoded] == choices
    assert [len(ids) - target for ids, target in encoded[::4]] == contexts
    read = sum(len(ids) for ids, _ in encoded) / (sum(contexts) + sum(choices))
    assert token_bound(settings) == pytest.approx(read)
    greedy = [score.is_greedy for score in kelib.score_continuations(model, tokenizer, requests)]
    assert all(greedy[3::4]) and not all(greedy)


def test_different_scores_are_not_timed() -> None:
    scores = [Score(-6.0, True, 2, 5), Score(-3.0, False, 1, 5)]
    learning.require_equal(scores, [(-6.00015, True), (-3.0, False)])
    with pytest.raises(KelibError, match=r"request 1: score_continuations gives -3.000000, greedy"):
        learning.require_equal(scores, [(-6.0, True), (-3.00015, False)])
    with pytest.raises(KelibError, match=r"request 0: .* HFLM -6.000000, greedy False; they must"):
        learning.require_equal(scores, [(-6.0, False), (-3.0, False)])


def test_a_trainer_that_stops_is_reported(tmp_path) -> None:
    from benchmarks.paced import PacedTrainer
    from transformers import TrainingArguments

    silent = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=1, **silent)
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 8
    paced = PacedTrainer(entropy.random_model(learning.TINY), rows, arguments)
    with pytest.raises(KelibError, match="transformers' Trainer stopped before the steps asked"):
        paced.run(2)


@LINUX
def test_memory_of_a_case_in_a_subprocess() -> None:
    settings = {**entropy.TINY, "batch": 32, "tokens": 512}
    found = harness.run_case("knowledge-512", "memory", ["knowledge"], settings, 1)
    states = 32 * 512 * 32 * 4 / 1e6  # MB of the activations of one feed-forward layer
    assert 3 * states < found["knowledge"] < 8 * states


@LINUX
def test_peak_memory_is_that_of_the_largest_moment() -> None:
    size = 64 * 1024 * 1024  # bytes of one tensor

    def two_at_once() -> None:
        first = torch.ones(size // 4)
        second = torch.ones(size // 4)
        del first, second
        torch.ones(size // 8)

    peak = case.peak_memory(Variant(two_at_once))
    assert peak == pytest.approx(2 * size / 1e6, rel=0.1)


def test_time_is_per_unit_and_every_other_round_runs_backwards() -> None:
    order: list[str] = []
    variants = {
        name: Variant(lambda name=name: order.append(name), units)
        for name, units in (("a", 1), ("b", 4))
    }
    found = case.time_in_turn(variants, 3)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"  # the first round warms up
    assert [len(found[name][clock]) for name in "ab" for clock in ("wall", "cpu")] == [3] * 4


def test_ratios_medians_quartiles_and_verdicts() -> None:
    seconds = {
        "ours": {"wall": [1.5, 2.5, 9.0], "cpu": [1.5, 2.5, 3.0]},
        "other": {"wall": [3.0, 5.0, 5.0], "cpu": [3.0, 5.0, 5.0]},
        "base": {"wall": [1.0, 1.0, 1.0], "cpu": [1.0, 1.0, 1.0]},
    }
    less = Comparison("time", "ours", "other", ">=", 2, floor="base")
    found = harness._of_time(less, seconds)
    assert less.text == "(other - base) / (ours - base)"
    assert found["ratio"] == pytest.approx(4.0 / 1.5)  # medians 5, 2.5 and 1
    # rounds give 4, 4 / 1.5 and 4 / 8
    assert (found["ratio_low"], found["ratio_high"]) == pytest.approx(
        tuple(np.quantile([4.0, 4 / 1.5, 0.5], [0.25, 0.75]))
    )
    assert found["met"] == "yes"
    most = Comparison("time", "ours", "other", "<=", 0.4)
    assert harness._of_time(most, seconds)["met"] == "no"
    assert Comparison("memory", "ours", "other", ">=", None).met(3.0) == ""
    nothing = most.ratio(1.0, 0.0)
    assert np.isnan(nothing) and most.met(nothing) == "no"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nowhere"], "no benchmark 'nowhere'; there is all-three-512,"),
        (["nothing"], "no group of benchmarks 'nothing'; there is entropy, fullsize, learning"),
        (["entropy", "--repeats", "0"], "--repeats 0 must be at least 1"),
        (["entropy", "--threads", "0"], "--threads 0 must be at least 1"),
        (["--output", "x.csv"], "name a group or a row"),
    ],
)
def test_a_wrong_call_is_refused_in_one_line(arguments, message, capsys) -> None:
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_a_row_brings_its_environment(monkeypatch) -> None:
    seen = []

    def run_case(row, quantity, variants, settings, threads, more):
        seen.append((row, quantity, variants, more))
        return {name: {"wall": [1.0], "cpu": [1.0]} for name in variants}

    monkeypatch.setattr(harness, "run_case", run_case)
    records = harness.run_row(find_row("grid"), {"repeats": 1})
    assert seen == [("grid", "time", ["2 kept workers", "ideal", "2 new workers"], KEEP_MEMORY)]
    for record, target in zip(records, (1.15, None), strict=True):
        assert record["model"].endswith("8 runs of 600 steps x 16 x 64 tokens")
        assert record["ratio"] == 1.0 and record["target"] == target


def test_a_row_that_the_memory_does_not_hold_says_so_and_is_not_begun(
    monkeypatch, tmp_path
) -> None:
    monkeypatch.setattr(harness, "run_case", None)
    row = dataclasses.replace(find_row("step-olmo-1b"), needs=lambda settings: 1e15)
    records = harness.run_row(row)
    assert [record["quantity"] for record in records] == ["time", "memory"]
    for record in records:
        assert re.search(
            r"1 x 1 x 1024 tokens, not run: 1000000.0 GB needed, \d+\.\d GB free$", record["model"]
        )
        assert np.isnan([record[name] for name in ("ours", "baseline", "ratio")]).all()
        assert record["met"] == "" and record["repeats"] == 0
    assert "not run" in list(harness.lines(records))[1]
    harness.write(records, tmp_path / "bench.csv", {}, load=0.5)
    assert read_table(tmp_path / "bench.csv")["ours"].isna().all()


def test_rows_of_the_full_size_have_the_shape_of_the_paper() -> None:
    for row in rows_of("fullsize").values():
        config = AutoConfig.for_model(**row.settings["model"])
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        count = sum(parameter.numel() for parameter in model.parameters())
        assert count == PAPER["OLMo-1B"].parameters == fullsize.shape(row.settings).parameters
        assert fullsize.shape(row.settings) == PAPER["OLMo-1B"]
        weights = 4 * count
        assert weights < row.needs(row.settings) < 4.6 * weights


def test_the_floor_of_the_full_size_is_of_as_many_flops() -> None:
    settings = {**entropy.TINY, "tokens": 16}
    done = fullsize.PRODUCTS * 2 * 16 * 16 * 32
    assert fullsize.products(settings, 2.5 * done).units == pytest.approx(1 / 2.5)
    variants = fullsize.measuring(settings)
    # two layers of 2048 weights of attention's four and the three matrices, and attention itself
    a_token = 2 * 2 * (4 * 16 * 16 + 3 * 16 * 32) + 4 * 2 * 16 * 16
    assert variants["matrix products"].units == pytest.approx(done / (16 * a_token))
    assert (
        sum(part.numel() for part in fullsize.weights(settings))
        == fullsize.shape(settings).parameters
    )


def test_a_case_that_fails_says_so() -> None:
    with pytest.raises(KelibError, match=r"nowhere \(time\) failed: no benchmark 'nowhere'; there"):
        harness.run_case("nowhere", "time", ["knowledge"], {}, 1)
    with pytest.raises(KelibError, match=r"no variant 'magic'; this benchmark has a$"):
        case._choose({"a": Variant(print)}, ["magic"])


def test_all_rows_are_listed(capsys) -> None:
    assert main(["--list"]) == 0
    assert capsys.readouterr().out.split() == list(rows_of())
    assert all(isinstance(row, Row) for group in GROUPS for row in rows_of(group).values())


def test_first_contact_is_measured_step_by_step_and_a_step_that_fails_says_so(
    tmp_path, monkeypatch
) -> None:
    write = "import os; open('made', 'wb').write(b'x' * 3_000_000); assert not os.environ.get('X')"
    monkeypatch.setattr(contact, "LEFT_OUT", (*contact.LEFT_OUT, "X"))
    monkeypatch.setenv("X", "seen")
    steps = {"clone": [sys.executable, "-c", write], "environment": ["true"]}
    monkeypatch.setattr(contact, "STEPS", steps)
    table = contact.contact(tmp_path)
    assert list(table["step"]) == list(steps) and list(table["megabytes"]) == [3.0, 0.0]
    assert (table["seconds"] > 0).all() and (table["cpu_seconds"] >= 0).all()
    monkeypatch.setitem(steps, "first figure", ["sh", "-c", "echo no such target; exit 2"])
    with pytest.raises(KelibError, match=r"first figure: sh .* fails in .*:\nno such target"):
        contact.contact(tmp_path)


def test_steps_of_first_contact_are_targets_of_the_makefile() -> None:
    for command in contact.STEPS.values():
        if command[0] == "make":
            done = subprocess.run([*command, "-n", "USE_ENV=1"], cwd=ROOT, capture_output=True)
            assert done.returncode == 0, done.stderr

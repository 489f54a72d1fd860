"""Item tables, their summary by hand, and the held-out loss against the model's own."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from kelib.entries import LEVELS
from kelib.evaluation import CHANCE, block_batches, evaluate, heldout_loss
from kelib.scoring import score_continuations
from kelib.world import TASKS


@pytest.fixture(scope="module")
def found(model_of, tokenizer, world, packed):
    return evaluate(model_of("olmo"), tokenizer, world, packed)


def test_a_row_for_every_probe_and_question_and_no_text(found, world):
    assert list(found.probes) == [
        "entry",
        "entry_set",
        "level",
        "probe",
        "log_probability",
        "tokens",
        "padded",
    ]
    counts = found.probes.groupby(["entry_set", "entry"]).size()
    assert counts.to_dict() == {
        **{("once", f"once-{n}"): 15 for n in range(3)},
        **{("paraphrase", f"paraphrase-{n}"): 15 for n in range(2)},
    }
    assert (found.probes.groupby(["entry", "level"]).size() == 5).all()
    assert set(found.probes["level"]) == set(LEVELS)
    assert list(found.questions) == ["task", "item", "correct", "margin"]
    assert found.questions["task"].to_list() == [question.task for question in world.questions]
    written = found.probes.to_csv() + found.questions.to_csv()
    names = (*world.people, *world.places, *(entry.name for entry in world.once))
    assert not [name for name in names if name in written]


def test_probes_are_scored_one_by_one(found, model_of, tokenizer, world):
    for entry_set, entries in (("once", world.once), ("paraphrase", world.paraphrase)):
        for index, entry in enumerate(entries):
            rows = found.probes[found.probes["entry"] == f"{entry_set}-{index}"]
            asked = [(probe.input, probe.target) for probe in entry.probes]
            scores = score_continuations(model_of("olmo"), tokenizer, asked, batch_size=1)
            expected = [score.log_probability for score in scores]
            np.testing.assert_allclose(rows["log_probability"], expected, atol=1e-4)
            assert rows["tokens"].to_list() == [score.tokens for score in scores]
            longest = max(score.context + score.tokens for score in scores)
            assert (rows["padded"] == longest).all()
            assert rows["level"].to_list() == [probe.level for probe in entry.probes]
            assert rows["probe"].to_list() == list(range(15))


def test_questions_are_answered_by_the_most_probable_choice(found, model_of, tokenizer, world):
    for question, row in zip(world.questions, found.questions.itertuples(), strict=True):
        asked = [(question.context, choice) for choice in question.choices]
        scores = score_continuations(model_of("olmo"), tokenizer, asked)
        values = [score.log_probability for score in scores]
        right = values.pop(question.answer)
        assert row.margin == pytest.approx(right - max(values), abs=1e-4)
        assert row.correct == (right > max(values))
    assert 0 < found.questions["correct"].mean() < 1


def test_the_summary_has_a_number_for_every_part(found):
    summary = found.summary()
    expected = {"k", "k_padded", "p", "k_once", "k_paraphrase", "loss_general", "loss_domain"}
    expected |= {f"k_{level}" for level in LEVELS} | {f"p_{task}" for task in TASKS}
    assert set(summary) == expected
    assert all(type(value) is float and np.isfinite(value) for value in summary.values())


def test_k_is_the_nested_mean(found):
    """Eq. 4 by hand: tokens, probes of an entry, entries of a set, the two sets by their size."""
    by_set = {"once": [], "paraphrase": []}
    for entry in dict.fromkeys(found.probes["entry"]):
        rows = [row for row in found.probes.itertuples() if row.entry == entry]
        mean = sum(row.log_probability / row.tokens for row in rows) / len(rows)
        by_set[rows[0].entry_set].append(mean)
    means = {name: sum(values) / len(values) for name, values in by_set.items()}
    summary = found.summary()
    assert summary["k_once"] == pytest.approx(means["once"])
    assert summary["k_paraphrase"] == pytest.approx(means["paraphrase"])
    assert summary["k"] == pytest.approx((3 * means["once"] + 2 * means["paraphrase"]) / 5)
    padded = found.probes.assign(each=found.probes["log_probability"] / found.probes["padded"])
    entries = padded.groupby(["entry_set", "entry"])["each"].mean().groupby("entry_set").mean()
    assert summary["k_padded"] == pytest.approx(
        (3 * entries["once"] + 2 * entries["paraphrase"]) / 5
    )
    levels = [summary[f"k_{level}"] for level in LEVELS]
    assert np.mean(levels) == pytest.approx(summary["k"])  # five probes in each


def test_p_is_the_mean_over_tasks(found, world):
    right = {task: [] for task in TASKS}
    for question, row in zip(world.questions, found.questions.itertuples(), strict=True):
        right[question.task].append(row.correct)
    summary = found.summary()
    for task, answers in right.items():
        assert summary[f"p_{task}"] == sum(answers) / 4
    assert summary["p"] == pytest.approx(sum(map(sum, right.values())) / (4 * len(TASKS)))


def test_a_model_that_knows_one_task_is_above_chance_there_only(world, found):
    assert 1 / len(world.questions[0].choices) == CHANCE
    table = found.questions.copy()
    table["correct"] = table["task"] == TASKS[0]
    summary = type(found)(found.probes, table, found.losses).summary()
    assert (summary["p"], summary[f"p_{TASKS[0]}"], summary[f"p_{TASKS[1]}"]) == (1 / 6, 1.0, 0.0)


# --- held-out loss ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["olmo", "gpt2", "gemma2"])
def test_the_loss_is_the_models_own(model_of, packed, kind):
    model = model_of(kind)
    blocks = packed.blocks["heldout_domain"]
    ids = torch.from_numpy(blocks.astype(np.int64))
    with torch.no_grad():
        expected = float(model(input_ids=ids, labels=ids).loss)
        logs = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    assert heldout_loss(model, blocks) == pytest.approx(expected, rel=1e-6)
    by_hand = -logs.gather(2, ids[:, 1:, None]).mean()  # the first token is not predicted
    assert heldout_loss(model, blocks) == pytest.approx(float(by_hand), rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_the_batch_size_does_not_matter(model_of, packed, batch_size):
    model, blocks = model_of("olmo"), packed.blocks["heldout_general"]  # 10 rows: 7 + 3
    expected = heldout_loss(model, blocks)
    assert heldout_loss(model, blocks, batch_size) == pytest.approx(expected, rel=1e-6)
    parts = list(block_batches(blocks, batch_size))
    assert [len(part) for part in parts[:-1]] == [batch_size] * (len(parts) - 1)
    assert torch.equal(torch.cat(parts), torch.from_numpy(blocks.astype(np.int64)))


def test_the_evaluated_losses_are_those_of_both_corpora(found, model_of, packed):
    assert found.losses == {
        name: pytest.approx(heldout_loss(model_of("olmo"), packed.blocks[name]))
        for name in ("heldout_general", "heldout_domain")
    }
    summary = found.summary()
    assert summary["loss_general"] == found.losses["heldout_general"]
    assert summary["loss_general"] != summary["loss_domain"]


def test_evaluation_changes_nothing(model_of, tokenizer, world, packed):
    model = copy.deepcopy(model_of("gpt2")).train()  # has dropout
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = evaluate(model, tokenizer, world, packed).summary()
    assert model.training
    assert evaluate(model.eval(), tokenizer, world, packed).summary() == first
    assert not model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_failure_leaves_the_mode_as_it_was(model_of, packed):
    model = copy.deepcopy(model_of("olmo")).train()

    def fail(*_):
        raise RuntimeError("planted")

    model.get_output_embeddings().register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="planted"):
        heldout_loss(model, packed.blocks["heldout_domain"])
    assert model.training


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
def test_a_model_on_an_accelerator_gives_the_same(found, model_of, tokenizer, world, packed):
    model = copy.deepcopy(model_of("olmo")).to("cuda")
    there = evaluate(model, tokenizer, world, packed).summary()
    for name, value in found.summary().items():
        assert there[name] == pytest.approx(value, abs=1e-3 if name[0] != "p" else 0.3)

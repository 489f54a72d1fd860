"""Files of multiple-choice tasks: local copies of the six public ones, and tasks made here.

One folder holds one subfolder per task, with one file per split: JSON Lines, or JSON with a list of
objects. A public task keeps the fields of its hub data set. A task made here is written by
``export_questions`` together with a YAML file, so that the ``lm_eval`` command reads it as well.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kelib.errors import KelibError, listing
from kelib.schema import require_name
from kelib.tables import write_atomically
from kelib.world import Question

Check = tuple[str, Callable[[Any], bool]]
METRICS = ("acc", "acc_norm")
OWN_SPLIT = "test"


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and len(value) >= 2 and all(map(_is_text, value))


def _is_lettered(value: object) -> bool:
    if not isinstance(value, dict) or not _is_texts(value.get("text")):
        return False
    labels: Any = value.get("label")
    return _is_texts(labels) and len(set(labels)) == len(labels) == len(value["text"])


def _one_of(*values: object) -> Check:
    # 1 == True in Python, but not in a file
    return f"one of {listing(map(repr, values))}", lambda value: any(
        value == known and type(value) is type(known) for known in values
    )


TEXT: Check = ("text", _is_text)
TEXT_OR_EMPTY: Check = ("text, which may be empty", lambda value: isinstance(value, str))
LETTERED: Check = (
    "an object with lists of text 'text' and 'label', as long as each other, labels distinct",
    _is_lettered,
)
ANSWER_KEY: Check = ("one of the labels of 'choices'", _is_text)
GAP: Check = ("text with a gap '_'", lambda value: _is_text(value) and "_" in value)
FOUR_ENDINGS: Check = ("a list of four texts", lambda value: _is_texts(value) and len(value) == 4)
INDEX: Check = ("the index of a choice, from 0", lambda value: type(value) is int and value >= 0)


@dataclass(frozen=True)
class PublicTask:
    """What of a public data set is scored, and how.

    ``metric``: the paper's, by lm-eval's name: ``acc`` picks the choice with the highest summed
    log-likelihood, ``acc_norm`` the highest one divided by the choice's number of characters.
    ``split``: the one lm-eval scores, which is the test split where its answers are public.
    ``folder``: the task's folder within lm-eval. ``repo``: its data set on the hub, as lm-eval has
    it. ``fields``: those its definition reads.
    """

    metric: str
    split: str
    folder: str
    repo: str
    fields: dict[str, Check]


PUBLIC_TASKS: dict[str, PublicTask] = {
    "sciq": PublicTask(
        "acc",
        "test",
        "sciq",
        "allenai/sciq",
        {
            "support": TEXT_OR_EMPTY,
            "question": TEXT,
            "correct_answer": TEXT,
            **{f"distractor{number}": TEXT for number in (1, 2, 3)},
        },
    ),
    "winogrande": PublicTask(
        "acc",
        "validation",
        "winogrande",
        "allenai/winogrande",
        {"sentence": GAP, "option1": TEXT, "option2": TEXT, "answer": _one_of("1", "2")},
    ),
    "piqa": PublicTask(
        "acc_norm",
        "validation",
        "piqa",
        "baber/piqa",
        {"goal": TEXT, "sol1": TEXT, "sol2": TEXT, "label": _one_of(0, 1)},
    ),
    "openbookqa": PublicTask(
        "acc_norm",
        "test",
        "openbookqa",
        "allenai/openbookqa",
        {"question_stem": TEXT, "choices": LETTERED, "answerKey": ANSWER_KEY},
    ),
    "hellaswag": PublicTask(
        "acc_norm",
        "validation",
        "hellaswag",
        "Rowan/hellaswag",
        {
            "activity_label": TEXT,
            "ctx_a": TEXT,
            "ctx_b": TEXT_OR_EMPTY,
            "endings": FOUR_ENDINGS,
            "label": _one_of("0", "1", "2", "3"),
        },
    ),
    "arc_easy": PublicTask(
        "acc",
        "test",
        "arc",
        "allenai/ai2_arc",
        {"question": TEXT, "choices": LETTERED, "answerKey": ANSWER_KEY},
    ),
}
OWN_FIELDS: dict[str, Check] = {
    "context": TEXT,
    "choices": ("a list of at least two texts", _is_texts),
    "answer": INDEX,
}
# Fields that must fit the field 'choices', which is read before them.
FITTING: dict[str, Callable[[dict], bool]] = {
    "answerKey": lambda item: item["answerKey"].lstrip() in item["choices"]["label"],
    "answer": lambda item: item["answer"] < len(item["choices"]),
}


def task_names(data: Path | None) -> list[str]:
    """The public tasks, and the own ones whose YAML file lies in ``data``."""
    definitions = data.glob("*/*.yaml") if data else ()
    return sorted({*PUBLIC_TASKS, *(p.stem for p in definitions if p.stem == p.parent.name)})


def read_items(task: str, data: Path) -> list[dict[str, Any]]:
    """The items of ``data/<task>/<split>.jsonl`` or ``.json``, checked, in the order of the file.

    Only the fields that the task reads are kept. Raises KelibError, naming file, line and field:
    no such file, not JSON, a field that is missing or not of its kind, an answer that is none of
    the choices, or no item at all.
    """
    public = PUBLIC_TASKS.get(task)
    split, fields = (public.split, public.fields) if public else (OWN_SPLIT, OWN_FIELDS)
    folder = data / task
    path = next(
        (p for p in (folder / f"{split}.jsonl", folder / f"{split}.json") if p.exists()), None
    )
    if path is None:
        there = listing(p.name for p in folder.iterdir()) if folder.is_dir() else "no such folder"
        raise KelibError(
            f"task {task!r} needs {folder / split}.jsonl or .json, a copy of the {split} split of "
            f"its data set with fields {listing(fields)}; there: {there}"
        )
    items = []
    for where, item in _objects(path):
        if not isinstance(item, dict):
            raise KelibError(
                f"{path}, {where}: holds {_short(item)}, must be an object; correct the file"
            )
        for field, (constraint, holds) in fields.items():
            if field not in item:
                raise KelibError(
                    f"{path}, {where}: field {field!r} is missing, it has {listing(item)}; task "
                    f"{task!r} reads {listing(fields)}"
                )
            fits = FITTING.get(field) if "choices" in fields else None
            if not holds(item[field]) or (fits and not fits(item)):
                raise KelibError(
                    f"{path}, {where}: field {field!r} is {_short(item[field])}, must be "
                    f"{constraint}; correct the file"
                )
        kept = {field: item[field] for field in fields}
        if "answerKey" in kept:  # lm-eval does the same, for OpenBookQA
            kept["answerKey"] = kept["answerKey"].lstrip()
        items.append(kept)
    if not items:
        raise KelibError(f"{path} holds no item; task {task!r} needs at least one")
    return items


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _objects(path: Path) -> Iterable[tuple[str, Any]]:
    """(where it stands, value) of every item of a JSON list or of JSON Lines."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise KelibError(f"cannot read {path}: {_short(error)}; replace the file") from error
    if text.lstrip().startswith("["):
        parsed = _parse(text, path, "as a whole")
        yield from ((f"item {number}", item) for number, item in enumerate(parsed, start=1))
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"line {number}", _parse(line, path, f"line {number}")


def _parse(text: str, path: Path, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # no JSON, too many digits, brackets too deep
        raise KelibError(
            f"{path}, {where}: not JSON ({error}); the file must hold one object a line, or a list"
        ) from error


def export_questions(
    questions: Sequence[Question], data: Path, metric: str = "acc"
) -> dict[str, Path]:
    """Write questions as lm-eval tasks: ``data/<task>/<task>.yaml`` and ``test.jsonl`` beside it.

    The questions keep their order within a task. The space that each choice begins with becomes
    lm-eval's delimiter: requests are exactly those of ``kelib.evaluation.evaluate``, and the space
    is no character of the choice. ``metric`` is the one that counts, ``acc`` or ``acc_norm``;
    lm-eval's own command (``--include_path data``) reports both. The YAML names the items by
    absolute path: export again after moving the folder, for that command (``evaluate_tasks``
    looks beside the YAML).

    Returns the YAML file of every task. Raises KelibError for no question, a choice that does not
    begin with a space, an unknown metric, or a task with the name of a public one.
    """
    if metric not in METRICS:
        raise KelibError(f"metric is {metric!r}, must be one of {listing(METRICS)}")
    by_task: dict[str, list[Question]] = {}
    for question in questions:
        by_task.setdefault(question.task, []).append(question)
    if not by_task:
        raise KelibError("there is no question to export; give at least one")
    if bad := [q for q in questions if not all(c.startswith(" ") for c in q.choices)]:
        raise KelibError(
            f"task {bad[0].task!r} has choices {_short(bad[0].choices)}; "
            "each must begin with a space"
        )
    if taken := [task for task in by_task if task in PUBLIC_TASKS]:
        raise KelibError(f"task {taken[0]!r} is the name of a public task; rename it")
    for task in by_task:
        require_name("task", task)
    written = {}
    for task, asked in by_task.items():
        items = Path(data).resolve() / task / f"{OWN_SPLIT}.jsonl"
        rows = [
            {"context": q.context, "choices": [c[1:] for c in q.choices], "answer": q.answer}
            for q in asked
        ]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        write_atomically(items, "".join(lines))
        names = [metric, *(name for name in METRICS if name != metric)]
        definition = {
            "task": task,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {OWN_SPLIT: str(items)}},
            "output_type": "multiple_choice",
            "test_split": OWN_SPLIT,
            "doc_to_text": "context",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "target_delimiter": " ",
            "num_fewshot": 0,
            "metric_list": [
                {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names
            ],
            "metadata": {"version": 1.0},
        }
        path = items.with_name(f"{task}.yaml")
        write_atomically(path, yaml.safe_dump(definition, sort_keys=False))
        written[task] = path
    return written

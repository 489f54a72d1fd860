"""Downstream tasks through lm-evaluation-harness, scored by ``kelib.score_continuations``.

The harness brings the definitions: prompts, choices, metrics. The log-likelihoods are ours, for the
public tasks and for those made here alike. Needs the extra ``tasks``.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kelib.errors import KelibError, listing
from kelib.scoring import Score, score_continuations
from kelib.task_files import OWN_SPLIT, PUBLIC_TASKS, read_items, task_names


@dataclass(frozen=True)
class TaskResults:
    """Numbers of a model on tasks; no text, so that they may be kept and published.

    items: one row per item, with columns task, item (position in the split), choices (how many),
        answer (index of the right one), correct, margin (score of the right choice minus that of
        the best wrong one, in nats for ``acc`` and in nats per character for ``acc_norm``),
        truncated (context tokens cut on the left, at most over the choices), log_likelihood_0, ...
        (nats, summed over the choice's tokens; missing where an item has fewer choices).
    summary: one row per task, with columns task, metric, split, n (items), accuracy,
        standard_error (of the mean over items; missing for one item), chance (mean of 1 / choices),
        truncated (items with a cut context).
    """

    items: pd.DataFrame
    summary: pd.DataFrame


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    data: Path | str | None = None,
    limit: int | None = None,
    batch_size: int = 128,
    commits: Mapping[str, str] | None = None,
) -> TaskResults:
    """Zero-shot accuracy on multiple-choice tasks, with the paper's metric for each.

    ``tasks``: names of ``kelib.task_files.PUBLIC_TASKS`` (by accuracy of the summed log-likelihood:
    SciQ, WinoGrande, ARC-Easy; by log-likelihood per character: PIQA, HellaSwag, OpenBookQA) and of
    tasks that ``export_questions`` wrote into ``data``. ``data``: a folder with a subfolder
    ``<task>`` of every task and in it a file ``<split>.jsonl`` or ``.json`` in the format of its
    data set; nothing else is read then. Without it the public tasks come from the model hub, PIQA
    as the parquet conversion that lm-eval names (``baber/piqa``: ``datasets`` refuses the script
    of the original). ``limit``: at most so many first items of each task. ``commits``: of the data
    sets of public tasks on the hub, by task; where none is given, what the hub has now is read.

    Splits are lm-eval's: test for SciQ, OpenBookQA, ARC-Easy, validation for the others. WinoGrande
    compares the end of the sentence after each option (lm-eval's partial evaluation). Text is
    encoded without special tokens. Of choices that tie, the first is taken, as lm-eval does
    (``kelib.evaluation`` counts a tie as wrong).

    Raises KelibError: unknown task, a file that is missing or wrong (with line and field), a data
    set that cannot be fetched, lm-eval not installed, or a request that cannot be scored.
    """
    folder = None if data is None else Path(data)
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    _check(names, folder, limit)
    _need_harness()
    from lm_eval.evaluator import evaluate

    with _quiet():
        found = {name: _load(name, folder, (commits or {}).get(name)) for name in names}
        language_model = _language_model(model, tokenizer, batch_size)
        results = evaluate(
            language_model, {"tasks": found}, limit=limit, bootstrap_iters=0, log_samples=True
        )
    rows = [
        _row(found[name], name, sample, language_model.truncated)
        for name in names
        for sample in results["samples"][name]
    ]
    items = pd.DataFrame(rows)
    likelihoods = [f"log_likelihood_{index}" for index in range(items["choices"].max())]
    items = items[[*(name for name in items if name not in likelihoods), *likelihoods]]
    return TaskResults(items, _summarise(items, {name: _metric(found[name]) for name in names}))


def _check(names: list[str], folder: Path | None, limit: int | None) -> None:
    if folder is not None and not folder.is_dir():
        raise KelibError(f"there is no folder {folder}: it must hold a subfolder for every task")
    if not names:
        raise KelibError(f"no task is given; choose from {listing(task_names(folder))}")
    for name in names:
        if name not in task_names(folder):
            raise KelibError(
                f"unknown task {name!r}; choose from {listing(task_names(folder))}, or write own "
                "questions with export_questions into a folder and give that as data"
            )
        if names.count(name) > 1:
            raise KelibError(f"task {name!r} is given {names.count(name)} times; name it once")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise KelibError(f"limit is {limit!r}, must be a whole number from 1 up, or None")


def _need_harness() -> None:
    try:
        import lm_eval.evaluator  # noqa: F401
    except ImportError as error:
        raise KelibError(
            f"the tasks need lm-evaluation-harness ({error}); install kelib with its extra 'tasks'"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No notes of the harness on its own options, and no bars of the data library."""
    import datasets

    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


def _load(name: str, folder: Path | None, commit: str | None = None) -> Any:
    """The task as lm-eval defines it, with its items from ``folder`` or from the hub.

    Local items are handed over in memory: nothing is copied to a cache, no type is guessed anew.
    """
    from lm_eval import tasks

    public = PUBLIC_TASKS.get(name)
    changes: dict[str, Any] = {"task": name, "num_fewshot": 0}
    if public is not None:
        place, split = Path(tasks.__file__).parent / public.folder, public.split
        others = {"training_split", "validation_split", "test_split"} - {f"{split}_split"}
        changes["metric_list"] = [
            {"metric": public.metric, "aggregation": "mean", "higher_is_better": True}
        ]
    else:
        assert folder is not None  # _check: own tasks exist in a folder only
        place, split, others = folder / name, OWN_SPLIT, set()
    if folder is not None:
        rows = read_items(name, folder)

        def given(**_: Any) -> dict[str, Any]:
            from datasets import Dataset

            return {split: Dataset.from_list(rows)}

        changes |= {"custom_dataset": given, **dict.fromkeys(others)}
    elif commit is not None:
        changes["dataset_kwargs"] = {"revision": commit}
    manager = tasks.TaskManager(include_path=str(place), include_defaults=False)
    try:
        loaded = manager.load([{"group": "kelib", "task": [changes]}])
    except (OSError, RuntimeError, ValueError) as error:
        if folder is not None:
            raise
        raise KelibError(
            f"cannot fetch the data set of task {name!r} ({str(error).splitlines()[0]}); connect "
            f"to the model hub, or give as data a folder with {name}/{split}.jsonl"
        ) from error
    return loaded["tasks"][name]


def _metric(task: Any) -> str:
    """The metric that counts: the first of the definition."""
    return task.config.metric_list[0]["metric"]


def _language_model(model: Any, tokenizer: Any, batch_size: int) -> Any:
    """``model`` as an lm-eval model; ``truncated[task, item]`` is filled while it scores."""
    from lm_eval.api.model import LM

    class ScoredByKelib(LM):
        def __init__(self) -> None:
            super().__init__()
            self.truncated: dict[tuple[str, int], int] = {}

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            scores = self._scores(requests)
            for request, score in zip(requests, scores, strict=True):
                key = (request.task_name, request.doc_id)
                self.truncated[key] = max(self.truncated.get(key, 0), score.truncated)
            return [(score.log_probability, score.is_greedy) for score in scores]

        def _scores(self, requests: list[Any]) -> list[Score]:
            pairs = [request.args for request in requests]
            try:
                return score_continuations(model, tokenizer, pairs, batch_size=batch_size)
            except KelibError as error:
                if not (named := re.match(r"request (\d+)\b", str(error))):
                    raise
                which = requests[int(named[1])]
                raise KelibError(
                    f"task {which.task_name!r}, item {which.doc_id}: {error}"
                ) from error

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            raise KelibError("rolling log-likelihood is not offered; use multiple-choice tasks")

        def generate_until(self, requests: list[Any]) -> list[str]:
            raise KelibError("generation is not offered; use multiple-choice tasks")

    return ScoredByKelib()


def _row(task: Any, name: str, sample: dict, truncated: dict[tuple[str, int], int]) -> dict:
    """One item of the table, from what lm-eval kept of it."""
    document, item = sample["doc"], sample["doc_id"]
    choices = task.doc_to_choice(document)
    # WinoGrande: the choice is the context, so the text function gives its index
    answer = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise KelibError(
            f"task {name!r}, item {item}: its answer is {answer!r}, must be an index from 0 to "
            f"{len(choices) - 1}; use a split whose answers are public"
        )
    metric = _metric(task)
    likelihoods = np.array([value for value, _ in sample["filtered_resps"]])
    lengths = [len(choice) for choice in choices] if metric == "acc_norm" else [1] * len(choices)
    scores = likelihoods / lengths
    return {
        "task": name,
        "item": item,
        "choices": len(choices),
        "answer": answer,
        "correct": bool(sample[metric]),
        "margin": float(scores[answer] - np.delete(scores, answer).max()),
        "truncated": truncated[name, item],
        **{f"log_likelihood_{index}": value for index, value in enumerate(likelihoods.tolist())},
    }


def _summarise(items: pd.DataFrame, metrics: dict[str, str]) -> pd.DataFrame:
    rows = []
    for task, metric in metrics.items():
        own = items[items["task"] == task]
        public = PUBLIC_TASKS.get(task)
        rows.append(
            {
                "task": task,
                "metric": metric,
                "split": public.split if public else OWN_SPLIT,
                "n": len(own),
                "accuracy": own["correct"].mean(),
                "standard_error": own["correct"].astype(float).sem(),
                "chance": (1 / own["choices"]).mean(),
                "truncated": int((own["truncated"] > 0).sum()),
            }
        )
    return pd.DataFrame(rows)

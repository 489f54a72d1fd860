"""What a published checkpoint knows, before and after it is continued: run ``known``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from kelib.continued_profile import GENERATED_ENTRIES, WORLD
from kelib.errors import KelibError
from kelib.evaluation import Evaluation, heldout_loss, score_probes, score_questions
from kelib.fetching import checkpoint
from kelib.fictional import load_fictional_knowledge
from kelib.learning_text import heldout_blocks, require_tokenizer
from kelib.pretrained import load_model, quiet, read_tokenizer
from kelib.published_questions import read_questions
from kelib.tasks import evaluate_tasks
from kelib.world import build_world

QUESTIONS = ["task", "item", "choices", "correct", "margin"]


@dataclass(frozen=True)
class Asked:
    """Entries and questions, as :mod:`kelib.evaluation` scores them."""

    once: tuple[Any, ...] = ()
    paraphrase: tuple[Any, ...] = ()
    questions: tuple[Any, ...] = ()


def known(
    settings: Mapping[str, Any], inputs: Mapping[str, Path], folder: Path, progress: Any
) -> None:
    """What a checkpoint knows: probes, questions and the held-out loss, in the files of
    :func:`write_knowledge`.
    """
    with ExitStack() as undo:
        place = checkpoint(settings, inputs, undo)
        undo.enter_context(quiet())
        found, more = knowledge_of(place, settings, inputs)
    write_knowledge(folder, found, more)


def knowledge_of(
    place: Path, settings: Mapping[str, Any], inputs: Mapping[str, Path]
) -> tuple[Evaluation, dict[str, Any]]:
    """Every probe and question, and the loss on held-out text (nats per token), of the model in
    ``place``; and its number of parameters and the device.

    Raises KelibError for a tokenizer, or tokens, that are not the model's.
    """
    require_tokenizer(place, settings, inputs)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _, tokenizer, _ = read_tokenizer(str(place), None)
    model = load_model(str(place), None, torch.float32, head=True).to(device)
    heldout, words = heldout_blocks(inputs["text"]), model.get_input_embeddings().weight.shape[0]
    if (largest := int(heldout.max())) >= words:
        raise KelibError(
            f"the text has token {largest}, {settings['revision']} knows {words}; pack it with the "
            "tokenizer of the model"
        )
    size = settings["score_batch"]
    found = Evaluation(
        score_probes(model, tokenizer, _entries(settings, inputs)),
        _questions(model, tokenizer, settings, inputs),
        {"heldout_domain": heldout_loss(model, heldout, size)},
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return found, {"parameters": parameters, "device": device}


def _entries(settings: Mapping[str, Any], inputs: Mapping[str, Path]) -> Any:
    if settings["entries"] == GENERATED_ENTRIES:
        world = build_world(WORLD, settings["seed"])
        return Asked(world.once, world.paraphrase)
    source = inputs.get("entries", settings["entries"])
    return Asked(*load_fictional_knowledge(source, settings["paraphrase_entries"]))


def _questions(
    model: Any, tokenizer: Any, settings: Mapping[str, Any], inputs: Mapping[str, Path]
) -> pd.DataFrame:
    """Columns :data:`QUESTIONS`, a row each: of generated questions, then of public tasks."""
    generated = [name for name in settings["tasks"] if name.startswith(f"{GENERATED_ENTRIES}:")]
    public = [name for name in settings["tasks"] if name not in generated]
    parts = []
    for name in generated:
        asked: Any = Asked(questions=tuple(read_questions(name, inputs["sources"])))
        scored = score_questions(model, tokenizer, asked)
        choices = [len(question.choices) for question in asked.questions]
        task = scored["task"] if len(generated) == 1 else name + "/" + scored["task"]
        parts.append(scored.assign(task=task, choices=choices))
    if public:
        size, limit = settings["score_batch"], settings["task_limit"]
        options: dict[str, Any] = {"data": inputs.get("tasks"), "limit": limit, "batch_size": size}
        options["commits"] = settings["task_commits"]
        parts.append(evaluate_tasks(model, tokenizer, public, **options).items)
    return pd.concat([part[QUESTIONS] for part in parts], ignore_index=True)


def write_knowledge(folder: Path, found: Evaluation, more: Mapping[str, Any]) -> None:
    """``probes.csv``, ``questions.csv`` and, last, ``result.json``: numbers only."""
    for name, table in (("probes", found.probes), ("questions", found.questions)):
        path = folder / f"{name}.csv"
        table.to_csv(path, index=False, float_format="%.6f", lineterminator="\n")
    by_task = found.questions.groupby("task")["choices"]
    chance = by_task.apply(lambda choices: (1 / choices).mean()).mean()
    note = {**found.summary(), "chance": float(chance), **more}
    (folder / "result.json").write_text(json.dumps(note, indent=1))

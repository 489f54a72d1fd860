"""What a published model knows of real four-way questions, through lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from kelib.errors import KelibError, listing
from kelib.model_import import MODEL, WORLD
from kelib.pretrained import load_model, quiet, read_tokenizer
from kelib.questions import fetch_questions, question_sources
from kelib.task_files import export_questions
from kelib.tasks import evaluate_tasks
from kelib.world import Question, build_world

BATCH = 16  # questions' sequences at once: those of a 135M model fit any machine


def asked(
    settings: Mapping[str, Any],
    inputs: Mapping[str, Path],
    folder: Path,
    progress: Callable[[float], None],
) -> None:
    """Zero-shot accuracy by the log-likelihood per character of each choice, whose lengths differ.

    Writes ``questions.csv`` (:attr:`kelib.tasks.TaskResults.summary`) and ``items.csv``, numbers
    only; the text of the questions stays in the folder of the run.
    """
    export_questions(
        read_questions(settings["questions"], inputs["sources"]), folder / "tasks", "acc_norm"
    )
    names = sorted(path.name for path in (folder / "tasks").iterdir())
    place = str(inputs["model"] / MODEL)
    with quiet():
        _, tokenizer, _ = read_tokenizer(place, None)
        model = load_model(place, None, torch.float32, head=True)
    progress(0.1)
    found = evaluate_tasks(model, tokenizer, names, data=folder / "tasks", batch_size=BATCH)
    for name, table in (("questions", found.summary), ("items", found.items)):
        table.to_csv(folder / f"{name}.csv", index=False, lineterminator="\n")


def read_questions(name: str, folder: Path) -> list[Question]:
    """Questions of a row of ``data/questions.yaml`` (fetched first) or of ``generated:NAME``."""
    if name.startswith("generated:"):
        return list(build_world(WORLD, int.from_bytes(name.encode(), "big") % 2**32).questions)
    known = question_sources()
    if name not in known:
        raise KelibError(f"questions {name!r} must be one of {listing(known)}, or generated:NAME")
    return fetch_questions(known[name], folder)

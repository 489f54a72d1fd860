"""Rows of the group ``learning``: what training, scoring and a grid of runs cost, beside doing
without kelib.

**Training.** Three sides take the same step in float32: forward and backward pass over the same
batches of random tokens, and fused AdamW at a constant rate, each on a copy of the same model.

- ``bare step``: these and nothing else, on tensors that are ready.
- ``Trainer``: ``kelib.training.Trainer`` as runs use it, which also fetches the batch, follows the
  schedule, clips the gradient and keeps the losses, checked every 25 steps and at the end.
- ``transformers' Trainer``: the same with evaluation, saving, logging and reporting off. It also
  fetches, clips and follows a schedule; its set-up is not counted (see ``paced.py``).

**Scoring.** Four-way questions as texts, so that encoding counts: ``score_continuations`` and
``loglikelihood`` of lm-evaluation-harness' ``HFLM`` at the same batch size. Before any clock runs
their scores are compared. The target of the small shape is 60 % of the token bound, how many times
fewer tokens there are to read (see ``questions.py``); the row says how large that is.

**Grid.** Eight pretraining runs through ``kelib.runs.execute`` on two workers, against the ideal:
half of what the same runs take one after another in the process of the case. Workers that are kept
from an earlier call, as from level to level of a study, have started already, as that process has;
new ones import torch and transformers first, some seconds whatever there is to do, which is the
difference between the two. By CPU time the ratio is 2 at best.

Training and the grid run with the allocator that ``kelib.runs`` sets for its workers, all sides.
"""

from __future__ import annotations

import atexit
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from transformers import TrainingArguments

import kelib
from kelib.config import Optimizer, load_profile
from kelib.errors import KelibError
from kelib.runs import KEEP_MEMORY, Run, execute, perform
from kelib.study import Study
from kelib.training import Trainer
from kelib.workers import Workers

from . import entropy
from .entropy import random_batches, random_model
from .questions import described, questions, token_bound, word_tokenizer
from .rows import Comparison, Row, Variant

Settings = Mapping[str, Any]

RATE = 1e-3
CONSTANT = Optimizer(weight_decay=0.1, warmup_share=0.0, final_share=1.0)
MANY = 10**6  # steps of a schedule that no benchmark comes to the end of
PER_TOKEN = 1e-4  # nats by which two scores may differ


def bare(settings: Settings) -> tuple[Any, Callable[[int], None]]:
    """(model, what trains it a number of steps) without any trainer."""
    model = random_model(settings).train()
    batches, steps = random_batches(settings), count()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=RATE,
        betas=CONSTANT.betas,
        weight_decay=CONSTANT.weight_decay,
        fused=True,
    )

    def run(number: int) -> None:
        for _ in range(number):
            ids = batches[next(steps) % len(batches)]["input_ids"]
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return model, run


def ours(settings: Settings) -> tuple[Any, Callable[[int], None]]:
    """The same with kelib's trainer, from blocks as corpora store them."""
    model = random_model(settings)
    blocks = [batch["input_ids"].numpy().astype(np.uint16) for batch in random_batches(settings)]
    trainer = Trainer(
        model,
        lambda step: blocks[step % len(blocks)],
        MANY,
        RATE,
        CONSTANT,
        Accelerator(cpu=True),
    )
    return model, lambda number: trainer.run(trainer.step + number)


def theirs(settings: Settings) -> tuple[Any, Callable[[int], None]]:
    """The same with transformers' trainer."""
    from .paced import PacedTrainer  # a heavy import that no other row needs

    model = random_model(settings)
    rows = torch.cat([batch["input_ids"] for batch in random_batches(settings)])
    arguments = TrainingArguments(
        output_dir=mkdtemp_until_exit(),
        max_steps=MANY,
        per_device_train_batch_size=settings["batch"],
        optim="adamw_torch_fused",
        learning_rate=RATE,
        adam_beta1=CONSTANT.betas[0],
        adam_beta2=CONSTANT.betas[1],
        weight_decay=CONSTANT.weight_decay,
        max_grad_norm=CONSTANT.clip,
        lr_scheduler_type="constant",
        eval_strategy="no",
        save_strategy="no",
        logging_strategy="no",
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    return model, PacedTrainer(model, [{"input_ids": r, "labels": r} for r in rows], arguments).run


def training(settings: Settings) -> dict[str, Variant]:
    """A training step of each side; a variant runs ``steps`` of them."""
    # theirs is first: it sets accelerate up anew, which an accelerator in use would not survive
    sides = {"transformers' Trainer": theirs, "Trainer": ours, "bare step": bare}
    steps = settings["steps"]
    return {
        name: Variant(partial(prepare(settings)[1], steps), steps)
        for name, prepare in sides.items()
    }


def scoring(settings: Settings) -> dict[str, Variant]:
    """Both ways over the same requests; KelibError if they do not give the same scores."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = random_model(settings), word_tokenizer(settings["model"]["vocab_size"])
    requests, size = questions(model, tokenizer, settings), settings["batch"]
    judge = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size, device="cpu")
    asked = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(requests)]
    kelibs = partial(kelib.score_continuations, model, tokenizer, requests, batch_size=size)
    harness = partial(judge.loglikelihood, asked, disable_tqdm=True)
    require_equal(kelibs(), harness())
    return {
        "score_continuations": Variant(kelibs, len(requests)),
        "HFLM": Variant(harness, len(requests)),
    }


def require_equal(scores: Sequence[Any], others: Sequence[tuple[float, bool]]) -> None:
    """KelibError unless log-probabilities agree to 1e-4 nats a token and greedy flags exactly."""
    for number, (score, (value, greedy)) in enumerate(zip(scores, others, strict=True)):
        apart = abs(score.log_probability - value)
        if apart > PER_TOKEN * score.tokens or score.is_greedy != greedy:
            raise KelibError(
                f"request {number}: score_continuations gives {score.log_probability:.6f}, greedy "
                f"{score.is_greedy}, HFLM {value:.6f}, greedy {greedy}; they must agree to "
                f"{PER_TOKEN:g} nats a token: times of different results are no comparison"
            )


def grid(settings: Settings) -> dict[str, Variant]:
    """Pretraining runs of the profile ``smoke`` that differ in their seed and read one corpus.

    A variant does them all in a new folder; the two units of the second make it half its time.
    """
    study = Study(load_profile("smoke", settings["changes"]), Path(mkdtemp_until_exit()))
    model_run = study.pretrain_run(study.profile.seeds[0])
    perform(model_run.inputs["corpus"])

    def runs(folder: str) -> list[Run]:
        return [
            replace(model_run, home=Path(folder), settings={**model_run.settings, "seed": seed})
            for seed in range(settings["runs"])
        ]

    crew = Workers(2)
    atexit.register(crew.end)

    def on(workers: int | Workers) -> None:
        with TemporaryDirectory() as folder:
            execute(runs(folder), workers)

    def in_turn() -> None:
        with TemporaryDirectory() as folder:
            for run in runs(folder):
                perform(run)

    return {
        "2 kept workers": Variant(partial(on, crew)),
        "2 new workers": Variant(partial(on, 2)),
        "ideal": Variant(in_turn, units=2),
    }


def mkdtemp_until_exit() -> str:
    """A temporary folder that is deleted when this process ends."""
    folder = mkdtemp(prefix="kelib-bench-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


SMALL = {**entropy.SMALL, "batch": 32, "batches": 64, "steps": 10}
D512 = {**entropy.D512, "tokens": 128, "batch": 4, "batches": 64, "steps": 1}
TINY = {**entropy.TINY, "model": {**entropy.TINY["model"], "model_type": "olmo"}, "steps": 2}
# Lengths of the questions about the world of `small` in tokens of its vocabulary.
SCORING_SMALL = described(
    {**entropy.SMALL, "batch": 128, "questions": 120, "context": (6, 20), "choice": (2, 6)}
)
SCORING_135M = described(
    {
        **entropy.LLAMA_135M,
        **{"tokens": 256, "batch": 8, "repeats": 3},
        **{"questions": 8, "context": (64, 120), "choice": (2, 6)},
    }
)
SCORING_TINY = described(
    {**entropy.TINY, "tokens": 32, "questions": 12, "context": (9, 20), "choice": (1, 4)}
)
_smoke = load_profile("smoke")
_TRUNK = {"pretraining.optimizer_states": [], "branches": None, "regimes": None}
GRID = {
    "model": {**asdict(_smoke.model), "vocab_size": _smoke.corpus.vocabulary_size},
    "data": f"8 runs of 600 steps x {_smoke.pretraining.batch_size} x "
    f"{_smoke.corpus.sequence_length} tokens",
    **{"runs": 8, "changes": {"pretraining.steps": 600, **_TRUNK}, "repeats": 2},
}


def _training(target: float | None) -> tuple[Comparison, ...]:
    return (
        Comparison("time", "Trainer", "bare step", "<=", 1.10),
        Comparison("time", "Trainer", "transformers' Trainer", "<=", target),
    )


def _scoring(target: float) -> tuple[Comparison, ...]:
    return (Comparison("time", "score_continuations", "HFLM", ">=", target),)


ROWS = (
    Row("training-small", training, _training(None), SMALL, TINY, KEEP_MEMORY),
    Row("training-512", training, _training(1.0), D512, TINY, KEEP_MEMORY),
    Row(
        "scoring-small",
        scoring,
        _scoring(round(0.6 * token_bound(SCORING_SMALL), 2)),
        SCORING_SMALL,
        SCORING_TINY,
    ),
    Row("scoring-135m", scoring, _scoring(2), SCORING_135M, SCORING_TINY),
    Row(
        "grid",
        grid,
        [
            Comparison("time", "2 kept workers", "ideal", "<=", 1.15),
            Comparison("time", "2 new workers", "ideal", "<=", None),
        ],
        GRID,
        {
            "runs": 2,
            "changes": {"pretraining.steps": 2, "pretraining.checkpoints": [1], **_TRUNK},
        },
        KEEP_MEMORY,
    ),
)

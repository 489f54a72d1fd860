"""What a model knows at one moment: probes (K), questions (P) and held-out losses, item by item."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from kelib.batches import block_batches
from kelib.corpus import PackedCorpus
from kelib.metrics import knowledge_by, knowledge_score
from kelib.scoring import score_continuations
from kelib.world import World

CHANCE = 0.25  # four choices, balanced answers
HELDOUT = ("heldout_general", "heldout_domain")


@dataclass(frozen=True)
class Evaluation:
    """Item-level results; no text, so that they may be kept and published.

    probes: columns entry, entry_set, level, probe, log_probability (nats, sum over the target),
        tokens (of the target), padded (of the longest probe of the entry, context included).
    questions: columns task, item, correct, margin (nats, right choice minus best wrong one).
    losses: nats per token on held-out text of each corpus.
    """

    probes: pd.DataFrame
    questions: pd.DataFrame
    losses: dict[str, float]

    def summary(self) -> dict[str, float]:
        """One flat row: k (Eq. 4) and its parts by set and level, k_padded, p and its parts by
        task, losses.
        """
        by_task = self.questions.groupby("task")["correct"].mean()
        row = {"k": knowledge_score(self.probes), "p": float(by_task.mean())}
        # as the authors' code normalises, if a batch is the probes of one entry
        row["k_padded"] = knowledge_score(self.probes, "padded")
        for part in ("entry_set", "level"):
            table = knowledge_by(self.probes, [part]).set_index(part)["knowledge"]
            row |= {f"k_{name}": float(value) for name, value in table.items()}
        row |= {f"p_{task}": float(value) for task, value in by_task.items()}
        row |= {f"loss_{name.removeprefix('heldout_')}": v for name, v in self.losses.items()}
        return row


def evaluate(model: Any, tokenizer: Any, world: World, corpus: PackedCorpus) -> Evaluation:
    """Score every probe and question of the world and the held-out blocks of both corpora.

    A question counts as correct if the right choice has the highest summed log-probability (the
    paper's metric for SciQ, WinoGrande and ARC-Easy; choices here are alike in length). ``p`` is
    the mean over tasks.
    """
    probes, questions = (
        score_probes(model, tokenizer, world),
        score_questions(model, tokenizer, world),
    )
    losses = {name: heldout_loss(model, corpus.blocks[name]) for name in HELDOUT}
    return Evaluation(probes, questions, losses)


def score_probes(model: Any, tokenizer: Any, world: World) -> pd.DataFrame:
    """Log-probability (nats, sum over the target) of every probe of every entry."""
    keys, requests = [], []
    for entry_set, entries in (("once", world.once), ("paraphrase", world.paraphrase)):
        for index, entry in enumerate(entries):
            for number, probe in enumerate(entry.probes):
                keys.append((f"{entry_set}-{index}", entry_set, probe.level, number))
                requests.append((probe.input, probe.target))
    scores = score_continuations(model, tokenizer, requests)
    probes = pd.DataFrame(keys, columns=["entry", "entry_set", "level", "probe"])
    probes["log_probability"] = [score.log_probability for score in scores]
    probes["tokens"] = [score.tokens for score in scores]
    read = probes["tokens"] + [score.context for score in scores]
    probes["padded"] = read.groupby([probes["entry_set"], probes["entry"]]).transform("max")
    return probes


def score_questions(model: Any, tokenizer: Any, world: World) -> pd.DataFrame:
    """Whether every question is answered rightly, and by what margin (nats)."""
    requests = [(q.context, choice) for q in world.questions for choice in q.choices]
    scores = iter(score_continuations(model, tokenizer, requests))
    rows = []
    for item, question in enumerate(world.questions):
        values = np.array([next(scores).log_probability for _ in question.choices])
        margin = values[question.answer] - np.delete(values, question.answer).max()
        rows.append((question.task, item, bool(margin > 0), float(margin)))
    return pd.DataFrame(rows, columns=["task", "item", "correct", "margin"])


@torch.inference_mode()
def heldout_loss(model: Any, blocks: np.ndarray, batch_size: int = 64) -> float:
    """Mean cross-entropy in nats per predicted token over ``blocks`` ``(n, T)``."""
    total, count = 0.0, 0
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        for batch in block_batches(blocks, batch_size):
            ids = batch.to(device)
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            predicted = ids.shape[0] * (ids.shape[1] - 1)
            total += float(loss) * predicted
            count += predicted
    finally:
        model.train(was_training)
    return total / count

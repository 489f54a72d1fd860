"""What the measurements of a run of kind ``mechanism`` are applied to: models before and after
continual learning, batches, states of the optimizer.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from kelib.config import Continual, Training
from kelib.continual import reading_order
from kelib.corpus import PackedCorpus
from kelib.errors import KelibError
from kelib.injection import Injector, encode_passages, injection_schedule
from kelib.sensitivity import Moments, moments_of
from kelib.training import Trainer
from kelib.world import World

DOMAIN_SEQUENCES = 64
WARM_STEPS = 20


@dataclass(frozen=True)
class Setting:
    """What all measurements of a run share. ``after`` is ``model`` after continual learning."""

    model: Any
    after: Any
    tokenizer: Any
    world: World
    packed: PackedCorpus
    plan: Continual
    training: Training
    learning_rate: float
    cl_seed: int

    def read(self, first: int, sequences: int) -> np.ndarray:
        """Domain text in the order of continual learning, from sequence ``first`` on, int64."""
        text, plan = self.packed.blocks["domain"], self.plan
        order = reading_order(len(text), plan.steps * plan.batch_size, 1, self.cl_seed)
        return np.asarray(text[order[first : first + sequences]], dtype=np.int64)

    def batch_at(self, step: int) -> np.ndarray:
        """The batch of a step of continual learning, without passages."""
        return self.read(step * self.plan.batch_size, self.plan.batch_size)


def load_weights(run: Path) -> Any:
    """The model that a run of continual learning kept, float32. KelibError if it kept none."""
    try:
        model = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    except Exception as error:  # transformers raises many kinds for a folder that is no model
        reason = " ".join(str(error).split())
        raise KelibError(
            f"{run} has no weights to look into ({reason}); only injected runs of the protocol "
            "with one of continual.curve_seeds keep theirs: delete the run and make it again"
        ) from error
    return model.eval()


def batches_of(setting: Setting) -> dict[str, dict[str, np.ndarray]]:
    """Token ids and masks by name: ``domain``, ``passages`` (cut at the length of a sequence, as
    continual learning does, and padded) and ``mixed``.
    """
    plan, world = setting.plan, setting.world
    length = setting.packed.blocks["domain"].shape[1]
    entries = {"once": world.once, "paraphrase": world.paraphrase}
    passages = encode_passages(setting.tokenizer, entries)
    schedule = injection_schedule(
        len(world.once),
        len(world.paraphrase),
        plan.injections,
        plan.steps,
        plan.batch_size,
        setting.cl_seed,
        passages,
        length,
    )
    first = int(schedule.loc[schedule["moved"] == 0, "step"].min())
    mixed = Injector(schedule, passages).apply(setting.batch_at(first), first)
    parts = [
        np.asarray(wordings[0][start : start + length])
        for wordings in passages.values()
        for start in range(0, len(wordings[0]), length)
    ]
    ids = np.zeros((len(parts), max(map(len, parts))), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, part in enumerate(parts):
        ids[row, : len(part)], mask[row, : len(part)] = part, 1
    return {
        "domain": {"input_ids": setting.read(0, DOMAIN_SEQUENCES)},
        "passages": {"input_ids": ids, "attention_mask": mask},
        "mixed": {"input_ids": mixed},
    }


def optimizer_states(setting: Setting, kept: Path) -> dict[str, Moments | None]:
    """Moments of AdamW before a step, by name: ``first_step`` none; ``warm_step`` those after 20
    steps of continual learning on domain text alone; ``own_moments`` those with which pretraining
    arrived at the checkpoint, if the file ``kept`` exists. KelibError if it is broken.
    """
    plan, options = setting.plan, dataclasses.asdict(setting.training)

    def trainer() -> Trainer:
        started = copy.deepcopy(setting.model)
        rate = setting.learning_rate
        return Trainer(started, setting.batch_at, plan.steps, rate, plan.optimizer, **options)

    warm = trainer()
    warm.run(until=min(WARM_STEPS, plan.steps))
    states: dict[str, Moments | None] = {"first_step": None}
    states["warm_step"] = moments_of(warm.model, warm.optimizer)
    if kept.exists():
        own = trainer()
        own.load_moments(kept)
        states["own_moments"] = moments_of(own.model, own.optimizer)
    return states

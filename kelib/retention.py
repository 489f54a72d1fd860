"""What is left of new knowledge after as much training on other text: a run of kind ``later``.

Continual learning of the protocol ends with the last passages, so that K right after it says what
was acquired, not how long it lasts. Here the model it left goes on for as many steps, with the same
batch, schedule and peak rate, a fresh optimizer and a reading order of its own, on general text
that pretraining left unread, and without passages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from kelib.config import Continual, Training, convert
from kelib.continual import reading_order
from kelib.corpus import PackedCorpus
from kelib.mechanism_inputs import load_weights
from kelib.training import Trainer

ORDER = 500  # added to the CL seed, so that no order of continual learning comes again
STATE = "state.safetensors"


def go_on(
    settings: Mapping[str, Any],
    inputs: Mapping[str, Path],
    packed: PackedCorpus,
    folder: Path,
    progress: Callable[[float], None],
) -> tuple[Any, Any, list[float]]:
    """(model, tokenizer, training losses in nats per token) after the text ``settings["text"]``.

    Starts from the weights that ``inputs["continual"]`` kept. With ``save_every`` of the plan the
    state stands in ``folder``, and a run that was killed goes on from it. Raises KelibError if no
    weights were kept, if the text has no sequences, and at a loss that is not finite.
    """
    plan = convert(Continual, settings["continual"], "continual")
    options = dataclasses.asdict(convert(Training, settings["training"], "training"))
    model = load_weights(inputs["continual"])
    text, wanted = packed.blocks[settings["text"]], plan.steps * plan.batch_size
    order = reading_order(len(text), wanted, 1, ORDER + settings["cl_seed"])

    def batch_at(step: int) -> np.ndarray:
        return np.asarray(text[order[step * plan.batch_size : (step + 1) * plan.batch_size]])

    rate = settings["learning_rate"]
    trainer = Trainer(model, batch_at, plan.steps, rate, plan.optimizer, **options)
    if (state := folder / STATE).exists():
        trainer.load_state(state)

    def on_step(step: int, _trainer: Trainer) -> None:
        progress(0.9 * step / plan.steps)
        if plan.save_every and step % plan.save_every == 0:
            trainer.save_state(state)

    trainer.run(on_step=on_step)
    state.unlink(missing_ok=True)  # what follows takes seconds
    tokenizer = AutoTokenizer.from_pretrained(packed.tokenizer_folder)
    return model.eval(), tokenizer, trainer.losses

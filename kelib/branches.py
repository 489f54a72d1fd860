"""What a run of kind ``branch`` does: leave pretraining (the trunk) at a checkpoint and go on
another way, with the same weights, moments and next batches.

Late checkpoints differ from early ones in the learning rate they were saved at, and not in entropy
alone. An annealed branch ends every stage at one and the same rate; another weight decay moves the
entropy by other means than time. What trunk and branch share leaves the difference to the branch.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kelib.checkpoints import check_checkpoints, load_checkpoint, save_checkpoint, step_folder
from kelib.config import Optimizer, Pretraining, Training, convert
from kelib.corpus import Mixture, load_corpus
from kelib.errors import KelibError
from kelib.training import Trainer, learning_rate_at

STATE = "state.safetensors"  # what a killed run goes on from
OPTIMIZER = "optimizer.safetensors"  # where pretraining keeps moments, see kelib.jobs
STATE_EVERY = 100  # steps
LAST = 25  # steps that the loss at the end is averaged over


@dataclass(frozen=True)
class Schedule:
    """Steps and rates of a branch as a :class:`kelib.training.Trainer` takes them.

    Step ``i`` of the trainer is step ``first + i`` of the trunk.
    """

    first: int
    steps: int
    peak: float
    optimizer: Optimizer

    def rate_of(self, step: int) -> float:
        """Learning rate of the step that leads to checkpoint ``step`` (of the trunk, from 1)."""
        return learning_rate_at(step - 1 - self.first, self.steps, self.peak, self.optimizer)


def branch_schedule(
    plan: Pretraining,
    start: int,
    end: int,
    weight_decay: float,
    annealed: bool,
    final_share: float | None = None,
) -> Schedule:
    """The schedule from step ``start`` to step ``end`` of the trunk, whose plan is ``plan``.

    Not annealed: that of the trunk with another weight decay. Annealed: ``n = end - start`` steps,
    ``lr(i) = r (f + (1 - f) (1 + cos(pi i / n)) / 2)`` from ``r``, the rate of the trunk's next
    step, towards ``f r``, which is ``final_share`` of the trunk's peak (None: the share that the
    trunk decays to).

    Raises KelibError for steps that pretraining has no text for, and for an annealing that would
    raise the rate.
    """
    if not 0 < start < end <= plan.steps:
        raise KelibError(
            f"a branch from step {start} to step {end} must lie within the {plan.steps} steps that "
            "pretraining has text for: lower branch.steps or begin earlier"
        )
    same = dataclasses.replace(plan.optimizer, weight_decay=weight_decay)
    if not annealed:
        return Schedule(0, plan.steps, plan.learning_rate, same)
    rate = learning_rate_at(start, plan.steps, plan.learning_rate, plan.optimizer)
    share = plan.optimizer.final_share if final_share is None else final_share
    final = share * plan.learning_rate
    if rate < final:
        raise KelibError(
            f"the learning rate of pretraining at step {start} is {rate:g}, it must be at least "
            f"{final:g}, where an annealed branch ends: begin after the warm-up"
        )
    optimizer = dataclasses.replace(same, warmup_share=0.0, final_share=final / rate)
    return Schedule(start, end - start, rate, optimizer)


def branch(
    settings: Mapping[str, Any],
    inputs: Mapping[str, Path],
    folder: Path,
    progress: Callable[[float], None],
) -> None:
    """Train a branch; the folder gets the layout of pretraining: ``stepNNNNNNN`` checkpoints, named
    by the steps of the trunk, at ``settings["kept"]`` and at the end.

    ``losses.json``: nats per token of each step of the branch. ``result.json``: ``rates``, the
    learning rate of the last step before the start and before every checkpoint kept;
    ``learning_rate``, that at the end; ``train_loss``, mean of the last 25 steps. A run that was
    killed goes on from its last state and ends with the same weights.

    Raises KelibError if the trunk kept no moments at ``settings["step"]``, and as
    :func:`branch_schedule` does.
    """
    packed = load_corpus(inputs["corpus"])
    plan = convert(Pretraining, settings["pretraining"], "pretraining")
    start, end, seed = settings["step"], settings["end"], settings["seed"]
    how = (settings[name] for name in ("weight_decay", "annealed", "final_share"))
    schedule = branch_schedule(plan, start, end, *how)
    origin = step_folder(inputs["pretrain"], start)
    model, _ = load_checkpoint(origin, settings["pretrain"])
    if not (origin / OPTIMIZER).exists():
        raise KelibError(
            f"{origin} has no {OPTIMIZER}: a branch begins at one of pretraining.optimizer_states; "
            f"add {start} to them and pretrain again"
        )
    # seed and steps as pretraining has them, so that the batches are the trunk's
    mixture = Mixture.build(packed, settings["facts_share"], plan.steps, plan.batch_size, seed)

    def batch_at(step: int) -> np.ndarray:
        return mixture.batch(schedule.first + step)

    options = dataclasses.asdict(convert(Training, settings["training"], "training"))
    trainer = Trainer(model, batch_at, schedule.steps, schedule.peak, schedule.optimizer, **options)
    state, kept = folder / STATE, sorted({*settings["kept"], end})

    def on_step(done: int, _trainer: Trainer) -> None:
        step = schedule.first + done
        progress((step - start) / (end - start))
        if step in kept:
            trainer.read_losses()  # one that is not finite stops here, before anything is written
            note = {
                "step": step,
                "tokens": step * plan.batch_size * packed.manifest["sequence_length"],
                "parent": f"{settings['pretrain']} {origin.name}",
                "seed": seed,
                "digest": settings["digest"],
            }
            save_checkpoint(model, packed.tokenizer_folder, folder, note)
        if step in kept or (step - start) % STATE_EVERY == 0:
            trainer.save_state(state)

    if state.exists():
        trainer.load_state(state)
        check_checkpoints(folder, [step for step in kept if step <= schedule.first + trainer.step])
    elif settings["annealed"]:
        trainer.load_moments(origin / OPTIMIZER)
    else:
        trainer.load_state(origin / OPTIMIZER)
    trainer.run(until=end - schedule.first, on_step=on_step)
    losses = trainer.losses[start - schedule.first :]
    before = learning_rate_at(start - 1, plan.steps, plan.learning_rate, plan.optimizer)
    rates = {str(step): schedule.rate_of(step) for step in kept}
    found = {
        "learning_rate": rates[str(end)],
        "train_loss": float(np.mean(losses[-LAST:])),
        "rates": {str(start): before, **rates},
    }
    (folder / "losses.json").write_text(json.dumps(losses))
    (folder / "result.json").write_text(json.dumps(found, indent=1))
    state.unlink(missing_ok=True)

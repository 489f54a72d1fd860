"""What one run does, by kind: build a corpus, pretrain, measure a checkpoint, continue from it.

Each function gets the settings of the run, the folders of its inputs and the folder to write into.
That folder becomes visible under its final name only when the function returns (see ``runs.py``),
so a job may leave what it likes there and find it again after a kill.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kelib.config import Continual, Corpus, Model, Pretraining, convert
from kelib.corpus import Mixture, build_corpus, load_corpus, sequence_order
from kelib.world import World, build_world

Settings = Mapping[str, Any]
Inputs = Mapping[str, Path]
Progress = Callable[[float], None]  # share of the job that is done, 0 to 1
STATE = "state.safetensors"


def versions() -> dict[str, str]:
    """Versions that can change a number."""
    from importlib.metadata import version

    names = ("torch", "transformers", "tokenizers", "accelerate", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def corpus(settings: Settings, inputs: Inputs, folder: Path, progress: Progress) -> None:
    """Fetch, split, tokenise and pack the text of one pretraining seed."""
    from kelib import sources

    choice = convert(Corpus, settings["corpus"], "corpus")
    fetched = inputs["sources"]
    for name in (*choice.general, *choice.domain):
        if name in sources.manifest():
            sources.fetch(sources.manifest()[name], fetched)
    build_corpus(choice, settings["seed"], dict(settings["wanted"]), fetched, folder)


def pretrain(settings: Settings, inputs: Inputs, folder: Path, progress: Progress) -> None:
    """Pretrain from scratch; writes ``stepNNNNNNN`` checkpoints and ``losses.json`` (nats per
    token).
    """
    from kelib.checkpoints import new_model, save_checkpoint
    from kelib.training import Trainer

    packed = load_corpus(inputs["corpus"])
    plan = convert(Pretraining, settings["pretraining"], "pretraining")
    shape, seed = convert(Model, settings["model"], "model"), settings["seed"]
    length = packed.manifest["sequence_length"]
    model = new_model(shape, settings["vocabulary_size"], length, seed)
    mixture = Mixture.build(packed, settings["facts_share"], plan.steps, plan.batch_size, seed)
    trainer = Trainer(model, mixture.batch, plan.steps, plan.learning_rate, plan.optimizer)
    state = folder / STATE

    def keep(step: int) -> None:
        trainer.read_losses()  # a loss that is not finite stops here, before anything is written
        note = {
            "step": step,
            "tokens": step * plan.batch_size * length,
            "parent": None,
            "seed": seed,
            "digest": settings["digest"],
            "versions": versions(),
        }
        save_checkpoint(model, packed.tokenizer_folder, folder, note)
        trainer.save_state(state)

    def on_step(step: int, _trainer: Trainer) -> None:
        progress(step / plan.steps)
        if step in plan.checkpoints:
            keep(step)

    if state.exists():
        trainer.load_state(state)
    else:
        keep(0)
    trainer.run(on_step=on_step)
    (folder / "losses.json").write_text(json.dumps(trainer.losses))
    state.unlink()


def _world_of(settings: Settings) -> World:
    return build_world(convert(Corpus, settings["corpus"], "corpus").world, settings["seed"])


def measure(settings: Settings, inputs: Inputs, folder: Path, progress: Progress) -> None:
    """Knowledge entropy, probes, questions and losses of one checkpoint."""
    from kelib.checkpoints import load_checkpoint, step_folder
    from kelib.entropy import measure_entropy
    from kelib.evaluation import block_batches, evaluate

    packed = load_corpus(inputs["corpus"])
    model, tokenizer = load_checkpoint(
        step_folder(inputs["pretrain"], settings["step"]), settings["pretrain"]
    )
    entropy = measure_entropy(
        model, ({"input_ids": b} for b in block_batches(packed.blocks["entropy"]))
    )
    entropy.save(folder / "coefficients.safetensors")
    progress(0.5)
    found = evaluate(model, tokenizer, _world_of(settings), packed)
    _write_items(folder, "", found)
    note = {"parameters": sum(p.numel() for p in model.parameters())}
    note |= {"entropy_nats": entropy.knowledge_entropy.tolist(), "bound_nats": entropy.bound}
    (folder / "result.json").write_text(json.dumps({**note, **found.summary()}, indent=1))


def continual(settings: Settings, inputs: Inputs, folder: Path, progress: Progress) -> None:
    """Continue one checkpoint on domain text, with or without injection, perhaps after an
    intervention.
    """
    from kelib.checkpoints import load_checkpoint, step_folder
    from kelib.entropy import EntropyMeasurement, measure_entropy
    from kelib.evaluation import block_batches, evaluate
    from kelib.injection import Injector, encode_passages, injection_schedule
    from kelib.interventions import resuscitate
    from kelib.training import Trainer

    packed = load_corpus(inputs["corpus"])
    plan = convert(Continual, settings["continual"], "continual")
    model, tokenizer = load_checkpoint(
        step_folder(inputs["pretrain"], settings["step"]), settings["pretrain"]
    )
    world, seed = _world_of(settings), settings["cl_seed"]
    entropy_blocks = packed.blocks["entropy"]
    result: dict[str, Any] = {}
    if settings["intervention"] is not None:
        change = settings["intervention"]
        measured = EntropyMeasurement.load(inputs["measure"] / "coefficients.safetensors")
        model = resuscitate(model, measured.mean_coefficients, change["ratio"], change["factor"])
        before = evaluate(model, tokenizer, world, packed)
        _write_items(folder, "modified_", before)
        woken = measure_entropy(model, ({"input_ids": b} for b in block_batches(entropy_blocks)))
        result["modified"] = before.summary()
        result["modified"]["entropy_nats"] = woken.knowledge_entropy.tolist()

    domain = packed.blocks["domain"]
    order = sequence_order(len(domain), plan.steps * plan.batch_size, 1000 + seed)
    schedule = injection_schedule(
        len(world.once),
        len(world.paraphrase),
        plan.injections,
        plan.steps,
        plan.batch_size,
        seed,
    )
    entries = {"once": world.once, "paraphrase": world.paraphrase}
    if not settings["injected"]:
        schedule = schedule.iloc[:0]
    injector = Injector(schedule, encode_passages(tokenizer, entries))

    def batch_at(step: int) -> np.ndarray:
        rows = order[step * plan.batch_size : (step + 1) * plan.batch_size]
        return injector.apply(np.asarray(domain[rows]), step)

    trainer = Trainer(model, batch_at, plan.steps, settings["learning_rate"], plan.optimizer)
    trainer.run(on_step=lambda step, _: progress(0.9 * step / plan.steps))
    injector.check()

    after = evaluate(model, tokenizer, world, packed)
    _write_items(folder, "after_", after)
    entropy = measure_entropy(model, ({"input_ids": b} for b in block_batches(entropy_blocks)))
    result["after"] = after.summary()
    result["after"]["entropy_nats"] = entropy.knowledge_entropy.tolist()
    result["losses"] = trainer.losses
    (folder / "result.json").write_text(json.dumps(result, indent=1))


def _write_items(folder: Path, prefix: str, found: Any) -> None:
    """Item-level results as CSV; they carry numbers of entries and questions, never their text."""
    tables: dict[str, pd.DataFrame] = {"probes": found.probes, "questions": found.questions}
    for name, table in tables.items():
        table.to_csv(
            folder / f"{prefix}{name}.csv", index=False, float_format="%.6f", lineterminator="\n"
        )

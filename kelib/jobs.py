"""What one run of the study does, by kind: build a corpus, pretrain, measure a checkpoint, continue
from it. Kinds that are not here are functions of other modules, see :data:`kelib.code_table.WORK`.

Each function gets the settings of the run, the folders of its inputs and the folder to write into.
That folder becomes visible under its final name only when the function returns (see ``runs.py``),
so a job may leave what it likes there and find it again after a kill.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kelib.config import Continual, Corpus, Model, Pretraining, Training, convert
from kelib.corpus import Mixture, build_corpus, load_corpus
from kelib.versions import versions
from kelib.world import World, build_world

Settings = Mapping[str, Any]
Inputs = Mapping[str, Path]
Progress = Callable[[float], None]  # share of the job that is done, 0 to 1
STATE = "state.safetensors"
OPTIMIZER = "optimizer.safetensors"  # the same, kept in the folder of a checkpoint


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
    from kelib.checkpoints import check_checkpoints, new_model, save_checkpoint, step_folder
    from kelib.state_files import check_state
    from kelib.training import Trainer

    packed = load_corpus(inputs["corpus"])
    plan = convert(Pretraining, settings["pretraining"], "pretraining")
    shape, seed = convert(Model, settings["model"], "model"), settings["seed"]
    length = packed.manifest["sequence_length"]
    model = new_model(shape, settings["vocabulary_size"], length, seed)
    mixture = Mixture.build(packed, settings["facts_share"], plan.steps, plan.batch_size, seed)
    trainer = Trainer(
        model,
        mixture.batch,
        plan.steps,
        plan.learning_rate,
        plan.optimizer,
        **_training_options(settings),
    )
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
        saved = save_checkpoint(model, packed.tokenizer_folder, folder, note)
        if step in plan.optimizer_states:  # before the state that a killed run resumes from
            trainer.save_state(saved / OPTIMIZER)
        trainer.save_state(state)

    def on_step(step: int, _trainer: Trainer) -> None:
        progress(step / plan.steps)
        if step in plan.checkpoints:
            keep(step)

    if state.exists():
        trainer.load_state(state)
        saved = [0, *(step for step in plan.checkpoints if step <= trainer.step)]
        check_checkpoints(folder, saved)
        for step in set(saved) & set(plan.optimizer_states):
            check_state(step_folder(folder, step) / OPTIMIZER)
    else:
        keep(0)
    trainer.run(on_step=on_step)
    (folder / "losses.json").write_text(json.dumps(trainer.losses))
    state.unlink()


def _training_options(settings: Settings) -> dict[str, Any]:
    return dataclasses.asdict(convert(Training, settings["training"], "training"))


def _world_of(settings: Settings) -> World:
    return build_world(convert(Corpus, settings["corpus"], "corpus").world, settings["seed"])


def entropy(settings: Settings, inputs: Inputs, folder: Path, progress: Progress) -> None:
    """All entropies of one checkpoint: on the pretraining mixture in every definition, and on each
    kind of text; the plasticity panel; with ``converge`` how the estimate depends on |D|.
    """
    from kelib.batches import block_batches
    from kelib.checkpoints import load_checkpoint, step_folder
    from kelib.convergence import convergence
    from kelib.entropy import measure_entropy
    from kelib.panel import plasticity_panel

    packed = load_corpus(inputs["corpus"])
    model, _ = load_checkpoint(
        step_folder(inputs["pretrain"], settings["step"]), settings["pretrain"]
    )

    def measured(blocks: str, **options: Any) -> Any:
        batches = ({"input_ids": batch} for batch in block_batches(packed.blocks[blocks]))
        return measure_entropy(model, batches, uncertainty=True, **options)

    main = measured("entropy", attention=True, next_token=True)
    dataclasses.replace(main, blocks=None).save(folder / "coefficients.safetensors")
    _write_table(plasticity_panel(model, main), folder / "panel.csv")
    progress(0.3)
    tables = [main.table().assign(data="mixture")]
    for definition in ("relu", "contribution"):
        tables.append(measured("entropy", coefficient=definition).table().assign(data="mixture"))
    for kind in ("facts", "general", "domain"):
        if len(packed.blocks[f"entropy_{kind}"]):
            other = measured(f"entropy_{kind}", attention=True, next_token=True)
            tables.append(other.table().assign(data=kind))
    _write_table(pd.concat(tables), folder / "entropies.csv")
    if settings["converge"]:
        _write_table(convergence(measured("convergence")), folder / "convergence.csv")


def evaluate(settings: Settings, inputs: Inputs, folder: Path, progress: Progress) -> None:
    """Probes, questions and held-out losses of one checkpoint."""
    from kelib import evaluation
    from kelib.checkpoints import load_checkpoint, step_folder

    packed = load_corpus(inputs["corpus"])
    model, tokenizer = load_checkpoint(
        step_folder(inputs["pretrain"], settings["step"]), settings["pretrain"]
    )
    found = evaluation.evaluate(model, tokenizer, _world_of(settings), packed)
    _write_items(folder, found)
    note = {"parameters": sum(p.numel() for p in model.parameters())}
    (folder / "result.json").write_text(json.dumps({**note, **found.summary()}, indent=1))


def entities(settings: Settings, inputs: Inputs, folder: Path, progress: Progress) -> None:
    """Nats of every mention of a name, and of the tokens outside, at the checkpoints of ``steps``:
    numbers only.
    """
    from kelib import entities as measured
    from kelib.checkpoints import load_checkpoint, step_folder

    packed, choice = load_corpus(inputs["corpus"]), convert(Corpus, settings["corpus"], "corpus")
    texts = measured.mentions_by_text(packed, choice, inputs["sources"], settings["seed"])
    mentions, outside = [], []
    for done, step in enumerate(settings["steps"], 1):
        model, _ = load_checkpoint(step_folder(inputs["pretrain"], step), settings["pretrain"])
        for data, (blocks, found) in texts.items():
            nats, place = measured.token_nats(model, blocks), {"step": step, "data": data}
            mentions.append(measured.mention_nats(found, nats).assign(**place))
            outside.append({**place, **measured.outside_nats(found, nats)})
        progress(done / len(settings["steps"]))
    _write_table(pd.concat(mentions), folder / "mentions.csv", "%.6f")
    _write_table(pd.DataFrame(outside), folder / "outside.csv", "%.6f")


def intervene(settings: Settings, inputs: Inputs, folder: Path, progress: Progress) -> None:
    """What an intervention alone does to a checkpoint: knowledge, losses, entropy, weights."""
    from kelib.evaluation import evaluate
    from kelib.interventions import describe_change

    packed = load_corpus(inputs["corpus"])
    before, _ = _start({**settings, "intervention": None}, inputs)
    model, tokenizer = _start(settings, inputs)
    found = evaluate(model, tokenizer, _world_of(settings), packed)
    _write_items(folder, found)
    weights = describe_change(before, model)["total"]
    more = {f"weights_{name}": value for name, value in weights.items()}
    _write_result(folder, found, model, packed, more)


def continual(settings: Settings, inputs: Inputs, folder: Path, progress: Progress) -> None:
    """Continue one checkpoint on other text, with or without injection, perhaps after an
    intervention.
    """
    from kelib.checkpoints import step_folder
    from kelib.continual import LearningCurve, reading_order, resume, save
    from kelib.evaluation import evaluate
    from kelib.injection import Injector, encode_passages, injection_schedule
    from kelib.training import Trainer

    packed = load_corpus(inputs["corpus"])
    plan = convert(Continual, settings["continual"], "continual")
    model, tokenizer = _start(settings, inputs)
    world, seed = _world_of(settings), settings["cl_seed"]
    text = packed.blocks[settings["text"]]
    order = reading_order(len(text), plan.steps * plan.batch_size, settings["epochs"], seed)
    passages = encode_passages(tokenizer, {"once": world.once, "paraphrase": world.paraphrase})
    schedule = injection_schedule(
        len(world.once),
        len(world.paraphrase),
        plan.injections,
        plan.steps,
        plan.batch_size,
        seed,
        passages,
        text.shape[1],
    )
    injector = Injector(schedule if settings["injected"] else schedule.iloc[:0], passages)

    def batch_at(step: int) -> np.ndarray:
        rows = order[step * plan.batch_size : (step + 1) * plan.batch_size]
        return injector.apply(np.asarray(text[rows]), step)

    curve = LearningCurve(model, tokenizer, world, schedule) if settings["curve"] else None
    trainer = Trainer(
        model,
        batch_at,
        plan.steps,
        settings["learning_rate"],
        plan.optimizer,
        **_training_options(settings),
    )
    if settings["own_moments"]:
        trainer.load_moments(step_folder(inputs["pretrain"], settings["step"]) / OPTIMIZER)
    state = folder / STATE
    if state.exists():
        resume(state, trainer, injector, curve)

    def on_step(step: int, _trainer: Trainer) -> None:
        progress(0.9 * step / plan.steps)
        if curve is not None:
            curve.on_step(step)
        if plan.save_every and step % plan.save_every == 0:
            save(state, trainer, injector, curve)

    trainer.run(on_step=on_step)
    injector.check()
    _write_table(injector.exposure_table(), folder / "exposures.csv")
    if curve is not None:
        _write_table(curve.table(), folder / "curve.csv")
    after = evaluate(model, tokenizer, world, packed)
    _write_items(folder, after)
    if settings["keep"]:
        model.save_pretrained(folder / "model")
    _write_result(folder, after, model, packed, {"losses": trainer.losses})
    state.unlink(missing_ok=True)


def _start(settings: Settings, inputs: Inputs) -> tuple[Any, Any]:
    """(model, tokenizer) of the checkpoint, changed if the settings name an intervention."""
    from kelib.checkpoints import load_checkpoint, step_folder
    from kelib.interventions import apply_intervention
    from kelib.measurement import EntropyMeasurement

    model, tokenizer = load_checkpoint(
        step_folder(inputs["pretrain"], settings["step"]), settings["pretrain"]
    )
    if (change := settings["intervention"]) is not None:
        measured = EntropyMeasurement.load(inputs["entropy"] / "coefficients.safetensors")
        model = apply_intervention(model, **change, mean_coefficients=measured.mean_coefficients)
    return model, tokenizer


def _write_result(folder: Path, found: Any, model: Any, packed: Any, more: dict[str, Any]) -> None:
    """One flat row about a model: what it knows, its losses and its knowledge entropy."""
    from kelib.batches import block_batches
    from kelib.entropy import measure_entropy

    batches = ({"input_ids": b} for b in block_batches(packed.blocks["entropy"]))
    entropy = float(measure_entropy(model, batches).knowledge_entropy.sum())
    note = {**found.summary(), "entropy": entropy, **more}
    (folder / "result.json").write_text(json.dumps(note, indent=1))


def later(settings: Settings, inputs: Inputs, folder: Path, progress: Progress) -> None:
    """Go on from what continual learning left, on other text and without passages."""
    from kelib import evaluation, retention

    packed = load_corpus(inputs["corpus"])
    model, tokenizer, losses = retention.go_on(settings, inputs, packed, folder, progress)
    found = evaluation.evaluate(model, tokenizer, _world_of(settings), packed)
    _write_items(folder, found)
    _write_result(folder, found, model, packed, {"losses": losses})


def reactivation(settings: Settings, inputs: Inputs, folder: Path, progress: Progress) -> None:
    """What became of the memories that resuscitation wakes, through continual learning."""
    from kelib import reactivation

    checkpoint, _ = _start({**settings, "intervention": None}, inputs)
    before, tokenizer = _start(settings, inputs)
    models = {"checkpoint": checkpoint, "before": before}
    reactivation.reactivation(models, tokenizer, settings, inputs, folder, progress)


def _write_items(folder: Path, found: Any) -> None:
    """Item-level results as CSV; they carry numbers of entries and questions, never their text."""
    _write_table(found.probes, folder / "probes.csv", "%.6f")
    _write_table(found.questions, folder / "questions.csv", "%.6f")


def _write_table(table: pd.DataFrame, path: Path, float_format: str | None = None) -> None:
    table.to_csv(path, index=False, float_format=float_format, lineterminator="\n")

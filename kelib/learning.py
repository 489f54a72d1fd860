"""Continual learning of one checkpoint, by one process or many, that can be interrupted.

``python -m kelib learn PROFILE --model MODEL --corpus CORPUS --out OUT`` takes the protocol (steps,
global batch, rate, injections, precision, micro-batch) from a profile, the text from a folder of
packed sequences, and goes on from a model folder or one of the model hub. Alone it trains in one
process; started by a launcher the processes share every batch, and the result is the same up to
rounding:

    accelerate launch --config_file notebooks/params/launch/ddp.yaml -m kelib learn study …
    torchrun --nproc-per-node 2 -m kelib learn study … --parallel fsdp2

OUT gets ``model/`` (whole weights in safetensors, with the tokenizer), ``exposures.csv``,
``losses.json`` (nats per token) and, last, ``learned.json``. Until then ``state/`` holds what the
run needs to go on, with as many processes as it is started with the next time.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import patch_environment

from kelib.config import load_profile
from kelib.errors import KelibError, listing
from kelib.injection import Injector
from kelib.launching import agreed, launched
from kelib.learning_inputs import Settings, batches, read_sequences, sha256_of
from kelib.pretrained import load_model, locate, read_tokenizer
from kelib.processes import Processes
from kelib.schema import digest
from kelib.sharded_states import load_state, save_state, whole_weights
from kelib.sharding import (
    PARALLEL,
    held_bytes,
    require_bf16,
    share_batch,
    trainer_of,
    wishes_of_launcher,
)
from kelib.tables import write_atomically
from kelib.versions import versions

RESULT = "learned.json"


def learn(
    settings: Settings,
    out: Path,
    *,
    parallel: str | None = None,
    recompute: bool | None = None,
    save_every: int | None = None,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """Train, or go on with a run that was interrupted, and write the folder ``out``; its note.

    Args:
        parallel: ``"ddp"`` (weights whole in every process) or ``"fsdp2"`` (divided); None: as the
            launcher was configured. One process holds all of it in any case.
        recompute: activations, in the backward pass; None: as the launcher was configured.
        save_every: steps between two states; None: as the profile says.
        dtype: of weights, gradients and moments.
        progress: called after each step with the share that is done.

    It joins the other processes itself and leaves them at the end, so that ``notebook_launcher``
    takes it as it is. A run that is done is not run again. Raises KelibError for settings that
    cannot be, for a folder of other settings, and all that the parts refuse.
    """
    with launched() as processes:
        name, done = agreed(processes, lambda: _name(settings, dtype, out), by_first=True)
        if done is not None:
            return done
        plan, training = settings.profile.continual, settings.profile.training
        wished, recomputed = agreed(processes, wishes_of_launcher)
        parallel = wished if parallel is None else parallel
        recompute = recomputed if recompute is None else recompute
        every = plan.save_every if save_every is None else save_every
        _check(parallel, every)
        share, parts = share_batch(plan.batch_size, processes.count, training.micro_batch_size)
        if training.precision == "bf16":
            agreed(processes, lambda: require_bf16(PartialState().device))
        # what the launcher asks of accelerate and transformers is done here, not there
        with patch_environment(accelerate_use_fsdp="false"):
            model, tokenizer, batch_at, injector = _open(settings, processes, dtype)
            trainer = trainer_of(
                parallel,
                model,
                batch_at,
                plan.steps,
                settings.learning_rate,
                plan.optimizer,
                recompute=recompute,
                **dataclasses.asdict(training),
            )
            if (notes := load_state(trainer, out / "state")) is not None:
                _require_same(notes["digest"], name, out / "state")
                injector.load_state_dict(notes["injector"], trainer.step)
            held = _weigh(trainer)

            def on_step(step: int, _trainer: Any) -> None:
                if progress is not None:
                    progress(step / plan.steps)
                if every and step % every == 0 and step < plan.steps:
                    notes = {"digest": name, "injector": injector.state_dict()}
                    save_state(trainer, out / "state", notes)
                    if processes.rank == 0:
                        said = f"step {step} of {plan.steps}, {trainer.losses[-1]:.3f} nats"
                        print(f"{said} per token", flush=True)

            trainer.run(on_step=on_step)
            injector.check()
            device = trainer.accelerator.device
            if device.type == "cuda":
                held["peak"] = torch.cuda.max_memory_allocated(device)
            note = {
                "digest": name,
                "settings": settings.note(),
                "processes": processes.count,
                "parallel": parallel if processes.together else None,
                "sequences_per_process": share,
                "micro_batches": parts,
                "recompute": recompute,
                "parameters": sum(p.numel() for p in trainer.model.parameters()),
                "bytes": processes.agree(None, held),  # by process
                "versions": versions(),
            }
            weights = whole_weights(trainer.accelerator.unwrap_model(trainer.model))

            def write() -> None:
                _write_model(model, weights, tokenizer, out / "model")
                table = injector.exposure_table().to_csv(index=False, lineterminator="\n")
                write_atomically(out / "exposures.csv", table)
                write_atomically(out / "losses.json", json.dumps(trainer.losses))
                write_atomically(out / RESULT, json.dumps(note, indent=1) + "\n")
                shutil.rmtree(out / "state", ignore_errors=True)

            agreed(processes, write, by_first=True)
            return note


def _open(
    settings: Settings, processes: Processes, dtype: torch.dtype
) -> tuple[Any, Any, Callable[[int], np.ndarray], Injector]:
    """(model, tokenizer, batches by step, what puts passages into them)."""

    def find() -> tuple[str, str | None]:
        place, commit = locate(settings.model, None)
        read_tokenizer(place, commit)  # of a hub's model, fetched once
        return place, commit

    def load() -> tuple[Any, Any]:
        return load_model(*place, dtype, head=True), read_tokenizer(*place)[1]

    def read() -> tuple[Callable[[int], np.ndarray], Injector]:
        text = read_sequences(Path(settings.corpus), settings.text)
        words = model.get_input_embeddings().weight.shape[0]
        if (largest := int(text.max())) >= words:
            raise KelibError(
                f"{settings.corpus} has token {largest}, {settings.model} knows {words}; pack the "
                "text with the tokenizer of the model"
            )
        return batches(settings, text, tokenizer)

    place = agreed(processes, find, by_first=True)
    model, tokenizer = agreed(processes, load)
    return model, tokenizer, *agreed(processes, read)


def _check(parallel: str, every: int | None) -> None:
    if parallel not in PARALLEL:
        raise KelibError(f"parallel = {parallel!r} must be one of {listing(PARALLEL)}")
    if every is not None and every < 1:
        raise KelibError(f"save_every = {every} must be at least 1")


def run(arguments: dict[str, Any]) -> None:
    """What ``python -m kelib learn`` does. ``arguments`` are the fields of
    :class:`~kelib.learning_inputs.Settings` (``profile`` by name, with ``parameters``, a mapping of
    its dotted keys to other values; None for a seed or rate: the first of the profile) and the
    arguments of :func:`learn`.
    """
    given = dict(arguments)
    how = {name: given.pop(name) for name in ("parallel", "recompute", "save_every")}
    out = Path(given.pop("out"))
    with launched() as processes:  # so that a refusal is printed once
        profile = load_profile(given.pop("profile"), given.pop("parameters"))
        plan = profile.continual
        first = (profile.seeds[0], plan.seeds[0], plan.learning_rates[0])
        for name, value in zip(("seed", "cl_seed", "learning_rate"), first, strict=True):
            given[name] = value if given[name] is None else given[name]
        note = learn(Settings(profile, **given), out, **how)
        if processes.rank == 0:
            print(f"{out}: {note['parameters']} parameters, {note['processes']} processes")


def _name(settings: Settings, dtype: torch.dtype, out: Path) -> tuple[str, dict[str, Any] | None]:
    """(digest of the run, its note if it is done)."""
    text = sha256_of(Path(settings.corpus), settings.text)
    name, path = digest([{**settings.note(), "corpus": text}, str(dtype)]), out / RESULT
    if not path.exists():
        return name, None
    try:
        note = dict(json.loads(path.read_text()))
        made = str(note["digest"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise KelibError(f"{path} cannot be read ({error!r}); delete {out}") from error
    _require_same(made, name, out)
    return name, note


def _require_same(made: str, wanted: str, folder: Path) -> None:
    if made != wanted:
        raise KelibError(
            f"{folder} is of other settings ({made}, these are {wanted}); choose another folder or "
            "delete it"
        )


def _weigh(trainer: Any) -> dict[str, int]:
    """Filled in the next step, while gradients are there: see :func:`held_bytes`."""
    held: dict[str, int] = {}

    def weigh(*_: Any) -> None:
        held.update(held_bytes(trainer))
        hook.remove()

    hook = trainer.optimizer.register_step_post_hook(weigh)
    return held


def _write_model(model: Any, weights: dict[str, Any], tokenizer: Any, folder: Path) -> None:
    temporary = folder.with_name(f".{folder.name}.tmp")
    for rest in (temporary, folder):
        shutil.rmtree(rest, ignore_errors=True)
    model.save_pretrained(temporary, state_dict=weights)
    tokenizer.save_pretrained(temporary)
    temporary.replace(folder)

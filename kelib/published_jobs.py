"""What a run of a published profile does: measure all entropies of a model on one text."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from kelib import source_text, sources
from kelib.accumulation import Accumulator
from kelib.architectures import feed_forwards
from kelib.batches import block_batches, read_batch
from kelib.convergence import convergence
from kelib.entropy import measure_entropy
from kelib.errors import KelibError, listing
from kelib.evaluation import heldout_loss
from kelib.jackknife import BLOCKS, Sums
from kelib.measurement import EntropyMeasurement
from kelib.model_import import MODEL, generated_documents
from kelib.packing import pack_text
from kelib.pretrained import load_model, quiet, read_tokenizer
from kelib.watching import watch_memories

POOL = 8  # sequences packed for each one drawn, so that few of those drawn share a document


def published(
    settings: Mapping[str, Any],
    inputs: Mapping[str, Path],
    folder: Path,
    progress: Callable[[float], None],
) -> None:
    """All entropies of the model on one text; writes a part of every table, and the sums of the
    first definition as ``coefficients.safetensors``.
    """
    place, length = str(inputs["model"] / MODEL), settings["sequence_length"]
    with quiet():
        window, tokenizer, end = read_tokenizer(place, None)
        if window is not None and length > window:
            raise KelibError(
                f"sequence_length = {length} is beyond the window of the model; at most {window}"
            )
        end = separator(tokenizer, settings["separator"], end)
        documents = read_text(settings["data"], inputs["sources"])
        wanted = settings["sequences"]
        rows = draw_sequences(documents, tokenizer, end, length, wanted, settings["seed"])
        model = load_model(place, None, torch.float32, head=True)
    small = settings["batch_size"]
    loss = heldout_loss(model, rows[: settings["loss_sequences"]], small)
    progress(0.1)
    batches = _reporting(rows, small, progress)
    measured = measure_definitions(model, batches, settings["definitions"])
    main = measured[0]
    dataclasses.replace(main, blocks=None).save(folder / "coefficients.safetensors")
    entropy = pd.concat([one.table() for one in measured], ignore_index=True)
    words = model.get_output_embeddings().weight.shape[0]
    # a row of attention at place t spreads over t tokens at most
    bounds = {"attention": np.log(np.arange(1, length + 1)).mean(), "next_token": np.log(words)}
    entropy["bound_nats"] = entropy["bound_nats"].fillna(entropy["kind"].map(bounds))
    _write(entropy, folder / "entropy.csv")
    _write(totals(measured, entropy), folder / "totals.csv")
    parts = [convergence(one).assign(coefficient=one.coefficient) for one in measured]
    _write(pd.concat(parts), folder / "convergence.csv")
    text = {
        "documents": len(documents),
        "sequences": main.sequences,
        "tokens": main.tokens,
        "loss_sequences": settings["loss_sequences"],
        "loss_nats": loss,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    _write(pd.DataFrame([text]), folder / "texts.csv")
    (folder / "result.json").write_text(json.dumps(text, indent=1))


def measure_definitions(
    model: Any, batches: Iterator[dict[str, Any]], definitions: list[str]
) -> list[EntropyMeasurement]:
    """Knowledge entropy in several definitions of a coefficient from one pass over ``batches``,
    with standard errors; the first measurement also has attention and next-token entropy.
    """
    layers, words = feed_forwards(model), model.get_input_embeddings().weight.shape[0]
    others = [Accumulator(layers, BLOCKS, name, True) for name in definitions[1:]]

    def stream() -> Iterator[dict[str, Any]]:
        first = 0
        for given in batches:
            batch = read_batch(given, first, words)
            assert batch is not None  # packed sequences have no padding
            first += len(batch.lengths)
            for accumulator in others:
                accumulator.begin(batch)
            yield given

    with ExitStack() as undo:
        for accumulator in others:
            relu = accumulator.coefficient == "relu"
            watch = watch_memories(layers, accumulator.add_coefficients, relu=relu)
            undo.enter_context(watch)
        main = measure_entropy(
            model,
            stream(),
            attention=True,
            next_token=True,
            coefficient=definitions[0],
            uncertainty=True,
        )
    found = [main]
    for accumulator in others:
        sums = accumulator.sums()
        found.append(
            EntropyMeasurement(
                coefficient_sums=tuple(total.sum(axis=0) for total in sums.coefficients),
                sequences=main.sequences,
                tokens=main.tokens,
                coefficient=str(accumulator.coefficient),
                blocks=sums,
            )
        )
    return found


def totals(measured: list[EntropyMeasurement], entropy: pd.DataFrame) -> pd.DataFrame:
    """``entropy`` (a row a layer) summed over layers, with the standard error of the sum: errors of
    layers are not independent, so theirs cannot be added.
    """
    keys = ["kind", "coefficient"]
    whole = entropy.groupby(keys, sort=False)[["entropy_nats", "bound_nats"]].sum().reset_index()

    def attention(sums: Sums) -> Any:
        return sum(heads.mean() for heads in sums.attention) / sums.sequences

    errors: dict[tuple[str, str], float] = {}
    for one in measured:
        errors["knowledge", one.coefficient] = one.total_knowledge_entropy_error
        if one.attention_sums:
            errors["attention", one.coefficient] = float(one.standard_error(attention))
            errors["next_token", one.coefficient] = one.next_token_entropy_error
    whole["standard_error"] = [errors[key] for key in zip(*(whole[k] for k in keys), strict=True)]
    return whole.assign(sequences=measured[0].sequences)


def separator(tokenizer: Any, token: str | None, end: int) -> int:
    """Id of the token that follows each document. KelibError if the tokenizer has no such token."""
    if token is None:
        return end
    known = tokenizer.get_vocab()
    if token not in known:
        raise KelibError(
            f"model.separator = {token!r} must be a token of the model, such as one of "
            f"{listing(tokenizer.all_special_tokens)}"
        )
    return int(known[token])


def read_text(name: str, folder: Path) -> list[str]:
    """Documents of a source of ``data/sources.yaml`` (fetched first), ``generated:NAME``, or a
    file or folder. Raises KelibError.
    """
    if name.startswith("generated:"):
        return generated_documents(name)
    known = sources.manifest()
    if name in known:
        sources.fetch(known[name], folder)
        return source_text.documents(name, folder)
    if not Path(name).exists():
        raise KelibError(
            f"unknown source {name!r}: use {listing(known)}, generated:NAME, or a file or folder "
            "that exists"
        )
    return source_text.local_documents(Path(name))


def draw_sequences(
    documents: list[str], tokenizer: Any, end: int, length: int, count: int, seed: int
) -> np.ndarray:
    """Token ids ``(count, length)`` int64, drawn from ``seed``.

    Documents in random order are joined by ``end`` and cut into up to ``8 count`` sequences, of
    which ``count`` are drawn: neighbours share documents, and the jackknife takes sequences as
    independent. Raises KelibError if the text is too short.
    """
    generator = np.random.default_rng([seed, 31])
    shuffled = [documents[i] for i in generator.permutation(len(documents))]
    rows, _ = pack_text(shuffled, tokenizer, end, length, POOL * count)
    if len(rows) < count:
        raise KelibError(
            f"the text gives {len(rows)} sequences of {length} tokens, {count} are wanted; lower "
            "sequences or sequence_length, or take a longer text"
        )
    return rows[generator.permutation(len(rows))[:count]]


def _reporting(
    rows: np.ndarray, size: int, progress: Callable[[float], None]
) -> Iterator[dict[str, Any]]:
    for number, ids in enumerate(block_batches(rows, size)):
        progress(0.1 + 0.9 * number * size / len(rows))
        yield {"input_ids": ids}


def _write(table: pd.DataFrame, path: Path) -> None:
    table.to_csv(path, index=False, float_format="%.12g", lineterminator="\n")

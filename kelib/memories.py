"""Single layers of a published model, memory by memory: what ``00_start_here.ipynb`` shows.

Measured once by ``make memories`` and promoted by ``python -m kelib reference memories``. Committed
are mean coefficients, the coefficients of one sentence of our own, and entropies: no text of others
and no weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from safetensors.numpy import save_file

from kelib.errors import KelibError
from kelib.measurement import EntropyMeasurement
from kelib.published import open_published
from kelib.runs import execute
from kelib.tables import provenance, read_vectors, seal_vectors, write_table
from kelib.temporary import temporary_beside

if TYPE_CHECKING:
    import torch

REFERENCE = "memories"  # folder of data/measurements and of data/reference
SENTENCE = "The key of the old house opens a blue door."  # ours
TEXT, SEQUENCES, LENGTH, BATCH = "wikipedia", 24, 128, 2  # 3,072 tokens
LAYERS = (1, 12, 30)  # counted from 1: the first, the one that depends most on the text, the last
COEFFICIENTS = "coefficients-sentence.safetensors"


def measure_memories(profile: str = "smollm2", layers: Sequence[int] = LAYERS) -> Path:
    """Measure ``layers`` (from 1) of the model of a published profile; returns the folder written.

    ``memories.csv``: layer, memory, ``wikipedia`` (mean coefficient C̄ over 24 sequences of 128
    tokens) and ``sentence`` (over the tokens of :data:`SENTENCE`). ``entropy.csv``: text, and what
    :meth:`EntropyMeasurement.table` has, of every layer. ``tokens.csv``: position, token of the
    sentence. ``coefficients-sentence.safetensors``: by layer the coefficients c, ``(tokens, m)``
    float32. Raises KelibError for a layer that the model has not, and where fetching does.
    """
    from kelib.architectures import feed_forwards
    from kelib.entropy import measure_entropy
    from kelib.model_import import MODEL
    from kelib.pretrained import load_model, quiet, read_tokenizer
    from kelib.published_jobs import draw_sequences, read_text, separator

    study = open_published(profile)
    run, chosen = study.model_run(), study.profile
    execute([run], 1, "model")
    run.check()
    place = str(run.folder / MODEL)
    with quiet():
        import torch

        model = load_model(place, None, torch.float32, head=True)
        _, tokenizer, end = read_tokenizer(place, None)
        end = separator(tokenizer, chosen.model.separator, end)
        documents = read_text(TEXT, study.data / "sources")
        rows = draw_sequences(documents, tokenizer, end, LENGTH, SEQUENCES, chosen.seed)
    there = len(feed_forwards(model))
    if not all(1 <= layer <= there for layer in layers):
        raise KelibError(f"layers = {list(layers)} must lie between 1 and {there}, the model's")
    ids = tokenizer(SENTENCE, add_special_tokens=False, return_tensors="np")["input_ids"]
    batches = ({"input_ids": part} for part in np.array_split(rows, SEQUENCES // BATCH))
    measured = {
        TEXT: measure_entropy(model, batches, uncertainty=True),
        "sentence": measure_entropy(model, [{"input_ids": ids}]),
    }
    parameters = {
        **{"profile": REFERENCE, "model": profile, "layers": list(layers), "sentence": SENTENCE},
        **{"text": TEXT, "sequences": SEQUENCES, "sequence_length": LENGTH, "seed": chosen.seed},
    }
    note = provenance(parameters, [chosen.seed], {"model": run.digest})
    folder = study.data / "measurements" / REFERENCE
    folder.mkdir(parents=True, exist_ok=True)
    _save(_coefficients(model, torch.as_tensor(ids), layers), folder / COEFFICIENTS)
    words = [tokenizer.decode([token]) for token in ids[0]]
    tokens = pd.DataFrame({"position": range(len(words)), "token": words})
    vectors = {"files": seal_vectors([folder / COEFFICIENTS])}
    write_table(tokens, folder / "tokens.csv", note | vectors)
    write_table(_by_memory(measured, layers), folder / "memories.csv", note)
    parts = [one.table().assign(text=name) for name, one in measured.items()]
    write_table(pd.concat(parts, ignore_index=True), folder / "entropy.csv", note)
    return folder


def _by_memory(measured: dict[str, EntropyMeasurement], layers: Sequence[int]) -> pd.DataFrame:
    parts = []
    for layer in layers:
        means = {name: one.mean_coefficients[layer - 1] for name, one in measured.items()}
        part = pd.DataFrame(means)
        parts.append(pd.DataFrame({"layer": layer, "memory": part.index}).join(part))
    return pd.concat(parts, ignore_index=True)


def _coefficients(model: Any, ids: torch.Tensor, layers: Sequence[int]) -> dict[str, np.ndarray]:
    """``layer.N`` -> c, ``(tokens, m)`` float32, of one sequence of token ids."""
    import torch

    from kelib.architectures import feed_forwards
    from kelib.watching import evaluating, watch_coefficients

    found: dict[str, np.ndarray] = {}

    def keep(layer: int, values: torch.Tensor) -> None:
        if layer + 1 in layers:
            found[f"layer.{layer + 1}"] = values.float().numpy().copy()

    watched = watch_coefficients(list(feed_forwards(model)), keep)
    with torch.no_grad(), evaluating(model), watched:
        model(input_ids=ids, use_cache=False)
    return found


def _save(tensors: dict[str, np.ndarray], path: Path) -> None:
    temporary = temporary_beside(path)
    save_file(tensors, temporary)
    temporary.replace(path)


def sentence_coefficients(folder: Path, layer: int) -> np.ndarray:
    """Coefficients c of the sentence in one layer (from 1), ``(tokens, m)`` float32.

    Raises KelibError for a layer that was not measured, and for a file that is not what was
    written.
    """
    known = read_vectors(folder / COEFFICIENTS, "tokens")
    if f"layer.{layer}" not in known:
        there = sorted(int(name.removeprefix("layer.")) for name in known)
        raise KelibError(
            f"layer = {layer} was not measured; {folder.name} has layers {there}; choose one, or "
            "measure it: python -m kelib memories --layers ..."
        )
    return known[f"layer.{layer}"]

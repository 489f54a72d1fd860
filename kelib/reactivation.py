"""What becomes of the memories that resuscitation wakes: a run of kind ``reactivation``.

Algorithm 1 wakes ``idx = {i : C̄_i <= quantile(C̄, p)}`` of every layer. Three questions about
``idx``, asked of the original model, too: is it awake before and after continual learning, does it
take the updates, and does new knowledge rest on it more than old knowledge does?
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from kelib.alternatives import checked_coefficients
from kelib.batches import block_batches
from kelib.config import Corpus, convert
from kelib.corpus import load_corpus
from kelib.decomposition import Rows, dense_layers, row_changes
from kelib.entropy import measure_entropy
from kelib.errors import KelibError
from kelib.evaluation import evaluate
from kelib.measurement import EntropyMeasurement
from kelib.mechanism_inputs import load_weights
from kelib.panel import TAU, dormant_share
from kelib.world import build_world

Vectors = Sequence[np.ndarray]
COLUMNS = ["measure", "when", "of", "layer", "draw", "value"]
TOTAL = -1  # layer of a number about all layers
SCORES = ("k", "k_once", "k_paraphrase", "p", "loss_general", "loss_domain")


def reactivation(
    models: Mapping[str, Any],
    tokenizer: Any,
    settings: Mapping[str, Any],
    inputs: Mapping[str, Path],
    folder: Path,
    progress: Callable[[float], None],
) -> None:
    """The table ``reactivation.csv``: ratio (p of ``idx``), then measure, when, of, layer (-1:
    all), draw (-1: none) and value; see :func:`activity_rows`, :func:`update_rows` and
    :func:`zeroing_rows`.

    ``models`` are the ``checkpoint`` and the model ``before`` continual learning, the same without
    an intervention; the one ``after`` is what ``inputs["continual"]`` kept. A row for every ratio
    of ``settings["ratios"]``. Raises KelibError if no weights were kept.
    """
    packed = load_corpus(inputs["corpus"])
    world = build_world(convert(Corpus, settings["corpus"], "corpus").world, settings["seed"])
    models = {**models, "after": load_weights(inputs["continual"])}
    measured = EntropyMeasurement.load(inputs["entropy"] / "coefficients.safetensors")
    coefficients = {
        when: measure_entropy(
            model, ({"input_ids": batch} for batch in block_batches(packed.blocks["entropy"]))
        ).mean_coefficients
        for when, model in models.items()
    }
    changes = row_changes(models["before"], models["after"])

    def scores(model: Any) -> dict[str, float]:
        found = evaluate(model, tokenizer, world, packed).summary()
        return {name: found[name] for name in SCORES}

    rows = []
    for done, ratio in enumerate(settings["ratios"]):
        woken = [woken_memories(mean, ratio) for mean in measured.mean_coefficients]
        found = activity_rows(coefficients, woken) + update_rows(changes, woken)
        sets = memory_sets(woken, settings["draws"], settings["seed"])
        for place, when in enumerate(("before", "after")):
            progress((done + 0.2 + 0.4 * place) / len(settings["ratios"]))
            found += zeroing_rows(models[when], sets, scores, when)
        rows.append(pd.DataFrame(found, columns=COLUMNS).assign(ratio=ratio))
    table = pd.concat(rows)[["ratio", *COLUMNS]]
    table.to_csv(folder / "reactivation.csv", index=False, lineterminator="\n")


def woken_memories(mean_coefficients: np.ndarray, ratio: float) -> np.ndarray:
    """Whether Algorithm 1 wakes each memory of a layer, ``(m,)`` bool: ``C̄_i <= quantile(C̄, p)``.

    None at ``p = ratio = 0``, as in :func:`kelib.interventions.resuscitation_multipliers`. Raises
    KelibError for p outside [0, 1] and coefficients that are negative or not finite.
    """
    if not 0 <= ratio <= 1:
        raise KelibError(f"resuscitation ratio p = {ratio} must lie between 0 and 1")
    coefficients = checked_coefficients(mean_coefficients)
    return (coefficients <= np.quantile(coefficients, ratio)) & (ratio > 0)


def activity_rows(coefficients: Mapping[str, Vectors], woken: Vectors) -> list[tuple[Any, ...]]:
    """How awake memories are at each time (``when``), per layer and of all layers.

    memory_share: part of the memories that is woken. dormant_share: part of all memories, and of
    the woken ones, that is dormant (:func:`kelib.panel.dormant_share`). activity_share: part of the
    sum of the mean coefficients that woken memories carry. Of all layers: sums over layers divided
    by sums, with dormancy judged inside each layer. NaN for woken ones where there are none.
    """
    rows: list[tuple[Any, ...]] = []
    for when, means in coefficients.items():
        parts = []  # memories, woken, dormant, dormant and woken, activity, activity of woken
        for mean, mask in zip(means, woken, strict=True):
            asleep = len(mask) * dormant_share(mean)
            both = (mean[mask] / mean.mean() <= TAU).sum()  # the same rule, woken ones alone
            parts.append([len(mask), mask.sum(), asleep, both, mean.sum(), mean[mask].sum()])
        for layer, sums in _with_total(parts):
            memories, idx, dormant, both, activity, of_idx = sums
            rows += [
                ("memory_share", when, "woken", layer, -1, idx / memories),
                ("dormant_share", when, "all", layer, -1, dormant / memories),
                ("dormant_share", when, "woken", layer, -1, both / idx if idx else np.nan),
                ("activity_share", when, "woken", layer, -1, of_idx / activity),
            ]
    return rows


def update_rows(changes: Sequence[Rows], woken: Vectors) -> list[tuple[Any, ...]]:
    """Where continual learning changed the weights: of V, up, gate and all three.

    squared_change: ``sum_i ‖Δ_i‖²`` (weight decay included). update_share: the part of it on rows
    of woken memories; an even spread gives the share of memories. NaN where nothing changed.
    """
    rows: list[tuple[Any, ...]] = []
    for part in (*changes[0], "all"):
        parts = []
        for layer, mask in zip(changes, woken, strict=True):
            of_part = list(layer.values()) if part == "all" else [layer[part]]
            squares = np.sum([np.square(norms) for norms in of_part], axis=0)
            parts.append([squares.sum(), squares[mask].sum()])
        for layer_index, (total, of_idx) in _with_total(parts):
            share = of_idx / total if total > 0 else np.nan
            rows.append(("squared_change", "after", part, layer_index, -1, total))
            rows.append(("update_share", "after", part, layer_index, -1, share))
    return rows


def memory_sets(woken: Vectors, draws: int, seed: int) -> list[tuple[str, int, list[np.ndarray]]]:
    """(name, draw, memories of each layer): sets of as many memories a layer as are woken.

    ``nothing``; ``woken``; ``random``, drawn from all memories of the layer, so that by chance a
    part p of them is woken; ``others``, drawn from those that are not woken. Where not more than as
    many others are left (p of a half and above) the set is all of them, and there is one draw.
    Draws are paired: the same ``seed`` and masks give the same sets.
    """
    sets = [
        ("nothing", -1, [np.empty(0, dtype=np.int64) for _ in woken]),
        ("woken", -1, [np.flatnonzero(mask) for mask in woken]),
    ]
    spare = any(mask.sum() < (~mask).sum() for mask in woken)
    for name, count in (("random", draws), ("others", draws if spare else 1)):
        for draw in range(count):
            drawn = []
            for layer, mask in enumerate(woken):
                generator = np.random.default_rng([seed, 47, draw, layer])
                pool = np.arange(len(mask)) if name == "random" else np.flatnonzero(~mask)
                drawn.append(np.sort(generator.permutation(pool)[: mask.sum()]))
            sets.append((name, draw, drawn))
    return sets


def zeroing_rows(
    model: Any,
    sets: Sequence[tuple[str, int, Vectors]],
    scores: Callable[[Any], Mapping[str, float]],
    when: str,
) -> list[tuple[Any, ...]]:
    """``scores`` of ``model`` with the rows of V of each set at 0, and how many those are (zeroed).

    K in nats per target token, P a fraction, losses in nats per token.
    """
    rows: list[tuple[Any, ...]] = []
    for name, draw, memories in sets:
        with zeroed(model, memories):
            found = {**scores(model), "zeroed": sum(map(len, memories))}
        rows += [(measure, when, name, TOTAL, draw, value) for measure, value in found.items()]
    return rows


@contextmanager
def zeroed(model: Any, memories: Vectors) -> Iterator[None]:
    """Inside the block the rows of V named by ``memories`` (indices per layer) are 0.

    After it, even after an exception, they are what they were. Raises KelibError for another number
    of layers, for indices that a layer does not have, and as
    :func:`kelib.decomposition.dense_layers`.
    """
    layers = dense_layers(model)
    if len(layers) != len(memories):
        raise KelibError(
            f"{len(memories)} sets of memories for {len(layers)} layers; give one each"
        )
    for ffn, indices in zip(layers, memories, strict=True):
        if len(indices) and not 0 <= min(indices) <= max(indices) < ffn.memories:
            raise KelibError(
                f"layer {ffn.layer} has memories 0 to {ffn.memories - 1}, not all of "
                f"{min(indices)} to {max(indices)}; choose them from this very model"
            )
    kept = []
    with torch.no_grad():
        for ffn, indices in zip(layers, memories, strict=True):
            values, rows = ffn.values(), torch.as_tensor(indices, dtype=torch.long)
            kept.append((values, rows, values[rows].clone()))
            values[rows] = 0
    try:
        yield
    finally:
        with torch.no_grad():
            for values, rows, before in kept:
                values[rows] = before


def _with_total(parts: list[list[float]]) -> list[tuple[int, list[float]]]:
    return [*enumerate(parts), (TOTAL, [float(sum(column)) for column in zip(*parts, strict=True)])]

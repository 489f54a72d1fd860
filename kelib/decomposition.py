"""Which memories the answer to a probe comes from, and which rows of weights a training changed.

In ``FFN(x) = sum_i c_i(x) v_i`` memory i contributes ``|c_i(x)| ‖v_i‖`` to what a layer adds to the
residual stream where a target token is predicted. Contributions can cancel in the sum of vectors;
their sizes do not show that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import nn

from kelib.architectures import FeedForward, Mixture, _is_conv1d, feed_forwards, trunk_of, unwrap
from kelib.errors import KelibError, listing
from kelib.requests import Request, encode_requests
from kelib.watching import Firing, evaluating, watch_memories

FRACTIONS = (0.5, 0.9)
Rows = Mapping[str, np.ndarray]  # part -> one number per memory, (m,) float64


# --- memories as rows of weights ----------------------------------------------------------------


def dense_layers(model: Any) -> list[FeedForward]:
    """The dense feed-forward layers of ``model``, one a block, fit to be taken apart by memory.

    Raises KelibError for experts, for layers that share a projection (their rows belong to several
    memories) and for weights, named, that hold NaN or infinity.
    """
    layers = feed_forwards(model)
    mixed = [layer.layer for layer in layers if isinstance(layer, Mixture)]
    if mixed:
        raise KelibError(
            f"layer {mixed[0]} of {type(model).__name__} is a mixture of experts; gradients, "
            "contributions and noise by memory are defined for dense feed-forward layers only"
        )
    dense = [layer for layer in layers if isinstance(layer, FeedForward)]
    if len({id(weight_of(ffn, "V")) for ffn in dense}) < len(dense):
        raise KelibError(
            f"layers of {type(model).__name__} share their weights: a row belongs to several "
            "memories, so that nothing can be said of one"
        )
    named = model.named_parameters()
    bad = [name for name, weight in named if not bool(torch.isfinite(weight).all())]
    if bad:
        raise KelibError(
            f"NaN or infinity stands in {listing(bad, 3)}; load a sound checkpoint of this model"
        )
    return dense


def parts_of(ffn: FeedForward) -> tuple[str, ...]:
    """``("V", "up", "gate")`` of a gated layer, ``("V", "up")`` of a plain one, whose K is "up"."""
    return ("V", "up") if ffn.gate is None else ("V", "up", "gate")


def weight_of(ffn: FeedForward, part: str) -> nn.Parameter:
    """The weight that holds ``part``, as the projection stores it."""
    return _projection(ffn, part).weight  # type: ignore[return-value]


def rows_of(ffn: FeedForward, part: str, weight: torch.Tensor) -> torch.Tensor:
    """``weight``, shaped as :func:`weight_of` gives it, as ``(m, hidden)``, row i of memory i.

    A view: the weight itself, its gradient or its change may be given.
    """
    rows = weight if _is_conv1d(_projection(ffn, part)) == (part == "V") else weight.T
    if part == "V" or not ffn.fused:
        return rows
    return rows[: ffn.memories] if part == "gate" else rows[ffn.memories :]


def _projection(ffn: FeedForward, part: str) -> nn.Module:
    found = {"V": ffn.down, "up": ffn.up, "gate": ffn.gate}[part]
    assert found is not None
    return found


def row_changes(before: Any, after: Any, *, decay: float = 0.0) -> tuple[Rows, ...]:
    """Per layer and part, ``‖Δ_i‖`` of the row of every memory between two models of one shape.

    With ``decay`` = learning rate times weight decay of a single step, ``‖Δ_i + decay w_i‖``: the
    update without the shrinking of the weights, which no gradient asks for. Differences are float64
    of the weights as stored, so that what rounding swallowed is not counted.

    Raises KelibError if the models' layers differ in shape, and as :func:`dense_layers`.
    """
    first, second = dense_layers(unwrap(before)), dense_layers(unwrap(after))
    shapes = [
        [(*parts_of(ffn), tuple(ffn.values().shape)) for ffn in layers]
        for layers in (first, second)
    ]
    if shapes[0] != shapes[1]:
        raise KelibError(
            f"the two models differ in their layers ({len(first)} and {len(second)}, or in their "
            "shapes); compare two states of one model"
        )
    changes = []
    for old, new in zip(first, second, strict=True):
        rows = {}
        for part in parts_of(old):
            start, end = (
                rows_of(ffn, part, weight_of(ffn, part)).detach().cpu().double()
                for ffn in (old, new)
            )
            rows[part] = (end - start + decay * start).norm(dim=1).numpy()
        changes.append(rows)
    return tuple(changes)


# --- contributions to probes --------------------------------------------------------------------


@torch.no_grad()
def measure_contributions(
    model: Any, tokenizer: Any, probes: Sequence[tuple[str, str]], *, batch_size: int = 64
) -> tuple[np.ndarray, ...]:
    """What every memory contributes to every probe: per layer ``(probes, m)`` float64.

    Entry (n, i) is the mean of ``|c_i| ‖v_i‖`` over the positions that predict a token of the
    target of probe n, in units of the residual stream; biases have no memory and are left out. A
    probe is (context, target), encoded as :func:`kelib.score_continuations` does. Sequences are
    padded on the right, where causal attention never looks. The model is left as it was.

    Raises KelibError for no probes, probes that cannot be encoded, and as :func:`dense_layers`.
    """
    model = unwrap(model)
    layers, trunk = dense_layers(model), trunk_of(model)
    if not probes:
        raise KelibError("no probes to measure: give (context, target) pairs")
    if batch_size < 1:
        raise KelibError(f"batch_size = {batch_size} must be at least 1")
    embedding = model.get_input_embeddings().weight
    window = int(getattr(model.config, "max_position_embeddings", 2048))
    encoded = encode_requests(tokenizer, probes, window, embedding.shape[0])
    results = [np.zeros((len(encoded), ffn.memories)) for ffn in layers]
    order = sorted(range(len(encoded)), key=lambda index: -len(encoded[index].inputs))
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            ids, places, owners = _rows(encoded, part)
            found: dict[int, torch.Tensor] = {}

            def keep(firing: Firing, places: Any = places, found: Any = found) -> None:
                found[firing.layer] = firing.values[places.to(firing.values.device)]

            with watch_memories(list(layers), keep):
                trunk(input_ids=ids.to(embedding.device), use_cache=False)
            targets = np.array([encoded[index].target for index in part])
            for ffn, result in zip(layers, results, strict=True):
                sizes = found[ffn.layer].cpu().double().abs() * ffn.value_norms().cpu()
                sums = torch.zeros(len(part), ffn.memories, dtype=torch.float64)
                result[part] = sums.index_add_(0, owners, sizes).numpy() / targets[:, None]
    bad = [layer for layer, result in enumerate(results) if not np.isfinite(result).all()]
    if bad:
        raise KelibError(
            f"layer {bad[0]} gives NaN or infinite contributions with finite weights; load the "
            "model in float32"
        )
    return tuple(results)


def _rows(
    encoded: list[Request], part: list[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Padded ids ``(B, T)``, the positions among B T that predict targets, and whose they are."""
    width = max(len(encoded[index].inputs) for index in part)
    ids = torch.zeros(len(part), width, dtype=torch.long)
    places: list[int] = []
    owners: list[int] = []
    for row, index in enumerate(part):
        request = encoded[index]
        read = len(request.inputs)
        ids[row, :read] = torch.tensor(request.inputs)
        places += range(row * width + read - request.target, row * width + read)
        owners += [row] * request.target
    return ids, torch.tensor(places), torch.tensor(owners)


def carriers(contributions: np.ndarray, fraction: float) -> np.ndarray:
    """How many memories carry ``fraction`` of the sum: smallest k whose k largest reach it.

    ``contributions`` ``(..., m)``, none below 0; returns ``(...)`` float64, NaN where the sum is 0.
    A relative 1e-12 is allowed for rounding. Raises KelibError for a fraction outside (0, 1].

    >>> float(carriers(np.array([4.0, 3.0, 2.0, 1.0]), 0.7))
    2.0
    """
    if not 0 < fraction <= 1:
        raise KelibError(f"fraction = {fraction} must lie in (0, 1]: the part of the sum to carry")
    sums = np.cumsum(-np.sort(-np.asarray(contributions, dtype=np.float64), axis=-1), axis=-1)
    total = sums[..., -1:]
    counts = (sums < fraction * total * (1 - 1e-12)).sum(axis=-1) + 1.0
    return np.where(total[..., 0] > 0, counts, math.nan)


def carrier_table(
    contributions: Sequence[np.ndarray], fractions: Sequence[float] = FRACTIONS
) -> pd.DataFrame:
    """One row per layer, probe (its number) and fraction: ``carriers`` and their share of m."""
    rows = []
    for layer, values in enumerate(contributions):
        for fraction in fractions:
            for probe, count in enumerate(carriers(np.atleast_2d(values), fraction)):
                rows.append((layer, probe, fraction, count, count / values.shape[-1]))
    return pd.DataFrame(rows, columns=["layer", "probe", "fraction", "carriers", "carrier_share"])


def overlap_table(
    first: Sequence[np.ndarray],
    second: Sequence[np.ndarray],
    top: float = 0.10,
    *,
    paired: bool = False,
) -> pd.DataFrame:
    """How far two sets of contributions rest on the same memories.

    ``first`` and ``second`` hold an array per layer, ``(probes, m)`` or ``(m,)``: contributions to
    old and to new facts, by one model before and after learning, or on one side the norms of
    :func:`row_changes` (what old facts use against what new facts overwrote). Unpaired, each side
    is the mean over its probes: one row per layer, probe -1. ``paired`` compares probe n with probe
    n: one row per layer and probe.

    Columns: layer, probe; cosine of the two vectors; top (k, the nearest whole number to ``top`` m,
    at least 1); jaccard ``|A ∩ B| / |A ∪ B|`` of the two sets of k largest (among equals the first
    comes first); jaccard_by_chance, its expectation for two random sets of k. NaN for a vector of
    zeros. Raises KelibError for ``top`` outside (0, 1] and shapes that do not fit.
    """
    if not 0 < top <= 1:
        raise KelibError(f"top = {top} must lie in (0, 1]: the part of the memories to compare")
    if len(first) != len(second):
        raise KelibError(f"{len(first)} layers on one side, {len(second)} on the other; one model")
    rows = []
    for layer, pair in enumerate(zip(first, second, strict=True)):
        one, two = (np.atleast_2d(np.asarray(values, dtype=np.float64)) for values in pair)
        if not paired:
            one, two = one.mean(axis=0, keepdims=True), two.mean(axis=0, keepdims=True)
        if one.shape != two.shape:
            raise KelibError(
                f"layer {layer}: {one.shape} on one side, {two.shape} on the other (probes, "
                "memories); measure the same probes in models of one shape"
            )
        k = max(1, round(top * one.shape[1]))
        chance = _jaccard_by_chance(k, one.shape[1])
        for probe, (a, b) in enumerate(zip(one, two, strict=True)):
            size = float(np.linalg.norm(a) * np.linalg.norm(b))
            cosine = float(a @ b) / size if size > 0 else math.nan
            jaccard = _jaccard(a, b, k) if size > 0 else math.nan
            rows.append((layer, probe if paired else -1, cosine, k, jaccard, chance))
    columns = ["layer", "probe", "cosine", "top", "jaccard", "jaccard_by_chance"]
    return pd.DataFrame(rows, columns=columns)


def _jaccard(a: np.ndarray, b: np.ndarray, k: int) -> float:
    sets = [set(np.argsort(-values, kind="stable")[:k].tolist()) for values in (a, b)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def _jaccard_by_chance(k: int, memories: int) -> float:
    common = np.arange(k + 1)
    odds = stats.hypergeom(memories, k, k).pmf(common)
    return float((odds * common / (2 * k - common)).sum())

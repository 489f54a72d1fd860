"""Gradients and optimizer updates per memory vector, against how active the memory is.

For a layer ``FFN(x) = c(x) V`` the gradient of memory vector i is ``∂L/∂v_i = sum_t c_i(t) δ(t)``
with ``δ(t)`` the gradient of the layer's output at token t. A.1 of the paper argues from this that
updates concentrate on memories with large coefficients. Here it is measured, summed over the tokens
of a batch (where gradients can cancel) and after the optimizer (which rescales them).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats

from kelib.architectures import trunk_of, unwrap
from kelib.batches import Batch, read_batch
from kelib.decomposition import Rows, dense_layers, parts_of, rows_of, weight_of
from kelib.errors import KelibError
from kelib.measurement import shannon_entropy
from kelib.watching import evaluating

SHARES = (0.01, 0.05, 0.10)


@dataclass(frozen=True)
class MemoryGradients:
    """What one batch asks of every memory; a tuple holds one ``(m,)`` float64 array per layer.

    Attributes:
        coefficients: ``C̄_i``, mean over the tokens of a sequence, then over sequences, of
            ``|c_i|``: as :func:`kelib.measure_entropy` finds on the same batch.
        attributions: the same mean of ``|c_i(t) ∂ log P / ∂ c_i(t)|`` in nats, ``log P`` being the
            log-probability of the whole sequence t stands in. Neither the size of the batch nor a
            scale moved from K to V changes it.
        norms: per layer and part, the norm of the loss's gradient of row i: ``‖∂L/∂v_i‖``,
            ``‖∂L/∂k_i‖`` (``up``, ``gate``). Biases are left out.
        bounds: ``sum_t |c_i(t)| ‖δ(t)‖``, what ``‖∂L/∂v_i‖`` would be if no token cancelled
            another.
        loss: mean cross-entropy, nats per predicted token.
        predicted: number of predicted tokens.
    """

    coefficients: tuple[np.ndarray, ...]
    attributions: tuple[np.ndarray, ...]
    norms: tuple[Rows, ...]
    bounds: tuple[np.ndarray, ...]
    loss: float
    predicted: int


def measure_gradients(
    model: Any, batch: Any, *, micro_batch_size: int | None = None
) -> MemoryGradients:
    """Gradients of the mean cross-entropy of ``batch`` by memory, see :class:`MemoryGradients`.

    Args:
        model: a causal language model with dense feed-forward layers; without dropout while it is
            measured, and left as it was (mode, gradients, hooks, ``requires_grad``, weights).
        batch: token ids ``(B, T)``, or a mapping with ``input_ids`` and, if there is padding, an
            ``attention_mask``. Predicted is every token that is not the first of its sequence.
        micro_batch_size: sequences run at once, None for all. Sums over them are float64.

    Raises KelibError for a batch without a token to predict, tokens outside the vocabulary, experts
    or layers that share their weights, weights (named) or a loss that are not finite.
    """
    model = unwrap(model)
    layers, read = dense_layers(model), read_tokens(model, batch)
    places = [(layer, part) for layer in range(len(layers)) for part in parts_of(layers[layer])]
    weights = [weight_of(layers[layer], part) for layer, part in places]
    inputs: dict[int, torch.Tensor] = {}
    outputs: dict[int, torch.Tensor] = {}
    sums = [torch.zeros_like(weight, dtype=torch.float64) for weight in weights]
    coefficients, attributions, bounds = (
        [np.zeros(ffn.memories) for ffn in layers] for _ in range(3)
    )
    total, predicted = 0.0, predicted_tokens(read)
    with evaluating(model), _differentiable(weights), torch.enable_grad(), ExitStack() as undo:
        for layer, ffn in enumerate(layers):
            hooks = (partial(_before, inputs, layer), partial(_after, outputs, layer))
            undo.callback(ffn.down.register_forward_pre_hook(hooks[0]).remove)
            undo.callback(ffn.down.register_forward_hook(hooks[1]).remove)
        for part in micro_batches(read, micro_batch_size):
            loss = summed_loss(model, part)
            wanted = [tensors[layer] for tensors in (inputs, outputs) for layer in sorted(inputs)]
            found = torch.autograd.grad(loss, [*weights, *wanted])
            total += float(loss.detach())
            for into, gradient in zip(sums, found, strict=False):
                into += gradient.double()
            of_inputs, of_outputs = found[len(weights) :][: len(layers)], found[-len(layers) :]
            share = part.weights().to(loss.device) / len(read.lengths)
            for layer in range(len(layers)):
                size = inputs[layer].detach().flatten(0, -2).double().abs()
                pull = of_inputs[layer].flatten(0, -2).double().abs()
                push = of_outputs[layer].flatten(0, -2).double().norm(dim=1)
                coefficients[layer] += (share @ size).cpu().numpy()
                attributions[layer] += (share @ (size * pull)).cpu().numpy()
                bounds[layer] += (push @ size).cpu().numpy() / predicted
    if not math.isfinite(total):
        raise KelibError(f"the loss is {total} with finite weights; load the model in float32")
    norms: list[dict[str, np.ndarray]] = [{} for _ in layers]
    for (layer, name), gradient in zip(places, sums, strict=True):
        rows = rows_of(layers[layer], name, gradient / predicted)
        norms[layer][name] = rows.norm(dim=1).cpu().numpy()
    return MemoryGradients(
        tuple(coefficients),
        tuple(attributions),
        tuple(norms),
        tuple(bounds),
        total / predicted,
        predicted,
    )


def layer_table(gradients: MemoryGradients) -> pd.DataFrame:
    """One row per layer: how gradients of V go with coefficients, and how spread they are.

    Columns: layer; memories (m); slope, intercept of ``ln ‖∂L/∂v_i‖`` on ``ln C̄_i`` by least
    squares over the memories where neither is 0 (``left_out`` counts the others); spearman (all
    memories); coherence, the median of ``‖∂L/∂v_i‖ / sum_t |c_i| ‖δ‖`` (1: tokens agree, 0: they
    cancel); entropies in nats, between 0 and ln m (``bound``), of C̄ (``coefficient_entropy``), of
    ``‖∂L/∂v_i‖`` (``gradient_entropy``) and of ``|c_i ∂ log P/∂ c_i|`` (``attribution_entropy``:
    knowledge entropy by gradient attribution). NaN where a quantity is undefined: a constant column
    has no slope or rank correlation, a column of zeros no entropy.
    """
    rows = []
    for layer, (mean, norms, bound) in enumerate(
        zip(gradients.coefficients, gradients.norms, gradients.bounds, strict=True)
    ):
        norm = norms["V"]
        kept = (mean > 0) & (norm > 0)
        slope = intercept = spearman = math.nan
        if len(np.unique(mean[kept])) > 1:
            fit = stats.linregress(np.log(mean[kept]), np.log(norm[kept]))
            slope, intercept = float(fit.slope), float(fit.intercept)
        if np.ptp(mean) > 0 and np.ptp(norm) > 0:
            spearman = float(stats.spearmanr(mean, norm).statistic)
        ratio = norm[bound > 0] / bound[bound > 0]
        rows.append(
            {
                "layer": layer,
                "memories": len(mean),
                "slope": slope,
                "intercept": intercept,
                "left_out": int((~kept).sum()),
                "spearman": spearman,
                "coherence": float(np.median(ratio)) if len(ratio) else math.nan,
                "coefficient_entropy": _entropy(mean),
                "gradient_entropy": _entropy(norm),
                "attribution_entropy": _entropy(gradients.attributions[layer]),
                "bound": math.log(len(mean)),
            }
        )
    return pd.DataFrame(rows)


def share_table(
    gradients: MemoryGradients,
    updates: Mapping[str, Sequence[Rows]] | None = None,
    shares: Sequence[float] = SHARES,
) -> pd.DataFrame:
    """Share of the squared gradients and updates that falls on the top memories of each layer.

    ``updates``: what :func:`kelib.decomposition.row_changes` found, by a name of the caller's, for
    instance ``{"update": row_changes(model, kelib.sensitivity.adamw_step(model, ...))}``. One row
    per layer, quantity ("gradient" and those names), part, ``ranked_by`` ("coefficient": C̄_i,
    "gradient": ``‖∂L/∂v_i‖``) and share; columns
    besides: ``value``, see :func:`top_share`, and ``total``, the sum of squares over all memories
    of the layer, so that parts and layers can be pooled. Raises KelibError for a share outside
    (0, 1] and for updates of another model.
    """
    rows = []
    quantities = {"gradient": gradients.norms, **(updates or {})}
    for name, found in quantities.items():
        sizes = [[len(values) for values in parts.values()] for parts in found]
        if sizes != [[len(v) for v in parts.values()] for parts in gradients.norms]:
            raise KelibError(f"{name} has other layers than the gradients; measure one model")
        for layer, parts in enumerate(found):
            orders = {
                "coefficient": gradients.coefficients[layer],
                "gradient": gradients.norms[layer]["V"],
            }
            for part, norms in parts.items():
                for ranked_by, order in orders.items():
                    for share in shares:
                        value = top_share(norms**2, order, share)
                        key = (layer, name, part, ranked_by, share)
                        rows.append((*key, value, float((norms**2).sum())))
    columns = ["layer", "quantity", "part", "ranked_by", "share", "value", "total"]
    return pd.DataFrame(rows, columns=columns)


def top_share(values: np.ndarray, order: np.ndarray, share: float) -> float:
    """Share of the sum of ``values`` ``(m,)`` held by the ``share m`` memories first in ``order``.

    The largest are first. A memory that is only partly within ``share m`` counts by that part, so
    that equal values give exactly ``share`` whatever m is. Equals keep their order. NaN if the sum
    is 0. Raises KelibError for a share outside (0, 1].

    >>> top_share(np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 2.0, 3.0, 4.0]), 0.5)
    0.7
    """
    if not 0 < share <= 1:
        raise KelibError(f"share = {share} must lie in (0, 1]: the part of the memories to look at")
    ranked = np.asarray(values, dtype=np.float64)[np.argsort(-np.asarray(order), kind="stable")]
    total = float(ranked.sum())
    wanted = share * len(ranked)
    parts = np.clip(wanted - np.arange(len(ranked)), 0, 1)
    return float(ranked @ parts) / total if total > 0 else math.nan


def _entropy(values: np.ndarray) -> float:
    return float(shannon_entropy(values)) if values.sum() > 0 else math.nan


def read_tokens(model: Any, batch: Any) -> Batch:
    """Token ids ``(B, T)`` or a mapping, checked, on the model's device. KelibError if empty."""
    embedding = model.get_input_embeddings().weight
    given = batch if isinstance(batch, Mapping) else {"input_ids": batch}
    read = read_batch(given, 0, embedding.shape[0])
    if read is None or predicted_tokens(read) == 0:
        raise KelibError(
            "the batch holds no token to predict: it needs a sequence of at least 2 tokens"
        )
    return read.to(embedding.device)


def predicted_tokens(batch: Batch) -> int:
    """Tokens that are not the first of their sequence."""
    return sum(length - 1 for length in batch.lengths)


def micro_batches(batch: Batch, size: int | None) -> Iterator[Batch]:
    """``size`` sequences at a time, all at once if None."""
    if size is not None and size < 1:
        raise KelibError(f"micro_batch_size = {size} must be at least 1, or None for all at once")
    for start in range(0, len(batch.lengths), size or len(batch.lengths)):
        rows = slice(start, start + (size or len(batch.lengths)))
        mask = None if batch.mask is None else batch.mask[rows]
        yield Batch(batch.ids[rows], mask, batch.lengths[rows], start)


def summed_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Sum over predicted tokens of ``-log p``, in nats, at least float32."""
    inputs: dict[str, Any] = {"input_ids": batch.ids, "use_cache": False}
    labels = torch.nn.functional.pad(batch.ids, (0, 1), value=-100)[:, 1:]
    if batch.mask is not None:
        inputs["attention_mask"] = batch.mask.long()
        if "position_ids" in inspect.signature(trunk_of(model).forward).parameters:
            inputs["position_ids"] = batch.positions()
        following = torch.nn.functional.pad(batch.mask, (0, 1), value=False)[:, 1:]
        labels = labels.masked_fill(~(batch.mask & following), -100)
    logits = model(**inputs).logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="sum"
    )


@contextmanager
def _differentiable(weights: Sequence[torch.Tensor]) -> Iterator[None]:
    """Frozen weights require gradients while the scope lasts."""
    frozen = [weight for weight in weights if not weight.requires_grad]
    try:
        for weight in frozen:
            weight.requires_grad_(True)
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)


def _before(into: dict[int, torch.Tensor], layer: int, _module: Any, inputs: Any) -> None:
    into[layer] = inputs[0]


def _after(
    into: dict[int, torch.Tensor], layer: int, _module: Any, _inputs: Any, output: Any
) -> None:
    into[layer] = output

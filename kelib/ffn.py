"""The feed-forward layers of a model as memories: where, how active, and a self-test.

``FFN(x) = f(x Kᵀ) V``; row i of V is memory vector ``v_i``, the coefficient of memory i is ``c_i =
f(x Kᵀ)_i``. In a transformers model the coefficients are the input of the projection back to the
hidden size. How that projection is found, and how to name it for an architecture that kelib does
not know, stands in ``kelib.architectures``; how the coefficients are delivered in
``kelib.watching``. Their public names are repeated here.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from kelib.architectures import (
    ACTIVATION_NAMES,
    FeedForward,
    Layer,
    Mixture,
    decoder_layers,
    feed_forwards,
    register_architecture,
    trunk_of,
    unregister_architecture,
    unwrap,
)
from kelib.errors import KelibError
from kelib.watching import Firing, evaluating, watch_coefficients, watch_keys, watch_memories

__all__ = [
    "FeedForward",
    "Firing",
    "Mixture",
    "decoder_layers",
    "evaluating",
    "feed_forwards",
    "register_architecture",
    "self_test",
    "unregister_architecture",
    "watch_coefficients",
    "watch_memories",
]

# Largest relative error that the self-test accepts, by the dtype of the weights.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
HALF_TOLERANCE = 3e-2  # of float16 and bfloat16


@torch.no_grad()
def self_test(model: Any, input_ids: torch.Tensor | None = None) -> np.ndarray:
    """Check on this very model that coefficients times V give its feed-forward layers.

    A few tokens (``input_ids``, ``(B, T)``; default: 2 x 8 arbitrary ones) run through the trunk
    twice, with and without kelib's hooks. Per layer ``c V + b`` (for experts the sum of
    :class:`Mixture`) is computed in float64 and compared with the output that the layer gave
    without hooks; in a gated layer also ``act(gate x) * up x`` with ``c``, where the activation can
    be found, so that gate and up cannot be confused.

    Returns the relative error of each layer, ``(layers,)``, ``‖c V + b - FFN(x)‖ / ‖FFN(x)‖``.
    Raises KelibError if one is above 1e-10 (float64), 1e-4 (float32) or 3e-2 (half precision),
    naming the layer.
    """
    model = unwrap(model)
    layers = feed_forwards(model)
    embedding = model.get_input_embeddings().weight
    if input_ids is None:
        input_ids = torch.arange(16).reshape(2, 8) * 7919 % embedding.shape[0]
    ids, trunk = input_ids.to(embedding.device), trunk_of(model)
    tolerance = TOLERANCE.get(embedding.dtype, HALF_TOLERANCE)
    given: dict[int, torch.Tensor] = {}
    computed: dict[int, torch.Tensor] = {}
    keys: dict[int, dict[str, torch.Tensor]] = {}

    def keep(layer: int, _module: nn.Module, _inputs: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        given[layer] = _exact(first.reshape(-1, first.shape[-1]))

    def add(firing: Firing) -> None:
        layer = by_index[firing.layer]
        product = _output_of(layer, firing)
        total = computed.setdefault(firing.layer, product.new_zeros(ids.numel(), product.shape[1]))
        rows = torch.arange(ids.numel())
        total.index_add_(0, rows if firing.tokens is None else firing.tokens.cpu(), product)
        if isinstance(layer, FeedForward):
            _check_gate(layer, firing.values, keys[firing.layer], tolerance)

    by_index = {layer.layer: layer for layer in layers}
    with evaluating(model):
        with ExitStack() as undo:
            for layer in layers:
                place = layer.place or layer.down  # type: ignore[union-attr]
                undo.callback(place.register_forward_hook(partial(keep, layer.layer)).remove)
            trunk(input_ids=ids, use_cache=False)
        with watch_memories(layers, add), ExitStack() as undo:
            for layer in layers:
                if isinstance(layer, FeedForward):
                    keys[layer.layer] = watch_keys(undo, layer)
            trunk(input_ids=ids, use_cache=False)
    errors = []
    for layer in layers:
        wanted, found = given[layer.layer], computed[layer.layer]
        error = float((found - wanted).norm() / wanted.norm().clamp(min=1e-300))
        if not error <= tolerance:
            raise KelibError(
                f"layer {layer.layer}: coefficients times V differ from the output of the "
                f"feed-forward layer {layer.name} by {error:.1e} of its size; the projections "
                "found are not its memory: name them with kelib.ffn.register_architecture"
            )
        errors.append(error)
    return np.array(errors)


def _exact(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().double()


def _output_of(layer: Layer, firing: Firing) -> torch.Tensor:
    """What the memories that fired add to the output of their layer, ``(n, hidden)`` float64."""
    if isinstance(layer, FeedForward):
        product = _exact(firing.values) @ _exact(layer.values())
        bias = getattr(layer.down, "bias", None)
        return product if bias is None else product + _exact(bias)
    experts, each = layer.experts_shape
    if firing.first < experts * each:
        expert = firing.first // each
        product = _exact(firing.values) @ _exact(layer.expert_values()[expert])
        bias = getattr(layer.experts, "down_proj_bias", None)
        product = product if bias is None else product + _exact(bias[expert])
    else:
        starts = [experts * each]
        for ffn, _ in layer.shared:
            starts.append(starts[-1] + ffn.memories)
        product = _output_of(layer.shared[starts.index(firing.first)][0], firing)
    return product if firing.scale is None else product * _exact(firing.scale)[:, None]


def _check_gate(
    ffn: FeedForward, values: torch.Tensor, keys: dict[str, torch.Tensor], tolerance: float
) -> None:
    """Raise KelibError if ``c`` is not ``act(gate x) * up x``, if the activation is found."""
    found = [getattr(ffn.place, name) for name in ACTIVATION_NAMES if hasattr(ffn.place, name)]
    if ffn.gate is None or not found:
        return
    expected = _exact(found[0](keys["gate"]) * keys["up"]).reshape(values.shape)
    error = float((_exact(values) - expected).norm() / expected.norm().clamp(min=1e-300))
    if not error <= tolerance:
        raise KelibError(
            f"layer {ffn.layer}: the coefficients of {ffn.name} differ from act(gate x) * up x by "
            f"{error:.1e} of their size; gate and up are probably exchanged: name them with "
            "kelib.ffn.register_architecture"
        )

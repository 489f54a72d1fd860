"""Attention entropy (Eq. 3 of the paper) while the model runs, a block of query rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from kelib.errors import KelibError

OnEntropy = Callable[[int, torch.Tensor], None]
# Scores held at once: on a CPU they should stay near the cache, on a GPU fill the device.
CPU_SCORES, GPU_SCORES = 2**18, 2**26
# Added to a score that a query must not see; finite, so that a row may be all hidden.
HIDDEN = -1e30
LOWEST = -80.0


def softmax_entropy_(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Entropy in nats of the softmax over the last axis. Overwrites ``scores``, ``(..., k)``.

    With ``z = scores - max`` it is ``ln sum e^z - sum z e^z / sum e^z``. ``z`` is kept above -80:
    what lies below weighs less than 2e-35, below the rounding of the sum, so that scores of minus
    infinity need no care, and ``exp`` is many times faster on a CPU where its result is not a
    subnormal number or 0.

    Returns the entropy ``(...)``, ``e^z`` ``(..., k)`` and its sum ``(..., 1)``; the softmax is
    their quotient.
    """
    scores.sub_(scores.amax(dim=-1, keepdim=True)).clamp_(min=LOWEST)
    weights = scores.exp()
    total = weights.sum(dim=-1, keepdim=True)
    moment = scores.mul_(weights).sum(dim=-1, keepdim=True)
    return (total.log() - moment / total).squeeze(-1), weights, total


@contextmanager
def watch_attention(model: Any, on_entropy: OnEntropy) -> Iterator[None]:
    """Call ``on_entropy(layer, entropy)`` for every attention layer while the scope lasts.

    ``entropy`` is ``(B, heads, T)`` in nats: ``-sum_i A_ji ln A_ji`` of every query position j (Eq.
    3), in float32 or, for a float64 model, float64. Layers are counted in the order in which they
    first run.

    While the scope lasts, the model's attention runs through a function of kelib that is registered
    in transformers' AttentionInterface together with SDPA's mask function (without one the mask
    would be lost). It computes output and entropy from the same block of query rows, in float32 at
    least, and handles grouped keys, masks, sliding windows, scaling and soft-capping. Afterwards
    the registration and the model's configuration are as before, also after an exception.

    Raises KelibError in the forward pass of an attention with sinks or a position bias, whose
    entropy Eq. 3 does not define.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    chosen = {
        key: config._attn_implementation_internal
        for key, config in configs.items()
        if hasattr(config, "_attn_implementation_internal")
    }
    order: dict[int, int] = {}
    name = f"kelib_entropy_{id(order):x}"

    def attend(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        is_causal: bool | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        for unknown in ("position_bias", "s_aux"):
            if others.get(unknown) is not None:
                raise KelibError(
                    f"{type(module).__name__} uses {unknown}: attention entropy (Eq. 3) is not "
                    "defined for it; measure without attention=True"
                )
        layer = order.setdefault(id(module), len(order))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        output, entropy = _attend(query, key, value, attention_mask, scale, softcap, bool(causal))
        on_entropy(layer, entropy)
        return output, None

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, sdpa_mask)
    try:
        for key in chosen:
            configs[key]._attn_implementation_internal = name
        yield
    finally:
        for key, implementation in chosen.items():
            configs[key]._attn_implementation_internal = implementation
        AttentionInterface._global_mapping.pop(name, None)
        AttentionMaskInterface._global_mapping.pop(name, None)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output ``(B, T, heads, size)`` and entropy ``(B, heads, T)`` of one attention layer.

    ``query`` is ``(B, heads, T, size)``, keys and values have as many heads or a divisor of it.
    """
    batch, heads, length, _ = query.shape
    kind = torch.promote_types(query.dtype, torch.float32)
    output = query.new_empty(batch, length, heads, value.shape[-1])
    entropy = query.new_empty(batch, heads, length, dtype=kind)
    at_once = max(1, (CPU_SCORES if query.device.type == "cpu" else GPU_SCORES) // (heads * length))
    sequences = max(1, at_once // length)
    rows = min(length, max(16, at_once // sequences))
    for first in range(0, batch, sequences):
        part = slice(first, first + sequences)
        keys, values = key[part].to(kind).transpose(-1, -2), value[part].to(kind)
        for start in range(0, length, rows):
            block = slice(start, start + rows)
            allowed = None if mask is None else mask[part, :, block]
            scores = _scores(
                query[part, :, block].to(kind) * scale, keys, allowed, softcap, start, causal
            )
            found, weights, total = softmax_entropy_(scores)
            # grouped heads share keys: (B, key heads, group, rows, ...) is (B, heads, rows, ...)
            entropy[part, :, block] = found.flatten(1, 2)
            mixed = weights.flatten(2, 3) @ values[:, :, : weights.shape[-1]]
            mixed = mixed.view(*weights.shape[:-1], -1).div_(total)
            output[part, block] = mixed.flatten(1, 2).transpose(1, 2).to(output.dtype)
    return output, entropy


def _scores(
    query: torch.Tensor,
    keys: torch.Tensor,
    allowed: torch.Tensor | None,
    softcap: float | None,
    start: int,
    causal: bool,
) -> torch.Tensor:
    """Scores of a block of query rows, ``(B, key heads, group, rows, keys)``.

    Keys after the block's last row are left out where the block may not see them.
    """
    batch, heads, rows, size = query.shape
    groups, stop = keys.shape[1], start + rows
    hidden_ahead = causal and allowed is None
    if allowed is not None and allowed.dtype == torch.bool:
        hidden_ahead = not bool(allowed[..., stop:].any())
    end = stop if hidden_ahead else keys.shape[-1]
    grouped = query.reshape(batch, groups, heads // groups * rows, size)
    scores = (grouped @ keys[..., :end]).view(batch, groups, heads // groups, rows, end)
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    if allowed is not None:
        bias = allowed[..., :end]
        if bias.dtype == torch.bool:
            # adding is many times faster than filling, and one mask serves all heads
            bias = torch.zeros_like(bias, dtype=scores.dtype).masked_fill_(~bias, HIDDEN)
        bias = bias.unsqueeze(1) if bias.shape[1] == 1 else bias.reshape(scores.shape)
        scores.add_(bias.clamp(min=HIDDEN))
    elif causal:
        ahead = torch.full((rows, rows), HIDDEN, dtype=scores.dtype, device=scores.device)
        scores[..., start:].add_(ahead.triu_(1))
    return scores

"""Resuscitation (Algorithm 1): a model in, another model out, the input untouched."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from kelib.errors import KelibError
from kelib.ffn import feed_forwards


def resuscitation_multipliers(
    mean_coefficients: np.ndarray, ratio: float, factor: float
) -> np.ndarray:
    """Multiplier of each memory of one layer, ``(m,)`` float64: 1 for those left alone.

    ``idx = {i : C̄_i <= quantile(C̄, p)}`` and ``u_i = q mean(C̄) / C̄_i`` for ``i`` in ``idx``
    (Algorithm 1, p = ``ratio``, q = ``factor``; linear quantile). ``p = 0`` changes nothing: the
    paper's ``<=`` would still take the smallest coefficient. Raises KelibError for p outside [0,
    1], q <= 0, coefficients that are negative or not finite, and for a woken memory whose
    coefficient is 0, which no finite multiplier can wake.
    """
    if not 0 <= ratio <= 1:
        raise KelibError(f"resuscitation ratio p = {ratio} must lie between 0 and 1")
    if not (factor > 0 and np.isfinite(factor)):
        raise KelibError(f"amplifying factor q = {factor} must be finite and above 0")
    coefficients = np.asarray(mean_coefficients, dtype=np.float64)
    if not np.isfinite(coefficients).all() or (coefficients < 0).any():
        raise KelibError(
            "mean coefficients must be finite and not negative; measure the model again"
        )
    if ratio == 0:
        return np.ones_like(coefficients)
    woken = coefficients <= np.quantile(coefficients, ratio)
    # so small that the multiplier overflows is as good as 0
    wanted = factor * coefficients.mean()
    dead = int((woken & (coefficients <= wanted / np.finfo(np.float32).max)).sum())
    if dead:
        raise KelibError(
            f"{dead} memories have a mean coefficient of 0, so that no multiplier can wake them; "
            "measure on more text, or use an intervention that resets weights"
        )
    safe = np.where(woken, coefficients, 1.0)
    return np.where(woken, wanted / safe, 1.0)


def resuscitate(
    model: Any, mean_coefficients: Sequence[np.ndarray], ratio: float, factor: float
) -> Any:
    """A new model in which the least active memories of every layer are scaled up (Algorithm 1).

    The rows ``idx`` of the up projection are multiplied by ``u``. In a gated layer (OLMo, Llama)
    this multiplies exactly those coefficients by ``u``; behind a GELU or ReLU with a bias it does
    not (the paper defines it on OLMo only), and kelib refuses those models here.

    Args:
        mean_coefficients: per layer ``(m,)``, as :func:`kelib.measure_entropy` returns them.

    Raises KelibError where :func:`resuscitation_multipliers` does, if vectors and layers do not
    fit, and for a model whose feed-forward layers are not gated, or share one up projection.
    """
    changed = copy.deepcopy(model)
    layers = feed_forwards(changed)
    if len(layers) != len(mean_coefficients):
        raise KelibError(
            f"{len(mean_coefficients)} coefficient vectors for a model of {len(layers)} layers; "
            "measure this very model"
        )
    if len({id(ffn.up.weight) for ffn in layers}) < len(layers):
        raise KelibError(
            f"layers of {type(model).__name__} share an up projection: one cannot be scaled alone"
        )
    for ffn, coefficients in zip(layers, mean_coefficients, strict=True):
        if len(coefficients) != ffn.memories:
            raise KelibError(
                f"layer {ffn.layer} has {ffn.memories} memories, its coefficient vector has "
                f"{len(coefficients)}; measure this very model"
            )
        if ffn.gate is None:
            raise KelibError(
                f"layer {ffn.layer} of {type(model).__name__} is not gated: scaling its up "
                "projection does not "
                "scale its coefficients"
            )
        multipliers = resuscitation_multipliers(coefficients, ratio, factor)
        rows = ffn.up_rows()
        with torch.no_grad():
            rows.mul_(torch.as_tensor(multipliers, dtype=rows.dtype, device=rows.device)[:, None])
            if getattr(ffn.up, "bias", None) is not None:
                bias = ffn.up.bias
                bias.mul_(torch.as_tensor(multipliers, dtype=bias.dtype, device=bias.device))  # type: ignore
    return changed

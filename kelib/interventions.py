"""Interventions on the memories of a model: a model in, another model out, the input untouched.

Resuscitation (Algorithm 1) and the controls with the same multipliers stand here, the attention
temperature and remedies from the plasticity literature in ``kelib.alternatives``. All are reached
by name through :func:`apply_intervention`; :func:`describe_change` says what they did to weights.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from kelib.alternatives import (
    ALTERNATIVES,
    checked_coefficients,
    checked_layers,
    key_parts,
    require_own,
    seeded,
)
from kelib.architectures import FeedForward, unwrap
from kelib.errors import KelibError, listing
from kelib.ffn import feed_forwards
from kelib.panel import _matrices

Vectors = Sequence[np.ndarray]
Arrange = Callable[[FeedForward, np.ndarray, np.ndarray], np.ndarray]
ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")  # names in configurations


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
    coefficients = checked_coefficients(mean_coefficients)
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
    model: Any, mean_coefficients: Vectors, ratio: float, factor: float, *, plain: bool = False
) -> Any:
    """A new model in which the least active memories of every layer are scaled up (Algorithm 1).

    The rows ``idx`` of the up projection (and of its bias) are multiplied by ``u``. In a gated
    layer (OLMo, Llama) this multiplies exactly those coefficients by ``u``. In a layer without a
    gate it multiplies what goes into the activation: the same behind a ReLU, not behind a GELU. The
    paper defines it on OLMo only; kelib does it to such layers with ``plain=True`` only. What acts
    on the output as ``u`` times the coefficients would, always, is :func:`scale_value`.

    Args:
        mean_coefficients: per layer ``(m,)``, as :func:`kelib.measure_entropy` returns them.

    Raises KelibError where :func:`resuscitation_multipliers` does, if vectors and layers do not
    fit, for experts, for an up projection that is shared, and (without ``plain``) a missing gate.
    """
    return _scale(model, mean_coefficients, ratio, factor, plain)


def resuscitate_preserving(
    model: Any, mean_coefficients: Vectors, ratio: float, factor: float
) -> Any:
    """The same ``u`` on the rows of K (up projection), ``1/u`` on those of V: the same function.

    Every ``c_i v_i`` and so every output stays the same to rounding, while woken coefficients are
    multiplied by ``u``: entropy changes under ``"absolute"``, not under ``"contribution"``. The
    gradient of ``v_i`` becomes ``u_i`` times as large. Holds in gated layers and behind a ReLU;
    raises KelibError for other layers, and where :func:`resuscitate` does.
    """
    relu = any(getattr(unwrap(model).config, name, None) == "relu" for name in ACTIVATIONS)
    for ffn in feed_forwards(model):
        if ffn.gate is None and not relu:
            raise KelibError(
                f"layer {ffn.layer} of {type(model).__name__} is not gated and its activation is "
                "not ReLU: no scaling of K and V leaves its output as it is"
            )
    return _scale(model, mean_coefficients, ratio, factor, True, on_value=-1)


def resuscitate_random(
    model: Any,
    mean_coefficients: Vectors,
    ratio: float,
    factor: float,
    *,
    seed: int,
    plain: bool = False,
) -> Any:
    """Control: the multipliers of Algorithm 1, shuffled among all memories of each layer.

    They are drawn on the CPU from ``seed``: the same on any device.
    """
    generator = seeded(seed)

    def shuffled(_ffn: FeedForward, _mean: np.ndarray, multipliers: np.ndarray) -> np.ndarray:
        return multipliers[torch.randperm(len(multipliers), generator=generator).numpy()]

    return _scale(model, mean_coefficients, ratio, factor, plain, arrange=shuffled)


def resuscitate_top(
    model: Any, mean_coefficients: Vectors, ratio: float, factor: float, *, plain: bool = False
) -> Any:
    """Control: the multipliers of Algorithm 1, given to as many of the most active memories.

    Mirrored: the j-th largest coefficient gets the multiplier of the j-th smallest.
    """

    def mirrored(_ffn: FeedForward, mean: np.ndarray, multipliers: np.ndarray) -> np.ndarray:
        order, result = np.argsort(mean, kind="stable"), np.empty_like(multipliers)
        result[order[::-1]] = multipliers[order]
        return result

    return _scale(model, mean_coefficients, ratio, factor, plain, arrange=mirrored)


def uniform_gain(
    model: Any, mean_coefficients: Vectors, ratio: float, factor: float, *, plain: bool = False
) -> Any:
    """Control: one gain for all rows of K of a layer, with the norm that Algorithm 1 would give it.

    ``g = ‖u K‖_F / ‖K‖_F`` with ``u K`` the up projection after :func:`resuscitate`: the norm of
    every layer's K changes as there, the shares of its memories (in a gated layer) do not.
    """

    def gain(ffn: FeedForward, _mean: np.ndarray, multipliers: np.ndarray) -> np.ndarray:
        norms = ffn.up_rows().detach().cpu().double().norm(dim=1).numpy()
        before, after = np.linalg.norm(norms), np.linalg.norm(multipliers * norms)
        return np.full_like(multipliers, after / before if before > 0 else 1.0)

    return _scale(model, mean_coefficients, ratio, factor, plain, arrange=gain)


def scale_value(model: Any, mean_coefficients: Vectors, ratio: float, factor: float) -> Any:
    """Control: ``u`` on the rows of V (columns of the down projection) instead of those of K.

    The output is that of coefficients times ``u`` whatever the activation, so in gated layers that
    of :func:`resuscitate`. The coefficients of the first layer stay (later ones see other inputs).
    """
    return _scale(model, mean_coefficients, ratio, factor, True, on_key=0, on_value=1)


SCALINGS = (resuscitate, resuscitate_preserving, resuscitate_random)
CONTROLS = (resuscitate_top, uniform_gain, scale_value)
INTERVENTIONS: dict[str, Callable[..., Any]] = {
    intervention.__name__: intervention for intervention in (*SCALINGS, *CONTROLS, *ALTERNATIVES)
}


def apply_intervention(
    model: Any,
    name: str,
    mean_coefficients: Vectors | None = None,
    *,
    measured_digest: str | None = None,
    **settings: Any,
) -> Any:
    """A new model, changed by the intervention ``name``; ``model`` is left as it is.

    Args:
        mean_coefficients: per layer ``(m,)``; None where the intervention does not look at them.
        measured_digest: :func:`model_digest` of the model that was measured; if it is given,
            coefficients of another model or step are refused.
        settings: those of the intervention, by name.

    Raises KelibError for an unknown name, for settings unknown or missing, for coefficients of
    another model, and where the intervention does.
    """
    if name not in INTERVENTIONS:
        raise KelibError(f"intervention {name!r} must be one of {listing(INTERVENTIONS, 99)}")
    parameters = dict(inspect.signature(INTERVENTIONS[name]).parameters)
    parameters.pop("model")
    needs_coefficients = parameters.pop("mean_coefficients").default is inspect.Parameter.empty
    if unknown := set(settings) - set(parameters):
        raise KelibError(
            f"intervention {name} has no setting {listing(unknown)}; it has {listing(parameters)}"
        )
    required = {n for n, p in parameters.items() if p.default is inspect.Parameter.empty}
    if missing := required - set(settings):
        raise KelibError(f"intervention {name} needs the setting {listing(missing)}")
    if mean_coefficients is None and needs_coefficients:
        raise KelibError(f"intervention {name} needs mean coefficients: measure this very model")
    if measured_digest is not None and (found := model_digest(model)) != measured_digest:
        raise KelibError(
            f"the coefficients were measured on a model with digest {measured_digest}, this one "
            f"has {found}: another model or step; measure this very model"
        )
    return INTERVENTIONS[name](model, mean_coefficients, **settings)


def model_digest(model: Any) -> str:
    """16 hexadecimal digits of SHA-256 over names, types, shapes and bytes of all parameters.

    The same on any device; not the same after a conversion to another type. Reads every weight.
    """
    total = hashlib.sha256()
    for name, weight in unwrap(model).named_parameters():
        total.update(f"{name} {weight.dtype} {tuple(weight.shape)} ".encode())
        flat = weight.detach().cpu().contiguous().reshape(-1)
        total.update(memoryview(flat.view(torch.uint8).numpy()))
    return total.hexdigest()[:16]


def describe_change(before: Any, after: Any) -> dict[str, Any]:
    """What an intervention did to the weights, ready for JSON: ``{"layers": [...], "total": ...}``.

    For ``key`` (up projection), ``gate`` (if any) and ``value`` (V) of each layer and of all
    layers together, in ``total`` also for ``all`` parameters: ``_norm_before``, ``_norm_after``
    (Frobenius) and ``_relative_change``, ``‖after - before‖ / ‖before‖`` (None if shapes differ or
    ``before`` is 0). Raises KelibError for models of different parameters.
    """
    models = [unwrap(before), unwrap(after)]
    weights = [dict(model.named_parameters()) for model in models]
    if list(weights[0]) != list(weights[1]):
        raise KelibError("the two models differ in their parameters: they are not one, changed")
    found = [[_matrices(layer) for layer in feed_forwards(model)] for model in models]
    layers: list[dict[str, Any]] = []
    parts: dict[str, list[tuple[Any, Any]]] = {}
    for index, (old, new) in enumerate(zip(*found, strict=True)):
        layers.append({"layer": index})
        for name in (name for name in ("key", "gate", "value") if old[name]):
            pairs = list(zip(old[name], new[name], strict=True))
            layers[-1] |= _change(name, pairs)
            parts.setdefault(name, []).extend(pairs)
    parts["all"] = [(weight, weights[1][name]) for name, weight in weights[0].items()]
    total = {key: value for name in parts for key, value in _change(name, parts[name]).items()}
    return {"layers": layers, "total": total}


def _change(name: str, pairs: list[tuple[Any, Any]]) -> dict[str, float | None]:
    squares = np.zeros(3)  # before, after, difference
    for pair in pairs:
        old, new = (tensor.detach().cpu().double() for tensor in pair)
        gap = (new - old).square().sum() if old.shape == new.shape else math.nan
        squares += [float(old.square().sum()), float(new.square().sum()), float(gap)]
    first, second, distance = np.sqrt(squares).tolist()
    defined = first > 0 and math.isfinite(distance)
    return {
        f"{name}_norm_before": first,
        f"{name}_norm_after": second,
        f"{name}_relative_change": distance / first if defined else None,
    }


def _scale(
    model: Any,
    mean_coefficients: Vectors,
    ratio: float,
    factor: float,
    plain: bool,
    *,
    arrange: Arrange | None = None,
    on_key: int = 1,
    on_value: int = 0,
) -> Any:
    """``u ** on_key`` on the rows of K, ``u ** on_value`` on those of V, ``u`` as arranged."""
    multipliers, layers = [], checked_layers(model, mean_coefficients)
    require_own(model, layers, ("up",) * (on_key != 0) + ("down",) * (on_value != 0))
    for ffn, mean in zip(layers, mean_coefficients, strict=True):
        if ffn.gate is None and not plain:
            raise KelibError(
                f"layer {ffn.layer} of {type(model).__name__} is not gated: scaling its up "
                "projection does not scale its coefficients; scale_value acts as if it did, "
                "plain=True scales the rows all the same"
            )
        found = resuscitation_multipliers(mean, ratio, factor)
        multipliers.append(arrange(ffn, np.asarray(mean), found) if arrange else found)
    changed = copy.deepcopy(model)
    for ffn, u in zip(checked_layers(changed), multipliers, strict=True):
        rows, bias = key_parts(ffn)[0]
        for weight, power in ((rows, on_key), (bias, on_key), (ffn.values(), on_value)):
            if weight is not None and power:
                _multiply(weight, u**power, ffn.layer)
    return changed


@torch.no_grad()
def _multiply(weight: torch.Tensor, multipliers: np.ndarray, layer: int) -> None:
    by = torch.as_tensor(multipliers, dtype=weight.dtype, device=weight.device)
    weight.mul_(by[:, None] if weight.ndim == 2 else by)
    if not weight.isfinite().all():
        raise KelibError(
            f"layer {layer}: multipliers up to {multipliers.max():.3g} leave weights of "
            f"{weight.dtype} that are not finite; lower p, or measure on more text"
        )

"""Interventions beside Algorithm 1: attention temperature, remedies for lost plasticity.

Each takes a model and mean coefficients (None where it does not look at them) and returns a new
model. All are done once, before continual learning with a fresh optimizer: their authors repeat
them while training, and treat the optimizer's state. What interventions share stands below.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from kelib.architectures import FeedForward, decoder_layers, unwrap
from kelib.errors import KelibError, listing
from kelib.ffn import feed_forwards

Vectors = Sequence[np.ndarray]
Part = tuple[torch.Tensor, torch.Tensor | None]
QUERIES = ("q_proj", "query_key_value", "qkv_proj", "c_attn")
FUSED_QUERIES = {"gpt_neox": "query_key_value", "phi3": "qkv_proj", "gpt2": "c_attn"}
UNSCALED = ("q_norm", "qk_norm", "q_layernorm", "query_layernorm", "sinks")
WIDTHS = ("intermediate_size", "ffn_dim")  # names of m in configurations


@torch.no_grad()
def attention_temperature(
    model: Any, mean_coefficients: Vectors | None = None, *, temperature: float
) -> Any:
    """Every attention becomes ``softmax(scores / temperature)``, 1.5 to 3.0 in appendix B.8.

    Realised as ``1 / temperature`` on the query projection, not as a factor in the forward pass: it
    survives copying and saving, and is trained from there (AdamW's steps do not shrink with the
    weights, so relative to its size the query moves faster). Raises KelibError for a temperature
    not above 0, and where scaled queries are not found or are not scaled scores (a norm or clipping
    after the projection, capped scores, sinks).
    """
    if not (temperature > 0 and math.isfinite(temperature)):
        raise KelibError(f"attention temperature = {temperature} must be finite and above 0")
    changed = copy.deepcopy(model)
    config = unwrap(changed).config
    for name in ("clip_qkv", "attn_logit_softcapping"):
        if getattr(config, name, None) is not None:
            raise KelibError(
                f"{type(model).__name__} has {name} = {getattr(config, name)}: scaling its "
                "queries is not a softmax temperature"
            )
    touched: list[torch.Tensor] = []
    for index, block in enumerate(decoder_layers(changed)):
        places = [m for m in block.modules() if any(hasattr(m, n) for n in QUERIES)]
        if len(places) != 1 or any(hasattr(places[0], name) for name in UNSCALED):
            raise KelibError(
                f"layer {index} of {type(model).__name__} has no attention whose queries kelib "
                f"can scale: one module with {listing(QUERIES)}, without {listing(UNSCALED)}"
            )
        for part in _queries(places[0], config):
            touched.append(part)
            part.div_(temperature)
    if len({part.data_ptr() for part in touched}) < len(touched):
        raise KelibError(f"layers of {type(model).__name__} share a query projection")
    return changed


def redo(model: Any, mean_coefficients: Vectors, *, tau: float = 0.1, seed: int) -> Any:
    """Reset dormant memories, ``C̄_i / mean(C̄) <= tau`` (ReDo: Sokar et al. 2023, algorithm 1).

    Incoming weights are drawn anew, outgoing ones set to 0: the output loses what those units gave.
    In a gated layer (SwiGLU) a unit is a pair of rows: row i of the gate and of the up projection
    are drawn from ``N(0, σ²)``, σ the ``initializer_range`` of the configuration, their biases
    become 0, as does column i of the down projection (``v_i``). The authors' units are ReLUs.
    """
    if not (tau >= 0 and math.isfinite(tau)):
        raise KelibError(f"tau = {tau} must be a number of at least 0, as 0.1")

    def dormant(_ffn: FeedForward, mean: np.ndarray) -> np.ndarray:
        return np.flatnonzero(mean <= tau * mean.mean())

    return _reset(model, mean_coefficients, dormant, seed)


def continual_backprop_utility(
    model: Any, mean_coefficients: Vectors, *, ratio: float, seed: int
) -> Any:
    """Reset the memories of least utility (continual backprop: Dohare et al. 2024).

    Utility is ``C̄_i ‖v_i‖_1``; the ``floor(ratio m)`` lowest of a layer (ties: the first) are reset
    as in :func:`redo`, SwiGLU included. The authors replace a tiny share of the units of a minimal
    age at every step, by a running mean: here every unit is old, the mean that of the measurement.
    """
    if not 0 <= ratio <= 1:
        raise KelibError(f"replacement ratio = {ratio} must lie between 0 and 1")

    def least_useful(ffn: FeedForward, mean: np.ndarray) -> np.ndarray:
        outgoing = ffn.values().detach().cpu().double().abs().sum(dim=1).numpy()
        count = int(ratio * len(mean) + 1e-9)  # 29 of 100 at 0.29, not 28
        return np.argsort(mean * outgoing, kind="stable")[:count]

    return _reset(model, mean_coefficients, least_useful, seed)


@torch.no_grad()
def shrink_and_perturb(
    model: Any,
    mean_coefficients: Vectors | None = None,
    *,
    shrink: float,
    noise_std: float,
    seed: int,
) -> Any:
    """``shrink · W + noise_std · ε``, ``ε ~ N(0, 1)`` (Ash and Adams 2020) for every matrix.

    Embeddings are matrices, too; a tied one is changed once. Departs from the authors in vectors
    (gains of norms, biases): they do not start at random numbers around 0 and stay as they are.
    """
    if not 0 < shrink <= 1:
        raise KelibError(f"shrink = {shrink} must be above 0 and at most 1")
    if not (noise_std >= 0 and math.isfinite(noise_std)):
        raise KelibError(f"noise_std = {noise_std} must be a finite number of at least 0")
    generator, changed = seeded(seed), copy.deepcopy(model)
    for weight in unwrap(changed).parameters():
        if weight.ndim >= 2 and weight.is_floating_point():
            weight.mul_(shrink).add_(_drawn(weight.shape, noise_std, generator).to(weight))
    return changed


@torch.no_grad()
def plasticity_injection(
    model: Any, mean_coefficients: Vectors | None = None, *, memories: int, seed: int
) -> Any:
    """Widen every layer by ``memories`` fresh ones and their negatives (Nikishin et al. 2023).

    The authors add ``h_new(x) - h_copy(x)`` to an agent's head, equal at first, and train only
    ``h_new``. Here each layer gets fresh K' and V', and K' again with -V': the same class, m + 2
    ``memories`` memories, the same output to rounding. It departs in widening every feed-forward
    layer and in freezing nothing, which some rows of one parameter do not allow.
    """
    if not (isinstance(memories, int) and memories > 0):
        raise KelibError(f"memories = {memories} must be a whole number above 0")
    generator, changed = seeded(seed), copy.deepcopy(model)
    layers, std = checked_layers(changed), _initial_std(changed)
    require_own(changed, layers, ("up", "gate", "down"))
    widths, config = {ffn.memories for ffn in layers}, unwrap(changed).config
    names = [n for n in WIDTHS if {getattr(config, n, None)} == widths]
    parts = [m for ffn in layers for m in (ffn.down, ffn.up, ffn.gate) if m is not None]
    if not names or not all(type(m) is nn.Linear for m in parts) or layers[0].fused:
        raise KelibError(
            f"{type(model).__name__} cannot be widened: that needs a linear projection each for up "
            f"and gate and one width for all layers, in its configuration as {listing(WIDTHS)}"
        )
    for ffn in layers:
        values = ffn.values()
        shape = (memories, values.shape[1])
        for module, (rows, bias) in zip((ffn.up, ffn.gate), key_parts(ffn), strict=False):
            fresh = _drawn(shape, std, generator).to(rows)
            _replace(module, "weight", torch.cat([rows, fresh, fresh]))
            if bias is not None:
                _replace(module, "bias", torch.cat([bias, bias.new_zeros(2 * memories)]))
        fresh = _drawn(shape, std, generator).to(values)
        _replace(ffn.down, "weight", torch.cat([values, fresh, -fresh]).T.contiguous())
    for module in unwrap(changed).modules():
        for holder in (module, getattr(module, "config", None)):
            if getattr(holder, names[0], None) in widths:
                setattr(holder, names[0], min(widths) + 2 * memories)
    return changed


ALTERNATIVES = (
    *(attention_temperature, redo, shrink_and_perturb),
    *(plasticity_injection, continual_backprop_utility),
)


def seeded(seed: int) -> torch.Generator:
    """A generator on the CPU: what is drawn from it is the same on any device."""
    if not (isinstance(seed, int) and 0 <= seed < 2**63):
        raise KelibError(f"seed = {seed} must be a whole number of at least 0")
    return torch.Generator().manual_seed(seed)


def checked_coefficients(mean_coefficients: np.ndarray) -> np.ndarray:
    """As float64. Raises KelibError if they are negative or not finite."""
    coefficients = np.asarray(mean_coefficients, dtype=np.float64)
    if not np.isfinite(coefficients).all() or (coefficients < 0).any():
        raise KelibError(
            "mean coefficients must be finite and not negative; measure the model again"
        )
    return coefficients


def checked_layers(model: Any, mean_coefficients: Vectors | None = None) -> list[FeedForward]:
    """The layers of ``model``; KelibError for experts and for vectors that do not fit."""
    layers: list[Any] = feed_forwards(model)
    if mean_coefficients is not None and len(layers) != len(mean_coefficients):
        raise KelibError(
            f"{len(mean_coefficients)} coefficient vectors for a model of {len(layers)} layers; "
            "measure this very model"
        )
    for place, ffn in enumerate(layers):
        if not (kind := ffn.up_rows().dtype).is_floating_point:  # up_rows refuses experts
            raise KelibError(f"layer {ffn.layer} has weights of {kind}: load it unquantised")
        if mean_coefficients is not None and len(mean_coefficients[place]) != ffn.memories:
            raise KelibError(
                f"layer {ffn.layer} has {ffn.memories} memories, its coefficient vector has "
                f"{len(mean_coefficients[place])}; measure this very model"
            )
    return layers


def key_parts(ffn: FeedForward) -> list[Part]:
    """(rows, bias) of the up projection, then of the gate if there is one. Views."""
    m = ffn.memories
    up, gate = getattr(ffn.up, "bias", None), getattr(ffn.gate, "bias", None)
    parts: list[Part] = [(ffn.up_rows(), up[m:] if ffn.fused and up is not None else up)]
    if ffn.gate is not None:
        rows = replace(ffn, up=ffn.gate, gate=None).up_rows()[:m]
        parts.append((rows, None if gate is None else gate[:m]))
    return parts


def require_own(model: Any, layers: list[FeedForward], kinds: Sequence[str]) -> None:
    """KelibError if a projection to be changed is also something else in the model."""
    count: dict[int, int] = {}
    for _, weight in unwrap(model).named_parameters(remove_duplicate=False):
        count[weight.data_ptr()] = count.get(weight.data_ptr(), 0) + 1
    for kind in kinds:
        modules = [m for ffn in layers if (m := getattr(ffn, kind)) is not None]
        if any(count.get(module.weight.data_ptr(), 1) > 1 for module in modules):
            shared = f"{'an' if kind == 'up' else 'a'} {kind} projection"
            owner = type(model).__name__
            raise KelibError(f"layers of {owner} share {shared}: one cannot be scaled alone")


@torch.no_grad()
def _reset(
    model: Any,
    mean_coefficients: Vectors,
    choose: Callable[[FeedForward, np.ndarray], np.ndarray],
    seed: int,
) -> Any:
    generator, changed = seeded(seed), copy.deepcopy(model)
    std = _initial_std(changed)
    layers = checked_layers(changed, mean_coefficients)
    require_own(changed, layers, ("up", "gate", "down"))
    for ffn, given in zip(layers, mean_coefficients, strict=True):
        mean = checked_coefficients(given)
        if not mean.any():
            raise KelibError(f"layer {ffn.layer}: all coefficients are 0; measure on more text")
        chosen = torch.from_numpy(choose(ffn, mean).copy()).to(ffn.values().device)
        for rows, bias in key_parts(ffn):
            rows[chosen] = _drawn((len(chosen), rows.shape[1]), std, generator).to(rows)
            if bias is not None:
                bias[chosen] = 0
        ffn.values()[chosen] = 0
    return changed


def _drawn(shape: Sequence[int], std: float, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(tuple(shape), generator=generator) * std


def _initial_std(model: Any) -> float:
    config, names = unwrap(model).config, ("initializer_range", "init_std")
    found = [float(std) for n in names if (std := getattr(config, n, None)) is not None]
    if not found:
        raise KelibError(
            f"the configuration of {type(model).__name__} does not say how weights start: set "
            f"one of {listing(names)}"
        )
    return found[0]


def _replace(module: Any, name: str, value: torch.Tensor) -> None:
    setattr(module, name, nn.Parameter(value, requires_grad=getattr(module, name).requires_grad))
    module.out_features, module.in_features = module.weight.shape


def _queries(attention: Any, config: Any) -> list[torch.Tensor]:
    """The tensors that scale the queries of an attention module. Views."""
    kind = next(name for name in QUERIES if hasattr(attention, name))
    module = getattr(attention, kind)
    tensors = [p for p in (module.weight, module.bias) if p is not None]
    if kind == "q_proj":
        return tensors
    if FUSED_QUERIES.get(config.model_type) != kind:
        raise KelibError(f"kelib does not know where {kind} of {config.model_type} keeps queries")
    heads = config.num_attention_heads
    if kind == "query_key_value":  # heads, then query, key and value of each
        return [t.view(heads, 3, -1, *t.shape[1:])[:, 0] for t in tensors]
    if kind == "qkv_proj":
        return [t[: heads * attention.head_dim] for t in tensors]
    return [t[..., : config.hidden_size] for t in tensors]  # Conv1D: (in, out)

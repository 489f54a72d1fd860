"""Scoped hooks that deliver the memory coefficients of a model while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from kelib.architectures import FeedForward, Layer, Mixture
from kelib.errors import KelibError


@dataclass(frozen=True)
class Firing:
    """Coefficients of some memories of one layer for some tokens, as one hook delivers them.

    Attributes:
        layer: index of the layer.
        first: number of the first of these memories within the layer (0 in a dense layer).
        values: ``(n, k)``, the signed coefficients, in the model's dtype. Must not be changed in
            place.
        tokens: ``(n,)``, which of the ``B T`` tokens each row belongs to; None if all of them, in
            order.
        scale: ``(n,)``, the router's weight (or the gate of a shared expert) of each row; None if
            there is none.
    """

    layer: int
    first: int
    values: torch.Tensor
    tokens: torch.Tensor | None = None
    scale: torch.Tensor | None = None


OnFiring = Callable[[Firing], None]


@contextmanager
def watch_memories(
    layers: list[Layer], on_firing: OnFiring, *, relu: bool = False
) -> Iterator[None]:
    """Call ``on_firing`` with the coefficients of every layer while the scope lasts.

    A dense layer fires once a pass; a mixture once for every expert that has a token, and once for
    every shared expert. With ``relu`` the activation is replaced by ReLU and negative values become
    0, for what is delivered, not for what the model computes: ``max(0, relu(gate x) * up x)`` (Fig.
    9), in a layer without a gate ``relu(up x)``.

    Experts whose parameters are fused have no projection to hook: while the scope lasts their
    module runs kelib's own loop over experts, the same sum in another order. Afterwards hooks and
    that loop are gone, also after an exception.
    """
    with ExitStack() as undo:
        for layer in layers:
            if isinstance(layer, Mixture):
                _watch_mixture(undo, layer, on_firing, relu)
            else:
                _watch_dense(undo, layer, partial(_fire, on_firing, layer.layer, 0), relu)
        yield


@contextmanager
def watch_coefficients(
    layers: list[Any], on_coefficients: Callable[[int, torch.Tensor], None]
) -> Iterator[None]:
    """Call ``on_coefficients(layer, c)`` with the ``(B T, m)`` coefficients of every dense layer.

    ``c`` must not be changed in place. Raises KelibError for a mixture of experts, whose
    coefficients come expert by expert: use :func:`watch_memories`.
    """
    mixed = [layer.layer for layer in layers if isinstance(layer, Mixture)]
    if mixed:
        raise KelibError(f"layer {mixed[0]} is a mixture of experts: use kelib.ffn.watch_memories")
    with watch_memories(layers, lambda firing: on_coefficients(firing.layer, firing.values)):
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout while the scope lasts; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _fire(
    on_firing: OnFiring,
    layer: int,
    first: int,
    values: torch.Tensor,
    scale: torch.Tensor | None = None,
) -> None:
    on_firing(Firing(layer, first, values.reshape(-1, values.shape[-1]), scale=scale))


def _watch_dense(
    undo: ExitStack, ffn: FeedForward, deliver: Callable[[torch.Tensor], None], relu: bool
) -> None:
    seen = watch_keys(undo, ffn) if relu else {}

    def before_down(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        # hooks return None: anything else would replace the input
        deliver(_relu(ffn, seen) if relu else inputs[0])

    undo.callback(ffn.down.register_forward_pre_hook(before_down).remove)


def watch_keys(undo: ExitStack, ffn: FeedForward) -> dict[str, torch.Tensor]:
    """A dict that holds what the gate and the up projection of ``ffn`` last gave."""
    seen: dict[str, torch.Tensor] = {}

    def after(name: str, _module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        if not ffn.fused:
            seen[name] = output
        else:
            seen["gate"], seen["up"] = output.chunk(2, dim=-1)

    undo.callback(ffn.up.register_forward_hook(partial(after, "up")).remove)
    if ffn.gate is not None and not ffn.fused:
        undo.callback(ffn.gate.register_forward_hook(partial(after, "gate")).remove)
    return seen


def _relu(ffn: FeedForward, seen: dict[str, torch.Tensor]) -> torch.Tensor:
    up = torch.relu(seen["up"])
    # relu(relu(g) u) = relu(g) relu(u)
    return up if ffn.gate is None else up * torch.relu(seen["gate"])


def _watch_mixture(undo: ExitStack, mixture: Mixture, on_firing: OnFiring, relu: bool) -> None:
    module = mixture.experts
    before = module.__dict__.get("forward")  # set by those who wrap a module in place

    def forward(
        hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        return _run_experts(mixture, on_firing, relu, hidden_states, top_k_index, top_k_weights)

    def restore() -> None:
        del module.forward
        if before is not None:
            module.forward = before

    module.forward = forward
    undo.callback(restore)
    first = mixture.experts_shape[0] * mixture.experts_shape[1]
    for ffn, gate in mixture.shared:
        _watch_shared(undo, ffn, gate, partial(_fire, on_firing, mixture.layer, first), relu)
        first += ffn.memories


def _watch_shared(
    undo: ExitStack,
    ffn: FeedForward,
    gate: nn.Module | None,
    deliver: Callable[..., None],
    relu: bool,
) -> None:
    scale: list[torch.Tensor | None] = [None]
    if gate is not None and ffn.place is not None:

        def before_expert(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            weight = nn.functional.linear(inputs[0], gate.weight, gate.bias)  # type: ignore[arg-type]
            scale[0] = torch.sigmoid(weight).reshape(-1)

        undo.callback(ffn.place.register_forward_pre_hook(before_expert).remove)
    _watch_dense(undo, ffn, lambda values: deliver(values, scale[0]), relu)


def _run_experts(
    mixture: Mixture,
    on_firing: OnFiring,
    relu: bool,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """The routed experts of one layer, one after the other, each delivering its coefficients."""
    module: Any = mixture.experts
    inputs = hidden_states.reshape(-1, hidden_states.shape[-1])
    output = torch.zeros_like(inputs)
    chosen, order = top_k_index.reshape(-1).sort(stable=True)
    weights = top_k_weights.reshape(-1)[order]
    experts, each = mixture.experts_shape
    counts = torch.bincount(chosen, minlength=experts).tolist()
    start = 0
    for expert, count in enumerate(counts[:experts]):
        rows, start = slice(start, start + count), start + count
        if count == 0:
            continue
        tokens, scale = order[rows] // top_k_index.shape[-1], weights[rows]
        keys = _expert_linear(
            mixture, "gate_up_proj" if mixture.gated else "up_proj", expert, inputs[tokens]
        )
        coefficients = _expert_activation(mixture, keys)
        delivered = _expert_relu(mixture, keys) if relu else coefficients
        on_firing(Firing(mixture.layer, expert * each, delivered, tokens, scale))
        values = _expert_linear(mixture, "down_proj", expert, coefficients)
        if getattr(module, "has_post_expert_norm", False):
            values = module.post_expert_norm(values)
        output.index_add_(0, tokens, (values * scale[:, None]).to(output.dtype))
    return output.reshape(hidden_states.shape)


def _expert_linear(mixture: Mixture, name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
    weight = getattr(mixture.experts, name)[expert]
    bias = getattr(mixture.experts, f"{name}_bias", None)
    product = x @ weight if mixture.transposed else nn.functional.linear(x, weight)
    return product if bias is None else product + bias[expert]


def _expert_activation(mixture: Mixture, keys: torch.Tensor) -> torch.Tensor:
    module: Any = mixture.experts
    if not mixture.gated:
        return module.act_fn(keys)
    if hasattr(module, "_apply_gate"):
        return module._apply_gate(keys)
    gate, up = keys.chunk(2, dim=-1)
    return module.act_fn(gate) * up


def _expert_relu(mixture: Mixture, keys: torch.Tensor) -> torch.Tensor:
    if not mixture.gated:
        return torch.relu(keys)
    halves = keys.chunk(2, dim=-1)
    if not getattr(mixture.experts, "is_concatenated", True):
        halves = (keys[..., ::2], keys[..., 1::2])
    return torch.relu(halves[0]) * torch.relu(halves[1])

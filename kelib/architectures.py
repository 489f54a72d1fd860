"""Where a model keeps its key-value memories, found by structure and not by the name of a class.

A feed-forward layer is a memory: ``FFN(x) = f(x Kᵀ) V``. Inside a transformer block kelib looks for
a module that holds a *down* projection (V) and an *up* projection whose shapes fit together, under
the usual names of such projections; for a mixture of experts, for the three-dimensional parameters
that hold all experts at once. An architecture that names its parts otherwise is added with
:func:`register_architecture`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kelib.errors import KelibError, listing

DOWN_NAMES = ("down_proj", "dense_4h_to_h", "c_proj", "fc2", "fc_out", "w2")
UP_NAMES = ("up_proj", "dense_h_to_4h", "c_fc", "fc1", "fc_in", "w3")
GATE_NAMES = ("gate_proj", "w1")
FUSED_NAMES = ("gate_up_proj",)
ACTIVATION_NAMES = ("act_fn", "activation_fn", "act", "activation")


@dataclass(frozen=True)
class FeedForward:
    """The memory of one dense layer.

    Attributes:
        layer: index of the block.
        name: path of the down projection inside the block.
        down: holds V; its input is the coefficient vector ``c``.
        up, gate: hold K. In a gated layer ``c = act(gate x) * up x``, otherwise ``gate`` is None
            and ``c = act(up x)``. If both are one projection (Phi-3), ``gate`` and ``up`` are the
            same module.
        place: the module whose output is ``c V`` plus the bias of ``down``; the self-test compares
            the two.
    """

    layer: int
    name: str
    down: nn.Module
    up: nn.Module
    gate: nn.Module | None = None
    place: nn.Module | None = None

    @property
    def fused(self) -> bool:
        """Whether one projection gives the gate (first half) and the up part (second half)."""
        return self.gate is self.up

    @property
    def memories(self) -> int:
        """m, the number of memory vectors."""
        return _shape(self.down)[1]

    def up_rows(self) -> torch.Tensor:
        """The up projection, ``(m, hidden)``: row i multiplies coefficient i. A view."""
        rows = _weight(self.up).T if _is_conv1d(self.up) else _weight(self.up)
        return rows[self.memories :] if self.fused else rows

    def values(self) -> torch.Tensor:
        """V as ``(m, hidden)``: row i is memory vector ``v_i``. A view, not a copy."""
        return _weight(self.down) if _is_conv1d(self.down) else _weight(self.down).T

    def value_norms(self) -> torch.Tensor:
        """``‖v_i‖``, ``(m,)`` float64."""
        return self.values().detach().double().norm(dim=1)


@dataclass(frozen=True)
class Mixture:
    """The memories of a mixture-of-experts layer: of every expert, then of the shared ones.

    With ``r_e(x)`` the router's weight of expert ``e`` (0 for experts that were not chosen), the
    layer is ``FFN(x) = sum_e r_e(x) sum_i c_{e,i}(x) v_{e,i}``: a memory of ``E m`` vectors, plus
    those of the shared expert where there is one, whose weight is its own gate (Qwen-MoE) or 1. The
    coefficient of memory ``(e, i)`` is

    * with the router weight: ``r_e(x) c_{e,i}(x)``, what multiplies ``v_{e,i}`` in the layer's
      output;
    * without: ``c_{e,i}(x)`` if the router chose expert ``e`` for this token, else 0.

    Attributes:
        experts: the module with the parameters ``gate_up_proj`` (or ``up_proj``) and ``down_proj``
            of all experts.
        shared: the experts that every token uses, each with the module that gives its gate, or
            None.
        place: the module whose output is the sum above.
    """

    layer: int
    name: str
    experts: nn.Module
    shared: tuple[tuple[FeedForward, nn.Module | None], ...] = ()
    place: nn.Module | None = None

    @property
    def transposed(self) -> bool:
        """Whether the parameters are stored ``(E, in, out)`` instead of ``(E, out, in)``."""
        return bool(getattr(self.experts, "is_transposed", False))

    @property
    def gated(self) -> bool:
        """Whether the experts have a gate."""
        return hasattr(self.experts, "gate_up_proj")

    @property
    def experts_shape(self) -> tuple[int, int]:
        """(E, m): experts, memories of each."""
        shape = self.experts.down_proj.shape
        return int(shape[0]), int(shape[1] if self.transposed else shape[2])  # type: ignore[index]

    @property
    def memories(self) -> int:
        """Memories of all experts together."""
        experts, each = self.experts_shape
        return experts * each + sum(ffn.memories for ffn, _ in self.shared)

    @property
    def gate(self) -> nn.Module | None:
        """Not None if the experts are gated."""
        return self.experts if self.gated else None

    @property
    def up(self) -> nn.Module:
        """The module that holds the up projections."""
        return self.experts

    def up_rows(self) -> torch.Tensor:
        """Not defined for experts: raises KelibError."""
        raise KelibError(
            f"layer {self.layer} is a mixture of experts ({self.name}): kelib measures its "
            "memories, but scaling their rows of K is only defined for dense layers"
        )

    def expert_values(self) -> torch.Tensor:
        """V of all routed experts, ``(E, m, hidden)``. A view."""
        down: torch.Tensor = self.experts.down_proj  # type: ignore[assignment]
        return down if self.transposed else down.transpose(1, 2)

    def value_norms(self) -> torch.Tensor:
        """``‖v_i‖``, ``(memories,)`` float64, routed experts first."""
        routed = [expert.detach().double().norm(dim=1) for expert in self.expert_values()]
        return torch.cat([*routed, *(ffn.value_norms() for ffn, _ in self.shared)])


Layer = FeedForward | Mixture
Finder = Callable[[int, nn.Module], Layer | None]
_FINDERS: list[Finder] = []


def register_architecture(finder: Finder) -> Finder:
    """Teach kelib a block that it does not recognise; usable as a decorator. Returns ``finder``.

    ``finder(layer, block)`` gets the index and the module of a transformer block and returns a
    :class:`FeedForward` (or :class:`Mixture`) that says where the projections are, or None if the
    block is of another kind. Finders are asked before kelib's own search, the latest first. Then
    run :func:`kelib.ffn.self_test` on the model.

    >>> from kelib.architectures import FeedForward, register_architecture, unregister_architecture
    >>> @register_architecture
    ... def my_blocks(layer, block):
    ...     inner = getattr(block, "brain", None)
    ...     return inner and FeedForward(layer, "brain.out", inner.out, up=inner.into, place=inner)
    >>> unregister_architecture(my_blocks)
    """
    _FINDERS.insert(0, finder)
    return finder


def unregister_architecture(finder: Finder) -> None:
    """Forget a finder. Raises KelibError if it was never registered."""
    if finder not in _FINDERS:
        raise KelibError(f"{finder!r} is not registered; there are {listing(_FINDERS)}")
    _FINDERS.remove(finder)


def unwrap(model: Any) -> Any:
    """The model inside DistributedDataParallel and its like, or the model itself."""
    inner = getattr(model, "module", None)
    return unwrap(inner) if isinstance(inner, nn.Module) else model


def trunk_of(model: Any) -> Any:
    """The decoder without the vocabulary projection."""
    return model.get_decoder() if hasattr(model, "get_decoder") else model


def decoder_layers(model: Any) -> nn.ModuleList:
    """The list of transformer blocks: the longest ModuleList that lies in no other ModuleList."""
    trunk = trunk_of(unwrap(model))
    lists = {n: m for n, m in trunk.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0}
    outer = [m for n, m in lists.items() if not any(n.startswith(f"{other}.") for other in lists)]
    if not outer:
        raise KelibError(
            f"{type(model).__name__} has no list of transformer blocks (an nn.ModuleList) to look "
            "into"
        )
    return max(outer, key=len)


def feed_forwards(model: Any) -> list[Layer]:
    """The memories of every layer: a :class:`FeedForward` or a :class:`Mixture` each.

    Raises KelibError, saying what was looked for and how to register it, if a block has no
    recognisable feed-forward layer.
    """
    return [
        _find(index, block, type(model).__name__)
        for index, block in enumerate(decoder_layers(model))
    ]


def _find(index: int, block: nn.Module, owner: str) -> Layer:
    for finder in _FINDERS:
        if (found := finder(index, block)) is not None:
            return found
    places = dict(block.named_modules())
    experts = [name for name, place in places.items() if _holds_experts(place)]
    routed = len(experts) == 1 and _is_routed(places[experts[0]])
    dense = [ffn for name, place in places.items() if (ffn := _dense(index, name, place))]
    if routed:
        return _mixture(index, experts[0], places, dense)
    if len(dense) == 1 and not experts:
        return dense[0]
    count = f"{len(experts) + len(dense)} of them" if experts or dense else "none"
    raise KelibError(
        f"layer {index} of {owner} ({type(block).__name__}) has no feed-forward layer that kelib "
        f"knows: it looked for one module with a down projection named {listing(DOWN_NAMES)} and "
        f"an up projection named {listing(UP_NAMES + FUSED_NAMES)} of matching shapes, or for "
        "experts with three-dimensional parameters down_proj and gate_up_proj that are given the "
        f"indices and weights of the chosen experts, and found {count}; the block holds "
        f"{listing((n for n in places if n), 24)}; name the projections with "
        "kelib.ffn.register_architecture and check them with kelib.ffn.self_test"
    )


def _dense(index: int, name: str, place: nn.Module) -> FeedForward | None:
    """The feed-forward layer whose projections are direct children of ``place``, if it has one."""
    down, up = _child(place, DOWN_NAMES), _child(place, UP_NAMES + FUSED_NAMES)
    if down is None or up is None:
        return None
    memories, rows = _shape(place.get_submodule(down))[1], _shape(place.get_submodule(up))[0]
    gate = up if up in FUSED_NAMES else _child(place, GATE_NAMES)
    if rows != memories * (2 if gate == up else 1):
        return None
    parts = {n: place.get_submodule(n) for n in (down, up, gate) if n is not None}
    return FeedForward(
        index,
        f"{name}.{down}" if name else down,
        parts[down],
        parts[up],
        parts[gate] if gate is not None else None,
        # OPT keeps its projections in the block itself, whose output is more than the memory's
        place if name else parts[down],
    )


def _mixture(
    index: int, name: str, places: dict[str, nn.Module], dense: list[FeedForward]
) -> Mixture:
    parent = name.rpartition(".")[0]
    shared = []
    for ffn in dense:
        home = ffn.name.rpartition(".")[0]
        shared.append((ffn, places.get(f"{home}_gate")))
    return Mixture(index, name, places[name], tuple(shared), places[parent])


def _holds_experts(place: nn.Module) -> bool:
    held = dict(place.named_parameters(recurse=False))
    ups = [held[name] for name in ("gate_up_proj", "up_proj") if name in held]
    return "down_proj" in held and held["down_proj"].dim() == 3 and len(ups) == 1


def _is_routed(experts: nn.Module) -> bool:
    """Whether the experts are given states, chosen experts and weights; Llama 4's are not."""
    return len(inspect.signature(type(experts).forward).parameters) == 4  # with self


def _child(place: nn.Module, names: tuple[str, ...]) -> str | None:
    """Name of the direct child of ``place`` that is a projection under one of ``names``."""
    for name, child in place.named_children():
        if name in names and getattr(getattr(child, "weight", None), "ndim", 0) == 2:
            return name
    return None


def _weight(projection: nn.Module) -> torch.Tensor:
    return projection.weight  # type: ignore[return-value]


def _shape(projection: nn.Module) -> tuple[int, int]:
    """(out, in) of a projection."""
    rows, columns = _weight(projection).shape
    return (int(columns), int(rows)) if _is_conv1d(projection) else (int(rows), int(columns))


def _is_conv1d(module: nn.Module) -> bool:
    """GPT-2 stores its projections transposed, in a class of its own."""
    return type(module).__name__ == "Conv1D"

"""Where a model keeps its key-value memories, and scoped hooks on their coefficients.

A feed-forward layer is a memory: ``FFN(x) = f(x Kᵀ) V``. In a transformers model the coefficients
``c = f(x Kᵀ)`` are the input of the projection back to the hidden size, found here by structure: per
block, the linear layer whose output is the hidden size and whose input is not a projection of attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kelib.errors import KelibError, listing

DOWN_NAMES = ("down_proj", "dense_4h_to_h", "c_proj", "fc2", "fc_out", "w2")
UP_NAMES = ("up_proj", "dense_h_to_4h", "c_fc", "fc1", "fc_in", "w3")
GATE_NAMES = ("gate_proj", "w1")
FFN_NAMES = ("mlp", "ffn", "feed_forward")


@dataclass(frozen=True)
class FeedForward:
    """The memory of one layer: ``down`` holds V, ``up`` (and ``gate``, in a gated layer) hold K."""

    layer: int
    name: str
    down: nn.Module
    up: nn.Module
    gate: nn.Module | None

    @property
    def memories(self) -> int:
        """m, the number of memory vectors."""
        rows, columns = self.down.weight.shape  # type: ignore[misc,union-attr]
        return int(rows if _is_conv1d(self.down) else columns)

    def up_rows(self) -> torch.Tensor:
        """The up projection as ``(m, hidden)``: row i multiplies coefficient i. A view, not a copy."""
        weight = self.up.weight
        return weight.T if _is_conv1d(self.up) else weight  # type: ignore[return-value,union-attr,operator]


def _is_conv1d(module: nn.Module) -> bool:
    """GPT-2 stores its projections transposed, in a class of its own."""
    return type(module).__name__ == "Conv1D"


def decoder_layers(model: Any) -> nn.ModuleList:
    """The list of transformer blocks: the longest ModuleList whose members are of one class."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
    uniform = [blocks for blocks in lists if len({type(block) for block in blocks}) == 1]
    if not uniform:
        raise KelibError(f"{type(model).__name__} has no list of transformer blocks to look into")
    return max(uniform, key=len)


def _child(block: nn.Module, names: tuple[str, ...]) -> tuple[str, nn.Module] | None:
    found = [(name, child) for name, child in block.named_children() if name in names]
    return found[0] if found else None


def feed_forwards(model: Any) -> list[FeedForward]:
    """The memories of every layer, in order.

    Raises KelibError, saying what was looked for, if a block has no recognisable feed-forward layer.
    """
    layers = []
    for index, block in enumerate(decoder_layers(model)):
        inner = _child(block, FFN_NAMES)
        prefix, place = inner if inner is not None else ("", block)
        down, up = _child(place, DOWN_NAMES), _child(place, UP_NAMES)
        if down is None or up is None:
            raise KelibError(
                f"layer {index} of {type(model).__name__} has no feed-forward layer that kelib knows: "
                f"looked in {listing(FFN_NAMES)} for a down projection named {listing(DOWN_NAMES)} and an "
                f"up projection named {listing(UP_NAMES)}; found {listing(dict(place.named_children()))}"
            )
        gate = _child(place, GATE_NAMES)
        name = ".".join(part for part in (prefix, down[0]) if part)
        layers.append(FeedForward(index, name, down[1], up[1], gate[1] if gate else None))
    return layers


@contextmanager
def watch_coefficients(
    layers: list[FeedForward], on_coefficients: Callable[[int, torch.Tensor], None]
) -> Iterator[None]:
    """Call ``on_coefficients(layer, c)`` with the input of every down projection while the scope lasts.

    ``c`` is ``(B, T, m)`` or ``(B T, m)`` as the model has it, and must not be changed in place. The hooks
    are gone afterwards, also after an exception.
    """

    def hook(layer: int) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def call(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            on_coefficients(layer, inputs[0])  # returns None: anything else would replace the input

        return call

    handles = [ffn.down.register_forward_pre_hook(hook(ffn.layer)) for ffn in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

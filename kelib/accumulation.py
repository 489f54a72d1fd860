"""Float64 sums over sequences, fed by hooks while a model runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from kelib.architectures import Layer
from kelib.batches import Batch
from kelib.errors import KelibError, listing
from kelib.jackknife import Sums
from kelib.watching import Firing

DEFINITIONS = ("absolute", "relu", "contribution")
Coefficient = str | Callable[[torch.Tensor], torch.Tensor]
# Coefficients whose magnitude is held at once, but at least MINIMUM_ROWS tokens of them.
CPU_VALUES, GPU_VALUES, MINIMUM_ROWS = 2**17, 2**24, 64


def definition_name(coefficient: Coefficient) -> str:
    """The name of a definition or a function. KelibError for a name that does not exist."""
    if callable(coefficient):
        return str(getattr(coefficient, "__name__", type(coefficient).__name__))
    if coefficient not in DEFINITIONS:
        raise KelibError(
            f"coefficient {coefficient!r} is not defined; choose one of {listing(DEFINITIONS)} or "
            "pass a function"
        )
    return coefficient


class Accumulator:
    """Sums of one pass: :meth:`begin` a batch, run the model hooked to the rest, :meth:`check`."""

    def __init__(
        self, layers: list[Layer], blocks: int, coefficient: Coefficient, router_weight: bool
    ) -> None:
        """``layers`` may be empty; ``blocks`` of sequences are kept apart, 1 if none."""
        self.layers, self.blocks = layers, blocks
        self.coefficient, self.router_weight = coefficient, router_weight
        self.sequences = np.zeros(blocks)
        self.tokens = 0
        self._coefficients: dict[int, torch.Tensor] = {}
        self._attention: dict[int, torch.Tensor] = {}
        self._next_token: torch.Tensor | None = None
        self._width = {layer.layer: layer.memories for layer in layers}

    @property
    def heads(self) -> list[int]:
        """Heads of each attention layer met so far."""
        return [total.shape[1] for _, total in sorted(self._attention.items())]

    def begin(self, batch: Batch) -> None:
        """Start on ``batch``: what hooks deliver from now on belongs to it."""
        device = batch.ids.device
        self._batch = batch
        exact = batch.weights()
        self._weights = {torch.float32: exact.float().to(device)}
        self._exact = exact.to(_exact_device(device)).view(batch.ids.shape)
        self._kept = None if batch.mask is None else batch.mask.reshape(-1).nonzero().squeeze(1)
        self._block_of = (batch.first + np.arange(len(batch.lengths))) % self.blocks
        self._rows = torch.as_tensor(self._block_of, device=self._exact.device)
        np.add.at(self.sequences, self._block_of, 1)
        self.tokens += sum(batch.lengths)

    def add_coefficients(self, firing: Firing) -> None:
        """Add ``sum_n (1/T_n) sum_j |c_i(n, j)|`` of what fired."""
        values, tokens, scale = firing.values, firing.tokens, firing.scale
        weights = self._weights_like(values)
        rows = self._kept
        if tokens is not None:
            rows = (
                None
                if self._batch.mask is None
                else self._batch.mask.reshape(-1)[tokens].nonzero()[:, 0]
            )
            weights = weights[tokens]
        if rows is not None:
            weights = weights[rows]
        if not self.router_weight:
            scale = None
        elif scale is not None:
            scale = scale if rows is None else scale[rows]
        total = self._total(firing.layer, values.device)[:, firing.first :][:, : values.shape[1]]
        start = 0
        for block, stop in self._runs(len(weights), tokens, rows):
            part = slice(start, stop)
            total[block] += self._column_sums(
                values[part] if rows is None else values,
                weights[part],
                None if rows is None else rows[part],
                None if scale is None else scale[part],
            ).to(total.device)
            start = stop

    def add_attention(self, layer: int, entropy: torch.Tensor) -> None:
        """Add the mean over positions of ``entropy`` ``(B, heads, T)`` of every sequence."""
        device = self._exact.device
        entropy = entropy.to(device).double()
        if self._batch.mask is not None:
            entropy = entropy.masked_fill(~self._batch.mask[:, None].to(device), 0.0)
        means = torch.einsum("bht,bt->bh", entropy, self._exact)
        if layer not in self._attention:
            self._attention[layer] = means.new_zeros(self.blocks, means.shape[1])
        self._attention[layer].index_add_(0, self._rows, means)

    def add_next_token(self, rows: slice, entropy: torch.Tensor) -> None:
        """Add the entropies of the tokens ``rows``, counted without padding."""
        device = self._exact.device
        if self._next_token is None:
            self._next_token = torch.zeros(self.blocks, dtype=torch.float64, device=device)
        kept = self._kept if self._kept is not None else torch.arange(self._exact.numel())
        tokens = kept[rows].to(device)
        weighted = entropy.to(device).double() * self._exact.view(-1)[tokens]
        self._next_token.index_add_(0, self._rows[tokens // self._exact.shape[1]], weighted)

    def states(self, hidden: torch.Tensor) -> torch.Tensor:
        """The hidden states ``(n, d)`` of the tokens that are no padding."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        return flat if self._kept is None else flat[self._kept]

    def check(self) -> int | None:
        """The first layer whose sums are not finite, -1 for the next token, None if all is well."""
        for layer in self.layers:
            total = self._coefficients.get(layer.layer)
            if total is not None and not bool(torch.isfinite(total).all()):
                return layer.layer
        for index, total in sorted(self._attention.items()):
            if not bool(torch.isfinite(total).all()):
                return index
        last = self._next_token
        return -1 if last is not None and not bool(torch.isfinite(last).all()) else None

    def sums(self) -> Sums:
        """What was added, as numpy arrays."""
        coefficients = []
        for layer in self.layers:
            total = self._total(layer.layer, torch.device("cpu")).cpu().numpy()
            if self.coefficient == "contribution":
                # |c_i| ‖v_i‖: the norm is the same for every token, so it may wait until the end
                total = total * layer.value_norms().cpu().numpy()
            coefficients.append(total)
        attention = tuple(total.cpu().numpy() for _, total in sorted(self._attention.items()))
        last = None if self._next_token is None else self._next_token.cpu().numpy()
        return Sums(self.sequences, tuple(coefficients), attention, last)

    def _total(self, layer: int, device: torch.device) -> torch.Tensor:
        if layer not in self._coefficients:
            self._coefficients[layer] = torch.zeros(
                self.blocks, self._width[layer], dtype=torch.float64, device=_exact_device(device)
            )
        return self._coefficients[layer]

    def _weights_like(self, values: torch.Tensor) -> torch.Tensor:
        kind = torch.promote_types(values.dtype, torch.float32)
        if kind not in self._weights:
            self._weights[kind] = self._exact.view(-1).to(kind)
        return self._weights[kind].to(values.device)

    def _runs(
        self, count: int, tokens: torch.Tensor | None, rows: torch.Tensor | None
    ) -> list[tuple[int, int]]:
        """(block, end) of each run of rows of one sequence; rows come in the order of tokens."""
        if self.blocks == 1:
            return [(0, count)]
        if tokens is None:
            counts = self._batch.lengths
        else:
            of_token = (tokens if rows is None else tokens[rows]) // self._batch.ids.shape[1]
            counts = torch.bincount(of_token, minlength=len(self._batch.lengths)).tolist()
        return list(zip(self._block_of.tolist(), np.cumsum(counts).tolist(), strict=True))

    def _column_sums(
        self,
        values: torch.Tensor,
        weights: torch.Tensor,
        rows: torch.Tensor | None,
        scale: torch.Tensor | None,
    ) -> torch.Tensor:
        """``sum_n weights_n |values_n|``, ``(m,)`` float64.

        The magnitudes of a few rows exist at a time: they stay in cache, and memory stays flat.
        """
        width = values.shape[1]
        budget = CPU_VALUES if values.device.type == "cpu" else GPU_VALUES
        step = max(MINIMUM_ROWS, budget // width)
        exact = _exact_device(values.device)
        total = torch.zeros(width, dtype=torch.float64, device=exact)
        scratch = values.new_empty(step if rows is None else 0, width)
        for start in range(0, len(weights), step):
            part = slice(start, start + step)
            chosen = values[part] if rows is None else values.index_select(0, rows[part])
            weight = weights[part]
            if callable(self.coefficient):
                scaled = chosen if scale is None else chosen * scale[part, None]
                magnitude = _called(self.coefficient, scaled)
            else:
                # the chosen rows are a copy already, a slice of the model's tensor is not
                magnitude = torch.abs(
                    chosen, out=scratch[: len(chosen)] if rows is None else chosen
                )
                weight = weight if scale is None else weight * scale[part].abs()
            total += torch.mv(magnitude.to(weight.dtype).T, weight).to(exact)
        return total


def _called(function: Callable[[torch.Tensor], torch.Tensor], values: torch.Tensor) -> torch.Tensor:
    found: Any = function(values)
    if not isinstance(found, torch.Tensor) or found.shape != values.shape:
        shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise KelibError(
            f"the coefficient function was given {tuple(values.shape)} and returned {shape}; it "
            "must return a tensor of the same shape"
        )
    return found


def _exact_device(device: torch.device) -> torch.device:
    """Where float64 exists."""
    return torch.device("cpu") if device.type == "mps" else device

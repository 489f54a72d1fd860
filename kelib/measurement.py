"""What a measurement holds, sums over sequences, and all that follows from them. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from kelib.errors import KelibError
from kelib.jackknife import Sums, add_sums, jackknife_error


def shannon_entropy(weights: np.ndarray) -> np.ndarray:
    """``-sum p ln p`` in nats, ``p = weights / sum(weights)``, last axis, ``0 ln 0 = 0``.

    Lies between 0 (one weight carries all) and ``ln m`` (all equal). Unlike the authors' code
    nothing is added inside the logarithm. Raises KelibError for negative, non-finite or all-zero
    weights.
    """
    weights = np.asarray(weights, dtype=np.float64)
    if not np.isfinite(weights).all():
        raise KelibError("mean coefficients hold NaN or infinity; check the weights of the model")
    if (weights < 0).any():
        raise KelibError(
            "mean coefficients must not be negative; use a non-negative coefficient definition"
        )
    total = weights.sum(axis=-1, keepdims=True)
    if (total == 0).any():
        raise KelibError(
            "mean coefficients of a layer sum to 0: no memory is ever active, entropy is undefined"
        )
    share = weights / total
    logs = np.log(share, out=np.zeros_like(share), where=share > 0)
    # + 0.0 turns the -0.0 of a one-hot distribution into 0.0
    return -(share * logs).sum(axis=-1) + 0.0


@dataclass(frozen=True)
class EntropyMeasurement:
    """Sums over the sequences of a data set, and the entropies that follow from them.

    Attributes:
        coefficient_sums: per layer ``(m,)`` float64, the sum over sequences of the per-sequence
            mean coefficient; empty if knowledge entropy was not asked for.
        sequences, tokens: how many were read (padding not counted).
        attention_sums: per attention layer ``(heads,)`` float64, the sum over sequences of the mean
            over positions of the entropy of a row of attention; empty if not asked for.
        next_token_sum: the same of the next-token distribution; None if not asked for.
        coefficient: name of the coefficient definition.
        router_weight: whether the coefficients of experts carry the router's weight.
        blocks: the same sums by block of sequences, for standard errors; None if not asked for.
    """

    coefficient_sums: tuple[np.ndarray, ...]
    sequences: int
    tokens: int
    attention_sums: tuple[np.ndarray, ...] = ()
    next_token_sum: float | None = None
    coefficient: str = "absolute"
    router_weight: bool = True
    blocks: Sums | None = field(default=None, repr=False)

    @property
    def mean_coefficients(self) -> tuple[np.ndarray, ...]:
        """``C̄_i = (1/|D|) sum_n (1/T_n) sum_j |c_i(n, j)|``, ``(m,)`` per layer (Eq. 2)."""
        return tuple(total / self.sequences for total in self.coefficient_sums)

    @property
    def knowledge_entropy(self) -> np.ndarray:
        """``H_l``, ``(layers,)`` nats, each between 0 and ``ln m``; their sum is H (Eq. 2).

        Raises KelibError if it was not asked for, or if the coefficients of a layer sum to 0.
        """
        return _entropies(_asked(self.coefficient_sums, "knowledge"))

    @property
    def attention_entropy(self) -> np.ndarray:
        """Mean entropy of a row of attention, ``(layers, heads)`` nats (Eq. 3).

        The paper's number is the sum over layers of the mean over heads. Where layers differ in
        heads, missing ones are NaN. Raises KelibError if it was not asked for.
        """
        return _table(_asked(self.attention_sums, "attention")) / self.sequences

    @property
    def next_token_entropy(self) -> float:
        """Mean entropy of the next-token distribution, nats (A.4): 0 to ln of the vocabulary.

        Raises KelibError if it was not asked for.
        """
        return float(_asked(self.next_token_sum, "next_token")) / self.sequences

    @property
    def bound(self) -> float:
        """``sum_l ln m_l``, the largest value the sum over layers can take (nats)."""
        return float(sum(np.log(len(total)) for total in self.coefficient_sums))

    @property
    def effective_memories(self) -> np.ndarray:
        """``exp(H_l) / m`` per layer, between 0 and 1, to compare sizes (not the paper's)."""
        widths = np.array([len(total) for total in self.coefficient_sums])
        return np.exp(self.knowledge_entropy) / widths

    @property
    def knowledge_entropy_error(self) -> np.ndarray:
        """Standard error of :attr:`knowledge_entropy`, ``(layers,)`` nats.

        A delete-a-group jackknife over at most 64 blocks; sequence n of the data set belongs to
        block n mod 64, so sequences count as independent: where neighbours share a document it
        comes out too small. Raises KelibError without ``uncertainty=True`` or with fewer than two
        sequences.
        """
        _asked(self.coefficient_sums, "knowledge")
        return self.standard_error(lambda sums: _entropies(sums.coefficients))

    @property
    def total_knowledge_entropy_error(self) -> float:
        """Standard error of the sum over layers of the knowledge entropy, nats (as above)."""
        _asked(self.coefficient_sums, "knowledge")
        return float(self.standard_error(lambda sums: _entropies(sums.coefficients).sum()))

    @property
    def attention_entropy_error(self) -> np.ndarray:
        """Standard error of the attention entropy, ``(layers, heads)`` nats (as above)."""
        _asked(self.attention_sums, "attention")
        return self.standard_error(lambda sums: _table(sums.attention) / sums.sequences)

    @property
    def next_token_entropy_error(self) -> float:
        """Standard error of :attr:`next_token_entropy`, nats (jackknife, as above)."""
        _asked(self.next_token_sum, "next_token")
        return float(self.standard_error(lambda sums: np.asarray(sums.next_token) / sums.sequences))

    def standard_error(self, statistic: Callable[[Sums], Any]) -> np.ndarray:
        """Standard error of any function of the sums over sequences (jackknife, as above)."""
        if self.blocks is None:
            raise KelibError("no blocks to estimate an error from: measure with uncertainty=True")
        return jackknife_error(self.blocks, statistic)

    def table(self) -> pd.DataFrame:
        """What was measured, a row for each entropy and layer.

        Columns ``kind`` (knowledge, attention: the mean over heads, next_token: one row, layer 0),
        ``coefficient``, ``layer``, ``entropy_nats``, ``standard_error`` (nats, NaN without blocks),
        ``bound_nats`` (ln m; NaN but for knowledge) and ``sequences``.
        """
        rows: list[tuple[str, int, float, float, float]] = []

        def add(kind: str, statistic: Callable[[Sums], np.ndarray], bounds: list[float]) -> None:
            values = statistic(self._totals())
            errors = np.full(len(values), np.nan)
            if self.blocks is not None:
                errors = self.standard_error(statistic)
            for layer, (value, error) in enumerate(zip(values, errors, strict=True)):
                bound = bounds[layer] if bounds else np.nan
                rows.append((kind, layer, float(value), float(error), bound))

        if self.coefficient_sums:
            bounds = [float(np.log(len(total))) for total in self.coefficient_sums]
            add("knowledge", lambda s: _entropies(s.coefficients), bounds)
        if self.attention_sums:
            add("attention", lambda s: np.array([a.mean() for a in s.attention]) / s.sequences, [])
        if self.next_token_sum is not None:
            add("next_token", lambda s: np.atleast_1d(np.asarray(s.next_token) / s.sequences), [])
        names = ["kind", "layer", "entropy_nats", "standard_error", "bound_nats"]
        table = pd.DataFrame(rows, columns=names)
        table.insert(1, "coefficient", self.coefficient)
        return table.assign(sequences=self.sequences)

    def merge(self, other: EntropyMeasurement) -> EntropyMeasurement:
        """The measurement of both data sets together.

        Raises KelibError if the two differ in shapes, in the coefficient definition or in what was
        asked for.
        """
        kinds = [(m.coefficient, m.router_weight) for m in (self, other)]
        if kinds[0] != kinds[1]:
            raise KelibError(
                f"measurements of different coefficients cannot be merged: {kinds[0]} and "
                f"{kinds[1]}"
            )
        held = [[a.shape for a in m._totals().arrays()] for m in (self, other)]
        if held[0] != held[1]:
            raise KelibError(
                "measurements of different models or entropies cannot be merged: "
                f"shapes {held[0][1:]} and {held[1][1:]}"
            )
        if (self.blocks is None) != (other.blocks is None):
            raise KelibError("one of the two measurements has no blocks: measure both alike")
        total = add_sums(self._totals(), other._totals())
        return replace(
            self,
            coefficient_sums=total.coefficients,
            attention_sums=total.attention,
            next_token_sum=None if total.next_token is None else float(total.next_token),
            sequences=self.sequences + other.sequences,
            tokens=self.tokens + other.tokens,
            blocks=None
            if self.blocks is None or other.blocks is None
            else add_sums(self.blocks, other.blocks),
        )

    def _totals(self) -> Sums:
        last = None if self.next_token_sum is None else np.asarray(self.next_token_sum)
        return Sums(np.asarray(self.sequences), self.coefficient_sums, self.attention_sums, last)

    def save(self, path: Path) -> None:
        """Write ``path`` (safetensors, JSON notes in its metadata), whole or not at all."""
        tensors = self._totals().named("")
        if self.blocks is not None:
            tensors |= self.blocks.named("blocks.") | {"blocks.sequences": self.blocks.sequences}
        notes = {
            "counts": json.dumps({"sequences": self.sequences, "tokens": self.tokens}),
            "definition": json.dumps(
                {"coefficient": self.coefficient, "router_weight": self.router_weight}
            ),
        }
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            save_file(
                {name: np.ascontiguousarray(a) for name, a in tensors.items()}, temporary, notes
            )
            temporary.replace(path)
        except (OSError, SafetensorError) as error:
            raise KelibError(f"cannot write {path}: {error}") from error
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> EntropyMeasurement:
        """Read what :meth:`save` wrote. Raises KelibError for a missing or broken file."""
        try:
            with safe_open(path, framework="np") as file:
                notes = file.metadata()
                counts = json.loads(notes["counts"])
                definition = json.loads(notes.get("definition", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            last = tensors.get("next_token")
            return cls(
                _numbered(tensors, "layer."),
                **counts,
                **definition,
                attention_sums=_numbered(tensors, "attention."),
                next_token_sum=None if last is None else last.item(),
                blocks=Sums(
                    tensors["blocks.sequences"],
                    _numbered(tensors, "blocks.layer."),
                    _numbered(tensors, "blocks.attention."),
                    tensors.get("blocks.next_token"),
                )
                if "blocks.sequences" in tensors
                else None,
            )
        except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise KelibError(
                f"{path} is not an entropy measurement ({error}); measure again"
            ) from error


def _numbered(tensors: dict[str, np.ndarray], prefix: str) -> tuple[np.ndarray, ...]:
    count = sum(name.startswith(prefix) for name in tensors)
    return tuple(tensors[f"{prefix}{i}"] for i in range(count))


def _asked(value: Any, name: str) -> Any:
    if value is None or (isinstance(value, tuple) and not value):
        raise KelibError(
            f"{name} entropy was not measured: ask for it with measure_entropy(..., {name}=True)"
        )
    return value


def _entropies(sums: tuple[np.ndarray, ...]) -> np.ndarray:
    found = []
    for layer, total in enumerate(sums):  # layers may differ in width
        try:
            found.append(float(shannon_entropy(total)))
        except KelibError as error:
            raise KelibError(f"layer {layer}: {error}") from error
    return np.array(found)


def _table(rows: tuple[np.ndarray, ...]) -> np.ndarray:
    table = np.full((len(rows), max(len(row) for row in rows)), np.nan)
    for line, row in zip(table, rows, strict=True):
        line[: len(row)] = row
    return table

"""Knowledge entropy (Eq. 2 of the paper) in one streaming pass; the maths stays pure."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from kelib.errors import KelibError
from kelib.ffn import feed_forwards, watch_coefficients


def shannon_entropy(weights: np.ndarray) -> np.ndarray:
    """``-sum p ln p`` in nats with ``p = weights / sum(weights)`` along the last axis and ``0 ln 0 = 0``.

    Lies between 0 (one weight carries all) and ``ln m`` (all equal). Unlike the authors' code nothing is
    added inside the logarithm. Raises KelibError for negative, non-finite or all-zero weights.
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
    """Mean coefficients of every layer and what follows from them.

    Attributes:
        coefficient_sums: per layer ``(m,)`` float64, the sum over sequences of the per-sequence mean ``|c|``.
        sequences, tokens: how many were read (padding not counted).
    """

    coefficient_sums: tuple[np.ndarray, ...]
    sequences: int
    tokens: int

    @property
    def mean_coefficients(self) -> tuple[np.ndarray, ...]:
        """``C̄_i = (1/|D|) sum_n (1/T_n) sum_j |c_i(n, j)|`` per layer, ``(m,)`` float64."""
        return tuple(total / self.sequences for total in self.coefficient_sums)

    @property
    def knowledge_entropy(self) -> np.ndarray:
        """``H_l`` per layer, ``(layers,)`` nats, each between 0 and ``ln m``; their sum is the paper's H."""
        return np.array([float(shannon_entropy(total)) for total in self.coefficient_sums])

    @property
    def bound(self) -> float:
        """``sum_l ln m_l``, the largest value the sum over layers can take (nats)."""
        return float(sum(np.log(len(total)) for total in self.coefficient_sums))

    @property
    def effective_memories(self) -> np.ndarray:
        """``exp(H_l) / m`` per layer, between 0 and 1: comparable between sizes (ours, not the paper's)."""
        widths = np.array([len(total) for total in self.coefficient_sums])
        return np.exp(self.knowledge_entropy) / widths

    def merge(self, other: EntropyMeasurement) -> EntropyMeasurement:
        """The measurement of both data sets together. Raises KelibError if the shapes differ."""
        shapes = [[len(t) for t in m.coefficient_sums] for m in (self, other)]
        if shapes[0] != shapes[1]:
            raise KelibError(
                f"measurements of different models cannot be merged: memories {shapes[0]} and {shapes[1]}"
            )
        sums = (a + b for a, b in zip(self.coefficient_sums, other.coefficient_sums, strict=True))
        return EntropyMeasurement(
            tuple(sums), self.sequences + other.sequences, self.tokens + other.tokens
        )

    def save(self, path: Path) -> None:
        """Write ``path`` (safetensors, counts in its metadata), whole or not at all."""
        tensors = {f"layer.{i}": total for i, total in enumerate(self.coefficient_sums)}
        notes = {"counts": json.dumps({"sequences": self.sequences, "tokens": self.tokens})}
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        save_file(tensors, temporary, metadata=notes)
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> EntropyMeasurement:
        """Read what :meth:`save` wrote. Raises KelibError for a missing or broken file."""
        try:
            with safe_open(path, framework="np") as file:
                counts = json.loads(file.metadata()["counts"])
                sums = tuple(file.get_tensor(f"layer.{i}") for i in range(len(file.keys())))
        except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise KelibError(
                f"{path} is not an entropy measurement ({error}); measure again"
            ) from error
        return cls(sums, **counts)


@torch.inference_mode()
def measure_entropy(model: Any, batches: Iterable[Mapping[str, Any]]) -> EntropyMeasurement:
    """Knowledge entropy of a causal language model in one pass over ``batches``.

    Each batch is a mapping with ``input_ids`` ``(B, T)`` and, if there is padding, ``attention_mask`` of the same shape. The
    trunk alone runs: the vocabulary projection is not computed. A sequence counts by the mean over its own
    unpadded tokens (Eq. 2), so the result depends neither on the batch size nor on padding, and is
    accumulated in float64 over batches. A row that is all padding is no sequence and is skipped.

    Raises KelibError for an empty data set, a mask of another shape, NaN or infinite coefficients (naming the
    layer), and a model without feed-forward layers that kelib knows.
    """
    layers = feed_forwards(model)
    sums = [np.zeros(ffn.memories) for ffn in layers]
    sequences = tokens = 0
    weight = torch.empty(0)

    def accumulate(layer: int, coefficients: torch.Tensor) -> None:
        flat = coefficients.reshape(-1, coefficients.shape[-1])
        # a matrix-vector product: no second copy of (B T, m) beyond |c| itself
        total = (
            weight.to(flat.dtype) @ flat.abs()
            if flat.dtype == torch.float64
            else weight @ flat.abs().float()
        )
        if not torch.isfinite(total).all():
            raise KelibError(
                f"layer {layer} gives NaN or infinite memory coefficients; check its weights"
            )
        sums[layer] += total.double().cpu().numpy()

    trunk = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        with watch_coefficients(layers, accumulate):
            for batch in batches:
                ids = torch.as_tensor(batch["input_ids"]).to(device)
                mask = batch.get("attention_mask")
                if mask is not None:
                    mask = torch.as_tensor(mask).to(device)
                    if mask.shape != ids.shape:
                        raise KelibError(
                            f"attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(ids.shape)}; "
                            "they must be equal"
                        )
                present = torch.ones(ids.shape, device=device) if mask is None else mask.float()
                lengths = present.sum(dim=1, keepdim=True)
                weight = (present / lengths.clamp(min=1)).reshape(-1)
                sequences += int((lengths > 0).sum())
                tokens += int(lengths.sum())
                trunk(input_ids=ids, attention_mask=mask, use_cache=False)
    finally:
        model.train(was_training)
    if sequences == 0:
        raise KelibError("no sequence to measure: the data set is empty or all padding")
    return EntropyMeasurement(tuple(sums), sequences, tokens)

"""Measures of plasticity other than entropy, of the same coefficients and of the weights.

Knowledge entropy says how evenly the memories of a layer are used. Others have asked the same of
activations (dormant units, Gini) or of the weights (rank, norm). The panel puts them in one table,
so that a reader sees what entropy adds. The functions of arrays need no torch.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from kelib.errors import KelibError
from kelib.measurement import EntropyMeasurement, shannon_entropy

TAU = 0.1  # threshold of a dormant unit if none is given


def dormant_share(coefficients: np.ndarray, tau: float = TAU) -> float:
    """Share of memories that are dormant at ``tau`` (Sokar et al. 2023, definition 3.1).

    The score of memory i is ``s_i = c_i / ((1/m) sum_k c_k)``, ``c`` the mean coefficients ``(m,)``
    of a layer; it is dormant if ``s_i <= tau``. ``tau = 0`` counts memories that never fire; scores
    have mean 1, so the share is below 1 for every ``tau`` below 1. From 0 to 1, no unit.

    Sokar et al. use the absolute activations of a ReLU network, which are often exactly 0; a smooth
    activation hardly ever gives 0, so that the share depends on ``tau`` throughout. Raises
    KelibError for coefficients that are negative, not finite or all 0, and for a ``tau`` below 0.
    """
    if not (math.isfinite(tau) and tau >= 0):
        raise KelibError(f"tau = {tau} must be a number of at least 0, as 0.1")
    checked = _checked(coefficients)
    return float(np.mean(checked / checked.mean() <= tau))


def effective_memories(coefficients: np.ndarray) -> float:
    """``exp(H) / m`` with ``H`` the knowledge entropy of ``coefficients`` ``(m,)`` (ours).

    The share of memories that, used evenly, would have the same entropy: from 1/m (one carries all)
    to 1 (all alike). Raises KelibError as :func:`dormant_share`.
    """
    checked = _checked(coefficients)
    return float(np.exp(shannon_entropy(checked)) / len(checked))


def gini(coefficients: np.ndarray) -> float:
    """Gini coefficient, ``sum_ij |c_i - c_j| / (2 m² mean(c))`` of ``coefficients`` ``(m,)``.

    Computed as ``sum_i (2 i - m - 1) c_(i) / (m sum c)`` with ``c_(1) <= ... <= c_(m)`` (Gini 1912;
    as a measure of sparsity: Hurley and Rickard 2009). From 0 (all alike) to 1 - 1/m (one carries
    all). Raises KelibError as :func:`dormant_share`.
    """
    ordered = np.sort(_checked(coefficients))
    count = len(ordered)
    ranks = 2.0 * np.arange(1, count + 1) - count - 1
    return float(ranks @ (ordered / ordered.sum()) / count) + 0.0


def effective_rank(matrix: np.ndarray) -> float:
    """``exp(-sum_k p_k ln p_k)``, ``p_k = σ_k / sum_j σ_j`` (Roy and Vetterli 2007).

    ``σ`` are the singular values of ``matrix`` ``(rows, columns)``: the exponential of an entropy,
    as :func:`effective_memories` is, but of directions in the hidden space and without data. From 1
    to the rank; it does not change with the scale of the matrix. NaN for a matrix of zeros, which
    has no distribution. Raises KelibError for NaN or infinity and for anything but a matrix.
    """
    return _effective_rank(_singular_values(matrix))


def stable_rank(matrix: np.ndarray) -> float:
    """``‖A‖_F² / σ_1²``, also the numerical rank (Rudelson and Vershynin 2007).

    From 1 to the rank; it says how far the largest direction outweighs the rest, and small singular
    values barely enter. NaN for a matrix of zeros. Raises KelibError as :func:`effective_rank`.
    """
    return _stable_rank(_singular_values(matrix))


def plasticity_panel(
    model: Any, measurement: EntropyMeasurement, *, tau: float = TAU, ranks: bool = True
) -> pd.DataFrame:
    """One row for each layer: entropy beside the other measures.

    Args:
        model: the model that was measured; only its weights are read.
        measurement: what :func:`kelib.measure_entropy` gave, with its coefficient definition.
            Dormant units in the sense of Sokar et al. need ``"absolute"``, the default.
        tau: threshold of :func:`dormant_share`.
        ranks: False leaves effective and stable ranks out. They need the singular values of each
            matrix in float64, on the GPU if the weights lie there: seconds a matrix of 2048 x 8192,
            minutes for the largest on a CPU.

    Returns columns ``layer``, ``memories`` (m), ``knowledge_entropy`` (nats),
    ``effective_memories``, ``gini``, ``dormant_share``, then for each of ``value`` (V), ``key``
    (the up projection, the K whose rows resuscitation scales) and ``gate`` (the other half of K in
    a gated layer, NaN without one) ``_effective_rank``, ``_stable_rank``, ``_norm`` (Frobenius).

    In a mixture of experts a layer is one memory of all experts, routed ones first, as in
    :class:`kelib.ffn.Mixture`: the matrices are those of the experts stacked, ``(E m, hidden)``,
    so that ranks are at most the hidden size, whatever the number of experts. Whether coefficients
    carry the router's weight is up to the measurement; an expert that the router never chooses has
    dormant memories only, in both cases.

    Raises KelibError if ``measurement`` is of a model of other layers or without knowledge entropy,
    for NaN or infinity in the weights and for a layer whose coefficients are all 0, naming it.
    """
    from kelib.architectures import feed_forwards, unwrap

    layers = feed_forwards(unwrap(model))
    entropies = measurement.knowledge_entropy
    measured = [len(total) for total in measurement.coefficient_sums]
    found = [layer.memories for layer in layers]
    if measured != found:
        raise KelibError(
            f"the measurement has {_shape(measured)}, {type(model).__name__} has {_shape(found)}: "
            "pass the model that was measured"
        )
    rows = []
    for layer, entropy, mean in zip(layers, entropies, measurement.mean_coefficients, strict=True):
        row: dict[str, Any] = {
            "layer": layer.layer,
            "memories": layer.memories,
            "knowledge_entropy": float(entropy),
            "effective_memories": effective_memories(mean),
            "gini": gini(mean),
            "dormant_share": dormant_share(mean, tau),
        }
        for name, parts in _matrices(layer).items():
            row |= _weight_measures(name, parts, layer.layer, ranks)
        rows.append(row)
    return pd.DataFrame(rows)


def _checked(coefficients: np.ndarray) -> np.ndarray:
    checked = np.asarray(coefficients, dtype=np.float64)
    if checked.ndim != 1 or checked.size == 0:
        raise KelibError(
            f"mean coefficients must be one vector of a layer, not of shape {checked.shape}"
        )
    shannon_entropy(checked)  # refuses what is negative, not finite or all 0
    return checked


def _singular_values(matrix: np.ndarray) -> np.ndarray:
    checked = np.asarray(matrix, dtype=np.float64)
    if checked.ndim != 2 or checked.size == 0:
        raise KelibError(f"a rank needs a matrix with entries, not one of shape {checked.shape}")
    if not np.isfinite(checked).all():
        raise KelibError("the matrix holds NaN or infinity, so that its rank is undefined")
    return np.linalg.svd(checked, compute_uv=False)


def _effective_rank(singular: np.ndarray) -> float:
    return float(np.exp(shannon_entropy(singular))) if singular.any() else math.nan


def _stable_rank(singular: np.ndarray) -> float:
    # relative to the largest first: squares of tiny weights would underflow
    return float(np.square(singular / singular.max()).sum()) if singular.any() else math.nan


def _matrices(layer: Any) -> dict[str, list[Any]]:
    """V, the up projection and the gate of a layer, ``(memories, hidden)``, by experts' parts."""
    from kelib.architectures import FeedForward

    if isinstance(layer, FeedForward):
        # a FeedForward whose up projection is the gate: its rows, of the first half if fused
        gate = replace(layer, up=layer.gate, gate=None) if layer.gate is not None else None
        return {
            "value": [layer.values()],
            "key": [layer.up_rows()],
            "gate": [] if gate is None else [gate.up_rows()[: layer.memories]],
        }
    experts = layer.experts
    keys = experts.gate_up_proj if layer.gated else experts.up_proj
    keys = keys.transpose(1, 2) if layer.transposed else keys  # (E, m or 2 m, hidden)
    parts: dict[str, list[Any]] = {"value": [layer.expert_values()], "key": [keys], "gate": []}
    if layer.gated and getattr(experts, "is_concatenated", True):
        half = keys.shape[1] // 2
        parts |= {"gate": [keys[:, :half]], "key": [keys[:, half:]]}
    elif layer.gated:
        parts |= {"gate": [keys[:, ::2]], "key": [keys[:, 1::2]]}
    stacked = {name: [part.flatten(0, 1) for part in found] for name, found in parts.items()}
    for shared, _ in layer.shared:
        for name, part in _matrices(shared).items():
            stacked[name] += part
    return stacked


def _weight_measures(name: str, parts: list[Any], layer: int, ranks: bool) -> dict[str, float]:
    import torch

    wanted = [f"{name}_effective_rank", f"{name}_stable_rank", f"{name}_norm"]
    wanted = wanted if ranks else wanted[2:]
    if not parts:
        return dict.fromkeys(wanted, math.nan)
    matrix = torch.cat([part.detach() for part in parts])
    # Metal has no float64
    matrix = (matrix if matrix.device.type == "cuda" else matrix.cpu()).double()
    norm = float(torch.linalg.matrix_norm(matrix))
    if not math.isfinite(norm):
        raise KelibError(f"layer {layer}: the {name} weights hold NaN or infinity")
    if not ranks:
        return {wanted[0]: norm}
    singular = torch.linalg.svdvals(matrix).cpu().numpy()
    return dict(zip(wanted, (_effective_rank(singular), _stable_rank(singular), norm), strict=True))


def _shape(memories: list[int]) -> str:
    widths = sorted(set(memories))
    return f"{len(memories)} layers of {' or '.join(str(width) for width in widths)} memories"

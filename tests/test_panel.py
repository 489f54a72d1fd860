"""The panel: known values, ranges and invariances, and every number once more by hand."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from zoo import MIXTURES, ZOO, build, padded, sequences_of

import kelib
from kelib.architectures import feed_forwards
from kelib.entropy import measure_entropy
from kelib.errors import KelibError
from kelib.panel import (
    dormant_share,
    effective_memories,
    effective_rank,
    gini,
    plasticity_panel,
    stable_rank,
)

BATCHES = [padded(sequences_of([9, 6, 4]), "right")]
VECTORS = st.lists(st.floats(0, 100), min_size=2, max_size=30).filter(lambda v: sum(v) > 1e-3)


def matrix_of(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, columns))


# --- coefficients ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 64])
def test_uniform_coefficients_are_the_one_end(size: int) -> None:
    even = np.full(size, 0.3)
    assert gini(even) == pytest.approx(0, abs=1e-12)
    assert effective_memories(even) == pytest.approx(1)
    assert dormant_share(even, 0.99) == 0


@pytest.mark.parametrize("size", [2, 7, 64])
def test_one_hot_coefficients_are_the_other(size: int) -> None:
    single = np.eye(size)[size // 2] * 5
    assert gini(single) == pytest.approx(1 - 1 / size)
    assert effective_memories(single) == pytest.approx(1 / size)
    assert dormant_share(single, 0) == (size - 1) / size


def test_values_by_hand() -> None:
    coefficients = np.array([0.0, 1.0, 2.0, 5.0])  # mean 2
    pairs = np.abs(coefficients[:, None] - coefficients[None]).sum()
    assert gini(coefficients) == pytest.approx(pairs / (2 * 4 * 4 * 2))
    assert effective_memories(coefficients) == pytest.approx(
        math.exp(-sum(p * math.log(p) for p in (1 / 8, 2 / 8, 5 / 8))) / 4
    )
    # scores 0, 0.5, 1, 2.5; the threshold itself is dormant
    found = [dormant_share(coefficients, tau) for tau in (0, 0.49, 0.5, 1, 2.4, 2.5)]
    assert found == [0.25, 0.25, 0.5, 0.75, 0.75, 1]


@settings(max_examples=60, deadline=None)
@given(VECTORS, st.randoms(use_true_random=False), st.floats(0.01, 100))
def test_order_and_scale_do_not_matter_and_ranges_hold(
    values: list[float], order: Any, scale: float
) -> None:
    coefficients, size = np.array(values), len(values)
    mixed = values.copy()
    order.shuffle(mixed)
    for measure in (gini, effective_memories):
        assert measure(np.array(mixed) * scale) == pytest.approx(measure(coefficients), abs=1e-9)
    # a score can lie on the threshold, where the last bit of a sum decides
    scores = coefficients / coefficients.mean()
    if np.abs(scores - 0.1).min() > 1e-9:
        assert dormant_share(np.array(mixed) * scale) == dormant_share(coefficients)
    assert -1e-12 <= gini(coefficients) <= 1 - 1 / size + 1e-12
    assert 1 / size - 1e-12 <= effective_memories(coefficients) <= 1 + 1e-12
    assert 0 <= dormant_share(coefficients) < 1


@pytest.mark.parametrize("measure", [gini, effective_memories, dormant_share])
@pytest.mark.parametrize(
    ("coefficients", "message"),
    [
        ([0.0, 0.0], "sum to 0"),
        ([1.0, -1.0], "must not be negative"),
        ([1.0, np.nan], "NaN or infinity"),
        ([], r"one vector of a layer, not of shape \(0,\)"),
        ([[1.0], [2.0]], r"not of shape \(2, 1\)"),
    ],
)
def test_unusable_coefficients_are_refused(
    measure: Any, coefficients: list[Any], message: str
) -> None:
    with pytest.raises(KelibError, match=message):
        measure(np.array(coefficients))


@pytest.mark.parametrize("tau", [-0.1, math.nan, math.inf])
def test_unusable_thresholds_are_refused(tau: float) -> None:
    with pytest.raises(KelibError, match=r"tau = .* must be a number of at least 0"):
        dormant_share(np.ones(3), tau)


# --- matrices --------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [effective_rank, stable_rank])
def test_ranks_of_known_matrices(rank: Any) -> None:
    assert rank(np.eye(6) * 0.02) == pytest.approx(6)
    assert rank(np.outer(np.arange(1.0, 9), [1.0, -2, 3])) == pytest.approx(1)
    assert rank(np.full((4, 3), 1e-200)) == pytest.approx(1)
    assert math.isnan(rank(np.zeros((4, 3))))


def test_ranks_by_hand() -> None:
    diagonal = np.diag([3.0, 1.0, 0.0])
    assert stable_rank(diagonal) == pytest.approx(10 / 9)
    assert effective_rank(diagonal) == pytest.approx(4 / 3**0.75)


@pytest.mark.parametrize("rank", [effective_rank, stable_rank])
def test_ranks_do_not_see_rotation_transposition_scale_or_order(rank: Any) -> None:
    matrix = matrix_of(12, 5)
    turn = np.linalg.qr(matrix_of(5, 5, 1))[0]
    order = np.random.default_rng(2).permutation(12)
    assert 1 < rank(matrix) < 5
    for same in (matrix @ turn, matrix.T, matrix * 1e-3, matrix[order]):
        assert rank(same) == pytest.approx(rank(matrix))


def test_a_rank_needs_a_finite_matrix() -> None:
    for rank in (effective_rank, stable_rank):
        with pytest.raises(KelibError, match=r"a rank needs a matrix .* shape \(3,\)"):
            rank(np.ones(3))
        with pytest.raises(KelibError, match="the matrix holds NaN or infinity"):
            rank(np.array([[1.0, np.inf]]))


# --- the panel -------------------------------------------------------------------------------


def weights_by_hand(name: str, model: Any, layer: int) -> dict[str, np.ndarray | None]:
    """V, up and gate of a layer, from the names that transformers gives them."""
    weights = {key: value.detach().double().numpy() for key, value in model.state_dict().items()}

    def of(end: str) -> np.ndarray:
        (found,) = [w for n, w in weights.items() if f".{layer}." in n and n.endswith(end)]
        return found

    if name == "gpt2":  # stored (in, out)
        return {"value": of("mlp.c_proj.weight"), "key": of("mlp.c_fc.weight").T, "gate": None}
    if name == "phi3":
        both = of("gate_up_proj.weight")
        return {"value": of("down_proj.weight").T, "key": both[40:], "gate": both[:40]}
    if name == "llama":
        ends = {"key": "up_proj.weight", "gate": "gate_proj.weight"}
        parts: dict[str, np.ndarray | None] = {part: of(end) for part, end in ends.items()}
        return parts | {"value": of("down_proj.weight").T}
    down, keys = of("experts.down_proj"), of("experts.gate_up_proj")
    each = down.shape[-1]
    values = [expert.T for expert in down]
    ups, gates = [expert[each:] for expert in keys], [expert[:each] for expert in keys]
    if name == "qwen2_moe":
        values.append(of("shared_expert.down_proj.weight").T)
        ups.append(of("shared_expert.up_proj.weight"))
        gates.append(of("shared_expert.gate_proj.weight"))
    return {"value": np.vstack(values), "key": np.vstack(ups), "gate": np.vstack(gates)}


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "mixtral", "qwen2_moe"])
def test_every_number_of_the_panel_by_hand(name: str) -> None:
    model = build(name)
    found = measure_entropy(model, BATCHES)
    panel = plasticity_panel(model, found, tau=0.4)
    assert list(panel["layer"]) == [0, 1]
    assert panel["dormant_share"].between(0.01, 0.99).all()  # else tau was not tested
    for layer, row in panel.iterrows():
        mean = found.mean_coefficients[layer]
        share = mean / mean.sum()
        entropy = -(share * np.log(share)).sum()
        pairs = np.abs(mean[:, None] - mean[None]).mean() / (2 * mean.mean())
        wanted = {
            "memories": len(mean),
            "knowledge_entropy": entropy,
            "effective_memories": np.exp(entropy) / len(mean),
            "gini": pairs,
            "dormant_share": (mean <= 0.4 * mean.mean()).mean(),
        }
        for part, matrix in weights_by_hand(name, model, layer).items():
            if matrix is None:
                assert row[[c for c in panel if c.startswith(part)]].isna().all()
                continue
            assert matrix.shape == (len(mean), 24)
            # squares of the singular values, by another way than the panel's
            squares = np.linalg.eigvalsh(matrix.T @ matrix)
            spectrum = np.sqrt(squares) / np.sqrt(squares).sum()
            wanted |= {
                f"{part}_effective_rank": np.exp(-(spectrum * np.log(spectrum)).sum()),
                f"{part}_stable_rank": squares.sum() / squares.max(),
                f"{part}_norm": np.sqrt((matrix**2).sum()),
            }
        for column, value in wanted.items():
            assert row[column] == pytest.approx(value, rel=1e-9), column


@pytest.mark.parametrize("name", [*ZOO, "gpt_oss", "glm4_moe"])
def test_key_gate_and_value_have_a_row_a_memory(name: str) -> None:
    """In every architecture: their norms are those of the matrices taken apart otherwise."""
    model = build(name)
    panel = plasticity_panel(model, measure_entropy(model, BATCHES))
    for row, layer in zip(panel.itertuples(), feed_forwards(model), strict=True):
        assert row.memories == layer.memories
        assert row.value_norm == pytest.approx(float(layer.value_norms().norm()))
        assert math.isnan(row.gate_norm) == (layer.gate is None)
        assert 1 < row.key_effective_rank <= 24 and 1 < row.value_stable_rank <= 24


def test_interleaved_and_transposed_experts_are_taken_apart() -> None:
    model = build("gpt_oss")
    experts = feed_forwards(model)[0].experts  # type: ignore[union-attr]
    with torch.no_grad():
        experts.gate_up_proj[..., ::2] = 0
    panel = plasticity_panel(model, measure_entropy(build("gpt_oss"), BATCHES))
    assert panel.gate_norm[0] == 0 and math.isnan(panel.gate_effective_rank[0])
    assert panel.key_norm[0] == pytest.approx(float(experts.gate_up_proj.detach().norm()))


def test_without_ranks_the_rest_is_the_same() -> None:
    model = build("llama")
    found = measure_entropy(model, BATCHES)
    whole, quick = plasticity_panel(model, found), plasticity_panel(model, found, ranks=False)
    assert set(whole) - set(quick) == {
        f"{part}_{kind}_rank"
        for part in ("value", "key", "gate")
        for kind in ("effective", "stable")
    }
    assert quick.equals(whole[quick.columns])


def test_rescaling_shows_in_the_coefficients_but_not_in_the_ranks() -> None:
    """All rows of V doubled, of the up projection halved: the same function, the same shares."""
    model = build("llama")
    before = plasticity_panel(model, measure_entropy(model, BATCHES))
    with torch.no_grad():
        for layer in feed_forwards(model):
            layer.values().mul_(2)
            layer.up_rows().mul_(0.5)
            layer.up.bias.mul_(0.5)
    after = plasticity_panel(model, measure_entropy(model, BATCHES))
    assert (after.value_norm / before.value_norm).tolist() == pytest.approx([2, 2])
    assert (after.key_norm / before.key_norm).tolist() == pytest.approx([0.5, 0.5])
    rest = [c for c in before if not c.endswith("_norm")]
    np.testing.assert_allclose(after[rest], before[rest], rtol=1e-6)


def test_half_precision_weights_are_read_exactly() -> None:
    model = build("llama").to(torch.bfloat16)
    found = measure_entropy(model, BATCHES)
    half = plasticity_panel(model, found)
    assert half.equals(plasticity_panel(model.float(), found))


def test_a_measurement_of_another_model_is_refused() -> None:
    found = measure_entropy(build("llama"), BATCHES)
    with pytest.raises(
        KelibError,
        match=r"has 2 layers of 40 memories, \w+ has 2 layers of 128 memories: pass the model",
    ):
        plasticity_panel(build("qwen2_moe"), found)
    nothing = measure_entropy(build("llama"), BATCHES, knowledge=False, next_token=True)
    with pytest.raises(KelibError, match="knowledge entropy was not measured"):
        plasticity_panel(build("llama"), nothing)


@pytest.mark.parametrize("ranks", [True, False])
def test_broken_weights_and_dead_layers_name_the_layer(ranks: bool) -> None:
    model = build("llama")
    found = measure_entropy(model, BATCHES)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 3] = math.nan
    with pytest.raises(KelibError, match="layer 1: the value weights hold NaN or infinity"):
        plasticity_panel(model, found, ranks=ranks)
    dead = build("llama")
    with torch.no_grad():
        for parameter in dead.model.layers[1].mlp.up_proj.parameters():
            parameter.zero_()
    with pytest.raises(KelibError, match="layer 1: mean coefficients of a layer sum to 0"):
        plasticity_panel(dead, measure_entropy(dead, BATCHES), ranks=ranks)


def test_router_weight_changes_coefficients_not_weights() -> None:
    model = build(MIXTURES[0])
    with_weight = plasticity_panel(model, measure_entropy(model, BATCHES))
    without = plasticity_panel(model, measure_entropy(model, BATCHES, router_weight=False))
    assert (with_weight.gini != without.gini).all()
    same = [c for c in without if c.startswith(("value", "key", "gate"))]
    assert without[same].equals(with_weight[same])


def test_the_measures_of_arrays_need_no_torch() -> None:
    code = (
        "import sys, kelib.panel as p\n"
        "assert p.gini([1, 2]) > 0 and p.stable_rank([[1, 2]]) == 1\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_package_offers_the_panel() -> None:
    assert kelib.plasticity_panel is plasticity_panel

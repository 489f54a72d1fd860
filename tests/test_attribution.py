"""Gradients by memory against a float64 reference that takes every layer apart by hand."""

from __future__ import annotations

import copy
import doctest
import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from zoo import MIXTURES, build, padded, sequences_of

import kelib.attribution
from kelib.attribution import (
    MemoryGradients,
    layer_table,
    measure_gradients,
    share_table,
    top_share,
)
from kelib.decomposition import dense_layers, row_changes
from kelib.entropy import measure_entropy
from kelib.errors import KelibError
from kelib.ffn import feed_forwards

NAMES = ("olmo", "llama", "gpt_neox", "gpt2")
LENGTHS = (9, 5, 12)


def exact(name):
    return build(name).double()


def state_of(model):
    """All that a measurement must leave as it was."""
    return (
        {name: (p.clone(), p.requires_grad, p.grad) for name, p in model.named_parameters()},
        [module.training for module in model.modules()],
        [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
    )


@contextmanager
def untouched(model):
    weights, modes, hooks = state_of(model)
    yield
    after = state_of(model)
    assert (modes, hooks) == after[1:]
    for name, (weight, requires, gradient) in weights.items():
        assert torch.equal(weight, after[0][name][0])
        assert requires == after[0][name][1] and gradient is after[0][name][2]


def key_gradients(name, block):
    """Gradients of K by memory, each architecture written out."""
    mlp = block.mlp
    if name == "gpt2":
        return {"up": mlp.c_fc.weight.grad.T}
    if name == "gpt_neox":
        return {"up": mlp.dense_h_to_4h.weight.grad}
    if name == "phi3":
        half = len(mlp.gate_up_proj.weight) // 2
        return {
            "gate": mlp.gate_up_proj.weight.grad[:half],
            "up": mlp.gate_up_proj.weight.grad[half:],
        }
    return {"gate": mlp.gate_proj.weight.grad, "up": mlp.up_proj.weight.grad}


def reference(name, sequences):
    """One sequence at a time: c and δ from perturbations that are 0, then sums written out."""
    model = exact(name)
    inner = model.base_model
    blocks = inner.h if name == "gpt2" else inner.layers
    downs = {"gpt2": "c_proj", "gpt_neox": "dense_4h_to_h"}
    layers = [getattr(block.mlp, downs.get(name, "down_proj")) for block in blocks]
    results = [{"c": 0.0, "a": 0.0, "G": 0.0, "bound": 0.0} for _ in layers]
    predicted = sum(len(sequence) - 1 for sequence in sequences)
    total = 0.0
    for sequence in sequences:
        gains, shifts, kept, handles = [], [], [], []
        for down, ffn in zip(layers, feed_forwards(model), strict=True):
            gain = torch.ones(len(sequence), ffn.memories, dtype=torch.float64, requires_grad=True)
            shift = torch.zeros(len(sequence), 24, dtype=torch.float64, requires_grad=True)
            gains.append(gain)
            shifts.append(shift)
            handles += [
                down.register_forward_pre_hook(
                    lambda _, x, gain=gain, kept=kept: (kept.append(x[0][0]), x[0] * gain)[1:]
                ),
                down.register_forward_hook(lambda _, __, output, shift=shift: output + shift),
            ]
        logits = model(input_ids=torch.tensor([sequence])).logits[0].double()
        chances = logits.log_softmax(-1)
        loss = -sum(chances[t, sequence[t + 1]] for t in range(len(sequence) - 1))
        (loss / predicted).backward()
        total += float(loss.detach())
        for handle in handles:
            handle.remove()
        for result, gain, shift, c in zip(results, gains, shifts, kept, strict=True):
            c, delta = c.detach().numpy(), shift.grad.numpy()
            result["c"] = result["c"] + np.abs(c).mean(0) / len(sequences)
            pull = np.abs(gain.grad.numpy()) * predicted  # c ∂ log P / ∂ c
            result["a"] = result["a"] + pull.mean(0) / len(sequences)
            outer = sum(np.outer(c[t], delta[t]) for t in range(len(sequence)))
            result["G"] = result["G"] + outer
            result["bound"] = result["bound"] + sum(
                np.abs(c[t]) * np.linalg.norm(delta[t]) for t in range(len(sequence))
            )
    keys = [key_gradients(name, block) for block in blocks]
    for result, key in zip(results, keys, strict=True):
        result["norms"] = {"V": np.linalg.norm(result["G"], axis=1)}
        result["norms"] |= {part: rows.norm(dim=1).numpy() for part, rows in key.items()}
    return results, total / predicted


def assert_equal(found, wanted, rtol, atol=0.0):
    results, loss = wanted
    assert found.loss == pytest.approx(loss, rel=rtol)
    for layer, result in enumerate(results):
        for values, key in (
            (found.coefficients, "c"),
            (found.attributions, "a"),
            (found.bounds, "bound"),
        ):
            assert values[layer].dtype == np.float64
            np.testing.assert_allclose(values[layer], result[key], rtol=rtol, atol=atol)
        assert found.norms[layer].keys() == result["norms"].keys()
        for part, norms in result["norms"].items():
            np.testing.assert_allclose(found.norms[layer][part], norms, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", (*NAMES, "phi3"))
def test_gradients_are_those_of_the_reference(name):
    sequences = sequences_of(LENGTHS)
    wanted = reference(name, sequences)
    model = exact(name)
    with untouched(model):
        found = measure_gradients(model, padded(sequences, "right"))
    assert found.predicted == sum(LENGTHS) - len(LENGTHS)
    # padding changes the order in which attention adds, no more
    assert_equal(found, wanted, 1e-6, 1e-9)
    assert_equal(measure_gradients(build(name), padded(sequences, "right")), wanted, 2e-3, 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_batches_order_and_padding_do_not_matter(name):
    model, sequences = exact(name), sequences_of(LENGTHS)
    found = measure_gradients(model, padded(sequences, "right"))
    for other in (
        measure_gradients(model, padded(sequences[::-1], "right"), micro_batch_size=2),
        measure_gradients(model, padded(sequences, "left"), micro_batch_size=1),
    ):
        for one, two in zip(found.attributions, other.attributions, strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-8)
        for one, two in zip(found.norms, other.norms, strict=True):
            for part in one:
                np.testing.assert_allclose(one[part], two[part], rtol=1e-5, atol=1e-8)


def test_twice_the_batch_is_the_same_measurement():
    model, ids = exact("olmo"), np.array(sequences_of([8, 8]))
    once, twice = measure_gradients(model, ids), measure_gradients(model, np.tile(ids, (2, 1)))
    np.testing.assert_allclose(once.norms[0]["V"], twice.norms[0]["V"], rtol=1e-9)
    np.testing.assert_allclose(once.attributions[1], twice.attributions[1], rtol=1e-9)


def test_mean_coefficients_are_those_of_the_entropy_measurement():
    model, batch = build("olmo"), padded(sequences_of(LENGTHS), "left")
    found, wanted = measure_gradients(model, batch), measure_entropy(model, [batch])
    for one, two in zip(found.coefficients, wanted.mean_coefficients, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5)
    entropies = layer_table(found)["coefficient_entropy"]
    np.testing.assert_allclose(entropies, wanted.knowledge_entropy, rtol=1e-6)


@pytest.mark.parametrize("name", ["olmo", "llama"])
def test_a_scale_moved_from_k_to_v_leaves_attributions(name):
    """Attribution stays; the gradient of v_i grows as c_i does."""
    model, ids = exact(name), np.array(sequences_of([8, 8]))
    before, scale = measure_gradients(model, ids), torch.linspace(0.3, 4, 40).double()
    with torch.no_grad():
        for ffn in feed_forwards(model):
            ffn.up_rows().mul_(scale[:, None])
            if ffn.up.bias is not None:
                ffn.up.bias.mul_(scale)
            ffn.values().div_(scale[:, None])
    after = measure_gradients(model, ids)
    for layer in range(2):
        np.testing.assert_allclose(
            after.attributions[layer], before.attributions[layer], rtol=1e-5, atol=1e-9
        )
        np.testing.assert_allclose(
            after.norms[layer]["V"], before.norms[layer]["V"] * scale.numpy(), rtol=1e-5, atol=1e-9
        )


def test_frozen_weights_gradients_hooks_and_modes_are_left():
    model, ids = build("gpt2", resid_pdrop=0.5), np.array(sequences_of([6, 6]))
    model.train()
    model.transformer.h[0].eval()
    for parameter in model.transformer.h[1].parameters():
        parameter.requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    with untouched(model), torch.no_grad():
        first, second = measure_gradients(model, ids), measure_gradients(model, ids)
    assert (first.norms[1]["V"] == second.norms[1]["V"]).all()  # no dropout
    model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
    with untouched(model), pytest.raises(ZeroDivisionError):
        measure_gradients(model, ids)


# --- tables -------------------------------------------------------------------------------------


def made(coefficients, norms, attributions=None):
    """One layer of a plain model with these numbers."""
    values = np.asarray(coefficients, dtype=float)
    return MemoryGradients(
        (values,),
        (np.asarray(values if attributions is None else attributions, dtype=float),),
        ({"V": np.asarray(norms, dtype=float), "up": np.ones(len(values))},),
        (2 * np.asarray(norms, dtype=float),),
        1.0,
        4,
    )


def test_a_power_law_has_its_slope():
    mean = np.geomspace(0.01, 10, 50)
    (row,) = layer_table(made(mean, 3 * mean**0.7)).to_dict("records")
    assert row["slope"] == pytest.approx(0.7) and row["intercept"] == pytest.approx(math.log(3))
    assert row["spearman"] == pytest.approx(1) and row["left_out"] == 0
    assert row["coherence"] == pytest.approx(0.5)
    assert row["bound"] == pytest.approx(math.log(50)) and row["memories"] == 50


def test_zeros_are_left_out_of_the_slope_and_counted():
    mean = np.array([0.0, 1.0, 2.0, 4.0, 8.0])
    (row,) = layer_table(made(mean, [5.0, 1.0, 0.0, 16.0, 64.0])).to_dict("records")
    assert row["slope"] == pytest.approx(2) and row["left_out"] == 2


def test_entropies_at_their_ends():
    one_hot, even = np.eye(8)[3], np.ones(8)
    (row,) = layer_table(made(even, one_hot, one_hot)).to_dict("records")
    assert row["gradient_entropy"] == 0 and row["attribution_entropy"] == 0
    assert row["coefficient_entropy"] == pytest.approx(math.log(8))
    assert math.isnan(row["slope"]) and math.isnan(row["spearman"])
    (row,) = layer_table(made(even, np.zeros(8))).to_dict("records")
    assert math.isnan(row["gradient_entropy"]) and math.isnan(row["coherence"])


def test_the_loss_scale_changes_no_spread():
    mean = np.random.default_rng(0).lognormal(size=40)
    norm = np.random.default_rng(1).lognormal(size=40)
    one, ten = layer_table(made(mean, norm)), layer_table(made(mean, 10 * norm))
    same = ["slope", "spearman", "gradient_entropy", "coherence"]
    np.testing.assert_allclose(one[same], ten[same])
    shares = [share_table(made(mean, factor * norm))["value"] for factor in (1, 10)]
    np.testing.assert_allclose(*shares)


def test_shares_against_sorting_by_hand():
    mean = np.random.default_rng(0).lognormal(size=40)
    norm = np.random.default_rng(1).lognormal(size=40)
    table = share_table(made(mean, norm), {"update": ({"V": norm[::-1], "up": mean},)})
    assert len(table) == 2 * 2 * 2 * 3 and not table.duplicated(list(table.columns[:5])).any()
    indexed = table.set_index(["quantity", "part", "ranked_by", "share"])
    best = sorted(range(40), key=lambda i: -mean[i])[:4]
    by_hand = sum(norm[i] ** 2 for i in best) / sum(norm**2)
    assert indexed.loc[("gradient", "V", "coefficient", 0.10), "value"] == pytest.approx(by_hand)
    by_hand = sum(mean[i] ** 2 for i in best) / sum(mean**2)
    assert indexed.loc[("update", "up", "coefficient", 0.10), "value"] == pytest.approx(by_hand)
    assert indexed.loc[("update", "V", "gradient", 0.01), "total"] == pytest.approx(sum(norm**2))
    even = indexed.loc[("gradient", "up")]["value"].reset_index()
    np.testing.assert_allclose(even["value"], even["share"])


def test_top_share_counts_parts_of_a_memory():
    values = np.array([1.0, 4.0, 3.0])
    assert top_share(values, values, 0.5) == pytest.approx((4 + 0.5 * 3) / 8)
    assert top_share(values, values, 0.1) == pytest.approx(0.3 * 4 / 8)
    assert top_share(values, values, 1) == pytest.approx(1)
    assert math.isnan(top_share(np.zeros(3), values, 0.5))


def test_examples_run():
    assert doctest.testmod(kelib.attribution).failed == 0


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0, -0.1, 1.1, math.nan])
def test_a_share_outside_its_range(share):
    with pytest.raises(KelibError, match=r"share = .* must lie in \(0, 1\]"):
        share_table(made([1.0, 2.0], [1.0, 2.0]), shares=[share])


@pytest.mark.parametrize(
    "ids", [np.zeros((0, 5), int), np.zeros((3, 0), int), np.ones((3, 1), int)]
)
def test_an_empty_batch(ids):
    with pytest.raises(KelibError, match="no token to predict: it needs a sequence of at least 2"):
        measure_gradients(build("olmo"), ids)


def test_other_bad_inputs():
    model, ids = build("olmo"), np.array(sequences_of([6, 6]))
    with pytest.raises(KelibError, match="the vocabulary has 97"):
        measure_gradients(model, ids + 97)
    with pytest.raises(KelibError, match="micro_batch_size = 0 must be at least 1"):
        measure_gradients(model, ids, micro_batch_size=0)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[2, 3] = math.nan
    with pytest.raises(KelibError, match=r"stands in model\.layers\.1\.mlp\.up_proj\.weight; load"):
        measure_gradients(broken, ids)
    with pytest.raises(KelibError, match="update has other layers than the gradients"):
        share_table(made([1.0, 2.0], [1.0, 2.0]), {"update": row_changes(model, model)})
    model.model.layers[1].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight
    with pytest.raises(KelibError, match="share their weights"):
        measure_gradients(model, ids)


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_are_refused(name):
    with pytest.raises(KelibError, match=r"layer \d of .* is a mixture of experts"):
        dense_layers(build(name))

"""Resuscitation against Algorithm 1 written out, and against what the changed model really does."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from kelib.entropy import measure_entropy
from kelib.errors import KelibError
from kelib.ffn import feed_forwards
from kelib.interventions import resuscitate, resuscitation_multipliers

GATED = ("olmo", "llama", "gemma2", "granite")


def algorithm_1(coefficients, p, q):
    """One layer, one memory at a time."""
    ordered = sorted(coefficients)
    place = p * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    threshold = ordered[low] + (place - low) * (ordered[high] - ordered[low])
    mean = sum(coefficients) / len(coefficients)
    return [q * mean / c if c <= threshold else 1.0 for c in coefficients]


def drawn(memories=48, layers=2, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.lognormal(size=memories) for _ in range(layers)]


def batches(packed):
    return [{"input_ids": torch.from_numpy(packed.blocks["entropy"].astype(np.int64))}]


# --- the multipliers ----------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.01, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("q", [0.5, 1.0, 3.0])
def test_multipliers_are_those_of_algorithm_1(p, q):
    for seed, memories in enumerate((1, 2, 7, 48, 101)):
        (coefficients,) = drawn(memories, 1, seed)
        found = resuscitation_multipliers(coefficients, p, q)
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, algorithm_1(coefficients.tolist(), p, q), rtol=1e-12)


def test_a_hand_example():
    # mean 2, median 1.5: the two smallest become q times the mean
    found = resuscitation_multipliers(np.array([1.0, 2.0, 4.0, 1.0]), 0.5, 3.0)
    assert found.tolist() == [6.0, 1.0, 1.0, 6.0]


def test_ties_at_the_threshold_are_all_woken():
    found = resuscitation_multipliers(np.array([5.0, 1.0, 1.0, 1.0]), 0.5, 1.0)
    assert found.tolist() == [1.0, 2.0, 2.0, 2.0]  # three of four at p = 50 %
    equal = resuscitation_multipliers(np.full(6, 0.3), 0.5, 2.0)
    np.testing.assert_allclose(equal, 2.0)


def test_the_ratio_at_its_ends():
    (coefficients,) = drawn(48, 1)
    assert (resuscitation_multipliers(coefficients, 0.0, 3.0) == 1).all()
    every = resuscitation_multipliers(coefficients, 1.0, 1.0)
    np.testing.assert_allclose(every * coefficients, coefficients.mean())
    smallest = resuscitation_multipliers(coefficients, 1e-9, 1.0)
    assert np.flatnonzero(smallest != 1).tolist() == [int(coefficients.argmin())]


def test_a_factor_below_the_ratio_puts_memories_to_sleep():
    found = resuscitation_multipliers(np.array([1.0, 2.0, 4.0, 1.0]), 1.0, 0.5)
    assert found.tolist() == [1.0, 0.5, 0.25, 1.0]


def test_the_coefficients_are_left_alone():
    (coefficients,) = drawn(48, 1)
    before = coefficients.copy()
    resuscitation_multipliers(coefficients, 0.5, 2.0)
    assert np.array_equal(coefficients, before)


@pytest.mark.parametrize(
    ("coefficients", "p", "q", "message"),
    [
        ([1.0, 2.0], -0.1, 1.0, "resuscitation ratio p = -0.1 must lie between 0 and 1"),
        ([1.0, 2.0], 50, 1.0, "resuscitation ratio p = 50 must lie between 0 and 1"),
        ([1.0, 2.0], float("nan"), 1.0, "resuscitation ratio p = nan must lie"),
        ([1.0, 2.0], 0.5, 0.0, "amplifying factor q = 0.0 must be finite and above 0"),
        ([1.0, 2.0], 0.5, float("inf"), "amplifying factor q = inf must be finite"),
        ([1.0, float("nan")], 0.5, 1.0, "mean coefficients must be finite and not negative"),
        ([1.0, float("inf")], 0.5, 1.0, "mean coefficients must be finite and not negative"),
        ([1.0, -0.1], 0.0, 1.0, "mean coefficients must be finite and not negative; measure"),
        ([1.0, 0.0, 0.0, 3.0], 0.5, 1.0, "2 memories have a mean coefficient of 0, so that no"),
        ([1.0, 1e-320, 2.0, 3.0], 0.5, 1.0, "1 memories have a mean coefficient of 0"),
        ([0.0, 0.0], 0.5, 1.0, "2 memories have a mean coefficient of 0"),
    ],
)
def test_what_cannot_be_done_is_refused(coefficients, p, q, message):
    with pytest.raises(KelibError, match=message):
        resuscitation_multipliers(np.array(coefficients), p, q)


def test_a_dead_memory_does_not_matter_where_nothing_is_woken():
    assert resuscitation_multipliers(np.array([0.0, 1.0]), 0.0, 1.0).tolist() == [1.0, 1.0]


# --- the model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", GATED)
def test_coefficients_of_the_running_model_are_multiplied(model_of, packed, kind):
    """Each layer of the changed model gives u times what the old one would on the same input."""
    model = copy.deepcopy(model_of(kind)).double()  # sums that cancel lose digits in float32
    coefficients = drawn()
    changed = resuscitate(model, coefficients, 0.5, 2.0)
    seen = {}
    blocks = []
    for place, ffn in enumerate(feed_forwards(changed)):
        blocks.append(next(m for m in changed.modules() if ffn.down in m.children()))
        blocks[-1].register_forward_pre_hook(
            lambda _m, inputs, place=place: seen.update({("in", place): inputs[0]})
        )
        ffn.down.register_forward_pre_hook(
            lambda _m, inputs, place=place: seen.update({("out", place): inputs[0]})
        )
    with torch.no_grad():
        changed(**batches(packed)[0])
        for place, (ffn, block) in enumerate(zip(feed_forwards(model), blocks, strict=True)):
            x = seen["in", place]
            old = block.act_fn(ffn.gate(x)) * ffn.up(x)
            u = torch.from_numpy(np.array(algorithm_1(coefficients[place].tolist(), 0.5, 2.0)))
            assert 20 < int((u != 1).sum()) < 28
            torch.testing.assert_close(seen["out", place], old * u, rtol=1e-9, atol=1e-12)
            assert torch.equal(seen["out", place][..., u == 1], old[..., u == 1])


def test_a_bias_of_the_up_projection_is_scaled_too(model_of, packed):
    config = copy.deepcopy(model_of("llama").config)
    config.mlp_bias = True
    torch.manual_seed(1)
    model = type(model_of("llama"))(config)
    for ffn in feed_forwards(model):
        torch.nn.init.normal_(ffn.up.bias)
        torch.nn.init.normal_(ffn.gate.bias)
    measured = measure_entropy(model, batches(packed)).mean_coefficients
    changed = resuscitate(model, measured, 0.5, 1.0)
    after = measure_entropy(changed, batches(packed)).mean_coefficients
    u = algorithm_1(measured[0].tolist(), 0.5, 1.0)
    np.testing.assert_allclose(after[0], measured[0] * u, rtol=1e-4)


def test_woken_memories_of_the_first_layer_become_q_times_the_mean(model_of, packed):
    model = model_of("olmo")
    measured = measure_entropy(model, batches(packed))
    first = measured.mean_coefficients[0]
    changed = resuscitate(model, measured.mean_coefficients, 0.5, 3.0)
    after = measure_entropy(changed, batches(packed)).mean_coefficients[0]
    woken = first <= np.median(first)
    np.testing.assert_allclose(after[woken], 3 * first.mean(), rtol=1e-4)
    np.testing.assert_allclose(after[~woken], first[~woken], rtol=1e-6)


def test_waking_all_to_the_mean_gives_the_largest_entropy(model_of, packed):
    model = model_of("olmo")
    measured = measure_entropy(model, batches(packed))
    changed = resuscitate(model, measured.mean_coefficients, 1.0, 1.0)
    after = measure_entropy(changed, batches(packed)).knowledge_entropy
    assert after[0] == pytest.approx(math.log(48), abs=1e-6)
    assert measured.knowledge_entropy[0] < math.log(48) - 0.01


@pytest.mark.parametrize("kind", GATED)
def test_nothing_changes_but_the_rows_of_the_up_projections(model_of, kind):
    model = model_of(kind)
    coefficients = drawn()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    changed = resuscitate(model, coefficients, 0.5, 1.0)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])  # the model that went in is as it was
    after = changed.state_dict()
    assert list(after) == list(before)
    differ = [name for name in before if not torch.equal(after[name], before[name])]
    assert differ == [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(2)]
    for layer, name in enumerate(differ):
        u = torch.tensor(algorithm_1(coefficients[layer].tolist(), 0.5, 1.0))
        torch.testing.assert_close(after[name], before[name] * u[:, None].float())
    memory = {value.data_ptr() for value in before.values()}
    memory |= {value.data_ptr() for value in model.state_dict().values()}
    assert not memory & {value.data_ptr() for value in after.values()}


def test_tied_embeddings_stay_tied(model_of):
    model = model_of("gemma2")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    changed = resuscitate(model, drawn(), 0.5, 2.0)
    assert changed.get_output_embeddings().weight is changed.get_input_embeddings().weight
    assert changed.get_input_embeddings().weight is not model.get_input_embeddings().weight


def test_no_ratio_no_change(model_of, packed):
    model = model_of("olmo")
    changed = resuscitate(model, drawn(), 0.0, 3.0)
    with torch.no_grad():
        one, other = model(**batches(packed)[0]).logits, changed(**batches(packed)[0]).logits
    assert torch.equal(one, other)


def test_the_changed_model_trains(model_of, packed):
    changed = resuscitate(model_of("olmo"), drawn(), 0.5, 2.0)
    ids = batches(packed)[0]["input_ids"][:2]
    changed(input_ids=ids, labels=ids).loss.backward()
    assert all(ffn.up.weight.grad.abs().sum() > 0 for ffn in feed_forwards(changed))


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox"])
def test_layers_without_a_gate_are_refused(model_of, kind):
    said = (
        "layer 0 of GPT.* is not gated: scaling its up projection does not scale its coefficients"
    )
    with pytest.raises(KelibError, match=said):
        resuscitate(model_of(kind), drawn(), 0.5, 1.0)


def test_vectors_of_another_model_are_refused(model_of):
    model = model_of("olmo")
    said = "3 coefficient vectors for a model of 2 layers; measure this very model"
    with pytest.raises(KelibError, match=said):
        resuscitate(model, drawn(layers=3), 0.5, 1.0)
    said = "layer 1 has 48 memories, its coefficient vector has 47; measure this very model"
    with pytest.raises(KelibError, match=said):
        resuscitate(model, [drawn()[0], drawn(47)[0]], 0.5, 1.0)


def test_layers_that_share_their_up_projection_are_refused(model_of):
    model = copy.deepcopy(model_of("olmo"))
    first, second = feed_forwards(model)
    second.up.weight = first.up.weight
    with pytest.raises(KelibError, match="layers of OlmoForCausalLM share an up projection"):
        resuscitate(model, drawn(), 0.5, 1.0)

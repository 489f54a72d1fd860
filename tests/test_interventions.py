"""Resuscitation against Algorithm 1 written out, and against what the changed model really does."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
from zoo import build, relative_gap

from kelib.entropy import measure_entropy
from kelib.errors import KelibError
from kelib.ffn import feed_forwards
from kelib.interventions import (
    INTERVENTIONS,
    apply_intervention,
    describe_change,
    model_digest,
    resuscitate,
    resuscitate_preserving,
    resuscitate_random,
    resuscitate_top,
    resuscitation_multipliers,
    scale_value,
    uniform_gain,
)

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


def test_experts_are_refused():
    said = "layer 0 is a mixture of experts .* only defined for dense layers"
    with pytest.raises(KelibError, match=said):
        resuscitate(build("mixtral"), drawn(160), 0.5, 1.0)


# --- all interventions, by name ------------------------------------------------------------------

SETTINGS = {
    "resuscitate": {"ratio": 0.5, "factor": 2.0},
    "resuscitate_preserving": {"ratio": 0.5, "factor": 2.0},
    "resuscitate_random": {"ratio": 0.5, "factor": 2.0, "seed": 4},
    "resuscitate_top": {"ratio": 0.5, "factor": 2.0},
    "uniform_gain": {"ratio": 0.5, "factor": 2.0},
    "scale_value": {"ratio": 0.5, "factor": 2.0},
    "attention_temperature": {"temperature": 2.0},
    "redo": {"tau": 0.5, "seed": 4},
    "shrink_and_perturb": {"shrink": 0.8, "noise_std": 0.01, "seed": 4},
    "plasticity_injection": {"memories": 5, "seed": 4},
    "continual_backprop_utility": {"ratio": 0.25, "seed": 4},
}
SCALED = [name for name in SETTINGS if "ratio" in SETTINGS[name] and name[:4] != "cont"]


def logits_of(model, packed):
    with torch.no_grad():
        return model(**batches(packed)[0]).logits


def test_every_intervention_has_settings_to_be_tested_with():
    assert set(SETTINGS) == set(INTERVENTIONS)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_intervention_leaves_its_input_alone_and_does_something(model_of, name):
    model = copy.deepcopy(model_of("olmo"))
    model.get_input_embeddings().weight.grad = torch.ones_like(model.get_input_embeddings().weight)
    coefficients, digest = drawn(), model_digest(model)
    kept = [c.copy() for c in coefficients]
    config = model.config.to_dict()
    changed = apply_intervention(model, name, coefficients, **SETTINGS[name])
    assert model_digest(model) == digest
    assert model.config.to_dict() == config
    assert all(np.array_equal(a, b) for a, b in zip(coefficients, kept, strict=True))
    assert type(changed) is type(model) and model_digest(changed) != digest
    memory = {p.data_ptr() for p in model.parameters()}
    assert not memory & {p.data_ptr() for p in changed.parameters()}
    # gradients of the input are not carried into the first step of the changed model
    assert all(p.grad is None and p.requires_grad for p in changed.parameters())
    assert not changed.training
    again = apply_intervention(model, name, coefficients, **SETTINGS[name])
    assert model_digest(again) == model_digest(changed)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_changed_model_is_saved_and_trains(model_of, packed, tmp_path, name):
    changed = apply_intervention(model_of("olmo"), name, drawn(), **SETTINGS[name])
    changed.save_pretrained(tmp_path)
    loaded = type(changed).from_pretrained(tmp_path)
    assert model_digest(loaded) == model_digest(changed)
    assert torch.equal(logits_of(loaded, packed), logits_of(changed, packed))
    ids = batches(packed)[0]["input_ids"][:2]
    changed(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad.isfinite().all() for p in changed.parameters())


@pytest.mark.parametrize(
    ("kind", "plain"), [("olmo", False), ("llama", False), ("gpt_neox", True), ("phi3", False)]
)
def test_algorithm_1_on_the_shapes_of_olmo_llama_and_pythia(kind, plain):
    model = build(kind)
    coefficients = drawn(40)
    changed = resuscitate(model, coefficients, 0.5, 2.0, plain=plain)
    before, after = model.state_dict(), changed.state_dict()
    up = {"gpt_neox": "dense_h_to_4h", "phi3": "gate_up_proj"}.get(kind, "up_proj")
    touched = 0
    for name in before:
        layer = next((int(part) for part in name.split(".") if part.isdigit()), None)
        if f".{up}." not in name:
            assert torch.equal(after[name], before[name]), name
            continue
        u = torch.tensor(algorithm_1(coefficients[layer].tolist(), 0.5, 2.0)).float()
        u = torch.cat([torch.ones(40), u]) if kind == "phi3" else u  # the gate comes first
        expected = [row * value for row, value in zip(before[name], u, strict=True)]
        torch.testing.assert_close(after[name], torch.stack(expected))
        touched += 1
    assert touched == {"llama": 4, "gpt_neox": 4}.get(kind, 2)  # with biases


def test_behind_a_relu_the_rows_scale_the_coefficients_exactly():
    model = firing("opt")
    measured = measure_entropy(model, some_batches()).mean_coefficients
    changed = resuscitate(model, measured, 0.5, 2.0, plain=True)
    after = measure_entropy(changed, some_batches()).mean_coefficients
    u = algorithm_1(measured[0].tolist(), 0.5, 2.0)
    np.testing.assert_allclose(after[0], measured[0] * u, rtol=1e-5)


def test_behind_a_gelu_the_rows_do_not_scale_the_coefficients():
    model = build("gpt_neox")
    measured = measure_entropy(model, some_batches()).mean_coefficients
    changed = resuscitate(model, measured, 0.5, 2.0, plain=True)
    after = measure_entropy(changed, some_batches()).mean_coefficients
    wanted = measured[0] * np.array(algorithm_1(measured[0].tolist(), 0.5, 2.0))
    assert np.abs(after[0] / wanted - 1).max() > 0.05


def firing(kind):
    """A model in which no memory is silent throughout, as some are behind a ReLU."""
    model = build(kind)
    for ffn in feed_forwards(model):
        if kind == "opt":
            ffn.up.bias.data.add_(4.0)
    return model


def some_batches():
    generator = torch.Generator().manual_seed(5)
    return [{"input_ids": torch.randint(3, 97, (6, 16), generator=generator)}]


# --- the same function ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["olmo", "llama", "opt", "phi3", "gemma2"])
@pytest.mark.parametrize(("p", "q"), [(0.5, 1.0), (0.5, 3.0), (1.0, 1.0), (0.0, 3.0)])
def test_preserving_changes_entropy_and_no_output(kind, p, q):
    model = firing(kind)
    measured = {
        how: measure_entropy(model, some_batches(), coefficient=how)
        for how in ("absolute", "contribution")
    }
    coefficients = measured["absolute"].mean_coefficients
    changed = resuscitate_preserving(model, coefficients, p, q)
    with torch.no_grad():
        one, other = changed(**some_batches()[0]).logits, model(**some_batches()[0]).logits
    assert relative_gap(one, other) < 1e-5
    after = measure_entropy(changed, some_batches())
    for layer, mean in enumerate(coefficients):  # every layer: its input is what it was
        u = np.ones(len(mean)) if p == 0 else np.array(algorithm_1(mean.tolist(), p, q))
        np.testing.assert_allclose(after.mean_coefficients[layer], u * mean, rtol=2e-4)
        share = u * mean / (u * mean).sum()
        predicted = -(share * np.log(share)).sum()
        assert after.knowledge_entropy[layer] == pytest.approx(predicted, abs=1e-4)
    moved = np.abs(after.knowledge_entropy - measured["absolute"].knowledge_entropy).min()
    assert moved == 0 if p == 0 else moved > 1e-3
    same = measure_entropy(changed, some_batches(), coefficient="contribution")
    np.testing.assert_allclose(
        same.knowledge_entropy, measured["contribution"].knowledge_entropy, atol=1e-5
    )
    for layer in range(2):
        np.testing.assert_allclose(
            same.mean_coefficients[layer],
            measured["contribution"].mean_coefficients[layer],
            rtol=2e-4,
        )


def test_preserving_changes_the_gradients_of_values(model_of, packed):
    ids = batches(packed)[0]["input_ids"][:4]
    model = copy.deepcopy(model_of("olmo"))
    coefficients = drawn()
    changed = resuscitate_preserving(model, coefficients, 0.5, 2.0)
    for one in (model, changed):
        one(input_ids=ids, labels=ids).loss.backward()
    for ffn, new, mean in zip(
        feed_forwards(model), feed_forwards(changed), coefficients, strict=True
    ):
        u = torch.tensor(algorithm_1(mean.tolist(), 0.5, 2.0)).float()
        expected = ffn.down.weight.grad * u
        torch.testing.assert_close(new.down.weight.grad, expected, rtol=1e-3, atol=1e-6)


def test_preserving_is_refused_behind_a_gelu(model_of):
    said = "layer 0 of GPTNeoXForCausalLM is not gated and its activation is not ReLU"
    with pytest.raises(KelibError, match=said):
        resuscitate_preserving(model_of("gpt_neox"), drawn(), 0.5, 1.0)


def test_shared_values_are_refused_where_they_would_be_scaled(model_of):
    model = copy.deepcopy(model_of("olmo"))
    first, second = feed_forwards(model)
    second.down.weight = first.down.weight
    resuscitate(model, drawn(), 0.5, 1.0)
    for name in ("resuscitate_preserving", "scale_value"):
        with pytest.raises(KelibError, match="share a down projection: one cannot be scaled"):
            apply_intervention(model, name, drawn(), ratio=0.5, factor=1.0)


# --- controls ------------------------------------------------------------------------------------


def multipliers_in(before, after):
    """Multiplier of each row of the up projections, read off the weights."""
    rows = zip(feed_forwards(before), feed_forwards(after), strict=True)
    return [(b.up_rows()[:, 0] / a.up_rows()[:, 0]).detach().numpy() for a, b in rows]


def test_the_random_control_shuffles_the_same_multipliers(model_of):
    model, coefficients = model_of("olmo"), drawn()
    made = [resuscitate_random(model, coefficients, 0.25, 2.0, seed=seed) for seed in (1, 1, 2)]
    found = [multipliers_in(model, one) for one in made]
    for layer, mean in enumerate(coefficients):
        u = algorithm_1(mean.tolist(), 0.25, 2.0)
        np.testing.assert_allclose(np.sort(found[0][layer]), np.sort(u), rtol=1e-5)
        assert np.array_equal(found[0][layer], found[1][layer])
        places = [np.flatnonzero(np.abs(f[layer] - 1) > 1e-4).tolist() for f in found]
        assert places[0] != places[2]
        assert places[0] != np.flatnonzero(np.array(u) != 1).tolist()
    assert not np.array_equal(found[0][0] == 1, found[0][1] == 1)  # another draw in each layer


def test_the_top_control_mirrors_the_multipliers(model_of):
    coefficients = drawn()
    changed = resuscitate_top(model_of("olmo"), coefficients, 0.25, 2.0)
    for found, mean in zip(multipliers_in(model_of("olmo"), changed), coefficients, strict=True):
        u = np.array(algorithm_1(mean.tolist(), 0.25, 2.0))
        order = np.argsort(mean)
        np.testing.assert_allclose(found[order[::-1]], u[order], rtol=1e-5)


def test_the_uniform_gain_has_the_norm_of_resuscitation(model_of):
    model, coefficients = model_of("olmo"), drawn()
    changed = uniform_gain(model, coefficients, 0.5, 2.0)
    woken = resuscitate(model, coefficients, 0.5, 2.0)
    gains = multipliers_in(model, changed)
    for a, b, gain in zip(feed_forwards(changed), feed_forwards(woken), gains, strict=True):
        assert a.up_rows().norm().item() == pytest.approx(b.up_rows().norm().item(), rel=1e-5)
        assert gain.std() < 1e-5 and gain[0] > 1.01
    assert abs(gains[0][0] - gains[1][0]) > 1e-3


def test_scaling_values_acts_as_scaling_keys_of_gated_layers(model_of, packed):
    model, coefficients = model_of("olmo"), drawn()
    on_value = scale_value(model, coefficients, 0.5, 2.0)
    on_key = resuscitate(model, coefficients, 0.5, 2.0)
    one, other = logits_of(on_value, packed), logits_of(on_key, packed)
    assert relative_gap(one, other) < 1e-5
    assert relative_gap(one, logits_of(model, packed)) > 1e-3
    assert all(torch.equal(a.up.weight, b.up.weight) for a, b in paired(on_value, model))


def paired(one, other):
    return zip(feed_forwards(one), feed_forwards(other), strict=True)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox"])
def test_scaling_values_acts_as_scaled_coefficients_would_without_a_gate(kind):
    model = build(kind)
    coefficients = drawn(40)
    changed = scale_value(model, coefficients, 0.5, 2.0)
    hooked = copy.deepcopy(model)
    for ffn, mean in zip(feed_forwards(hooked), coefficients, strict=True):
        u = torch.tensor(algorithm_1(mean.tolist(), 0.5, 2.0)).float()
        ffn.down.register_forward_pre_hook(lambda _m, inputs, u=u: (inputs[0] * u,))
    with torch.no_grad():
        one, other = changed(**some_batches()[0]).logits, hooked(**some_batches()[0]).logits
    assert relative_gap(one, other) < 1e-5


@pytest.mark.parametrize("name", SCALED)
def test_the_ratio_of_every_scaling_at_its_ends(model_of, name):
    model = model_of("olmo")
    more = {"seed": 1} if name == "resuscitate_random" else {}
    kept = apply_intervention(model, name, drawn(), ratio=0.0, factor=3.0, **more)
    assert model_digest(kept) == model_digest(model)
    all_alike = [np.full(48, 0.25)] * 2  # every coefficient a tie at the threshold, u = q = 1
    kept = apply_intervention(model, name, all_alike, ratio=0.5, factor=1.0, **more)
    assert model_digest(kept) == model_digest(model)
    every = apply_intervention(model, name, drawn(), ratio=1.0, factor=1.0, **more)
    assert model_digest(every) != model_digest(model)


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize(
    ("coefficients", "change", "message"),
    [
        (drawn(), {"ratio": 1.5}, "resuscitation ratio p = 1.5 must lie between 0 and 1"),
        (drawn(), {"factor": 0}, "amplifying factor q = 0 must be finite and above 0"),
        (drawn(), {"factor": -1.0}, "amplifying factor q = -1.0 must be"),
        ([drawn()[0], np.full(48, np.nan)], {}, "mean coefficients must be finite"),
        ([np.arange(48.0)] * 2, {}, "1 memories have a mean coefficient of 0"),
        (drawn(layers=3), {}, "3 coefficient vectors for a model of 2 layers"),
        (drawn(47), {}, "layer 0 has 48 memories, its coefficient vector has 47"),
        ([np.r_[1e-38, np.full(47, 1.0)]] * 2, {"factor": 1e38}, "multipliers up to|coefficient"),
    ],
)
def test_bad_input_of_scalings(model_of, name, coefficients, change, message):
    settings = {**SETTINGS[name], **change}
    with pytest.raises(KelibError, match=message):
        apply_intervention(model_of("olmo"), name, coefficients, **settings)


def test_weights_that_overflow_are_refused(model_of):
    half = copy.deepcopy(model_of("olmo")).half()
    small = [np.r_[1e-6, np.full(47, 1.0)]] * 2
    with pytest.raises(KelibError, match=r"multipliers up to 9.79e\+05 leave weights of .*16"):
        resuscitate(half, small, 0.01, 1.0)


# --- the one interface ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("awaken", {}, "'awaken' must be one of attention_temperature, .*, uniform_gain"),
        ("resuscitate", {"p": 0.5}, "no setting p; it has factor, plain, ratio"),
        ("resuscitate", {"ratio": 0.5}, "resuscitate needs the setting factor"),
        ("resuscitate_random", {"ratio": 1, "factor": 1}, "resuscitate_random needs .* seed"),
        ("redo", {"seed": 1}, "redo needs mean coefficients: measure this very model"),
    ],
)
def test_what_the_interface_refuses(model_of, name, settings, message):
    with pytest.raises(KelibError, match=message):
        apply_intervention(model_of("olmo"), name, **settings)


def test_by_name_is_the_function_itself(model_of):
    model, coefficients = model_of("olmo"), drawn()
    named = apply_intervention(model, "resuscitate", coefficients, ratio=0.5, factor=2.0)
    assert model_digest(named) == model_digest(resuscitate(model, coefficients, 0.5, 2.0))


def test_coefficients_of_another_step_are_refused(model_of):
    model = copy.deepcopy(model_of("olmo"))
    digest = model_digest(model)
    settings = {"ratio": 0.5, "factor": 1.0, "measured_digest": digest}
    apply_intervention(model, "resuscitate", drawn(), **settings)
    with torch.no_grad():
        model.get_input_embeddings().weight[3, 5] += 1e-3  # a single weight
    with pytest.raises(KelibError, match=f"digest {digest}, .* another model or step"):
        apply_intervention(model, "resuscitate", drawn(), **settings)
    assert len(digest) == 16 and model_digest(model.bfloat16()) not in ("", digest)


# --- what it did to the weights ------------------------------------------------------------------


def test_a_change_is_described(model_of):
    model, coefficients = model_of("olmo"), drawn()
    changed = resuscitate_preserving(model, coefficients, 0.5, 2.0)
    found = describe_change(model, changed)
    json.dumps(found, allow_nan=False)
    sums = np.zeros(3)
    for layer, (old, new) in enumerate(paired(model, changed)):
        row = found["layers"][layer]
        a, b = old.up.weight.detach().double(), new.up.weight.detach().double()
        assert row["layer"] == layer
        assert row["key_norm_before"] == pytest.approx(float(a.norm()))
        assert row["key_norm_after"] == pytest.approx(float(b.norm()))
        assert row["key_relative_change"] == pytest.approx(float((b - a).norm() / a.norm()))
        assert row["value_norm_after"] == pytest.approx(float(new.value_norms().norm()))
        assert row["gate_relative_change"] == 0
        sums += [float(a.norm() ** 2), float(b.norm() ** 2), float((b - a).norm() ** 2)]
    total = found["total"]
    first, second, distance = np.sqrt(sums)
    assert total["key_norm_before"] == pytest.approx(first)
    assert total["key_norm_after"] == pytest.approx(second)
    assert total["key_relative_change"] == pytest.approx(distance / first)
    everything = sum(float(p.detach().double().square().sum()) for p in changed.parameters()) ** 0.5
    assert total["all_norm_after"] == pytest.approx(everything)


def test_a_change_of_experts_and_of_plain_layers_is_described():
    for kind in ("mixtral", "gpt2", "phi3"):
        model = build(kind)
        total = describe_change(model, copy.deepcopy(model))["total"]
        assert total["key_relative_change"] == total["all_relative_change"] == 0
        assert total["key_norm_after"] > 0
        assert ("gate_norm_after" in total) == (kind != "gpt2")


def test_models_of_different_parameters_are_not_compared(model_of):
    with pytest.raises(KelibError, match="differ in their parameters: they are not one, changed"):
        describe_change(model_of("olmo"), model_of("gpt_neox"))

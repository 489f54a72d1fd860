"""Attention temperature and remedies from the plasticity literature, against their definitions."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from zoo import build, relative_gap

from kelib.alternatives import (
    attention_temperature,
    continual_backprop_utility,
    plasticity_injection,
    redo,
    shrink_and_perturb,
)
from kelib.entropy import measure_entropy
from kelib.errors import KelibError
from kelib.ffn import feed_forwards, self_test
from kelib.interventions import describe_change, model_digest

WIDTH = 40
IDS = torch.randint(3, 97, (6, 16), generator=torch.Generator().manual_seed(5))


def drawn(seed=0, memories=WIDTH):
    generator = np.random.default_rng(seed)
    return [generator.lognormal(size=memories) for _ in range(2)]


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def where(mask):
    return mask.nonzero().flatten().tolist()


def parts_of(ffn):
    """up, gate and value rows, ``(m, hidden)`` each, by other means than kelib's."""
    up, down = ffn.up.weight, ffn.down.weight
    if type(ffn.up).__name__ == "Conv1D":
        return {"up": up.T, "value": down}
    if ffn.fused:
        return {"gate": up[:WIDTH], "up": up[WIDTH:], "value": down.T}
    gate = {} if ffn.gate is None else {"gate": ffn.gate.weight}
    return {"up": up, "value": down.T} | gate


# --- attention temperature ----------------------------------------------------------------------

TEMPERED = ("olmo", "llama", "gpt_neox", "gpt2", "opt", "phi3", "qwen2", "granite", "mixtral")


@pytest.mark.parametrize("kind", TEMPERED)
@pytest.mark.parametrize("temperature", [1.5, 3.0])
def test_the_softmax_has_that_temperature(kind, temperature):
    model = build(kind)
    changed = attention_temperature(model, temperature=temperature)
    expected = copy.deepcopy(model)
    scaled = [m for m in expected.modules() if hasattr(m, "scaling") and hasattr(m, "is_causal")]
    assert len(scaled) == 2
    for module in scaled:
        module.scaling /= temperature
    assert relative_gap(logits_of(changed), logits_of(expected)) < 1e-5
    assert relative_gap(logits_of(changed), logits_of(model)) > 1e-3


def test_a_higher_temperature_raises_attention_entropy_and_leaves_the_memories():
    model = build("olmo")
    batches = [{"input_ids": IDS}]
    found = [
        measure_entropy(one, batches, attention=True).attention_entropy[0].mean()
        for one in (model, *(attention_temperature(model, temperature=t) for t in (1.5, 3.0)))
    ]
    assert found[0] < found[1] < found[2]
    change = describe_change(model, attention_temperature(model, temperature=1.5))["total"]
    assert change["key_relative_change"] == change["value_relative_change"] == 0
    assert change["all_relative_change"] > 0


def test_temperature_one_changes_nothing():
    model = build("gpt_neox")
    assert model_digest(attention_temperature(model, temperature=1.0)) == model_digest(model)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("gemma2", "has attn_logit_softcapping = 2.0: scaling its queries is not a softmax"),
        ("olmo2", "layer 0 of Olmo2ForCausalLM has no attention whose queries kelib can scale"),
        ("qwen3", "one module with c_attn, .*, without .*q_norm"),
        ("gpt_oss", "layer 0 of GptOssForCausalLM has no attention .* without .*sinks"),
    ],
)
def test_where_scaled_queries_are_not_scaled_scores(kind, message):
    with pytest.raises(KelibError, match=message):
        attention_temperature(build(kind), temperature=2.0)


def test_clipped_queries_are_refused():
    model = copy.deepcopy(build("olmo"))
    model.config.clip_qkv = 8.0
    with pytest.raises(KelibError, match="OlmoForCausalLM has clip_qkv = 8"):
        attention_temperature(model, temperature=2.0)


def test_fused_queries_of_an_unknown_layout_are_refused():
    model = build("gpt_neox")
    model.config.model_type = "falcon"
    with pytest.raises(KelibError, match="does not know where query_key_value of falcon keeps"):
        attention_temperature(model, temperature=2.0)


def test_a_shared_query_projection_is_refused():
    model = build("olmo")
    first, second = model.model.layers
    second.self_attn.q_proj.weight = first.self_attn.q_proj.weight
    with pytest.raises(KelibError, match="layers of OlmoForCausalLM share a query projection"):
        attention_temperature(model, temperature=2.0)


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf")])
def test_a_temperature_that_is_none(temperature):
    with pytest.raises(KelibError, match="must be finite and above 0"):
        attention_temperature(build("olmo"), temperature=temperature)


# --- resets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["olmo", "llama", "phi3", "gpt_neox", "gpt2", "opt"])
def test_redo_resets_the_dormant_memories_and_no_others(kind):
    model, coefficients = build(kind), drawn()
    coefficients[0][7] = 0.0  # never fires: resurrected here, where no multiplier could
    changed = redo(model, coefficients, tau=0.3, seed=2)
    std = model.config.init_std if kind == "opt" else model.config.initializer_range
    for old, new, mean in zip(
        feed_forwards(model), feed_forwards(changed), coefficients, strict=True
    ):
        dormant = np.array([c / (sum(mean) / WIDTH) <= 0.3 for c in mean])
        assert 3 < dormant.sum() < 20
        before, after = parts_of(old), parts_of(new)
        assert set(before) == ({"up", "value"} if old.gate is None else {"up", "value", "gate"})
        for name in before:
            assert torch.equal(after[name][~dormant], before[name][~dormant])
        assert not after["value"][dormant].any()
        fresh = [after[name][dormant] for name in before if name != "value"]
        for rows in fresh:
            assert 0.8 * std < float(rows.detach().std()) < 1.2 * std
        assert len({float(rows[0, 0].detach()) for rows in fresh}) == len(fresh)
        for module in {new.up, new.gate} - {None}:
            if getattr(module, "bias", None) is not None:
                assert not module.bias[dormant].any() and module.bias[~dormant].all()
    changed_names = {
        name
        for name, value in model.state_dict().items()
        if not torch.equal(value, changed.state_dict()[name])
    }
    memory = {
        id(p)
        for f in feed_forwards(changed)
        for m in (f.up, f.gate, f.down)
        if m
        for p in m.parameters()
    }
    assert changed_names <= {n for n, p in changed.named_parameters() if id(p) in memory}


def test_redo_takes_from_the_output_what_the_dormant_units_gave():
    model, coefficients = build("olmo"), drawn()
    expected = copy.deepcopy(model)
    for ffn, mean in zip(feed_forwards(expected), coefficients, strict=True):
        with torch.no_grad():
            ffn.down.weight[:, mean <= 0.3 * mean.mean()] = 0
    changed = redo(model, coefficients, tau=0.3, seed=2)
    assert relative_gap(logits_of(changed), logits_of(expected)) < 1e-5


def test_no_dormant_unit_no_change():
    model = build("olmo")
    assert model_digest(redo(model, [np.ones(WIDTH)] * 2, tau=0.9, seed=1)) == model_digest(model)
    assert model_digest(redo(model, [np.ones(WIDTH)] * 2, tau=1, seed=1)) != model_digest(model)


@pytest.mark.parametrize("ratio", [0.0, 0.29, 0.5, 1.0])
def test_the_least_useful_are_reset(ratio):
    model, coefficients = build("olmo"), drawn()
    changed = continual_backprop_utility(model, coefficients, ratio=ratio, seed=3)
    for old, new, mean in zip(
        feed_forwards(model), feed_forwards(changed), coefficients, strict=True
    ):
        utility = [
            mean[i] * sum(abs(w) for w in old.down.weight[:, i].tolist()) for i in range(WIDTH)
        ]
        wanted = sorted(np.argsort(utility)[: int(ratio * WIDTH)].tolist())
        reset = where((new.down.weight == 0).all(dim=0))
        assert reset == wanted
        assert where((new.up.weight != old.up.weight).any(dim=1)) == wanted
        assert where((new.gate.weight != old.gate.weight).any(dim=1)) == wanted


def test_utility_is_not_activity_alone():
    model, mean = build("olmo"), np.linspace(1, 2, WIDTH)
    with torch.no_grad():
        feed_forwards(model)[0].down.weight[:, 39] *= 1e-3  # the most active, of no use
    changed = continual_backprop_utility(model, [mean, mean], ratio=1 / WIDTH, seed=1)
    assert not feed_forwards(changed)[0].down.weight[:, 39].any()


def test_ties_of_utility_are_reset_in_order():
    model = build("olmo")
    with torch.no_grad():
        for ffn in feed_forwards(model):
            ffn.down.weight.fill_(0.5)
    changed = continual_backprop_utility(model, [np.ones(WIDTH)] * 2, ratio=0.1, seed=1)
    reset = [(ffn.down.weight == 0).all(dim=0) for ffn in feed_forwards(changed)]
    assert all(where(r) == [0, 1, 2, 3] for r in reset)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tau": -0.1}, "tau = -0.1 must be a number of at least 0"),
        ({"tau": float("nan")}, "tau = nan must be a number"),
        ({"seed": -1}, "seed = -1 must be a whole number of at least 0"),
        ({"seed": 0.5}, "seed = 0.5 must be a whole number of at least 0"),
    ],
)
def test_settings_of_redo(settings, message):
    with pytest.raises(KelibError, match=message):
        redo(build("olmo"), drawn(), **{"seed": 1, **settings})


@pytest.mark.parametrize("reset", [redo, continual_backprop_utility])
def test_bad_input_of_resets(reset):
    settings = {"ratio": 0.5} if reset is continual_backprop_utility else {"tau": 0.5}
    for coefficients, message in (
        (drawn(memories=39), "layer 0 has 40 memories, its coefficient vector has 39"),
        (drawn()[:1], "1 coefficient vectors for a model of 2 layers"),
        ([np.full(WIDTH, np.nan)] * 2, "mean coefficients must be finite and not negative"),
        ([np.zeros(WIDTH)] * 2, "layer 0: all coefficients are 0; measure on more text"),
    ):
        with pytest.raises(KelibError, match=message):
            reset(build("olmo"), coefficients, seed=1, **settings)
    with pytest.raises(KelibError, match="mixture of experts"):
        reset(build("mixtral"), drawn(memories=160), seed=1, **settings)
    tied = build("olmo")
    first, second = feed_forwards(tied)
    second.gate.weight = first.gate.weight
    with pytest.raises(KelibError, match="layers of OlmoForCausalLM share a gate projection"):
        reset(tied, drawn(), seed=1, **settings)
    silent = build("olmo")
    silent.config = SimpleNamespace(init_std=None)
    with pytest.raises(KelibError, match="does not say how weights start: set one of init_std"):
        reset(silent, drawn(), seed=1, **settings)


def test_the_ratio_of_utility_is_checked():
    with pytest.raises(KelibError, match=r"replacement ratio = 1\.2 must lie between 0 and 1"):
        continual_backprop_utility(build("olmo"), drawn(), ratio=1.2, seed=1)


# --- shrink and perturb --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gpt2", "gemma2", "mixtral"])
def test_matrices_are_shrunk_and_perturbed_and_vectors_left(kind):
    model = build(kind)
    changed = shrink_and_perturb(model, shrink=0.6, noise_std=0.05, seed=2)
    noise = []
    for old, new in zip(model.parameters(), changed.parameters(), strict=True):
        if old.ndim < 2:
            assert torch.equal(old, new)
        else:
            noise.append((new - 0.6 * old).detach().flatten())
    together = torch.cat(noise)
    assert abs(float(together.mean())) < 2e-3
    assert float(together.std()) == pytest.approx(0.05, rel=0.02)
    assert not torch.equal(noise[1][:20], noise[2][:20])
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    both = [changed.get_output_embeddings().weight, changed.get_input_embeddings().weight]
    assert (both[0] is both[1]) == tied


def test_without_noise_matrices_only_shrink():
    model = build("olmo")
    changed = shrink_and_perturb(model, shrink=0.5, noise_std=0.0, seed=2)
    assert describe_change(model, changed)["total"]["all_relative_change"] == pytest.approx(0.5)
    kept = shrink_and_perturb(model, shrink=1.0, noise_std=0.0, seed=2)
    assert model_digest(kept) == model_digest(model)


def test_the_noise_does_not_depend_on_the_type_of_the_weights():
    model = build("olmo")
    fine = shrink_and_perturb(copy.deepcopy(model).double(), shrink=0.5, noise_std=0.1, seed=2)
    coarse = shrink_and_perturb(model, shrink=0.5, noise_std=0.1, seed=2)
    for one, other in zip(fine.parameters(), coarse.parameters(), strict=True):
        torch.testing.assert_close(one.float(), other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shrink": 0.0}, "shrink = 0.0 must be above 0 and at most 1"),
        ({"shrink": 1.1}, "shrink = 1.1 must be above 0 and at most 1"),
        ({"noise_std": -1}, "noise_std = -1 must be a finite number of at least 0"),
        ({"noise_std": float("nan")}, "noise_std = nan must be a finite number"),
    ],
)
def test_settings_of_shrink_and_perturb(settings, message):
    with pytest.raises(KelibError, match=message):
        shrink_and_perturb(
            build("olmo"), **{"shrink": 0.5, "noise_std": 0.1, "seed": 1, **settings}
        )


# --- plasticity injection ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["olmo", "llama", "gpt_neox", "opt", "gemma2", "granite"])
def test_injection_widens_and_preserves_the_function(kind, tmp_path):
    model = build(kind)
    changed = plasticity_injection(model, memories=7, seed=2)
    assert relative_gap(logits_of(changed), logits_of(model)) < 1e-5
    self_test(changed)
    for old, new in zip(feed_forwards(model), feed_forwards(changed), strict=True):
        assert new.memories == WIDTH + 14
        before, after = parts_of(old), parts_of(new)
        for name in before:
            assert torch.equal(after[name][:WIDTH], before[name])
            fresh, copies = after[name][WIDTH:].split(7)
            assert torch.equal(fresh, -copies if name == "value" else copies)
            assert fresh.any(dim=1).all()
    name = "ffn_dim" if kind == "opt" else "intermediate_size"
    assert getattr(changed.config, name) == WIDTH + 14
    assert getattr(model.config, name) == WIDTH
    changed.save_pretrained(tmp_path)
    loaded = type(changed).from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded), logits_of(changed))
    change = describe_change(model, changed)["total"]
    assert change["key_relative_change"] is None
    assert change["key_norm_after"] > change["key_norm_before"]


def test_injected_memories_learn():
    model = build("olmo")
    changed = plasticity_injection(model, memories=7, seed=2)
    changed(input_ids=IDS, labels=IDS).loss.backward()
    for ffn in feed_forwards(changed):
        for module in (ffn.up, ffn.gate):
            assert module.weight.grad[WIDTH:].any(dim=1).all()
        assert ffn.down.weight.grad[:, WIDTH:].any(dim=0).all()


@pytest.mark.parametrize("kind", ["gpt2", "phi3", "qwen3_moe"])
def test_layers_that_cannot_be_widened(kind):
    said = "mixture of experts" if kind == "qwen3_moe" else "ForCausalLM|GPT2.* cannot be widened"
    with pytest.raises(KelibError, match=said):
        plasticity_injection(build(kind), memories=7, seed=2)


@pytest.mark.parametrize("memories", [0, -3, 2.5])
def test_how_many_memories_are_injected(memories):
    said = f"memories = {memories} must be a whole number above 0"
    with pytest.raises(KelibError, match=said):
        plasticity_injection(build("olmo"), memories=memories, seed=2)


# --- seeds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda model, seed: redo(model, drawn(), tau=0.5, seed=seed),
        lambda model, seed: continual_backprop_utility(model, drawn(), ratio=0.5, seed=seed),
        lambda model, seed: shrink_and_perturb(model, shrink=0.5, noise_std=0.1, seed=seed),
        lambda model, seed: plasticity_injection(model, memories=3, seed=seed),
    ],
)
def test_a_seed_is_a_draw_whatever_was_drawn_before(change):
    model = build("olmo")
    state = torch.get_rng_state()
    first = model_digest(change(model, 5))
    assert torch.equal(torch.get_rng_state(), state)  # the global stream is not used
    torch.rand(10)
    assert model_digest(change(model, 5)) == first
    assert model_digest(change(model, 6)) != first

"""Noise and steps against weights changed by hand; nothing stays changed."""

from __future__ import annotations

import copy
import math

import numpy as np
import pandas as pd
import pytest
import torch
from zoo import build, padded, sequences_of

from kelib.attribution import layer_table, measure_gradients, share_table
from kelib.config import Optimizer
from kelib.decomposition import row_changes
from kelib.errors import KelibError
from kelib.evaluation import heldout_loss
from kelib.sensitivity import (
    adamw_step,
    moments_of,
    noise_table,
    noisy,
    parameter_groups,
    step_table,
)
from kelib.training import Trainer

NAMES = ("olmo", "llama", "gpt_neox", "gpt2")
BLOCKS = np.array(sequences_of([10] * 5))
SETTINGS = Optimizer(weight_decay=0.2)


def weights_of(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def assert_same(model, before):
    after = weights_of(model)
    assert after.keys() == before.keys()
    # the very bits: -0.0 is not 0.0
    assert all(
        torch.equal(after[name].view(torch.uint8), before[name].view(torch.uint8))
        for name in before
    )


# --- groups -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", (*NAMES, "phi3", "opt"))
def test_groups_hold_every_matrix_once(name):
    model = build(name)
    groups = parameter_groups(model)
    apart = [tensors for group, tensors in groups.items() if group != "all"]
    assert sum(map(len, apart)) == len(groups["all"])
    matrices = [weight for weight in model.parameters() if weight.ndim >= 2]
    assert sum(w.numel() for w in groups["all"].values()) == sum(w.numel() for w in matrices)
    assert ("gate" in groups) == (name in ("olmo", "llama", "phi3"))
    assert all(
        "embed" in label
        or "wte" in label
        or "wpe" in label
        or "lm_head" in label
        or "project" in label
        for label in groups["embedding"]
    )
    assert all("attn" in label or "attention" in label for label in groups["attention"])
    assert len(groups["V"]) == len(groups["up"]) == 2


def test_a_fused_projection_is_two_matrices():
    groups = parameter_groups(build("phi3"))
    assert next(iter(groups["gate"])) == "model.layers.0.mlp.gate_up_proj.weight[gate]"
    assert {tuple(weight.shape) for weight in groups["up"].values()} == {(40, 24)}


# --- noise --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", (*NAMES, "phi3"))
def test_noise_has_its_size_in_its_group_alone(name):
    model = build(name)
    before = weights_of(model)
    for group, tensors in parameter_groups(model).items():
        kept = {label: weight.clone() for label, weight in tensors.items()}
        everything = {label: w.clone() for label, w in parameter_groups(model)["all"].items()}
        with noisy(model, group, 0.1, 5):
            for label, weight in parameter_groups(model)["all"].items():
                difference = (weight - everything[label]).double()
                if label not in kept:
                    assert (difference == 0).all()
                    continue
                size = 0.1 * everything[label].double().square().mean().sqrt()
                ratio = float(difference.square().mean().sqrt() / size)
                assert ratio == pytest.approx(1, abs=5 / math.sqrt(2 * weight.numel()))
        assert_same(model, before)


def test_noise_is_one_direction_per_seed():
    model = build("olmo")
    weight = model.model.layers[0].mlp.up_proj.weight
    start = weight.detach().clone()

    def change(group, size, seed):
        with noisy(model, group, size, seed):
            return (weight - start).detach()

    one = change("up", 0.1, 3)
    assert torch.equal(one, change("up", 0.1, 3)) and torch.equal(one, change("all", 0.1, 3))
    torch.testing.assert_close(2 * one, change("up", 0.2, 3), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(one, change("up", 0.1, 4))
    with noisy(model, "up", 0.1, 3):
        other = model.model.layers[1].mlp.up_proj.weight.detach().clone()
    layers = model.model.layers
    assert not torch.allclose(one, other - layers[1].mlp.up_proj.weight, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_noise_table_against_weights_changed_by_hand(name):
    model = build(name)
    before = weights_of(model)
    groups = parameter_groups(model)
    model.train()
    table = noise_table(model, BLOCKS, (0.0, 0.1, 0.3), (0, 1), batch_size=2)
    assert all(module.training for module in model.modules())
    assert_same(model, before)
    assert len(table) == len(groups) * 3 * 2
    columns = ["group", "size", "seed", "loss", "loss_before", "loss_increase"]
    assert list(table.columns) == columns
    none = table[table["size"] == 0]
    np.testing.assert_allclose(none["loss_increase"], 0, atol=1e-12)
    indexed = table.set_index(["group", "size", "seed"])["loss"]
    assert indexed.loc[("V", 0.1, 0)] != indexed.loc[("V", 0.1, 1)]
    # the loss in float64 by hand, of a model whose weights were changed once and for all
    changed = copy.deepcopy(model)
    with noisy(model, "V", 0.3, 1):
        changed.load_state_dict(model.state_dict())
    logits = changed.double().eval()(input_ids=torch.from_numpy(BLOCKS)).logits.double()
    chances = logits.log_softmax(-1)
    by_hand = -np.mean([chances[n, t, BLOCKS[n, t + 1]].item() for n in range(5) for t in range(9)])
    assert indexed.loc[("V", 0.3, 1)] == pytest.approx(by_hand, rel=1e-4)
    assert table["loss_before"].iloc[0] == pytest.approx(heldout_loss(model.eval(), BLOCKS))


def test_accuracy_is_asked_of_the_noisy_model():
    model, seen = build("olmo"), []

    def accuracy(asked):
        assert not any(module.training for module in asked.modules())
        seen.append(float(asked.model.layers[0].mlp.down_proj.weight.detach().norm()))
        return {"sciq": 0.5, "arc": len(seen)}

    table = noise_table(model, BLOCKS, [1.0], [0, 1], groups=["V"], accuracy=accuracy)
    assert len(set(seen)) == 3  # without noise, and two draws
    assert table["arc"].tolist() == [2, 3] and table["sciq"].tolist() == [0.5, 0.5]
    table = noise_table(model, BLOCKS, [1.0], [0], groups=["V"], accuracy=lambda _: 0.25)
    assert table["accuracy"].tolist() == [0.25]


@pytest.mark.parametrize("name", (*NAMES, "phi3"))
def test_weights_come_back_after_an_exception(name):
    model, calls = build(name), []
    model.train()
    model.base_model.eval()
    modes = [module.training for module in model.modules()]
    with torch.no_grad():
        next(model.parameters())[0, 0] = -0.0
    before = weights_of(model)

    def accuracy(asked):
        calls.append(weights_of(asked))
        if len(calls) > 1:
            raise RuntimeError("no accuracy today")
        return 0.0

    with pytest.raises(RuntimeError, match="no accuracy today"):
        noise_table(model, BLOCKS, [0.5], [0], groups=["all"], accuracy=accuracy)
    label = next(label for label in before if "up" in label or "fc" in label or "h_to" in label)
    assert not torch.equal(calls[1][label], before[label])
    assert_same(model, before)
    assert modes == [module.training for module in model.modules()]
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())


# --- one step -----------------------------------------------------------------------------------


def by_hand(model, ids, moments, rate, settings, step):
    """AdamW after clipping, every parameter written out in float64."""
    copied = copy.deepcopy(model).eval()
    logits = copied(input_ids=torch.from_numpy(ids)).logits
    chances = logits.log_softmax(-1)
    count = ids.shape[0] * (ids.shape[1] - 1)
    picked = [
        chances[n, t, ids[n, t + 1]] for n in range(len(ids)) for t in range(ids.shape[1] - 1)
    ]
    (-torch.stack(picked).sum() / count).backward()
    norm = math.sqrt(sum(float(w.grad.square().sum()) for w in copied.parameters()))
    result = {}
    for name, weight in copied.named_parameters():
        gradient = weight.grad * min(1.0, settings.clip / (norm + 1e-6))
        first, second = moments[name]
        first = settings.betas[0] * first + (1 - settings.betas[0]) * gradient
        second = settings.betas[1] * second + (1 - settings.betas[1]) * gradient**2
        corrected = first / (1 - settings.betas[0] ** step)
        scale = (second / (1 - settings.betas[1] ** step)).sqrt() + 1e-8
        shrink = settings.weight_decay if weight.ndim >= 2 else 0.0
        result[name] = (weight * (1 - rate * shrink) - rate * corrected / scale).detach()
    return result


@pytest.mark.parametrize("name", NAMES)
def test_the_step_is_adamw_with_moments_and_without(name):
    model, rate = build(name).double().train(), 0.01
    before = weights_of(model)
    generator = torch.Generator().manual_seed(0)
    drawn = {
        label: tuple(
            torch.rand(weight.shape, generator=generator, dtype=torch.float64) * size
            for size in (0.02, 0.01)
        )
        for label, weight in model.named_parameters()
    }
    zeros = {label: (torch.zeros_like(w), torch.zeros_like(w)) for label, w in before.items()}
    moments = {
        label: {"step": torch.tensor(6.0), "exp_avg": first, "exp_avg_sq": second}
        for label, (first, second) in drawn.items()
    }
    for given, start, step in ((None, zeros, 1), (moments, drawn, 7)):
        after = adamw_step(model, BLOCKS, SETTINGS, rate, moments=given)
        wanted = by_hand(model, BLOCKS, start, rate, SETTINGS, step)
        for label, weight in after.named_parameters():
            torch.testing.assert_close(weight.detach(), wanted[label], rtol=1e-9, atol=1e-11)
    assert_same(model, before)
    assert all(module.training for module in model.modules())
    assert all(weight.grad is None for weight in model.parameters())
    assert (moments[label]["step"] == 6) and torch.equal(moments[label]["exp_avg"], drawn[label][0])


def test_the_step_is_that_of_the_trainer():
    """Three steps of the training loop, then a fourth from its moments, both ways."""
    model = build("olmo").double()
    trainer = Trainer(copy.deepcopy(model), lambda step: BLOCKS, 4, 0.01, Optimizer(0.2, clip=0.5))
    trainer.run(until=3)
    state = copy.deepcopy(trainer.model)
    moments = moments_of(trainer.model, trainer.optimizer)
    trainer.run()
    rate = trainer.optimizer.param_groups[0]["lr"]
    after = adamw_step(
        state, BLOCKS, Optimizer(0.2, clip=0.5), rate, moments=moments, micro_batch_size=2
    )
    for one, two in zip(after.parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-10)


def test_a_first_step_has_no_concentration_and_moments_bring_it_back():
    """Without moments every weight moves by the learning rate; frozen V does not move."""
    model = build("olmo").double()
    gradients = measure_gradients(model, BLOCKS)
    plain = Optimizer(weight_decay=0.2)
    after = adamw_step(model, BLOCKS, plain, 0.001)
    updates = {
        "update": row_changes(model, after),
        "update_without_decay": row_changes(model, after, decay=0.001 * 0.2),
    }
    np.testing.assert_allclose(
        updates["update_without_decay"][0]["V"], 0.001 * math.sqrt(24), rtol=1e-2
    )
    table = share_table(gradients, updates)
    first = table[(table.quantity == "update_without_decay") & (table.part == "V")]
    np.testing.assert_allclose(first["value"], first["share"], rtol=2e-2)
    even = {
        name: {
            "step": torch.tensor(1000.0),
            "exp_avg": torch.zeros_like(weight),
            "exp_avg_sq": torch.ones_like(weight),
        }
        for name, weight in model.named_parameters()
    }
    # where all second moments are equal, the update is the gradient
    after = adamw_step(model, BLOCKS, Optimizer(0.0, betas=(0.9, 0.999999)), 0.001, moments=even)
    for one, two in zip(row_changes(model, after), gradients.norms, strict=True):
        for part in one:
            assert np.corrcoef(one[part], two[part])[0, 1] > 0.9999
    for ffn in model.model.layers:
        ffn.mlp.down_proj.weight.requires_grad_(False)
    (changes, _) = row_changes(model, adamw_step(model, BLOCKS, plain, 0.001))
    assert (changes["V"] == 0).all() and (changes["up"] > 0).all()
    assert layer_table(gradients)["layer"].tolist() == [0, 1]


def test_padding_does_not_change_the_step():
    model, sequences = build("olmo").double(), sequences_of([9, 5, 12])
    right = adamw_step(model, padded(sequences, "right"), SETTINGS, 0.01)
    left = adamw_step(model, padded(sequences, "left"), SETTINGS, 0.01, micro_batch_size=1)
    for one, two in zip(row_changes(model, right), row_changes(model, left), strict=True):
        np.testing.assert_allclose(one["V"], two["V"], rtol=1e-4)


def test_a_step_of_growing_size():
    model = build("gpt_neox").double()
    before = weights_of(model)
    stepped = adamw_step(model, BLOCKS, Optimizer(0.1), 0.01)
    table = step_table(model, stepped, BLOCKS, (0.0, 0.5, 1.0), groups=("all", "V"))
    assert_same(model, before)
    assert list(table.columns) == ["group", "size", "loss", "loss_before", "loss_increase"]
    indexed = table.set_index(["group", "size"])
    assert indexed.loc[("V", 0.0), "loss_increase"] == pytest.approx(0, abs=1e-12)
    assert indexed.loc[("all", 1.0), "loss_increase"] < 0  # it is a step on these very blocks
    whole = copy.deepcopy(model)
    with torch.no_grad():
        for old, new in zip(whole.parameters(), stepped.parameters(), strict=True):
            if old.ndim >= 2:
                old.copy_(new)
    assert indexed.loc[("all", 1.0), "loss"] == pytest.approx(heldout_loss(whole, BLOCKS), rel=1e-6)


# --- refusals -----------------------------------------------------------------------------------


def test_bad_inputs():
    model = build("gpt_neox")
    with pytest.raises(KelibError, match="there are V, all, attention, embedding, up"):
        noise_table(model, BLOCKS, [0.1], [0], groups=["gate"])
    with pytest.raises(KelibError, match="group 'K' does not exist; there are V, all, attention"):
        step_table(model, model, BLOCKS, [0.1], groups=["K"])
    for size in (-0.1, math.nan, math.inf):
        with pytest.raises(KelibError, match="must be finite and not negative"):
            noise_table(model, BLOCKS, [size], [0])
    with pytest.raises(KelibError, match="must hold one value each at least"):
        noise_table(model, BLOCKS, [0.1], [])
    for blocks in (BLOCKS[:0], BLOCKS[:, :1], BLOCKS[0]):
        with pytest.raises(KelibError, match=r"blocks of shape .* hold no token to predict"):
            noise_table(model, blocks, [0.1], [0])
    with pytest.raises(KelibError, match="the vocabulary has 97"):
        noise_table(model, BLOCKS + 97, [0.1], [0])
    with pytest.raises(KelibError, match="batch_size = 0 must be at least 1"):
        noise_table(model, BLOCKS, [0.1], [0], batch_size=0)
    with pytest.raises(KelibError, match="the column loss, which is taken"):
        noise_table(model, BLOCKS, [0.1], [0], accuracy=lambda _: {"loss": 1.0})
    with pytest.raises(KelibError, match="the two models differ in their matrices"):
        step_table(model, build("gpt_neox", num_hidden_layers=1), BLOCKS, [0.1])
    with pytest.raises(KelibError, match="is a mixture of experts"):
        noise_table(build("mixtral"), BLOCKS, [0.1], [0])
    with torch.no_grad():
        model.gpt_neox.layers[0].mlp.dense_4h_to_h.weight[0, 0] = math.nan
    place = r"NaN or infinity stands in gpt_neox\.layers\.0\.mlp\.dense_4h_to_h\.weight"
    for refused in (
        lambda: noise_table(model, BLOCKS, [0.1], [0]),
        lambda: adamw_step(model, BLOCKS, SETTINGS, 0.1),
    ):
        with pytest.raises(KelibError, match=place):
            refused()


def test_bad_steps():
    model = build("olmo")
    with pytest.raises(KelibError, match="no token to predict"):
        adamw_step(model, BLOCKS[:, :1], SETTINGS, 0.1)
    for rate in (0, -1, math.nan):
        with pytest.raises(KelibError, match=r"learning_rate = .* must be finite and above 0"):
            adamw_step(model, BLOCKS, SETTINGS, rate)
    empty = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}
    for name in ("h.0.weight", "model.embed_tokens.weight"):
        with pytest.raises(KelibError, match=f"moments of {name} do not fit this model"):
            adamw_step(model, BLOCKS, SETTINGS, 0.1, moments={name: empty})
    with pytest.raises(KelibError, match="no parameter requires gradients"):
        adamw_step(model.requires_grad_(False), BLOCKS, SETTINGS, 0.1)


def test_tables_hold_no_text_but_their_keys():
    table = noise_table(build("olmo"), BLOCKS, [0.1], [0], groups=["up", "all"])
    text = [name for name in table if not pd.api.types.is_numeric_dtype(table[name])]
    assert text == ["group"]

"""Contributions to probes against one sequence at a time, and the arithmetic of overlaps."""

from __future__ import annotations

import copy
import doctest
import itertools
import math

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from zoo import WORDS, build

import kelib.decomposition
from kelib.decomposition import (
    carrier_table,
    carriers,
    measure_contributions,
    overlap_table,
    parts_of,
    row_changes,
    rows_of,
    weight_of,
)
from kelib.errors import KelibError
from kelib.ffn import feed_forwards

NAMES = ("olmo", "llama", "gpt_neox", "gpt2")
PROBES = [
    ("w5 w9 w30", " w7"),
    ("w8", " w11 w12 w13"),
    ("w5 w9 w30 w31 w32 w40", " w7 w8"),
    ("w90 w3", " w44"),
]


@pytest.fixture(scope="module")
def tokenizer():
    """Word i is token i; no name of a special token begins a word, which would be cut there."""
    words = {"<unknown>": 0, "<s>": 1} | {f"w{number}": number for number in range(2, WORDS)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unknown>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")


def reference(name, probes):
    """c from the formula of each layer, one unpadded probe at a time, in float64."""
    model = build(name).double()
    blocks = model.base_model.h if name == "gpt2" else model.base_model.layers
    found = [[] for _ in blocks]
    for context, target in probes:
        ids = [int(word[1:]) for word in (context + target).split()]
        targets = len(target.split())
        given, handles = [], []
        for block in blocks:
            hook = block.mlp.register_forward_pre_hook(lambda _, x, g=given: g.append(x[0][0]))
            handles.append(hook)
        with torch.no_grad():
            model(input_ids=torch.tensor([ids]))
            for layer, block in enumerate(blocks):
                mlp, x = block.mlp, given[layer]
                if name == "gpt2":
                    c, values = mlp.act(x @ mlp.c_fc.weight + mlp.c_fc.bias), mlp.c_proj.weight
                elif name == "gpt_neox":
                    c, values = mlp.act(mlp.dense_h_to_4h(x)), mlp.dense_4h_to_h.weight.T
                else:
                    c = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
                    values = mlp.down_proj.weight.T
                # token t of the target is predicted at the position before it
                rows = c[len(ids) - targets - 1 : len(ids) - 1].abs().mean(0)
                found[layer].append((rows * values.norm(dim=1)).numpy())
        for handle in handles:
            handle.remove()
    return [np.array(rows) for rows in found]


@pytest.mark.parametrize("name", NAMES)
def test_contributions_are_those_of_the_reference(name, tokenizer):
    wanted = reference(name, PROBES)
    for dtype, rtol, atol in ((torch.float64, 1e-6, 1e-8), (torch.float32, 1e-4, 1e-5)):
        model = build(name).to(dtype).train()
        for size in (64, 2, 1):
            found = measure_contributions(model, tokenizer, PROBES, batch_size=size)
            for one, two in zip(found, wanted, strict=True):
                assert one.dtype == np.float64 and one.shape == (4, 40)
                np.testing.assert_allclose(one, two, rtol=rtol, atol=atol)
        assert all(module.training for module in model.modules())
        assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_order_of_probes_is_kept(tokenizer):
    model = build("olmo").double()
    found = measure_contributions(model, tokenizer, PROBES)
    other = measure_contributions(model, tokenizer, PROBES[::-1])
    np.testing.assert_allclose(found[1], other[1][::-1], rtol=1e-9)


def test_a_scale_moved_from_k_to_v_leaves_contributions(tokenizer):
    model = build("olmo").double()
    before, scale = measure_contributions(model, tokenizer, PROBES), torch.linspace(0.3, 4, 40)
    with torch.no_grad():
        for ffn in feed_forwards(model):
            ffn.up_rows().mul_(scale[:, None])
            ffn.values().div_(scale[:, None])
    for one, two in zip(before, measure_contributions(model, tokenizer, PROBES), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5)


# --- how many memories --------------------------------------------------------------------------


def test_carriers_by_hand():
    table = np.array([[4.0, 1.0, 3.0, 2.0], [0.0, 7.0, 0.0, 0.0], [0.1, 0.1, 0.1, 0.1]])
    assert carriers(table, 0.5).tolist() == [2, 1, 2]
    assert carriers(table, 0.4).tolist() == [1, 1, 2]
    assert carriers(table, 0.9).tolist() == [3, 1, 4]
    assert carriers(table, 1).tolist() == [4, 1, 4]
    assert math.isnan(carriers(np.zeros(4), 0.5))


def test_carrier_table_has_a_row_per_layer_probe_and_fraction():
    contributions = (np.eye(3, 8), np.ones((3, 8)))
    table = carrier_table(contributions)
    assert len(table) == 2 * 3 * 2
    assert (table[table.layer == 0]["carriers"] == 1).all()
    even = table[table.layer == 1].set_index(["probe", "fraction"])
    assert even.loc[(2, 0.5), "carriers"] == 4 and even.loc[(2, 0.5), "carrier_share"] == 0.5
    assert even.loc[(0, 0.9), "carriers"] == 8


def test_examples_run():
    assert doctest.testmod(kelib.decomposition).failed == 0


# --- overlaps -----------------------------------------------------------------------------------


def test_overlap_by_hand():
    a = np.array([[4.0, 3.0, 0.0, 0.0], [4.0, 3.0, 2.0, 0.0]])
    b = np.array([[0.0, 3.0, 4.0, 0.0]])
    (row,) = overlap_table([a], [b], top=0.5).to_dict("records")
    assert row["top"] == 2 and row["probe"] == -1
    assert row["jaccard"] == pytest.approx(1 / 3)  # {0, 1} and {1, 2}
    mean = [4.0, 3.0, 1.0, 0.0]
    assert row["cosine"] == pytest.approx((9 + 4) / (np.linalg.norm(mean) * 5))
    itself = overlap_table([a], [3 * a], top=0.5, paired=True)
    assert itself["probe"].tolist() == [0, 1] and (itself["jaccard"] == 1).all()
    np.testing.assert_allclose(itself["cosine"], 1)
    (row,) = overlap_table([a], [np.zeros(4)]).to_dict("records")
    assert math.isnan(row["cosine"]) and math.isnan(row["jaccard"])


def test_overlap_by_chance_is_the_mean_over_all_sets():
    sets = [set(chosen) for chosen in itertools.combinations(range(6), 3)]
    wanted = np.mean([len(a & b) / len(a | b) for a in sets for b in sets])
    values = np.arange(6.0)
    (row,) = overlap_table([values], [values], top=0.5).to_dict("records")
    assert row["jaccard_by_chance"] == pytest.approx(wanted)
    (row,) = overlap_table([values], [values[::-1]], top=1).to_dict("records")
    assert row["jaccard"] == row["jaccard_by_chance"] == pytest.approx(1)


# --- rows of weights ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", (*NAMES, "phi3"))
def test_a_changed_row_is_found_where_it_was_changed(name):
    before = build(name)
    after = copy.deepcopy(before)
    (_, ffn) = feed_forwards(after)
    with torch.no_grad():
        ffn.values()[3] += 0.5
        ffn.up_rows()[5] -= 0.25
    changes = row_changes(before, after)
    assert all((norms == 0).all() for norms in changes[0].values())
    for part, row, change in (("V", 3, 0.5), ("up", 5, 0.25)):
        assert np.flatnonzero(changes[1][part]).tolist() == [row]
        assert changes[1][part][row] == pytest.approx(change * math.sqrt(24), rel=1e-6)
    if "gate" in changes[1]:
        assert (changes[1]["gate"] == 0).all()


def test_the_rows_of_a_fused_projection_are_apart():
    (ffn, _) = feed_forwards(build("phi3"))
    halves = [rows_of(ffn, part, weight_of(ffn, part)) for part in ("gate", "up")]
    assert torch.equal(torch.cat(halves), ffn.up.weight)
    assert parts_of(ffn) == ("V", "up", "gate")


def test_decay_takes_the_shrinking_out():
    before = build("olmo").double()
    after = copy.deepcopy(before)
    with torch.no_grad():
        for parameter in after.parameters():
            parameter.mul_(1 - 0.03)
    for plain, without in zip(
        row_changes(before, after), row_changes(before, after, decay=0.03), strict=True
    ):
        assert all((plain[part] > 0.01).all() for part in plain)
        assert all((without[part] < 1e-12).all() for part in without)


# --- refusals -----------------------------------------------------------------------------------


def test_bad_inputs(tokenizer):
    model = build("olmo")
    with pytest.raises(KelibError, match="no probes to measure"):
        measure_contributions(model, tokenizer, [])
    with pytest.raises(KelibError, match="request 0: the continuation '' encodes to no token"):
        measure_contributions(model, tokenizer, [("w5", "")])
    with pytest.raises(KelibError, match="batch_size = 0 must be at least 1"):
        measure_contributions(model, tokenizer, PROBES, batch_size=0)
    with pytest.raises(KelibError, match="is a mixture of experts"):
        measure_contributions(build("olmoe"), tokenizer, PROBES)
    with pytest.raises(KelibError, match=r"fraction = 0 must lie in \(0, 1\]"):
        carriers(np.ones(3), 0)
    with pytest.raises(KelibError, match=r"top = 1\.5 must lie in \(0, 1\]"):
        overlap_table([np.ones(3)], [np.ones(3)], top=1.5)
    with pytest.raises(KelibError, match="1 layers on one side, 2 on the other"):
        overlap_table([np.ones(3)], [np.ones(3)] * 2)
    with pytest.raises(KelibError, match=r"layer 0: \(2, 3\) on one side, \(1, 3\) on the other"):
        overlap_table([np.ones((2, 3))], [np.ones((1, 3))], paired=True)
    with pytest.raises(KelibError, match="the two models differ in their layers"):
        row_changes(model, build("olmo", num_hidden_layers=1))
    with pytest.raises(KelibError, match="the two models differ in their layers"):
        row_changes(model, build("gpt_neox"))
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.inf
    with pytest.raises(KelibError, match=r"NaN or infinity stands in .*weight; load a sound"):
        measure_contributions(model, tokenizer, PROBES)

"""Formulas of cost against numbers worked out by hand, and against models that are really built."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from types import SimpleNamespace

import pytest

from kelib.config import load_profile
from kelib.errors import KelibError
from kelib.scale import (
    DEVICES,
    FAMILIES,
    PAPER,
    Shape,
    device_hours,
    forward_flops,
    fsdp2_memory,
    paper_flops,
    shape_of,
    training_flops,
    training_memory,
)

SMALL = Shape("olmo", 4, 10, 3, 2, 1, 2, 100, tied=False)


def test_a_shape_is_counted_as_by_hand():
    # attention: queries and output 4 x 4 each, keys and values 4 x 2 each; three matrices of 4 x 10
    assert SMALL.layer_matrices == 2 * 16 + 2 * 8 + 3 * 40 == 168
    assert SMALL.parameters == 3 * 168 + 2 * 400 == 1304
    assert SMALL.multiplied == 904
    assert forward_flops(SMALL, 7) == 2 * 904 + 4 * 3 * 4 * 7 == 2144
    assert training_flops(SMALL, 7) == 6432


def test_the_published_models_have_the_parameters_they_are_known_for():
    one, seven = PAPER["OLMo-1B"], PAPER["OLMo-7B"]
    assert one.parameters == one.multiplied == 50304 * 2048 + 16 * (4 * 2048**2 + 3 * 2048 * 8192)
    assert (one.parameters, seven.parameters) == (1_176_764_416, 6_888_095_744)
    assert seven.multiplied == 6_888_095_744 - 50304 * 4096


@pytest.mark.parametrize("kind", [*FAMILIES, "llama tied"])
def test_counts_agree_with_the_models_that_transformers_builds(kind):
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForCausalLM

    name, _, tied = kind.partition(" ")
    heads = {} if name == "gpt_neox" else {"num_key_value_heads": 2}
    config = AutoConfig.for_model(
        name,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=70,
        tie_word_embeddings=bool(tied),
        pad_token_id=0,
        **heads,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    count = sum(weight.numel() for weight in model.parameters())
    shape = shape_of(config)
    assert shape.parameters == count
    matrices = sum(weight.numel() for weight in model.parameters() if weight.ndim == 2)
    looked_up = 0 if tied else model.get_input_embeddings().weight.numel()
    assert shape.multiplied == matrices - looked_up
    # torch's own counter sees the products that are really computed
    ids = torch.zeros((2, 16), dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    assert counter.get_total_flops() == 2 * 16 * forward_flops(shape, 16)


def test_the_model_of_a_profile_gets_the_vocabulary_of_its_corpus():
    profile = load_profile("study")
    shape = shape_of(profile.model, profile.corpus.vocabulary_size)
    assert shape.parameters == 2 * 1024 * 64 + 4 * (4 * 64**2 + 3 * 64 * 512) == 589_824
    other = SimpleNamespace(**vars(profile.model) | {"model_type": "unheard_of"})
    assert shape_of(other, 1024).parameters == shape.parameters  # matrices, with a gate


def test_memory_by_hand():
    # 10 tokens; 34 bytes x 4 wide a token and layer, or 8 for its input alone
    alone = training_memory(SMALL, 10)
    assert (alone.states, alone.gathered) == (16 * 1304, 0)
    assert alone.activations == 10 * (3 * 8 + 34 * 4)
    assert alone.logits == 10 * 6 * 100
    assert alone.total == 20864 + 1600 + 6000
    kept = training_memory(SMALL, 10, recompute=False)
    assert kept.activations == 10 * 3 * 34 * 4
    shared = training_memory(SMALL, 10, devices=4)
    assert shared.states == 4 * 1304
    assert shared.gathered == 2 * (2 * 168 + 400)
    wide = training_memory(SMALL, 10, precision="float32")
    assert (wide.states, wide.activations, wide.logits) == (16 * 1304, 2 * 1600, 4000)
    # the states of OLMo-7B need two devices of 80 GB at least, and fit eight easily
    seven = PAPER["OLMo-7B"]
    assert training_memory(seven, 1024).total > DEVICES["H100"].memory
    assert training_memory(seven, 8 * 1024, devices=8).total < 0.5 * DEVICES["H100"].memory


def test_memory_under_fsdp2_by_hand():
    shared = fsdp2_memory(SMALL, 10, 4)
    assert shared.states == 16 / 4 * 1304
    # embeddings and head twice 400, layers of 168: whole weights, gradients, copies in 16 bits
    assert shared.gathered == 4 * (800 + 2 * 168) + 4 * (800 + 168) + 2 * 1304
    assert shared.activations == 10 * (3 * 4 * 4 + 34 * 4)
    assert shared.logits == 10 * 6 * 100
    tied = fsdp2_memory(dataclasses.replace(SMALL, tied=True), 10, 4)
    assert shared.gathered - tied.gathered == 2 * 4 * 400 + 2 * 400
    seven = fsdp2_memory(PAPER["OLMo-7B"], 8192, 8)
    assert seven.states == pytest.approx(13.78e9, rel=1e-3)
    assert 0.4 < seven.total / DEVICES["H100"].memory < 0.6


def test_hours_by_hand():
    # a quarter of 312e12 FLOP/s for an hour
    assert device_hours(0.25 * 312e12 * 3600, "A100", 0.25) == pytest.approx(1)
    # 6 x 1.1768e9 + 12 x 16 x 2048 x 1024 a token, 209.7 million tokens
    learning = (6 * 1_176_764_416 + 12 * 16 * 2048 * 1024) * 204_800 * 1024
    flops = paper_flops(PAPER["OLMo-1B"])
    assert flops["learning"] == learning
    assert flops["entropy"] == (2 * 1_176_764_416 + 4 * 16 * 2048 * 2048) * 2048 * 2048
    assert device_hours(learning, "H100", 0.4) == pytest.approx(1.099, rel=1e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: device_hours(1, "abacus", 0.4), r"device 'abacus' must be one of A100, H100"),
        (lambda: device_hours(1, "A100", 0), r"mfu = 0 must be above 0 and at most 1"),
        (lambda: training_memory(SMALL, 0), r"tokens = 0 must be at least 1"),
        (lambda: training_memory(SMALL, 1, devices=0), r"devices = 0 must be at least 1"),
        (lambda: training_memory(SMALL, 1, precision="fp8"), r"precision = 'fp8' must be bf16 or"),
    ],
)
def test_impossible_questions_are_refused(call, message):
    with pytest.raises(KelibError, match=message):
        call()


def test_nothing_of_it_imports_torch():
    code = "import sys, kelib.scale; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

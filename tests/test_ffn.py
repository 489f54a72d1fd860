"""Where memories are, that they are the model's own, and that hooks go away."""

from __future__ import annotations

import doctest
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from zoo import MIXTURES, ZOO, build, sequences_of

import kelib.architectures
from kelib.architectures import FeedForward, Mixture
from kelib.entropy import measure_entropy
from kelib.errors import KelibError
from kelib.ffn import (
    decoder_layers,
    evaluating,
    feed_forwards,
    register_architecture,
    self_test,
    unregister_architecture,
    watch_coefficients,
    watch_memories,
)

IDS = torch.tensor(sequences_of([9, 9]))
DENSE = [name for name in ZOO if name not in MIXTURES]


@pytest.fixture
def finders() -> Iterator[Any]:
    """Register finders for one test only."""
    told = []

    def tell(finder: Any) -> None:
        told.append(register_architecture(finder))

    yield tell
    for finder in told:
        unregister_architecture(finder)


@pytest.mark.parametrize("name", ZOO)
def test_coefficients_times_values_is_the_output(name: str) -> None:
    model = build(name)
    errors = self_test(model)
    assert errors.shape == (2,) and (errors < 1e-6).all()
    kinds = [Mixture if name in MIXTURES else FeedForward] * 2
    if name == "qwen3_moe":
        kinds[0] = FeedForward  # its first layer is dense
    assert [type(layer) for layer in feed_forwards(model)] == kinds


@pytest.mark.parametrize(("name", "memories"), [("gpt_oss", [160, 160]), ("glm4_moe", [40, 100])])
def test_other_experts_are_found_too(name: str, memories: list[int]) -> None:
    """Transposed, interleaved, with biases (GPT-OSS); an expert shared without a gate (GLM)."""
    model = build(name)
    assert [layer.memories for layer in feed_forwards(model)] == memories
    assert (self_test(model) < 1e-6).all()
    found = measure_entropy(model, [{"input_ids": IDS}], coefficient="relu", uncertainty=True)
    assert (found.knowledge_entropy > 0).all() and (found.knowledge_entropy_error > 0).all()


def test_experts_that_kelib_cannot_run_are_refused() -> None:
    with pytest.raises(KelibError, match=r"layer 0 of Llama4.* are given the indices .* found 2"):
        feed_forwards(build("llama4"))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_self_test_in_other_dtypes(kind: torch.dtype) -> None:
    limit = {torch.bfloat16: 3e-2, torch.float64: 1e-12}[kind]
    assert (self_test(build("llama").to(kind), IDS) < limit).all()


@pytest.mark.parametrize("name", DENSE)
def test_rows_of_keys_and_values(name: str) -> None:
    """Scaling rows of the up projection scales coefficients; a row of V is what its memory adds."""
    model = build(name)
    layer = feed_forwards(model)[1]
    assert isinstance(layer, FeedForward)
    assert (layer.memories, layer.up_rows().shape, layer.values().shape) == (40, (40, 24), (40, 24))
    torch.testing.assert_close(layer.value_norms(), layer.values().detach().double().norm(dim=1))
    one = torch.eye(40)[3:4]
    bias = getattr(layer.down, "bias", None)
    added = layer.down(one) - (0 if bias is None else bias)
    torch.testing.assert_close(added[0], layer.values()[3], rtol=1e-5, atol=1e-6)
    if layer.gate is not None:
        found: list[torch.Tensor] = []
        with torch.no_grad(), watch_coefficients([layer], lambda _, c: found.append(c.clone())):
            model(input_ids=IDS)
            layer.up_rows()[3].mul_(-2)  # a view: the model changes
            if getattr(layer.up, "bias", None) is not None:
                layer.up.bias[3].mul_(-2)
            model(input_ids=IDS)
        factors = torch.ones(40).scatter(0, torch.tensor(3), -2.0)
        torch.testing.assert_close(found[1], found[0] * factors, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MIXTURES)
def test_watched_experts_compute_what_they_did(name: str) -> None:
    model = build(name)
    layer = feed_forwards(model)[1]
    assert isinstance(layer, Mixture)
    assert len(layer.value_norms()) == layer.memories
    calls: list[str] = []
    plain = layer.experts.forward
    layer.experts.forward = lambda *given: calls.append("own") or plain(*given)  # as others wrap it
    own = layer.experts.forward
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        with watch_memories([layer], lambda _: None):
            during = model(input_ids=IDS).logits
        assert calls == ["own"] and layer.experts.forward is own
        torch.testing.assert_close(during, before, rtol=1e-4, atol=1e-5)
    with pytest.raises(KelibError, match=r"layer 1 is a mixture of experts .*dense layers"):
        layer.up_rows()
    with (
        pytest.raises(KelibError, match=r"layer 1 is a mixture of experts: use .*watch_memories"),
        watch_coefficients([layer], lambda *_: None),
    ):
        pass


def test_hooks_go_away_after_an_exception() -> None:
    model = build("phi3")
    layers = feed_forwards(model)

    def fail(_firing: Any) -> None:
        raise RuntimeError("stop")

    for relu in (False, True):
        with pytest.raises(RuntimeError, match="stop"), watch_memories(layers, fail, relu=relu):
            model(input_ids=IDS)
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    model(input_ids=IDS)


def test_evaluating_restores_every_mode() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Dropout()).train()
    model[1].eval()
    with pytest.raises(RuntimeError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError
    assert [module.training for module in model.modules()] == [True, True, False]


def test_experts_are_not_taken_for_blocks() -> None:
    """The list of blocks is the outermost one, even where a list of experts inside it is longer."""
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Module(), nn.Module()])
    for block in model.blocks:
        block.experts = nn.ModuleList([nn.Linear(2, 2) for _ in range(5)])
    assert decoder_layers(model) is model.blocks
    with pytest.raises(KelibError, match="Linear has no list of transformer blocks"):
        decoder_layers(nn.Linear(2, 2))


# --- architectures that kelib does not know --------------------------------------------------


class Brain(nn.Module):
    """A gated layer under names of its own; its gate acts through a sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 40), nn.Linear(24, 40)
        self.out = nn.Linear(40, 24)
        self.act = nn.Sigmoid()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.act(self.first(x)) * self.second(x))


@pytest.fixture
def unknown() -> Any:
    torch.manual_seed(1)
    model = build("llama")
    for block in model.model.layers:
        block.mlp = Brain()
    return model


def test_an_unknown_architecture_is_explained(unknown: Any) -> None:
    with pytest.raises(KelibError) as raised:
        feed_forwards(unknown)
    message = str(raised.value)
    assert message.startswith(
        "layer 0 of LlamaForCausalLM (LlamaDecoderLayer) has no feed-forward layer"
    )
    for part in (
        "dense_4h_to_h",
        "gate_up_proj",
        "found none",
        "mlp.first",
        "register_architecture",
        "self_test",
    ):
        assert part in message
    assert "\n" not in message


def test_a_registered_architecture_is_measured(unknown: Any, finders: Any) -> None:
    def find(layer: int, block: nn.Module) -> FeedForward | None:
        brain = block.mlp
        if not isinstance(brain, Brain):
            return None
        return FeedForward(layer, "mlp.out", brain.out, brain.second, brain.first, brain)

    finders(find)
    assert (self_test(unknown) < 1e-6).all()
    found = measure_entropy(unknown, [{"input_ids": IDS}], coefficient="relu")
    assert (found.knowledge_entropy > 0).all()
    assert (self_test(build("llama")) < 1e-6).all()  # the others are still found


def test_self_test_finds_gate_and_up_exchanged(unknown: Any, finders: Any) -> None:
    finders(lambda n, b: FeedForward(n, "out", b.mlp.out, b.mlp.first, b.mlp.second, b.mlp))
    with pytest.raises(KelibError, match=r"layer 0: .*gate and up are probably exchanged"):
        self_test(unknown)


def test_self_test_finds_values_that_are_not_the_output(unknown: Any, finders: Any) -> None:
    for block in unknown.model.layers:
        block.mlp = nn.Sequential(block.mlp, nn.Linear(24, 24))
    finders(
        lambda n, b: FeedForward(n, "0.out", b.mlp[0].out, b.mlp[0].second, b.mlp[0].first, b.mlp)
    )
    with pytest.raises(KelibError, match=r"layer 0: coefficients times V differ .* 0\.out by"):
        self_test(unknown)


def test_self_test_finds_router_weights_that_are_applied_twice() -> None:
    model = build("mixtral")
    for block in model.model.layers:
        inner = block.mlp.forward
        block.mlp.forward = lambda x, inner=inner: 0.5 * inner(x)
    with pytest.raises(KelibError, match="layer 0: coefficients times V differ"):
        self_test(model)


def test_projections_whose_shapes_do_not_fit_are_not_taken() -> None:
    model = build("llama")
    model.model.layers[1].mlp.up_proj = nn.Linear(24, 39)
    with pytest.raises(KelibError, match=r"layer 1 of LlamaForCausalLM .* matching shapes"):
        feed_forwards(model)


def test_two_feed_forward_layers_in_a_block_are_not_guessed() -> None:
    model = build("llama")
    model.model.layers[0].second_mlp = model.model.layers[1].mlp
    with pytest.raises(KelibError, match=r"layer 0 .* found 2 of them"):
        feed_forwards(model)


def test_forgetting_what_was_never_told() -> None:
    with pytest.raises(KelibError, match="is not registered; there are none"):
        unregister_architecture(len)  # type: ignore[arg-type]


def test_examples_in_docstrings_run() -> None:
    results = doctest.testmod(kelib.architectures)
    assert results.failed == 0 and results.attempted > 2


def test_errors_are_per_layer() -> None:
    model = build("gpt2")
    assert np.isfinite(self_test(model, IDS)).all()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight.zero_()
        model.transformer.h[1].mlp.c_proj.bias.zero_()
    assert self_test(model)[1] == 0  # an output of 0 is reproduced, not divided by

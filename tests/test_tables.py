"""Tables are whole, tell where they come from, and notice when somebody changed them."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
import threading

import numpy as np
import pandas as pd
import pytest
from safetensors import safe_open

from kelib import tables
from kelib.entropy import EntropyMeasurement
from kelib.errors import KelibError
from kelib.tables import (
    library_digest,
    provenance,
    read_provenance,
    read_table,
    stack_coefficients,
    write_atomically,
    write_table,
)


@pytest.fixture
def table():
    return pd.DataFrame(
        {
            "seed": [100, 101, 102],
            "injected": [True, False, True],
            "intervention": ["none", 'Zoë, "q" = 1\nand more', "resuscitate"],
            "k_cl": [-3.5123456789123, 1e-12, np.nan],
            "entropy": [24.0, 1 / 3, -0.0],
        }
    )


# --- round trip -----------------------------------------------------------------------------------


def test_a_table_comes_back_with_its_types(tmp_path, table):
    write_table(table, tmp_path / "t.csv", {})
    found = read_table(tmp_path / "t.csv")
    pd.testing.assert_frame_equal(found, table, check_exact=False, rtol=1e-9)
    assert [str(kind) for kind in found.dtypes[:2]] == ["int64", "bool"]
    assert found["intervention"].tolist() == table["intervention"].tolist()


def test_what_was_read_is_written_as_the_same_bytes(tmp_path, table):
    write_table(table, tmp_path / "a.csv", {})
    write_table(read_table(tmp_path / "a.csv"), tmp_path / "b.csv", {})
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


def test_ten_digits_tell_two_runs_apart(tmp_path):
    values = [0.1234567891, 0.1234567892, 1234567891.0, 1e-300]
    write_table(pd.DataFrame({"x": values}), tmp_path / "t.csv", {})
    assert read_table(tmp_path / "t.csv")["x"].tolist() == values


def test_the_text_is_the_same_on_every_platform(tmp_path, table):
    write_table(table, tmp_path / "t.csv", {})
    text = (tmp_path / "t.csv").read_bytes()
    assert b"\r" not in text and text.endswith(b"\n")
    assert "Zoë".encode() in text
    assert b"-3.512345679," in text  # ten significant digits, no more


def test_an_empty_table_keeps_its_columns(tmp_path, table):
    write_table(table.iloc[:0], tmp_path / "t.csv", {})
    found = read_table(tmp_path / "t.csv")
    assert list(found.columns) == list(table.columns) and len(found) == 0
    assert read_provenance(tmp_path / "t.csv")["rows"] == 0


def test_the_note_beside_it_counts_rows_and_carries_what_it_was_given(tmp_path, table):
    write_table(table, tmp_path / "t.csv", {"seeds": [100], "digest": "abc"})
    note = json.loads((tmp_path / "t.json").read_text())
    assert note.pop("seal") and note == read_provenance(tmp_path / "t.csv")
    assert (note["rows"], note["seeds"], note["digest"]) == (3, [100], "abc")
    assert note["sha256"] == hashlib.sha256((tmp_path / "t.csv").read_bytes()).hexdigest()


def test_folders_are_made_and_nothing_else_is_left(tmp_path, table):
    write_table(table, tmp_path / "a" / "b" / "t.csv", {})
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["t.csv", "t.json"]


# --- what was changed or is missing -------------------------------------------------------------


@pytest.mark.parametrize(
    "tamper",
    [
        lambda path: path.write_text(path.read_text().replace("100", "109")),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_text(path.read_text() + "103,True,none,0,0\n"),
        lambda path: path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n")),
        lambda path: path.write_bytes(b""),
    ],
    ids=["a number", "cut", "a row more", "line ends", "empty"],
)
def test_a_changed_table_is_refused(tmp_path, table, tamper):
    path = tmp_path / "t.csv"
    write_table(table, path, {})
    tamper(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    message = rf"t.csv has sha256 {digest}, its .json says .*changed after it was written; run its"
    with pytest.raises(KelibError, match=message):
        read_table(path)


def test_a_table_whose_writing_was_interrupted_is_refused(tmp_path, table):
    """The note goes first: what a kill leaves is a new note beside the old numbers."""
    path = tmp_path / "t.csv"
    write_table(table, path, {})
    old = path.read_bytes()
    write_table(table.assign(seed=7), path, {})
    path.write_bytes(old)
    with pytest.raises(KelibError, match="changed after it was written"):
        read_table(path)


def test_a_missing_table_lists_what_there_is(tmp_path, table):
    write_table(table, tmp_path / "entropy.csv", {})
    write_table(table, tmp_path / "checkpoints.csv", {})
    message = r"no table continual.csv in .*; it has checkpoints.csv, entropy.csv; run its stage"
    with pytest.raises(KelibError, match=message):
        read_table(tmp_path / "continual.csv")
    with pytest.raises(KelibError, match=r"no table t.csv in .*nowhere; it has none"):
        read_table(tmp_path / "nowhere" / "t.csv")


@pytest.mark.parametrize("text", [None, "", "{", "{}", "[]", "7", '{"rows": 3}'])
def test_a_table_without_a_readable_note_is_refused(tmp_path, table, text):
    write_table(table, tmp_path / "t.csv", {})
    (tmp_path / "t.json").unlink() if text is None else (tmp_path / "t.json").write_text(text)
    with pytest.raises(KelibError, match=r"no readable provenance .*t.json; run its stage again"):
        read_table(tmp_path / "t.csv")


# --- writing ------------------------------------------------------------------------------------


def test_a_reader_sees_the_old_or_the_new_text_and_nothing_between(tmp_path):
    path, seen, stop = tmp_path / "t.txt", set(), threading.Event()
    texts = ["a" * 50_000, "b" * 70_000]
    write_atomically(path, texts[0])

    def read():
        while not stop.is_set():
            text = path.read_text()
            seen.add((text[:1], len(text)))

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(300):
        write_atomically(path, texts[number % 2])
    stop.set()
    reader.join()
    assert seen <= {("a", 50_000), ("b", 70_000)} and len(seen) > 0


def test_a_full_disk_leaves_the_old_text_and_no_fragment(tmp_path):
    path = tmp_path / "t.txt"
    write_atomically(path, "old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # to a writer it looks the same
    try:
        with pytest.raises(
            KelibError, match=r"cannot write .*t.txt: File too large; free space or"
        ):
            write_atomically(path, "new" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["t.txt"]


def test_a_place_that_cannot_hold_a_file_is_one_clear_line(tmp_path, table):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "t.csv", tmp_path / "file" / "below" / "t.csv"):
        with pytest.raises(
            KelibError, match=r"cannot write .*: .*; free space or choose"
        ) as caught:
            write_table(table, path, {})
        assert "\n" not in str(caught.value)
    (tmp_path / "t.csv").mkdir()
    with pytest.raises(KelibError, match=r"cannot write .*t.csv: Is a directory; free space or"):
        write_atomically(tmp_path / "t.csv", "text")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "t.csv"]


# --- provenance -----------------------------------------------------------------------------------


def made(**changes):
    given = {"parameters": {"steps": 10}, "seeds": [100], "inputs": {"entropy": "abc"}}
    return provenance(**{**given, **changes})


def test_the_digest_follows_parameters_seeds_inputs_and_code(monkeypatch):
    notes = [
        made(),
        made(parameters={"steps": 11}),
        made(seeds=[101]),
        made(inputs={"entropy": "abd"}),
        made(inputs={}),
    ]
    monkeypatch.setattr(tables, "library_digest", lambda: "other code")
    notes.append(made())
    assert len({note["digest"] for note in notes}) == len(notes)


def test_the_digest_leaves_out_commit_and_versions(monkeypatch):
    before = made()
    monkeypatch.setattr(tables, "_git", lambda *arguments: "0" * 40)
    monkeypatch.setattr(tables, "version", lambda name: "99.0")
    monkeypatch.setattr(tables.platform, "python_version", lambda: "4.0")
    after = made()
    assert after["digest"] == before["digest"]
    assert after["commit"] == "0" * 40 != before["commit"]
    assert after["versions"]["torch"] == "99.0" and after["versions"]["python"] == "4.0"


def test_the_order_of_parameters_does_not_matter():
    one = made(parameters={"a": 1, "b": 2}, inputs={"x": "1", "y": "2"})
    two = made(parameters={"b": 2, "a": 1}, inputs={"y": "2", "x": "1"})
    assert one["digest"] == two["digest"]


def test_provenance_names_what_can_change_a_number(tmp_path):
    note = made()
    assert {"python", "numpy", "pandas", "torch", "transformers"} <= set(note["versions"])
    assert note["code"] == library_digest()
    assert isinstance(note["dirty"], bool)
    assert note["commit"] == "unknown" or len(note["commit"]) == 40
    assert (note["parameters"], note["seeds"]) == ({"steps": 10}, [100])
    json.dumps(note)  # it can be written


def test_outside_a_repository_the_commit_is_unknown(monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "repository_root", lambda: tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert made()["commit"] == "unknown"
    monkeypatch.setenv("PATH", str(tmp_path))  # no git at all
    assert made()["commit"] == "unknown"


def test_a_library_that_only_drawing_needs_may_be_absent(monkeypatch):
    def version(name):
        if name == "matplotlib":
            raise tables.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(tables, "version", version)
    assert made()["versions"]["matplotlib"] == "not installed"


def test_nothing_of_the_environment_goes_into_provenance(monkeypatch):
    secrets = {
        "HF_TOKEN": "hf_planted0secret",
        "AWS_SECRET_ACCESS_KEY": "planted1secret",
        "PASSWORD": "planted2secret",
        "SOME_API_KEY": "planted3secret",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    text = json.dumps(made())
    assert not [name for name in secrets if name in text]
    assert "secret" not in text
    assert os.path.expanduser("~") + "/" not in text


# --- coefficients ---------------------------------------------------------------------------------


def test_coefficient_vectors_of_several_checkpoints_are_stacked_as_means(tmp_path):
    generator = np.random.default_rng(0)
    files, means = {}, {}
    for step, sequences in ((0, 4), (20, 5)):
        sums = tuple(generator.random(6 + layer) for layer in range(12))
        files[step] = tmp_path / f"{step}.safetensors"
        EntropyMeasurement(sums, sequences, 100).save(files[step])
        means |= {f"{step:07d}/{i:02d}": total / sequences for i, total in enumerate(sums)}
    stack_coefficients(files, tmp_path / "all.safetensors")
    with safe_open(tmp_path / "all.safetensors", framework="np") as stored:
        assert sorted(stored.keys()) == sorted(means)
        for name, mean in means.items():
            found = stored.get_tensor(name)
            assert found.dtype == np.float64
            np.testing.assert_array_equal(found, mean, err_msg=name)
    assert not list(tmp_path.glob(".*"))


def test_what_a_killed_process_left_is_deleted(tmp_path, table):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left, live = (tmp_path / f".t.csv.{pid}.tmp" for pid in (dead.pid, os.getppid()))
    other = tmp_path / f".u.csv.{dead.pid}.tmp"
    for path in (left, live, other):
        path.write_text("half")
    write_table(table, tmp_path / "t.csv", {})
    assert not left.exists() and live.exists() and other.exists()

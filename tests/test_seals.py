"""Damage to what runs leave is found before it is used, and named with its remedy."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from short import do, measured_study

from kelib import stages
from kelib.errors import KelibError
from kelib.runs import perform
from kelib.seals import check, seal, sealed, unsealed
from kelib.tables import read_provenance, read_table

SEED, STEP = 100, 20
CHANGES = {"mechanism": None, "branches": None, "pretraining.optimizer_states": [10, STEP]}


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def exchange(path):
    """For another file of the run with the same name, or for nothing at all."""
    others = [p for p in path.parent.parent.rglob(path.name) if p.read_bytes() != path.read_bytes()]
    path.write_bytes(others[0].read_bytes() if others else b"")


DAMAGES = (flip, cut, exchange, lambda path: path.unlink())


class Finished:
    """Stages 1 and 2 of one seed, and a run on top of them that is not done."""

    def __init__(self, data):
        self.study = measured_study(data, CHANGES).study
        (self.change, *_) = self.study.resuscitations()
        self.top = self.study.intervene_run(SEED, STEP, self.change)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return Finished(tmp_path_factory.mktemp("seals"))


@pytest.mark.parametrize("name", ["corpus", "pretrain", "entropy"])
def test_every_damage_to_what_a_run_rests_on_is_found(finished, tmp_path, name):
    folder = finished.top.inputs[name].folder
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 2
    copy = tmp_path / "copy"
    for path in files:
        shutil.copy2(path, copy)
        for damage in DAMAGES:
            damage(path)
            with pytest.raises(KelibError) as caught:
                perform(finished.top)
            said = str(caught.value)
            if path.exists() or path.name != "run.json":
                assert str(path) in said and f"delete {folder}" in said
            else:  # a folder without it is no run
                assert "is missing: run its stage first" in said
            assert not finished.top.done
            shutil.copy2(copy, path)
    assert finished.top.inputs[name].note()["files"].keys() == {
        path.relative_to(folder).as_posix() for path in files if path.name != "run.json"
    }


def test_a_result_that_was_edited_is_not_read(finished):
    run = finished.study.evaluate_run(SEED, STEP)
    path = run.folder / "result.json"
    written = path.read_text()
    path.write_text(json.dumps({**json.loads(written), "k": 0.0}))
    with pytest.raises(KelibError, match=r"result.json has sha256 \w+, it was sealed with"):
        run.read()
    path.write_text(written)
    assert run.read()["k"] < 0


def test_an_edited_table_or_provenance_is_not_read(finished):
    path = finished.study.measurements / "checkpoints.csv"
    for file, damages in ((path, DAMAGES[:2]), (path.with_suffix(".json"), DAMAGES)):
        written = file.read_bytes()
        for damage in damages:
            damage(file)
            with pytest.raises(KelibError, match=re.escape(file.name)):
                read_table(path)
            file.write_bytes(written)
    note = json.loads(path.with_suffix(".json").read_text())
    seeds = path.with_suffix(".json").read_text().replace("100", "101")
    path.with_suffix(".json").write_text(seeds)
    with pytest.raises(KelibError, match=f"was sealed with {note['seal']}"):
        read_provenance(path)
    path.with_suffix(".json").write_text(json.dumps(note))
    assert read_provenance(path)["seeds"] == [SEED]


def test_what_is_repaired_is_run_again(finished):
    run = finished.study.entropy_run(SEED, STEP)
    flip(run.folder / "panel.csv")
    with pytest.raises(KelibError, match="delete"):
        stages.measure(finished.study)
    shutil.rmtree(run.folder)
    do([run])
    run.check()


def test_a_note_without_its_seal_is_none():
    assert unsealed(sealed({"a": 1})) == {"a": 1}
    with pytest.raises(ValueError, match="it has no seal"):
        unsealed({"a": 1})
    with pytest.raises(ValueError, match="it was sealed with"):
        unsealed({**sealed({"a": 1}), "a": 2})


def test_a_file_is_read_once_until_it_changes(tmp_path, monkeypatch):
    from kelib import seals

    (tmp_path / "a").write_text("one")
    (tmp_path / "lock").write_text("")
    found = seal(tmp_path, besides=("lock",))
    assert set(found) == {"a"}
    read = []
    digest_of = seals._sha256
    monkeypatch.setattr(seals, "_sha256", lambda path: read.append(path) or digest_of(path))
    for _ in range(2):
        check(tmp_path, found)
    assert len(read) == 1
    (tmp_path / "a").write_text("two!")
    with pytest.raises(KelibError, match="it is not what was written"):
        check(tmp_path, found)
    check(tmp_path, found, ["never sealed"])

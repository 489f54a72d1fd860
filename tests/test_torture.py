"""The harness of faults itself, and faults small enough for every run of the tests."""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_notebooks import small_notebook
from torture import kills, resources, same
from torture.counts import append, counts
from torture.grids import finished_grid
from torture.kills import family, kill
from torture.trees import Tree, compare, own_words

from kelib import jobs
from kelib.__main__ import main
from kelib.config import load_profile, repository_root
from kelib.errors import KelibError
from kelib.grid import stage_runs
from kelib.notebooks import run_notebook
from kelib.run import Run
from kelib.runs import count_states, perform
from kelib.study import Study


@pytest.fixture
def tree(tmp_path):
    """A tree that has nothing but the profile smoke."""
    params = Path("notebooks") / "params"
    (tmp_path / "tree" / params).mkdir(parents=True)
    shutil.copy2(repository_root() / params / "smoke.yaml", tmp_path / "tree" / params)
    return Tree(tmp_path / "tree", [])


# --- counting -------------------------------------------------------------------------------------


def test_counts_add_up_over_calls_and_keep_the_note_of_a_failure(tmp_path):
    with pytest.raises(KelibError, match=r"no rows of faults in .*: run python -m tests.torture"):
        counts(tmp_path)
    for fault, case, tried, survived, note in (
        ("kills", "kill one", 1, 1, "after 1.0 s: make"),
        ("kills", "kill one", 1, 1, "after 2.0 s: python"),
        ("same", "again", 1, 0, "3 tables differ, a.csv first"),
        ("same", "again", 1, 1, ""),
        ("same", "LC_ALL=xx", 0, 0, "skipped: no such locale here"),
    ):
        row = {"fault": fault, "case": case, "seed": 1, "tried": tried, "survived": survived}
        append({**row, "note": note}, tmp_path / f"{fault}.csv")
    (tmp_path / "differences.csv").write_text("case,table\na,b\n")  # not one of them
    assert counts(tmp_path).to_numpy().tolist() == [
        ["kills", "kill one", 2, 2, ""],
        ["same", "LC_ALL=xx", 0, 0, "skipped: no such locale here"],
        ["same", "again", 2, 1, "3 tables differ, a.csv first"],
    ]


def test_a_refusal_in_own_words_is_told_from_a_traceback():
    said = "step 1\nkelib: 2 of 3 runs failed.\ncorpus ab: no space\nthe failed copy: a.ipynb\n"
    assert own_words(said + "make: *** Error 1\n") == "2 of 3 runs failed. corpus ab: no space"
    assert own_words("kelib: disk is full\nmake: *** Error 1\n") == "disk is full"
    assert own_words("make: *** Error 1\n") == ""
    assert own_words("kelib: a\nTraceback (most recent call last)\nOSError") == ""


def test_outputs_that_differ_or_are_left_over_are_named(tree):
    table = tree.folder / "data" / "measurements" / "smoke" / "a.csv"
    table.parent.mkdir(parents=True)
    table.write_text("x\n1\n")
    expected = tree.outputs()
    assert compare(tree, expected) == []
    table.write_text("x\n2\n")
    (table.parent / "b.csv").write_text("")
    (table.parent / ".c.csv.4.tmp").write_text("")
    assert [text.rpartition(" ")[0] for text in compare(tree, expected)] == [
        "1 tables differ, data/measurements/smoke/a.csv",
        "1 tables more, data/measurements/smoke/b.csv",
        "1 leftovers, data/measurements/smoke/.c.csv.4.tmp",
    ]


def test_differences_have_sizes_by_quantity_and_other_rows_are_refused(tmp_path):
    name = "data/measurements/smoke/t.csv"
    one = pd.DataFrame({"seed": [1, 2, 3], "a": [1.0, 2.0, 3.0], "b": [0.5, np.nan, 0.5]})
    two = one.assign(a=[1.0, 2.5, 3.0])

    def sizes(table):
        files = [{name: t.to_csv(index=False).encode()} for t in (one, table)]
        return same.differences(*files)

    found = sizes(two)
    assert found["quantity"].tolist() == ["a", "b"]
    assert found.loc[0, ["values", "changed"]].tolist() == [3, 1]
    sized = ["max_absolute", "max_relative", "mean_of_range"]
    assert found.loc[0, sized].tolist() == pytest.approx([0.5, 0.2, 0.5 / 3 / 2])
    assert found.loc[1, "values":].tolist() == [2, 0, 0, 0, 0]
    constant = sizes(one.assign(b=[0.5, np.nan, 0.51]))
    assert constant.loc[1, "mean_of_range"] == pytest.approx(0.01 / 2 / 0.5)  # of its size
    for other, why in (
        (one.assign(seed=[1, 2, 4]), "column seed differs"),
        (one.assign(b=0.5), "column b has other missing values"),
        (one.iloc[:2], "has another shape"),
    ):
        with pytest.raises(KelibError, match=why):
            sizes(other)
    with pytest.raises(KelibError, match="is not there"):
        same.differences({name: b"a\n1\n"}, {})
    path = tmp_path / "differences.csv"
    for _ in range(2):  # the second time takes the place of the first
        same.keep(found.assign(case="two threads"), path)
    assert len(pd.read_csv(path)) == 2


def test_cases_have_names_of_their_own_and_edits_fit_the_code(tmp_path):
    for names in (
        [variation.name for variation in same.variations(tmp_path)],
        [case.name for case in resources.cases(10)],
    ):
        assert len(set(names)) == len(names) > 10
    for variation in same.variations(tmp_path):
        for name, old, _ in variation.edits:
            assert old in (repository_root() / name).read_text()
    options = argparse.Namespace(only=["nothing"], folder=tmp_path)
    for module in (same, resources):
        with pytest.raises(KelibError, match="--only nothing is in no"):
            list(module.rows(options))


# --- faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["group", "all"])
def test_a_family_is_killed_to_the_last(way):
    process = subprocess.Popen(["sh", "-c", "sleep 60 & sleep 60"], start_new_session=True)
    victim, alive = kill(process, way, random.Random(0))
    assert "sleep 60" in victim and alive == []


def test_a_notebook_that_was_killed_after_it_wrote_its_results_runs_again(tmp_path):
    """Its unfinished copy tells; without that, results would stand there without a notebook."""
    tree = Tree(tmp_path / "whole", [])
    measured, out = tree.folder / "data" / "measurements" / "smoke", tree.folder / "figures/smoke"
    made = [measured / "pretraining.csv", measured / "checkpoints.csv", out / "fig08_layers.json"]
    for path in made:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        time.sleep(0.01)

    def asked() -> list[str]:
        status, said = tree.make("-n", str(made[-1].relative_to(tree.folder)), "PROFILE=smoke")
        assert status == 0
        return re.findall(r"kelib notebook notebooks/(\S+)\.ipynb", said)

    figure, stage = ["fig08_layers"], ["stages/2_entropy"]
    assert asked() == []
    for name, wanted in (("fig08_layers", figure), ("2_entropy", stage + figure)):
        left = out / f".{name}.ipynb.4711.ipynb"
        left.touch()
        assert asked() == wanted
        left.unlink()
    assert asked() == []


def test_what_descends_from_one_killed_process_must_end(monkeypatch):
    monkeypatch.setattr(kills, "GRACE", 0.5)
    dice = random.Random(0)
    for order, left in ((1, 2), (-1, 0)):  # the shell first, then one of those that it started
        monkeypatch.setattr(dice, "sample", lambda members, _, order=order: members[::order])
        script = "sleep 60 & sleep 60; sleep 60"
        process = subprocess.Popen(["sh", "-c", script], start_new_session=True)
        while len(family(process)) < 3:
            time.sleep(0.01)
        _, alive = kill(process, "one", dice)
        assert alive == ["sleep 60"] * left
        assert (process.poll() is None) == (order == -1)  # the shell goes on without
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_grid_of_many_finished_runs_is_counted_and_what_they_rest_on_is_made_once(tree):
    count = finished_grid(tree, 200)
    assert count >= 200
    profile = dataclasses.replace(load_profile("smoke"), profile="many")
    study = Study(profile, tree.folder / "data")
    stages = stage_runs(study, None)
    runs = [run for of_stage in stages.values() for run in of_stage]
    assert count_states(runs) == {"done": count, "running": 0, "failed": 0, "missing": 0}
    assert len({id(run.inputs["corpus"]) for run in stages[2] if run.kind == "evaluate"}) == 2
    assert study.corpus_run(100) is study.corpus_run(100) is not study.corpus_run(101)
    alone = Study(profile, tree.folder / "data").pretrain_run(101, "gpt_neox")
    assert study.pretrain_run(101, "gpt_neox") == alone
    assert alone.digest in {run.digest for run in runs}
    assert tree.unsound() == []
    note = runs[0].folder / "run.json"
    note.write_text(note.read_text().replace('"seconds": 1.0', '"seconds": 2.0'))
    (bad,) = tree.unsound()
    assert "it was sealed with" in bad


def all_of_numpys_memory():
    return np.ones(2**50)


def all_of_torchs_memory():
    import torch

    return torch.empty(2**50)


def another_error():
    raise RuntimeError("shapes do not match")


@pytest.mark.parametrize("ask", [all_of_numpys_memory, all_of_torchs_memory])
def test_a_lack_of_memory_is_one_line_with_its_run(tmp_path, monkeypatch, ask):
    monkeypatch.setattr(jobs, "corpus", lambda *_: ask())
    run = Run("corpus", tmp_path, {"seed": 1})
    with pytest.raises(KelibError, match=rf"^memory for corpus {run.digest} is not enough") as e:
        perform(run)
    assert "\n" not in str(e.value) and "lower workers" in str(e.value)
    monkeypatch.setattr(jobs, "corpus", lambda *_: another_error())
    with pytest.raises(RuntimeError, match="shapes do not match"):  # no fault of the machine's
        perform(run)


def test_a_kernel_that_dies_is_named_and_leaves_nothing(tmp_path):
    notebook = small_notebook(tmp_path, "import os\nos._exit(1)")
    with pytest.raises(KelibError, match=r"small.ipynb stopped, its kernel was ended .*memory"):
        run_notebook(notebook, tmp_path / "out.ipynb", {})
    assert [path.name for path in tmp_path.iterdir()] == ["small.ipynb"]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path, capsys):
    notebook = small_notebook(tmp_path, "print(number)")
    assert main(["notebook", str(notebook), "/proc/nobody/out.ipynb"]) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("kelib: cannot read or write /proc/nobody: ")
    assert "choose a place that can be written" in said

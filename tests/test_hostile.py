"""Files and settings that mean harm: nothing of them is run, nothing is written elsewhere."""

from __future__ import annotations

import ast
import json
import os
import pickle
import resource
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import LENGTH, VOCABULARY
from test_sources import build_wheel, digest
from test_sources import no_pip as no_pip

import kelib
from kelib import reference, seals
from kelib.checkpoints import NOTE, load_checkpoint, new_model
from kelib.cluster import load_cluster
from kelib.config import Model, load_profile, profile_from
from kelib.errors import KelibError
from kelib.published import load_published, published_from
from kelib.results import open_tables
from kelib.schema import read_yaml
from kelib.sharded_states import NOTES, load_state, save_state
from kelib.sources import Member, fetch
from kelib.task_files import export_questions
from kelib.trajectory_profile import load_trajectory
from kelib.world import Question

CODE = sorted(Path(kelib.__file__).parent.glob("*.py"))


class Harm:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


# --- what kelib's code may call -------------------------------------------------------------------

FORBIDDEN = {
    *("eval", "exec", "compile", "__import__", "input"),
    *("pickle.load", "pickle.loads", "marshal.loads", "shelve.open", "os.system", "os.popen"),
    *("yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all"),
    *("shutil.unpack_archive", "pd.read_pickle", "joblib.load"),
}
METHODS = {"extractall", "extract", "unpack_archive"}


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [(dotted(n.func), n) for n in ast.walk(tree) if isinstance(n, ast.Call)]


def dotted(node: ast.AST) -> str:
    """``a.b.c`` of names and attributes; what they begin with may be anything."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def dangerous(path: Path) -> list[str]:
    """Calls that run what is in a file, or open it as a pickle."""
    found = []
    for name, call in calls(path):
        given = {k.arg: ast.unparse(k.value) for k in call.keywords}
        bad = name in FORBIDDEN or name.rpartition(".")[2] in METHODS
        bad |= name.endswith("torch.load") and given.get("weights_only") != "True"
        bad |= name == "np.load" and given.get("allow_pickle", "False") != "False"
        bad |= given.get("trust_remote_code", "False") != "False"
        bad |= given.get("shell", "False") != "False"
        if bad:
            found.append(f"{path.name}:{call.lineno}: {name}")
    return found


def test_no_code_of_kelib_runs_what_it_reads():
    assert len(CODE) > 100
    assert [found for path in CODE for found in dangerous(path)] == []
    unpicklers = [path.stem for path in CODE if "Unpickler" in path.read_text()]
    assert unpicklers == ["sharded_states"]  # which makes no more than an index


@pytest.mark.parametrize(
    "line",
    [
        *(
            "eval('1')",
            "pickle.loads(b'')",
            "torch.load('x')",
            "torch.load('x', weights_only=False)",
        ),
        *("yaml.load('x', Loader)", "np.load('x', allow_pickle=True)", "archive.extractall('x')"),
        *("A.from_pretrained('x', trust_remote_code=True)", "subprocess.run('x', shell=True)"),
    ],
)
def test_the_search_finds_what_it_looks_for(tmp_path, line):
    (tmp_path / "code.py").write_text(line)
    assert len(dangerous(tmp_path / "code.py")) == 1


# --- weights --------------------------------------------------------------------------------------


def test_a_pickle_in_a_checkpoint_is_not_run(tmp_path):
    model = new_model(Model("olmo", 16, 16, 1, 2), VOCABULARY, LENGTH, 0)
    folder, mark = tmp_path / "step", tmp_path / "mark"
    model.save_pretrained(folder)
    (folder / NOTE).write_text(json.dumps(seals.sealed({"digest": "x"})))
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"lm_head.weight": Harm(mark)}))
    with pytest.raises(KelibError, match=r"step cannot be loaded .*; delete it, run again"):
        load_checkpoint(folder)
    torch.save({"lm_head.weight": Harm(mark)}, folder / "pytorch_model.bin")
    with pytest.raises(KelibError, match=r"step cannot be loaded .*; delete it, run again"):
        load_checkpoint(folder)
    assert not mark.exists()


def test_a_pickle_in_a_state_of_many_processes_is_not_run(tmp_path):
    class Trained:
        """What of a trainer is kept."""

        def __init__(self) -> None:
            self.model = torch.nn.Linear(2, 2)
            self.optimizer = torch.optim.AdamW(self.model.parameters())
            self.accelerator = self
            self.step, self.losses = 1, [0.5]

        def unwrap_model(self, model):
            return model

        def read_losses(self):
            return self.losses

    trained, again, mark = Trained(), Trained(), tmp_path / "mark"
    folder = save_state(trained, tmp_path / "state")
    assert load_state(again, tmp_path / "state") == {}
    assert torch.equal(trained.model.weight, again.model.weight)

    def plant(content):
        """In the index, and in the seal: who can write the one can write the other."""
        (folder / ".metadata").write_bytes(pickle.dumps(content))
        note = seals.unsealed(json.loads((folder / NOTES).read_text()))
        note["files"] = seals.seal(folder, besides=[NOTES])
        (folder / NOTES).write_text(json.dumps(seals.sealed(note)))

    for content in (Harm(mark), {"planner_data": [Harm(mark)]}, [torch.load]):
        plant(content)
        with pytest.raises(KelibError, match=r"step0000001 is not a state .*no part of it"):
            load_state(again, tmp_path / "state")
    plant([1])
    with pytest.raises(KelibError, match=r"is not a state of this run \(.metadata holds a list\)"):
        load_state(again, tmp_path / "state")
    assert not mark.exists()


def test_yaml_makes_no_objects(tmp_path):
    path = tmp_path / "x.yaml"
    mark = tmp_path / "mark"
    for tag in ("!!python/object/apply:os.mkdir", "!!python/name:os.mkdir", "!!python/module:os"):
        path.write_text(f"profile: {tag} [{mark}]\n")
        with pytest.raises(
            KelibError, match="is not valid YAML: could not determine a constructor"
        ):
            read_yaml(path)
    assert not mark.exists()


# --- archives -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_pip")
def test_a_bomb_is_not_unpacked(tmp_path):
    source = build_wheel(tmp_path, content=b"\0" * 1000)
    archive, zeros = tmp_path / source.archive, b"\0" * (1 << 20)
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        with packed.open(source.members[0].path, "w", force_zip64=True) as file:
            for _ in range(64):
                file.write(zeros)
        packed.writestr("../../outside.txt", "of a path outside")
        packed.writestr("/absolute.txt", "of another")
    assert archive.stat().st_size < 1 << 17
    source = replace(source, sha256=digest(archive.read_bytes()))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(KelibError, match="has more than 1000 bytes, the bound"):
        fetch(source, tmp_path)
    unit = 1 if sys.platform == "darwin" else 1 << 10
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < 1 << 25
    assert [path.name for path in tmp_path.iterdir()] == [source.archive]
    assert not (tmp_path.parent.parent / "outside.txt").exists()


@pytest.mark.usefixtures("no_pip")
@pytest.mark.parametrize("path", ["../../outside.txt", "/outside.txt", "..\\outside.txt"])
def test_a_path_of_an_archive_is_not_followed(tmp_path, path):
    """The name is in the archive, and asked for: it is refused before anything is opened."""
    with pytest.raises(KelibError, match=r"member path is .*, no '..', no root"):
        Member(path, "0" * 64, 1)


# --- names and paths ------------------------------------------------------------------------------

OUTSIDE = ("../../outside", "/outside", "..", "a/b", "", ".hidden", "a\\b", "x\n")


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_leads_nowhere_else(tmp_path, name, monkeypatch):
    smoke = read_yaml(kelib.config.repository_root() / "notebooks" / "params" / "smoke.yaml")
    with pytest.raises(KelibError, match=r"profile = .* it names a folder"):
        profile_from({**smoke, "profile": name})
    for load in (load_profile, load_published, load_trajectory):
        with pytest.raises(KelibError, match=r"unknown .*profile"):
            load(name)
    published = json.loads(json.dumps(load_published("published_smoke").parameters))
    with pytest.raises(KelibError, match=r"published = .* it names a folder"):
        published_from({**published, "workers": 1, "executor": "local", "published": name})
    for source in ("reference", "measurements"):
        with pytest.raises(KelibError, match=r"profile = .* it names a folder"):
            open_tables(name, source)
    monkeypatch.setattr(reference, "repository_root", lambda: tmp_path)
    with pytest.raises(KelibError, match=r"profile = .* it names a folder"):
        reference.promote(name)
    question = Question(name, "a", (" b", " c", " d", " e"), 0)
    with pytest.raises(KelibError, match=r"task = .* it names a folder"):
        export_questions([question], tmp_path / "tasks")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("logs", ["../../logs", "/logs", "data/../../logs"])
def test_logs_of_a_cluster_stay_in_the_tree(tmp_path, logs):
    path = tmp_path / "cluster.yaml"
    path.write_text(f"minutes: 60\nmemory_gb: 8\nlogs: {logs}\n")
    with pytest.raises(KelibError, match=r"cluster.logs = .* inside the repository"):
        load_cluster(path)
    path.write_text("minutes: 60\nmemory_gb: 8\nlogs: data/jobs\n")
    assert load_cluster(path).logs == "data/jobs"

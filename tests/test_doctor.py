"""``make doctor``: every trouble that can be planted is named with its remedy, and nothing else."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kelib import doctor as module
from kelib import machine
from kelib.archives import models
from kelib.config import repository_root
from kelib.doctor import doctor, examine
from kelib.machine import MISSING, NOTE, OK, Finding, archives_in
from kelib.sources import manifest

ROOT = repository_root()
ENVIRONMENT = Path(".venv")
LOCK = "numpy==2.4.6  # via x\npick==1.0 ; sys_platform == 'darwin'  # via x\ntorch==2.13.0\n"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with an environment that is ready, and a machine that has all."""
    for name in ("sources.yaml", "models.yaml"):
        (tmp_path / "data").mkdir(exist_ok=True)
        shutil.copy(ROOT / "data" / name, tmp_path / "data" / name)
    (tmp_path / "requirements.lock").write_text(LOCK)
    (tmp_path / "pyproject.toml").write_text("")
    packages = tmp_path / ".venv" / "lib" / "python3.11" / "site-packages"
    for name, version in (("numpy", "2.4.6"), ("torch", "2.13.0+cpu")):
        install(packages, name, version)
    (packages / "torch").mkdir()
    (packages / "torch" / "version.py").write_text("cuda: Optional[str] = None\n")
    prefix = tmp_path / ".venv"
    (prefix / "bin").mkdir()
    (prefix / "bin" / "python").touch()
    kernel(prefix / "share" / "jupyter", "python")
    (prefix / ".ready").write_text(f"{tmp_path}\n")
    later = (tmp_path / "requirements.lock").stat().st_mtime + 10
    os.utime(prefix / ".ready", (later, later))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("JUPYTER_DATA_DIR", raising=False)
    monkeypatch.setattr(module.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(machine, "usable_cores", lambda: 4)
    monkeypatch.setattr(machine, "usable_memory", lambda: 8e9)
    return tmp_path


def install(packages: Path, name: str, version: str) -> None:
    folder = packages / f"{name}-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def kernel(home: Path, program: str) -> None:
    spec = home / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps({"argv": [program, "-m", "ipykernel_launcher"]}))


def found(root: Path, what: str) -> Finding:
    (one,) = [finding for finding in examine(ENVIRONMENT, root) if finding.what == what]
    return one


def test_a_machine_that_has_all(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(ENVIRONMENT, root) == 0
    printed = capsys.readouterr().out
    assert "MISSING" not in printed and printed.endswith("nothing that is needed is missing\n")
    assert {f.what for f in examine(ENVIRONMENT, root) if f.state != OK} == {
        "text",
        "model",
        "torch",
    }


def plant_interpreter(root: Path) -> None:
    (root / ".venv" / "bin" / "python").unlink()


def plant_stale(root: Path) -> None:
    later = (root / ".venv" / ".ready").stat().st_mtime + 10
    os.utime(root / "requirements.lock", (later, later))


def plant_other_version(root: Path) -> None:
    packages = root / ".venv/lib/python3.11/site-packages"
    shutil.rmtree(packages / "numpy-2.4.6.dist-info")
    install(packages, "numpy", "2.3.0")


def plant_no_torch(root: Path) -> None:
    packages = root / ".venv/lib/python3.11/site-packages"
    shutil.rmtree(packages / "torch")
    shutil.rmtree(packages / "torch-2.13.0+cpu.dist-info")


def plant_cut_text(root: Path) -> None:
    (root / "data/sources/news-0.12.0").mkdir(parents=True)
    (root / "data/sources/news-0.12.0/NewsArticles.zip").write_bytes(b"PK")


def plant_left_run(root: Path) -> None:
    (root / "data/checkpoints/smoke/abc.partial").mkdir(parents=True)


@pytest.mark.parametrize(
    ("plant", "what", "state", "said", "remedy"),
    [
        (plant_interpreter, "environment", NOTE, "is not there yet", "make env .* 0.5 GB .* 3 GB"),
        (
            lambda root: (root / ".venv" / ".installing").touch(),
            *("environment", NOTE, "was broken off", "make env goes on"),
        ),
        (
            lambda root: (root / ".venv" / ".ready").write_text("/elsewhere\n"),
            *("environment", NOTE, "made for another folder", "make env"),
        ),
        (plant_stale, "environment", NOTE, "older than requirements.lock", "up to date"),
        (plant_other_version, "packages", MISSING, r"numpy 2.3.0 \(lock: 2.4.6\)", "make env"),
        (plant_no_torch, "packages", MISSING, "torch is missing", "make env"),
        (plant_no_torch, "torch", MISSING, "not installed", "make env"),
        (
            lambda root: kernel(root / "home/.local/share/jupyter", "/usr/bin/python3"),
            *("kernel", MISSING, "would run /usr/bin/python3", "rename that folder"),
        ),
        (
            lambda root: shutil.rmtree(root / ".venv" / "share"),
            *("kernel", MISSING, "no kernel python3", "make env"),
        ),
        (plant_left_run, "locks", NOTE, "broken off or failed: 1", ""),
    ],
)
def test_planted_trouble(root, plant, what, state, said, remedy) -> None:  # type: ignore[no-untyped-def]
    plant(root)
    one = found(root, what)
    assert one.state == state and re.search(said, one.said) and re.search(remedy, one.remedy), one
    assert doctor(ENVIRONMENT, root) == (state == MISSING)


def test_text_that_is_cut_is_told_from_text_to_come(root: Path) -> None:
    plant_cut_text(root)
    texts = {
        f.said.split(":")[0].split(" ")[0]: f
        for f in examine(ENVIRONMENT, root)
        if f.what == "text"
    }
    assert (
        texts["news-0.12.0"].state == MISSING and "data/sources/news" in texts["news-0.12.0"].remedy
    )
    assert texts["pubmed-0.5.1"].state == NOTE and "57 MB" in texts["pubmed-0.5.1"].said


def test_a_run_that_is_held_is_told_from_one_that_was_left(root: Path) -> None:
    plant_left_run(root)
    with (root / "data/checkpoints/smoke/abc.partial/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert (
            "being done now: 1 (data/checkpoints/smoke/abc.partial first)"
            in found(root, "locks").said
        )


@pytest.mark.parametrize(
    ("version", "state"), [((3, 10), MISSING), ((3, 12), OK), ((3, 14), MISSING)]
)
def test_python(version: tuple[int, int], state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    one = module.python_finding(version, ENVIRONMENT)
    assert one.state == state and (state == OK or "make PYTHON=" in one.remedy)


def test_poor_machine(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "usable_cores", lambda: 1)
    monkeypatch.setattr(machine, "usable_memory", lambda: 1e9)
    usage = shutil.disk_usage(root)._replace(free=10**8)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    states = {f.what: f.state for f in examine(ENVIRONMENT, root)}
    assert states["cores"] == states["memory"] == states["browser"] == NOTE
    assert states["disk"] == states["tools"] == MISSING


def test_manifests_read_line_by_line_are_those_that_yaml_reads() -> None:
    for name, rows in (("sources.yaml", manifest()), ("models.yaml", models())):
        wanted = [
            (f"{row.name}-{row.version}", [(m.path.split("/")[-1], m.bytes) for m in row.members])
            for row in rows.values()
        ]
        assert archives_in(ROOT / "data" / name) == wanted


def test_plain_python_is_enough() -> None:
    """Without site-packages, as before there is an environment."""
    command = [sys.executable, "-I", "-S", "-c"]
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from kelib.__main__ import main; "
    code += "sys.exit(main(['doctor', '--environment', 'no/such']))"
    done = subprocess.run([*command, code], capture_output=True, text=True, check=False)
    assert "no/such is not there yet" in done.stdout and not done.stderr, done.stderr

"""The promises about the environment: exact pins, one lock, honest dependencies, clear refusals."""

from __future__ import annotations

import ast
import importlib.metadata as metadata
import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
PINS = [Requirement(line.split("#")[0]) for line in LOCK if line and not line.startswith("#")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = {
    name: [Requirement(item) for item in items]
    for name, items in PROJECT["optional-dependencies"].items()
}
CORE = [Requirement(item) for item in PROJECT["dependencies"]]
OPTIONAL = ("notebooks", "tasks", "gguf", "hub", "cluster")
IN_LOCK = ("notebooks", "tasks", "gguf", "cluster", "dev")
LOCKED = CORE + [item for name in IN_LOCK for item in EXTRAS[name]]
PYTHONS = ["3.11.0", "3.11.14", "3.12.0", "3.12.12", "3.13.0", "3.13.9"]
PLATFORMS = [("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64")]
PLOTTING = {"matplotlib", "seaborn"}


def names(requirements: list[Requirement]) -> set[str]:
    return {canonicalize_name(item.name) for item in requirements}


def environment(python: str, platform: str, machine: str) -> dict[str, str]:
    known = {key: str(value) for key, value in default_environment().items()}
    return known | {
        "python_version": ".".join(python.split(".")[:2]),
        "python_full_version": python,
        "implementation_version": python,
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "os_name": "posix",
        "sys_platform": platform,
        "platform_system": platform.capitalize(),
        "platform_machine": machine,
    }


def pinned(where: dict[str, str]) -> dict[str, list[str]]:
    """Versions that the lock gives each name in one environment."""
    chosen: dict[str, list[str]] = {}
    for pin in PINS:
        if pin.marker is None or pin.marker.evaluate(where):
            version = next(iter(pin.specifier)).version
            chosen.setdefault(canonicalize_name(pin.name), []).append(version)
    return chosen


# --- the lock --------------------------------------------------------------------------------


def test_every_pin_is_one_exact_public_version() -> None:
    assert len(PINS) > 100
    for pin in PINS:
        assert [clause.operator for clause in pin.specifier] == ["=="], str(pin)
        version = next(iter(pin.specifier)).version
        assert "*" not in version and Version(version).local is None, str(pin)
        assert pin.url is None and not pin.extras, str(pin)


def test_lock_names_no_host_no_path_and_no_option() -> None:
    for line in LOCK:
        assert not re.search(r"://|^\s*-|@|\.(com|org|net|io)\b|(^|\s)\.{0,2}/", line), line


def test_lock_leaves_the_parts_of_a_cuda_build_to_torch() -> None:
    parts = [pin.name for pin in PINS if re.match(r"(nvidia|cuda)[-_]|triton$", pin.name)]
    assert parts == []


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize(("platform", "machine"), PLATFORMS)
def test_lock_gives_one_version_a_name(python: str, platform: str, machine: str) -> None:
    chosen = pinned(environment(python, platform, machine))
    assert {name: found for name, found in chosen.items() if len(found) != 1} == {}
    for wanted in LOCKED:
        found = chosen.get(canonicalize_name(wanted.name))
        assert found, f"{wanted} is not in requirements.lock: run `make lock`"
        assert wanted.specifier.contains(found[0]), f"{wanted} but the lock has {found[0]}"


def test_lock_supports_the_pythons_that_the_project_declares() -> None:
    declared = SpecifierSet(PROJECT["requires-python"])
    assert [version for version in PYTHONS if not declared.contains(version)] == []
    assert not declared.contains("3.10.14")


def test_lock_holds_nothing_that_no_one_asks_for() -> None:
    """Every pin but the direct ones says which other pin, or the project, brings it."""
    present = names(PINS)
    for line in LOCK:
        if not line or line.startswith("#"):
            continue
        requirement, _, origin = line.partition("# via ")
        sources = [item.strip() for item in origin.split(",")]
        assert origin, f"no origin: {line}"
        for source in sources:
            own = source == "kelib (pyproject.toml)"
            assert own or canonicalize_name(source) in present, line
        direct = "kelib (pyproject.toml)" in sources
        name = canonicalize_name(Requirement(requirement).name)
        assert direct == (name in names(LOCKED)), line


def test_running_environment_is_the_locked_one() -> None:
    different = {}
    for name, (version,) in pinned({k: str(v) for k, v in default_environment().items()}).items():
        try:
            installed = Version(metadata.version(name)).public
        except metadata.PackageNotFoundError:
            installed = "missing"
        if installed != Version(version).public:
            different[name] = f"{installed}, lock {version}"
    assert different == {}, "run `make env`"


def test_conda_environment_uses_the_same_lock() -> None:
    described = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    python, pip, through_pip = described["dependencies"]
    assert Requirement(python).specifier == SpecifierSet(PROJECT["requires-python"])
    assert pip == "pip"
    assert through_pip == {"pip": ["-r requirements.lock", "-e ."]}


# --- what kelib imports ----------------------------------------------------------------------


def third_party_imports(path: Path) -> set[tuple[str, bool]]:
    """(top-level module, whether it is imported on import of the file) of one source file."""
    found: set[tuple[str, bool]] = set()

    def visit(node: ast.AST, at_import: bool) -> None:
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            modules = [node.module]
        for module in modules:
            top = module.split(".")[0]
            if top not in sys.stdlib_module_names and top != "kelib":
                found.add((top, at_import))
        inner = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, at_import and not inner)

    visit(ast.parse(path.read_text(encoding="utf-8"), str(path)), True)
    return found


# where the module is not called as its distribution is
IMPORT_NAMES = {"yaml": "pyyaml", "PIL": "pillow", "vl_convert": "vl-convert-python"}
MODULES = sorted((ROOT / "kelib").glob("**/*.py"))


def distribution(module: str) -> str:
    return canonicalize_name(IMPORT_NAMES.get(module, module))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_module_imports_only_declared_dependencies(path: Path) -> None:
    plots = path.name.startswith("plots")
    optional = names([item for extra in OPTIONAL for item in EXTRAS[extra]])
    if path.name == "api_pages.py":  # `make docs` is for those who have the tools of the tests
        optional |= names(EXTRAS["dev"])
    for module, at_import in third_party_imports(path):
        needed = distribution(module)
        if needed in PLOTTING:
            assert plots, f"{path.name} imports {module}: drawing belongs to plots*.py"
            assert needed in names(EXTRAS["notebooks"])
        elif needed not in names(CORE):
            assert needed in optional, f"{path.name} imports {module}, which no extra declares"
            assert not at_import, f"{path.name}: import {module} where it is used, it is optional"


def test_every_core_dependency_is_imported() -> None:
    imported = {distribution(name) for path in MODULES for name, _ in third_party_imports(path)}
    assert names(CORE) - imported == set(), "declared in pyproject.toml but never imported"


def test_import_finder_sees_nested_and_aliased_imports(tmp_path: Path) -> None:
    source = tmp_path / "sample.py"
    source.write_text(
        "import os, numpy.linalg as la\nfrom . import x\nfrom kelib import y\n"
        "class A:\n    import pandas\ndef f():\n    from scipy.stats import t\n",
        encoding="utf-8",
    )
    assert third_party_imports(source) == {("numpy", True), ("pandas", True), ("scipy", False)}


# --- env.mk: what it does without a network --------------------------------------------------


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a blank in its name, in which env.mk can run without touching ours."""
    folder = tmp_path / "a project"
    folder.mkdir()
    for name in ("env.mk", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    for name in ("MFLAGS", "PYTHON", "VENV", "USE_ENV"):
        inherited.pop(name, None)
    command = ["make", "--no-print-directory", "-f", "env.mk", *arguments]
    return subprocess.run(
        command, cwd=folder, env=inherited, capture_output=True, text=True, timeout=60, check=False
    )


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


VERSION_ANSWER = 'case "$*" in *python_version*) echo {};; *ensurepip*) exit 1;; esac'


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (None, r"\./python was not found: install Python 3\.11, 3\.12 or 3\.13, or name it"),
        (VERSION_ANSWER.format("3.9.2"), r"\./python is Python 3\.9\.2 but 3\.11, 3\.12 or 3\.13"),
        (VERSION_ANSWER.format("3.14.0"), r"is Python 3\.14\.0 but .* \(make PYTHON=python3\.12\)"),
        (VERSION_ANSWER.format("3.12.4"), r"ensurepip module is missing: .* python3-venv"),
    ],
)
def test_unsuitable_python_is_refused_in_one_line(
    project: Path, body: str | None, message: str
) -> None:
    if body is not None:
        script(project / "python", body)
    result = make(project, "env", "PYTHON=./python")
    assert result.returncode == 2
    assert re.search(f"^kelib: .*{message}", result.stderr), result.stderr
    assert result.stderr.count("kelib:") == 1 and "Traceback" not in result.stderr
    assert not (project / ".venv").exists()


def test_folder_with_other_files_is_never_cleared(project: Path) -> None:
    (project / "mine").mkdir()
    (project / "mine" / "thesis.txt").write_text("precious", encoding="utf-8")
    result = make(project, "env", "VENV=mine")
    assert result.returncode == 2
    assert re.search(r"^kelib: mine holds files but no usable Python with pip", result.stderr)
    assert [item.name for item in (project / "mine").iterdir()] == ["thesis.txt"]


def ready(project: Path, home: Path) -> Path:
    """An environment that claims to be complete: an interpreter, a stamp newer than its inputs."""
    script(project / ".venv" / "bin" / "python", 'echo "python $*" >> calls.txt')
    (project / ".venv" / ".ready").write_text(f"{home}\n", encoding="utf-8")
    return project / "calls.txt"


def test_second_call_does_nothing(project: Path) -> None:
    calls = ready(project, project)
    result = make(project, "env")
    assert result.returncode == 0, result.stderr
    assert "Nothing to be done" in result.stdout and not calls.exists()


@pytest.mark.parametrize("change", ["moved", "lock", "pyproject", "interpreter"])
def test_stale_environment_is_set_up_again(project: Path, change: str) -> None:
    ready(project, project.parent if change == "moved" else project)
    later = (project / ".venv" / ".ready").stat().st_mtime + 10
    if change == "lock":
        os.utime(project / "requirements.lock", (later, later))
    if change == "pyproject":
        os.utime(project / "pyproject.toml", (later, later))
    if change == "interpreter":
        (project / ".venv" / "bin" / "python").unlink()
    assert make(project, "--question", "env").returncode == 1


@pytest.mark.parametrize("half_made", [False, True])
def test_failed_installation_leaves_no_stamp(project: Path, half_made: bool) -> None:
    """What pip left half-made is started afresh; what it never touched is kept."""
    ready(project, project.parent)
    packages = project / ".venv" / "lib" / "python3.12" / "site-packages"
    packages.mkdir(parents=True)
    (project / ".venv" / "pyvenv.cfg").touch()
    effect = f"sleep 0.1; mkdir '{packages}/half';" if half_made else ""
    script(project / ".venv" / "bin" / "python", f'case "$*" in *install*) {effect} exit 1;; esac')
    result = make(project, "env")
    assert result.returncode == 2
    assert re.search(r"kelib: pip could not install requirements\.lock .* again", result.stderr)
    assert "0.5 GB" in result.stdout and "3 GB" in result.stdout
    assert not (project / ".venv" / ".ready").exists()
    again = make(project, "env", "PYTHON=./none").stderr
    assert ("./none was not found" in again) == half_made, again
    assert ("pip could not install" in again) != half_made, again


def test_own_environment_needs_no_setup(project: Path) -> None:
    result = make(project, "env", "USE_ENV=1", "PYTHON=./none")
    assert result.returncode == 0 and not (project / ".venv").exists()


# --- what git keeps --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "ignored"),
    [
        (".venv/bin/python", True),
        ("data/corpus/small/tokens.npy", True),
        ("data/sources/archive.whl", True),
        ("data/checkpoints/a/model.safetensors", True),
        ("data/measurements/small/entropy.csv", True),
        ("data/reference/small/entropy.csv", False),
        ("data/README.md", False),
        ("figures/small/fig02.pdf", True),
        ("figures/reference/fig02.png", False),
        ("kelib.egg-info/PKG-INFO", True),
        ("notebooks/.ipynb_checkpoints/fig02.ipynb", True),
        ("requirements.lock", False),
    ],
)
def test_git_ignores_what_is_made_and_keeps_what_is_written(path: str, ignored: bool) -> None:
    command = ["git", "check-ignore", "--quiet", "--no-index", path]
    result = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert result.returncode == (0 if ignored else 1), result.stderr

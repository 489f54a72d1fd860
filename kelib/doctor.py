"""``make doctor``: what is missing on this machine, each with its remedy.

The standard library alone, so that it can speak before there is an environment.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable
from dataclasses import replace
from importlib.metadata import Distribution, distributions
from pathlib import Path

from kelib.machine import (
    MISSING,
    NOTE,
    OK,
    Finding,
    browser_finding,
    lock_finding,
    machine_findings,
    text_findings,
)

ROOT = Path(__file__).resolve().parent.parent
OLDEST, NEWEST = (3, 11), (3, 13)


def doctor(environment: Path | None, root: Path = ROOT) -> int:
    """Print a line for each finding; return 1 if something that is needed is missing, else 0.

    ``environment``: the folder that make uses (``.venv``), None for the Python that runs this.
    """
    found = examine(environment, root)
    for finding in found:
        print(finding)
    missing = [finding.what for finding in found if finding.state == MISSING]
    print(f"missing: {', '.join(missing)}" if missing else "nothing that is needed is missing")
    return 1 if missing else 0


def examine(environment: Path | None, root: Path = ROOT) -> list[Finding]:
    """All findings, in the order of what rests on what."""
    here, packages = environment_finding(environment, root)
    found = [python_finding(sys.version_info[:2], environment), *tool_findings(), here]
    if packages is not None:
        versions = versions_of(packages)
        inside = [packages_finding(versions, root), torch_finding(packages, versions)]
        inside.append(kernel_finding(environment, root))
        if here.state != OK:  # make brings these up to date with the rest
            inside = [replace(f, state=NOTE) if f.state == MISSING else f for f in inside]
        found += inside
    found += [*machine_findings(root, ready=packages is not None), *text_findings(root)]
    return [*found, lock_finding(root), browser_finding()]


def python_finding(version: tuple[int, ...], environment: Path | None) -> Finding:
    """Whether the Python that the environment is (to be) made with is one of those supported."""
    shown = ".".join(map(str, version))
    if OLDEST <= tuple(version) <= NEWEST:
        return Finding("Python", OK, f"{shown}, {sys.executable}")
    names = [f"python3.{minor}" for minor in range(NEWEST[1], OLDEST[1] - 1, -1)]
    there = [name for name in names if shutil.which(name)]
    remedy = f"make PYTHON={there[0]}" if there else "install one and name it: make PYTHON=PATH"
    said = f"{shown}, but 3.11, 3.12 or 3.13 is needed"
    state = MISSING if environment is None or not there else NOTE
    return Finding("Python", state, said, remedy)


def tool_findings() -> list[Finding]:
    """Programs, and the modules that make an environment."""
    lacking = [name for name in ("make", "git") if shutil.which(name) is None]
    modules = [n for n in ("venv", "ensurepip") if importlib.util.find_spec(n) is None]
    if not lacking + modules:
        return [Finding("tools", OK, "make, git, venv")]
    remedy = f"install {', '.join(lacking + (['python3-venv'] if modules else []))} with the system"
    return [Finding("tools", MISSING, f"no {', '.join(lacking + modules)}", remedy + "'s packages")]


# --- the environment ------------------------------------------------------------------------------


def environment_finding(environment: Path | None, root: Path) -> tuple[Finding, list[Path] | None]:
    """The state of the environment, and where its packages lie (None: there is none yet)."""
    if environment is None:
        said = f"{sys.prefix}, as it is (USE_ENV=1)"
        return Finding("environment", OK, said), [Path(p) for p in sys.path if p]
    folder = root / environment
    packages = sorted(folder.glob("lib/python3*/site-packages"))
    stamp = folder / ".ready"
    again = "make env sets it up: 0.5 GB to download with the CPU build of torch, 3 GB with CUDA"
    if (folder / ".installing").exists():
        said = f"{environment}: a set-up is under way, or was broken off"
        return Finding("environment", NOTE, said, "make env goes on"), None
    if not (folder / "bin" / "python").exists() or not packages:
        return Finding("environment", NOTE, f"{environment} is not there yet", again), None
    if not stamp.exists() or stamp.read_text(encoding="utf-8").strip() != str(root):
        said = f"{environment} was not finished, or was made for another folder"
        return Finding("environment", NOTE, said, again), packages
    made = stamp.stat().st_mtime
    newer = [n for n in ("requirements.lock", "pyproject.toml") if _time(root / n) > made]
    if newer:
        said = f"{environment} is older than {', '.join(newer)}"
        return Finding("environment", NOTE, said, "make env brings it up to date"), packages
    return Finding("environment", OK, f"{environment} is ready"), packages


def _time(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0


def locked_versions(root: Path) -> dict[str, tuple[set[str], bool]]:
    """By name (normalised) the versions in requirements.lock, and whether all platforms need it."""
    found: dict[str, tuple[set[str], bool]] = {}
    for line in (root / "requirements.lock").read_text(encoding="utf-8").splitlines():
        pin = re.match(r"([A-Za-z0-9._-]+)==([^\s;#]+)\s*(;)?", line)
        if pin is not None:
            versions, everywhere = found.get(_plain(pin[1]), (set(), True))
            found[_plain(pin[1])] = versions | {pin[2]}, everywhere and pin[3] is None
    return found


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def versions_of(packages: Iterable[Path]) -> dict[str, str]:
    """Installed versions by normalised name; what comes first in ``packages`` counts."""
    found: dict[str, str] = {}
    one: Distribution
    for one in distributions(path=[str(path) for path in packages]):
        if one.metadata["Name"]:  # a broken installation leaves folders without one
            found.setdefault(_plain(one.metadata["Name"]), one.version)
    return found


def packages_finding(versions: dict[str, str], root: Path) -> Finding:
    """Installed packages against the lock, local version suffixes aside."""
    differ = []
    for name, (wanted, everywhere) in sorted(locked_versions(root).items()):
        there = versions.get(name)
        if there is None and everywhere:
            differ.append(f"{name} is missing")
        elif there is not None and there.partition("+")[0] not in wanted:
            differ.append(f"{name} {there} (lock: {' or '.join(sorted(wanted))})")
    if not differ:
        return Finding("packages", OK, f"as in requirements.lock, {len(versions)} installed")
    more = f" and {len(differ) - 5} more" if len(differ) > 5 else ""
    remedy = "touch requirements.lock && make env (or pip install -r requirements.lock)"
    return Finding("packages", MISSING, ", ".join(differ[:5]) + more, remedy)


def torch_finding(packages: Iterable[Path], versions: dict[str, str]) -> Finding:
    """Which build of torch there is, and whether it suits the machine; torch is not imported."""
    notes = [path / "torch" / "version.py" for path in packages]
    text = next((p.read_text(encoding="utf-8") for p in notes if p.exists()), None)
    if text is None:
        return Finding("torch", MISSING, "not installed", "make env")
    cuda = re.search(r"^cuda\b[^=]*=\s*'([^']+)'", text, re.MULTILINE)
    device = shutil.which("nvidia-smi") is not None
    said = f"{versions.get('torch', 'unknown')}, {f'CUDA {cuda[1]}' if cuda else 'CPU'} build"
    if device and not cuda:
        remedy = "for the GPU reinstall torch without an index of CPU wheels (see README)"
        return Finding("torch", NOTE, f"{said}, though there is an NVIDIA GPU", remedy)
    return Finding("torch", OK, f"{said}, {'a' if device else 'no'} NVIDIA GPU here")


def kernel_finding(environment: Path | None, root: Path) -> Finding:
    """Whether notebooks would run in this environment: the kernel ``python3`` is its own."""
    prefix = Path(sys.prefix) if environment is None else root / environment
    homes = [os.environ.get("JUPYTER_DATA_DIR"), "~/.local/share/jupyter", "~/Library/Jupyter"]
    for home in (Path(home).expanduser() for home in homes if home):
        spec = home / "kernels" / "python3" / "kernel.json"
        try:
            program = json.loads(spec.read_text(encoding="utf-8"))["argv"][0]
        except (OSError, ValueError, LookupError, TypeError):
            continue
        if os.path.isabs(program) and Path(program).parent != prefix / "bin":
            said = f"{spec} hides this environment's: notebooks would run {program}"
            return Finding("kernel", MISSING, said, "rename that folder, or set JUPYTER_DATA_DIR")
    if not (prefix / "share" / "jupyter" / "kernels" / "python3" / "kernel.json").exists():
        return Finding("kernel", MISSING, f"no kernel python3 in {prefix}", "make env")
    return Finding("kernel", OK, "python3 is this environment's")

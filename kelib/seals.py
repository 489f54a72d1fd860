"""Files of finished runs, and notes, are sealed by their hashes and checked before they are used.

A seal tells a file that was damaged, cut, exchanged or edited from the one that a run wrote. It is
no protection against somebody who writes a new seal as well.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from kelib.errors import KelibError
from kelib.schema import digest

_known: dict[tuple[str, int, int, int], str] = {}  # path, inode, size, time -> sha256


def seal(folder: Path, besides: Collection[str] = ()) -> dict[str, str]:
    """The sha256 of every file below ``folder`` but those ``besides``, by its path from there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in files}
    return {name: _sha256(path) for name, path in names.items() if name not in besides}


def check(
    folder: Path,
    sealed: Mapping[str, str],
    names: Iterable[str] | None = None,
    remedy: str | None = None,
) -> None:
    """Raise KelibError unless the files ``names`` (None: all that were sealed) are as sealed.

    A file that this process has read before, and whose size and times have not changed since, is
    not read again. Files that were never sealed are not looked at. ``remedy`` is for files that
    are not those of a run's folder.
    """
    remedy = remedy or f"delete {folder} and run again, what rests on it is kept"
    for name in sealed if names is None else names:
        if name not in sealed:
            continue
        path = folder / name
        try:
            status = path.stat()
            key = (str(path), status.st_ino, status.st_size, status.st_mtime_ns)
            found = _known.get(key) or _known.setdefault(key, _sha256(path))
        except OSError as error:
            raise KelibError(f"{path} cannot be read ({error.strerror}); {remedy}") from None
        if found != sealed[name]:
            raise KelibError(
                f"{path} has sha256 {found[:12]}, it was sealed with {sealed[name][:12]}: it is "
                f"not what was written; {remedy}"
            )


def sealed(note: Mapping[str, Any]) -> dict[str, Any]:
    """A note of JSON values as it will be read, with the digest of all of it under ``seal``."""
    plain = json.loads(json.dumps(note))
    return {**plain, "seal": digest(plain)}


def unsealed(note: Any) -> dict[str, Any]:
    """The note without its seal. Raises ValueError if it has none or is not what was sealed."""
    plain = dict(note)
    if (wanted := plain.pop("seal", None)) is None:
        raise ValueError("it has no seal")
    if wanted != (found := digest(plain)):
        raise ValueError(f"its digest is {found}, it was sealed with {wanted}")
    return plain


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

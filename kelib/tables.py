"""Tidy tables with provenance, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from kelib import seals
from kelib.config import digest, repository_root
from kelib.errors import KelibError, listing
from kelib.temporary import temporary_beside

# not there; not JSON, or not a mapping; brackets too deep
_NOT_A_NOTE = (OSError, ValueError, TypeError, RecursionError)


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` to a temporary name beside ``path``, then rename. KelibError if it fails."""
    temporary = temporary_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8", newline="\n")
        temporary.replace(path)
    except OSError as error:
        raise KelibError(
            f"cannot write {path}: {error.strerror}; free space or choose another folder"
        ) from error
    finally:
        with suppress(OSError):  # gone already, or in a place where nothing can be
            temporary.unlink()


def write_table(table: pd.DataFrame, path: Path, provenance: Mapping[str, Any]) -> None:
    """Write ``path`` (CSV) and, first, ``path`` with suffix ``.json``: where the numbers come from.

    Floats carry ten significant digits, enough to tell two runs apart and the same text on every
    machine that computed the same numbers. The JSON holds the CSV's sha256 and a digest of itself,
    so that a later edit of either is noticed.
    """
    text = table.to_csv(index=False, float_format="%.10g", lineterminator="\n")
    note = {**provenance, "rows": len(table), "sha256": _sha256(text.encode())}
    note = seals.sealed(note)
    write_atomically(path.with_suffix(".json"), json.dumps(note, indent=1, sort_keys=True) + "\n")
    write_atomically(path, text)


def read_table(path: Path) -> pd.DataFrame:
    """Read a table and check it against its provenance file.

    Raises KelibError if one of the two is missing or the content is not what was written.
    """
    if not path.exists():
        there = [p.name for p in path.parent.glob("*.csv")] if path.parent.exists() else []
        raise KelibError(
            f"no table {path.name} in {path.parent}; it has {listing(there)}; run its stage"
        )
    expected = read_provenance(path)["sha256"]
    content = path.read_bytes()
    if _sha256(content) != expected:
        raise KelibError(
            f"{path} has sha256 {_sha256(content)[:12]}, its .json says {expected[:12]}: it was "
            "changed after it was written; run its stage again"
        )
    try:
        return pd.read_csv(path)
    except (ValueError, OverflowError) as error:  # no columns, rows of other lengths, no UTF-8
        reason = " ".join(str(error).split())[:200]
        raise KelibError(f"{path} is no table ({reason}); run its stage again") from error


def read_provenance(path: Path) -> dict[str, Any]:
    """The JSON beside a table."""
    try:
        note = seals.unsealed(json.loads(path.with_suffix(".json").read_text()))
        if not isinstance(note.get("sha256"), str):
            raise ValueError("it has no sha256")
        return note
    except _NOT_A_NOTE as error:
        reason = str(getattr(error, "strerror", None) or error)[:200]
        raise KelibError(
            f"no readable provenance {path.with_suffix('.json')}; run its stage again ({reason})"
        ) from error


def seal_vectors(paths: Iterable[Path]) -> dict[str, str]:
    """Hashes by name of files that lie beside tables, for ``files`` in the provenance of one."""
    return {path.name: _sha256(path.read_bytes()) for path in paths}


def check_vectors(table: Path) -> None:
    """Raise KelibError unless the files that lie beside a table, and that its provenance names
    under ``files``, are as they were written. An older kelib named none.
    """
    files = read_provenance(table).get("files", {})
    seals.check(table.parent, files, remedy=f"run the stage that writes {table.name} again")


def read_vectors(path: Path, table: str) -> dict[str, np.ndarray]:
    """The tensors by name of a safetensors file that lies beside ``table``.csv and is named in its
    provenance: mean coefficients ``(memories,)`` of a layer as ``step/layer``.

    Raises KelibError for a file that is not there or is not what was written.
    """
    check_vectors(path.with_name(f"{table}.csv"))
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        there = [p.name for p in path.parent.glob("*.safetensors")]
        raise KelibError(
            f"{path} cannot be read ({error}); beside {table}.csv there are {listing(there)}; run "
            "its stage again"
        ) from error


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git(*arguments: str) -> str:
    try:
        root = repository_root()
        done = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # kelib computes without the plotting libraries
        return "not installed"


def library_digest() -> str:
    """Digest of all of kelib's code."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return digest({file.name: _sha256(file.read_bytes()) for file in files})


def provenance(
    parameters: Mapping[str, Any], seeds: list[int], inputs: Mapping[str, str]
) -> dict[str, Any]:
    """Where a table or figure comes from: commit, versions, parameters, seeds, digests of inputs.

    ``digest`` is of code, parameters and inputs; commit and versions stay out of it.
    """
    packages = ("numpy", "pandas", "torch", "transformers", "matplotlib")
    code = library_digest()
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": _git("status", "--porcelain") != "",
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in packages},
        },
        "code": code,
        "parameters": dict(parameters),
        "seeds": list(seeds),
        "inputs": dict(inputs),
        "digest": digest([code, dict(parameters), list(seeds), dict(inputs)]),
    }


def stack_coefficients(files: Mapping[int, Path], path: Path) -> None:
    """Gather coefficient vectors of several checkpoints in one file, ``step/layer`` (float64).

    Vectors are mean coefficients; the files are those that ``EntropyMeasurement.save`` wrote.
    """
    tensors: dict[str, np.ndarray] = {}
    for step, file in files.items():
        with safe_open(file, framework="np") as stored:
            sequences = json.loads(stored.metadata()["counts"])["sequences"]
            for name in stored.keys():  # noqa: SIM118 - not a dict
                if not name.startswith("layer."):  # attention and next-token sums
                    continue
                layer = int(name.removeprefix("layer."))
                tensors[f"{step:07d}/{layer:02d}"] = stored.get_tensor(name) / sequences
    temporary = temporary_beside(path)
    save_file(tensors, temporary)
    temporary.replace(path)

"""States of a training in one file, sealed: what an interrupted run goes on from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kelib import seals
from kelib.errors import KelibError

NOTES = "state"  # entry of the file's metadata
# what reading a state that was cut, changed or is of another model can raise
BROKEN = (SafetensorError, OSError, RuntimeError, TypeError, LookupError, ValueError)


def write_state(path: Path, tensors: Mapping[str, torch.Tensor], notes: Mapping[str, Any]) -> None:
    """Write tensors and ``notes`` (fit for JSON) as safetensors, whole or not at all."""
    temporary = path.with_name(path.name + f".{os.getpid()}.tmp")
    sealed = seals.sealed({**notes, "sha256": _digest(tensors, tensors.__getitem__)})
    # one entry, as safetensors writes several in any order
    save_file(dict(tensors), temporary, metadata={NOTES: json.dumps(sealed)})
    temporary.replace(path)


def read_notes(path: Path) -> dict[str, Any]:
    """The notes of a state whose tensors are those that were written; one is read at a time.

    Raises ValueError, or another of :data:`BROKEN`, if it is not what was written.
    """
    with safe_open(path, framework="pt") as state:
        notes = seals.unsealed(json.loads(state.metadata()[NOTES]))
        found = _digest(state.keys(), state.get_tensor)
    if found != notes["sha256"]:
        raise ValueError(f"its tensors have sha256 {found[:12]}, not {notes['sha256'][:12]}")
    return notes


def check_state(path: Path) -> None:
    """Raise KelibError for a state that is missing or not what was written."""
    try:
        read_notes(path)
    except BROKEN as error:
        raise refusal(path, error) from error


def refusal(path: Path, reason: Exception) -> KelibError:
    """What to raise for a state that cannot be gone on from."""
    return KelibError(f"{path} is not a state of this run ({reason}); delete it")


def _digest(names: Iterable[str], tensor: Callable[[str], torch.Tensor]) -> str:
    """The sha256 of the bytes, types and shapes of tensors, in the order of their names."""
    total = hashlib.sha256()
    for name in sorted(names):
        plain = tensor(name).detach().cpu().contiguous()
        total.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
        total.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()

"""A reader's own model and texts in a profile: named by path, known by what is there. No torch.

A model is a folder in the hub's layout (config.json, safetensors, tokenizer), which
``save_pretrained`` writes, or the id of a model on the hub, pinned to a commit. Relative paths are
from the root of the repository, wherever a notebook or a test is run.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kelib import sources
from kelib.catalogue import catalogue, revisions_of
from kelib.config import repository_root
from kelib.errors import KelibError, listing
from kelib.hub_sources import PREFIX
from kelib.run import Run
from kelib.schema import digest

PLACEHOLDER = "path/to/"  # what notebooks/params/mine.yaml begins its paths with
GENERATED = "generated:"
MAIN = "main"
_COMMIT = re.compile(r"[0-9a-f]{40}")


def place_of(name: str) -> Path:
    """The absolute path of a name: from the home folder with ``~``, else from the repository."""
    return (repository_root() / Path(name).expanduser()).resolve()


def state_of(path: Path) -> str:
    """Digest of a file, or of all files below a folder: names, sizes and times of change.

    Weights of gigabytes are not read for it, so that a copy with other times counts as another one.
    """
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    parts = [file.relative_to(path).parts for file in files]
    hidden = [any(part.startswith(".") for part in inside) for inside in parts]
    stats = [file.stat() for file in files]
    return digest(
        [
            [*inside, stat.st_size, stat.st_mtime_ns]
            for inside, stat, left_out in zip(parts, stats, hidden, strict=True)
            if not left_out
        ]
    )


# --- texts --------------------------------------------------------------------------------------


def own_text(name: str) -> Path | None:
    """Where a text of a profile lies if it is a file or folder of the reader's, None for the name
    of a source.

    Raises KelibError for a placeholder and for a name that is neither.
    """
    if name.startswith((GENERATED, PREFIX)) or name in sources.manifest():
        return None
    path = place_of(name)
    if path.exists():
        return path
    _refuse_placeholder("data", name, "your .txt or .jsonl file (or a folder of those)")
    raise KelibError(
        f"data: there is no file or folder {path}; relative paths are from {repository_root()}; "
        f"correct {name!r}, or name a source ({listing(sources.manifest())}, {PREFIX}NAME, "
        f"{GENERATED}NAME)"
    )


def with_places(names: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """By name, where each text is read (a path, or the name itself of a source), and the state of
    those that are files."""
    found = {name: own_text(name) for name in names}
    places = {name: name if path is None else str(path) for name, path in found.items()}
    return places, {name: state_of(path) for name, path in found.items() if path is not None}


# --- models -------------------------------------------------------------------------------------


def is_own(source: str) -> bool:
    """Whether a model's source is a path or a hub id, rather than the name of something else."""
    if source.startswith(GENERATED):
        return False
    return "/" in source or source in catalogue() or place_of(source).is_dir()


def own_model_run(source: str, revision: str | None, home: Path) -> Run:
    """The run that has a folder or a model of the hub ready for those that measure it, see
    :mod:`kelib.own_model_jobs`.

    Raises KelibError for a placeholder, a folder that is not there or holds no model, a revision
    the model has not, and where the hub refuses or cannot be reached.
    """
    settings: dict[str, Any] = {"source": source, "repo": None, "commit": None}
    if (folder := own_folder(source, revision)) is not None:
        return Run("own_model", home, settings | {"state": state_of(folder)}, {}, {"given": folder})
    repo, commit = on_hub(source, revision)
    return Run("own_model", home, settings | {"repo": repo, "commit": commit})


def own_folder(source: str, revision: str | None = None) -> Path | None:
    """The model folder that ``source`` names, None if it can only be an id of the hub. Raises
    KelibError, see :func:`own_model_run`.
    """
    folder = place_of(source)
    if folder.is_dir():
        if revision is not None:
            raise KelibError(
                f"model.revision = {revision!r}, but {folder} is a folder, which has none; leave "
                "it out, or give the folder of that checkpoint"
            )
        if not (folder / "config.json").is_file():
            there = listing(path.name for path in folder.iterdir())
            raise KelibError(
                f"model.source: {folder} holds no model, for it has no config.json; it has "
                f"{there}; give a folder that save_pretrained wrote"
            )
        return folder
    _refuse_placeholder("model.source", source, "the folder of your model (or its id on the hub)")
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        beside = folder.parent.iterdir() if folder.parent.is_dir() else ()
        raise KelibError(
            f"model.source: there is no model folder {folder}; beside it are "
            f"{listing(path.name for path in beside)}; relative paths are from {repository_root()}"
        )
    return None


def on_hub(source: str, revision: str | None) -> tuple[str, str]:
    """(hub id, commit) of a revision, ``main`` by default; pinned in the lock file of revisions.

    Raises KelibError, see :func:`own_model_run`.
    """
    try:
        known = revisions_of(source)
    except KelibError as error:
        raise KelibError(f"there is no folder {place_of(source)}; {error}") from error
    repo, wanted = known[0].repo, revision or MAIN
    if _COMMIT.fullmatch(wanted):
        return repo, wanted
    by_name = {found.name: found.commit for found in known}
    if wanted not in by_name:
        near = difflib.get_close_matches(wanted, by_name, n=5, cutoff=0.4)
        raise KelibError(
            f"model.revision: {repo} has no {wanted!r}; the nearest are {listing(near or by_name)}"
        )
    return repo, by_name[wanted]


def _refuse_placeholder(key: str, name: str, what: str) -> None:
    if name.startswith(PLACEHOLDER):
        raise KelibError(
            f"{key} is still the placeholder {name!r}: write {what} in its place in "
            f"notebooks/params/mine.yaml, absolute or relative to {repository_root()}; "
            "docs/mine.md shows how"
        )


def parameters_in(folder: Path) -> int:
    """How many numbers the safetensors in a folder hold, by their headers; 0 without any.

    Raises KelibError for a file that is none.
    """
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(min(length, path.stat().st_size)))
            shapes = [tensor["shape"] for name, tensor in header.items() if name[:2] != "__"]
            total += sum(math.prod(shape) for shape in shapes)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise KelibError(
                f"{path} is not a safetensors file ({type(error).__name__}); bring it again"
            ) from error
    return total

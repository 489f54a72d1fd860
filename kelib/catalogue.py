"""Published checkpoints along pretraining: which models there are, their revisions, their commits.

``data/catalogue.yaml`` names the models; a hub id (owner/name) will do as well. The revisions of
one are listed from the hub once, then read from a lock file that pins each to a commit, so that a
branch that moves changes no measurement. The name of a revision is never made from a pattern: names
that the hub lists are read for their step, and steps that it lacks are said, not guessed. No torch.
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kelib import hub
from kelib.errors import KelibError, listing
from kelib.revisions import Revision, ordered
from kelib.schema import digest, read_rows, read_yaml, require
from kelib.tables import write_atomically

DATA = Path(__file__).resolve().parent.parent / "data"
CATALOGUE = DATA / "catalogue.yaml"
LOCK = DATA / "revisions.lock.yaml"
_COMMIT = re.compile(r"[0-9a-f]{40}")
LOCK_HEAD = """\
# The revisions that the model hub listed when a model was first used, each pinned to its commit.
# Written by kelib/catalogue.py. Commit this file: it says which checkpoints a measurement means.
"""


@dataclass(frozen=True)
class CatalogueModel:
    """A model of the catalogue; ``remarks`` are what others reported, for the reader only."""

    name: str
    repo: str  # owner/name on the hub
    tokens_per_step: int | None = None
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """One row of ``data/catalogue.yaml``: models trained with the same batches.

    ``source``: where ``tokens_per_step`` is from.
    """

    name: str
    tokens_per_step: int | None
    source: str
    remarks: tuple[str, ...]
    models: tuple[CatalogueModel, ...]

    def __post_init__(self) -> None:
        for model in self.models:
            require(model.repo.count("/") == 1, "repo", model.repo, "owner/name")
        if self.tokens_per_step is not None:
            require(self.tokens_per_step > 0, "tokens_per_step", self.tokens_per_step, "above 0")


def catalogue(path: Path | None = None) -> dict[str, CatalogueModel]:
    """The models of ``data/catalogue.yaml`` (or of ``path``) by name.

    Raises KelibError when the file is missing, is not YAML or holds a malformed row.
    """
    path = CATALOGUE if path is None else path
    found: dict[str, CatalogueModel] = {}
    for number, family in enumerate(read_rows(path, "families", Family).values(), start=1):
        for model in family.models:
            if model.name in found:
                raise KelibError(f"{path.name} row {number}: name {model.name!r} occurs twice")
            remarks = (*model.remarks, *family.remarks)
            found[model.name] = dataclasses.replace(
                model, remarks=remarks, tokens_per_step=family.tokens_per_step
            )
    return found


def catalogued(name: str) -> CatalogueModel:
    """The model of that name or hub id; an id that the catalogue lacks becomes a row of its own.

    Raises KelibError with the nearest names for any other text.
    """
    known = catalogue()
    if name in known:
        return known[name]
    for row in known.values():
        if row.repo == name:
            return row
    if name.count("/") == 1 and all(name.split("/")):
        return CatalogueModel(name.replace("/", "--"), name)
    near = difflib.get_close_matches(name, known, n=5, cutoff=0.4)
    raise KelibError(
        f"the catalogue has no model {name!r}; the nearest are {listing(near or known)}; give one "
        "of data/catalogue.yaml or the id of a hub model, owner/name"
    )


def revisions_of(name: str, lock: Path | None = None) -> list[Revision]:
    """The revisions of a model, by stage and step, those without a step last.

    They are read from the lock file, ``data/revisions.lock.yaml`` or ``lock``. A model that it does
    not hold is listed from the hub and written into it. Raises KelibError for an unknown model, a
    malformed lock, and where the hub refuses or cannot be reached.
    """
    model, lock = catalogued(name), LOCK if lock is None else lock
    pinned = _pinned(model, lock)
    return ordered(model.repo, pinned) if pinned else pin(name, lock)[0]


def pin(name: str, lock: Path | None = None) -> tuple[list[Revision], dict[str, str]]:
    """List the revisions from the hub and pin those that the lock file does not hold yet.

    Pins never move. The second value says, by name, where the hub differs from a pin: the branch is
    at another commit now, or listed no more. Raises as :func:`revisions_of`.
    """
    model, lock = catalogued(name), LOCK if lock is None else lock
    pinned = _pinned(model, lock)
    try:
        listed = hub.list_refs(model.repo, known=[row.repo for row in catalogue().values()])
    except hub.Unreachable as error:
        missing = "" if pinned else f"the revisions of {model.name} are not in {lock}, and "
        raise KelibError(f"{missing}{error}") from error
    if not listed:
        raise KelibError(f"{model.repo} has no revisions on the model hub; give another model")
    revisions = ordered(model.repo, {**listed, **pinned})
    if listed.keys() - pinned.keys():
        commits = {revision.name: revision.commit for revision in revisions}
        write_lock(lock, LOCK_HEAD, model.name, model.repo, commits)
    differ = {}
    for key, commit in pinned.items():
        if key not in listed:
            differ[key] = "listed no more on the hub"
        elif listed[key] != commit:
            differ[key] = f"now at {listed[key][:12]} on the hub"
    return revisions, differ


def _pinned(model: CatalogueModel, lock: Path) -> dict[str, str]:
    """Commits by name that the lock file has of a model, none if it has not the model."""
    entry = read_lock(lock).get(model.name)
    if entry is None:
        return {}
    if entry["repo"] != model.repo:
        raise KelibError(
            f"{lock} pins {model.name} in {entry['repo']}, the catalogue says {model.repo}; delete "
            "that entry, and measure again what was measured with it"
        )
    return dict(entry["revisions"])


def write_lock(lock: Path, head: str, name: str, repo: str, commits: Mapping[str, str]) -> None:
    """Write the entry of ``name`` into a lock file, listed today and sealed; the others stay."""
    entry = {
        "repo": repo,
        "listed": datetime.date.today().isoformat(),
        "revisions": dict(commits),
    }
    content = read_lock(lock) | {name: {**entry, "seal": digest([name, entry])}}
    by_name = {key: content[key] for key in sorted(content)}
    write_atomically(lock, head + yaml.safe_dump(by_name, sort_keys=False))


def read_lock(lock: Path) -> dict[str, Any]:
    """A lock file by name: repo, date of listing, commits by revision, and a seal of these, which
    an older kelib did not write. Raises KelibError."""
    content = read_yaml(lock) if lock.exists() else {}
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise KelibError(f"{lock} must be a mapping of models; restore it or delete it")
    for name, entry in content.items():
        entry = entry if isinstance(entry, dict) else {}
        commits = entry.get("revisions")
        pairs = commits.items() if isinstance(commits, dict) else [("", "")]
        named = isinstance(name, str) and isinstance(entry.get("repo"), str)
        if not named or not all(
            isinstance(key, str) and isinstance(commit, str) and _COMMIT.fullmatch(commit)
            for key, commit in pairs
        ):
            raise KelibError(
                f"{lock}: the entry {name} must have a repo and revisions, each with a commit of "
                "40 hexadecimal digits; restore it or delete it"
            )
        plain = {"repo": entry["repo"], "listed": str(entry.get("listed")), "revisions": commits}
        if entry.get("seal", found := digest([name, plain])) != found:
            raise KelibError(
                f"{lock}: the entry {name} has digest {found}, it was sealed with "
                f"{entry['seal']!r}: it was changed after it was written; restore it, or delete it "
                "and measure again what was measured with it"
            )
    return content

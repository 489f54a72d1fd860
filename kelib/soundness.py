"""Which revisions of a published model are sound: each by itself, and held against the others.

No torch.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from kelib.catalogue import CatalogueModel
from kelib.checkpoint_files import CONFIG
from kelib.errors import listing
from kelib.inspection import Inspected
from kelib.revisions import Revision

COLUMNS = {
    "revision": "string",
    "stage": "string",
    "step": "Int64",
    "tokens_billion": "Int64",  # that its name states
    "commit": "string",
    "verdict": "string",  # sound, check or bad
    "problems": "string",  # what makes it bad
    "remarks": "string",  # what to check
    "same_as": "string",  # other revisions with the same weights
    "form": "string",  # safetensors, pickle or none
    "dtype": "string",
    "parameters": "Int64",
    "bytes": "Int64",  # of all parts
    "weights_sha256": "string",
    "files": "string",  # those that loading needs
}


def judge(
    model: CatalogueModel,
    revisions: Sequence[Revision],
    inspected: Mapping[str, Inspected],
    moved: Mapping[str, str],
) -> pd.DataFrame:
    """A row a revision, columns :data:`COLUMNS`.

    ``inspected`` is by commit. ``moved`` are remarks by name, as :func:`kelib.catalogue.pin` gives
    them. What a revision differs from is what most revisions with a step have.
    """
    of_steps = [revision for revision in revisions if revision.step is not None] or revisions
    usual = {
        field: _most_common(getattr(inspected[revision.commit], field) for revision in of_steps)
        for field in ("config", "tokenizer", "dtype", "parameters")
    }
    owners: dict[str, list[Revision]] = {}  # by hash, of whole weights and of parts
    for revision in revisions:
        weights = inspected[revision.commit].weights
        for sha in {weights.sha256, *(part.sha for part in weights.parts)} - {""}:
            owners.setdefault(sha, []).append(revision)
    rows = []
    for revision in revisions:
        one = inspected[revision.commit]
        problems = [*one.weights.problems, *one.broken, *_not_its_own(revision, one, owners)]
        if not one.config:
            problems.append(f"no {CONFIG} that can be read")
        remarks = _differences(one, usual)
        if not revision.tokens_fit(model.tokens_per_step):
            remarks.append(f"its name's tokens do not fit steps of {model.tokens_per_step:,}")
        if revision.name in moved:
            remarks.append(moved[revision.name])
        same = [r.name for r in owners.get(one.weights.sha256, ()) if r.name != revision.name]
        rows.append(
            {
                "revision": revision.name,
                "stage": revision.stage,
                "step": revision.step,
                "tokens_billion": revision.tokens,
                "commit": revision.commit,
                "verdict": "bad" if problems else "check" if remarks else "sound",
                "problems": "; ".join(problems),
                "remarks": "; ".join(remarks),
                "same_as": listing(same, 4) if same else "",
                "form": one.weights.form,
                "dtype": one.dtype,
                "parameters": one.parameters or None,
                "bytes": sum(part.size for part in one.weights.parts),
                "weights_sha256": one.weights.sha256,
                "files": " ".join(one.files),
            }
        )
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS)


def _not_its_own(
    revision: Revision, one: Inspected, owners: Mapping[str, Sequence[Revision]]
) -> list[str]:
    """Weights, or parts of them, that another step has too. Which step they are of is not known.

    A revision without a step, such as main, may well be one of the steps.
    """
    if revision.step is None:
        return []

    def others(sha: str) -> list[str]:
        return [
            other.name
            for other in owners.get(sha, ())
            if other.step is not None
            and (other.stage, other.step) != (revision.stage, revision.step)
        ]

    if same := others(one.weights.sha256):
        return [f"same weights as {listing(same, 4)}"]
    return [
        f"its {part.name} is also that of {listing(shared, 4)}"
        for part in one.weights.parts
        if (shared := others(part.sha))
    ]


def _differences(one: Inspected, usual: Mapping[str, Any]) -> list[str]:
    """What differs from most revisions, and what the index and the headers disagree on."""

    def differs(field: str) -> bool:
        value = getattr(one, field)
        return bool(value and usual[field] and value != usual[field])

    found = []
    if differs("dtype"):
        found.append(f"dtype {one.dtype}, elsewhere {usual['dtype']}")
    if differs("parameters"):
        found.append(f"{one.parameters:,} parameters, elsewhere {usual['parameters']:,}")
    if differs("config"):
        ours, theirs = json.loads(one.config), json.loads(usual["config"])
        found.append(f"config: {listing(_changes(ours, theirs), 4)}")
    if differs("tokenizer"):
        names = {name for name, _ in set(one.tokenizer) ^ set(usual["tokenizer"])}
        found.append(f"tokenizer differs in {listing(names)}")
    if not one.tokenizer:
        found.append("no tokenizer")
    total = one.weights.total
    if total is not None and one.data is not None and one.data != total:
        found.append(f"the index says {total:,} bytes of tensors, the headers {one.data:,}")
    return found


def _changes(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    absent = "absent"
    return [
        f"{key} is {ours.get(key, absent)}, elsewhere {theirs.get(key, absent)}"
        for key in sorted({*ours, *theirs})
        if ours.get(key, absent) != theirs.get(key, absent)
    ]


def _most_common(values: Iterable[Any]) -> Any:
    """The most frequent value that is not empty; of several the first; None if there is none."""
    counts = Counter(value for value in values if value)
    return counts.most_common(1)[0][0] if counts else None

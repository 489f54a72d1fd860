"""Audit of published checkpoints: is each revision whole, and is it what its name says? No torch.

``python -m kelib audit MODEL`` asks the model hub for the metadata of every revision of a model and
fetches no weights. It finds revisions whose parts are missing or cut short, revisions that serve
the weights of another step, and changes of configuration, tokenizer and dtype on the way. What it
found goes to ``data/measurements/audit/MODEL.csv``, a row a revision:

* ``bad``: weights that cannot be used or are not those of the step (:func:`refuse_bad` refuses it);
* ``check``: usable, but something differs from the other revisions;
* ``sound``: nothing was found.

Equal bytes are what tells that weights are the same: weights that were written anew with other
metadata have another hash.
"""

from __future__ import annotations

import datetime
from collections.abc import Collection, Sequence
from importlib.metadata import version
from pathlib import Path

import pandas as pd

from kelib.catalogue import LOCK, CatalogueModel, catalogue, catalogued, pin
from kelib.config import repository_root
from kelib.errors import KelibError, listing
from kelib.inspection import inspect
from kelib.revisions import Revision
from kelib.schema import digest
from kelib.soundness import judge
from kelib.tables import provenance, read_table, write_table

VERDICTS = ("sound", "check", "bad")
SHOWN = 20  # revisions that are not sound, on the screen


def audit(name: str, lock: Path | None = None, folder: Path | None = None) -> pd.DataFrame:
    """Audit every revision of a model, write the table and return it.

    Columns are :data:`kelib.soundness.COLUMNS`. ``lock`` as for
    :func:`kelib.catalogue.revisions_of`: what is audited is pinned there. ``folder`` is where the
    table goes, by default ``data/measurements/audit``. Raises KelibError for an unknown model and
    where the hub refuses or cannot be reached.
    """
    model = catalogued(name)
    revisions, moved = pin(name, lock)
    commits = {revision.name: revision.commit for revision in revisions}
    inspected = inspect(model.repo, set(commits.values()), model.name)
    note = provenance(
        {"audit": model.name, "repo": model.repo, "tokens_per_step": model.tokens_per_step},
        [],
        {"commits": digest(commits)},
    )
    note["asked"] = datetime.date.today().isoformat()
    note["versions"]["huggingface_hub"] = version("huggingface_hub")
    table = judge(model, revisions, inspected, moved)
    write_table(table, _path(model, folder), note)
    return table


def refuse_bad(
    name: str,
    chosen: Sequence[Revision],
    accept: Collection[str] = (),
    folder: Path | None = None,
) -> dict[str, str]:
    """Refuse revisions that the audit of a model calls bad; the remarks of those to check, by name.

    ``accept``: names of revisions that are taken whatever the audit says, or without one. Raises
    KelibError for any other that is bad or was not audited at its commit.
    """
    remarks, refused = {}, []
    for revision in chosen:
        if revision.name in accept:
            continue
        row = _row(name, revision, folder)
        if row["verdict"] == "bad":
            refused.append(f"{revision.name} ({row['problems']})")
        elif row["verdict"] == "check":
            remarks[revision.name] = str(row["remarks"])
    if refused:
        raise KelibError(
            f"the audit of {name} calls bad: {listing(refused, 6)}; choose other steps, or name "
            "these revisions under accept"
        )
    return remarks


def run(name: str | None, lock: Path | None = None, folder: Path | None = None) -> None:
    """What ``python -m kelib audit`` does: :func:`audit`, then print what was found."""
    if not name:
        raise KelibError(
            f"name a model of data/catalogue.yaml ({listing(catalogue(), 6)}) or the id of a hub "
            "model, owner/name: make audit MODEL=olmo-1b"
        )
    model, table = catalogued(name), audit(name, lock, folder)
    counts = table["verdict"].value_counts()
    numbers = ", ".join(f"{counts.get(verdict, 0)} {verdict}" for verdict in VERDICTS)
    print(f"{model.name} ({model.repo}): {len(table)} revisions, {numbers}")
    found = table[table["verdict"] != "sound"].sort_values("verdict", kind="stable")
    for row in found.head(SHOWN).to_dict("records"):
        said = "; ".join(text for text in (row["problems"], row["remarks"]) if text)
        print(f"  {row['verdict']:<5} {row['revision']}: {said}")
    if len(found) > SHOWN:
        print(f"  and {len(found) - SHOWN} more in the table")
    for remark in model.remarks:
        print(f"  reported by others: {remark}")
    print(f"table: {_path(model, folder)}\npinned in: {lock or LOCK}")


def _path(model: CatalogueModel, folder: Path | None) -> Path:
    folder = repository_root() / "data" / "measurements" / "audit" if folder is None else folder
    return folder / f"{model.name}.csv"


def _row(name: str, revision: Revision, folder: Path | None) -> pd.Series:
    """The row of a revision at its commit. KelibError if there is none."""
    path = _path(catalogued(name), folder)
    again = f"run 'make audit MODEL={name}' where there is a network"
    if not path.exists():
        raise KelibError(f"{name} was not audited, there is no {path}; {again}")
    table = read_table(path)
    rows = table[(table["revision"] == revision.name) & (table["commit"] == revision.commit)]
    if rows.empty:
        raise KelibError(
            f"{revision.name} of {name} was not audited at commit {revision.commit[:12]}; {again}"
        )
    # as objects: a column without a single text is read as numbers
    return rows.astype(object).fillna({"problems": "", "remarks": "", "files": ""}).iloc[0]

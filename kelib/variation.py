"""What another machine makes of every quantity of a profile: measured once, committed, and then the
tolerance of :mod:`kelib.tolerances`.

A table ``data/reference/machines/<profile>.csv``, a row per pair of machines and quantity:

* pair: first digits of the sha256 of the other machine's table, so that the same numbers, as
  machines of one kind give, count once;
* table, part, quantity; rows and seeds that were compared;
* rms_difference in the unit of the quantity;
* spread and largest: root mean square and largest size of z, the difference in units of what seeds
  differ by. As these are shares of it, a new reference of the same profile can still use them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kelib.comparison import Quantity
from kelib.config import repository_root
from kelib.errors import KelibError, listing
from kelib.schema import digest
from kelib.tables import provenance, read_provenance, read_table, write_table
from kelib.tolerances import OFF, SEEDS, Measured

KEY = ["table", "part", "quantity"]
COLUMNS = ["pair", *KEY, "rows", "seeds", "rms_difference", "spread", "largest"]


def path_of(profile: str) -> Path:
    """Where the variation of a profile is kept."""
    return repository_root() / "data" / "reference" / "machines" / f"{profile}.csv"


def read_variation(profile: str) -> dict[tuple[str, str, str], Measured]:
    """Spread (root mean square over pairs), largest and the seeds of all pairs, by quantity; empty
    where nothing was measured. Raises KelibError if the table was changed after it was written.
    """
    path = path_of(profile)
    if not path.exists():
        return {}
    table = _kept(path)
    return {
        (str(key[0]), str(key[1]), str(key[2])): Measured(
            float(np.sqrt(np.mean(rows["spread"] ** 2))),
            float(rows["largest"].max()),
            int(rows["seeds"].sum()),
        )
        for key, rows in table.groupby(KEY)
    }


def claims_elsewhere(profile: str) -> str:
    """In words, how many judgements another kind of machine changes, and which of the claims;
    empty where the same seeds ran on one kind only.
    """
    path = path_of(profile)
    runs = read_provenance(path)["parameters"]["runs"] if path.exists() else {}
    said = []
    for found in (run["judgements"] for run in runs.values() if "judgements" in run):
        claims = [one for one in found["changed"] if one["what"].startswith("claim ")]
        said.append(
            f"On another kind of processor the same seeds change {len(found['changed'])} of "
            f"{found['compared']} judgements on claims and contrasts, "
            + (f"{len(claims)} of them on claims:" if claims else "none of them on a claim.")
        )
        said += [
            f"{one['statement']} ({one['unit']}): {one['reference']} here, {one['fresh']} there, "
            f"{one['both'] or 'not known'} by the mean of both."
            for one in claims
        ]
    return " ".join(said)


def write_variation(
    profile: str,
    quantities: Iterable[Quantity],
    sides: Mapping[str, Mapping[str, str]],
    note: Mapping[str, Any],
) -> Path:
    """Add a pair of machines to the variation of a profile; the same tables replace themselves.

    ``sides`` has the sha256 of the compared tables by ``reference`` and ``fresh`` and the table's
    name, ``note`` what is known of the fresh run, for the provenance. Only quantities with a scale
    of their own seeds are kept. Raises KelibError if both sides are the same to the byte, which is
    no other machine, and if something must be equal and is not: that is no variation.
    """
    chosen = list(quantities)
    broken = [" ".join(filter(None, q.key)) for q in chosen if q.status == OFF and q.scale != SEEDS]
    if broken:
        raise KelibError(
            f"no variation of machines: {listing(broken)} must be equal and is not; compare two "
            "runs of the same code and parameters"
        )
    measured = [q for q in chosen if q.scale == SEEDS]
    if not measured:
        raise KelibError(
            "no variation to write: nothing measured differs, as on the same kind of machine, or "
            "there are fewer than 3 seeds; run the profile on another kind"
        )
    path, fresh = path_of(profile), sides["fresh"]
    rows = pd.DataFrame([{**vars(q), "pair": fresh[q.table][:12]} for q in measured])[COLUMNS]
    runs = {digest(dict(note)): dict(note)}
    if path.exists():
        earlier = _kept(path)
        rows = pd.concat([earlier[~earlier["pair"].isin(rows["pair"])], rows], ignore_index=True)
        runs = read_provenance(path)["parameters"]["runs"] | runs
    parameters = {"profile": profile, "runs": runs}
    rows = rows.sort_values([*KEY, "pair"], ignore_index=True)
    inputs = {f"reference {name}": sha256 for name, sha256 in sides["reference"].items()}
    write_table(rows, path, provenance(parameters, [], inputs))
    return path


def _kept(path: Path) -> pd.DataFrame:
    table = read_table(path)
    return table.assign(part=table["part"].astype(object).fillna(""))  # most have no part

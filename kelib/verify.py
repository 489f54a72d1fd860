"""``python -m kelib verify PROFILE``: do fresh measurements say what the committed reference says?

Tables of ``data/measurements/<profile>`` are compared with those of ``data/reference/<profile>``,
quantity by quantity (:mod:`kelib.tolerances` has the rule, :mod:`kelib.variation` what machines
were seen to do), and the claims and contrasts are judged on both (:mod:`kelib.changed_claims`).

What the tables rest on must be the same: parameters that differ are refused, unless they are
accepted by name. Pretraining seeds may be fewer, then the claims are judged on those of both sides.
A verdict that changes is printed, and is no failure by itself: between two machines each of whose
numbers agree, a verdict near its threshold may fall on either side. ``--claims strict`` makes it
one.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from kelib.changed_claims import compare_claims
from kelib.comparison import Quantity, compare_table, seed_deviations
from kelib.config import profile_from, repository_root
from kelib.errors import KelibError, listing
from kelib.table_layouts import LAYOUTS, layout_of
from kelib.tables import read_provenance, read_table
from kelib.tolerances import OFF
from kelib.variation import read_variation

# A profile of one seed, and the one with more seeds of the same model and protocol
LIKE = {"small": "study"}
SHARED_OUT = ("workers", "executor", "cache_gib", "profile", "published", "trajectory", "figures")
# folders of data/reference with tables that are of no profile
NO_PROFILES = {"bench", "machines", "memories", "sliders", "torture"}


@dataclass
class Report:
    """What a comparison found; ``equal`` are names of files that are the same to the byte."""

    profile: str
    reference: Path
    fresh: Path
    quantities: list[Quantity] = field(default_factory=list)
    equal: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sides: dict[str, dict[str, str]] = field(default_factory=dict)  # sha256 by side and table
    tables: dict[str, dict[str, pd.DataFrame]] = field(default_factory=dict, repr=False)
    claims: pd.DataFrame = field(default_factory=pd.DataFrame)
    claims_compared: int = 0
    claims_remark: str = ""

    @property
    def off(self) -> list[Quantity]:
        """What differs more than it may."""
        return [q for q in self.quantities if q.status == OFF]

    @property
    def byte_equal(self) -> bool:
        """Whether all tables are the same to the byte."""
        return set(self.sides["reference"]) <= set(self.equal)


def compare(profile: str, against: Path | None = None, accept: Collection[str] = ()) -> Report:
    """Compare the tables that both folders have; ``against`` is that of the fresh ones.

    ``accept`` are parameters, or whole sections, that may differ; then so may the rows. Raises
    KelibError if there is nothing to compare, if a table was changed after it was written, if
    parameters differ, and as :func:`kelib.comparison.compare_table`.
    """
    root = repository_root() / "data"
    folders = {
        "reference": root / "reference" / profile,
        "fresh": against or root / "measurements" / profile,
    }
    names = {
        side: {path.stem for path in folder.glob("*.csv")} & set(LAYOUTS)
        for side, folder in folders.items()
    }
    both = sorted(names["reference"] & names["fresh"])
    if not both:
        known = {path.parent.name for path in (root / "reference").glob("*/*.csv")}
        raise KelibError(
            f"nothing to compare: {folders['reference']} has {listing(names['reference'])}, "
            f"{folders['fresh']} has {listing(names['fresh'])}; run make figures PROFILE={profile} "
            f"first; there are references of {listing(known - NO_PROFILES)}"
        )
    report = Report(profile, folders["reference"], folders["fresh"])
    for side in folders:
        other = "fresh" if side == "reference" else "reference"
        if alone := names[side] - names[other]:
            report.notes.append(f"only the {side} side has {listing(alone, 99)}: not compared")
    _refuse_other_parameters(folders, both, accept)
    measured, like = read_variation(profile), LIKE.get(profile)
    for name in both:
        paths = {side: folder / f"{name}.csv" for side, folder in folders.items()}
        tables = {side: read_table(path) for side, path in paths.items()}
        for side, path in paths.items():
            report.sides.setdefault(side, {})[name] = read_provenance(path)["sha256"]
            report.tables.setdefault(side, {})[name] = tables[side]
        if report.sides["reference"][name] == report.sides["fresh"][name]:
            report.equal.append(name)
        _note_seeds_and_columns(report, name, tables)
        report.quantities += compare_table(
            name,
            tables["reference"],
            tables["fresh"],
            like=_deviations_of(like, name),
            measured=measured,
            same_rows=not accept,
        )
    _compare_vectors(report)
    return report


def _deviations_of(profile: str | None, name: str) -> dict[tuple[str, str], float]:
    path = repository_root() / "data" / "reference" / str(profile) / f"{name}.csv"
    return seed_deviations(name, read_table(path)) if path.exists() else {}


def _note_seeds_and_columns(report: Report, name: str, tables: Mapping[str, pd.DataFrame]) -> None:
    for side, other in (("reference", "fresh"), ("fresh", "reference")):
        columns = set(tables[side].columns)
        if alone := columns - set(tables[other].columns):
            report.notes.append(f"{name}: only the {side} side has the columns {listing(alone)}")
        if "seed" in columns and "seed" in tables[other]:
            missing = set(tables[side]["seed"]) - set(tables[other]["seed"])
            note = f"only the {side} side has seeds {listing(missing)}: left out"
            if missing and note not in report.notes:
                report.notes.append(note)


def _compare_vectors(report: Report) -> None:
    """Mean coefficients: only whether they are the same to the byte, as entropies are made of
    them.
    """
    for path in sorted(report.reference.glob("*.safetensors")):
        other = report.fresh / path.name
        if other.exists() and other.read_bytes() == path.read_bytes():
            report.equal.append(path.name)


def judge_claims(report: Report) -> None:
    """Judge claims and contrasts on the seeds of both sides, and note what would change."""
    first = next(iter(report.sides["reference"]))
    parameters = read_provenance(report.reference / f"{first}.csv")["parameters"]
    if "pretraining" not in parameters:
        report.claims_remark = "no claim is about this profile"
        return
    seeds = set.intersection(
        *(
            set(table["seed"])
            for tables in report.tables.values()
            for table in tables.values()
            if "seed" in table
        )
    )
    one, two = (
        {name: _of_seeds(table, seeds) for name, table in report.tables[side].items()}
        for side in ("reference", "fresh")
    )
    found = compare_claims(one, two, parameters)
    report.claims, report.claims_compared, report.claims_remark = found


def _of_seeds(table: pd.DataFrame, seeds: set[int]) -> pd.DataFrame:
    return table[table["seed"].isin(seeds)].reset_index(drop=True) if "seed" in table else table


# --- parameters ---------------------------------------------------------------------------------


def _refuse_other_parameters(
    folders: Mapping[str, Path], names: list[str], accept: Collection[str]
) -> None:
    differing: dict[str, str] = {}
    for name in names:
        one, two = (
            _values(read_provenance(folder / f"{name}.csv")["parameters"])
            for folder in folders.values()
        )
        for key, before, after in _differences(one, two):
            section = key.split(".")[0]
            if "pretraining" in one and section not in layout_of(name).sections:
                continue  # no number of this table rests on it
            if not any(key == allowed or key.startswith(f"{allowed}.") for allowed in accept):
                text = f"{key} is {_short(before)} in the reference, {_short(after)}"
                differing.setdefault(key, text)
    if differing:
        raise KelibError(
            f"{folders['fresh']} was measured with other parameters: "
            f"{'; '.join(differing.values())}; measure with those of the reference, or name what "
            f"may differ (--accept {next(iter(differing))})"
        )


def _values(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """All parameters that can change a number, those that are left out at their defaults."""
    if "pretraining" in parameters:
        parameters = profile_from(parameters).parameters
    plain = json.loads(json.dumps(parameters))
    return {name: value for name, value in plain.items() if name not in (*SHARED_OUT, "seeds")}


def _differences(
    one: Mapping[str, Any], two: Mapping[str, Any], head: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    for key in sorted({*one, *two}):
        a, b = one.get(key), two.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{head}{key}.")
        elif a != b:
            yield f"{head}{key}", a, b


def _short(value: Any, limit: int = 60) -> str:
    text = json.dumps(value)
    return text if len(text) <= limit else f"{text[:limit]}..."

"""What ``python -m kelib verify`` prints and writes about a comparison (:mod:`kelib.verify`)."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from kelib.calibration import own_seconds
from kelib.changed_claims import declared
from kelib.comparison import ROWS, Quantity
from kelib.config import load_profile
from kelib.errors import listing
from kelib.plan_check import finished_runs
from kelib.study import Study
from kelib.tables import read_provenance, write_atomically
from kelib.tolerances import OFF, SAME, WITHIN
from kelib.variation import write_variation
from kelib.verify import Report, compare, judge_claims


def run(
    profile: str,
    against: Path | None = None,
    *,
    json_path: Path | None = None,
    strict: bool = False,
    everything: bool = False,
    keep_variation: bool = False,
    accept: Collection[str] = (),
) -> int:
    """Compare, print, and return the exit status: 0 if all is the same or within tolerance, 1 on a
    real difference, with ``strict`` also on a changed verdict or outcome.

    ``keep_variation`` takes the differences for those of two machines and writes them down
    (:func:`kelib.variation.write_variation`).
    """
    report = compare(profile, against, accept)
    judge_claims(report)
    failed = bool(report.off) or (strict and len(report.claims) > 0)
    print("\n".join([*_lines(report, everything), _verdict(report, failed)]))
    if json_path is not None:
        write_atomically(
            json_path, json.dumps(as_json(report, failed), indent=1, allow_nan=False) + "\n"
        )
    if keep_variation:
        note = read_provenance(report.fresh / f"{next(iter(report.sides['fresh']))}.csv")
        about = {name: note[name] for name in ("commit", "versions", "seeds")}
        about["judgements"] = {
            "compared": report.claims_compared,
            "changed": list(_changed(report)),
        }
        about["processor_hours"] = _processor_hours(report)
        path = write_variation(profile, report.quantities, report.sides, about)
        print(f"variation between machines: {path}")
    return int(failed)


def _processor_hours(report: Report) -> float | None:
    """Hours of one core that the fresh runs took; None where there are only their tables."""
    data = report.fresh.parent.parent
    if report.fresh.name != report.profile or not (data / "measurements").exists():
        return None
    notes = finished_runs(Study(load_profile(report.profile), data))
    return round(sum(map(own_seconds, notes)) / 3600, 2) if notes else None


def as_json(report: Report, failed: bool) -> dict[str, Any]:
    """The report as plain values; NaN and infinity as null."""
    claims = report.claims.astype(object).where(report.claims.notna(), None)
    quantities = [asdict(q) for q in report.quantities]
    for row in quantities:
        row |= {k: None for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)}
    return {
        "profile": report.profile,
        "failed": failed,
        "byte_equal": report.byte_equal,
        "equal": report.equal,
        "notes": report.notes,
        "tables": report.sides,
        "quantities": quantities,
        "claims": claims.to_dict("records"),
        "claims_compared": report.claims_compared,
        "claims_remark": report.claims_remark,
    }


def _lines(report: Report, everything: bool) -> Iterator[str]:
    yield f"{report.fresh} beside {report.reference}"
    for text in [*_made_by(report), *report.notes]:
        yield f"  {text}"
    yield ""
    yield f"{'table':17s} {'rows':>6s} {SAME:>5s} {WITHIN:>7s} {OFF:>4s}  nearest to its limit"
    for name in report.sides["reference"]:
        yield _table_line(name, [q for q in report.quantities if q.table == name], report.equal)
    listed = report.quantities if everything else report.off
    if listed:
        yield ""
        yield from _quantity_lines(listed)
    yield ""
    yield from _claim_lines(report)
    if remark := _machine(report):
        yield remark


def _made_by(report: Report) -> list[str]:
    first = next(iter(report.sides["reference"]))
    one, two = (read_provenance(f / f"{first}.csv") for f in (report.reference, report.fresh))
    found = []
    if one["code"] != two["code"]:
        found.append(f"code {one['code']} at commit {one['commit'][:12]}, now {two['code']}")
    names = {*one["versions"], *two["versions"]}
    for name in sorted(names):
        a, b = (side["versions"].get(name, "not named") for side in (one, two))
        if a != b:
            found.append(f"{name} {a}, now {b}")
    return found


def _table_line(name: str, quantities: list[Quantity], equal: list[str]) -> str:
    counts = [sum(q.status == status for q in quantities) for status in (SAME, WITHIN, OFF)]
    rows = sum({q.part: q.rows for q in quantities if q.quantity != ROWS}.values())
    differing = [q for q in quantities if q.status == WITHIN and q.tolerance > 0]
    text = "same to the byte" if name in equal else ""
    if differing:
        worst = max(differing, key=lambda q: q.rms_difference / q.tolerance)
        text = f"{_called(worst)}: {worst.rms_difference:.3g} of {worst.tolerance:.3g}"
    return f"{name:17s} {rows:6d} {counts[0]:5d} {counts[1]:7d} {counts[2]:4d}  {text}"


def _called(quantity: Quantity) -> str:
    return " ".join(filter(None, (quantity.part, quantity.quantity)))


def _quantity_lines(quantities: list[Quantity]) -> Iterator[str]:
    head = f"{'table':17s} {'quantity':30s} {'rows':>6s} {'':6s} {'rms diff.':>10s}"
    yield f"{head} {'tolerance':>10s} of {'':11s} largest at"
    for q in quantities:
        numbers = f"{q.rms_difference:10.3g} {q.tolerance:10.3g} {q.limit:14s}"
        yield f"{q.table:17s} {_called(q):30s} {q.rows:6d} {q.status:6s} {numbers} {q.where}"
        if q.reason:
            yield f"{'':17s} {q.reason}"


def _claim_lines(report: Report) -> Iterator[str]:
    if not report.claims_compared:
        yield f"claims: not compared ({report.claims_remark})"
        return
    count = f"{len(report.claims)} of {report.claims_compared}"
    yield f"claims and contrasts: {count} judgements would change"
    for row in _changed(report):
        both = f"; both averaged by seed: {row['both']}" if row["both"] else ""
        yield f"  {row['what']}: {row['reference']} -> {row['fresh']}{both} ({row['unit']})"


def _changed(report: Report) -> Iterator[dict[str, str]]:
    """What would change, in words: ``what`` by its name and by its ``statement``, its ``unit``, and
    judgement, effect and interval of ``reference``, ``fresh`` and ``both`` averaged by seed (empty
    if that cannot be).
    """
    asked = declared()
    statements = {claim.id: claim.statement for claim in asked.claims}
    statements |= {contrast.id: contrast.statement for contrast in asked.contrasts}
    for row in report.claims.to_dict("records"):
        rate = "" if pd.isna(row["learning_rate"]) else f" at CL rate {row['learning_rate']:g}"
        sides = {side: _judged(row, side) for side in ("reference", "fresh", "both")}
        words = {"what": f"{row['kind']} {row['name']}{rate}", "unit": row["unit"]}
        yield words | {"statement": statements[row["name"]].rstrip(".") + rate} | sides


def _judged(row: Mapping[Any, Any], side: str) -> str:
    if pd.isna(row[f"judgement_{side}"]):
        return ""
    mean, low, high = (row[f"{name}_{side}"] for name in ("mean", "low95", "high95"))
    effect = "" if pd.isna(mean) else f", {mean:+.3f}"
    interval = "" if pd.isna(low) else f" [{low:+.3f}, {high:+.3f}]"
    return f"{row[f'judgement_{side}']}{effect}{interval}"


def _verdict(report: Report, failed: bool) -> str:
    if report.byte_equal:
        return f"verified: all {len(report.sides['reference'])} tables are the same to the byte"
    counts = {s: sum(q.status == s for q in report.quantities) for s in (SAME, WITHIN, OFF)}
    text = ", ".join(f"{number} {status}" for status, number in counts.items())
    if failed and not report.off:
        text += f", but {len(report.claims)} judgement{'s' * (len(report.claims) > 1)} changed"
    return f"{'NOT ' * failed}verified: of {len(report.quantities)} quantities {text}"


def _machine(report: Report) -> str:
    """What tables of trained models that are the same to the byte say about the machine, where
    others are not.
    """
    tables = [name for name, table in report.tables["reference"].items() if "seed" in table]
    equal = [name for name in tables if name in report.equal]
    if not equal or report.byte_equal:
        return ""
    others = [name for name in tables if name not in equal]
    return (
        f"{listing(equal, 4)} the same to the byte, {listing(others, 4)} not: this machine does "
        "the same arithmetic, so what differs is the code or what it was given"
    )

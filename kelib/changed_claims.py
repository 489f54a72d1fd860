"""Which verdicts on claims and outcomes of contrasts differ between two runs of a profile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from kelib import claims as rule
from kelib.claims import Claim
from kelib.config import profile_from, repository_root
from kelib.contrasts import (
    NOT_RUN,
    Contrast,
    differences,
    judged,
    load_contrasts,
    rates_of,
)
from kelib.errors import KelibError, listing
from kelib.verdicts import EXPLORATORY, NOT_TESTABLE, verdicts

COLUMNS = ["kind", "name", "learning_rate", "n", "mean", "low95", "high95", "unit", "judgement"]
KEYS = ["kind", "name", "learning_rate"]
UNJUDGED = (NOT_RUN, NOT_TESTABLE, EXPLORATORY)  # rows of the claims table that nothing decides
LATER = ("k_gain", "k_cl")  # quantities of claims with conditions of later, see claims.yaml
NEEDED = ("continual", "entropy", "checkpoints")
JUDGED = (*NEEDED, "interventions")  # tables that all claims rest on
Tables = Mapping[str, pd.DataFrame]


@dataclass(frozen=True)
class Declared:
    """What is judged: ``claims.yaml`` and all ``contrasts*.yaml`` of ``notebooks/params``."""

    claims: tuple[Claim, ...]
    contrasts: tuple[Contrast, ...]


def declared() -> Declared:
    """Read what is judged. Raises KelibError as the loaders do."""
    folder = repository_root() / "notebooks" / "params"
    files = sorted(folder.glob("contrasts*.yaml"))
    found = tuple(contrast for path in files for contrast in load_contrasts(path))
    return Declared(rule.load_claims(folder / "claims.yaml"), found)


def judgements(what: Declared, tables: Tables, parameters: Mapping[str, Any]) -> pd.DataFrame:
    """Verdicts on claims and outcomes of contrasts in one run, as :data:`COLUMNS`; mean and
    interval in the unit, the rate NaN for contrasts.

    What rests on missing tables is left out. Raises KelibError where the tables do not suit
    (:mod:`kelib.claims`, :mod:`kelib.contrasts`).
    """
    parts = [_claims(what.claims, tables), _contrasts(what.contrasts, tables, parameters)]
    there = [part[COLUMNS] for part in parts if len(part)]
    return pd.concat(there, ignore_index=True) if there else pd.DataFrame(columns=COLUMNS)


def _claims(claims: tuple[Claim, ...], tables: Tables) -> pd.DataFrame:
    if not set(NEEDED) <= set(tables):
        return pd.DataFrame()
    table = judged_claims(claims, tables)
    return table.rename(columns={"claim": "name", "verdict": "judgement"}).assign(kind="claim")


def judged_claims(claims: tuple[Claim, ...], tables: Tables) -> pd.DataFrame:
    """The claims table (:func:`kelib.verdicts.verdicts`) of the measurement tables by name:
    :data:`NEEDED`, and ``interventions`` where there are any.
    """
    continual, entropy, checkpoints = (tables[name] for name in NEEDED)
    totals = entropy.groupby(["seed", "step"])["entropy_nats"].sum().reset_index()
    return verdicts(
        rule.claim_differences(continual, tables.get("interventions"), claims),
        rule.entropy_change(totals, continual),
        claims,
        tokens_per_parameter=float(checkpoints["tokens_per_parameter"].max()),
    )


def without_later_conditions(claims: tuple[Claim, ...], tables: Tables) -> pd.DataFrame:
    """Rows of the claims table whose verdict would be another without the conditions on P that
    claims on K got after the first seed had been looked at: ``verdict`` and ``verdict_without``.
    """
    freed = tuple(
        replace(claim, conditions=replace(claim.conditions, p_pt_margin=None, p_cl_margin=None))
        if claim.quantity in LATER
        else claim
        for claim in claims
    )
    before = judged_claims(freed, tables)[["claim", "learning_rate", "verdict"]]
    keys = ["claim", "learning_rate"]
    both = judged_claims(claims, tables).merge(before, on=keys, suffixes=("", "_without"))
    moved = both[both["verdict"] != both["verdict_without"]]
    return moved.sort_values("learning_rate", ascending=False, kind="stable", ignore_index=True)


def _contrasts(
    contrasts: tuple[Contrast, ...], tables: Tables, parameters: Mapping[str, Any]
) -> pd.DataFrame:
    rates = rates_of(profile_from(parameters))
    table = judged(contrasts, differences(contrasts, tables.get, rates))
    renamed = table.rename(columns={"contrast": "name", "outcome": "judgement"})
    renamed = renamed.assign(kind="contrast", learning_rate=float("nan"))
    return renamed[renamed["judgement"] != NOT_RUN]


def compare_claims(
    reference: Tables, fresh: Tables, parameters: Mapping[str, Any]
) -> tuple[pd.DataFrame, int, str]:
    """Judgements that differ, with columns ``_reference``, ``_fresh`` and ``_both``
    (:func:`together`; empty where that cannot be); how many were compared; and, where none was,
    why. What one side lacks is not compared, nor what neither side could judge
    (:data:`UNJUDGED`).
    """
    try:
        what = declared()
        before, after = (judgements(what, tables, parameters) for tables in (reference, fresh))
    except KelibError as error:
        return pd.DataFrame(), 0, str(error)
    try:
        pooled = judgements(what, together(reference, fresh), parameters)
    except KelibError:  # the runs do not pair up
        pooled = before.iloc[:0]
    compared = before.merge(after, on=[*KEYS, "unit"], suffixes=("_reference", "_fresh"))
    named = pooled.rename(columns={c: f"{c}_both" for c in COLUMNS if c not in (*KEYS, "unit")})
    compared = compared.merge(named, on=[*KEYS, "unit"], how="left")
    undecided = [compared[f"judgement_{side}"].isin(UNJUDGED) for side in ("reference", "fresh")]
    compared = compared[~(undecided[0] & undecided[1])]
    changed = compared[compared["judgement_reference"] != compared["judgement_fresh"]]
    why = "" if len(compared) else "no claim could be judged"
    return changed.reset_index(drop=True), len(compared), why


def together(reference: Tables, fresh: Tables) -> dict[str, pd.DataFrame]:
    """The tables of two runs of the same seeds, one under the other: every number by seed becomes
    the mean of both, as if the second were another CL seed. What is left of rounding is halved, the
    unit of a verdict stays the pretraining seed.

    Only tables that both have. Raises KelibError if the stages of a seed are not the same on both
    sides, as first and last would then be those of one of them.
    """
    found = {}
    for name in sorted(set(reference) & set(fresh)):
        one, two = reference[name], fresh[name]
        if {"seed", "stage_step"} <= {*one.columns, *two.columns}:
            places = [
                set(t[["seed", "stage_step"]].itertuples(index=False, name=None))
                for t in (one, two)
            ]
            if other := places[0] ^ places[1]:
                raise KelibError(
                    f"table {name} has seed {listing(sorted({seed for seed, _ in other}))} at "
                    "other stages in the two runs; judge each by itself"
                )
        if "cl_seed" in two:
            two = two.assign(cl_seed=two["cl_seed"] + one["cl_seed"].max() + 1)
        found[name] = pd.concat([one, two], ignore_index=True)
    return found

"""The claims of the paper, and one difference per claim, CL rate and pretraining seed.

``claims.yaml`` holds the claims; ``claim_differences`` turns the measurement tables into what
``kelib.verdicts`` judges.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

import numpy as np
import pandas as pd

from kelib import metrics
from kelib.errors import KelibError, listing
from kelib.schema import LARGEST, read_yaml, shown

STAGES, RESUSCITATION = "last - first stage", "q = 1 - original"
QUANTITIES = {  # True: about task accuracy, so the margins above chance must hold
    "k_gain": False,
    "k_cl": False,
    "acquisition": False,
    "acquisition_modified": False,
    "p_cl": True,
    "forgetting": True,
    "forgetting_modified": True,
    "forgetting_over_chance": True,
}
UNITS = ("nats", "fraction")


@dataclass(frozen=True)
class Conditions:
    """When a claim can be tested; margins are fractions above chance, None where irrelevant.

    The fall of the entropy matters to every claim, as all are about its consequences. A claim about
    accuracy must name margins; the primary claims about probes name them too, since a model that
    continual learning brought back to chance is no place to compare what it acquired.
    """

    entropy_falls: bool
    p_pt_margin: float | None = None
    p_cl_margin: float | None = None


@dataclass(frozen=True)
class Claim:
    """One line of ``claims.yaml``; ``direction`` is the sign of the paper's difference."""

    id: str
    statement: str
    figure: str
    quantity: str
    contrast: str
    direction: int
    unit: str
    primary: bool
    paper_value: str
    conditions: Conditions
    smallest_effect: float | None = None
    beside: str | None = None


def digest(path: str | Path) -> str:
    """SHA-256 of the claims file, the same for both styles of line ending."""
    return hashlib.sha256(_text(path).encode("utf-8")).hexdigest()


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise KelibError(f"cannot read the claims file {path} ({reason}): check the path") from None


def _keys(given: object, kind: type, where: str) -> dict:
    if not isinstance(given, dict):
        raise KelibError(f"{where} is {shown(given)}, keys with values are needed")
    valid = {field.name: field.default is MISSING for field in fields(kind)}
    if unknown := set(given) - set(valid):
        raise KelibError(f"{where} has unknown keys: {listing(unknown)}; valid: {listing(valid)}")
    if missing := {key for key, needed in valid.items() if needed} - set(given):
        raise KelibError(f"{where} lacks the keys: {listing(missing)}; add them")
    return given


def _positive(value: object, key: str, where: str) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < LARGEST:  # type: ignore[operator]
        raise KelibError(
            f"{where}: {key} is {shown(value)}, a number above 0 and below 2**63 is needed (write "
            "1.0e-4, not 1e-4)"
        )


def _claim(given: object, position: int) -> Claim:
    where = f"claim {given.get('id', position) if isinstance(given, dict) else position}"
    raw = dict(_keys(given, Claim, where))
    conditions = Conditions(**_keys(raw["conditions"], Conditions, f"conditions of {where}"))
    claim = Claim(**{**raw, "conditions": conditions})
    for key in ("id", "statement", "figure", "quantity", "contrast", "unit", "paper_value"):
        if not isinstance(raw[key], str) or not raw[key].strip():
            raise KelibError(
                f"{where}: {key} is {shown(raw[key])}, text is needed (put it in quotes)"
            )
    for key, valid in {
        "quantity": QUANTITIES,
        "contrast": (STAGES, RESUSCITATION),
        "unit": UNITS,
    }.items():
        if raw[key] not in valid:
            raise KelibError(f"{where}: {key} is {shown(raw[key])}; valid: {listing(valid)}")
    if type(claim.direction) is not int or claim.direction not in (-1, 1):
        raise KelibError(f"{where}: direction is {shown(claim.direction)}; valid: -1, 1")
    if type(claim.primary) is not bool:
        raise KelibError(f"{where}: primary is {shown(claim.primary)}; valid: true, false")
    if claim.primary or claim.smallest_effect is not None:
        _positive(claim.smallest_effect, "smallest_effect", where)
    if claim.quantity.endswith("_modified") and claim.contrast == STAGES:
        raise KelibError(f"{where}: {claim.quantity} needs the contrast {shown(RESUSCITATION)}")
    if conditions.entropy_falls is not True:
        raise KelibError(
            f"{where}: entropy_falls is {shown(conditions.entropy_falls)}, every claim needs true"
        )
    for key in ("p_pt_margin", "p_cl_margin"):
        if getattr(conditions, key) is not None or QUANTITIES[claim.quantity]:
            _positive(getattr(conditions, key), key, f"conditions of {where}")
    return claim


def load_claims(path: str | Path) -> tuple[Claim, ...]:
    """Read and validate ``claims.yaml``; raises KelibError that names the claim and the key."""
    content = read_yaml(Path(path))
    entries = content.get("claims") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries or set(content) != {"claims"}:
        raise KelibError(f"{path} must hold one key, claims, with a list of claims")
    claims = tuple(_claim(given, position) for position, given in enumerate(entries, 1))
    ids = [claim.id for claim in claims]
    if repeated := {name for name in ids if ids.count(name) > 1}:
        raise KelibError(f"{path} repeats the ids {listing(repeated)}: make them unique")
    primary = [claim.id for claim in claims if claim.primary]
    for claim in claims:
        if (claim.beside is not None) is claim.primary or claim.beside not in (None, *primary):
            raise KelibError(
                f"claim {claim.id}: beside is {shown(claim.beside)}; an exploratory claim names a "
                f"primary one ({listing(primary)}), a primary claim names none"
            )
    return claims


def refuse_duplicates(table: pd.DataFrame, keys: Sequence[str], name: str) -> None:
    """Refuse a table in which the same run or measurement stands twice (KelibError)."""
    if (twice := table.duplicated(list(keys))).any():
        row = table.loc[twice, list(keys)].to_dict("records")[0]
        shown = ", ".join(f"{key} {value}" for key, value in row.items())
        raise KelibError(
            f"the {name} table has {int(twice.sum())} duplicate rows, first: {shown}; "
            "keep one row per run"
        )


def entropy_change(entropy: pd.DataFrame, continual: pd.DataFrame) -> pd.DataFrame:
    """Knowledge entropy at the last minus the first stage of each seed, in nats.

    ``entropy`` has ``seed``, ``step``, ``entropy_nats``, one row per checkpoint and one data set;
    the stages are the smallest and largest ``stage_step`` of ``continual``. Returns ``seed`` and
    ``entropy_change``, the ``conditions`` of ``verdicts``.
    """
    metrics.check_table(entropy, ["step", "entropy_nats"], ["seed"], "entropy")
    metrics.check_table(continual, ["stage_step"], ["seed"], "continual")
    refuse_duplicates(entropy, ["seed", "step"], "entropy")
    rows = []
    for seed, steps in continual.groupby("seed")["stage_step"]:
        measured = entropy[entropy["seed"] == seed].set_index("step")["entropy_nats"]
        first, last = steps.min(), steps.max()
        for step in (first, last):
            if step not in measured.index:
                raise KelibError(
                    f"no entropy of seed {seed} at step {step}; measured steps: "
                    f"{listing(measured.index)}: run stage 2 for it"
                )
        rows.append({"seed": seed, "entropy_change": measured[last] - measured[first]})
    return pd.DataFrame(rows, columns=["seed", "entropy_change"])


RUN_KEYS = ["seed", "stage_step", "learning_rate", "cl_seed"]
MEASURES = ["k_pt", "k_cl", "p_pt", "p_cl", "chance"]


def _injected_runs(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """The injected runs of a measurement table, checked, with the quantities of the claims."""
    metrics.check_table(table, [], ["injected"], name)
    if not pd.api.types.is_bool_dtype(table["injected"]):
        raise KelibError(
            f"column injected of the {name} table has type {table['injected'].dtype}, true or "
            "false is needed: text would count as true"
        )
    runs, keys = table[table["injected"]], list(RUN_KEYS)
    if name == "interventions":
        metrics.check_table(runs, [], ["intervention"], name)
        # another kind of intervention is nobody's claim here
        runs = runs[runs["intervention"].isin(["none", "resuscitate"])]
        keys += ["intervention", "ratio", "factor"]
    numeric = ["stage_step", "learning_rate", *MEASURES]
    metrics.check_table(runs, numeric, ["seed", "cl_seed", "stage_label"], name)
    baseline_k, baseline_p = runs["k_pt"], runs["p_pt"]
    if name == "interventions":
        changed = runs["intervention"] == "resuscitate"
        extra = ["ratio", "factor", "k_modified", "p_modified"]
        metrics.check_table(runs[changed], extra, [], name)
        baseline_k = runs["k_modified"].where(changed, runs["k_pt"])
        baseline_p = runs["p_modified"].where(changed, runs["p_pt"])
    refuse_duplicates(runs, keys, name)
    k_pt, k_cl, p_pt, p_cl, chance = (runs[column].to_numpy(float) for column in MEASURES)
    return runs.assign(
        k_gain=k_cl - k_pt,
        acquisition=metrics.acquisition(k_pt, k_cl),
        acquisition_modified=metrics.acquisition(baseline_k, k_cl),
        forgetting=metrics.forgetting(p_pt, p_cl),
        forgetting_modified=metrics.forgetting(baseline_p, p_cl),
        forgetting_over_chance=metrics.forgetting_over_chance(p_pt, p_cl, chance),
        p_pt_margin=p_pt - chance,
        p_cl_margin=p_cl - chance,
    )


def _at_stage(runs: pd.DataFrame, step_of_seed: pd.Series, which: str) -> pd.DataFrame:
    """The runs of each seed at its step, whose label must be the same for all seeds."""
    chosen = runs[runs["stage_step"] == runs["seed"].map(step_of_seed)]
    if absent := set(runs["seed"]) - set(chosen["seed"]):
        raise KelibError(
            f"seed {listing(absent)} has no runs at its {which} stage: finish or remove it"
        )
    if chosen["stage_label"].nunique() > 1:
        found = chosen.groupby("stage_label")["seed"].agg(lambda seeds: listing(set(seeds)))
        text = "; ".join(f"{label} for seed {seeds}" for label, seeds in found.items())
        raise KelibError(f"the {which} stage differs between seeds ({text}): finish the runs")
    return chosen


def claim_differences(
    continual: pd.DataFrame, interventions: pd.DataFrame | None, claims: Sequence[Claim]
) -> pd.DataFrame:
    """One difference per claim, CL rate and pretraining seed, CL seeds averaged before.

    ``continual`` has one row per CL run: ``seed``, ``stage_step``, ``stage_label``,
    ``learning_rate``, ``cl_seed``, ``injected``, ``k_pt``, ``k_cl`` (nats per target token),
    ``p_pt``, ``p_cl``, ``chance`` (fractions). ``interventions`` has these too, with
    ``intervention`` (none or resuscitate), ``ratio``, ``factor`` and K and P of the modified model
    before CL, ``k_modified`` and ``p_modified`` (all four NaN for none). The first stage of a seed
    is its smallest ``stage_step``, the last its largest; q = 1 means ratio 0.5, factor 1, last
    stage. Runs without injection are left out.

    Returns ``claim``, ``learning_rate``, ``seed``, ``value`` minus ``reference`` =
    ``difference``, and ``p_pt_margin``, ``p_cl_margin``: the smaller margin above chance of the
    two sides. A CL rate that one side lacks altogether has no rows. Raises KelibError for NaN,
    duplicate runs, and sides that do not pair up: at a rate, every CL seed must stand on both.
    """
    runs = _injected_runs(continual, "continual")
    steps = runs.groupby("seed")["stage_step"]
    if single := set(steps.min().index[steps.min() == steps.max()]):
        raise KelibError(f"seed {listing(single)} has one stage only: a claim needs first and last")
    last = steps.max()
    sides = {STAGES: (_at_stage(runs, last, "last"), _at_stage(runs, steps.min(), "first"))}
    if interventions is not None and len(interventions):
        changed = _injected_runs(interventions, "interventions")
        changed = _at_stage(changed, last, "last")
        original = changed["intervention"] == "none"
        q1 = np.isclose(changed["factor"], 1) & np.isclose(changed["ratio"], 0.5) & ~original
        sides[RESUSCITATION] = (changed[q1], changed[original])
    tables = [_difference(c, *sides[c.contrast]) for c in claims if c.contrast in sides]
    if not tables:
        raise KelibError("no claim has runs to compare: pass claims, and the interventions table")
    return pd.concat(tables, ignore_index=True)


def _mean_or_nan(values: pd.Series) -> float:
    # a ratio that is undefined in one CL run is undefined for the seed, not averaged away
    return values.mean(skipna=False)


def _difference(claim: Claim, value: pd.DataFrame, reference: pd.DataFrame) -> pd.DataFrame:
    pairing = ["learning_rate", "seed", "cl_seed"]
    rates = set(value["learning_rate"]) & set(reference["learning_rate"])
    value, reference = (side[side["learning_rate"].isin(rates)] for side in (value, reference))
    left, right = (
        set(side[pairing].itertuples(index=False, name=None)) for side in (value, reference)
    )
    if unpaired := sorted(left ^ right):
        rate, seed, cl_seed = unpaired[0]
        raise KelibError(
            f"{len(unpaired)} runs stand on one side of '{claim.contrast}' only, first: CL rate "
            f"{rate:g}, seed {seed}, cl_seed {cl_seed}; finish or remove them"
        )
    columns = [claim.quantity, "p_pt_margin", "p_cl_margin"]
    a, b = (
        side.groupby(["learning_rate", "seed"])[columns].agg(_mean_or_nan)
        for side in (value, reference)
    )
    paired = pd.DataFrame({"claim": claim.id, "value": a[claim.quantity]}, index=a.index)
    paired["reference"] = b[claim.quantity]
    paired["difference"] = paired["value"] - paired["reference"]
    for margin in ("p_pt_margin", "p_cl_margin"):
        paired[margin] = np.minimum(a[margin], b[margin])
    order = ["claim", "learning_rate", "seed", "value", "reference", "difference"]
    return paired.reset_index()[[*order, "p_pt_margin", "p_cl_margin"]]

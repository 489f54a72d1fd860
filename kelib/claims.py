"""The verdict rule: what counts as reproduced, contradicted or absent, fixed before the seeds run.

The unit is the pretraining seed. ``claims.yaml`` holds the claims, ``claim_differences`` turns the
measurement tables into one difference per claim, CL rate and seed, and ``verdicts`` judges them:
two-sided t over seeds, Holm over the primary claims of a rate, and a smallest effect of interest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from numpy.typing import ArrayLike
from scipy import stats

from kelib import metrics
from kelib.errors import KelibError, listing

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
LEAST_SEEDS = 5
ROUNDING = 1e-12  # 0.30 - 0.25 is a hair below 0.05 in floating point, and must not fail "at least"
NOT_TESTABLE, NOT_RUN = "not testable here", "not run"


@dataclass(frozen=True)
class Conditions:
    """When a claim can be tested; margins are fractions above chance, None where irrelevant.

    The fall of the entropy matters to every claim, as all are about its consequences. The margins
    matter to claims about accuracy only: probes have no floor that K could hit.
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


@dataclass(frozen=True)
class Verdict:
    """The judgement of one claim at one CL rate; effects in its unit, NaN where undefined."""

    n: int
    mean: float
    low95: float
    high95: float
    low90: float
    high90: float
    p: float
    p_holm: float
    verdict: str
    reason: str


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
        raise KelibError(f"{where} is {given!r}, keys with values are needed")
    valid = {field.name: field.default is MISSING for field in fields(kind)}
    if unknown := set(given) - set(valid):
        raise KelibError(f"{where} has unknown keys: {listing(unknown)}; valid: {listing(valid)}")
    if missing := {key for key, needed in valid.items() if needed} - set(given):
        raise KelibError(f"{where} lacks the keys: {listing(missing)}; add them")
    return given


def _positive(value: object, key: str, where: str) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < float("inf"):  # type: ignore[operator]
        raise KelibError(
            f"{where}: {key} is {value!r}, a number above 0 is needed (write 1.0e-4, not 1e-4)"
        )


def _claim(given: object, position: int) -> Claim:
    where = f"claim {given.get('id', position) if isinstance(given, dict) else position}"
    raw = dict(_keys(given, Claim, where))
    conditions = Conditions(**_keys(raw["conditions"], Conditions, f"conditions of {where}"))
    claim = Claim(**{**raw, "conditions": conditions})
    for key in ("id", "statement", "figure", "quantity", "contrast", "unit", "paper_value"):
        if not isinstance(raw[key], str) or not raw[key].strip():
            raise KelibError(f"{where}: {key} is {raw[key]!r}, text is needed (put it in quotes)")
    for key, valid in {
        "quantity": QUANTITIES,
        "contrast": (STAGES, RESUSCITATION),
        "unit": UNITS,
    }.items():
        if raw[key] not in valid:
            raise KelibError(f"{where}: {key} is {raw[key]!r}; valid: {listing(valid)}")
    if type(claim.direction) is not int or claim.direction not in (-1, 1):
        raise KelibError(f"{where}: direction is {claim.direction!r}; valid: -1, 1")
    if type(claim.primary) is not bool:
        raise KelibError(f"{where}: primary is {claim.primary!r}; valid: true, false")
    if claim.primary or claim.smallest_effect is not None:
        _positive(claim.smallest_effect, "smallest_effect", where)
    if claim.quantity.endswith("_modified") and claim.contrast == STAGES:
        raise KelibError(f"{where}: {claim.quantity} needs the contrast {RESUSCITATION!r}")
    if conditions.entropy_falls is not True:
        raise KelibError(
            f"{where}: entropy_falls is {conditions.entropy_falls!r}, every claim needs true"
        )
    for key in ("p_pt_margin", "p_cl_margin"):
        if getattr(conditions, key) is not None or QUANTITIES[claim.quantity]:
            _positive(getattr(conditions, key), key, f"conditions of {where}")
    return claim


def load_claims(path: str | Path) -> tuple[Claim, ...]:
    """Read and validate ``claims.yaml``; raises KelibError that names the claim and the key."""
    try:
        content = yaml.safe_load(_text(path))
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise KelibError(f"{path} is not valid YAML ({problem}): repair it") from None
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
                f"claim {claim.id}: beside is {claim.beside!r}; an exploratory claim names a "
                f"primary one ({listing(primary)}), a primary claim names none"
            )
    return claims


def holm(p_values: Sequence[float], family: int | None = None) -> np.ndarray:
    """Holm's step-down adjusted p-values, in the order given.

    ``family`` is the number of claims planned, when some of them have no p-value here: these count
    as p = 1, so what could not be tested never makes the rest look better.
    """
    p = np.asarray(p_values, dtype=float)
    family = len(p) if family is None else family
    if not ((p >= 0) & (p <= 1)).all() or family < len(p):
        raise KelibError(f"{len(p)} p-values in a family of {family}: give each between 0 and 1")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate((family - np.arange(len(p))) * p[order])
    return np.minimum(adjusted, 1.0)


def p_value(differences: ArrayLike) -> float:
    """Two-sided p of a zero mean, Student's t over at least two seeds.

    Without any spread it is 0, or 1 when all differences are 0.
    """
    interval, error = (metrics.mean_interval(differences), metrics.standard_error(differences))
    if interval.n < 2:
        raise KelibError("1 difference has no spread to test against: run at least 2 seeds")
    if error == 0:
        return float(interval.mean == 0)
    return float(2 * stats.t.sf(abs(interval.mean) / error, interval.n - 1))


def _sign(value: float) -> str:
    return "+" if value > 0 else "-" if value < 0 else "0"


def verdict(
    differences: ArrayLike,
    claim: Claim,
    alpha: float = 0.05,
    p_holm: float | None = None,
    untestable: str = "",
) -> Verdict:
    """Judge one claim from one difference per pretraining seed (CL seeds already averaged).

    In this order: *not testable here* (``untestable`` says why), *exploratory* (not primary),
    *indicative* (fewer than 5 seeds), *reproduced* or *contradicted* (adjusted p < alpha and
    |mean| at least the smallest effect, with or against the paper's sign), *absent* (the 1 - 2
    alpha interval lies inside plus and minus that effect), else *undecided*. The p-values stand
    only where a test was made. Without ``p_holm`` the claim is a family of one.
    """
    values = np.asarray(differences, dtype=float)
    nothing = float("nan")
    if untestable and not np.isfinite(values).all():
        bounds = (nothing,) * 5
        return Verdict(len(values), *bounds, nothing, nothing, NOT_TESTABLE, untestable)
    wide, narrow = (metrics.mean_interval(values, 0.95), metrics.mean_interval(values, 0.90))
    n, mean = wide.n, wide.mean
    p = nothing
    if untestable:
        label, reason = NOT_TESTABLE, untestable
    elif not claim.primary:
        label, reason = f"exploratory: {_sign(mean)}", "not a primary claim, no test"
    elif n < LEAST_SEEDS:
        label = f"indicative: {_sign(mean)}"
        reason = f"{n} of at least {LEAST_SEEDS} seeds; the paper's direction is "
        reason += _sign(claim.direction)
    else:
        p = p_value(values)
        label, reason = _decide(values, claim, alpha, p if p_holm is None else p_holm)
    adjusted = p if p_holm is None or np.isnan(p) else p_holm
    return Verdict(
        n, mean, wide.low, wide.high, narrow.low, narrow.high, p, adjusted, label, reason
    )


def _decide(values: np.ndarray, claim: Claim, alpha: float, p: float) -> tuple[str, str]:
    effect = float(claim.smallest_effect or 0)
    interval = metrics.mean_interval(values, 1 - 2 * alpha)
    significant, large = p < alpha, abs(interval.mean) >= effect - ROUNDING
    holm_text = f"adjusted p {'<' if significant else '>='} {alpha:g}"
    size_text = f"|mean| {'at least' if large else 'below'} {effect:g} {claim.unit}"
    if significant and large:
        same = np.sign(interval.mean) == claim.direction
        label, side = ("reproduced", "the") if same else ("contradicted", "against the")
        return label, f"{holm_text}, {size_text}, {side} paper's direction"
    level = f"{100 * (1 - 2 * alpha):g} % interval"
    if -effect + ROUNDING < interval.low and interval.high < effect - ROUNDING:
        return "absent", f"the {level} lies inside +/- {effect:g} {claim.unit}"
    return ("undecided", f"{holm_text}, {size_text}, the {level} reaches beyond +/- {effect:g}")


def _obstacle(rows: pd.DataFrame, claim: Claim, entropy_change: pd.Series) -> str:
    """Why the claim cannot be tested, empty if it can; every seed and both sides must pass."""
    changes = entropy_change.reindex(rows["seed"])
    if changes.isna().any():
        raise KelibError(
            f"no entropy change for seed {listing(changes.index[changes.isna()])}: measure the "
            "entropy of its first and last stage"
        )
    reasons = []
    if (rising := changes[changes >= 0]).size:
        reasons.append(f"entropy does not fall in seed {listing(rising.index)}")
    for column, label in (("p_pt_margin", "P_PT"), ("p_cl_margin", "P_CL")):
        needed = getattr(claim.conditions, column)
        low = rows[rows[column] < needed - ROUNDING] if needed is not None else rows[:0]
        if len(low):
            reasons.append(
                f"{label} - chance is below {needed:g} in {len(low)} of {len(rows)} seeds "
                f"(lowest {low[column].min():.3f})"
            )
    undefined = rows.loc[rows["difference"].isna(), "seed"]
    if len(undefined):
        if not claim.quantity.startswith(("acquisition", "forgetting")):
            raise KelibError(f"column difference of claim {claim.id} has NaN: repair those rows")
        reasons.append(f"{claim.quantity} divides by 0 in seed {listing(undefined)}")
    return "; ".join(reasons)


def verdicts(
    differences: pd.DataFrame,
    conditions: pd.DataFrame,
    claims: Sequence[Claim],
    *,
    tokens_per_parameter: float,
    alpha: float = 0.05,
) -> pd.DataFrame:
    """The claims table: one row per claim and CL rate, Holm over the primary claims of a rate.

    ``differences`` comes from ``claim_differences``; ``conditions`` has ``seed`` and
    ``entropy_change`` (last minus first stage, nats; ``entropy_change`` makes it). The Holm family
    is all primary claims, also those without a test at that rate. A claim without runs at a rate
    keeps its row ("not run"). ``paper_measure`` puts the paper's A or F beside the primary claims.
    """
    given = ["learning_rate", "p_pt_margin", "p_cl_margin"]
    metrics.check_table(differences, given, ["claim", "seed"], "differences")
    metrics.check_table(conditions, ["entropy_change"], ["seed"], "conditions")
    refuse_duplicates(differences, ["claim", "learning_rate", "seed"], "differences")
    refuse_duplicates(conditions, ["seed"], "conditions")
    if unknown := set(differences["claim"]) - {claim.id for claim in claims}:
        raise KelibError(
            f"unknown claims {listing(unknown)}; valid: {listing(c.id for c in claims)}"
        )
    if differences.empty:
        raise KelibError("the differences table has 0 rows, nothing can be judged: run stage 3")
    change = conditions.set_index("seed")["entropy_change"]
    family = sum(claim.primary for claim in claims)
    table = []
    for rate, at_rate in differences.groupby("learning_rate"):
        rows = {name: part for name, part in at_rate.groupby("claim")}
        blocked = {c.id: _obstacle(rows[c.id], c, change) for c in claims if c.id in rows}
        tested = {
            c.id: p_value(rows[c.id]["difference"].to_numpy(float))
            for c in claims
            if c.primary and not blocked.get(c.id, "") and len(rows.get(c.id, ())) >= LEAST_SEEDS
        }
        adjusted = dict(zip(tested, holm(list(tested.values()), family), strict=True))
        judged = {}
        for c in claims:
            if c.id in rows:
                values = rows[c.id]["difference"].to_numpy(float)
                judged[c.id] = verdict(values, c, alpha, adjusted.get(c.id), blocked[c.id])
            else:
                judged[c.id] = Verdict(0, *(float("nan"),) * 7, NOT_RUN, "no runs at this CL rate")
        table += [
            {
                "claim": c.id,
                "statement": c.statement,
                "figure": c.figure,
                "learning_rate": rate,
                **asdict(judged[c.id]),
                "smallest_effect": np.nan if c.smallest_effect is None else c.smallest_effect,
                "unit": c.unit,
                "direction": c.direction,
                "primary": c.primary,
                "paper_value": c.paper_value,
                "paper_measure": _paper_measure(c, claims, judged),
                "tokens_per_parameter": tokens_per_parameter,
            }
            for c in claims
        ]
    return pd.DataFrame(table)


def _paper_measure(claim: Claim, claims: Sequence[Claim], judged: dict[str, Verdict]) -> str:
    """The exploratory measures beside a primary claim, as text for the table's second column."""
    texts = []
    for other in claims:
        if other.beside == claim.id and np.isfinite(judged[other.id].mean):
            found = judged[other.id]
            bounds = f"[{found.low95:+.3f}, {found.high95:+.3f}]" if found.n > 1 else "(n = 1)"
            texts.append(f"{other.quantity} {found.mean:+.3f} {bounds}")
    return "; ".join(texts)


def across_rates(table: pd.DataFrame) -> pd.DataFrame:
    """Each claim over all CL rates of a claims table: what holds at one rate only is called that.

    Returns ``claim``, ``statement``, ``rates`` (how many were judged), ``reproduced_at`` (at how
    many of them) and ``summary``. A rate at which a claim was not run or not testable counts as a
    rate at which it does not hold.
    """
    metrics.check_table(table, ["learning_rate"], ["claim", "statement", "verdict"], "claims")
    refuse_duplicates(table, ["claim", "learning_rate"], "claims")
    rates = table["learning_rate"].nunique()
    rows = []
    for claim, part in table.groupby("claim", sort=False):
        texts = []
        for label, same in part.groupby("verdict", sort=False):
            at = ", ".join(f"{rate:g}" for rate in sorted(same["learning_rate"]))
            if len(same) == 1:
                alone = "; no other rate was run" if rates == 1 else ""
                texts.append(f"{label} at that rate only ({at}{alone})")
            elif len(same) == rates:
                texts.append(f"{label} at every CL rate ({at})")
            else:
                texts.append(f"{label} at {len(same)} of {rates} CL rates ({at})")
        rows.append(
            {
                "claim": claim,
                "statement": part["statement"].iloc[0],
                "rates": rates,
                "reproduced_at": int((part["verdict"] == "reproduced").sum()),
                "summary": "; ".join(texts),
            }
        )
    return pd.DataFrame(rows)


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
    measured = entropy.set_index(["seed", "step"])["entropy_nats"].to_dict()
    rows = []
    for seed, steps in continual.groupby("seed")["stage_step"]:
        first, last = (seed, steps.min()), (seed, steps.max())
        for key in (first, last):
            if key not in measured:
                raise KelibError(
                    f"no entropy of seed {seed} at step {key[1]}; measured steps: "
                    f"{listing(step for s, step in measured if s == seed)}: run stage 2 for it"
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
    tables = []
    for claim in claims:
        if claim.contrast in sides:
            tables.append(_difference(claim, *sides[claim.contrast]))
    if not tables:
        raise KelibError("no claim has runs to compare: pass claims, and the interventions table")
    return pd.concat(tables, ignore_index=True)


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
    # a ratio that is undefined in one CL run is undefined for the seed, not averaged away
    a, b = (
        side.groupby(["learning_rate", "seed"])[columns].agg(lambda x: x.mean(skipna=False))
        for side in (value, reference)
    )
    paired = pd.DataFrame({"claim": claim.id, "value": a[claim.quantity]}, index=a.index)
    paired["reference"] = b[claim.quantity]
    paired["difference"] = paired["value"] - paired["reference"]
    for margin in ("p_pt_margin", "p_cl_margin"):
        paired[margin] = np.minimum(a[margin], b[margin])
    order = ["claim", "learning_rate", "seed", "value", "reference", "difference"]
    return paired.reset_index()[[*order, "p_pt_margin", "p_cl_margin"]]

"""The verdict rule: what counts as reproduced, contradicted or absent, fixed before the seeds run.

The unit is the pretraining seed. ``verdicts`` judges the differences of ``kelib.claims``, one per
claim, CL rate and seed: two-sided t over seeds, Holm over the primary claims of a rate, and a
smallest effect of interest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import special

from kelib import metrics
from kelib.claims import Claim, refuse_duplicates
from kelib.errors import KelibError, listing

LEAST_SEEDS = 5
ROUNDING = 1e-12  # 0.30 - 0.25 is a hair below 0.05 in floating point, and must not fail "at least"
ALPHA = 0.05
NOT_TESTABLE, NOT_RUN, EXPLORATORY = "not testable here", "not run", "exploratory"


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
    interval, error = metrics.mean_interval(differences), metrics.standard_error(differences)
    if interval.n < 2:
        raise KelibError("1 difference has no spread to test against: run at least 2 seeds")
    if error == 0:
        return float(interval.mean == 0)
    return float(2 * special.stdtr(interval.n - 1, -abs(interval.mean) / error))


def _beside_paper(mean: float, claim: Claim) -> str:
    """The observed direction in words; a difference too small to matter has none."""
    if claim.smallest_effect is not None and abs(mean) < claim.smallest_effect:
        return "below the smallest effect"
    return "as the paper" if mean * claim.direction > 0 else "opposite"


def verdict(
    differences: ArrayLike,
    claim: Claim,
    p_holm: float | None = None,
    untestable: str = "",
) -> Verdict:
    """Judge one claim from one difference per pretraining seed (CL seeds already averaged).

    In this order: *not testable here* (``untestable`` says why), *exploratory* (not primary),
    *indicative* (fewer than 5 seeds), *reproduced* or *contradicted* (adjusted p < 0.05 and
    |mean| at least the smallest effect, with or against the paper's sign), *absent* (the 90 %
    interval lies inside plus and minus that effect), else *undecided*. The p-values stand
    only where a test was made. Without ``p_holm`` the claim is a family of one.
    """
    values = np.asarray(differences, dtype=float)
    nothing = float("nan")
    if untestable and not np.isfinite(values).all():
        bounds = (nothing,) * 5
        return Verdict(len(values), *bounds, nothing, nothing, NOT_TESTABLE, untestable)
    wide, narrow = metrics.mean_interval(values, 0.95), metrics.mean_interval(values, 0.90)
    n, mean = wide.n, wide.mean
    p = nothing
    if untestable:
        label, reason = NOT_TESTABLE, untestable
    elif not claim.primary:
        label, reason = EXPLORATORY, "not a primary claim, no test"
    elif n < LEAST_SEEDS:
        label = f"indicative: {_beside_paper(mean, claim)}"
        reason = f"{n} of at least {LEAST_SEEDS} seeds"
    else:
        p = p_value(values)
        label, reason = _decide(values, claim, p if p_holm is None else p_holm)
    adjusted = p if p_holm is None or np.isnan(p) else p_holm
    return Verdict(
        n, mean, wide.low, wide.high, narrow.low, narrow.high, p, adjusted, label, reason
    )


def _decide(values: np.ndarray, claim: Claim, p: float) -> tuple[str, str]:
    effect = float(claim.smallest_effect or 0)
    interval = metrics.mean_interval(values, 1 - 2 * ALPHA)
    significant, large = p < ALPHA, abs(interval.mean) >= effect - ROUNDING
    holm_text = f"adjusted p {'<' if significant else '>='} {ALPHA:g}"
    size_text = f"|mean| {'at least' if large else 'below'} {effect:g} {claim.unit}"
    if significant and large:
        same = np.sign(interval.mean) == claim.direction
        label, side = ("reproduced", "the") if same else ("contradicted", "against the")
        return label, f"{holm_text}, {size_text}, {side} paper's direction"
    level = f"{100 * (1 - 2 * ALPHA):g} % interval"
    if -effect + ROUNDING < interval.low and interval.high < effect - ROUNDING:
        return "absent", f"the {level} lies inside +/- {effect:g} {claim.unit}"
    return "undecided", f"{holm_text}, {size_text}, the {level} reaches beyond +/- {effect:g}"


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
                judged[c.id] = verdict(values, c, adjusted.get(c.id), blocked[c.id])
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

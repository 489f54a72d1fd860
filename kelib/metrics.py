"""K, A, F and their intervals: pure functions on arrays and tidy tables, without torch.

Units: K is in nats per target token (negative), accuracies and chance are fractions (0 to 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import special  # scipy.stats would take every worker half a second to import

from kelib.errors import KelibError, listing

ENTRY_SETS = ("once", "paraphrase")


@dataclass(frozen=True)
class Interval:
    """An estimate over ``n`` units with its confidence bounds, in the unit of the values."""

    n: int
    mean: float
    low: float
    high: float


def check_table(
    table: pd.DataFrame, numeric: Sequence[str], other: Sequence[str], name: str
) -> None:
    """Refuse a table that lacks a column, or holds a missing or infinite value in a needed one.

    ``name`` is how the message calls the table. Raises KelibError, which names the column.
    """
    missing = [column for column in (*numeric, *other) if column not in table.columns]
    if missing:
        raise KelibError(
            f"the {name} table lacks {listing(missing)}; it has {listing(table.columns)}: "
            "add or rename the columns"
        )
    for column in (*numeric, *other):
        values = table[column]
        if column in numeric and not pd.api.types.is_numeric_dtype(values):
            raise KelibError(
                f"column {column} of the {name} table has type {values.dtype}, numbers are needed: "
                "convert it before this call"
            )
        finite = (
            np.isfinite(values.to_numpy(float, na_value=np.nan))
            if column in numeric
            else values.notna()
        )
        if not finite.all():
            raise KelibError(
                f"column {column} of the {name} table has NaN or infinity in "
                f"{int((~finite).sum())} of {len(table)} rows: repair or remove those rows"
            )


def _per_entry(probes: pd.DataFrame, per: str, by: Sequence[str]) -> pd.Series:
    """Mean over the probes of each entry of the log-probability divided by ``per``."""
    check_table(probes, ["log_probability", per], ["entry", "entry_set", *by], "probe")
    if probes.empty:
        raise KelibError("the probe table has 0 rows, K needs at least one: score the probes first")
    unknown = set(probes["entry_set"]) - set(ENTRY_SETS)
    if unknown:
        raise KelibError(f"entry_set {listing(unknown)} is unknown: use {listing(ENTRY_SETS)}")
    if (probes[per] <= 0).any():
        raise KelibError(
            f"column {per} of the probe table has {probes[per].min():g}, a length must be above 0: "
            "remove probes with an empty target"
        )
    if (probes["log_probability"] > 1e-6).any():
        raise KelibError(
            f"log_probability reaches {probes['log_probability'].max():g}, but a sum of "
            "log-probabilities is at most 0: pass log-probabilities in nats, not losses"
        )
    keys = list(dict.fromkeys([*by, "entry_set", "entry"]))
    scores = probes["log_probability"] / probes[per]
    return scores.groupby([probes[key] for key in keys], observed=True).mean()


def _over_sets(entries: pd.Series) -> float:
    sets = entries.groupby(level="entry_set", observed=True)
    return float(np.average(sets.mean(), weights=sets.size()))


def knowledge_score(probes: pd.DataFrame, per: str = "tokens") -> float:
    """Probe performance K (Eq. 4), in nats per target token, at most 0.

    A mean over the probes of an entry, over the entries of each set, and over the two sets
    weighted by their number of entries. ``probes`` has one row per probe: ``entry``, ``entry_set``
    (once or paraphrase; entries are counted inside their set), ``log_probability`` (nats, summed
    over the target) and ``tokens`` (length of the target).

    The authors' release divides by the padded length of the batch instead: name the column that
    holds that length in ``per`` to compare. Raises KelibError for missing columns, NaN, lengths
    below 1, positive log-probabilities, and when one of the two sets is absent.
    """
    entries = _per_entry(probes, per, [])
    absent = set(ENTRY_SETS) - set(entries.index.get_level_values("entry_set"))
    if absent:
        raise KelibError(
            f"the probe table has no entries of the set {listing(absent)}, K needs both: "
            "score it too, or use knowledge_by(probes, ['entry_set'])"
        )
    return _over_sets(entries)


def knowledge_by(probes: pd.DataFrame, by: Sequence[str], per: str = "tokens") -> pd.DataFrame:
    """K (Eq. 4) inside each group, for example ``["entry_set"]`` or ``["entry_set", "level"]``.

    Returns one row per group: the columns ``by``, ``knowledge`` (nats per target token, the same
    nested mean as ``knowledge_score``) and ``entries`` (how many entries the group has).
    """
    if isinstance(by, str) or not by:
        raise KelibError(f"by is {by!r}, a list of columns is needed: write ['entry_set']")
    entries = _per_entry(probes, per, by)
    rows = []
    for group, members in entries.groupby(level=list(by), observed=True):
        values = group if isinstance(group, tuple) else (group,)
        row = dict(zip(by, values, strict=True))
        rows.append({**row, "knowledge": _over_sets(members), "entries": len(members)})
    return pd.DataFrame(rows)


def _ratio(change: ArrayLike, reference: ArrayLike, defined: ArrayLike, why: str) -> Any:
    """``change / reference`` where ``defined``; else NaN in an array, an error for a number."""
    change, reference, defined = np.broadcast_arrays(change, reference, defined)
    if change.ndim == 0 and not defined:
        raise KelibError(why)
    result = np.full(change.shape, np.nan)
    np.divide(change, reference, out=result, where=defined)
    return float(result) if result.ndim == 0 else result


def _finite(name: str, values: ArrayLike, fraction: bool = False) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    if not np.isfinite(array).all():
        raise KelibError(f"{name} holds NaN or infinity: repair or remove those values")
    if fraction and ((array < 0) | (array > 1)).any():
        raise KelibError(
            f"{name} spans {array.min():g} to {array.max():g}, an accuracy lies between 0 and 1: "
            "pass fractions, not percent"
        )
    return array


def acquisition(k_before: ArrayLike, k_after: ArrayLike) -> Any:
    """Acquisition A = (K_CL - K_PT) / |K_PT|, positive when the probes got likelier.

    Numbers or arrays that broadcast, in nats; a fraction comes back (0.25 is 25 %). After an
    intervention "PT" may be the original or the modified model: the caller chooses and says which.
    Undefined at K_PT = 0: KelibError for a number, NaN at that place of an array.
    """
    before, after = _finite("k_before", k_before), _finite("k_after", k_after)
    why = "k_before is 0, acquisition divides by it: compare k_after - k_before in nats instead"
    return _ratio(after - before, np.abs(before), before != 0, why)


def forgetting(p_before: ArrayLike, p_after: ArrayLike) -> Any:
    """Forgetting F = (P_PT - P_CL) / P_PT of mean task accuracies, positive when accuracy was lost.

    Numbers or arrays of fractions. Undefined at P_PT = 0: KelibError for a number, NaN in an array.
    F saturates when P_CL nears chance, see ``forgetting_over_chance``.
    """
    before, after = (_finite("p_before", p_before, True), _finite("p_after", p_after, True))
    why = "p_before is 0, there is nothing to forget: check the tasks, or compare p_after directly"
    return _ratio(before - after, before, before > 0, why)


def forgetting_over_chance(p_before: ArrayLike, p_after: ArrayLike, chance: ArrayLike) -> Any:
    """(P_PT - P_CL) / (P_PT - chance): the lost share of what was above chance; not in the paper.

    0 is nothing lost, 1 is back at chance, above 1 is below chance. Without a margin above chance
    (p_before <= chance) there was nothing to lose and the share has no meaning: KelibError for a
    number, NaN at that place of an array.
    """
    before, after = (_finite("p_before", p_before, True), _finite("p_after", p_after, True))
    level = _finite("chance", chance, True)
    why = (
        f"p_before is {before}, not above chance ({level}): the share of it that was forgotten is "
        "undefined; use tasks that the model has learnt"
    )
    return _ratio(before - after, before - level, before > level, why)


def with_gain(runs: pd.DataFrame) -> pd.DataFrame:
    """``runs`` with k_gain = K_CL - K_PT (nats per target token), which A divides by abs(K_PT)."""
    return runs.assign(k_gain=runs["k_cl"] - runs["k_pt"])


def _sample(values: ArrayLike, name: str = "values") -> np.ndarray:
    array = _finite(name, values)
    if array.ndim != 1 or array.size == 0:
        raise KelibError(
            f"{name} has shape {array.shape}, a list of at least one number is needed: "
            "average inside a seed first"
        )
    return array


def _confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise KelibError(f"confidence is {confidence}, it must lie between 0 and 1: 0.95 is usual")


def mean_interval(values: ArrayLike, confidence: float = 0.95) -> Interval:
    """Mean over independent units (seeds) with Student's t interval, n - 1 degrees of freedom.

    ``values`` is one-dimensional, one number per unit. With n = 1 the bounds are NaN; without any
    spread they equal the mean. Raises KelibError for NaN, no values, or an impossible confidence.
    """
    sample = _sample(values)
    _confidence(confidence)
    # equal values: their rounded mean may differ from them in the last digit
    mean = float(sample[0]) if np.ptp(sample) == 0 else float(sample.mean())
    if sample.size == 1:
        return Interval(1, mean, np.nan, np.nan)
    half = special.stdtrit(sample.size - 1, (1 + confidence) / 2) * standard_error(sample)
    return Interval(sample.size, mean, mean - float(half), mean + float(half))


def standard_error(values: ArrayLike) -> float:
    """Standard error of the mean (n - 1 in the variance), exactly 0 for equal values."""
    sample = _sample(values)
    if sample.size < 2:
        return float("nan")
    return 0.0 if np.ptp(sample) == 0 else float(sample.std(ddof=1) / np.sqrt(sample.size))


def bootstrap_interval(
    values: ArrayLike,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    statistic: Callable[..., np.ndarray] = np.mean,
) -> Interval:
    """Percentile bootstrap over items (probes, questions, documents) of one model.

    ``statistic`` takes ``axis``. The same values give the same bounds in any order, as they are
    sorted before resampling with a fixed ``seed``. Items of one model are not seeds: this says how
    well that model was measured, and is too narrow over a handful of seeds (``mean_interval``).
    """
    sample = np.sort(_sample(values))
    _confidence(confidence)
    if resamples < 100:
        raise KelibError(f"resamples is {resamples}, at least 100 are needed: 2000 is usual")
    estimate = float(statistic(sample, axis=0))
    if sample.size == 1:
        return Interval(1, estimate, np.nan, np.nan)
    generator = np.random.default_rng(seed)
    chunk = max(1, 1_000_000 // sample.size)  # bounds the memory of the index array
    draws = []
    for start in range(0, resamples, chunk):
        shape = (min(chunk, resamples - start), sample.size)
        draws.append(statistic(sample[generator.integers(sample.size, size=shape)], axis=1))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(draws), [tail, 1 - tail])
    return Interval(sample.size, estimate, float(low), float(high))


def correlations(table: pd.DataFrame, x: Sequence[str], y: Sequence[str]) -> pd.DataFrame:
    """Pearson and Spearman correlation of every column of ``x`` with every one of ``y``.

    Returns ``x``, ``y``, ``n``, ``pearson``, ``spearman``; NaN for a constant column or n < 3.
    Descriptive only and without p-values: the stages of one run are no independent sample.
    """
    check_table(table, [*x, *y], [], "correlation")
    rows = []
    for first in x:
        for second in y:
            a, b = table[first].to_numpy(float), table[second].to_numpy(float)
            pearson, spearman = (_pearson(a, b), _pearson(_ranks(a), _ranks(b)))
            rows.append((first, second, len(a), pearson, spearman))
    return pd.DataFrame(rows, columns=["x", "y", "n", "pearson", "spearman"])


def _ranks(values: np.ndarray) -> np.ndarray:
    """From 1; equal values share the mean of their ranks."""
    return pd.Series(values).rank().to_numpy()


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])

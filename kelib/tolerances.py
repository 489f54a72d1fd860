"""One quantity in two runs of the same profile: the same, within what seeds and machines do, or
off.

The same seeds give the same bytes on one kind of processor and other numbers on another, since
training is chaotic: rounding grows until a machine is about as good as another seed, at worst. So
the scale of a difference is what two seeds differ by,

    tau = sqrt(2) s,    s: standard deviation over pretraining seeds of the reference,

cell by cell (a cell: all keys of a row but the seed), where s is no less than its median over
cells, as one of five seeds is uncertain by a factor. z = difference / tau. A quantity is off if

* its spread, the root mean square of z, is above 5;
* its largest |z| is above 15;
* the mean of z over all rows is beyond 3;
* or it is shifted in all seeds: the mean of z over cells, or z of one cell, is beyond 0.25 and its
  t over seeds has p below 2e-5 (over all cells). This finds shifts far below what seeds differ by,
  wherever the machines differ by less.

Counted things, such as the answers of a task, are rounded: neither tau nor the variance of their
differences is less than that of the rounding, the smallest gap squared over 6.

Where the difference between machines was measured (:mod:`kelib.variation`), the first two limits
are what that measurement makes of them, and no wider: sqrt(F) times the spread that was found, F
the quantile of Fisher's distribution at 2e-5 for as many seeds as are compared now and then, and as
many times its largest |z|; but no less than 1 and 3.

False alarms: with the 500 quantities of `study`, 0.01 by shifts of all seeds. Were another machine
as good as another seed and s known, the other limits would give none; with s from five seeds as
well, one comparison of a whole study in eleven has an alarm, and one in seventy where machines
differ by 0.6 of what seeds do (200 draws of each, with the covariances of `study`). Between two
kinds of processors the spread of z was 0.1 to 0.3 for losses and entropies and 0.2 to 1.1 for K, P
and what is made of them (the trunk of `regimes`, and `families`, beside `study`), the largest |z|
3.7.

What is caught, in a copy of `study` otherwise the same: a shift of every seed by 0.38 s, in each of
504 quantities (counted numbers that stay whole: by a few questions in every cell). Between those
processors: 0.4 to 0.5 s along pretraining; after continual learning 1 to 4 s in losses, entropies
and what few questions decide, up to 5 s in the rest.

With fewer than three seeds there is no s of their own: then it is that of a reference with the same
model and protocol, or 1 % of the quantity, which is for models that are measured and not trained.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import special

SPREAD, LARGEST, MEAN = 5.0, 15.0, 3.0  # of z
LEAST_SPREAD, LEAST_LARGEST = 1.0, 3.0  # that a measured variation can make of them
LEAST_SHIFT = 0.25  # of z
LEVEL = 2e-5  # p of a quantity
RELATIVE = 0.01  # of the quantity's root mean square, where nothing tells what seeds differ by
LEAST_SEEDS = 3
SAME, WITHIN, OFF = "same", "within", "OFF"
# what bounds a difference
SEEDS, MACHINES, LIKE, OF_VALUE, EQUAL = "seeds", "machines", "other seeds", "1 %", "equality"


@dataclass(frozen=True)
class Measured:
    """What another machine made of a quantity: spread and largest of z, over ``seeds`` in all."""

    spread: float
    largest: float
    seeds: int


def standard_deviations(values: np.ndarray) -> np.ndarray:
    """Over seeds (second axis), by cell, no less than their median; NaN without three seeds, 0
    where no cell varies.
    """
    values = np.where(np.isfinite(values), values, np.nan)
    enough = (~np.isnan(values)).sum(axis=1) >= LEAST_SEEDS
    if not enough.any():
        return np.full(len(values), np.nan)
    found = np.full(len(values), np.nan)
    found[enough] = np.nanstd(values[enough], axis=1, ddof=1)
    varying = found[found > 0]
    return np.fmax(found, np.median(varying) if len(varying) else 0.0)


def _rounding(*sides: np.ndarray) -> float:
    """Variance of the difference of two counted numbers, whose values are all multiples of one gap
    apart: gap squared over 6; 0 for others.
    """
    values = np.unique(np.concatenate([side[np.isfinite(side)] for side in sides]))
    gaps = np.diff(values)
    gaps = gaps[gaps > 1e-9 * np.abs(values).max(initial=0)]  # less is how a float was written
    if len(gaps) < 2:
        return 0.0
    steps = (values - values[0]) / gaps.min()
    counted = np.abs(steps - np.round(steps)).max() < 1e-4
    return float(gaps.min()) ** 2 / 6 if counted else 0.0


def _scales(reference: np.ndarray, like: float | None) -> tuple[np.ndarray, str]:
    """tau by cell, and where it is from."""
    found = standard_deviations(reference)
    if (found > 0).any():
        return np.sqrt(2) * found, SEEDS
    if like and np.isnan(found).any():
        return np.full(len(reference), np.sqrt(2) * like), LIKE
    known = reference[np.isfinite(reference)]
    size = RELATIVE * rms(known) if len(known) else 0.0
    return np.full(len(reference), size), OF_VALUE


def rms(values: np.ndarray) -> float:
    """Root mean square, 0 of nothing."""
    return float(np.sqrt(np.mean(np.square(values)))) if values.size else 0.0


def _limits(measured: Measured | None, seeds: int) -> tuple[float, float, str]:
    if measured is None:
        return SPREAD, LARGEST, SEEDS
    factor = float(np.sqrt(special.fdtri(seeds, measured.seeds, 1 - LEVEL)))
    spread = float(np.clip(factor * measured.spread, LEAST_SPREAD, SPREAD))
    largest = float(np.clip(factor * measured.largest, LEAST_LARGEST, LARGEST))
    return spread, largest, MACHINES


def _shift(z: np.ndarray, rounding: np.ndarray) -> tuple[float, str]:
    """Mean of z, and a text if it, or z of a cell, is shifted in all seeds. ``rounding`` is the
    variance by cell that rounding alone gives.
    """
    cells, seeds = z.shape
    mean = float(np.nanmean(z))
    if abs(mean) > MEAN:
        return mean, f"shifted on average by {mean:+.2f}, at most {MEAN:g}"
    if seeds < LEAST_SEEDS:
        return mean, ""
    whole = np.isfinite(z).all(axis=1)
    by_cell, rounding = z[whole], rounding[whole]
    if not len(by_cell):
        return mean, ""
    pooled = by_cell.mean(axis=0, keepdims=True)
    for part, least in ((pooled, rounding.mean(keepdims=True) / len(by_cell)), (by_cell, rounding)):
        variance = part.var(axis=1, ddof=1) + least
        centre = part.mean(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            t = np.abs(centre) / np.sqrt(variance / seeds)
        p = 2 * special.stdtr(seeds - 1, -t)
        beyond = (np.abs(centre) > LEAST_SHIFT) & (p < LEVEL / 2 / len(part))
        if beyond.any():
            worst = int(np.argmax(np.where(beyond, np.abs(centre), 0)))
            of = "" if part is pooled else f" in {int(beyond.sum())} of {cells} cells"
            return mean, f"shifted in all seeds by {centre[worst]:+.2f}{of} (p {p[worst]:.0e})"
    return mean, ""


def judge(
    reference: np.ndarray,
    fresh: np.ndarray,
    *,
    like: float | None = None,
    measured: Measured | None = None,
    ratio: bool = False,
) -> tuple[dict, np.ndarray]:
    """Compare one quantity, cells x seeds on both sides; see the module for the rule.

    ``like`` is s of other seeds, for where there are too few here; ``ratio``: tails and missing
    values are those of a quotient, so z counts no further than 15 and NaN on one side is no fault.
    Returns the fields of :class:`kelib.comparison.Quantity` from ``status`` to ``limit``, and the
    size of z.
    """
    with np.errstate(invalid="ignore"):
        difference = fresh - reference
    known = np.isfinite(difference)
    alike = (reference == fresh) | (np.isnan(reference) & np.isnan(fresh))
    one_side = ~known & ~alike  # NaN or infinite there, and not here
    if not one_side.any() and not difference[known].any():
        return {"status": SAME}, np.abs(difference)
    tau, scale = _scales(reference, like)
    rounding = _rounding(reference, fresh)
    tau = np.maximum(tau, np.sqrt(rounding))  # no question of a task is less than one
    with np.errstate(divide="ignore", invalid="ignore"):
        z = difference / tau[:, None]
    z[difference == 0] = 0
    if ratio:
        z = np.clip(z, -LARGEST, LARGEST)
    spread, largest, limit = _limits(measured, reference.shape[1])
    found = {"spread": rms(z[known]), "largest": float(np.abs(z[known]).max(initial=0))}
    reasons = []
    if one_side.any() and not ratio:
        reasons.append(f"{int(one_side.sum())} undefined on one side only")
    if found["spread"] > spread:
        reasons.append(f"spread {found['spread']:.2g} above {spread:.2g}")
    if found["largest"] > largest:
        reasons.append(f"largest {found['largest']:.2g} above {largest:.2g}")
    if known.any() and np.isfinite(z[known]).all():
        with np.errstate(divide="ignore", invalid="ignore"):
            least = np.nan_to_num(rounding / tau**2)
        found["shift"], text = _shift(z, least)
        reasons += [text] if text else []
    of_known = np.broadcast_to(tau[:, None], z.shape)[known]
    return {
        "status": OFF if reasons else WITHIN,
        "reason": "; ".join(reasons),
        "rms_difference": rms(difference[known]),
        "tolerance": spread * rms(of_known),
        **found,
        "scale": scale,
        "limit": limit if limit == MACHINES else scale,
    }, np.where(one_side, np.inf, np.abs(np.where(known, z, 0)))

"""How the estimate of knowledge entropy depends on the number of sequences. No torch."""

from __future__ import annotations

import numpy as np
import pandas as pd

from kelib.errors import KelibError
from kelib.jackknife import BLOCKS, Sums
from kelib.measurement import EntropyMeasurement, shannon_entropy


def convergence(measurement: EntropyMeasurement) -> pd.DataFrame:
    """Knowledge entropy as it would have come out on 1/64, 1/32 ... of the data set.

    The 64 blocks of a measurement with ``uncertainty=True`` are joined to disjoint groups of
    1, 2, 4 ... 64 blocks, and H (nats, the sum over layers, Eq. 2) is computed for every group.
    Entropy is concave and a mean over fewer sequences is less even, so small samples come out too
    low on average: ``mean`` shows that bias, ``deviation`` how far single samples scatter.

    Returns columns ``sequences`` (of a group, rounded mean), ``groups``, ``mean`` (nats) and
    ``deviation`` (nats, standard deviation over groups, NaN for the one group of all).

    Raises KelibError without blocks, or with fewer sequences than blocks.
    """
    blocks = measurement.blocks
    if blocks is None or not blocks.coefficients:
        raise KelibError("no blocks to join: measure knowledge entropy with uncertainty=True")
    if measurement.sequences < BLOCKS:
        raise KelibError(
            f"{measurement.sequences} sequences do not fill {BLOCKS} blocks; measure at least "
            f"{BLOCKS}"
        )
    rows = []
    joined = 1
    while joined <= BLOCKS:
        found = _group_entropies(blocks, joined)
        spread = float(found.std(ddof=1)) if len(found) > 1 else np.nan
        sequences = round(measurement.sequences * joined / BLOCKS)
        rows.append((sequences, len(found), float(found.mean()), spread))
        joined *= 2
    return pd.DataFrame(rows, columns=["sequences", "groups", "mean", "deviation"])


def _group_entropies(blocks: Sums, joined: int) -> np.ndarray:
    """H of each group of ``joined`` neighbouring blocks (nats); weights need no normalisation."""
    total = np.zeros(BLOCKS // joined)
    for sums in blocks.coefficients:
        total += shannon_entropy(sums.reshape(-1, joined, sums.shape[1]).sum(axis=1))
    return total

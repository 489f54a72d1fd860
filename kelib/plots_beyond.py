"""What the figures of retention and of woken memories need: tables by arm, and a named level."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from kelib.errors import KelibError, listing
from kelib.plots_curves import ORIGINAL

RUN = ["learning_rate", "arm", "seed", "cl_seed", "stage_step"]
SETS = ("nothing", "woken", "random", "others")  # whose rows of V are set to 0


def of_arms(table: pd.DataFrame, ratio: float) -> pd.DataFrame:
    """Rows of the original and of resuscitation with p = ``ratio``, and their arm: ``original`` or
    ``q = 1``. Rows of the original without a ratio belong to every one.
    """
    rows = table[table["intervention"].isin(["none", "resuscitate"])]
    rows = rows[rows["ratio"].isna() | (rows["ratio"] == ratio)]
    return rows.assign(arm=[ORIGINAL if pd.isna(q) else f"q = {q:g}" for q in rows["factor"]])


def measure(table: pd.DataFrame, name: str, **where: Any) -> pd.DataFrame:
    """The rows of one measure of the long table reactivation, further chosen by column = value.

    Raises KelibError if there is none, naming the measures that there are.
    """
    wanted = {"measure": name, **where}
    rows = table[(table[list(wanted)] == list(wanted.values())).all(axis=1)]
    if rows.empty:
        there = sorted(set(table["measure"]))
        raise KelibError(f"no rows with {wanted}; measures of the table are {listing(there)}")
    return rows


def zeroing(table: pd.DataFrame) -> pd.DataFrame:
    """What it costs to set the rows of V of each set to 0: a row for each run and set (column of).

    ``table`` has the columns :data:`RUN` and the rows of all layers. Means over the draws of a set
    of k_drop, K after continual learning minus K of the same with the set at 0 (nats per target
    token); gain, K after minus K before with the set at 0 both times, so that damage to what was
    known before is left out (nats); p_drop, P lost before continual learning and p_drop_after
    (fractions).
    """
    keys = [*RUN, "of"]
    scores = table[table["measure"].isin(["k", "p"]) & table["of"].isin(SETS)]
    wide = scores.pivot_table("value", keys, ["measure", "when"], aggfunc="mean")
    found = pd.DataFrame(
        {
            "k_after": wide["k", "after"],
            "p_before": wide["p", "before"],
            "p_after": wide["p", "after"],
            "gain": wide["k", "after"] - wide["k", "before"],
        }
    ).reset_index()
    whole = found[found["of"] == "nothing"].drop(columns=["of", "gain"])
    pairs = found.merge(whole, on=RUN, suffixes=("", "_whole"), validate="m:1")
    drops = {"k_drop": "k_after", "p_drop": "p_before", "p_drop_after": "p_after"}
    values = {name: pairs[f"{of}_whole"] - pairs[of] for name, of in drops.items()}
    return pairs[[*keys, "gain"]].assign(**values)


def level(ax: Axes, y: float, name: str) -> Axes:
    """A dashed line at ``y`` with its name, within the limits."""
    low, high = ax.get_ylim()
    margin = 0.12 * (max(high, y) - min(low, y))
    ax.set_ylim(min(low, y - margin), max(high, y + margin))
    ax.axhline(y, color="0.5", lw=0.9, ls="--", zorder=1)
    place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "ha": "right", "fontsize": 7}
    place |= {"xytext": (0, 2), "textcoords": "offset points", "color": "0.35"}
    ax.annotate(name, (1, y), **place)
    return ax

"""Figures of branches of pretraining (annealed stages, other weight decay): the tables that they
need, then table and Axes in, Axes out.

Pretraining seeds are the unit throughout. An arm is one way on: that of the trunk, or a branch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from kelib.config import Pretraining
from kelib.errors import KelibError, listing
from kelib.metrics import with_gain
from kelib.plots import COLOURS, MARKERS, within_range
from kelib.recipes import SAVED, TRUNK
from kelib.trends import interval_words, over_seeds

RUN = ["seed", "learning_rate", "cl_seed"]


# --- tables ---------------------------------------------------------------------------------------


def annealed_stages(
    learned: pd.DataFrame, known: pd.DataFrame, continual: pd.DataFrame, plan: Pretraining
) -> pd.DataFrame:
    """Continual learning from stages as saved and from the same stages annealed.

    Arguments are the tables branch_learning, branches and continual. Returned are columns of
    continual with ``arm`` (``as saved``, or ``annealed, N steps``), ``stage_step`` (the stage,
    where an annealed branch began), ``k_gain`` = K_CL - K_PT (nats per token) and ``rate_saved``,
    the learning rate of pretraining at which the checkpoint was saved. The last stage is annealed
    by pretraining itself, so that it stands in every arm. Branches that change the weight decay,
    and stages that a seed has only as saved or only annealed, are left out.

    Raises KelibError if nothing was annealed, or never from a stage.
    """
    own = known[known["annealed"] & (known["weight_decay"] == plan.optimizer.weight_decay)]
    if own.empty:
        raise KelibError(
            f"no branch of {listing(known['branch'].unique())} is annealed with the weight decay "
            "of pretraining: add one to branches of the profile and run stage 7"
        )
    ends = own[own["step"] == own["end_step"]]
    saved_at = {"learning_rate": "rate_saved"}
    rates = ends.rename(columns=saved_at)[["seed", "branch", "end_step", "rate_saved"]]
    annealed = learned.merge(rates, on=["seed", "branch"])
    steps = annealed["end_step"] - annealed["start_step"]
    annealed = annealed.assign(stage_step=annealed["start_step"])
    annealed["arm"] = [f"annealed, {count} steps" for count in steps]
    starts = own[own["step"] == own["start_step"]].rename(columns=saved_at)
    starts = starts.drop_duplicates(["seed", "step"]).assign(stage_step=lambda t: t["step"])
    runs = _counterparts(continual, learned)
    at_start = runs.merge(starts[["seed", "stage_step", "rate_saved"]], on=["seed", "stage_step"])
    both = [*RUN, "stage_step"]
    annealed = annealed.merge(at_start[both], on=both)
    if annealed.empty:
        raise KelibError(
            f"no annealed branch begins at a stage of continual learning "
            f"{listing(sorted(continual['stage_step'].unique()))}: choose another branch.start"
        )
    at_start = at_start.merge(annealed[both].drop_duplicates(), on=both)
    last = runs[runs["stage_step"] == plan.steps]
    last = last.assign(rate_saved=plan.optimizer.final_share * plan.learning_rate)
    arms = annealed["arm"].unique()
    parts = [at_start.assign(arm=SAVED), annealed, *(last.assign(arm=a) for a in (SAVED, *arms))]
    table = pd.concat(parts, ignore_index=True)
    return with_gain(table)


def decay_arms(
    learned: pd.DataFrame, known: pd.DataFrame, continual: pd.DataFrame, plan: Pretraining
) -> pd.DataFrame:
    """Continual learning from the end of pretraining and of branches with another weight decay.

    Arguments are the tables branch_learning, branches and continual. Returned are columns of
    continual with ``arm`` (see :func:`decay_names`), ``weight_decay`` and ``k_gain``; a row for
    each arm, seed, rate and CL seed. Raises KelibError if no branch changes the weight decay alone.
    """
    names = decay_names(known, plan)
    ends = known[known["branch"].isin(list(names)) & (known["step"] == known["end_step"])]
    branches = learned.merge(ends[["seed", "branch", "weight_decay"]], on=["seed", "branch"])
    runs = _counterparts(continual, learned)
    trunk = runs[runs["stage_step"] == plan.steps]
    trunk = trunk.assign(arm=TRUNK, weight_decay=plan.optimizer.weight_decay)
    table = pd.concat([trunk, branches.assign(arm=branches["branch"])], ignore_index=True)
    return with_gain(table)


def decay_names(known: pd.DataFrame, plan: Pretraining) -> dict[str, str]:
    """Arms in order of their weight decay, with names: the trunk (:data:`TRUNK`) and every branch
    to the end of pretraining that changes nothing but its weight decay.

    Raises KelibError if there is no such branch.
    """
    other = known[~known["annealed"] & (known["end_step"] == plan.steps)]
    if other.empty:
        raise KelibError(
            f"no branch of {listing(known['branch'].unique())} has another weight decay to the end "
            "of pretraining: add one to branches of the profile and run stage 7"
        )
    firsts = other.drop_duplicates("branch")
    decays = dict(zip(firsts["branch"], firsts["weight_decay"], strict=True))
    decays[TRUNK] = plan.optimizer.weight_decay
    starts = firsts.set_index("branch")["start_step"]
    names = {}
    for arm in sorted(decays, key=lambda arm: decays[arm]):
        since = "trunk" if arm == TRUNK else f"from step {starts[arm]}"
        names[arm] = f"weight decay {decays[arm]:g} ({since})"
    return names


def along_decay(known: pd.DataFrame, trunk: pd.DataFrame, names: Mapping[str, str]) -> pd.DataFrame:
    """What is known along every arm of ``names``, a row for each arm, seed and step.

    ``known`` is the table branches; ``trunk`` has columns seed, step and quantities that are
    columns of ``known`` too, of which the rest is dropped. The trunk begins where the first branch
    leaves.
    """
    part = known[known["branch"].isin(list(names))]
    columns = list(trunk.columns)
    after = trunk[trunk["step"] >= part["start_step"].min()].assign(arm=TRUNK)
    return pd.concat([after, part.assign(arm=part["branch"])[[*columns, "arm"]]], ignore_index=True)


def slopes(table: pd.DataFrame, value: str, x: str = "entropy_pt") -> pd.DataFrame:
    """Least-squares slope of ``value`` on ``x`` within each seed and CL rate, over its arms or
    stages (CL seeds are averaged before).

    Columns learning_rate, seed, n (points) and slope. NaN where ``x`` does not vary.
    """
    by = ["learning_rate", "seed", "arm" if "arm" in table else "stage_step"]
    means = table.groupby(by, sort=False)[[value, x]].mean().dropna().reset_index()
    rows = []
    group: Any  # keys of groups have no types of their own
    for group, part in means.groupby(by[:2], sort=False):
        off = part[x] - part[x].mean()
        spread = float((off**2).sum())
        slope = float((off * part[value]).sum()) / spread if spread > 0 else np.nan
        rows.append((*group, len(part), slope))
    return pd.DataFrame(rows, columns=[*by[:2], "n", "slope"])


def at_matched_loss(
    runs: pd.DataFrame, stages: pd.DataFrame, value: str, loss: str = "loss_general_pt"
) -> pd.DataFrame:
    """``value`` of every arm minus that of the trunk where its loss was the same.

    ``runs`` has a row for each arm, seed and CL rate, ``stages`` one for each stage of the trunk
    (CL seeds are averaged before). Between stages the trunk is taken to be linear in ``loss``, the
    loss before continual learning (nats per token). Columns learning_rate, arm, seed, loss and
    difference; NaN where no two stages have the loss of an arm between them.
    """
    by = ["learning_rate", "seed"]
    trunk = stages.groupby([*by, "stage_step"])[[loss, value]].mean().reset_index()
    curves = {key: part.sort_values(loss) for key, part in trunk.groupby(by)}
    means = runs.groupby([*by, "arm"], sort=False)[[loss, value]].mean().reset_index()
    rows = []
    for row in means.to_dict("records"):
        curve = curves[(row["learning_rate"], row["seed"])]
        there = np.interp(row[loss], curve[loss], curve[value], left=np.nan, right=np.nan)
        rows.append((*(row[name] for name in (*by, "arm", loss)), row[value] - there))
    return pd.DataFrame(rows, columns=[*by, "arm", "loss", "difference"])


def _counterparts(continual: pd.DataFrame, learned: pd.DataFrame) -> pd.DataFrame:
    """Runs from the trunk with the rates and CL seeds that runs from its branches have."""
    runs = continual[continual["injected"].astype(bool)]
    for name in ("learning_rate", "cl_seed"):
        runs = runs[runs[name].isin(learned[name].unique())]
    return runs


# --- axes -----------------------------------------------------------------------------------------


def along_arms(
    table: pd.DataFrame,
    ax: Axes,
    value: str,
    names: Mapping[str, str],
    ylabel: str,
    scale: float = 1,
) -> Axes:
    """``value`` against the step of pretraining, a line for each arm of ``names``.

    Thin: single pretraining seeds; marked: their mean, with a band (95 % t interval) from four of
    them on, which ends where a fraction does.
    """
    labels = [ylabel]
    for index, (arm, name) in enumerate(names.items()):
        part = table[table["arm"] == arm].assign(value=lambda t: scale * t[value])
        colour = COLOURS[index % 7]
        if part["seed"].nunique() > 1:
            for _, line in part.sort_values("step").groupby("seed"):
                ax.plot(line["step"], line["value"], color=colour, lw=0.6, alpha=0.5, label="_seed")
        mean, cut = within_range(over_seeds(part, "value", ["step"]), value, scale)
        if cut and mean["n"].max() > 3 and f"bands {cut}" not in labels:
            labels.append(f"bands {cut}")
        style: dict[str, Any] = {"color": colour, "marker": MARKERS[index % 7], "ms": 4}
        ax.plot(mean["step"], mean["mean"], lw=1.6, label=name, **style)
        if mean["n"].max() > 3:
            ax.fill_between(mean["step"], mean["low"], mean["high"], color=colour, alpha=0.12, lw=0)
    ax.set_xlabel("pretraining step")
    ax.set_ylabel(", ".join(labels))
    return ax


def against_entropy(
    table: pd.DataFrame,
    ax: Axes,
    value: str,
    names: Mapping[str, str],
    ylabel: str,
    scale: float = 1,
) -> Axes:
    """``value`` against the knowledge entropy that continual learning began with.

    Small, hollow: a pretraining seed in each arm of ``names``, joined by a grey line; large: the
    mean of the arm over seeds.
    """
    points = table.groupby(["arm", "seed"], sort=False)[["entropy_pt", value]].mean().dropna()
    points = points.assign(y=scale * points[value]).reset_index()
    for _, line in points.sort_values("entropy_pt").groupby("seed"):
        ax.plot(line["entropy_pt"], line["y"], color="0.75", lw=0.8, zorder=1)
    for index, (arm, name) in enumerate(names.items()):
        part = points[points["arm"] == arm]
        style: dict[str, Any] = {"color": COLOURS[index % 7], "marker": MARKERS[index % 7]}
        ax.plot(part["entropy_pt"], part["y"], ls="", ms=4, mfc="none", label="_seeds", **style)
        x, y = part["entropy_pt"].mean(), part["y"].mean()
        ax.plot(x, y, ls="", ms=8, mec="black", mew=0.7, label=name, **style)
    ax.xaxis.set_major_locator(mpl.ticker.MaxNLocator(4))
    ax.set_xlabel("knowledge entropy before CL (nats)")
    ax.set_ylabel(ylabel)
    return ax


def slope_dots(
    found: Mapping[str, pd.DataFrame], ax: Axes, xlabel: str, linear: float | None = None
) -> Axes:
    """Slopes of :func:`slopes` of one CL rate, a row for each name in ``found``, from the top.

    Rings: single seeds; filled: their mean with its 95 % t interval. At the right: in how many
    seeds the slope is above 0. With more than four rows the names stand inside, above their rows;
    ``linear`` makes the axis symlog, linear up to there.
    """
    for index, table in enumerate(found.values()):
        part, y = table.dropna(subset=["slope"]), len(found) - 1 - index
        mean = over_seeds(part.assign(all=0), "slope", ["all"]).iloc[0]
        style: dict[str, Any] = {"color": "0.2", "marker": MARKERS[index % 7]}
        if len(part) > 1:
            ax.plot(part["slope"], [y - 0.2] * len(part), "o", mfc="none", mec="0.5", ms=4)
        if len(part) > 3:  # of two or three seeds the interval would flatten all else
            ax.plot([mean["low"], mean["high"]], [y, y], color="0.2", lw=1.5)
        ax.plot(mean["mean"], y, **style)
        place: dict[str, Any] = {"transform": ax.get_yaxis_transform(), "va": "center"}
        count = f"{(part['slope'] > 0).sum()} of {len(part)}"
        text = count if len(found) > 4 else f"above 0 in\n{count}"
        ax.text(1.02, y, text, fontsize=7, **place)
    ax.axvline(0, color="0.5", lw=0.8)
    ax.set_yticks(range(len(found))[::-1], list(found))
    if len(found) > 4:  # beside the axes long names would leave a gap in the whole column
        ax.set_yticks([])
        inside: dict[str, Any] = {"transform": ax.get_yaxis_transform(), "fontsize": 6.5}
        for index, name in enumerate(found):
            ax.text(0.01, len(found) - 1 - index + 0.27, name, color="0.3", **inside)
    if linear is not None:
        ends = np.abs(ax.dataLim.intervalx).max() / linear
        ticks = [t for t in (1, 2, 5, 10, 20, 50, 100) if t <= max(ends, 1)]
        ax.set_xscale("symlog", linthresh=linear)
        ax.set_xticks([linear * t for t in (*(-t for t in ticks[::-1]), 0, *ticks)])
        ax.xaxis.set_major_formatter("{x:g}")
        ax.minorticks_off()
        ax.margins(x=0.06)
    ax.set_ylim(-0.6, len(found) - 0.2)
    ax.set_xlabel(xlabel)
    return ax


# --- words ----------------------------------------------------------------------------------------


def decay_notes(n: int) -> list[str]:
    """Small print under figures with :func:`along_arms`, :func:`against_entropy` and
    :func:`slope_dots`, for ``n`` pretraining seeds.
    """
    if n < 2:
        return [
            "One pretraining seed (n = 1): no interval over seeds. The paper has no such figure."
        ]
    spread = f"Bands and bars: {interval_words(n)}. " if n > 3 else ""
    return [
        "Thin, hollow, rings: single pretraining seeds, joined in grey over their arms; marked, "
        f"filled: their mean. {spread}Slopes are taken within each seed.",
        "The paper has no such figure.",
    ]

"""Figures of continual learning by pretraining stage: table and Axes in, Axes out, and the tables
that they need.

Pretraining seeds are the unit throughout: CL seeds are averaged inside one, each is a thin line,
and intervals are 95 % t over them where there are at least two. Runs of one pretraining seed that
agree in stage, CL rate and CL seed read the same sequences and may be subtracted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kelib.errors import KelibError, listing
from kelib.metrics import ENTRY_SETS
from kelib.plots import COLOURS, MARKERS, within_range
from kelib.trends import change_words, over_seeds, stage_changes

LEVELS = ("memorisation", "semantic", "composition")
MATCH = ("seed", "stage_step", "learning_rate", "cl_seed")
# what a learning curve moves by: domain text before anything is injected, then in turn
PARTS = ("before the first injection", "at the injections", "between injections")


# --- tables ---------------------------------------------------------------------------------------


def stage_ticks(continual: pd.DataFrame) -> dict[int, str]:
    """Stage step -> label for the axis: share and step of pretraining.

    Where a stage is missing in some seeds (it lies before their entropy peak) the label says how
    many have it.
    """
    ticks: dict[int, str] = {}
    step: Any  # keys of groups have no types of their own
    for step, part in continual.groupby("stage_step"):
        ticks[int(step)] = f"{part['stage_label'].iloc[0]}\n{step}"
        if (n := part["seed"].nunique()) < continual["seed"].nunique():
            ticks[int(step)] += f"\nn = {n}"
    return ticks


def by_seed(table: pd.DataFrame, values: Sequence[str], by: Sequence[str] = ()) -> pd.DataFrame:
    """Means of ``values`` over CL seeds: one row a pretraining seed, stage and group of ``by``.

    Rounded to 8 decimals, so that what is tied up to the digits of the tables is exactly so.
    """
    keys, names = [*by, "seed", "stage_step"], list(values)
    means = table.groupby(keys, observed=True, sort=False)[names].mean().reset_index()
    return means.assign(**{name: means[name].round(8) + 0.0 for name in names})  # no -0


def stacked(table: pd.DataFrame, columns: Mapping[str, str], name: str) -> pd.DataFrame:
    """The given columns below each other: the keys of the run, ``name`` (what ``columns`` calls
    each) and value.
    """
    kept = [key for key in (*MATCH, "injected", "variant") if key in table and key not in columns]
    renamed = table[[*kept, *columns]].rename(columns=dict(columns))
    return renamed.melt(kept, var_name=name, value_name="value")


def in_order(table: pd.DataFrame, column: str, order: Iterable[Any]) -> pd.DataFrame:
    """Rows sorted by the place of their ``column`` in ``order``; else as they were."""
    place = {key: index for index, key in enumerate(order)}
    return table.sort_values(column, key=lambda keys: keys.map(place), kind="stable")


def differences(
    runs: pd.DataFrame,
    others: pd.DataFrame,
    values: Sequence[str],
    match: Sequence[str] = MATCH,
) -> pd.DataFrame:
    """``values`` of ``runs`` minus those of the ``others`` that agree in ``match``.

    Runs without a counterpart are left out. Raises KelibError if there is none at all, or if a run
    has two.
    """
    keys = list(match)
    for name, table in (("first", runs), ("second", others)):
        if table.duplicated(keys).any():
            raise KelibError(
                f"the {name} table has several rows that agree in {listing(keys)}: "
                "choose one variant, one intervention, and runs with or without injection"
            )
    pairs = runs.merge(others, on=keys, suffixes=("", " of the other"))
    if pairs.empty:
        raise KelibError(f"no run of the one table agrees in {listing(keys)} with one of the other")
    minus = {name: pairs[name] - pairs[f"{name} of the other"] for name in values}
    return pairs[keys].assign(**minus)


def due_to_injection(continual: pd.DataFrame, values: Sequence[str]) -> pd.DataFrame:
    """``values`` of every run minus those of the same run without injection, for the CL seeds that
    have one.
    """
    injected = continual["injected"].astype(bool)
    return differences(continual[injected], continual[~injected], values)


def first_to_last(table: pd.DataFrame, value: str, by: Sequence[str]) -> pd.DataFrame:
    """Columns ``by``, seed, first, last and change of ``value`` from the first to the last stage
    that a seed has; CL seeds are averaged first.
    """
    means = by_seed(table, [value], by).rename(columns={"stage_step": "step"})
    stages: dict[int, dict[str, int]] = {}
    seed: Any  # keys of groups have no types of their own
    for seed, part in means.groupby("seed"):
        stages[seed] = {"first": part["step"].min(), "last": part["step"].max()}
    changes = stage_changes(means, value, list(by), stages)
    return changes.assign(change=changes["change"].round(8) + 0.0)


def change_lines(
    changes: pd.DataFrame, by: str, names: Mapping[Any, str], unit: str, decimals: int, scale: float
) -> str:
    """A line of Markdown for each of ``names`` that ``changes`` has: first to last stage, in how
    many seeds it falls, and the mean change with its interval.
    """
    lines = []
    for key, name in names.items():
        part = changes[changes[by] == key]
        if len(part):
            first, last = (scale * part[end].mean() for end in ("first", "last"))
            words = change_words(part, unit, decimals, scale)
            lines.append(f"- {name}: {first:.{decimals}f} → {last:.{decimals}f}; {words}")
    return "\n".join(lines)


def knowledge_along(
    curves: pd.DataFrame, continual: pd.DataFrame, entries: Mapping[str, int]
) -> pd.DataFrame:
    """K along continual learning (nats per target token) of each entry set and of both.

    The mean over the levels, which have equally many probes; ``both`` weights the sets by their
    number of ``entries`` (Eq. 4). ``curves`` is the table of that name; step 0 (phase start) is
    K_PT of ``continual``. Columns seed, stage_step, learning_rate, cl_seed, injected, step, phase,
    entry_set, knowledge, and since_start (knowledge minus K_PT, nats).
    """
    run = [*MATCH, "injected"]
    start = continual.merge(curves[run].drop_duplicates(), on=run).assign(step=0, phase="start")
    parts = []
    for entry_set in ENTRY_SETS:
        along = curves[curves["entry_set"] == entry_set].groupby([*run, "step", "phase"])
        parts.append(along["knowledge"].mean().reset_index().assign(entry_set=entry_set))
        begins = start.rename(columns={f"k_{entry_set}_pt": "knowledge"})
        parts.append(begins[[*run, "step", "phase", "knowledge"]].assign(entry_set=entry_set))
    table = pd.concat(parts, ignore_index=True)
    weight = table["entry_set"].map(entries) / sum(entries[name] for name in ENTRY_SETS)
    both = table.assign(knowledge=table["knowledge"] * weight)
    both = both.groupby([*run, "step", "phase"])["knowledge"].sum().reset_index()
    table = pd.concat([table, both.assign(entry_set="both")], ignore_index=True)
    table = table.sort_values([*run, "entry_set", "step"], ignore_index=True)
    first = table.groupby([*run, "entry_set"])["knowledge"].transform("first")
    return table.assign(since_start=table["knowledge"] - first)


def knowledge_moves(lines: pd.DataFrame) -> pd.DataFrame:
    """What K gains (nats) in each of :data:`PARTS` of every curve of :func:`knowledge_along`.

    The parts of a run add up to K_CL - K_PT. "At the injections" is what K gains in the steps that
    read passages (in a run without injection: the same steps); "between injections" what it gains
    from there to the next: below 0, forgetting. A part that a run does not have, as nothing lies
    before an injection in the first step, is 0.
    """
    keys = [*MATCH, "injected", "entry_set"]
    table = lines.sort_values([*keys, "step"])
    groups = table.groupby(keys)
    part = table["phase"].map({"before": PARTS[2], "after": PARTS[1]})
    opening = (groups["phase"].shift() == "start") & (table["phase"] == "before")
    table = table.assign(part=part.where(~opening, PARTS[0]), gain=groups["knowledge"].diff())
    moves = table.dropna(subset=["part", "gain"]).groupby([*keys, "part"])["gain"].sum()
    wide = moves.unstack("part").reindex(columns=sorted(PARTS), fill_value=0.0).fillna(0.0)
    long: Any = wide.rename_axis(columns="part").stack()  # a Series: there is one level
    return pd.DataFrame(long.rename("gain").reset_index())


# --- axes -----------------------------------------------------------------------------------------


def against_stage(
    table: pd.DataFrame,
    ax: Axes,
    value: str,
    by: str,
    names: Mapping[Any, str],
    ticks: Mapping[int, str],
    ylabel: str,
    scale: float = 1,
    hollow: Mapping[Any, Any] | None = None,
    zero: bool = False,
    first: int = 0,
) -> Axes:
    """``value`` against the pretraining stage, a line for each key of ``names`` in column ``by``.

    ``table`` has columns seed, stage_step, ``by`` and ``value``. Thin: single pretraining seeds;
    marked: their mean with its interval. ``hollow`` keys are dashed and take the colour of the key
    they map to. ``zero`` draws a line at 0, within the limits; ``first`` is the colour to begin
    with. With two or three seeds limits follow these and wide bars are cut; with more, two values
    have no bar. Intervals of a fraction end at 0 and 1, which the label of the axis then says.
    """
    steps, labels = sorted(ticks), [ylabel]
    table = by_seed(table, [value], [by]).dropna(subset=[value])
    table[value] *= scale
    shown, several = [], table["seed"].nunique() > 3
    for index, (key, name) in enumerate(names.items(), first):
        part = table[table[by] == key]
        if part.empty:
            continue
        # a little apart, so that intervals do not hide each other
        shift = 0.07 * (index - first - (len(names) - 1) / 2)
        style = _look(key, list(names), hollow or {}, first)
        if part["seed"].nunique() > 1:
            for _, line in part.sort_values("stage_step").groupby("seed"):
                x = [steps.index(step) + shift for step in line["stage_step"]]
                ax.plot(x, line[value], lw=0.6, alpha=0.45, label="_seed", **style)
        mean = over_seeds(part, value, ["stage_step"])
        if several:  # an interval of two values, t = 12.7, would be a line from edge to edge
            mean.loc[mean["n"] < 3, ["low", "high"]] = np.nan
        if not zero:  # a difference has no such range
            mean, cut = within_range(mean, value, scale)
            labels += [f"bars {cut}"] if cut and f"bars {cut}" not in labels else []
        shown.append(mean)
        errors = np.nan_to_num(np.abs(mean[["low", "high"]].to_numpy().T - mean["mean"].to_numpy()))
        style |= {"marker": MARKERS[index % 7], "mfc": "white" if style["ls"] == "--" else None}
        style |= {"capsize": 2, "lw": 1.4, "elinewidth": 0.9, "label": name}
        x = [steps.index(step) + shift for step in mean["stage_step"]]
        ax.errorbar(x, mean["mean"], yerr=errors, **style)
    values = table.loc[table[by].isin(list(names)), value].tolist()
    if zero:
        ax.axhline(0, color="0.5", lw=0.8)
        values.append(0)
    _fit(ax, values, shown)
    ax.set_xticks(range(len(steps)), [ticks[step] for step in steps])
    ax.set_xlim(-0.4, len(steps) - 0.6)
    ax.set_xlabel("stage (share, step)")
    ax.set_ylabel(", ".join(labels))
    return ax


def _look(key: Any, names: list[Any], hollow: Mapping[Any, Any], first: int = 0) -> dict[str, Any]:
    index = first + names.index(hollow.get(key, key))
    return {"color": COLOURS[index % 7], "ls": "--" if key in hollow else "-"}


def _fit(ax: Axes, values: Sequence[float], means: Sequence[pd.DataFrame]) -> None:
    """Limits around all seeds, and around the intervals where these come from more than three."""
    wide = [mean.loc[mean["n"] > 3, ["low", "high"]].to_numpy().ravel() for mean in means]
    numbers = np.concatenate([np.asarray(values, dtype=float), *wide])
    numbers = numbers[np.isfinite(numbers)]
    if numbers.size:
        margin = 0.08 * np.ptp(numbers) or 0.5
        ax.set_ylim(numbers.min() - margin, numbers.max() + margin)


def learning_curve(
    lines: pd.DataFrame,
    ax: Axes,
    value: str,
    by: str,
    names: Mapping[Any, str],
    ylabel: str,
    hollow: Mapping[Any, Any] | None = None,
) -> Axes:
    """``value`` against the step of continual learning, a line for each key of ``names`` in ``by``.

    ``lines`` has columns seed, step, phase, ``by`` and ``value``. Thick: the mean over seeds, with
    a band from four of them on; grey verticals: steps that read passages. ``hollow`` keys are
    dashed and take the colour of the key they map to.
    """
    names = {key: name for key, name in names.items() if (lines[by] == key).any()}
    lines = lines[lines[by].isin(list(names))]
    lines = lines.groupby([by, "seed", "step", "phase"])[value].mean().reset_index()
    for step in lines.loc[lines["phase"] == "after", "step"].unique():
        ax.axvline(step, color="0.88", lw=1.2, zorder=0)
    shown = []
    for key, name in names.items():
        part, style = lines[lines[by] == key], _look(key, list(names), hollow or {})
        mean = over_seeds(part, value, ["step"])
        shown.append(mean)
        if part["seed"].nunique() > 1:
            for _, line in part.groupby("seed"):
                ax.plot(line["step"], line[value], lw=0.5, alpha=0.4, label="_seed", **style)
        ax.plot(mean["step"], mean["mean"], lw=1.5, label=name, **style)
        if mean["n"].max() > 3:  # bands of two or three seeds would cover all else
            band: dict[str, Any] = {"color": style["color"], "alpha": 0.12, "lw": 0}
            ax.fill_between(mean["step"], mean["low"], mean["high"], **band)
    _fit(ax, lines[value].tolist(), shown)
    ax.grid(False, axis="x")
    ax.set_xlabel("step of continual learning")
    ax.set_ylabel(ylabel)
    return ax


def same_limits(axes: Iterable[Axes]) -> None:
    """One vertical range for panels that are to be compared."""
    panels = list(axes)
    low, high = zip(*(ax.get_ylim() for ax in panels), strict=True)
    for ax in panels:
        ax.set_ylim(min(low), max(high))


def legend_above(figure: Figure, *axes: Axes, columns: int = 4) -> None:
    """One legend for all panels, above them, taken from ``axes``, each name once; small print goes
    below."""
    named: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    figure.legend(
        list(named.values()), list(named), loc="outside upper center", ncols=columns, fontsize=8
    )

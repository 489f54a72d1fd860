"""Interventions side by side: which arms a profile has, and what each changes against the original.

An effect is an arm minus the original of the same pretraining seed, stage, CL rate and CL seed,
which starts from one checkpoint and reads the same sequences. Intervals are 95 % t over the units
in the column seed, see :func:`kelib.plots_curves.units`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from kelib.arms import Arm
from kelib.errors import KelibError, listing
from kelib.plots import bounds
from kelib.plots_curves import ORIGINAL
from kelib.plots_learning import MATCH, differences
from kelib.trends import over_seeds

ALGORITHM, PRESERVING, LOWER = "Algorithm 1", "function-preserving", "lower CL rate"
CONTROLS, ATTENTION, REMEDIES = "controls", "attention", "remedies for plasticity"
# intervention -> (group, name in figures), in the order of the rows
KINDS = {
    "resuscitate": (ALGORITHM, "Algorithm 1"),
    "resuscitate_preserving": (PRESERVING, "function-preserving"),
    "resuscitate_random": (CONTROLS, "shuffled multipliers"),
    "resuscitate_top": (CONTROLS, "most active memories"),
    "uniform_gain": (CONTROLS, "one gain for all"),
    "scale_value": (CONTROLS, "V scaled, not K"),
    "attention_temperature": (ATTENTION, "attention"),
    "redo": (REMEDIES, "ReDo"),
    "shrink_and_perturb": (REMEDIES, "shrink and perturb"),
    "plasticity_injection": (REMEDIES, "plasticity injection"),
    "continual_backprop_utility": (REMEDIES, "continual backprop"),
}
BASELINES = ("acquisition", "forgetting")  # what "before" means for: checkpoint or modified model
OUTCOMES = ("k_cl", "p_cl", *BASELINES, *(f"{name}_modified" for name in BASELINES))
EMPTY = "not defined"


def with_baselines(runs: pd.DataFrame) -> pd.DataFrame:
    """``runs`` with A and F against the modified model; in a run without intervention the
    checkpoint is that model.
    """
    filled = {}
    for name in BASELINES:
        there = runs.get(f"{name}_modified", pd.Series(np.nan, index=runs.index))
        filled[f"{name}_modified"] = there.astype(float).fillna(runs[name])
    return runs.assign(**filled)


def changed_runs(interventions: pd.DataFrame, arms: pd.DataFrame) -> pd.DataFrame:
    """Every run after an intervention, of both tables of stage 4, with its label in column arm.

    Algorithm 1 gets the label an arm with its p and q would have. What both tables hold comes once.
    """
    grid = interventions[interventions["intervention"] != "none"]
    settings = grid[["intervention", "ratio", "factor"]].itertuples(index=False, name=None)
    labels = [Arm(str(name), ratio=p, factor=q).label for name, p, q in settings]
    runs = pd.concat([grid.assign(arm=labels), arms.assign(arm=arms["variant"])])
    return with_baselines(runs.drop_duplicates([*MATCH, "arm"]).reset_index(drop=True))


def effects(
    changed: pd.DataFrame, originals: pd.DataFrame, values: Sequence[str] = OUTCOMES
) -> pd.DataFrame:
    """``values`` of every run of :func:`changed_runs` minus those of its original.

    ``originals`` are injected runs of the protocol; runs of stages that it lacks are left out.
    Columns arm, those of MATCH, and ``values`` in their own units. Raises KelibError for an arm
    none of whose runs has an original.
    """
    originals = with_baselines(originals)
    parts = [
        differences(part, originals, values).assign(arm=arm)
        for arm, part in changed.groupby("arm", sort=False)
    ]
    return pd.concat(parts, ignore_index=True)


def lower_rate_effect(
    continual: pd.DataFrame, rate: float, values: Sequence[str] = OUTCOMES
) -> pd.DataFrame:
    """The control that changes no weight: the original at the next lower CL rate minus the original
    at ``rate``, in the form of :func:`effects`.

    ``continual`` holds injected runs of the protocol. Raises KelibError if no lower rate was run.
    """
    lower = [other for other in continual["learning_rate"].unique() if other < rate]
    if not lower:
        raise KelibError(
            f"the lowest CL rate is {rate:g}, the control needs a lower one: add it to "
            "continual.learning_rates of the profile and run stage 3"
        )
    runs = with_baselines(continual)
    low, high = (runs[runs["learning_rate"] == of] for of in (max(lower), rate))
    match = [key for key in MATCH if key != "learning_rate"]
    pairs = differences(low, high, values, match)
    return pairs.assign(learning_rate=rate, arm=f"{LOWER} {max(lower):g}")


def before_training(changed: pd.DataFrame) -> pd.DataFrame:
    """``changed`` with what each intervention alone does, modified model minus checkpoint:
    entropy_change, loss_change (general text), k_change (nats) and p_change (fraction).
    """
    columns = {"entropy": "entropy", "loss_general": "loss", "k": "k", "p": "p"}
    moved = {
        f"{short}_change": changed[f"{name}_modified"] - changed[f"{name}_pt"]
        for name, short in columns.items()
    }
    return changed.assign(**moved)


def row_names(labels: Iterable[str]) -> dict[str, str]:
    """Label -> name in words, in the order of :data:`KINDS`, inside one by settings; the lower CL
    rate last. Raises KelibError for an intervention that :data:`KINDS` does not name.
    """
    kinds, found = list(KINDS), {}
    for label in dict.fromkeys(labels):
        kind, _, settings = label.partition(" ")
        if kind in KINDS:
            words = settings.replace("noise_std", "noise").replace(" ", ", ").replace("=", " = ")
            found[label] = (kinds.index(kind), f"{KINDS[kind][1]}, {words}")
        elif label.startswith(LOWER):
            found[label] = (len(kinds), label)
        else:
            raise KelibError(f"intervention {label!r} has no row; known are {listing(KINDS, 20)}")
    return {label: found[label][1] for label in sorted(found, key=lambda name: found[name])}


def row_groups(labels: Iterable[str]) -> dict[str, str]:
    """Label of :func:`row_names` -> group that it is drawn with."""
    return {
        label: LOWER if label.startswith(LOWER) else KINDS[label.partition(" ")[0]][0]
        for label in labels
    }


def effects_table(
    table: pd.DataFrame,
    by: str,
    rows: Mapping[Any, str],
    columns: Mapping[str, tuple[str, float, int]],
) -> pd.DataFrame:
    """Means with intervals as text, a row for each key of ``rows`` in column ``by``.

    ``columns`` maps a value to (heading, scale, decimals). :data:`EMPTY` where a value is NaN in
    every seed; n is the largest number of seeds of the row.
    """
    lines = []
    for key, name in rows.items():
        part, line = table[table[by] == key], {"": name, "n": 0}
        for value, (heading, scale, decimals) in columns.items():
            known = part.dropna(subset=[value])
            line[heading] = EMPTY
            if len(known):
                mean = over_seeds(known, value, [by]).iloc[0]
                line["n"] = max(line["n"], mean["n"])
                line[heading] = mean_words(mean, scale, decimals)
        lines.append(line)
    return pd.DataFrame(lines)


def mean_words(mean: Any, scale: float, decimals: int) -> str:
    """A row of :func:`over_seeds` as ``+0.12 [-0.10, +0.34]``, or the mean alone."""
    text = f"{round(scale * mean['mean'], decimals) + 0.0:+.{decimals}f}"  # no -0
    if np.isnan(mean["low"]):
        return text
    return f"{text} {bounds(scale * mean['low'], scale * mean['high'], decimals)}"


def sweep(
    changed: pd.DataFrame, originals: pd.DataFrame, names: Mapping[str, str]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(runs, effects) of some arms of the last stage and their originals, arms called by ``names``
    (label -> words), at the CL rates where all of these were run.

    Raises KelibError if there is no such rate.
    """
    last = originals["stage_step"].max()
    chosen = changed[changed["arm"].isin(list(names)) & (changed["stage_step"] == last)]
    rates = chosen.groupby("learning_rate")["arm"].nunique()
    rates = rates[rates == len(names)].index
    if rates.empty:
        raise KelibError(f"no CL rate has all of {listing(names, 20)}: run stage 4 with these arms")
    chosen = chosen[chosen["learning_rate"].isin(rates)]
    pairs = effects(chosen, originals)
    at_rates = originals["learning_rate"].isin(rates) & (originals["stage_step"] == last)
    first = with_baselines(originals[at_rates]).assign(arm=ORIGINAL)
    words: dict[str, str] = {**names, ORIGINAL: ORIGINAL}
    runs = pd.concat([first, chosen], ignore_index=True)
    return runs.assign(arm=runs["arm"].map(words)), pairs.assign(arm=pairs["arm"].map(words))

"""Interventions side by side: which arms a profile has, and what each changes against the original.

An effect is an arm minus the original of the same pretraining seed, stage, CL rate and CL seed,
which starts from one checkpoint and reads the same sequences. Intervals are 95 % t over the units
in the column seed, see :func:`kelib.plots_curves.units`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from kelib import trends
from kelib.arms import Arm
from kelib.errors import KelibError, listing
from kelib.plots_curves import ORIGINAL
from kelib.plots_learning import MATCH, differences
from kelib.plots_tables import summary_table
from kelib.trends import over_seeds, row_words

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
# what tables of effects show: value -> (heading, scale, decimals)
ALONE = {
    "entropy_change": ("entropy", 1, 2),
    "loss_change": ("loss", 1, 3),
    "k_change": ("K", 1, 3),
    "p_change": ("P", 100, 1),
}
COLUMNS = {
    "k_cl": ("K", 1, 3),
    "p_cl": ("P", 100, 1),
    "acquisition": ("A", 100, 1),
    "acquisition_modified": ("A (m)", 100, 1),
    "forgetting": ("F", 100, 1),
    "forgetting_modified": ("F (m)", 100, 1),
}
SWEEP = ["learning_rate", "arm"]  # what tells the groups of a sweep apart
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
                line[heading] = row_words(mean, scale, decimals)
        lines.append(line)
    return pd.DataFrame(lines)


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


def check_sweep(
    runs: pd.DataFrame,
    pairs: pd.DataFrame,
    arms: Sequence[str],
    rates: Collection[float],
    seeds: Sequence[int],
) -> None:
    """Raises KelibError unless ``runs`` and ``pairs`` of :func:`sweep` have all of ``arms`` (the
    original first), CL ``rates`` and pretraining ``seeds``, each once, with K and P in their range.
    """
    counts, wanted = pairs.groupby(SWEEP).size(), len(seeds) * runs["cl_seed"].nunique()
    holds = {
        f"the arms {listing(arms, 20)}": set(runs["arm"]) == set(arms)
        and set(pairs["arm"]) == set(arms[1:]),
        f"the CL rates {listing(rates)}": set(runs["learning_rate"]) == set(rates),
        f"the pretraining seeds {listing(seeds)}": set(runs["seed"]) == set(seeds),
        f"{wanted} pairs for each arm and CL rate": bool((counts == wanted).all()),
        "each run once": not runs.duplicated([*MATCH, "arm"]).any(),
        "P between 0 and 1": bool(runs["p_cl"].between(0, 1).all()),
        "K below 0": bool((runs["k_cl"] < 0).all()),
    }
    if failed := [what for what, true in holds.items() if not true]:
        raise KelibError(f"the sweep must have {'; '.join(failed)}: run stage 4 with these arms")


def alone_table(runs: pd.DataFrame, arms: Sequence[str]) -> pd.DataFrame:
    """What each of ``arms`` but the first, the original, changes before any training."""
    changed = before_training(runs[runs["arm"] != ORIGINAL]).drop_duplicates(["seed", "arm"])
    return effects_table(changed, "arm", {arm: arm for arm in arms[1:]}, ALONE)


def outcomes_table(
    runs: pd.DataFrame, arms: Sequence[str], rates: Iterable[float]
) -> tuple[pd.DataFrame, dict[str, pd.DataFrame]]:
    """Means of :data:`COLUMNS` by CL rate and arm, as of :func:`kelib.plots_tables.summary_table`:
    K in nats per target token, the rest in %; (m) is against the modified model.
    """
    columns = {
        value: (value.replace("_modified", " (m)"), scale)
        for value, (_, scale, _) in COLUMNS.items()
    }
    return summary_table(runs, columns, {"learning_rate": list(rates), "arm": arms})


def effects_by_rate(
    pairs: pd.DataFrame,
    by: str,
    rows: Iterable[str],
    rates: Mapping[float, str],
    columns: Mapping[str, tuple[str, float, int]] = COLUMNS,
) -> dict[str, pd.DataFrame]:
    """Name of the CL rate -> :func:`effects_table` of its ``pairs``."""
    named = {row: row for row in rows}
    return {
        name: effects_table(pairs[pairs["learning_rate"] == rate], by, named, columns)
        for rate, name in rates.items()
    }


def plotted_sweep(summaries: Mapping[str, pd.DataFrame], pairs: pd.DataFrame) -> pd.DataFrame:
    """The numbers behind :func:`kelib.plots_interventions.sweep_panels`: ``summaries`` of
    :func:`outcomes_table`, then means of ``pairs``, with a column quantity.
    """
    parts = [part.assign(quantity=value) for value, part in summaries.items()]
    parts += [
        over_seeds(pairs, value, SWEEP).assign(quantity=f"{value}: arm - original")
        for value in COLUMNS
    ]
    return pd.concat(parts)


def effect_lines(pairs: pd.DataFrame, rows: Mapping[str, str]) -> str:
    """A line of Markdown for each arm in ``rows`` (arm -> name): effects on K and P."""
    lines = []
    for arm, name in rows.items():
        part = pairs[pairs["arm"] == arm]
        k, p = trends.mean_words(part, "k_cl"), trends.mean_words(part, "p_cl", 100, 1)
        lines.append(f"- {name}: K {k} nats, P {p} points")
    return "\n".join(lines)

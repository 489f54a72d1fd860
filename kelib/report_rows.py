"""Rows that the charts of the report draw, from measurement tables of any kind of profile."""

from __future__ import annotations

import pandas as pd

from kelib.metrics import with_gain
from kelib.results import Tables
from kelib.verdicts import NOT_RUN

OUTCOMES = {  # column -> what the menu calls it, and the factor to that unit
    "k_gain": ("K gain, K_CL - K_PT (nats)", 1),
    "k_injected": ("K due to the injected passages (nats)", 1),
    "k_cl": ("K after continual learning (nats)", 1),
    "acquisition": ("acquisition A (%)", 100),
    "forgetting": ("forgetting F (%)", 100),
    "forgetting_over_chance": ("forgetting over chance (%)", 100),
    "p_cl": ("P after continual learning (%)", 100),
}
KEYS = ("series", "stage_step", "stage_label", "learning_rate")


def entropy_rows(tables: Tables) -> pd.DataFrame | None:
    """Knowledge entropy with columns x (a step, or a layer), nats, bound, series, choice, stage.

    ``series`` is what a line is (a seed, a text, a recipe) and ``choice`` what the menu picks (a
    layer or their sum, with the model where there are two; a seed where only sums are stored).
    ``stage`` marks checkpoints that continual learning starts from. None without such a table.
    """
    entropies, regimes = tables.optional("entropies"), tables.optional("regimes")
    if regimes is not None:
        rows = regimes[regimes["arm"] == "as saved"]
        rows = rows.rename(columns={"entropy": "nats", "regime": "series", "step": "x"})
        rows = rows.assign(choice="seed " + rows["seed"].astype(str))
    elif entropies is not None and entropies["model"].nunique() > 1:
        rows = _summed(_plain(entropies[entropies["data"] == "mixture"]), ["model", "seed", "step"])
        rows = rows.assign(choice=rows["model"] + ", " + rows["choice"])
    else:
        entropy = tables.optional("entropy")
        if entropy is None:
            return None
        entropy = _plain(entropy)
        keys = [key for key in ("seed", "data", "step") if key in entropy]
        rows = _summed(entropy, keys)
    if "series" not in rows:
        of_seeds = "seed" in rows
        names = "seed " + rows["seed"].astype(str) if of_seeds else rows["data"].astype(str)
        rows = rows.assign(series=names)
    if "x" not in rows:  # one model at one time: its layers side by side
        layers = rows["step"] if "step" in rows else rows["layer"]
        rows = rows.assign(x=layers)
    rows = rows.assign(bound=rows["bound"], stage=_is_stage(rows, tables))
    return rows[["x", "nats", "bound", "series", "choice", "stage"]]


def _plain(table: pd.DataFrame) -> pd.DataFrame:
    """Knowledge entropy by the paper's definition, where a table holds others beside it."""
    for column, value in (("kind", "knowledge"), ("coefficient", "absolute")):
        if column in table:
            table = table[table[column] == value]
    return table


def _summed(table: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Every layer, and before them their sum; without steps the layers alone, numbered from 1."""
    table = table.rename(columns={"entropy_nats": "nats", "bound_nats": "bound"})
    table = table.assign(layer=table["layer"] + 1)
    if "step" not in keys:
        return table.assign(choice="every layer")
    total = table.groupby(keys, as_index=False)[["nats", "bound"]].sum()
    total = total.assign(choice="sum over layers")
    layers = table.assign(choice="layer " + table["layer"].astype(str))
    return pd.concat([total, layers.sort_values(["layer", *keys])], ignore_index=True)


def _is_stage(rows: pd.DataFrame, tables: Tables) -> pd.Series:
    runs = tables.optional("continual")
    if runs is None or "seed" not in rows or "step" not in rows:
        return pd.Series(False, index=rows.index)
    stages = set(zip(runs["seed"], runs["stage_step"], strict=True))
    pairs = zip(rows["seed"], rows["step"], strict=True)
    return pd.Series([pair in stages for pair in pairs], index=rows.index)


def outcome_rows(tables: Tables) -> pd.DataFrame | None:
    """Injected runs: entropy before continual learning (nats) beside every outcome, in the units of
    :data:`OUTCOMES`, means over CL seeds. None where nothing was continued.
    """
    runs = tables.optional("continual")
    if runs is not None:
        runs = runs.assign(series="seed " + runs["seed"].astype(str))
    else:
        runs = tables.optional("regime_learning")
        if runs is None:
            return None
        runs = runs[runs["arm"] == "as saved"].assign(series=runs["regime"])
    injected = runs["injected"].astype(bool)
    match = [*KEYS, "seed", "cl_seed"]
    without = runs[~injected].set_index(match)["k_cl"].rename("k_cl_none")
    rows = runs[injected].join(without, on=match)
    rows = with_gain(rows).assign(k_injected=rows["k_cl"] - rows["k_cl_none"])
    found = [name for name in OUTCOMES if name in rows]
    means = rows.groupby([*KEYS, "seed"], as_index=False, sort=False)[["entropy_pt", *found]].mean()
    for name in found:
        means[name] *= OUTCOMES[name][1]
    order = {series: place for place, series in enumerate(dict.fromkeys(runs["series"]))}
    means = means.assign(order=means["series"].map(order))
    return means.sort_values(["order", "seed", "stage_step"], ignore_index=True)


def primary(claims: pd.DataFrame) -> pd.DataFrame:
    """The primary claims that were run, as in the table of the claims."""
    return claims[claims["primary"] & (claims["verdict"] != NOT_RUN)]

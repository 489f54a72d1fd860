"""What Fig. 1, the whole study in one picture, draws and says beside what other figures have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kelib import claims as rule
from kelib.changed_claims import JUDGED, declared, judged_claims
from kelib.config import Profile
from kelib.errors import KelibError, listing
from kelib.results import Tables
from kelib.tables import read_vectors
from kelib.trends import over_seeds, row_words
from kelib.verdicts import NOT_TESTABLE

FALLS, RISES, OPEN = "falls", "rises", "open"
ARROWS = {FALLS: "↓", RISES: "↑", OPEN: "?"}
SELECTED = ("small", "study")  # profiles whose recipe was chosen because its entropy falls
# how a reason of kelib.verdicts begins -> what a title has room for
OBSTACLES = {
    "P_CL - chance": "tasks near chance",
    "P_PT - chance": "tasks not known before CL",
    "entropy does not fall": "entropy does not fall",
}


def stage_coefficients(folder: Path, seed: int, steps: Sequence[int]) -> dict[int, np.ndarray]:
    """Mean coefficients ``(layers, m)`` of each of ``steps`` of a pretraining seed.

    Reads ``coefficients-seed<seed>.safetensors`` of a study's measurements. Raises KelibError where
    it is missing, is not what was written, or has not all steps.
    """
    path = folder / f"coefficients-seed{seed}.safetensors"
    stored = read_vectors(path, "entropy")
    found = {}
    for step in steps:
        layers = [stored[name] for name in sorted(stored) if int(name.split("/")[0]) == step]
        if not layers:
            there = sorted({int(name.split("/")[0]) for name in stored})
            raise KelibError(f"{path.name} has no step {step}; it has {there}")
        found[step] = np.stack(layers)
    return found


def directions(
    changes: Mapping[str, tuple[pd.DataFrame, str]], units: Mapping[str, tuple[str, float, int]]
) -> pd.DataFrame:
    """What falls, what rises from the first to the last stage, beside the paper's account.

    ``changes`` maps a quantity to its table of :func:`kelib.plots_learning.first_to_last` (one row
    a seed) and to the paper's direction; ``units`` to unit, scale and decimals. ``here`` is *open*
    unless the 95 % t interval over seeds lies on one side of 0. Columns quantity, the paper, here,
    change.
    """
    rows = []
    for quantity, (table, paper) in changes.items():
        unit, scale, decimals = units[quantity]
        found = over_seeds(table.assign(all=0), "change", ["all"]).iloc[0]
        here = FALLS if found["high"] < 0 else RISES if found["low"] > 0 else OPEN
        change = row_words(found, scale, decimals, unit)
        rows.append({"quantity": quantity, "the paper": paper, "here": here, "change": change})
    return pd.DataFrame(rows)


def arrows(row: Mapping[str, str]) -> str:
    """The paper's direction and ours, of a row of :func:`directions`, and a verdict in a line of
    its own if the row has one, for a title.

    >>> arrows({"the paper": "falls", "here": "open"})
    'paper ↓, here ?'
    """
    words = f"paper {ARROWS[row['the paper']]}, here {ARROWS[row['here']]}"
    return f"{words}\n{row['verdict']}" if row.get("verdict", "none") != "none" else words


def stage_verdicts(tables: Tables) -> dict[str, str]:
    """The verdict on what each measure of the paper stands for, at the first CL rate, in few words:
    acquisition -> ``contradicted``, forgetting -> ``not testable: tasks near chance``.

    Judged as the claims table is, from the same tables and file: the exploratory claim on a measure
    stands beside the primary one whose verdict this is. Raises KelibError as :mod:`kelib.claims`.
    """
    claims = declared().claims
    judged = judged_claims(claims, {name: tables.table(name) for name in JUDGED})
    rate = tables.profile.continual.learning_rates[0]
    rows = {row["claim"]: row for row in judged[judged["learning_rate"] == rate].to_dict("records")}
    if not rows:
        rates = listing(judged["learning_rate"].unique())
        raise KelibError(f"no claim was judged at CL rate {rate:g}; judged were {rates}")
    primary = {c.quantity: c.beside for c in claims if c.beside and c.contrast == rule.STAGES}
    return {name: verdict_words(rows[claim]) for name, claim in primary.items()}


def verdict_words(row: Mapping[Any, Any]) -> str:
    """The verdict of a row of the claims table for a title, with one obstacle to a test.

    >>> verdict_words({"verdict": "undecided", "reason": "adjusted p >= 0.05"})
    'undecided'
    """
    if row["verdict"] != NOT_TESTABLE:
        return row["verdict"]
    known = [words for begins, words in OBSTACLES.items() if begins in row["reason"]]
    return f"not testable: {known[0]}" if known else NOT_TESTABLE


def selection_words(name: str, profile: Profile) -> str:
    """What a fall of the entropy is worth in the profile called ``name``: a sentence, empty where
    the recipe was not selected for it.
    """
    if profile.corpus.generated:
        return "The text is generated and the models are tiny: these numbers mean nothing."
    if name in SELECTED:
        return "The regime was selected because its entropy falls: that is no reproduction."
    return ""

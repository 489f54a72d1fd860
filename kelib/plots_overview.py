"""What Fig. 1, the whole study in one picture, draws beside what other figures have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from kelib.errors import KelibError
from kelib.tables import read_vectors
from kelib.trends import over_seeds, row_words

FALLS, RISES, OPEN = "falls", "rises", "open"
ARROWS = {FALLS: "↓", RISES: "↑", OPEN: "?"}


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
    """The paper's direction and ours, of a row of :func:`directions`, for a title.

    >>> arrows({"the paper": "falls", "here": "open"})
    'paper ↓, here ?'
    """
    return f"paper {ARROWS[row['the paper']]}, here {ARROWS[row['here']]}"

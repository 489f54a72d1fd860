"""What the columns of the measurement tables are: which of them say what a row is, which must be
the same in every run of a profile, and on which parameters the numbers rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from kelib.claims import refuse_duplicates
from kelib.errors import KelibError, listing

PRETRAINED = ("corpus", "model", "comparison", "pretraining", "training")
LEARNED = (*PRETRAINED, "continual")
CHANGED = (*LEARNED, "interventions")

# Settings, and counts of what is fixed by them: the same on every machine, whatever is measured.
EXACT = frozenset(
    {
        *("share", "tokens", "tokens_per_parameter", "tokens_seen", "parameters", "sequences"),
        *("documents", "loss_sequences", "groups", "memories", "top", "n", "truncated"),
        *("chance", "bound", "bound_nats", "jaccard_by_chance"),
        *("learning_rate", "peak_rate", "weight_decay", "start_step", "end_step", "step"),
    }
)
# Quotients, and NaN where the denominator is too small: their tails are those of a quotient, and
# which rows have no value is no more certain than the numbers that they are made of.
RATIOS = ("acquisition", "forgetting", "retention")


@dataclass(frozen=True)
class Layout:
    """``keys`` tell the rows of a table apart, in whichever profile (one has some of them only);
    ``parts`` are the keys by which a column holds several quantities, of scales of their own;
    ``sections`` are those of the profile that its numbers rest on.
    """

    keys: tuple[str, ...]
    parts: tuple[str, ...] = ()
    sections: tuple[str, ...] = PRETRAINED


_RUN = (
    *("seed", "stage_step", "variant", "learning_rate", "cl_seed", "injected"),
    *("intervention", "ratio", "factor"),
)
_STAGE = ("seed", "stage_step", "learning_rate")
_DATA = ("data", "kind", "coefficient", "layer")
_MECHANISM = (*LEARNED, "mechanism")
LAYOUTS = {
    "pretraining": Layout(("model", "seed", "step")),
    "checkpoints": Layout(("regime", "seed", "step")),
    "entropy": Layout(("regime", "revision", "seed", "step", *_DATA), ("kind", "coefficient")),
    "entropies": Layout(("model", "seed", "step", *_DATA), ("kind", "coefficient")),
    "totals": Layout(("revision", *_DATA), ("kind", "coefficient")),
    "panel": Layout(("model", "seed", "step", "layer")),
    "convergence": Layout(
        ("model", "seed", "step", "data", "coefficient", "sequences"), ("coefficient",)
    ),
    "entities": Layout(("seed", "step", "data")),
    "continual": Layout(("regime", *_RUN), sections=LEARNED),
    "variants": Layout(_RUN, sections=LEARNED),
    "curves": Layout(
        (*_STAGE, "cl_seed", "injected", "step", "phase", "entry_set", "level"), sections=LEARNED
    ),
    "interventions": Layout(_RUN, sections=CHANGED),
    "arms": Layout(_RUN, sections=CHANGED),
    "retention": Layout(_RUN, sections=(*CHANGED, "retention")),
    "reactivation": Layout(
        (*_RUN, "measure", "when", "of", "layer", "draw"),
        ("measure", "when", "of"),
        (*CHANGED, "reactivation"),
    ),
    "gradients": Layout((*_STAGE, "batch", "layer"), ("batch",), _MECHANISM),
    "shares": Layout(
        (*_STAGE, "batch", "quantity", "part", "ranked_by", "share"), ("quantity",), _MECHANISM
    ),
    "overlap": Layout((*_STAGE, "which", "layer"), ("which",), _MECHANISM),
    "carriers": Layout(
        (*_STAGE, "when", "entry_set", "level", "layer", "fraction"), sections=_MECHANISM
    ),
    "noise": Layout((*_STAGE, "group", "size", "noise_seed"), sections=_MECHANISM),
    "steps": Layout((*_STAGE, "update", "group", "size"), ("update",), _MECHANISM),
    "branches": Layout(("seed", "branch", "step"), sections=(*LEARNED, "branches")),
    "branch_entropy": Layout(("seed", "branch", "step", "layer"), sections=(*LEARNED, "branches")),
    "branch_learning": Layout(("branch", *_RUN), sections=(*LEARNED, "branches")),
    "regimes": Layout(("regime", "arm", "seed", "step"), sections=(*LEARNED, "regimes")),
    "regime_learning": Layout(("regime", "arm", *_RUN), sections=(*LEARNED, "regimes")),
    "texts": Layout(("revision", "data")),
    "questions": Layout(("questions", "task", "metric", "split")),
    "known": Layout(("revision",)),
    "revisions": Layout(("revision",)),
}


def layout_of(name: str) -> Layout:
    """The layout of a table by its name. Raises KelibError for one that is not declared here."""
    if name not in LAYOUTS:
        raise KelibError(
            f"no layout of table {name}: kelib/table_layouts.py has {listing(LAYOUTS, 99)}; "
            "declare which columns tell its rows apart"
        )
    return LAYOUTS[name]


def keys_of(name: str, tables: dict[str, pd.DataFrame]) -> list[str]:
    """The keys that all ``tables`` (by what to call them) of one name have. Raises KelibError if
    they have none, or if two rows of one have the same keys.
    """
    keys = [k for k in layout_of(name).keys if all(k in table for table in tables.values())]
    if not keys:
        raise KelibError(f"table {name} has none of its keys {listing(layout_of(name).keys, 99)}")
    for which, table in tables.items():
        refuse_duplicates(table, keys, f"{which} {name}")
    return keys


def is_exact(column: str, *values: pd.Series) -> bool:
    """Whether a column must be the same in every run: one of :data:`EXACT`, or no number."""
    numbers = (
        pd.api.types.is_numeric_dtype(side) and not pd.api.types.is_bool_dtype(side)
        for side in values
    )
    return column in EXACT or not all(numbers)


def is_ratio(column: str) -> bool:
    """Whether a column is a quotient (:data:`RATIOS`)."""
    return column.startswith(RATIOS)

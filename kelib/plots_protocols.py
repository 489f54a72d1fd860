"""Protocols of continual learning side by side (Tables 1 and 2, Fig. 13): what a profile has of
them, the runs that follow each, tables by stage, and what the paper printed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from kelib.config import PROTOCOL, Continual, Variant
from kelib.errors import KelibError, listing
from kelib.plots_learning import by_seed
from kelib.trends import interval_words, over_seeds

BASELINE = "baseline"
MISSING = "–"

# Tables 1 and 2 of the paper: OLMo-1B continued on PubMed, one run each. A and F in percent, K
# (nats per *padded* position) and P (percent) after continual learning, by stage; the keys are
# batch size, peak learning rate and epochs.
PAPER_STAGES = (118, 369, 554, 738)  # thousands of steps
PAPER = {
    (128, 4e-4, 1): (
        (25.2, 24.8, 21.4, 18.8),
        (10.5, 12.9, 17.0, 19.5),
        (-0.281, -0.280, -0.293, -0.301),
        (54.0, 54.6, 52.8, 52.0),
    ),
    (128, 1e-3, 1): (
        (17.3, 15.7, 10.7, 5.0),
        (16.7, 20.3, 23.0, 23.5),
        (-0.310, -0.314, -0.332, -0.353),
        (50.3, 49.9, 49.0, 49.4),
    ),
    (128, 1e-4, 1): (
        (21.6, 23.0, 23.7, 22.6),
        (2.4, 3.2, 4.6, 7.3),
        (-0.294, -0.287, -0.284, -0.287),
        (58.9, 60.7, 60.6, 59.9),
    ),
    (2048, 4e-4, 1): (
        (8.9, 7.8, 1.0, -92.2),
        (2.2, 3.5, 5.5, 44.9),
        (-0.342, -0.344, -0.368, -0.714),
        (59.0, 60.5, 60.1, 35.6),
    ),
    (128, 4e-4, 3): (
        (28.8, 28.0, 25.9, 24.5),
        (14.8, 17.4, 20.1, 23.1),
        (-0.267, -0.268, -0.276, -0.280),
        (51.4, 51.7, 50.8, 49.7),
    ),
}


def _names(size: int, rate: float, epochs: int, base: tuple[int, float]) -> tuple[str, str]:
    """(protocol, kind): what departs from the batch size and rate of ``base`` and one epoch."""
    parts = []
    if size != base[0]:
        parts.append((f"batch {size} (x {size / base[0]:.2g})", "batch"))
    if epochs > 1:
        parts.append((f"{epochs} epochs", "epochs"))
    if rate != base[1]:
        parts.append((f"rate {rate:g} (x {rate / base[1]:.2g})", f"rate x {rate / base[1]:.2g}"))
    if not parts:
        return BASELINE, BASELINE
    names, kinds = zip(*parts, strict=True)
    return ", ".join(names), ", ".join(kinds)


def paper_table() -> pd.DataFrame:
    """Tables 1 and 2 of the paper, a row for each protocol and stage, in its order.

    Columns protocol and kind (as of :func:`protocols`), seed (0: one run), stage_step (of OLMo-1B),
    acquisition, forgetting, p_cl (fractions), k_cl (nats per padded position: not comparable with K
    per target token), and what these imply by the definitions of A and F: k_pt = k_cl / (1 - A) and
    p_pt = p_cl / (1 - F).
    """
    base = next(iter(PAPER))[:2]
    rows = [
        (*_names(*setting, base), 0, 1000 * stage, a / 100, f / 100, k, p / 100)
        for setting, columns in PAPER.items()
        for stage, a, f, k, p in zip(PAPER_STAGES, *columns, strict=True)
    ]
    columns = ["protocol", "kind", "seed", "stage_step", "acquisition", "forgetting"]
    table = pd.DataFrame(rows, columns=[*columns, "k_cl", "p_cl"])
    before = {"k_pt": table["k_cl"] / (1 - table["acquisition"])}
    before["p_pt"] = table["p_cl"] / (1 - table["forgetting"])
    return table.assign(**before)


def text_variant(plan: Continual, text: str) -> Variant:
    """The variant of ``plan`` that reads ``text`` and else follows the protocol.

    Raises KelibError if there is none, naming those that there are.
    """
    for variant in plan.variants:
        if variant == Variant(variant.name, variant.learning_rates, variant.seeds, text):
            return variant
    raise KelibError(
        f"no variant of continual learning differs from the protocol by text: {text} alone; there "
        f"are {listing(v.name for v in plan.variants)}: add one to continual.variants of the "
        "profile and run stage 3"
    )


def protocols(plan: Continual) -> pd.DataFrame:
    """What Table 1 compares: the first learning rate (baseline), every other one, then variants
    that differ in nothing but batch, steps, epochs and rate.

    Columns protocol (named by how it departs from the baseline), kind (the same without sizes, for
    a look shared with the paper's; rates relative to the baseline), variant, learning_rate,
    batch_size (sequences), epochs, steps, sequences (read in all); a row each.
    """
    runs = [(PROTOCOL, rate, plan.batch_size, 1, plan.steps) for rate in plan.learning_rates]
    for v in plan.variants:
        size, steps = v.batch_size or plan.batch_size, v.steps or plan.steps
        rest = dataclasses.replace(v, batch_size=None, steps=None, epochs=1)
        if rest == Variant(v.name, v.learning_rates, v.seeds):
            runs += [(v.name, rate, size, v.epochs, steps) for rate in v.learning_rates]
    rows = []
    for variant, rate, size, epochs, steps in runs:
        names = _names(size, rate, epochs, (plan.batch_size, plan.learning_rates[0]))
        if size * steps != plan.batch_size * plan.steps * epochs:  # another amount of text
            names = (f"{names[0]}, {steps} steps", f"{names[1]}, {steps} steps")
        rows.append((*names, variant, rate, size, epochs, steps, size * steps))
    columns = ["protocol", "kind", "variant", "learning_rate", "batch_size", "epochs", "steps"]
    return pd.DataFrame(rows, columns=[*columns, "sequences"])


def protocol_runs(tables: Iterable[pd.DataFrame], named: pd.DataFrame) -> pd.DataFrame:
    """Injected runs of ``tables`` (continual, variants) that follow one of :func:`protocols`, with
    the columns protocol and kind, in that order.

    Raises KelibError if no run follows one of them.
    """
    runs = pd.concat(tables, ignore_index=True)
    runs = runs[runs["injected"].astype(bool)]
    keys = ["variant", "learning_rate"]
    runs = named[["protocol", "kind", *keys]].merge(runs, on=keys, how="left")
    if absent := runs.loc[runs["seed"].isna(), "protocol"].tolist():
        raise KelibError(
            f"no run with injection follows the protocol {listing(absent)}: "
            "run stage 3 of the profile"
        )
    return runs.astype({"seed": int, "stage_step": int, "cl_seed": int})


def stages_table(
    runs: pd.DataFrame,
    value: str,
    by: str,
    stages: Mapping[int, str],
    scale: float = 1,
    decimals: int = 1,
) -> pd.DataFrame:
    """``value`` times ``scale`` as text, a row for each key of column ``by`` (in their order) and a
    column for each of ``stages`` (step -> heading, of which several lines become one).

    A cell is the mean over pretraining seeds ± half of its 95 % t interval, or the mean alone where
    there is none; CL seeds are averaged inside a pretraining seed. :data:`MISSING` where nothing
    was measured or the value is not defined.
    """
    means = over_seeds(by_seed(runs, [value], [by]), value, [by, "stage_step"])
    numbers = scale * means[["mean", "low", "high"]]
    texts = [_text(mean, high - mean, decimals) for mean, _, high in numbers.to_numpy()]
    cells = pd.Series(texts, index=pd.MultiIndex.from_frame(means[[by, "stage_step"]])).unstack()
    wide = cells.reindex(index=list(dict.fromkeys(runs[by])), columns=list(stages)).fillna(MISSING)
    heads = [heading.replace("\n", " ") for heading in stages.values()]
    return wide.set_axis(heads, axis=1).rename_axis(index=by).reset_index()


def stages_tables(
    runs: pd.DataFrame,
    by: str,
    stages: Mapping[int, str],
    columns: Mapping[str, tuple[str, float, int]],
) -> dict[str, pd.DataFrame]:
    """Title -> :func:`stages_table` for each of ``columns``: value -> (title, scale, decimals)."""
    return {
        title: stages_table(runs, value, by, stages, scale, decimals)
        for value, (title, scale, decimals) in columns.items()
    }


def _text(mean: float, half: float, decimals: int) -> str:
    if np.isnan(mean):
        return MISSING
    text = f"{round(mean, decimals) + 0.0:.{decimals}f}"  # no -0
    return text if np.isnan(half) else f"{text} ± {half:.{decimals}f}"


def cut_below(ax: Axes, low: float, decimals: int = 1) -> Axes:
    """End the vertical axis at ``low``, so that what lies far below does not flatten the rest; the
    marked means below are named by their value at the edge.
    """
    bars: Any  # containers of errorbar have no type of their own
    for bars in ax.containers:
        line = bars.lines[0]
        for x, y in line.get_xydata():
            if y < low:
                place: dict[str, Any] = {
                    "xycoords": ax.get_xaxis_transform(),
                    "textcoords": "offset points",
                }
                place |= {"xytext": (-4, 6), "ha": "right", "fontsize": 7}
                text = f"{y:.{decimals}f} ↓"
                ax.annotate(text, (x, 0), color=line.get_color(), **place)
    ax.set_ylim(bottom=low)
    return ax


def lines_note(n: int) -> str:
    """What thin lines, marks and bars by stage are, for ``n`` pretraining seeds."""
    if n < 2:
        return "One pretraining seed (n = 1): no interval over seeds."
    note = f"Thin: single pretraining seeds; marked: their mean; bars: {interval_words(n)}"
    # t is 12.7 for two seeds, 4.3 for three: axes end where the seeds do
    return f"{note}." if n > 3 else f"{note} (cut at the axes)."

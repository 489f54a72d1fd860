"""From finished runs to tidy tables. No model is loaded here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kelib.items import accuracy_interval, gain_interval
from kelib.metrics import acquisition, forgetting, forgetting_over_chance
from kelib.run import Run
from kelib.study import Study
from kelib.tables import stack_coefficients

CHANCE = 0.25
QUANTILES = (5, 25, 50, 75, 95)  # per cent of the mentions of names


def pretraining_table(study: Study, every: int = 25) -> pd.DataFrame:
    """Training loss (nats per token, mean of ``every`` steps) along pretraining, per model and
    seed."""
    rows = []
    for model in study.models:
        for seed in study.profile.seeds:
            losses = np.array(study.pretrain_run(seed, model).read("losses.json"))
            for end in range(every, len(losses) + 1, every):
                rows.append((model, seed, end, losses[end - every : end].mean()))
    return pd.DataFrame(rows, columns=["model", "seed", "step", "loss"])


def entropy_tables(study: Study) -> dict[str, pd.DataFrame]:
    """Tables by name, gathered from the runs of every checkpoint.

    entropies: every entropy by model, seed, step, data, kind, coefficient and layer (nats);
    entropy: of those the study's own measure, knowledge entropy of its model on the mixture;
    panel: the plasticity panel; convergence: H by the number of sequences, near the stages.
    """
    found: dict[str, list[pd.DataFrame]] = {"entropies": [], "panel": [], "convergence": []}
    for model in study.models:
        for seed in study.profile.seeds:
            for step in study.profile.pretraining.checkpoints:
                run = study.entropy_run(seed, step, model)
                for name, parts in found.items():
                    if name != "convergence" or run.settings["converge"]:
                        part = run.read_table(f"{name}.csv")
                        if "data" in part:  # before what is measured on it
                            part.insert(0, "data", part.pop("data"))
                        for column, value in (("step", step), ("seed", seed), ("model", model)):
                            part.insert(0, column, value)
                        parts.append(part)
    tables = {name: pd.concat(parts, ignore_index=True) for name, parts in found.items()}
    wanted = {"model": study.models[0], "data": "mixture", "kind": "knowledge"}
    rows = tables["entropies"]
    own = (rows[list(wanted)] == list(wanted.values())).all(axis=1)
    rows = rows[own & (rows["coefficient"] == "absolute")]
    columns = ["seed", "step", "layer", "entropy_nats", "bound_nats"]
    return {"entropy": rows[columns].reset_index(drop=True), **tables}


def checkpoints_table(study: Study) -> pd.DataFrame:
    """Knowledge, accuracy and losses by seed and step."""
    p = study.profile
    per_step = p.pretraining.batch_size * p.corpus.sequence_length
    rows = []
    for seed in p.seeds:
        for step in p.pretraining.checkpoints:
            result, tokens = study.evaluate_run(seed, step).read(), step * per_step
            row = {"seed": seed, "step": step, "share": step / p.pretraining.steps}
            row |= {"tokens": tokens, "tokens_per_parameter": tokens / result["parameters"]}
            rows.append({**row, **result})
    return pd.DataFrame(rows)


def entities_table(study: Study) -> pd.DataFrame:
    """How well names are predicted, a row by seed, step (the checkpoints near the stages) and data
    (general or domain).

    The columns of :func:`perplexities`, then outside_tokens and outside_nats_per_token: the tokens
    of no name in the same sequences.
    """
    keys, rows = ["step", "data"], []
    place: Any  # rows have no types of their own
    for seed in study.profile.seeds:
        run = study.entities_run(seed)
        mentions = run.read_table("mentions.csv").groupby(keys)
        for place in run.read_table("outside.csv").itertuples(index=False):
            at = (place.step, place.data)
            found = mentions.get_group(at) if at in mentions.groups else mentions.head(0)
            row = {"seed": seed, "step": place.step, "data": place.data, **perplexities(found)}
            row["outside_tokens"] = place.tokens
            row["outside_nats_per_token"] = place.nats / place.tokens if place.tokens else np.nan
            rows.append(row)
    return pd.DataFrame(rows)


def perplexities(mentions: pd.DataFrame) -> dict[str, float]:
    """The mentions of names in one text, in one row; the perplexity of a mention is
    exp(nats / tokens).

    ``mentions`` has columns name, tokens, nats, a row each. Returned are mentions and names (how
    many, and how many distinct ones), tokens_per_mention, nats_per_token (over all their tokens),
    perplexity_05 to perplexity_95 (quantiles over mentions, interpolated in ln perplexity),
    ln_perplexity_mean and ln_perplexity_sd (over mentions). NaN where there are too few.
    """
    tokens, nats = (mentions[name].to_numpy(dtype=float) for name in ("tokens", "nats"))
    logs = pd.Series(nats / tokens)
    row: dict[str, float] = {"mentions": len(mentions), "names": mentions["name"].nunique()}
    row["tokens_per_mention"] = mentions["tokens"].mean() if len(mentions) else np.nan
    row["nats_per_token"] = nats.sum() / tokens.sum() if len(mentions) else np.nan
    row |= {f"perplexity_{q:02d}": float(np.exp(logs.quantile(q / 100))) for q in QUANTILES}
    return row | {"ln_perplexity_mean": logs.mean(), "ln_perplexity_sd": logs.std()}


def save_coefficients(study: Study) -> list[Path]:
    """Mean coefficients of every checkpoint, a safetensors file a seed (tensors ``step/layer``).

    Returns the paths. Raises KelibError for a run's file that is not what it wrote.
    """
    written, name = [], "coefficients.safetensors"
    for seed in study.profile.seeds:
        runs = {s: study.entropy_run(seed, s) for s in study.profile.pretraining.checkpoints}
        for run in runs.values():
            run.check([name])
        written.append(study.measurements / f"coefficients-seed{seed}.safetensors")
        stack_coefficients({s: run.folder / name for s, run in runs.items()}, written[-1])
    return written


def continual_table(
    study: Study,
    grid: Iterable[tuple[str, Run]],
    checkpoints: pd.DataFrame,
    entropy: pd.DataFrame,
) -> pd.DataFrame:
    """One row per continual-learning run: before (``_pt``), after (``_cl``), A, F and settings.

    ``_pt`` is the checkpoint as pretrained; after an intervention ``_modified`` is the changed
    model before continual learning, and ``acquisition_modified`` / ``forgetting_modified`` take it
    as the baseline. ``k_gain_low`` to ``p_change_high`` bound K_CL - K_PT over the entries and
    P_CL - P_PT over the questions of that one run, see :mod:`kelib.items`.
    """
    before = checkpoints.set_index(["seed", "step"])
    labels = {seed: study.stages(entropy, seed) for seed in study.profile.seeds}
    totals = entropy.groupby(["seed", "step"])["entropy_nats"].sum()
    rows = []
    for variant, run in grid:
        s = run.settings
        place = (s["seed"], s["step"])
        names = {step: label for label, step in labels[s["seed"]].items()}
        # a variant or an arm may begin where the protocol does not
        label = names.get(s["step"], f"{s['step'] / study.profile.pretraining.steps:.0%}")
        start = {**before.loc[place], "entropy": totals[place]}
        row = learning_row(run, start, study.evaluate_run(*place), label, variant)
        if s["intervention"] is not None:
            modified = study.intervene_run(*place, s["intervention"]).read()
            measured = [name.removesuffix("_cl") for name in row if name.endswith("_cl")]
            row |= {f"{name}_modified": modified[name] for name in measured}
            row |= {name: modified[name] for name in modified if name.startswith("weights_")}
        rows.append(row)
    return learning_table(rows)


def learning_row(
    run: Run, start: Mapping[str, Any], evaluated: Run, label: str, variant: str
) -> dict[str, Any]:
    """The columns of :func:`continual_table` that need no other row, for one run.

    ``start`` has what is known of the checkpoint it began from (its entropy among it), and
    ``evaluated`` is the run that measured that one.
    """
    s, after = run.settings, run.read()
    after.pop("losses")
    change = s["intervention"] or {"name": "none"}
    row = {
        "seed": s["seed"],
        "stage_step": s["step"],
        "stage_label": label,
        "variant": variant,
        "learning_rate": s["learning_rate"],
        "cl_seed": s["cl_seed"],
        "injected": s["injected"],
        "intervention": change["name"],
        "ratio": change.get("ratio", np.nan),
        "factor": change.get("factor", np.nan),
        "chance": CHANCE,
        "tokens_per_parameter": start["tokens_per_parameter"],
    }
    row |= {f"{name}_pt": start[name] for name in after}
    row |= {f"{name}_cl": value for name, value in after.items()}
    return row | _item_intervals(evaluated, run)


def learning_table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Rows of :func:`learning_row` in order, with A, F and F over chance."""
    keys = ["seed", "stage_step", "variant", "learning_rate", "intervention", "ratio", "factor"]
    table = pd.DataFrame(rows).sort_values([*keys, "cl_seed", "injected"], ignore_index=True)
    table["acquisition"] = acquisition(table["k_pt"], table["k_cl"])
    table["forgetting"] = forgetting(table["p_pt"], table["p_cl"])
    # NaN where a model knows no more than chance, so that there is nothing to forget
    table["forgetting_over_chance"] = forgetting_over_chance(table["p_pt"], table["p_cl"], CHANCE)
    if "k_modified" in table:
        changed = table["k_modified"].notna()  # runs without intervention may stand in between
        t = table[changed]
        table.loc[changed, "acquisition_modified"] = acquisition(t["k_modified"], t["k_cl"])
        table.loc[changed, "forgetting_modified"] = forgetting(t["p_modified"], t["p_cl"])
    return table


def _item_intervals(before: Run, after: Run) -> dict[str, float]:
    """95 % bounds of the change from the checkpoint, over the entries and questions of the run."""
    one, two = (
        [run.read_table(f"{n}.csv") for n in ("probes", "questions")] for run in (before, after)
    )
    found = {"k_gain": gain_interval(one[0], two[0]), "p_change": accuracy_interval(one[1], two[1])}
    return {
        f"{name}_{end}": getattr(interval, end)
        for name, interval in found.items()
        for end in ("low", "high")
    }


def curves_table(grid: Iterable[tuple[str, Run]]) -> pd.DataFrame:
    """Knowledge along continual learning, before and after every injection, where it was
    scored.
    """
    names = ("seed", "step", "learning_rate", "cl_seed", "injected")
    parts = []
    for _, run in grid:
        if run.settings["curve"]:
            head = {name: run.settings[name] for name in names}
            head["stage_step"] = head.pop("step")
            table = run.read_table("curve.csv")
            parts.append(table.assign(**head)[[*head, *table.columns]])
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()

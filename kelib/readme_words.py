"""What came out of every figure, in a few words for the README, from the reference tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from kelib.contrasts import judged_contrasts
from kelib.results import Tables
from kelib.study import peak_step


def in_words(name: str, tables: Tables) -> str:
    """Our number of one figure, in a few words."""
    if name == "fig02_knowledge_entropy":
        entropy = tables.table("entropy")
        total = entropy.groupby(["seed", "step"])["entropy_nats"].sum()
        change = [total[s].iloc[-1] - total[s][peak_step(entropy, s)] for s in tables.seeds]
        return f"{np.mean(change):+.2f} nats after the peak{_of_seeds(change)}"
    if name in _WORDS:
        return _WORDS[name](tables)
    if name in _CONTRASTS:
        return _contrast_words(tables, name)
    if name in _IN_THE_NOTEBOOK:
        return _IN_THE_NOTEBOOK[name]
    if name == "ours_convergence":
        rows = tables.table("convergence")
        rows = rows[rows["step"] == rows["step"].max()].groupby("sequences")["mean"].mean()
        near = int(rows.index[np.abs(rows.index - 128).argmin()])
        return f"{near} sequences: {rows[near] - rows.iloc[-1]:+.3f} nats from {rows.index[-1]:,}"
    if name in ("ours_trajectory", "ours_published_stages"):
        return f"`{tables.name}`: untrained models, its numbers mean nothing"
    if name == "ours_published":
        rows = tables.table("totals").query("kind == 'knowledge' and coefficient == 'absolute'")
        shares = 100 * rows["entropy_nats"] / rows["bound_nats"]
        parts = [f"{data} {share:.1f}" for data, share in zip(rows["data"], shares, strict=True)]
        return f"SmolLM2-135M, % of the bound: {', '.join(parts)}"
    return _entropies_words(name, tables)


# figures whose words here are of one published model, or of models that mean nothing
_OF_ONE = {
    "ours_published": "smollm2",
    "ours_trajectory": "trajectory_smoke",
    "ours_published_stages": "trajectory_smoke",
}


def number_in_words(name: str, tables: Tables) -> str | None:
    """:func:`in_words` for tables of any profile; None where it says no number of theirs."""
    if name in _IN_THE_NOTEBOOK or _OF_ONE.get(name, tables.name) != tables.name:
        return None
    return in_words(name, tables)


def _of_seeds(changes: list[float]) -> str:
    return f", down in {sum(c < 0 for c in changes)} of {len(changes)} seeds"


def _entropies_words(name: str, tables: Tables) -> str:
    """Change from the peak of the model's knowledge entropy on the mixture to the end, nats."""
    rows = tables.table("entropies")
    models = list(dict.fromkeys(rows["model"]))
    mixture = (rows["data"] == "mixture") & (rows["coefficient"] == "absolute")
    plain = mixture & (rows["kind"] == "knowledge")
    chosen, by = {
        "fig03_attention_next_token": (mixture & (rows["kind"] != "knowledge"), "kind"),
        "fig06_other_family": (plain & (rows["model"] == models[-1]), "model"),
        "fig07_data_sets": (
            (rows["kind"] == "knowledge") & (rows["coefficient"] == "absolute"),
            "data",
        ),
        "fig08_layers": (plain, "layer"),
        "fig09_definitions": (
            (rows["kind"] == "knowledge") & (rows["data"] == "mixture"),
            "coefficient",
        ),
    }[name]
    model = models[-1] if name == "fig06_other_family" else models[0]
    chosen &= rows["model"] == model
    steps = {}
    for seed in tables.seeds:
        own = rows[plain & (rows["model"] == model) & (rows["seed"] == seed)]
        steps[seed] = peak_step(own, seed), int(own["step"].max())
    parts = []
    for value, group in rows[chosen].groupby(by, sort=False):
        total = group.groupby(["seed", "step"])["entropy_nats"].sum()
        change = [total[seed][last] - total[seed][peak] for seed, (peak, last) in steps.items()]
        label = f"layer {value + 1}" if by == "layer" else str(value).replace("_", "-")
        parts.append(f"{label} {np.mean(change):+.2f}")
    return "; ".join(parts) + " nats after the peak"


def _ends(tables: Tables, values: list[str], name: str = "continual") -> pd.DataFrame:
    """Means of ``values`` at the first and the last stage, injected runs of the first CL rate."""
    runs = tables.table(name)
    rate = tables.profile.continual.learning_rates[0]
    runs = runs[runs["injected"] & (runs["learning_rate"] == rate)]
    return runs.groupby("stage_step")[values].mean().iloc[[0, -1]]


def _first_rate(tables: Tables) -> str:
    return f"CL rate {tables.profile.continual.learning_rates[0]:g}"


def _arrow(values: pd.Series, decimals: int = 1, scale: float = 100) -> str:
    return f"{scale * values.iloc[0]:.{decimals}f} → {scale * values.iloc[1]:.{decimals}f}"


def _overview_words(tables: Tables) -> str:
    ends = _ends(tables, ["entropy_pt", "acquisition", "forgetting"])
    first, last = ends.iloc[0], ends.iloc[1]
    entropy = f"entropy {last['entropy_pt'] - first['entropy_pt']:+.2f} nats"
    moves = [100 * (last[name] - first[name]) for name in ("acquisition", "forgetting")]
    changes = f"{entropy}, A {moves[0]:+.1f}, F {moves[1]:+.1f} points"
    from kelib.plots_overview import stage_verdicts  # with matplotlib, which others need not

    verdict = " and ".join(dict.fromkeys(stage_verdicts(tables).values()))
    return f"{_first_rate(tables)}, last minus first stage: {changes} (A and F {verdict})"


def _stages_words(tables: Tables) -> str:
    ends = _ends(tables, ["acquisition", "forgetting_over_chance"])
    acquired, lost = _arrow(ends["acquisition"]), _arrow(ends["forgetting_over_chance"])
    return f"{_first_rate(tables)}: A {acquired} %, F over chance {lost} %"


def _sets_words(tables: Tables) -> str:
    sets = ("once", "paraphrase")
    ends = _ends(tables, [f"k_{name}_{when}" for name in sets for when in ("pt", "cl")])
    gains = [_arrow(ends[f"k_{n}_cl"] - ends[f"k_{n}_pt"], 2, 1) for n in sets]
    return f"{_first_rate(tables)}: K gain once {gains[0]}, paraphrase {gains[1]} nats"


def _entities_words(tables: Tables) -> str:
    rows = tables.table("entities")
    means = rows.groupby(["data", "step"])[["ln_perplexity_mean", "ln_perplexity_sd"]].mean()
    apart: pd.DataFrame = means.loc["domain"] - means.loc["general"]  # type: ignore[assignment]
    ends = apart.iloc[[0, -1]]
    higher, wider = (_arrow(ends[name], 2, 1) for name in means.columns)
    return f"ln perplexity of names, domain minus general: mean {higher}, s.d. {wider}"


def _before_after_words(tables: Tables) -> str:
    ends = _ends(tables, ["k_pt", "k_cl", "p_pt", "p_cl"])
    knows = f"K {_arrow(ends['k_pt'], 2, 1)} before, {_arrow(ends['k_cl'], 2, 1)} after"
    tasks = f"P {_arrow(ends['p_pt'])} % before, {_arrow(ends['p_cl'])} % after"
    return f"{_first_rate(tables)}: {knows}; {tasks}"


def _corpora_words(tables: Tables) -> str:
    plan = tables.profile.continual
    (other,) = [v.name for v in plan.variants if v.text == "general"]
    runs = pd.concat([tables.table("continual"), tables.table("variants")])
    runs = runs[runs["injected"] & (runs["learning_rate"] == plan.learning_rates[0])]
    parts = []
    for label, name in (("domain", runs["variant"].iloc[0]), ("general", other)):
        ends = runs[runs["variant"] == name].groupby("stage_step")["acquisition"].mean()
        parts.append(f"{label} {100 * (ends.iloc[-1] - ends.iloc[0]):+.1f}")
    return f"{_first_rate(tables)}, A first to last: {', '.join(parts)} points"


def _release_words(tables: Tables) -> str:
    runs = tables.table("continual")
    found = [f"{runs[name].mean():.2f}" for name in ("k_pt", "k_padded_pt")]
    return f"K before CL {found[0]} nats per target token, {found[1]} per padded position"


def _resuscitation_words(tables: Tables) -> str:
    rate, rows = tables.profile.continual.learning_rates[0], tables.table("interventions")
    arms = rows[rows["learning_rate"] == rate].assign(q=rows["factor"].fillna(0))
    after = arms.groupby("q")[["k_cl", "p_cl"]].mean()
    gain = after.loc[1.0] - after.loc[0.0]
    woken = f"K {gain['k_cl']:+.3f} nats, P {100 * gain['p_cl']:+.1f} points"
    return f"{_first_rate(tables)}: q = 1 minus original, {woken}"


_WORDS: dict[str, Callable[[Tables], str]] = {
    "fig01_overview": _overview_words,
    "fig04_stages": _stages_words,
    "fig05_resuscitation": _resuscitation_words,
    "fig10_entities": _entities_words,
    "fig11_once_paraphrase": _sets_words,
    "fig12_before_after": _before_after_words,
    "fig13_corpora": _corpora_words,
    "ours_release": _release_words,
}


def _contrast_words(tables: Tables, figure: str) -> str:
    """Means and intervals of exploratory contrasts, each behind its words."""
    found = judged_contrasts(tables, DECLARED.get(figure, "contrasts")).set_index("contrast")
    parts = []
    row: Any  # columns have no types of their own
    for name, words in _CONTRASTS[figure].items():
        row = found.loc[name]
        text = row["outcome"] if pd.isna(row["mean"]) else f"{row['mean']:+.3f} {row['unit']}"
        interval = f" [{row['low95']:+.3f}, {row['high95']:+.3f}]" if pd.notna(row["low95"]) else ""
        parts.append(f"{words} {text}{interval}")
    return "; ".join(parts)


# figure -> where its contrasts are declared, in notebooks/params
DECLARED = {"ours_contrasts": "contrasts", "ours_regimes": "contrasts_regimes"}
_CONTRASTS = {  # figure -> the contrasts that say most about it, with words for each
    "ours_interventions": {"preserving_knowledge": "K_CL, function-preserving minus original"},
    "ours_gradient_shares": {
        "gradient_share": "most active tenth, share of the gradient of V, last minus first stage",
        "gradient_against_update": "of the gradient minus of the update",
    },
    "ours_sensitivity": {"noise_sensitivity": "loss under 10 % noise, last minus first stage"},
    "ours_retention": {"retention_stage": "part retained, last minus first stage"},
    "ours_reactivation": {"woken_knowledge": "K without woken minus without random memories"},
    "fig14_whole_pretraining": {"early_gain": "K gain, first stage after the peak minus earliest"},
    "fig15_ratio": {"most_ratio_knowledge": "K_CL, p = 90 % minus 50 %"},
    "fig18_attention_temperature": {"temperature_knowledge": "K_CL, T = 1.5 minus q = 1"},
    "ours_annealing": {"annealed_gain": "K gain, end of pretraining minus annealed from 25 %"},
    "ours_weight_decay": {
        "decay_entropy": "entropy, weight decay 3 minus 0",
        "decay_gain": "K gain",
    },
    "ours_regimes": {
        "regime_entropy": "entropy at the end, weight decay 3 minus 0",
        "regime_gain": "K gain",
        "cooled_gain": "K gain at a constant rate, cooled down, last minus first stage",
    },
    "ours_confounds": {"own_moments_gain": "K gain last minus first stage, own moments"},
}
_IN_THE_NOTEBOOK = {
    "ours_contrasts": "the table above",
    "ours_correlations": "by outcome in the notebook",
    "ours_memory_sources": "by stage in the notebook",
    "fig16_resuscitation_stages": "by stage in the notebook",
    "tab00_claims": "the table above",
    "ours_plasticity_panel": "correlations in the notebook",
    "tab01_protocols": "the tables in the notebook",
    "ours_learning_curves": "what is gained at injections and lost between them",
    "ours_probe_levels": "by level in the notebook",
    "ours_task_forgetting": "by task in the notebook",
}

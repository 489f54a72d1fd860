"""The generated parts of the README: what the committed reference says, beside the paper."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kelib.config import Profile, load_profile
from kelib.errors import KelibError, listing
from kelib.published import load_published, published_profiles
from kelib.results import Tables, open_tables
from kelib.study import peak_step
from kelib.tables import read_provenance, write_atomically

START, END = "<!-- generated: {name} -->", "<!-- end of {name} -->"


def claims_markdown(claims: pd.DataFrame) -> str:
    """The primary claims as a Markdown table, one row per claim and learning rate."""
    lines = [
        "| claim | CL rate | n | effect | 95 % interval | verdict | the paper |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    row: Any  # columns have no types of their own
    shown = claims[claims["primary"] & (claims["verdict"] != "not run")]
    for row in shown.itertuples():
        interval = "none" if pd.isna(row.low95) else f"{row.low95:+.3f} … {row.high95:+.3f}"
        why = f" ({row.reason})" if row.verdict == "not testable here" else ""
        effect = "" if pd.isna(row.mean) else f"{row.mean:+.3f} {row.unit}"
        lines.append(
            f"| {row.statement} | {row.learning_rate:g} | {row.n} | {effect} | {interval} "
            f"| {row.verdict}{why} | {row.paper_value} |"
        )
    return "\n".join(lines)


def replace_generated(text: str, name: str, content: str) -> str:
    """Replace what stands between the two markers called ``name``. KelibError if they are not
    there.
    """
    start, end = START.format(name=name), END.format(name=name)
    pattern = re.compile(re.escape(start) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(text):
        found = re.findall(r"<!-- generated: (\S+) -->", text)
        raise KelibError(f"no markers {start} … {end}; found {listing(found)}")
    return pattern.sub(lambda _: f"{start}\n{content}\n{end}", text)


def controls_markdown(tables: Tables) -> str:
    """The gain in K that is due to injection, first to last stage, at every CL rate."""
    runs = tables.table("continual")
    keys = ["learning_rate", "stage_step"]
    # pairs of the same CL seed: not every seed need have a control
    pairs = runs.pivot_table(index=["seed", *keys, "cl_seed"], columns="injected", values="k_cl")
    means = pairs.dropna().groupby(keys).mean()
    gain = means[True] - means[False]
    parts = []
    swept = set(runs["learning_rate"])
    for rate in (r for r in tables.profile.continual.learning_rates if r in swept):
        ends = gain[rate].sort_index()
        parts.append(f"{ends.iloc[0]:.2f} → {ends.iloc[-1]:.2f} at {rate:g}")
    return (
        "**Control.** K after continual learning minus K after the same run without injected "
        f"passages, first → last stage (nats per target token, by CL rate): {', '.join(parts)}. "
        "Where K_CL - K_PT falls and this does not, the fall alone does not show that less was "
        "acquired from the passages: the domain text undid more as well."
    )


def protocol_markdown(profile: Profile) -> str:
    """What differs from the paper's protocol by scale, in one table."""
    plan, corpus, world = profile.continual, profile.corpus, profile.corpus.world
    length, entries = corpus.sequence_length, world.once_entries + world.paraphrase_entries
    shown = plan.injections * world.paraphrase_entries + world.once_entries
    share = shown / (plan.steps * plan.batch_size)
    size = (
        f"{profile.pretraining.steps * profile.pretraining.batch_size * length / 1e6:.1f}M tokens"
    )
    rows = [
        ("pretraining", f"{size}, {_seeds(profile)}", "about 3T tokens, published checkpoints"),
        ("pretraining text", f"{corpus.facts_share:.0%} generated facts, rest real", "Dolma"),
        (
            "entropy measured on",
            f"{corpus.entropy_sequences} x {length} tokens, held-apart documents of the mixture",
            "2,048 x 2,048 tokens of the training data",
        ),
        (
            "continual learning",
            f"{plan.steps} steps of {plan.batch_size} x {length} tokens",
            "1,600 steps of 128 x 1,024 tokens",
        ),
        (
            "injected",
            f"{entries} generated entries, every {plan.steps // plan.injections} steps, "
            f"{share:.1%} of the sequences",
            "130 entries of Fictional Knowledge, every 160 steps, 0.4 % of the sequences",
        ),
        (
            "tasks (P)",
            "six, recall of the generated facts, 4 choices",
            "six public ones, zero-shot",
        ),
    ]
    lines = [f"| | here (`{profile.profile}`) | the paper (OLMo-1B) |", "| --- | --- | --- |"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _seeds(profile: Profile) -> str:
    return "one seed" if len(profile.seeds) == 1 else f"{len(profile.seeds)} seeds"


FIGURES = {
    "fig02_knowledge_entropy": ("2", "about -0.5 nats"),
    "fig03_attention_next_token": ("3", "both fall, next-token about 2.8 to 2.4 nats"),
    "fig04_stages": ("4", "A 25.2 → 18.8 %, F (raw) 10.5 → 19.5 %"),
    "fig05_resuscitation": ("5", "both up, P at most 0.5 points"),
    "fig06_other_family": ("6", "falls in Pythia too"),
    "fig07_data_sets": ("7", "falls on C4, PubMed and Dolma"),
    "fig08_layers": ("8", "falls in every layer, most in the last"),
    "fig09_definitions": ("9", "falls by the ReLU definition too, about -0.8 nats"),
    "ours_convergence": ("ours", "not reported"),
    "ours_plasticity_panel": ("ours", "not reported"),
    "ours_smollm2": ("ours", "OLMo-1B 99.5 % of its bound, other text"),
    "tab00_claims": ("claims", "no intervals reported"),
}


def figures_markdown(opened: Callable[[str], Tables | None]) -> str:
    """Figure -> notebook -> target -> our number beside the paper's, from reference tables.

    ``opened`` gives the reference that a notebook shows, None where there is none yet.
    """
    lines = [
        "| figure | notebook | target | minutes | ours | the paper (OLMo-1B) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    counted: set[tuple[str, str]] = set()  # the minutes of a stage stand in its first figure only
    for name, (figure, paper) in FIGURES.items():
        tables = opened(name)
        if tables is None:
            continue
        stage = _STAGES.get(name, ())
        spent = f"{_minutes(tables, stage):.0f}"
        if stage and (tables.name, str(stage)) in counted:
            spent = "no more"
        counted.add((tables.name, str(stage)))
        target = f"`figures/{tables.name}/{name}.json`"
        link = f"[{name}](notebooks/{name}.ipynb)"
        lines.append(
            f"| {figure} | {link} | {target} | {spent} | {_ours(name, tables)} | {paper} |"
        )
    return "\n".join(lines)


_LEARNING = {"fig04_stages": ("continual",), "fig05_resuscitation": ("interventions",)}
_STAGES = {
    **{name: ("pretraining", "entropies", "checkpoints") for name in FIGURES},
    **_LEARNING,
    "ours_smollm2": ("texts",),
    "tab00_claims": (),
}


def _minutes(tables: Tables, names: tuple[str, ...]) -> float:
    # tables are the same for any number of workers, so it is not in their parameters
    loaded = load_published if tables.name in published_profiles() else load_profile
    workers = loaded(tables.name).workers
    notes = [read_provenance(tables.folder / f"{name}.csv") for name in names]
    return sum(note["run_seconds"] / min(workers, note["runs"]) for note in notes) / 60


def _ours(name: str, tables: Tables) -> str:
    """Our number of one figure, in a few words."""
    if name == "fig02_knowledge_entropy":
        entropy = tables.table("entropy")
        total = entropy.groupby(["seed", "step"])["entropy_nats"].sum()
        change = [total[s].iloc[-1] - total[s][peak_step(entropy, s)] for s in tables.seeds]
        return f"{np.mean(change):+.2f} nats after the peak{_of_seeds(change)}"
    if name == "fig04_stages":
        return _stages_words(tables)
    if name == "fig05_resuscitation":
        return _resuscitation_words(tables)
    if name in ("tab00_claims", "ours_plasticity_panel"):
        return "the table above" if name == "tab00_claims" else "correlations in the notebook"
    if name == "ours_convergence":
        rows = tables.table("convergence")
        rows = rows[rows["step"] == rows["step"].max()].groupby("sequences")["mean"].mean()
        near = int(rows.index[np.abs(rows.index - 128).argmin()])
        return f"{near} sequences: {rows[near] - rows.iloc[-1]:+.3f} nats from {rows.index[-1]:,}"
    if name == "ours_smollm2":
        rows = tables.table("totals").query("kind == 'knowledge' and coefficient == 'absolute'")
        shares = 100 * rows["entropy_nats"] / rows["bound_nats"]
        parts = [f"{data} {share:.1f}" for data, share in zip(rows["data"], shares, strict=True)]
        return f"SmolLM2-135M, % of the bound: {', '.join(parts)}"
    return _entropies_words(name, tables)


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


def _stages_words(tables: Tables) -> str:
    rate, runs = tables.profile.continual.learning_rates[0], tables.table("continual")
    runs = runs[runs["injected"] & (runs["learning_rate"] == rate)]
    ends = runs.groupby("stage_step")[["acquisition", "forgetting_over_chance"]].mean() * 100
    first, last = ends.iloc[0], ends.iloc[-1]
    acquired = f"A {first['acquisition']:.1f} → {last['acquisition']:.1f} %"
    kept = first["forgetting_over_chance"], last["forgetting_over_chance"]
    return f"CL rate {rate:g}: {acquired}, F over chance {kept[0]:.1f} → {kept[1]:.1f} %"


def _resuscitation_words(tables: Tables) -> str:
    rate, rows = tables.profile.continual.learning_rates[0], tables.table("interventions")
    arms = rows[rows["learning_rate"] == rate].assign(q=rows["factor"].fillna(0))
    after = arms.groupby("q")[["k_cl", "p_cl"]].mean()
    gain = after.loc[1.0] - after.loc[0.0]
    woken = f"K {gain['k_cl']:+.3f} nats, P {100 * gain['p_cl']:+.1f} points"
    return f"CL rate {rate:g}: q = 1 minus original, {woken}"


def refresh_readme(readme: Path, shown: str, opened: Callable[[str], Tables | None]) -> None:
    """Write the generated parts anew; claims, control and protocol are of the profile ``shown``."""
    text, tables = readme.read_text("utf-8"), open_tables(shown)
    claims = pd.read_csv(tables.figures / "tab00_claims.csv")
    text = replace_generated(text, "claims", claims_markdown(claims))
    text = replace_generated(text, "controls", controls_markdown(tables))
    text = replace_generated(text, "protocol", protocol_markdown(tables.profile))
    text = replace_generated(text, "figures", figures_markdown(opened))
    write_atomically(readme, text)

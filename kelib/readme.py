"""The generated parts of the README: what the committed reference says, beside the paper."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from kelib.changed_claims import JUDGED, declared, without_later_conditions
from kelib.config import Profile
from kelib.contrasts import judged_contrasts
from kelib.errors import KelibError, listing
from kelib.readme_faults import faults_markdown
from kelib.readme_figures import figures_markdown
from kelib.readme_words import DECLARED
from kelib.results import Tables, open_tables, read_figure_note
from kelib.tables import read_provenance, read_table, write_atomically

START, END = "<!-- generated: {name} -->", "<!-- end of {name} -->"


def claims_markdown(claims: pd.DataFrame) -> str:
    """The primary claims as a Markdown table, one row per claim and learning rate; what the rows
    of a claim share stands in its first.
    """
    lines = [
        "| claim | CL rate | n | effect | 95 % interval | verdict | the paper |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    row: Any  # columns have no types of their own
    shown = claims[claims["primary"] & (claims["verdict"] != "not run")]
    before = ""
    for row in shown.sort_values("statement", key=_as_they_come, kind="stable").itertuples():
        first = row.statement != before
        claim, paper = (row.statement, row.paper_value) if first else ("", "")
        before = row.statement
        interval = "none" if pd.isna(row.low95) else f"{row.low95:+.3f} … {row.high95:+.3f}"
        why = f" ({row.reason})" if row.verdict == "not testable here" else ""
        effect = "" if pd.isna(row.mean) else f"{row.mean:+.3f} {row.unit}"
        lines.append(
            f"| {claim} | {row.learning_rate:g} | {row.n} | {effect} | {interval} "
            f"| {row.verdict}{why} | {paper} |"
        )
    return "\n".join(lines)


def _as_they_come(names: pd.Series) -> pd.Series:
    return names.map({name: place for place, name in enumerate(names.unique())})


def contrasts_markdown(contrasts: pd.DataFrame) -> str:
    """Exploratory contrasts as a Markdown table, those first whose interval lies beside 0."""
    small = "too small to matter"
    order = ["as expected", "opposite", f"as expected, {small}", f"opposite, {small}"]
    order.append("no effect that would matter")
    ranks = {outcome: rank for rank, outcome in enumerate(order)}
    shown = contrasts[contrasts["outcome"] != "not run"]
    shown = shown.iloc[shown["outcome"].map(ranks).fillna(len(order)).argsort(kind="stable")]
    lines = [
        "| exploratory contrast | expected by | n | difference | 95 % interval | outcome |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    row: Any  # columns have no types of their own
    for row in shown.itertuples():
        numbers = " | "
        if pd.notna(row.mean):
            interval = "" if pd.isna(row.low95) else f"{row.low95:+.3f} … {row.high95:+.3f}"
            numbers = f"{row.mean:+.3f} {row.unit} | {interval}"
        lines.append(
            f"| {row.statement} | {row.expected_by} | {row.n} | {numbers} | {row.outcome} |"
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


def later_markdown(tables: Tables) -> str:
    """What the claims on K would say without the condition on P that was added to them later."""
    found = {name: tables.table(name) for name in JUDGED}
    moved = without_later_conditions(declared().claims, found)
    said = [
        f"{row['statement'].rstrip('.')} at CL rate {row['learning_rate']:g}: "
        f"*{row['verdict_without']}* in place of *{row['verdict']}*"
        for row in moved.to_dict("records")
    ]
    return (
        "**Without the condition added later.** Claims on K got the conditions on P after seed 100 "
        "had been looked at. "
        + (f"Without: {'; '.join(said)}." if said else "Without, no verdict is another.")
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


def contact_markdown(path: Path) -> str:
    """How long a newcomer waits, in a sentence; ``path`` is the table of a benchmark."""
    steps, machine = read_table(path).set_index("step"), read_provenance(path)["machine"]
    seconds, size = steps["seconds"], steps["megabytes"]
    return (
        f"Measured from an empty folder, with nothing in pip's cache, on {machine['cores']} cores "
        f"({machine['processor']}): {seconds['clone']:.0f} s for the clone "
        f"({size['clone']:.0f} MB), {seconds['environment'] / 60:.1f} minutes for the environment "
        f"({size['environment'] / 1000:.1f} GB), {seconds['first figure']:.0f} s more to the first "
        f"figure of `smoke`, {seconds['all figures of smoke'] / 60:.1f} minutes more to all of "
        "them (`python -m tests.benchmarks.contact`)."
    )


def _seeds(profile: Profile) -> str:
    return "one seed" if len(profile.seeds) == 1 else f"{len(profile.seeds)} seeds"


def refresh_readme(readme: Path, shown: str, opened: Callable[[str], Tables | None]) -> None:
    """Write the generated parts anew; claims, control and protocol are of the profile ``shown``."""
    text, tables = readme.read_text("utf-8"), open_tables(shown)
    read_figure_note(tables.figures / "tab00_claims.json")
    claims = pd.read_csv(tables.figures / "tab00_claims.csv")
    text = replace_generated(text, "claims", claims_markdown(claims))
    beside = f"{later_markdown(tables)}\n\n{controls_markdown(tables)}"
    text = replace_generated(text, "controls", beside)
    found = [(opened(figure), declared) for figure, declared in DECLARED.items()]
    judged = [judged_contrasts(at, declared) for at, declared in found if at is not None]
    if judged:
        table = contrasts_markdown(pd.concat(judged, ignore_index=True))
        text = replace_generated(text, "contrasts", table)
    text = replace_generated(text, "protocol", protocol_markdown(tables.profile))
    text = replace_generated(text, "figures", figures_markdown(opened))
    reference = tables.folder.parent
    if (path := reference / "bench" / "contact.csv").exists():
        text = replace_generated(text, "contact", contact_markdown(path))
    if (reference / "torture" / "faults.csv").exists():
        text = replace_generated(text, "faults", faults_markdown(reference))
    write_atomically(readme, text)

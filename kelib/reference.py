"""Promote a finished run to the committed reference, and refresh what quotes its numbers."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kelib.config import Profile, load_profile, repository_root
from kelib.errors import KelibError, listing
from kelib.results import Tables, open_tables, promote_files
from kelib.study import peak_step
from kelib.tables import read_provenance, read_table, write_atomically

README_PROFILE = "small"
SEARCH, SEARCH_NOTEBOOK = "search", "ours_search"
SEARCH_TABLES = ("entropy", "checkpoints", "continual")
TABLES = ("pretraining", "entropy", "checkpoints", "continual", "interventions")
START, END = "<!-- generated: {name} -->", "<!-- end of {name} -->"


def promote(name: str) -> None:
    """Copy measurements to ``data/reference/<name>`` and figures to ``figures/reference/<name>``.

    ``name`` is a profile or ``search``. Measurements are tables, their provenance and
    mean-coefficient
    vectors: no weights, no text. Then the notebooks that show these numbers when opened without
    parameters are executed in place, and for profile ``small`` the generated parts of the README
    are written anew. Raises KelibError if a table or figure is missing, if a table was changed
    after it was written, or if a figure was drawn from other tables.
    """
    root = repository_root()
    measured, drawn = root / "data" / "measurements" / name, root / "figures" / name
    tables = SEARCH_TABLES if name == SEARCH else TABLES
    for table in tables:
        read_table(measured / f"{table}.csv")  # complete and as written
        made_with = read_provenance(measured / f"{table}.csv")["parameters"]["profile"]
        if made_with != name:
            raise KelibError(
                f"{table}.csv was made by profile {made_with}, not {name}; run it again"
            )
    figures = _drawn_figures(name, drawn, measured)
    promote_files(
        [
            *(measured / f"{table}{suffix}" for table in tables for suffix in (".csv", ".json")),
            *sorted(measured.glob("coefficients-*.safetensors")),
        ],
        root / "data" / "reference" / name,
    )
    wanted = [p for made in figures for p in drawn.glob(f"{made.stem}.*") if p.suffix != ".ipynb"]
    promote_files(sorted(wanted), root / "figures" / "reference" / name)
    for notebook in sorted((root / "notebooks").glob("*.ipynb")):
        reads = SEARCH if notebook.stem == SEARCH_NOTEBOOK else README_PROFILE
        if reads == name:
            execute_in_place(notebook)
    if name == README_PROFILE:
        for notebook in sorted((root / "notebooks" / "stages").glob("*.ipynb")):
            execute_in_place(notebook)  # smoke in a temporary folder, what nbval repeats
        refresh_readme(root / "README.md", root)
    print(f"promoted {name}: {len(tables)} tables, {len(figures)} figures; commit data and figures")


def _drawn_figures(name: str, drawn: Path, measured: Path) -> list[Path]:
    """Provenance files in ``drawn``, checked: figures are complete and of the tables measured."""
    command = "make search" if name == SEARCH else f"make figures PROFILE={name}"
    figures = sorted(path for path in drawn.glob("*.json") if not path.name.startswith("."))
    if not figures:
        raise KelibError(f"no figures in {drawn}: run {command}")
    for figure in figures:
        again = f"delete {figure.name} and run {command}"
        for suffix in (".pdf", ".png", ".csv"):
            if not figure.with_suffix(suffix).exists():
                raise KelibError(f"no {figure.stem}{suffix} in {drawn}: {again}")
        for table, sha256 in json.loads(figure.read_text("utf-8"))["inputs"].items():
            if read_provenance(measured / f"{table}.csv")["sha256"] != sha256:
                raise KelibError(f"{figure.stem} was drawn from another {table}.csv: {again}")
    return figures


def execute_in_place(notebook: Path) -> None:
    """Run a notebook with its own default parameters and keep the outputs in the file itself."""
    import nbformat
    from nbclient import NotebookClient

    content = nbformat.read(notebook, as_version=4)
    place = {"metadata": {"path": str(notebook.parent)}}
    os.environ.setdefault("KELIB_PROGRESS", "lines")  # a bar would leave each of its states behind
    quiet = ["--IPKernelApp.log_level=50"]
    NotebookClient(
        content, kernel_name="python3", timeout=900, resources=place, extra_arguments=quiet
    ).execute()
    for cell in content.cells:  # timings and machine-dependent notes would change at each run
        cell.metadata.pop("execution", None)
    content.metadata["language_info"] = {"name": "python"}
    write_atomically(notebook, nbformat.writes(content) + "\n")


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
    means = runs.groupby([*keys, "injected"])["k_cl"].mean().unstack("injected")
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
        ("pretraining", f"{size}, one seed", "about 3T tokens, published checkpoints"),
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
    lines = ["| | here (`small`) | the paper (OLMo-1B) |", "| --- | --- | --- |"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def figures_markdown(tables: Tables) -> str:
    """Figure -> notebook -> target -> our number beside the paper's, from the reference tables."""
    entropy, runs = tables.table("entropy"), tables.table("continual")
    rows, profile = tables.table("interventions"), tables.profile
    total = entropy.groupby(["seed", "step"])["entropy_nats"].sum()
    change = [total[s].iloc[-1] - total[s][peak_step(entropy, s)] for s in profile.seeds]
    rate = profile.continual.learning_rates[0]
    runs = runs[runs["injected"] & (runs["learning_rate"] == rate)]
    ends = runs.groupby("stage_step")[["acquisition", "forgetting_over_chance"]].mean() * 100
    arms = rows[rows["learning_rate"] == rate].assign(q=rows["factor"].fillna(0))
    after = arms.groupby("q")[["k_cl", "p_cl"]].mean()
    gain = after.loc[1.0] - after.loc[0.0]
    first, last = ends.iloc[0], ends.iloc[-1]
    stages = (("pretraining", "entropy"), ("continual",), ("interventions",))
    minutes = []
    workers = load_profile(profile.profile).workers  # tables are the same for any number of them
    for names in stages:
        notes = [read_provenance(tables.folder / f"{name}.csv") for name in names]
        seconds = sum(note["run_seconds"] / min(workers, note["runs"]) for note in notes)
        minutes.append(f"{seconds / 60:.0f}")
    acquired = f"A {first['acquisition']:.1f} → {last['acquisition']:.1f} %"
    kept = first["forgetting_over_chance"], last["forgetting_over_chance"]
    forgot = f"F over chance {kept[0]:.1f} → {kept[1]:.1f} %"
    woken = f"K {gain['k_cl']:+.3f} nats, P {100 * gain['p_cl']:+.1f} points"
    at = f"CL rate {rate:g}: "
    lines = [
        (
            "2",
            "fig02_knowledge_entropy",
            f"{np.mean(change):+.2f} nats after the peak",
            "about -0.5 nats",
        ),
        (
            "4",
            "fig04_stages",
            f"{at}{acquired}, {forgot}",
            "A 25.2 → 18.8 %, F (raw) 10.5 → 19.5 %",
        ),
        (
            "5",
            "fig05_resuscitation",
            f"{at}q = 1 minus original, {woken}",
            "both up, P at most 0.5 points",
        ),
        ("claims", "tab00_claims", "the table above", "no intervals reported"),
    ]
    text = [
        "| figure | notebook | target | minutes | ours (`small`) | the paper (OLMo-1B) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for (figure, name, ours, paper), spent in zip(lines, [*minutes, "0"], strict=True):
        target = f"`figures/{profile.profile}/{name}.json`"
        link = f"[{name}](notebooks/{name}.ipynb)"
        text.append(f"| {figure} | {link} | {target} | {spent} | {ours} | {paper} |")
    return "\n".join(text)


def refresh_readme(readme: Path, root: Path) -> None:
    """Write the generated parts of the README from the committed reference of profile ``small``."""
    text = readme.read_text("utf-8")
    claims = pd.read_csv(root / "figures" / "reference" / README_PROFILE / "tab00_claims.csv")
    text = replace_generated(text, "claims", claims_markdown(claims))
    tables = open_tables(README_PROFILE)
    text = replace_generated(text, "controls", controls_markdown(tables))
    text = replace_generated(text, "protocol", protocol_markdown(tables.profile))
    text = replace_generated(text, "figures", figures_markdown(tables))
    write_atomically(readme, text)

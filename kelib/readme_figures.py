"""The table of figures in the README: notebook, target, minutes, our number beside the paper's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kelib.config import load_profile
from kelib.published import load_published, published_profiles
from kelib.readme_words import in_words
from kelib.results import Tables
from kelib.tables import read_provenance
from kelib.trajectory_profile import load_trajectory, trajectory_profiles

FIGURES = {
    "fig01_overview": ("1", "a sketch: entropy and acquisition fall, forgetting rises"),
    "fig02_knowledge_entropy": ("2", "about -0.5 nats"),
    "fig03_attention_next_token": ("3", "both fall, next-token about 2.8 to 2.4 nats"),
    "fig04_stages": ("4", "A 25.2 → 18.8 %, F (raw) 10.5 → 19.5 %"),
    "fig05_resuscitation": ("5", "both up, P at most 0.5 points"),
    "fig06_other_family": ("6", "falls in Pythia too"),
    "fig07_data_sets": ("7", "falls on C4, PubMed and Dolma"),
    "fig08_layers": ("8", "falls in every layer, most in the last"),
    "fig09_definitions": ("9", "falls by the ReLU definition too, about -0.8 nats"),
    "fig10_entities": ("10", "wider and higher on PubMed than on C4"),
    "fig11_once_paraphrase": ("11", "once lags paraphrase, A(once) below 0 at the last stage"),
    "fig12_before_after": ("12", "late stages better before, worse after"),
    "fig13_corpora": ("13", "A first to last: PubMed -6.4, C4 -3.4 points"),
    "fig14_whole_pretraining": ("14", "A rises to 15 % of training, then falls"),
    "fig15_ratio": ("15", "more p is better up to a point, p = 90 % hurts"),
    "fig16_resuscitation_stages": ("16, 17", "the effect grows for later checkpoints"),
    "fig18_attention_temperature": ("18", "acquires less than resuscitation"),
    "tab01_protocols": ("tables 1, 2", "A falls with the stage but at LR 1e-4"),
    "ours_correlations": ("footnote 11", "entropy with A 0.94, with F -0.96, one run"),
    "ours_gradient_shares": ("A.1", "argued, not measured"),
    "ours_interventions": ("ours", "no controls reported"),
    "ours_confounds": ("ours", "not reported"),
    "ours_annealing": ("ours", "not reported"),
    "ours_weight_decay": ("ours", "not reported"),
    "ours_regimes": ("ours", "not reported"),
    "ours_memory_sources": ("ours", "not reported"),
    "ours_sensitivity": ("ours", "not reported"),
    "ours_retention": ("ours", "not reported"),
    "ours_reactivation": ("ours", "not reported"),
    "ours_contrasts": ("ours", "not reported"),
    "ours_learning_curves": ("ours", "not reported"),
    "ours_probe_levels": ("ours", "not reported"),
    "ours_task_forgetting": ("ours", "not reported"),
    "ours_release": ("ours", "K about -0.3, per padded position"),
    "ours_convergence": ("ours", "not reported"),
    "ours_plasticity_panel": ("ours", "not reported"),
    "ours_published": ("ours", "OLMo-1B 99.5 % of its bound, other text"),
    "ours_trajectory": ("2", "OLMo-1B 143.9 to 143.4 nats, 7B 297.6 to 297.0"),
    "ours_published_stages": ("4", "A 25.2 → 18.8 %, F (raw) 10.5 → 19.5 %"),
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
            f"| {figure} | {link} | {target} | {spent} | {in_words(name, tables)} | {paper} |"
        )
    return "\n".join(lines)


# the tables whose runs a figure needs beyond those of stages 1 and 2
_CONTINUAL = (
    *("fig04_stages", "fig11_once_paraphrase", "fig12_before_after"),
    *("ours_learning_curves", "ours_probe_levels", "ours_task_forgetting", "ours_release"),
)
_VARIANTS = ("fig13_corpora", "tab01_protocols", "fig14_whole_pretraining", "ours_confounds")
_ARMS = (
    *("fig15_ratio", "fig16_resuscitation_stages", "fig18_attention_temperature"),
    "ours_interventions",
)
_MECHANISM = ("ours_gradient_shares", "ours_memory_sources", "ours_sensitivity")
_BRANCHES = ("ours_annealing", "ours_weight_decay")
_STAGES = {
    **{name: ("pretraining", "entropies", "checkpoints") for name in FIGURES},
    **{name: ("continual",) for name in _CONTINUAL},
    **{name: ("variants",) for name in _VARIANTS},
    **{name: ("arms",) for name in _ARMS},
    **{name: ("shares",) for name in _MECHANISM},
    **{name: ("branches", "branch_entropy", "branch_learning") for name in _BRANCHES},
    "fig01_overview": (),
    "fig05_resuscitation": ("interventions",),
    "ours_correlations": ("continual",),
    "ours_retention": ("retention",),
    "ours_reactivation": ("reactivation",),
    "ours_regimes": ("regimes", "regime_learning"),
    "ours_contrasts": (),
    "ours_published": ("texts",),
    "ours_trajectory": ("texts",),
    "ours_published_stages": ("continual",),
    "tab00_claims": (),
}


def _minutes(tables: Tables, names: tuple[str, ...]) -> float:
    # tables are the same for any number of workers, so it is not in their parameters
    loaded: Callable[[str], Any] = load_profile
    if tables.name in published_profiles():
        loaded = load_published
    elif tables.name in trajectory_profiles():
        loaded = load_trajectory
    workers = loaded(tables.name).workers
    notes = [read_provenance(tables.folder / f"{name}.csv") for name in names]
    return sum(note["run_seconds"] / min(workers, note["runs"]) for note in notes) / 60

"""A study in miniature: one run of every kind that a profile has, in seconds each. No torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from kelib import beyond, entities
from kelib.config import Branch, Branches, Profile, Variant
from kelib.grid import flat_entropy
from kelib.run import Run
from kelib.study import Study

STEPS = 30  # of pretraining
SOURCE_TOKENS = 200_000  # of a generated source, at least
SAMPLE_TOKENS = 2**16  # of entropy at most: more would take longer and tell no more
RATIOS = {"moments": 2, "longer": 6}  # steps of continual learning, for each injection


def miniature(profile: Profile) -> Profile:
    """The profile with one seed, one rate, generated text and few steps."""
    corpus, plan = profile.corpus, profile.continual
    length = corpus.sequence_length
    sample = min(corpus.entropy_sequences, max(1, SAMPLE_TOKENS // length))
    # splits of 8 and 10 % must hold what is measured on (kelib.corpus)
    count = math.ceil((sample + corpus.heldout_sequences) * length / (0.08 * SOURCE_TOKENS))
    names = {
        kind: tuple(f"generated:{kind} {n}" for n in range(count)) for kind in ("general", "domain")
    }
    half = STEPS // 2
    steps = {half, *(round(share * STEPS) for share in plan.stages)}
    rate, seed = plan.learning_rates[:1], (*plan.curve_seeds, *plan.seeds)[:1]
    longer = Variant("longer", rate, seed, steps=RATIOS["longer"] * plan.injections)
    decay = 1 + profile.pretraining.optimizer.weight_decay
    sections = {
        name: dataclasses.replace(section, learning_rates=rate)
        for name in ("mechanism", "retention", "reactivation")
        if (section := getattr(profile, name)) is not None
    }
    cooled = profile.regimes is not None and any(r.cooldown for r in profile.regimes.regimes)
    if profile.branches is not None or cooled:
        branch = Branch("branch", half / STEPS, weight_decay=decay)
        sections["branches"] = Branches(rate, (branch,))
    return dataclasses.replace(
        profile,
        profile="calibration",
        seeds=(0,),
        comparison=None,
        executor="local",
        figures=(),
        regimes=None,  # their runs are of kinds that are there already
        corpus=dataclasses.replace(
            corpus,
            general=names["general"] if corpus.general else (),
            domain=names["domain"],
            entropy_sequences=sample,
            convergence_sequences=min(corpus.convergence_sequences, 4 * sample),
            domain_sequences=min(corpus.domain_sequences, 2 * entities.SEQUENCES),
        ),
        pretraining=dataclasses.replace(
            profile.pretraining,
            steps=STEPS,
            checkpoints=tuple(sorted(steps)),
            optimizer_states=(half, STEPS)
            if cooled or profile.pretraining.optimizer_states
            else (),
        ),
        continual=dataclasses.replace(
            plan,
            steps=RATIOS["moments"] * plan.injections,
            learning_rates=rate,
            seeds=seed,
            control_seeds=(),
            curve_seeds=plan.curve_seeds[:1],
            variants=(longer,),
        ),
        interventions=dataclasses.replace(
            profile.interventions,
            ratios=profile.interventions.ratios[:1],
            factors=profile.interventions.factors[:1],
            learning_rates=rate,
            arms=(),
            arm_learning_rates=(),
        ),
        **sections,
    )


def sample_runs(study: Study) -> dict[str, Run]:
    """One run of each class of a miniature, and the two that differ from another in size alone."""
    profile = study.profile
    (seed,), step = profile.seeds, profile.pretraining.steps
    plan, (change, *_) = profile.continual, study.resuscitations()
    rate, cl_seed, (longer,) = plan.learning_rates[0], plan.seeds[0], plan.variants
    corpus = study.corpus_run(seed)
    wanted = corpus.settings["wanted"]
    more = {**wanted, "facts": wanted["facts"] + 100 * STEPS}
    if profile.corpus.general:
        more["general"] += 100 * STEPS
    entropy = flat_entropy(study)
    runs = [
        corpus,
        study.pretrain_run(seed),
        study.entropy_run(seed, 0),
        study.entropy_run(seed, step),
        study.evaluate_run(seed, step),
        study.entities_run(seed),
        study.intervene_run(seed, step, change),
        study.continual_run(seed, step, rate, cl_seed, injected=False),
        study.continual_run(seed, step, rate, cl_seed),
        *beyond.mechanism_runs(study, entropy)[-1:],
        *beyond.retention_runs(study, entropy)[-1:],
        *beyond.reactivation_runs(study)[-1:],
        *(run for _, run in beyond.branch_runs(study)),
    ]
    return {
        **{class_of(run.kind, run.settings): run for run in runs},
        "corpus, longer": dataclasses.replace(corpus, settings={**corpus.settings, "wanted": more}),
        "continual, longer": study.continual_run(seed, step, rate, cl_seed, variant=longer),
    }


def pretraining_beside(study: Study, number: int) -> Run:
    """Pretraining of the same corpus at a lower rate: each ``number`` gives another run."""
    plan = study.profile.pretraining
    plan = dataclasses.replace(plan, learning_rate=plan.learning_rate / (1 + number))
    other = dataclasses.replace(study.profile, pretraining=plan)
    return Study(other, study.data).pretrain_run(study.profile.seeds[0])


def class_of(kind: str, settings: Mapping[str, Any]) -> str:
    """The kind of a run, with what makes it cost more than others of its kind."""
    more = {"entropy": "converge", "continual": "curve"}.get(kind)
    return f"{kind}, {more}" if more and settings.get(more) else kind

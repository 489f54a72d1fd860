"""What a run of kind ``mechanism`` measures at one checkpoint: where gradients, updates and new
facts go, and how much a change of the weights costs.

Appendix A.1 of the paper argues that updates concentrate on memories with large coefficients. The
measures are those of :mod:`kelib.attribution`, :mod:`kelib.decomposition` and
:mod:`kelib.sensitivity`; what they are applied to is made in :mod:`kelib.mechanism_inputs`.
Samples are small, so that a run takes well under a minute at d = 64, m = 512 and 4 layers on one
core:

* batches: the first 64 sequences that continual learning reads, without passages (``domain``); the
  original passage of every entry (``passages``); the batch of the first injection (``mixed``);
* steps of the optimizer: 20 for the moments of a step under way;
* held-out text: 64 sequences; noise: four sizes with two draws each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kelib.attribution import layer_table, measure_gradients, share_table
from kelib.checkpoints import load_checkpoint, step_folder
from kelib.config import Continual, Corpus, Training, convert
from kelib.corpus import load_corpus
from kelib.decomposition import (
    Rows,
    carrier_table,
    measure_contributions,
    overlap_table,
    row_changes,
)
from kelib.evaluation import score_questions
from kelib.mechanism_inputs import Setting, batches_of, load_weights, optimizer_states
from kelib.sensitivity import Moments, adamw_step, noise_table, parameter_groups, step_table
from kelib.world import World, build_world

HELDOUT_SEQUENCES = 64
NOISE_SIZES = (0.01, 0.03, 0.1, 0.3)
NOISE_SEEDS = (0, 1)
STEP_SIZES = (1.0, 3.0, 10.0)
OPTIMIZER = "optimizer.safetensors"  # where pretraining keeps moments, see kelib.jobs


def mechanism(
    settings: Mapping[str, Any],
    inputs: Mapping[str, Path],
    folder: Path,
    progress: Callable[[float], None],
) -> None:
    """All tables of one checkpoint and one rate of continual learning, as CSV files.

    gradients: batch and :func:`kelib.attribution.layer_table`. shares: batch and
    :func:`kelib.attribution.share_table` of gradients and updates, see :func:`gradient_tables`.
    carriers, overlap: see :func:`contribution_tables`. noise, steps: see
    :func:`sensitivity_tables`. Gradients and noise are those of the checkpoint and depend on no
    rate. Raises KelibError if the continual learning kept no weights.
    """
    model, tokenizer = load_checkpoint(
        step_folder(inputs["pretrain"], settings["step"]), settings["pretrain"]
    )
    setting = Setting(
        model=model,
        after=load_weights(inputs["continual"]),
        tokenizer=tokenizer,
        world=build_world(convert(Corpus, settings["corpus"], "corpus").world, settings["seed"]),
        packed=load_corpus(inputs["corpus"]),
        plan=convert(Continual, settings["continual"], "continual"),
        training=convert(Training, settings["training"], "training"),
        learning_rate=settings["learning_rate"],
        cl_seed=settings["cl_seed"],
    )
    kept = step_folder(inputs["pretrain"], settings["step"]) / OPTIMIZER
    states = optimizer_states(setting, kept)
    progress(0.2)
    tables, stepped = gradient_tables(setting, states)
    progress(0.4)
    tables |= contribution_tables(setting)
    progress(0.6)
    tables |= sensitivity_tables(setting, stepped)
    for name, table in tables.items():
        table.to_csv(folder / f"{name}.csv", index=False, lineterminator="\n")


# --- gradients and updates ----------------------------------------------------------------------


def gradient_tables(
    setting: Setting, states: Mapping[str, Moments | None]
) -> tuple[dict[str, pd.DataFrame], dict[str, Any]]:
    """The tables gradients and shares, and the models one step of AdamW on ``mixed`` later.

    Updates from ``states`` are one step each at the peak rate on the batch itself, without the
    shrinking of the weights by their decay: ``first_step`` of a fresh optimizer, ``warm_step`` and
    ``own_moments`` of one under way. ``whole_run`` is the change of the weights by the continual
    learning, decay included, whatever the batch.
    """
    rate, settings = setting.learning_rate, setting.plan.optimizer
    small = setting.training.micro_batch_size
    whole = row_changes(setting.model, setting.after)
    gradients, shares, stepped = [], [], {}
    for name, batch in batches_of(setting).items():
        found = measure_gradients(setting.model, batch, micro_batch_size=small)
        updates: dict[str, tuple[Rows, ...]] = {}
        for update, state in states.items():
            stepped[update] = adamw_step(
                setting.model, batch, settings, rate, moments=state, micro_batch_size=small
            )  # of the last batch, mixed, in the end
            decay = rate * settings.weight_decay
            updates[update] = row_changes(setting.model, stepped[update], decay=decay)
        shares.append(_named(share_table(found, {**updates, "whole_run": whole}), batch=name))
        gradients.append(_named(layer_table(found), batch=name))
    return {"gradients": pd.concat(gradients), "shares": pd.concat(shares)}, stepped


# --- contributions ------------------------------------------------------------------------------


def contribution_tables(setting: Setting) -> dict[str, pd.DataFrame]:
    """The tables carriers and overlap.

    carriers: how many memories carry a fraction of what is contributed to the targets of the
    probes, mean over the probes of an entry set and level, ``before`` and ``after`` continual
    learning. overlap: ``old, overwritten``, contributions to the questions about the world (context
    and right choice, at the checkpoint) against the change of V by continual learning;
    ``new, overwritten``, the same for the probes after it; ``new, before and after``, probe by
    probe, then the mean over probes.
    """
    world, tokenizer = setting.world, setting.tokenizer
    keys, asked = probes_of(world)
    questions = [(q.context, q.choices[q.answer]) for q in world.questions]
    old = measure_contributions(setting.model, tokenizer, questions)
    new = {
        when: measure_contributions(model, tokenizer, asked)
        for when, model in (("before", setting.model), ("after", setting.after))
    }
    carried = []
    for when, contributions in new.items():
        table = carrier_table(contributions).merge(keys, left_on="probe", right_index=True)
        groups = table.groupby(["entry_set", "level", "layer", "fraction"], sort=False)
        means = groups[["carriers", "carrier_share"]].mean().reset_index()
        carried.append(_named(means, when=when))
    changed = [rows["V"] for rows in row_changes(setting.model, setting.after)]
    overlaps = {
        "old, overwritten": overlap_table(old, changed),
        "new, overwritten": overlap_table(new["after"], changed),
        "new, before and after": overlap_table(new["before"], new["after"], paired=True),
    }
    overlapping = [
        _named(table.groupby("layer").mean().reset_index(), which=which).drop(columns="probe")
        for which, table in overlaps.items()
    ]
    return {"carriers": pd.concat(carried), "overlap": pd.concat(overlapping)}


def probes_of(world: World) -> tuple[pd.DataFrame, list[tuple[str, str]]]:
    """Every probe of every entry: a table of entry_set and level, and (input, target) pairs."""
    keys, asked = [], []
    for entry_set, entries in (("once", world.once), ("paraphrase", world.paraphrase)):
        for probe in (probe for entry in entries for probe in entry.probes):
            keys.append((entry_set, probe.level))
            asked.append((probe.input, probe.target))
    return pd.DataFrame(keys, columns=["entry_set", "level"]), asked


# --- sensitivity --------------------------------------------------------------------------------


def sensitivity_tables(setting: Setting, stepped: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    """The tables noise and steps, on held-out text of the pretraining mixture.

    noise: :func:`kelib.sensitivity.noise_table` for every group, its seed as ``noise_seed``. steps:
    ``update``, which of ``stepped``, and :func:`kelib.sensitivity.step_table` of the way there,
    once, three and ten times as far. Where all matrices change, ``accuracy`` (a fraction) is that
    on the questions about the world, mean over tasks; else NaN.
    """
    blocks = setting.packed.blocks["heldout_general"]
    # kinds of text stand one behind the other in it, so that the first sequences are of one kind
    places = np.arange(count := min(HELDOUT_SEQUENCES, len(blocks))) * len(blocks) // count
    heldout, model = np.asarray(blocks[places], dtype=np.int64), setting.model

    def accuracy(changed: Any) -> float:
        answers = score_questions(changed, setting.tokenizer, setting.world)
        return float(answers.groupby("task")["correct"].mean().mean())

    single = [group for group in parameter_groups(model) if group != "all"]
    noise = [
        noise_table(model, heldout, NOISE_SIZES, NOISE_SEEDS, groups=groups, accuracy=ask)
        for groups, ask in ((single, None), (["all"], accuracy))
    ]
    steps = [
        _named(step_table(model, later, heldout, STEP_SIZES, accuracy=accuracy), update=update)
        for update, later in stepped.items()
    ]
    renamed = pd.concat(noise).rename(columns={"seed": "noise_seed"})
    return {"noise": renamed, "steps": pd.concat(steps)}


def _named(table: pd.DataFrame, **first: str) -> pd.DataFrame:
    """``table`` with a constant column in front."""
    return table.assign(**first)[[*first, *table.columns]]

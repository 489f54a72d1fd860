"""What each run has to do: tokens to train on and to measure on, and bytes to keep. No torch.

Counted from the settings of a run and its profile, as :mod:`kelib.jobs` uses them; nothing is run.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kelib import entities
from kelib.config import Profile
from kelib.run import Run
from kelib.scale import Shape, forward_flops, shape_of, training_flops
from kelib.schema import convert
from kelib.sections import Model
from kelib.world import WorldSize, build_world

CHARACTERS = 3  # of probes and questions, a token of the tokenizers trained here
TABLES = 64 * 1024  # bytes of the tables that a run writes, about
FILES, WORD = 4096, 50  # bytes beside the weights of a checkpoint, and of a word of its tokenizer
WEIGHT, STATE = 4, 12  # bytes of a parameter in float32: the weight; with two moments
# What kelib.mechanism and its inputs take as samples (they import torch): steps for the moments of
# an optimizer under way; passes over 64 held-out sequences (four sizes of noise, two draws, six
# groups; three sizes of three steps); answers to all questions
WARM_STEPS, SEQUENCES, PASSES, ANSWERS = 20, 64, 4 * 2 * 6 + 3 * 3, 4 * 2 + 3 * 3


@dataclass(frozen=True)
class Work:
    """``trained``: tokens that go forward and back; ``measured``: tokens that go forward only;
    ``packed``: tokens of a corpus; ``stored``: bytes that are left; ``scratch``: bytes more while
    it runs."""

    trained: int = 0
    measured: int = 0
    packed: int = 0
    stored: int = TABLES
    scratch: int = 0

    def flops(self, shape: Shape, length: int) -> float:
        """Model FLOPs, see :func:`kelib.scale.training_flops` and forward_flops."""
        return self.trained * training_flops(shape, length) + self.measured * forward_flops(
            shape, length
        )


def shape_of_profile(profile: Profile) -> Shape:
    """The shape of the profile's own model."""
    return shape_of(profile.model, profile.corpus.vocabulary_size)


def shape_of_run(profile: Profile, run: Run) -> Shape:
    """The shape of the model that a run trains or measures: that of the pretraining it rests on."""
    at: Run | None = run
    while at is not None:
        if "model" in at.settings:
            model = convert(Model, at.settings["model"], "model")
            return shape_of(model, profile.corpus.vocabulary_size)
        at = at.inputs.get("pretrain")
    return shape_of_profile(profile)


def work_of(profile: Profile, kind: str, settings: Mapping[str, Any], shape: Shape) -> Work:
    """The work of a run of ``kind`` with ``settings``, on a model of ``shape``."""
    corpus = profile.corpus
    # with configuration, notes and tokenizer
    weights = WEIGHT * shape.parameters + FILES + WORD * corpus.vocabulary_size
    length, state = corpus.sequence_length, STATE * shape.parameters
    probes, questions = _asked(corpus.world, profile.seeds[0])
    entropy = corpus.entropy_sequences * length  # tokens of one pass over the sample
    evaluation = 2 * corpus.heldout_sequences * length + probes + questions
    after = evaluation + entropy  # what ends most runs
    s = settings
    if kind == "corpus":
        samples = 4 * corpus.entropy_sequences + corpus.convergence_sequences
        blocks = sum(s["wanted"].values()) + corpus.domain_sequences + samples
        packed = length * (blocks + 2 * corpus.heldout_sequences)
        return Work(packed=packed, stored=2 * packed + WORD * corpus.vocabulary_size)
    if kind == "pretrain":
        plan = s["pretraining"]
        moments = len(plan["optimizer_states"]) * state
        kept = len(plan["checkpoints"]) * weights + moments
        return Work(plan["steps"] * plan["batch_size"] * length, stored=kept, scratch=state)
    if kind == "branch":
        steps, size = s["end"] - s["step"], s["pretraining"]["batch_size"]
        stored = (len(s["kept"]) + 1) * weights
        return Work(steps * size * length, stored=stored, scratch=state)
    if kind == "entropy":
        texts = (
            (corpus.facts_share > 0) + (corpus.general != ()) + 1
        )  # each alone; the last: domain
        measured = (3 + texts) * entropy  # and the mixture in three definitions
        if s["converge"]:
            measured += corpus.convergence_sequences * length
        vectors = 8 * shape.layers * shape.intermediate_size
        return Work(measured=measured, stored=vectors + TABLES)
    if kind == "evaluate":
        return Work(measured=evaluation)
    if kind == "intervene":
        return Work(measured=after)
    if kind == "entities":
        most = max(corpus.domain_sequences, corpus.entropy_sequences)
        read = 2 * min(entities.SEQUENCES, most) * length
        return Work(measured=len(s["steps"]) * read, stored=4 * TABLES)
    if kind in ("continual", "later"):
        plan = s["continual"]
        curve = 2 * plan["injections"] * probes if s.get("curve") else 0
        stored = TABLES + (weights if s.get("keep") else 0)
        trained = plan["steps"] * plan["batch_size"] * length
        return Work(trained, after + curve, stored=stored, scratch=state)
    if kind == "mechanism":
        trained = WARM_STEPS * s["continual"]["batch_size"] * length
        measured = PASSES * SEQUENCES * length + ANSWERS * questions + 2 * (probes + questions)
        return Work(trained, measured, stored=2 * TABLES)
    if kind == "reactivation":
        sets = sum(2 + s["draws"] + (s["draws"] if ratio < 0.5 else 1) for ratio in s["ratios"])
        return Work(measured=3 * entropy + 2 * sets * evaluation)
    return Work()


@functools.cache
def _asked(size: WorldSize, seed: int) -> tuple[int, int]:
    """(tokens of all probes, tokens of all questions with each of their choices), about."""
    world = build_world(size, seed)
    entries = (*world.once, *world.paraphrase)
    probes = sum(len(p.input) + len(p.target) for entry in entries for p in entry.probes)
    # a context is read once for its four choices
    questions = sum(len(q.context) + sum(map(len, q.choices)) for q in world.questions)
    return probes // CHARACTERS, questions // CHARACTERS

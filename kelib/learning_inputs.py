"""What is learned from what, for :mod:`kelib.learning`: settings, text, passages, batches."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kelib.config import TEXTS, Profile
from kelib.continual import reading_order
from kelib.continued_profile import Protocol
from kelib.errors import KelibError, listing
from kelib.fictional import load_fictional_knowledge
from kelib.injection import Injector, encode_passages, injection_schedule
from kelib.world import build_world


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is learned from what.

    Attributes:
        profile: protocol and precision; the generated world. A profile of a study, or a
            :class:`kelib.continued_profile.Protocol`.
        model: folder that ``save_pretrained`` wrote, or the id of a model on the hub.
        corpus: see :func:`read_sequences`; ``text`` is what is read of it, a key of ``TEXTS``.
        seed: of the generated world; cl_seed: of reading order and injection.
        learning_rate: peak.
        entries: where the injected passages come from, see
            :func:`kelib.fictional.load_fictional_knowledge`; None: the generated world.
        paraphrase_entries: how many of ``entries`` form the paraphrase set, where these do not say.
        injected: False trains on the text alone.
    """

    profile: Profile | Protocol
    model: str
    corpus: str
    seed: int
    cl_seed: int
    learning_rate: float
    text: str = "domain"
    epochs: int = 1
    entries: str | None = None
    injected: bool = True
    paraphrase_entries: int | None = None

    def __post_init__(self) -> None:
        if self.text not in TEXTS:
            raise KelibError(f"text = {self.text!r} must be one of {listing(TEXTS)}")
        if self.epochs < 1:
            raise KelibError(f"epochs = {self.epochs} must be at least 1")
        if not self.learning_rate > 0:
            raise KelibError(f"learning_rate = {self.learning_rate:g} must be above 0")

    def note(self) -> dict[str, Any]:
        """All that the result depends on beside the text itself, fit for JSON; not how the work is
        shared out.
        """
        plan, world = self.profile.continual, self.profile.corpus.world
        protocol = {
            "steps": plan.steps,
            "batch_size": plan.batch_size,
            "injections": plan.injections,
            "optimizer": dataclasses.asdict(plan.optimizer),
            "world": dataclasses.asdict(world) if self.entries is None else None,
            "precision": self.profile.training.precision,
        }
        others = {name: value for name, value in vars(self).items() if name != "profile"}
        if self.paraphrase_entries is None:  # runs older than this keep their digest
            del others["paraphrase_entries"]
        return {"profile": self.profile.profile, **others, "protocol": protocol}


def read_sequences(folder: Path, text: str) -> np.ndarray:
    """The packed sequences ``(n, T)`` of a kind of text, memory-mapped.

    ``folder`` holds them as ``<block>.npy`` with their sha256 in ``manifest.json``, as
    :func:`kelib.corpus.build_corpus` writes both; other blocks need not be there. Raises KelibError
    for a file that is missing, empty or not the one of the manifest.
    """
    wanted, path = sha256_of(folder, text), folder / f"{TEXTS[text]}.npy"
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != wanted:
            raise ValueError(f"sha256 {found[:12]}, the manifest says {wanted[:12]}")
        blocks = np.load(path, mmap_mode="r")
        if blocks.ndim != 2 or not blocks.size:
            raise ValueError(f"an array of shape {blocks.shape}, not of sequences")
    except (OSError, ValueError) as error:
        raise KelibError(
            f"{path} is no text to learn from ({error}); build the corpus again"
        ) from error
    return np.asarray(blocks)


def sha256_of(folder: Path, text: str) -> str:
    """What the manifest says of a kind of text. KelibError if it says nothing."""
    manifest, block = folder / "manifest.json", TEXTS[text]
    try:
        return str(json.loads(manifest.read_text())["sha256"][block])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise KelibError(
            f"{manifest} names no sha256 of {block}.npy ({error!r}); give a folder of packed "
            "sequences"
        ) from error


def batches(
    settings: Settings, text: np.ndarray, tokenizer: Any
) -> tuple[Callable[[int], np.ndarray], Injector]:
    """(step -> token ids ``(B, T)`` of the global batch with the passages of that step, and what
    puts them in), the same in every process.
    """
    plan = settings.profile.continual
    if settings.entries is None:
        world = build_world(settings.profile.corpus.world, settings.seed)
        once, paraphrase = world.once, world.paraphrase
    else:
        once, paraphrase = load_fictional_knowledge(settings.entries, settings.paraphrase_entries)
    passages = encode_passages(tokenizer, {"once": once, "paraphrase": paraphrase})
    schedule = injection_schedule(
        len(once),
        len(paraphrase),
        plan.injections,
        plan.steps,
        plan.batch_size,
        settings.cl_seed,
        passages,
        text.shape[1],
    )
    injector = Injector(schedule if settings.injected else schedule.iloc[:0], passages)
    wanted = plan.steps * plan.batch_size
    order = reading_order(len(text), wanted, settings.epochs, settings.cl_seed)

    def batch_at(step: int) -> np.ndarray:
        rows = order[step * plan.batch_size : (step + 1) * plan.batch_size]
        return injector.apply(np.asarray(text[rows]), step)

    return batch_at, injector

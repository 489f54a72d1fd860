"""Settings of continual learning from published checkpoints: the section ``learning`` of a
trajectory profile. No torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kelib.config import repository_root
from kelib.errors import KelibError, listing
from kelib.schema import convert, require
from kelib.sections import Continual, Optimizer, Training
from kelib.task_files import task_names
from kelib.world import WorldSize

GENERATED_ENTRIES = "generated"  # entries of a generated world; tasks of one are generated:NAME
WORLD = WorldSize(20, 12, 12, once_entries=4, paraphrase_entries=4, questions_per_task=10)
PARALLEL = ("ddp", "fsdp2")  # of kelib.sharding, which imports torch
# how the work is shared out, and how often it is saved: no number rests on these
NOT_OF_A_RUN = ("processes", "parallel", "recompute", "save_every")


@dataclass(frozen=True)
class Learning:
    """Continual learning from some checkpoints of a trajectory.

    Attributes:
        steps: the stages that are continued, steps of pretraining among ``model.steps``.
        text: what is read, a source as in ``data``; packed with the model's own tokenizer.
        sequence_length: tokens of a packed sequence.
        sequences: packed for learning; None: as many as are read, so that each is read once.
        heldout_sequences: packed beside them, for the loss before and after.
        updates: training steps of each run.
        batch_size: sequences of an update, over all processes.
        injections: moments at which passages are shown.
        learning_rates: peaks; seeds: of reading order and injection.
        control: whether each run is also done without passages.
        entries: ``generated``, a file or folder, or a data set of the hub, see
            :func:`kelib.fictional.load_fictional_knowledge`.
        tasks: names of ``kelib.task_files.PUBLIC_TASKS``, and ``generated:NAME``.
        task_data: folder of local copies of the public tasks; None: from the hub.
        task_limit: first items of each public task; None: all.
        score_batch: sequences at once where a loss or a task is scored.
        save_every: updates between two states; None: a run that was killed begins again.
        processes: that share every batch, on one machine; ``parallel``: with whole weights in each
            (``ddp``) or divided ones (``fsdp2``), ``recompute``: activations too.
    """

    steps: tuple[int, ...]
    text: str
    sequence_length: int
    heldout_sequences: int
    updates: int
    batch_size: int
    injections: int
    learning_rates: tuple[float, ...]
    optimizer: Optimizer
    tasks: tuple[str, ...]
    entries: str = GENERATED_ENTRIES
    seeds: tuple[int, ...] = (0,)
    control: bool = True
    sequences: int | None = None
    paraphrase_entries: int | None = None
    task_data: str | None = None
    task_limit: int | None = None
    training: Training = field(default_factory=Training)
    score_batch: int = 16
    save_every: int | None = None
    processes: int = 1
    parallel: str = "ddp"
    recompute: bool = False

    def __post_init__(self) -> None:
        for name in ("heldout_sequences", "updates", "batch_size", "injections", "score_batch"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(self.sequence_length >= 8, "sequence_length", self.sequence_length, "at least 8")
        for name in ("sequences", "task_limit", "save_every", "processes"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "at least 1")
        whole = self.updates % self.injections == 0
        _require(whole, "updates", self.updates, f"a multiple of the {self.injections} injections")
        for name in ("steps", "learning_rates", "seeds", "tasks"):
            values = getattr(self, name)
            distinct = len(values) > 0 and len(set(values)) == len(values)
            _require(distinct, name, values, "a list of distinct values, not empty")
        rates = self.learning_rates
        _require(all(rate > 0 for rate in rates), "learning_rates", rates, "above 0")
        _require(all(seed >= 0 for seed in self.seeds), "seeds", self.seeds, "at least 0")
        _require(
            self.parallel in PARALLEL, "parallel", self.parallel, f"one of {listing(PARALLEL)}"
        )
        would = [n for n in range(1, self.batch_size + 1) if self.batch_size % n == 0]
        shares = ", ".join(map(str, would))
        known = f"a divisor of batch_size = {self.batch_size}: {shares}"
        _require(self.processes in would, "processes", self.processes, known)
        folder = self.task_folder
        if folder is not None and not folder.is_dir():
            raise KelibError(f"learning.task_data: there is no folder {self.task_data}")
        for name in self.tasks:
            if not name.startswith(f"{GENERATED_ENTRIES}:"):
                there = task_names(folder)
                known = f"among {listing(there)}, or generated:NAME"
                _require(name in there, "tasks", name, known)

    @property
    def task_folder(self) -> Path | None:
        """``task_data`` from the repository's root."""
        return None if self.task_data is None else repository_root() / _home(self.task_data)

    @property
    def entries_path(self) -> Path | None:
        """The file or folder of ``entries``, None where they are generated or on the hub."""
        path = repository_root() / _home(self.entries)
        return path if self.entries != GENERATED_ENTRIES and path.exists() else None

    @property
    def read(self) -> int:
        """Sequences that a run reads."""
        return self.updates * self.batch_size

    @property
    def packed(self) -> int:
        """Sequences that are packed for learning."""
        return self.read if self.sequences is None else self.sequences

    def content(self) -> dict[str, str | None]:
        """Digests of the local files that are named, as they are now."""
        return {
            "entries_sha256": content_digest(self.entries_path),
            "tasks_sha256": content_digest(self.task_folder),
        }


def _require(holds: bool, name: str, value: object, constraint: str) -> None:
    require(holds, f"learning.{name}", value, constraint)


def _home(path: str) -> Path:
    return Path(path).expanduser()


def content_digest(place: Path | None) -> str | None:
    """Digest of the content of a file, or of all files in a folder with their names."""
    if place is None:
        return None
    files = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())
    found = hashlib.sha256()
    for path in files:
        found.update(f"{path.relative_to(place)}\0".encode())
        found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()[:16]


# --- what kelib.learning takes ------------------------------------------------------------------


@dataclass(frozen=True)
class Generated:
    """Where passages come from if no entries are named."""

    world: WorldSize = WORLD


@dataclass(frozen=True)
class Protocol:
    """The part of a study's profile that :func:`kelib.learning.learn` reads, for a model that has
    no study.
    """

    profile: str
    continual: Continual
    training: Training
    corpus: Generated = field(default_factory=Generated)


def protocol_values(learning: Learning) -> dict[str, Any]:
    """What :func:`protocol` is made from, fit for JSON and for the settings of a run."""
    names = ("updates", "batch_size", "injections")
    optimizer = dataclasses.asdict(learning.optimizer)
    return {
        **{name: getattr(learning, name) for name in names},
        "optimizer": {**optimizer, "betas": list(optimizer["betas"])},
        "training": dataclasses.asdict(learning.training),
    }


def protocol(values: Mapping[str, Any], learning_rate: float, seed: int) -> Protocol:
    """The protocol of one run. Raises KelibError for values that cannot be."""
    continual = Continual(
        steps=values["updates"],
        batch_size=values["batch_size"],
        learning_rates=(learning_rate,),
        seeds=(seed,),
        stages=(1.0,),
        injections=values["injections"],
        optimizer=convert(Optimizer, values["optimizer"], "learning.optimizer"),
    )
    training = convert(Training, values["training"], "learning.training")
    return Protocol("published", continual, training)

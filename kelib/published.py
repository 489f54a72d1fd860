"""A model that others trained, measured on real text: profile, grid of runs and tables. No torch.

A published profile names one model (a folder, an id of the hub, a row of ``data/models.yaml``, or
``generated:TYPE``, a tiny untrained one for trying out) and texts. On each text all entropies are
measured in one pass: the knowledge entropy in every definition of a coefficient, attention and
next-token entropy, with jackknife errors, and how the estimate depends on the number of sequences.
Its file in ``notebooks/params`` has the key ``published`` where a study has ``profile``.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from kelib import archives
from kelib.config import EXECUTORS, repository_root
from kelib.errors import KelibError, listing
from kelib.hub_sources import text_runs
from kelib.jackknife import BLOCKS
from kelib.own_model import GENERATED as GENERATED
from kelib.own_model import is_own, own_model_run, with_places
from kelib.profile_kinds import load_kind, profile_from_values, profiles_of_kind
from kelib.results import Tables, open_tables
from kelib.run import Run, provenance_of_runs
from kelib.runs import execute
from kelib.schema import digest, require, require_name
from kelib.tables import library_digest, read_table, write_table

DEFINITIONS = ("absolute", "relu", "contribution")  # of kelib.accumulation, which imports torch
TABLES = ("entropy", "totals", "convergence", "texts")


@dataclass(frozen=True)
class PublishedModel:
    """``source``: a model folder (a relative path is from the root of the repository), a hub id, a
    row of ``data/models.yaml``, or ``generated:TYPE``, an untrained model of that type of
    transformers. ``separator``: the token that follows each document; None is the tokenizer's
    end-of-text token, which in chat models ends a turn rather than a document. ``revision``: a
    branch, tag or commit of a model on the hub; None is ``main``."""

    source: str
    separator: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class PublishedProfile:
    """Everything the measurement of one published model needs."""

    published: str  # the name of the profile
    workers: int  # local processes, one thread each
    seed: int  # of the order of documents and the choice of sequences
    model: PublishedModel
    data: tuple[str, ...]  # sources as in a study: names, hub:NAME, generated:NAME, files, folders
    sequences: int  # |D| of each text
    sequence_length: int  # tokens
    batch_size: int  # sequences
    definitions: tuple[str, ...]  # of a memory coefficient
    loss_sequences: int  # the first so many also give the cross-entropy
    questions: tuple[str, ...] = ()  # rows of data/questions.yaml, or generated:NAME
    executor: str = "local"  # or slurm: jobs of a cluster, with notebooks/params/cluster.yaml

    def __post_init__(self) -> None:
        require_name("published", self.published)
        require(
            self.executor in EXECUTORS, "executor", self.executor, f"one of {listing(EXECUTORS)}"
        )
        for name in ("workers", "batch_size", "loss_sequences"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.seed >= 0, "seed", self.seed, "at least 0")
        require(self.sequence_length >= 8, "sequence_length", self.sequence_length, "at least 8")
        whole = self.sequences > 0 and self.sequences % BLOCKS == 0
        require(whole, "sequences", self.sequences, f"a multiple of {BLOCKS}, the jackknife blocks")
        require(
            self.loss_sequences <= self.sequences,
            "loss_sequences",
            self.loss_sequences,
            f"at most sequences, {self.sequences}",
        )
        for name in ("data", "definitions"):
            values = getattr(self, name)
            distinct = len(values) > 0 and len(set(values)) == len(values)
            require(distinct, name, values, "a list of distinct values, not empty")
        for name in self.definitions:
            require(name in DEFINITIONS, "definitions", name, f"among {listing(DEFINITIONS)}")

    @property
    def parameters(self) -> dict[str, Any]:
        """All that can change a number, as JSON values, with the name under ``profile`` too."""
        plain = json.loads(json.dumps(dataclasses.asdict(dataclasses.replace(self, workers=1))))
        del plain["executor"]
        if plain["model"]["revision"] is None:  # it came later than the first of these tables
            del plain["model"]["revision"]
        return {"profile": self.published, **plain}

    @property
    def digest(self) -> str:
        """Digest of the parameters alone: no versions, no commit, not who shares the work."""
        return digest(self.parameters)


def published_profiles() -> list[str]:
    """Names of the published profiles: YAML files of ``notebooks/params`` with that key."""
    return profiles_of_kind("published")


def load_published(name: str, overrides: Mapping[str, Any] | None = None) -> PublishedProfile:
    """Read ``notebooks/params/<name>.yaml``; ``overrides`` are dotted keys, as ``{"sequences":
    64}``. Raises KelibError for an unknown name, key or value.
    """
    return load_kind(PublishedProfile, "published", name, overrides)


def published_from(values: Any, overrides: Mapping[str, Any] | None = None) -> PublishedProfile:
    """Build a published profile from nested mappings and dotted ``overrides``."""
    return profile_from_values(PublishedProfile, "published", values, overrides)


@dataclass(frozen=True)
class PublishedStudy:
    """A published profile and the folder its data goes to."""

    profile: PublishedProfile
    data: Path

    @property
    def measurements(self) -> Path:
        return self.data / "measurements" / self.profile.published

    def model_run(self) -> Run:
        """Have the model as safetensors, fetched, converted or linked to, once.

        Raises KelibError for a source that is none, and as :func:`kelib.own_model.own_model_run`.
        """
        model = self.profile.model
        source, home = model.source, self.data / "checkpoints" / self.profile.published
        row, known = None, archives.models()
        if source not in known and is_own(source):
            return own_model_run(source, model.revision, home)
        if model.revision is not None:
            raise KelibError(
                f"model.revision = {model.revision!r}, but {source} is no model of the hub; leave "
                "it out"
            )
        if not source.startswith(GENERATED):
            if source not in known:
                raise KelibError(
                    f"model.source = {source!r} must be a model folder (relative paths are from "
                    f"{repository_root()}), a hub id (owner/name), a row of data/models.yaml "
                    f"({listing(known)}) or {GENERATED}TYPE, an untrained model"
                )
            row = json.loads(json.dumps(dataclasses.asdict(archives.model_archive(source))))
        settings: dict[str, Any] = {"source": source, "archive": row}
        if row is None:
            settings["sequence_length"] = self.profile.sequence_length
        return Run("import_model", home, settings, files={"sources": self.data / "sources"})

    def measure_run(self, name: str) -> Run:
        """All entropies of the model on one text."""
        made = {"model": self.model_run(), **text_runs([name], self.data)}
        settings = {k: v for k, v in self.profile.parameters.items() if k not in _NOT_OF_A_RUN}
        places, states = with_places([name])
        settings |= {"data": places[name], "separator": self.profile.model.separator}
        if name in states:  # a file of the reader's may change
            settings["text"] = states[name]
        home, sources = self.measurements / "published", {"sources": self.data / "sources"}
        return Run("published", home, settings, made, sources)

    def runs(self) -> list[Run]:
        return [self.measure_run(name) for name in self.profile.data]

    def question_runs(self) -> list[Run]:
        """Accuracy of the model on sets of four-way questions."""
        home, sources = self.measurements / "asked", {"sources": self.data / "sources"}
        model = {"model": self.model_run()}
        return [
            Run("asked", home, {"questions": n}, model, sources) for n in self.profile.questions
        ]


_NOT_OF_A_RUN = ("profile", "published", "workers", "model", "data", "questions")


def open_published(
    name: str, overrides: Mapping[str, Any] | None = None, scratch: bool = False
) -> PublishedStudy:
    """A published profile whose data goes to ``data/``, or with ``scratch`` to a temporary folder,
    the same for the same code and parameters.
    """
    profile = load_published(name, overrides)
    return PublishedStudy(profile, data_folder(profile.digest, scratch))


def data_folder(digest_of_profile: str, scratch: bool) -> Path:
    """``data/``, or with ``scratch`` a temporary folder for this code and these parameters."""
    if not scratch:
        return repository_root() / "data"
    return Path(tempfile.gettempdir()) / f"kelib-scratch-{library_digest()}-{digest_of_profile}"


def measure_published(study: PublishedStudy) -> dict[str, pd.DataFrame]:
    """Do the missing runs and write the tables of :data:`TABLES`, which are returned.

    ``entropy``: data, kind (knowledge, attention: mean over heads, next_token), coefficient, layer,
    entropy_nats, standard_error, bound_nats, sequences. ``totals``: the same summed over layers.
    ``convergence``: data, coefficient, sequences, groups, mean, deviation, see
    :func:`kelib.convergence.convergence`. ``texts``: data, documents the sequences were drawn from,
    sequences, tokens, loss_nats (cross-entropy of the first loss_sequences), parameters. With
    ``questions`` in the profile also ``questions``, see :attr:`kelib.tasks.TaskResults.summary`.
    """
    runs, asked = study.runs(), study.question_runs()
    chosen = study.profile
    execute([*runs, *asked], chosen.workers, "published model", chosen.executor)
    tables = {}
    for name in TABLES:
        tables[name] = _write(study, name, "data", chosen.data, runs)
    if asked:
        tables["questions"] = _write(study, "questions", "questions", chosen.questions, asked)
    return tables


def _write(
    study: PublishedStudy, name: str, by: str, values: Iterable[str], runs: list[Run]
) -> pd.DataFrame:
    """The tables ``name`` of the runs below each other; the column ``by`` tells them by
    ``values``."""
    model, of = study.model_run(), dict(zip(values, runs, strict=True))
    made = [model, *runs]
    inputs = {"model": model.digest} | {value: run.digest for value, run in of.items()}
    note = provenance_of_runs(study.profile.parameters, [study.profile.seed], inputs, made)
    parts = []
    for value, run in of.items():
        part = run.read_table(f"{name}.csv")
        part.insert(0, by, value)
        parts.append(part)
    path = study.measurements / f"{name}.csv"
    write_table(pd.concat(parts, ignore_index=True), path, note)
    return read_table(path)


class PublishedTables(Tables):
    """Tables of a published profile, opened for drawing."""

    @property
    def label(self) -> str:
        """Profile, model and texts, as figures show them."""
        chosen = self.published
        return f"profile {self.name} · {self.title} · seed {chosen.seed}"

    @property
    def published(self) -> PublishedProfile:
        """What the tables were made with, read from their provenance."""
        return published_from(self.parameters)

    @property
    def title(self) -> str:
        """The name of the model."""
        source, known = self.published.model.source, archives.models()
        return known[source].title if source in known else _short(source)

    @property
    def texts(self) -> dict[str, str]:
        """What figures call each text of the profile: its name, and of a long path the last part,
        unless two would be called the same."""
        names = self.published.data
        short = [_short(name) for name in names]
        called = short if len(set(short)) == len(names) else names
        return dict(zip(names, called, strict=True))


def _short(name: str) -> str:
    """The last part of a path that is longer than owner/name."""
    return Path(name).name if name.startswith(("~", ".", "/")) or name.count("/") > 1 else name


def open_published_tables(name: str, source: str = "reference") -> PublishedTables:
    """As :func:`kelib.results.open_tables`, for a published profile."""
    return PublishedTables.of(open_tables(name, source))

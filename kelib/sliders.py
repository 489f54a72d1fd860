"""What resuscitation with any p and q does to a model: its entropy, its loss, its coefficients.

``ours_sliders.ipynb`` moves through these, either live on a model or over a small table that
:func:`measure_grid` made (torch is needed for the first only).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd

from kelib.config import repository_root
from kelib.errors import KelibError, listing
from kelib.results import Tables
from kelib.study import Study
from kelib.tables import provenance, write_table

REFERENCE = "sliders"  # folder of data/measurements and of data/reference
RATIOS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9)
FACTORS = (0.25, 0.5, 1.0, 2.0, 3.0, 5.0)
SEQUENCES = 128  # of the held-apart documents that entropy is measured on
PLACES = np.array([0.5, 1, 2, 4, 7, 10, 15, 20, 30, 40, 50, 60, 70, 80, 90, 99.5])  # % of memories


@dataclass(frozen=True)
class Effect:
    """A model after resuscitation, before any training.

    ``entropy`` and ``bound``: ``(layers,)`` nats. ``loss``: nats per token. ``activity``:
    ``(layers, places)``, the mean coefficient at :data:`PLACES` (% of the memories, from the most
    active on) over the mean of its layer.
    """

    ratio: float
    factor: float
    entropy: np.ndarray
    bound: np.ndarray
    loss: float
    activity: np.ndarray


class Effects(Protocol):
    """Where the effect of a ratio p and a factor q comes from."""

    def at(self, ratio: float, factor: float) -> Effect:
        """The effect of p = ``ratio`` and q = ``factor``; p = 0 is the model as it is."""


class LiveEffects:
    """Computed on a model, over ``rows`` of token ids ``(n, T)``, each (p, q) once."""

    def __init__(self, model: Any, rows: np.ndarray) -> None:
        self.model, self.rows = model, rows
        self.mean_coefficients = self._measured(model).mean_coefficients
        self._known: dict[tuple[float, float], Effect] = {}

    def _measured(self, model: Any) -> Any:
        from kelib.batches import block_batches
        from kelib.entropy import measure_entropy

        return measure_entropy(model, ({"input_ids": b} for b in block_batches(self.rows)))

    def at(self, ratio: float, factor: float) -> Effect:
        """See :class:`Effects`. Raises KelibError as :func:`kelib.resuscitate`."""
        from kelib.evaluation import heldout_loss
        from kelib.interventions import resuscitate

        key = (ratio, factor if ratio else 1.0)
        if key not in self._known:
            model = self.model
            if ratio:
                model = resuscitate(model, self.mean_coefficients, *key, plain=True)
            found = self._measured(model)
            self._known[key] = Effect(
                *key,
                entropy=found.knowledge_entropy,
                bound=np.log([len(mean) for mean in found.mean_coefficients]),
                loss=heldout_loss(model, self.rows),
                activity=np.stack([ranked(mean) for mean in found.mean_coefficients]),
            )
        return self._known[key]


def ranked(mean: np.ndarray) -> np.ndarray:
    """Mean coefficients ``(m,)`` at :data:`PLACES`, over their mean.

    >>> ranked(np.ones(100)).tolist() == [1.0] * len(PLACES)
    True
    """
    ranks = 100 * (np.arange(len(mean)) + 0.5) / len(mean)
    return np.interp(PLACES, ranks, np.sort(mean)[::-1] / mean.mean())


def live_effects(model: str, text: str, sequences: int = 32, length: int = 64) -> LiveEffects:
    """Effects on the model in a folder, or of a checkpoint of a study, over a text (``.txt``,
    ``.jsonl``, a folder of those, a source, or ``generated:NAME``).

    Relative paths are from the root of the repository. Raises KelibError for what is not there.
    """
    import torch

    from kelib.own_model import own_folder, with_places
    from kelib.pretrained import load_model, quiet, read_tokenizer
    from kelib.published_jobs import draw_sequences, read_text

    folder = own_folder(model)
    if folder is None:
        raise KelibError(f"model = {model!r} must be a folder; bring the model here first")
    place, (places, _) = str(folder), with_places([text])
    with quiet():
        _, tokenizer, end = read_tokenizer(place, None)
        documents = read_text(places[text], repository_root() / "data" / "sources")
        rows = draw_sequences(documents, tokenizer, end, length, sequences, 0)
        return LiveEffects(load_model(place, None, torch.float32, head=True), rows)


# --- the table ------------------------------------------------------------------------------------


def measure_grid(study: Study, seed: int, folder: Path) -> None:
    """Write the effects of every p of :data:`RATIOS` and q of :data:`FACTORS` into ``folder``: on
    the last checkpoint of a pretraining seed of a finished study.

    ``entropy.csv``: ratio, factor, layer, entropy_nats, bound_nats; ``loss.csv``: ratio, factor,
    loss_nats; ``activity.csv``: ratio, factor, layer, place, activity.
    """
    from kelib.checkpoints import load_checkpoint, step_folder
    from kelib.corpus import load_corpus

    run, step = study.pretrain_run(seed), study.profile.pretraining.steps
    run.check()
    model, _ = load_checkpoint(step_folder(run.folder, step))
    rows = load_corpus(study.corpus_run(seed).folder).blocks["entropy"]
    rows = rows[:: max(1, len(rows) // SEQUENCES)][
        :SEQUENCES
    ]  # facts and text lie one after another
    live = LiveEffects(model, np.asarray(rows))
    found = [live.at(0.0, 1.0)]
    found += [live.at(ratio, factor) for ratio in RATIOS if ratio for factor in FACTORS]
    parameters = study.profile.parameters | {"profile": REFERENCE, "of": study.profile.profile}
    note = provenance(parameters | {"step": step}, [seed], {"pretrain": run.digest})
    for name, table in tables_of(found).items():
        write_table(table, folder / f"{name}.csv", note)


def tables_of(effects: Sequence[Effect]) -> dict[str, pd.DataFrame]:
    """The three tables of :func:`measure_grid`."""
    parts: dict[str, list[dict[str, float]]] = {"entropy": [], "loss": [], "activity": []}
    for one in effects:
        key = {"ratio": one.ratio, "factor": one.factor}
        parts["loss"].append(key | {"loss_nats": one.loss})
        for layer, (nats, bound) in enumerate(zip(one.entropy, one.bound, strict=True)):
            of = key | {"layer": layer}
            parts["entropy"].append(of | {"entropy_nats": nats, "bound_nats": bound})
            values = zip(PLACES, one.activity[layer], strict=True)
            parts["activity"] += [of | {"place": p, "activity": a} for p, a in values]
    return {name: pd.DataFrame(rows) for name, rows in parts.items()}


class StoredEffects:
    """Read from the tables of :func:`measure_grid`: a (p, q) that was not measured gives the
    nearest one that was.
    """

    def __init__(self, tables: Mapping[str, pd.DataFrame]) -> None:
        keys = ["ratio", "factor"]
        self._loss = tables["loss"].set_index(keys)["loss_nats"]
        self._entropy = dict(list(tables["entropy"].groupby(keys)))
        self._activity = dict(list(tables["activity"].groupby(keys)))

    @classmethod
    def of(cls, results: Tables) -> StoredEffects:
        """Those of a folder of measurements."""
        return cls({name: results.table(name) for name in ("entropy", "loss", "activity")})

    @property
    def grid(self) -> list[Effect]:
        """Every effect that was measured."""
        return [self.at(ratio, factor) for ratio, factor in self._loss.index]

    def at(self, ratio: float, factor: float) -> Effect:
        """See :class:`Effects`. Raises KelibError for p outside 0 to 1 and q of at most 0."""
        if not (0 <= ratio <= 1 and factor > 0):
            raise KelibError(f"p = {ratio} must lie between 0 and 1 and q = {factor} above 0")
        ratios = sorted({p for p, _ in self._loss.index})
        near = min(ratios, key=lambda p: abs(p - ratio))
        factors = sorted(q for p, q in self._loss.index if p == near)
        key = near, min(factors, key=lambda q: abs(np.log(q / factor)))
        rows, activity = self._entropy[key], self._activity[key]
        return Effect(
            *key,
            entropy=rows["entropy_nats"].to_numpy(),
            bound=rows["bound_nats"].to_numpy(),
            loss=float(self._loss[key]),
            activity=activity["activity"].to_numpy().reshape(len(rows), -1),
        )


def changes(effects: Sequence[Effect]) -> pd.DataFrame:
    """Change of entropy (nats, sum over layers) and of loss (nats) against p = 0, a row each.

    Raises KelibError if p = 0 is not among them.
    """
    whole = [one for one in effects if one.ratio == 0]
    if not whole:
        raise KelibError(f"p = 0 is missing among p = {listing({e.ratio for e in effects})}")
    before = whole[0]
    return pd.DataFrame(
        {
            "ratio": one.ratio,
            "factor": one.factor,
            "entropy_change": one.entropy.sum() - before.entropy.sum(),
            "loss_change": one.loss - before.loss,
        }
        for one in effects
    )

"""Which passage goes into which sequence of which step: a table that one can print before
training.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from kelib.errors import KelibError
from kelib.world import Entry


def injection_schedule(
    once: int, paraphrase: int, injections: int, steps: int, batch_size: int, seed: int
) -> pd.DataFrame:
    """The paper's protocol as a table with columns step, row, entry_set, entry, passage.

    At each of ``injections`` moments, ``steps / injections`` apart and the last one in the last
    step (as released), every paraphrase entry shows another one of its wordings and an even share
    of the once entries shows its original. ``step`` counts from 0. Where more passages are due
    than a batch has sequences, the surplus moves to the steps just before, so that none is
    dropped; ``moved`` counts by how many steps. Rows within a batch are drawn from ``seed``.
    """
    if steps % injections:
        raise KelibError(f"steps = {steps} must be a multiple of injections = {injections}")
    interval = steps // injections
    generator = np.random.default_rng([seed, 21])
    once_order = generator.permutation(once)
    rows = []
    for moment in range(injections):
        due = [("paraphrase", entry, moment) for entry in range(paraphrase)]
        first, last = once * moment // injections, once * (moment + 1) // injections
        due += [("once", int(entry), 0) for entry in once_order[first:last]]
        if len(due) > interval * batch_size:
            raise KelibError(
                f"{len(due)} passages are due every {interval} steps of {batch_size} sequences; "
                "raise continual.batch_size or steps, or lower the number of entries"
            )
        for moved in range(-(-len(due) // batch_size)):
            part = due[moved * batch_size : (moved + 1) * batch_size]
            places = np.sort(generator.permutation(batch_size)[: len(part)])
            step = (moment + 1) * interval - 1 - moved
            for place, (entry_set, entry, passage) in zip(places, part, strict=True):
                rows.append((step, int(place), entry_set, entry, passage, moved))
    columns = ["step", "row", "entry_set", "entry", "passage", "moved"]
    return pd.DataFrame(rows, columns=columns).sort_values(["step", "row"], ignore_index=True)


@dataclass
class Injector:
    """Puts passages at the start of sequences; the rest of the sequence follows, cut at its length.

    ``exposures`` counts what was really put in, to be compared with the schedule at the end.
    """

    schedule: pd.DataFrame
    # (entry_set, entry) -> token ids of each wording
    passages: dict[tuple[str, int], list[list[int]]]

    def __post_init__(self) -> None:
        self.exposures: dict[tuple[str, int], int] = dict.fromkeys(self.passages, 0)
        self._by_step = {
            int(step): part  # type: ignore[arg-type]
            for step, part in self.schedule.groupby("step")
        }
        for key, wordings in self.passages.items():
            if any(len(ids) == 0 for ids in wordings):
                raise KelibError(f"entry {key} has a passage without tokens")

    def apply(self, batch: np.ndarray, step: int) -> np.ndarray:
        """A copy of ``batch`` ``(B, T)`` with this step's passages in place (the batch itself
        without any).
        """
        due = self._by_step.get(step)
        if due is None:
            return batch
        batch = batch.copy()
        length = batch.shape[1]
        for line in due.itertuples():
            key = (str(line.entry_set), int(line.entry))  # type: ignore[arg-type]
            wordings = self.passages[key]
            ids = wordings[int(line.passage) % len(wordings)][:length]  # type: ignore[arg-type]
            row = int(line.row)  # type: ignore[arg-type]
            batch[row] = np.concatenate([ids, batch[row, : length - len(ids)]])
            self.exposures[key] += 1
        return batch

    def check(self) -> None:
        """Raise unless every entry was shown exactly as often as the schedule says."""
        due = self.schedule.groupby(["entry_set", "entry"]).size().to_dict()
        wrong = {key: n for key, n in self.exposures.items() if n != due.get(key, 0)}
        if wrong:
            key, times = next(iter(wrong.items()))
            raise KelibError(
                f"{len(wrong)} of {len(self.exposures)} entries were not shown as scheduled, such "
                f"as {key[0]} {key[1]}: {times} times for {due.get(key, 0)}; train from step 0 to "
                "the end"
            )


def encode_passages(
    tokenizer: object, entries: dict[str, tuple[Entry, ...]]
) -> dict[tuple[str, int], list]:
    """Token ids of every wording of every entry, by (entry_set, index)."""
    return {
        (entry_set, index): [
            tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[operator]
            for text in entry.passages
        ]
        for entry_set, members in entries.items()
        for index, entry in enumerate(members)
    }

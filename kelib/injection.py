"""Which passage goes into which sequence of which step: a table that one can print before
training.

    python -m kelib injection PROFILE
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from kelib.entries import Entry
from kelib.errors import KelibError

# (entry_set, entry) -> token ids of each wording
Passages = Mapping[tuple[str, int], Sequence[Sequence[int]]]
_PASSAGE = ["entry_set", "entry", "passage"]


def injection_schedule(
    once: int,
    paraphrase: int,
    injections: int,
    steps: int,
    batch_size: int,
    seed: int,
    passages: Passages | None = None,
    sequence_length: int | None = None,
) -> pd.DataFrame:
    """The paper's protocol as a table, a line for each sequence that begins with a passage.

    At each of ``injections`` moments, ``steps / injections`` apart and the last one in the last
    step (as released), every paraphrase entry shows another one of its wordings and an even share
    of the once entries shows its original. ``batch_size`` is that of the global batch, whatever
    the number of processes; rows within it are drawn from ``seed``.

    Two cases the paper does not meet. A passage of n tokens that is longer than the T =
    ``sequence_length`` of a sequence is continued: its ``parts`` = ceil(n / T) consecutive parts,
    all of T tokens but the last, take a sequence each, in reading order. (The first token of a
    part is read and not predicted, as that of any sequence.) Where more sequences are due than a
    batch has, the surplus moves to the steps just before, so that none is dropped. Parts are known
    only with ``passages`` (token ids, see :func:`encode_passages`) and ``sequence_length``: give
    both, or none where every passage fits its sequence, which :class:`Injector` then insists on.

    Columns: step (from 0) and row of the sequence; entry_set, entry, passage (number of the
    wording; fewer wordings than injections start over); moved, by how many steps it came early;
    part (from 0) and parts.

    Raises KelibError for counts that cannot be, and where more is due than the steps between two
    moments have sequences: a passage would overtake the one before.
    """
    for name, value, least in (
        *(("once", once, 0), ("paraphrase", paraphrase, 0), ("injections", injections, 1)),
        *(("steps", steps, 1), ("batch_size", batch_size, 1)),
    ):
        if value < least:
            raise KelibError(f"{name} = {value} must be at least {least}")
    if steps % injections:
        raise KelibError(f"steps = {steps} must be a multiple of injections = {injections}")
    if (passages is None) != (sequence_length is None):
        raise KelibError("passages and sequence_length must be given together, or neither")
    interval = steps // injections
    generator = np.random.default_rng([seed, 21])
    once_order = generator.permutation(once)
    rows = []
    for moment in range(injections):
        shown = [("paraphrase", entry, moment) for entry in range(paraphrase)]
        first, last = once * moment // injections, once * (moment + 1) // injections
        shown += [("once", int(entry), 0) for entry in once_order[first:last]]
        due = [line for line in shown for _ in range(_parts(line, passages, sequence_length))]
        if len(due) > interval * batch_size:
            longer = f" ({len(due)} sequences)" if len(due) > len(shown) else ""
            raise KelibError(
                f"{len(shown)} passages{longer} are due every {interval} steps of {batch_size} "
                "sequences; raise continual.batch_size or steps, lengthen the sequences, or lower "
                "the number of entries"
            )
        for moved in range(-(-len(due) // batch_size)):
            part = due[moved * batch_size : (moved + 1) * batch_size]
            places = np.sort(generator.permutation(batch_size)[: len(part)])
            step = (moment + 1) * interval - 1 - moved
            for place, line in zip(places, part, strict=True):
                rows.append((step, int(place), *line, moved))
    columns = ["step", "row", *_PASSAGE, "moved"]
    table = pd.DataFrame(rows, columns=columns).sort_values(["step", "row"], ignore_index=True)
    # numbered in the order of the table: a passage is read from its first part to its last
    parts = table.groupby(_PASSAGE)["step"]
    return table.assign(part=parts.cumcount(), parts=parts.transform("size"))


def _parts(line: tuple[str, int, int], passages: Passages | None, length: int | None) -> int:
    """How many sequences of ``length`` tokens the passage of a line takes."""
    if passages is None or length is None:
        return 1
    if length < 1:
        raise KelibError(f"sequence_length = {length} must be at least 1")
    return -(-len(_wording(line, passages)) // length)


def _wording(line: Sequence[Any], passages: Passages) -> Sequence[int]:
    entry_set, entry, passage = line
    wordings = passages.get((entry_set, entry), ())
    if not wordings or not all(len(ids) for ids in wordings):
        raise KelibError(f"entry {(entry_set, entry)} has a passage without tokens, or none at all")
    return wordings[passage % len(wordings)]


def describe_schedule(schedule: pd.DataFrame) -> str:
    """The schedule in one sentence: how much is shown when, what is split and what is moved."""
    if schedule.empty:
        return "Nothing is injected."
    whole = schedule[schedule["part"] == 0]
    sets = ", ".join(
        f"{len(lines)} of {lines['entry'].nunique()} {name} entries"
        for name, lines in whole.groupby("entry_set")
    )
    moments = sorted((schedule["step"] + schedule["moved"]).unique())
    steps = f"step {moments[0]}" if len(moments) == 1 else f"steps {moments[0]} to {moments[-1]}"
    split, placed = "no passage split", "all in the batch of their step"
    if (whole["parts"] > 1).any():
        longer = whole.loc[whole["parts"] > 1, "parts"]
        split = (
            f"{_count(len(longer), 'passage')} longer than a sequence split into {longer.sum()} "
            "parts, each in a sequence of its own, in reading order"
        )
    if (moved := int((schedule["moved"] > 0).sum())) > 0:
        placed = (
            f"{_count(moved, 'sequence')} beyond the batch of their step spread over the steps "
            f"just before it, {schedule['moved'].max()} at most"
        )
    return (
        f"{_count(len(whole), 'passage')} ({sets}) take {_count(len(schedule), 'sequence')} in "
        f"{_count(len(moments), 'injection')}, {steps} counted from 0; {split}; {placed}; none "
        "dropped."
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def format_schedule(schedule: pd.DataFrame) -> str:
    """The sentence of :func:`describe_schedule` and, below it, the table line by line."""
    head = f"injection schedule\n{describe_schedule(schedule)}"
    return head if schedule.empty else f"{head}\n\n{schedule.to_string(index=False)}"


@dataclass
class Injector:
    """Puts passages at the start of sequences; the rest of the sequence follows, cut at its length.

    Every process applies it to the *global* batch and trains on its own rows, so that neither the
    batches nor the counts depend on how many processes share the work. What was really put in is
    counted for every line of the schedule, and :meth:`check` compares at the end.

    Raises KelibError for a passage without tokens and for an entry that has no passages.
    """

    schedule: pd.DataFrame
    passages: Passages
    shown: np.ndarray = field(init=False, repr=False)  # times, for each line of the schedule

    def __post_init__(self) -> None:
        for key, wordings in self.passages.items():
            if any(len(ids) == 0 for ids in wordings):
                raise KelibError(f"entry {key} has a passage without tokens")
        self.shown = np.zeros(len(self.schedule), dtype=np.int64)
        columns = [self.schedule[name].to_list() for name in ("step", "row", "part", *_PASSAGE)]
        self._by_step: dict[int, list[tuple[int, int, int, np.ndarray]]] = {}
        for line, (step, row, part, *passage) in enumerate(zip(*columns, strict=True)):
            ids = np.asarray(_wording(passage, self.passages), dtype=np.int64)
            self._by_step.setdefault(step, []).append((line, row, part, ids))
        self._checked_length = 0

    @property
    def exposures(self) -> dict[tuple[str, int], int]:
        """How many sequences showed each entry so far; every part of a passage counts."""
        found: dict[tuple[str, int], int] = dict.fromkeys(self.passages, 0)
        keys = zip(self.schedule["entry_set"], self.schedule["entry"], strict=True)
        for key, times in zip(keys, self.shown.tolist(), strict=True):
            found[key] += times
        return found

    def exposure_table(self) -> pd.DataFrame:
        """The schedule with ``shown``, how often each of its lines was put into a batch."""
        return self.schedule.assign(shown=self.shown)

    def apply(self, batch: np.ndarray, step: int) -> np.ndarray:
        """A copy of ``batch`` ``(B, T)`` with this step's passages in place (the batch itself
        without any).

        Raises KelibError where the schedule was made for other sequences: a passage that needs
        more or fewer parts, a row that the batch does not have, a token beyond its type.
        """
        length = batch.shape[1]
        if length != self._checked_length:  # in the first step, not when the first passage is due
            self._check_parts(length)
        due = self._by_step.get(step)
        if due is None:
            return batch
        batch = batch.copy()
        largest = np.iinfo(batch.dtype).max
        for line, row, part, ids in due:
            if row >= len(batch):
                raise KelibError(
                    f"step {step} has {len(batch)} sequences, the schedule fills row {row}; make "
                    "the schedule with the size of the global batch"
                )
            if ids.max() > largest:
                raise KelibError(
                    f"a passage has token {ids.max()}, the batch holds tokens up to {largest}; "
                    "encode the passages with the tokenizer of the corpus"
                )
            ids = ids[part * length : (part + 1) * length]
            batch[row] = np.concatenate([ids, batch[row, : length - len(ids)]])
            self.shown[line] += 1
        return batch

    def _check_parts(self, length: int) -> None:
        parts = self.schedule["parts"].to_list()
        for step, due in self._by_step.items():
            for line, _, _, ids in due:
                needed = -(-len(ids) // length)
                if parts[line] != needed:
                    raise KelibError(
                        f"{self._name(line)} has {len(ids)} tokens: sequences of {length} take it "
                        f"in {needed} parts, the schedule has {parts[line]} (step {step}); give "
                        "passages and sequence_length to injection_schedule"
                    )
        self._checked_length = length

    def _name(self, line: int) -> str:
        at = self.schedule.iloc[line]
        of = f", part {at['part'] + 1} of {at['parts']}" if at["parts"] > 1 else ""
        return f"{at['entry_set']} {at['entry']}, wording {at['passage']}{of}"

    def check(self) -> None:
        """Raise unless every line of the schedule, part by part, was put in exactly once."""
        wrong = np.flatnonzero(self.shown != 1)
        if len(wrong):
            keys = self.schedule.iloc[wrong][["entry_set", "entry"]].drop_duplicates()
            line = int(wrong[0])
            raise KelibError(
                f"{len(keys)} of {len(self.passages)} entries were not shown as scheduled, such as "
                f"{self._name(line)} at step {self.schedule['step'].iloc[line]}: "
                f"{self.shown[line]} times for 1; train every step from 0 to the end once"
            )

    def state_dict(self) -> dict[str, Any]:
        """The counts, to be kept with the state of the training (plain numbers, fit for JSON)."""
        return {"shown": self.shown.tolist()}

    def load_state_dict(self, state: Mapping[str, Any], step: int | None = None) -> None:
        """Count on from :meth:`state_dict`; ``step`` is the next one (from 0).

        What was put in from ``step`` on, by a loader that read ahead of the training, is forgotten.
        """
        shown = np.asarray(state["shown"], dtype=np.int64)
        if shown.shape != self.shown.shape:
            raise KelibError(
                f"the saved counts have {len(shown)} lines, the schedule {len(self.shown)}; "
                "continue with the settings of the run that saved them"
            )
        if step is not None:
            shown = np.where(self.schedule["step"].to_numpy() < step, shown, 0)
        self.shown = shown.copy()


def encode_passages(
    tokenizer: Any, entries: Mapping[str, Sequence[Entry]]
) -> dict[tuple[str, int], list[list[int]]]:
    """Token ids of every wording of every entry, by (entry_set, index)."""
    # verbose: passages longer than the window are split, no mistake here
    options = {"add_special_tokens": False, "verbose": False}
    return {
        (entry_set, index): [tokenizer(text, **options)["input_ids"] for text in entry.passages]
        for entry_set, members in entries.items()
        for index, entry in enumerate(members)
    }

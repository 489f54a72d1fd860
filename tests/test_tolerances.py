"""The rule for one quantity: what seeds and machines do passes, a planted change does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from kelib.tolerances import (
    LIKE,
    MACHINES,
    OF_VALUE,
    OFF,
    SAME,
    SEEDS,
    WITHIN,
    Measured,
    judge,
    standard_deviations,
)

REFERENCE = Path(__file__).parents[1] / "data" / "reference"
COLUMNS = ["k_cl", "p_cl", "loss_general_cl", "entropy_cl", "forgetting"]


def committed(table: str, column: str, cell: list[str], of: str = "study") -> np.ndarray:
    """Cells x seeds of a committed table."""
    rows = pd.read_csv(REFERENCE / of / f"{table}.csv")
    rows = rows[rows["model"] == "olmo"] if "model" in rows else rows
    return rows.pivot(index=cell, columns="seed", values=column).to_numpy(float)


@pytest.fixture(scope="module")
def learned() -> dict[str, np.ndarray]:
    cell = ["stage_step", "learning_rate", "injected"]
    return {column: committed("continual", column, cell) for column in COLUMNS}


@pytest.fixture
def k(learned) -> np.ndarray:
    return learned["k_cl"]


def test_the_same_is_the_same(k):
    assert judge(k, k.copy())[0] == {"status": SAME}
    hollow = np.where(np.arange(5) == 2, np.nan, k)
    assert judge(hollow, hollow)[0] == {"status": SAME}


def test_noise_as_large_as_that_of_seeds_passes_in_200_of_200_draws(learned):
    draw = np.random.default_rng(0)
    for _ in range(200):
        # as seeds differ: all cells of a quantity, and all quantities, together
        mixture = draw.normal(size=(5, 5)) / 2 * np.sqrt(2)
        for column, values in learned.items():
            fresh = values + (values - values.mean(axis=1, keepdims=True)) @ mixture
            if column.startswith("p_"):
                fresh = np.round(fresh * 120) / 120
            found, _ = judge(values, fresh, ratio=column == "forgetting")
            assert found["status"] == WITHIN, (column, found)


def test_two_machines_pass_and_a_shift_below_one_seed_is_seen_beside_them():
    here, there = (committed("pretraining", "loss", ["step"], of) for of in ("study", "families"))
    found, _ = judge(here, there)
    assert found["status"] == WITHIN and 0.05 < found["spread"] < 0.3
    shifted = there + 0.5 * standard_deviations(here)[:, None]
    found, _ = judge(here, shifted)
    assert found["status"] == OFF and found["reason"].startswith("shifted in all seeds by +0.")


@pytest.mark.parametrize(("sizes", "status"), [(0.3, WITHIN), (0.5, OFF), (1.0, OFF)])
def test_a_shift_of_all_seeds_is_caught_from_a_third_of_what_seeds_differ_by(k, sizes, status):
    deviations = standard_deviations(k)[:, None]
    assert judge(k, k + sizes * deviations)[0]["status"] == status
    assert judge(k, k - sizes * deviations)[0]["status"] == status


def test_a_column_times_1_05_is_caught_and_so_is_one_cell(learned):
    for column in ("k_cl", "entropy_cl", "loss_general_cl"):
        assert judge(learned[column], learned[column] * 1.05)[0]["status"] == OFF
    one_cell = learned["entropy_cl"].copy()
    one_cell[7] += 0.5
    found, size = judge(learned["entropy_cl"], one_cell)
    assert found["status"] == OFF and " in 1 of 24 cells" in found["reason"]
    assert np.argmax(size.max(axis=1)) == 7


def test_single_numbers_and_whole_columns_have_limits(k):
    one, deviations = k.copy(), standard_deviations(k)[:, None]
    one[3, 2] += 20 * np.sqrt(2) * deviations[3, 0]
    found, size = judge(k, one)
    assert "largest 20 above 15" in found["reason"] and "spread" not in found["reason"]
    assert np.unravel_index(size.argmax(), size.shape) == (3, 2)
    signs = np.where(np.arange(k.size).reshape(k.shape) % 2, 1, -1)
    assert "spread 6 above 5" in judge(k, k + 6 * np.sqrt(2) * deviations * signs)[0]["reason"]
    noisy = k + np.sqrt(2) * deviations * (3.5 + signs)
    assert "shifted on average by +3" in judge(k, noisy)[0]["reason"]


def test_one_question_more_in_every_seed_is_no_shift_where_questions_are_counted():
    answers = np.array([[0.5, 0.55, 0.6, 0.5, 0.45], [0.9, 1.0, 0.95, 0.9, 0.95]])
    assert judge(answers, answers + np.array([[0.05], [0]]))[0]["status"] == WITHIN
    # where no seed made a mistake, one mistake is within, ten in every seed are not
    perfect = np.ones((3, 5))
    mistaken = perfect.copy()
    mistaken[1, 4] = 0.95
    assert judge(perfect, mistaken)[0]["status"] == WITHIN
    assert judge(np.full((3, 5), 0.95), np.full((3, 5), 0.5))[0]["status"] == OFF


def test_without_seeds_the_scale_is_that_of_others_or_one_per_cent():
    one = np.array([[-4.2137], [-4.6011], [-5.0406]])
    noise = np.array([[0.3], [-0.2], [0.2]])
    assert judge(one, one + noise)[0]["scale"] == OF_VALUE
    assert judge(one, one + noise)[0]["status"] == OFF
    found, _ = judge(one, one + noise, like=0.15)
    assert (found["status"], found["scale"], found["limit"]) == (WITHIN, LIKE, LIKE)
    assert judge(one, one * 1.001)[0]["status"] == WITHIN
    assert judge(one, one * 1.05)[0]["status"] == OFF
    assert judge(one, one + 2.0, like=0.15)[0]["status"] == OFF
    zero = np.zeros((3, 1))  # nothing to be a share of
    assert judge(zero, zero + 1e-9)[0]["status"] == OFF


def test_what_machines_were_seen_to_do_narrows_the_limits_but_never_widens_them(k):
    deviations = standard_deviations(k)[:, None]
    signs = np.where(np.arange(k.size).reshape(k.shape) % 2, 1, -1)
    fresh = k + 3 * np.sqrt(2) * deviations * signs
    found, _ = judge(k, fresh)
    assert found["status"] == WITHIN and found["limit"] == SEEDS
    found, _ = judge(k, fresh, measured=Measured(0.1, 0.3, 15))
    assert found["status"] == OFF and found["limit"] == MACHINES
    assert "spread 3 above 1" in found["reason"]
    assert found["tolerance"] < judge(k, fresh)[0]["tolerance"]
    wide = judge(k, fresh, measured=Measured(40.0, 80.0, 15))[0]
    assert wide["status"] == WITHIN and wide["tolerance"] == judge(k, fresh)[0]["tolerance"]


def test_one_pair_of_machines_says_less_than_three(k):
    deviations = standard_deviations(k)[:, None]
    signs = np.where(np.arange(k.size).reshape(k.shape) % 2, 1, -1)
    fresh = k + 3 * np.sqrt(2) * deviations * signs
    assert judge(k, fresh, measured=Measured(0.5, 1.5, 5))[0]["status"] == WITHIN
    assert judge(k, fresh, measured=Measured(0.5, 1.5, 15))[0]["status"] == OFF


def test_what_is_undefined_on_one_side_is_off_except_in_quotients(k):
    hollow = k.copy()
    hollow[0, 0] = np.nan
    found, size = judge(k, hollow)
    assert found["status"] == OFF and found["reason"] == "1 undefined on one side only"
    assert np.isinf(size[0, 0])
    assert judge(k, hollow, ratio=True)[0]["status"] == WITHIN
    hollow[0, 0] = np.inf
    assert judge(k, hollow)[0]["status"] == judge(hollow, -hollow)[0]["status"] == OFF
    assert judge(hollow, hollow)[0]["status"] == SAME
    far = k.copy()
    far[0, 0] += 100  # a denominator near 0
    assert judge(k, far)[0]["status"] == OFF
    assert judge(k, far, ratio=True)[0]["status"] == WITHIN
    assert judge(k, -k, ratio=True)[0]["status"] == OFF


def test_the_deviation_of_a_cell_is_no_less_than_the_median_one():
    values = np.array([[0.0, 1, 2], [5, 5, 5], [0, 10, 20], [1, np.nan, np.nan]])
    assert standard_deviations(values).tolist() == pytest.approx([5.5, 5.5, 10, 5.5])
    assert np.isnan(standard_deviations(values[:, :2])).all()
    assert standard_deviations(np.ones((2, 3))).tolist() == [0, 0]

"""Every verdict on planted data, Holm by hand, and the claims table over rates."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from kelib import metrics
from kelib.claims import Claim, load_claims
from kelib.errors import KelibError
from kelib.verdicts import across_rates, holm, p_value, verdict, verdicts

CLAIMS_FILE = Path(__file__).parents[1] / "notebooks" / "params" / "claims.yaml"
SEEDS = [100, 101, 102, 103, 104]
SPREAD = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])
Claims = tuple[Claim, ...]
# A numerical warning would hide an undefined ratio or interval.
pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module")
def all_claims() -> Claims:
    return load_claims(CLAIMS_FILE)


@pytest.fixture(scope="module")
def gain(all_claims: Claims) -> Claim:
    return next(claim for claim in all_claims if claim.id == "stage_knowledge_gain")


def around(mean: float, scale: float = 0.01) -> np.ndarray:
    return mean + scale * SPREAD


# --- the statistics -------------------------------------------------------------------------


def test_holm_by_hand() -> None:
    # sorted 0.005 0.01 0.03 0.04 times 4 3 2 1: 0.02 0.03 0.06 0.04, made monotone
    found = holm([0.01, 0.04, 0.03, 0.005])
    np.testing.assert_allclose(found, [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.9, 0.6]), [1.0, 1.0])
    np.testing.assert_allclose(holm([0.01, 0.02], family=4), [0.04, 0.06])
    assert holm([], family=4).size == 0
    for bad, family in (([0.1, np.nan], None), ([1.2], None), ([0.1, 0.2], 1)):
        with pytest.raises(KelibError, match="give each between 0 and 1"):
            holm(bad, family)


def test_p_value_is_scipys_one_sample_t() -> None:
    values = np.random.default_rng(1).normal(0.3, 1, size=6)
    assert p_value(values) == pytest.approx(stats.ttest_1samp(values, 0).pvalue, rel=1e-12)
    assert p_value(values[::-1]) == pytest.approx(p_value(values))


def test_p_value_without_spread() -> None:
    assert p_value([0.1] * 5) == 0.0
    assert p_value([0.0] * 5) == 1.0
    with pytest.raises(KelibError, match="run at least 2 seeds"):
        p_value([0.1])


# --- one claim ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        (around(-0.20), "reproduced"),  # the paper's direction is down
        (around(0.20), "contradicted"),
        (around(0.00), "absent"),
        (around(-0.03, 0.005), "absent"),  # significant, but too small to matter
        (around(-0.20, 0.2), "undecided"),  # large, not significant
        (around(-0.045, 0.01), "undecided"),  # significant, neither large nor surely small
        ([-0.20] * 5, "reproduced"),
        ([0.20] * 5, "contradicted"),
        ([0.0] * 5, "absent"),
        ([-0.05] * 5, "reproduced"),  # exactly the smallest effect is large enough
    ],
)
def test_verdicts_on_planted_differences(gain: Claim, differences: Any, expected: str) -> None:
    found = verdict(differences, gain)
    assert found.verdict == expected
    assert found.n == 5
    assert found.p_holm == found.p == p_value(differences)
    assert found.low95 <= found.low90 <= found.mean <= found.high90 <= found.high95


def test_the_direction_is_the_claims(gain: Claim) -> None:
    upwards = replace(gain, direction=1)
    assert verdict(around(0.2), upwards).verdict == "reproduced"
    assert verdict(around(-0.2), upwards).verdict == "contradicted"


def test_rounding_does_not_cost_the_smallest_effect(gain: Claim) -> None:
    just = 0.30 - 0.25  # 0.04999999999999999
    assert just < 0.05
    assert verdict([-just] * 5, gain).verdict == "reproduced"


def test_the_adjusted_p_decides(gain: Claim) -> None:
    differences = around(-0.20, 0.08)
    alone = verdict(differences, gain)
    assert 0.05 / 4 < alone.p < 0.05 and alone.verdict == "reproduced"
    judged = verdict(differences, gain, p_holm=4 * alone.p)
    assert (judged.verdict, judged.p, judged.p_holm) == ("undecided", alone.p, 4 * alone.p)


def test_absent_uses_the_90_percent_interval(gain: Claim) -> None:
    differences = around(0.0, 0.03)
    found = verdict(differences, gain)
    assert found.high90 < 0.05 < found.high95
    assert found.verdict == "absent"
    assert found.high90 == pytest.approx(
        stats.ttest_1samp(differences, 0).confidence_interval(0.90).high
    )


@pytest.mark.parametrize(
    ("mean", "words"),
    [
        (-9.0, "as the paper"),
        (9.0, "opposite"),
        (0.04, "below the smallest effect"),
        (0.0, "below the smallest effect"),
    ],
)
@pytest.mark.parametrize("n", [1, 2, 4])
def test_fewer_than_five_seeds_are_indicative(gain: Claim, n: int, mean: float, words: str) -> None:
    found = verdict([mean] * n, gain)
    assert found.verdict == f"indicative: {words}"
    assert f"{n} of at least 5 seeds" in found.reason
    assert found.mean == mean
    assert np.isnan(found.p) and np.isnan(found.p_holm)
    assert np.isnan(found.low95) == (n == 1)


def test_not_testable_comes_before_everything(gain: Claim) -> None:
    for differences in (around(-0.2), [-0.2]):
        found = verdict(differences, gain, untestable="entropy does not fall")
        assert (found.verdict, found.reason) == ("not testable here", "entropy does not fall")
        assert np.isnan(found.p) and found.mean == pytest.approx(-0.2)


def test_exploratory_claims_are_never_tested(gain: Claim) -> None:
    found = verdict(around(-0.2), replace(gain, primary=False))
    assert found.verdict == "exploratory"
    assert np.isnan(found.p)


def test_nan_differences_are_refused(gain: Claim) -> None:
    with pytest.raises(KelibError, match="values holds NaN"):
        verdict([-0.2, np.nan, -0.2, -0.2, -0.2], gain)


def test_the_tables_of_the_module_share_one_interval(gain: Claim) -> None:
    found = verdict(around(-0.2), gain)
    interval = metrics.mean_interval(around(-0.2))
    assert (found.low95, found.high95) == (interval.low, interval.high)


# --- the table ------------------------------------------------------------------------------


def differences_of(
    values: dict[str, Any],
    rates: Sequence[float] = (1e-3,),
    p_pt_margin: float = 0.5,
    p_cl_margin: float = 0.2,
) -> pd.DataFrame:
    rows = [
        {
            "claim": name,
            "learning_rate": rate,
            "seed": seed,
            "difference": difference,
            "p_pt_margin": p_pt_margin,
            "p_cl_margin": p_cl_margin,
        }
        for name, differences in values.items()
        for rate in rates
        for seed, difference in zip(SEEDS, differences, strict=False)
    ]
    return pd.DataFrame(rows)


def conditions_of(change: float | list[float] = -0.3, seeds: Sequence[int] = SEEDS) -> pd.DataFrame:
    return pd.DataFrame({"seed": seeds, "entropy_change": change})


PLANTED = {
    "stage_knowledge_gain": around(-0.2),
    "stage_forgetting": around(-0.2),
    "resuscitation_knowledge": around(0.0),
    "resuscitation_accuracy": around(0.02, 0.02),
    "stage_acquisition": around(-0.03),
}


def judge(
    all_claims: Claims, differences: pd.DataFrame, conditions: pd.DataFrame | None = None
) -> tuple[pd.DataFrame, dict[str, str]]:
    conditions = conditions_of() if conditions is None else conditions
    table = verdicts(differences, conditions, all_claims, tokens_per_parameter=24.0)
    return table, dict(zip(table["claim"], table["verdict"], strict=True))


def test_the_claims_table(all_claims: Claims) -> None:
    table, found = judge(all_claims, differences_of(PLANTED))
    assert found["stage_knowledge_gain"] == "reproduced"
    assert found["stage_forgetting"] == "contradicted"
    assert found["resuscitation_knowledge"] == "absent"
    assert found["resuscitation_accuracy"] == "undecided"
    assert found["stage_acquisition"] == "exploratory"
    assert found["resuscitation_acquisition"] == "not run"
    assert len(table) == len(all_claims)
    expected = ["claim", "statement", "figure", "learning_rate", "n", "mean", "low95", "high95"]
    expected += ["low90", "high90", "p", "p_holm", "verdict", "reason", "smallest_effect"]
    expected += ["paper_value", "tokens_per_parameter", "paper_measure"]
    assert set(expected) <= set(table.columns)
    assert (table["tokens_per_parameter"] == 24.0).all()
    first = table.iloc[0]
    assert first["paper_measure"].startswith("acquisition -0.030 [-0.0")
    tested = table[table["primary"]]
    np.testing.assert_allclose(tested["p_holm"], holm(tested["p"].to_list()))
    assert (tested["p_holm"] > tested["p"]).any()


def test_holm_counts_primary_claims_that_were_not_run(all_claims: Claims) -> None:
    # p is 0.031: it would pass alone, not in a family of four of which three were not run
    few = differences_of({"stage_knowledge_gain": around(-0.20, 0.1)})
    table, found = judge(all_claims, few)
    row = table.set_index("claim").loc["stage_knowledge_gain"]
    assert row["p"] < 0.05 < row["p_holm"] == pytest.approx(4 * row["p"])
    assert found["stage_knowledge_gain"] == "undecided"


def test_holm_is_within_a_rate(all_claims: Claims) -> None:
    both, _ = judge(all_claims, differences_of(PLANTED, rates=(1e-3, 6e-3)))
    one, _ = judge(all_claims, differences_of(PLANTED))
    half = both[both["learning_rate"] == 6e-3].reset_index(drop=True)
    pd.testing.assert_frame_equal(
        half.drop(columns="learning_rate"), one.drop(columns="learning_rate")
    )


def test_order_of_rows_does_not_matter(all_claims: Claims) -> None:
    table, _ = judge(all_claims, differences_of(PLANTED))
    shuffled = differences_of(PLANTED).sample(frac=1, random_state=4)
    again, _ = judge(all_claims, shuffled, conditions_of().sample(frac=1, random_state=4))
    pd.testing.assert_frame_equal(table, again)


def test_entropy_must_fall_in_every_seed(all_claims: Claims) -> None:
    changes = conditions_of([-0.3, -0.3, 0.1, -0.3, 0.0])
    table, found = judge(all_claims, differences_of(PLANTED), changes)
    assert {found[name] for name in PLANTED} == {"not testable here"}
    assert table["reason"][0] == "entropy does not fall in seed 102, 104"
    assert table["p"].isna().all() and table["p_holm"].isna().all()


@pytest.mark.parametrize(
    ("margins", "reason"),
    [
        (
            {"p_pt_margin": [0.5, 0.5, 0.14, 0.5, 0.5]},
            r"P_PT - chance is below 0.15 in 1 of 5 seeds \(lowest 0.140\)",
        ),
        (
            {"p_cl_margin": [0.04, 0.2, 0.2, 0.01, 0.2]},
            r"P_CL - chance is below 0.05 in 2 of 5 seeds \(lowest 0.010\)",
        ),
    ],
)
def test_margins_matter_to_every_primary_claim(
    all_claims: Claims, margins: dict[str, list[float]], reason: str
) -> None:
    planted = differences_of(PLANTED)
    for column, values in margins.items():
        planted[column] = planted["seed"].map(dict(zip(SEEDS, values, strict=True)))
    table, found = judge(all_claims, planted)
    assert found["stage_acquisition"] == "exploratory"  # not about accuracy, no margin of its own
    primary = [claim.id for claim in all_claims if claim.primary]
    assert len(primary) == 4
    for name in primary:
        assert found[name] == "not testable here"
        assert re.fullmatch(reason, table.set_index("claim")["reason"][name])


def test_margins_of_exactly_the_limit_pass(all_claims: Claims) -> None:
    planted = differences_of(PLANTED, p_pt_margin=0.4 - 0.25, p_cl_margin=0.3 - 0.25)
    _, found = judge(all_claims, planted)
    assert found["stage_forgetting"] == "contradicted"


def test_one_seed_gives_an_indicative_table(all_claims: Claims) -> None:
    planted = {name: values[:1] for name, values in PLANTED.items()}
    table, found = judge(all_claims, differences_of(planted), conditions_of())
    assert found["stage_knowledge_gain"] == "indicative: as the paper"
    assert found["stage_forgetting"] == "indicative: opposite"
    assert table["p"].isna().all()
    assert table["paper_measure"][0] == "acquisition -0.050 (n = 1)"


def test_an_undefined_ratio_is_not_testable_but_nan_is_refused(all_claims: Claims) -> None:
    holes = around(-0.2)
    holes[2] = np.nan
    _, found = judge(all_claims, differences_of({**PLANTED, "stage_forgetting": holes}))
    assert found["stage_forgetting"] == "not testable here"
    with pytest.raises(KelibError, match="column difference of claim stage_knowledge_gain has NaN"):
        judge(all_claims, differences_of({**PLANTED, "stage_knowledge_gain": holes}))


def test_bad_tables_are_refused(all_claims: Claims) -> None:
    planted = differences_of(PLANTED)
    with pytest.raises(KelibError, match="differences table has 1 duplicate rows, first: claim"):
        judge(all_claims, pd.concat([planted, planted[:1]]))
    with pytest.raises(KelibError, match="no entropy change for seed 104"):
        judge(all_claims, planted, conditions_of(seeds=SEEDS[:4]))
    with pytest.raises(KelibError, match="unknown claims other; valid: resuscitation_accuracy"):
        judge(all_claims, differences_of({"other": around(0)}))
    with pytest.raises(KelibError, match="column entropy_change of the conditions table has NaN"):
        judge(all_claims, planted, conditions_of([np.nan, -1, -1, -1, -1]))
    with pytest.raises(KelibError, match="column p_cl_margin of the differences table has NaN"):
        judge(all_claims, planted.assign(p_cl_margin=np.nan))
    with pytest.raises(KelibError, match="0 rows, nothing can be judged"):
        judge(all_claims, planted[:0])


# --- over rates -----------------------------------------------------------------------------


def rated(*labels: str) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "claim": "one",
            "statement": "It is so.",
            "learning_rate": [1e-3, 3e-3, 6e-3][: len(labels)],
            "verdict": labels,
        }
    )


@pytest.mark.parametrize(
    ("labels", "summary", "count"),
    [
        (["reproduced"] * 3, "reproduced at every CL rate (0.001, 0.003, 0.006)", 3),
        (
            ["undecided", "absent", "reproduced"],
            "undecided at that rate only (0.001); absent at that rate only (0.003); "
            "reproduced at that rate only (0.006)",
            1,
        ),
        (
            ["reproduced", "reproduced", "not testable here"],
            "reproduced at 2 of 3 CL rates (0.001, 0.003); "
            "not testable here at that rate only (0.006)",
            2,
        ),
        (["reproduced"], "reproduced at that rate only (0.001; no other rate was run)", 1),
    ],
)
def test_across_rates(labels: list[str], summary: str, count: int) -> None:
    found = across_rates(rated(*labels)).iloc[0]
    assert (found["summary"], found["reproduced_at"]) == (summary, count)
    assert found["rates"] == len(labels)


def test_across_rates_refuses_a_rate_twice() -> None:
    with pytest.raises(KelibError, match="claims table has 1 duplicate rows"):
        across_rates(pd.concat([rated("absent"), rated("reproduced")]))

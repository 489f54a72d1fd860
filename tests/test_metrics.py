"""K against a nested mean by hand, the ratios and their signs, intervals against scipy."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from kelib import metrics
from kelib.errors import KelibError


def probe(
    entry: str, entry_set: str, level: str, log_probability: float, tokens: int, padded: int = 10
) -> dict[str, Any]:
    return {
        "entry": entry,
        "entry_set": entry_set,
        "level": level,
        "log_probability": log_probability,
        "tokens": tokens,
        "padded": padded,
    }


@pytest.fixture
def probes() -> pd.DataFrame:
    # entry a has two probes, b one; the sets have 2 and 1 entries: flat means would differ
    return pd.DataFrame(
        [
            probe("a", "once", "memorisation", -2.0, 2),  # -1
            probe("a", "once", "semantic", -9.0, 3),  # -3, so a: -2
            probe("b", "once", "memorisation", -6.0, 1),  # b: -6, once: -4
            probe("c", "paraphrase", "memorisation", -1.0, 4),  # -0.25
            probe("c", "paraphrase", "semantic", -1.5, 2),  # -0.75, c and paraphrase: -0.5
        ]
    )


def test_k_is_the_nested_mean(probes: pd.DataFrame) -> None:
    assert metrics.knowledge_score(probes) == pytest.approx((2 * -4 + 1 * -0.5) / 3)


def test_k_is_neither_the_flat_mean_nor_a_mean_of_sets(probes: pd.DataFrame) -> None:
    flat = (probes["log_probability"] / probes["tokens"]).mean()
    assert abs(metrics.knowledge_score(probes) - flat) > 0.1
    assert abs(metrics.knowledge_score(probes) - (-4 - 0.5) / 2) > 0.1


def test_k_ignores_padding_unless_asked(probes: pd.DataFrame) -> None:
    before = metrics.knowledge_score(probes)
    longer = probes.assign(padded=40)
    assert metrics.knowledge_score(longer) == before
    by_hand = (2 * ((-0.2 - 0.9) / 2 - 0.6) / 2 + (-0.1 - 0.15) / 2) / 3
    assert metrics.knowledge_score(probes, per="padded") == pytest.approx(by_hand)
    assert metrics.knowledge_score(longer, per="padded") == pytest.approx(by_hand / 4)


def test_k_does_not_depend_on_the_order_of_rows(probes: pd.DataFrame) -> None:
    for seed in range(5):
        shuffled = probes.sample(frac=1, random_state=seed)
        assert metrics.knowledge_score(shuffled) == pytest.approx(metrics.knowledge_score(probes))


def test_entries_count_inside_their_set(probes: pd.DataFrame) -> None:
    # numbering both sets from 0 must not merge two entries
    numbered = probes.assign(entry=[0, 0, 1, 0, 0])
    assert metrics.knowledge_score(numbered) == pytest.approx(metrics.knowledge_score(probes))


def test_k_by_set_and_level(probes: pd.DataFrame) -> None:
    by_set = metrics.knowledge_by(probes, ["entry_set"]).set_index("entry_set")
    assert by_set["knowledge"].to_dict() == pytest.approx({"once": -4.0, "paraphrase": -0.5})
    assert by_set["entries"].to_dict() == {"once": 2, "paraphrase": 1}
    by_level = metrics.knowledge_by(probes, ["level"]).set_index("level")
    assert by_level.loc["memorisation", "knowledge"] == pytest.approx((2 * -3.5 - 0.25) / 3)
    assert by_level.loc["semantic", "knowledge"] == pytest.approx((-3 - 0.75) / 2)
    both = metrics.knowledge_by(probes, ["entry_set", "level"])
    assert len(both) == 4
    assert set(both.columns) == {"entry_set", "level", "knowledge", "entries"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns="tokens"), "probe table lacks tokens; it has entry"),
        (lambda t: t.assign(log_probability=[np.nan, -1, -1, -1, -1]), "column log_probability"),
        (lambda t: t.assign(entry=[None, "a", "b", "c", "c"]), "column entry of the probe table"),
        (lambda t: t.assign(tokens=["2"] * 5), "column tokens of the probe table has type"),
        (lambda t: t.assign(tokens=[0, 1, 1, 1, 1]), "has 0, a length must be above 0"),
        (lambda t: t.assign(entry_set="twice"), "entry_set twice is unknown: use once, paraphrase"),
        (lambda t: t.assign(log_probability=2.0), "reaches 2, .*not losses"),
        (lambda t: t[t["entry_set"] == "once"], "no entries of the set paraphrase, K needs both"),
        (lambda t: t[:0], "has 0 rows"),
    ],
)
def test_bad_probe_tables_are_refused(probes: pd.DataFrame, change: Callable, message: str) -> None:
    with pytest.raises(KelibError, match=message):
        metrics.knowledge_score(change(probes))


def test_by_must_be_a_list(probes: pd.DataFrame) -> None:
    with pytest.raises(KelibError, match="by is 'level', a list of columns is needed"):
        metrics.knowledge_by(probes, "level")


def test_learning_is_positive_and_forgetting_is_positive() -> None:
    assert metrics.acquisition(-4.0, -3.0) == pytest.approx(0.25)
    assert metrics.acquisition(-4.0, -5.0) == pytest.approx(-0.25)
    assert metrics.forgetting(0.8, 0.6) == pytest.approx(0.25)
    assert metrics.forgetting(0.6, 0.8) < 0
    assert metrics.forgetting_over_chance(0.75, 0.5, 0.25) == pytest.approx(0.5)
    assert metrics.forgetting_over_chance(0.75, 0.25, 0.25) == pytest.approx(1.0)
    assert metrics.forgetting_over_chance(0.75, 0.20, 0.25) > 1


def test_ratios_broadcast_and_mark_what_is_undefined() -> None:
    found = metrics.acquisition(np.array([-4.0, 0.0, -2.0]), np.array([-3.0, -1.0, -2.0]))
    np.testing.assert_allclose(found, [0.25, np.nan, 0.0])
    found = metrics.forgetting([0.0, 0.5], 0.25)
    np.testing.assert_allclose(found, [np.nan, 0.5])
    found = metrics.forgetting_over_chance(pd.Series([0.25, 0.2, 0.75]), [0.2, 0.2, 0.5], 0.25)
    np.testing.assert_allclose(found, [np.nan, np.nan, 0.5])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.acquisition(0.0, -1.0), "k_before is 0"),
        (lambda: metrics.forgetting(0.0, 0.5), "p_before is 0"),
        (lambda: metrics.forgetting_over_chance(0.25, 0.2, 0.25), "p_before is 0.25, not above"),
        (lambda: metrics.acquisition([-1.0, np.nan], -1.0), "k_before holds NaN"),
        (lambda: metrics.forgetting(54.0, 52.0), "spans 54 to 54, .*not percent"),
        (lambda: metrics.forgetting_over_chance(0.5, 0.4, 25), "chance spans 25"),
    ],
)
def test_undefined_ratios_are_refused(call: Callable, message: str) -> None:
    with pytest.raises(KelibError, match=message):
        call()


def test_mean_interval_is_scipys_t_interval() -> None:
    values = np.random.default_rng(3).normal(size=7)
    for confidence in (0.90, 0.95):
        found = metrics.mean_interval(values, confidence)
        expected = stats.ttest_1samp(values, 0).confidence_interval(confidence)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-12)
        assert found.n == 7 and found.mean == pytest.approx(values.mean())


def test_mean_interval_at_its_edges() -> None:
    one = metrics.mean_interval([2.0])
    assert (one.n, one.mean) == (1, 2.0)
    assert np.isnan(one.low) and np.isnan(one.high)
    equal = metrics.mean_interval([0.1] * 3)  # their rounded mean is not 0.1
    assert (equal.low, equal.mean, equal.high) == (0.1, 0.1, 0.1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.mean_interval([1.0, np.nan]), "values holds NaN"),
        (lambda: metrics.mean_interval([]), "at least one number"),
        (lambda: metrics.mean_interval([[1.0, 2.0]]), r"shape \(1, 2\)"),
        (lambda: metrics.mean_interval([1.0, 2.0], 95), "confidence is 95"),
        (lambda: metrics.bootstrap_interval([1.0, 2.0], resamples=5), "resamples is 5"),
    ],
)
def test_bad_samples_are_refused(call: Callable, message: str) -> None:
    with pytest.raises(KelibError, match=message):
        call()


def test_bootstrap_agrees_with_scipy_and_ignores_order() -> None:
    values = np.random.default_rng(5).exponential(size=80)
    found = metrics.bootstrap_interval(values, resamples=4000)
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=4000, method="percentile"
    ).confidence_interval
    width = expected.high - expected.low
    assert found.low == pytest.approx(expected.low, abs=0.1 * width)
    assert found.high == pytest.approx(expected.high, abs=0.1 * width)
    again = metrics.bootstrap_interval(values[::-1], resamples=4000)
    assert again == found
    assert metrics.bootstrap_interval(values, seed=1, resamples=4000) != found


def test_bootstrap_takes_another_statistic() -> None:
    values = np.arange(101.0)
    found = metrics.bootstrap_interval(values, statistic=np.median)
    assert found.mean == 50
    assert 20 < found.low < 50 < found.high < 80


def test_correlations_describe_without_testing() -> None:
    table = pd.DataFrame(
        {
            "entropy_nats": [4.0, 3.0, 2.0, 1.0],
            "step": [1, 2, 3, 4],
            "acquisition": [16.0, 9.0, 4.0, 1.0],
            "constant": [1.0] * 4,
        }
    )
    found = metrics.correlations(table, ["entropy_nats", "step", "constant"], ["acquisition"])
    assert list(found.columns) == ["x", "y", "n", "pearson", "spearman"]
    entropy, step, constant = found.to_dict("records")
    expected = stats.pearsonr(table["entropy_nats"], table["acquisition"]).statistic
    assert entropy["pearson"] == pytest.approx(expected)
    assert entropy["spearman"] == pytest.approx(1.0)
    assert step["spearman"] == pytest.approx(-1.0)
    assert np.isnan(constant["pearson"]) and np.isnan(constant["spearman"])
    assert entropy["n"] == 4
    with pytest.raises(KelibError, match="column step of the correlation table has NaN"):
        metrics.correlations(table.assign(step=[1, np.nan, 3, 4]), ["step"], ["acquisition"])


def test_correlations_of_ties_match_scipy() -> None:
    table = pd.DataFrame({"x": [1.0, 1.0, 2.0, 5.0, 5.0], "y": [3.0, 1.0, 1.0, 2.0, 9.0]})
    found = metrics.correlations(table, ["x"], ["y"]).iloc[0]
    assert found["spearman"] == pytest.approx(stats.spearmanr(table["x"], table["y"]).statistic)


def test_metrics_and_verdicts_import_no_torch() -> None:
    code = "import sys, kelib.metrics, kelib.verdicts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_the_gain_is_what_acquisition_divides() -> None:
    runs = pd.DataFrame({"k_pt": [-4.0, -5.0], "k_cl": [-3.0, -5.5]})
    gain = metrics.with_gain(runs)["k_gain"]
    assert gain.tolist() == [1.0, -0.5] and "k_gain" not in runs
    found = metrics.acquisition(runs["k_pt"], runs["k_cl"])
    assert list(gain / runs["k_pt"].abs()) == pytest.approx(list(found))

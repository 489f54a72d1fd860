"""Every verdict on planted data, Holm by hand, and what the tables and the YAML may hold."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats

from kelib import claims, metrics
from kelib.errors import KelibError

CLAIMS_FILE = Path(__file__).parents[1] / "notebooks" / "params" / "claims.yaml"
SEEDS = [100, 101, 102, 103, 104]
SPREAD = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])
CHANCE = 0.25


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture(scope="module")
def all_claims():
    return claims.load_claims(CLAIMS_FILE)


@pytest.fixture(scope="module")
def gain(all_claims):
    return next(claim for claim in all_claims if claim.id == "stage_knowledge_gain")


def around(mean, scale=0.01):
    return mean + scale * SPREAD


# --- the committed claims -------------------------------------------------------------------


def test_the_four_primary_claims_are_those_of_the_rule(all_claims):
    found = {
        (c.quantity, c.contrast, c.direction, c.smallest_effect, c.unit)
        for c in all_claims
        if c.primary
    }
    assert found == {
        ("k_gain", "last - first stage", -1, 0.05, "nats"),
        ("forgetting_over_chance", "last - first stage", 1, 0.05, "fraction"),
        ("k_cl", "q = 1 - original", 1, 0.05, "nats"),
        ("p_cl", "q = 1 - original", 1, 0.01, "fraction"),
    }
    for claim in all_claims:
        margins = (claim.conditions.p_pt_margin, claim.conditions.p_cl_margin)
        about_accuracy = claims.QUANTITIES[claim.quantity]
        assert margins == ((0.15, 0.05) if about_accuracy else (None, None))


def test_digest_follows_the_content_not_the_line_endings(tmp_path):
    copy = tmp_path / "claims.yaml"
    copy.write_bytes(CLAIMS_FILE.read_bytes().replace(b"\n", b"\r\n"))
    assert claims.digest(copy) == claims.digest(CLAIMS_FILE)
    copy.write_text(CLAIMS_FILE.read_text().replace("0.05", "0.04", 1))
    assert claims.digest(copy) != claims.digest(CLAIMS_FILE)
    assert len(claims.digest(copy)) == 64


def entry(**changes):
    base = {
        "id": "one",
        "statement": "It is so.",
        "figure": "4a",
        "quantity": "k_gain",
        "contrast": "last - first stage",
        "direction": -1,
        "smallest_effect": 0.05,
        "unit": "nats",
        "primary": True,
        "paper_value": "falls",
        "conditions": {"entropy_falls": True},
    }
    base.update(changes)
    return {key: value for key, value in base.items() if value is not ...}


def load(tmp_path, *entries, **others):
    path = tmp_path / "claims.yaml"
    path.write_text(yaml.safe_dump({"claims": list(entries), **others}))
    return claims.load_claims(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"smalest_effect": 1}, "claim one has unknown keys: smalest_effect; valid: .*unit"),
        ({"unit": ...}, "claim one lacks the keys: unit"),
        ({"quantity": "k"}, "quantity is 'k'; valid: acquisition, .*p_cl"),
        ({"contrast": "last"}, "contrast is 'last'; valid: last - first stage, q = 1 - original"),
        ({"unit": "bits"}, "unit is 'bits'; valid: fraction, nats"),
        ({"figure": 4}, r"figure is 4, text is needed \(put it in quotes\)"),
        ({"direction": 0}, "direction is 0; valid: -1, 1"),
        ({"direction": True}, "direction is True; valid: -1, 1"),
        ({"primary": "yes"}, "primary is 'yes'; valid: true, false"),
        ({"smallest_effect": "5e-2"}, "smallest_effect is '5e-2', a number above 0"),
        ({"smallest_effect": -0.1}, "smallest_effect is -0.1, a number above 0"),
        ({"smallest_effect": ...}, "smallest_effect is None, a number above 0"),
        ({"conditions": {"entropy_falls": False}}, "entropy_falls is False, every claim"),
        ({"conditions": {"entropy_fals": True}}, "conditions of claim one has unknown keys"),
        ({"conditions": True}, "conditions of claim one is True, keys with values"),
        ({"quantity": "p_cl"}, "conditions of claim one: p_pt_margin is None"),
        ({"quantity": "acquisition_modified"}, "needs the contrast 'q = 1 - original'"),
        ({"beside": "one"}, "beside is 'one'; an exploratory claim names a primary one"),
        ({"primary": False, "beside": "two"}, "claim one: beside is 'two'"),
    ],
)
def test_bad_claims_are_refused(tmp_path, changes, message):
    with pytest.raises(KelibError, match=message):
        load(tmp_path, entry(**changes))


def test_bad_claims_files_are_refused(tmp_path):
    assert load(tmp_path, entry())[0].smallest_effect == 0.05
    with pytest.raises(KelibError, match="repeats the ids one"):
        load(tmp_path, entry(), entry())
    with pytest.raises(KelibError, match="must hold one key, claims"):
        load(tmp_path, entry(), alpha=0.05)
    with pytest.raises(KelibError, match="claim 1 is 'text', keys with values are needed"):
        load(tmp_path, "text")
    with pytest.raises(KelibError, match=r"nowhere.yaml \(No such file or directory\)"):
        claims.load_claims(tmp_path / "nowhere.yaml")
    (tmp_path / "broken.yaml").write_text("claims: [")
    with pytest.raises(KelibError, match="is not valid YAML"):
        claims.load_claims(tmp_path / "broken.yaml")


# --- the statistics -------------------------------------------------------------------------


def test_holm_by_hand():
    # sorted 0.005 0.01 0.03 0.04 times 4 3 2 1: 0.02 0.03 0.06 0.04, made monotone
    found = claims.holm([0.01, 0.04, 0.03, 0.005])
    np.testing.assert_allclose(found, [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(claims.holm([0.9, 0.6]), [1.0, 1.0])
    np.testing.assert_allclose(claims.holm([0.01, 0.02], family=4), [0.04, 0.06])
    assert claims.holm([], family=4).size == 0
    for bad, family in (([0.1, np.nan], None), ([1.2], None), ([0.1, 0.2], 1)):
        with pytest.raises(KelibError, match="give each between 0 and 1"):
            claims.holm(bad, family)


def test_p_value_is_scipys_one_sample_t():
    values = np.random.default_rng(1).normal(0.3, 1, size=6)
    assert claims.p_value(values) == pytest.approx(stats.ttest_1samp(values, 0).pvalue, rel=1e-12)
    assert claims.p_value(values[::-1]) == pytest.approx(claims.p_value(values))


def test_p_value_without_spread():
    assert claims.p_value([0.1] * 5) == 0.0
    assert claims.p_value([0.0] * 5) == 1.0
    with pytest.raises(KelibError, match="run at least 2 seeds"):
        claims.p_value([0.1])


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
def test_verdicts_on_planted_differences(gain, differences, expected):
    found = claims.verdict(differences, gain)
    assert found.verdict == expected
    assert found.n == 5
    assert found.p_holm == found.p == claims.p_value(differences)
    assert found.low95 <= found.low90 <= found.mean <= found.high90 <= found.high95


def test_the_direction_is_the_claims(gain):
    upwards = replace(gain, direction=1)
    assert claims.verdict(around(0.2), upwards).verdict == "reproduced"
    assert claims.verdict(around(-0.2), upwards).verdict == "contradicted"


def test_rounding_does_not_cost_the_smallest_effect(gain):
    just = 0.30 - 0.25  # 0.04999999999999999
    assert just < 0.05
    assert claims.verdict([-just] * 5, gain).verdict == "reproduced"


def test_the_adjusted_p_decides(gain):
    differences = around(-0.20, 0.08)
    alone = claims.verdict(differences, gain)
    assert 0.05 / 4 < alone.p < 0.05 and alone.verdict == "reproduced"
    judged = claims.verdict(differences, gain, p_holm=4 * alone.p)
    assert (judged.verdict, judged.p, judged.p_holm) == ("undecided", alone.p, 4 * alone.p)


def test_absent_uses_the_90_percent_interval(gain):
    differences = around(0.0, 0.03)
    found = claims.verdict(differences, gain)
    assert found.high90 < 0.05 < found.high95
    assert found.verdict == "absent"
    assert found.high90 == pytest.approx(
        stats.ttest_1samp(differences, 0).confidence_interval(0.90).high
    )


@pytest.mark.parametrize(("mean", "sign"), [(-9.0, "-"), (9.0, "+"), (0.0, "0")])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_fewer_than_five_seeds_are_indicative(gain, n, mean, sign):
    found = claims.verdict([mean] * n, gain)
    assert found.verdict == f"indicative: {sign}"
    assert f"{n} of at least 5 seeds; the paper's direction is -" in found.reason
    assert found.mean == mean
    assert np.isnan(found.p) and np.isnan(found.p_holm)
    assert np.isnan(found.low95) == (n == 1)


def test_not_testable_comes_before_everything(gain):
    for differences in (around(-0.2), [-0.2]):
        found = claims.verdict(differences, gain, untestable="entropy does not fall")
        assert (found.verdict, found.reason) == ("not testable here", "entropy does not fall")
        assert np.isnan(found.p) and found.mean == pytest.approx(-0.2)


def test_exploratory_claims_are_never_tested(gain):
    found = claims.verdict(around(-0.2), replace(gain, primary=False))
    assert found.verdict == "exploratory: -"
    assert np.isnan(found.p)


def test_nan_differences_are_refused(gain):
    with pytest.raises(KelibError, match="values holds NaN"):
        claims.verdict([-0.2, np.nan, -0.2, -0.2, -0.2], gain)


# --- the table ------------------------------------------------------------------------------


def differences_of(values, rates=(1e-3,), p_pt_margin=0.5, p_cl_margin=0.2):
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


def conditions_of(change=-0.3, seeds=SEEDS):
    return pd.DataFrame({"seed": seeds, "entropy_change": change})


PLANTED = {
    "stage_knowledge_gain": around(-0.2),
    "stage_forgetting": around(-0.2),
    "resuscitation_knowledge": around(0.0),
    "resuscitation_accuracy": around(0.02, 0.02),
    "stage_acquisition": around(-0.03),
}


def judge(all_claims, differences, conditions=None, **options):
    conditions = conditions_of() if conditions is None else conditions
    options.setdefault("tokens_per_parameter", 24.0)
    table = claims.verdicts(differences, conditions, all_claims, **options)
    return table, table.set_index("claim")["verdict"].to_dict()


def test_the_claims_table(all_claims):
    table, found = judge(all_claims, differences_of(PLANTED))
    assert found["stage_knowledge_gain"] == "reproduced"
    assert found["stage_forgetting"] == "contradicted"
    assert found["resuscitation_knowledge"] == "absent"
    assert found["resuscitation_accuracy"] == "undecided"
    assert found["stage_acquisition"] == "exploratory: -"
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
    np.testing.assert_allclose(tested["p_holm"], claims.holm(tested["p"].to_list()))
    assert (tested["p_holm"] > tested["p"]).any()


def test_holm_counts_primary_claims_that_were_not_run(all_claims):
    # p is 0.031: it would pass alone, not in a family of four of which three were not run
    few = differences_of({"stage_knowledge_gain": around(-0.20, 0.1)})
    table, found = judge(all_claims, few)
    row = table.set_index("claim").loc["stage_knowledge_gain"]
    assert row["p"] < 0.05 < row["p_holm"] == pytest.approx(4 * row["p"])
    assert found["stage_knowledge_gain"] == "undecided"


def test_holm_is_within_a_rate(all_claims):
    both, _ = judge(all_claims, differences_of(PLANTED, rates=(1e-3, 6e-3)))
    one, _ = judge(all_claims, differences_of(PLANTED))
    half = both[both["learning_rate"] == 6e-3].reset_index(drop=True)
    pd.testing.assert_frame_equal(
        half.drop(columns="learning_rate"), one.drop(columns="learning_rate")
    )


def test_order_of_rows_does_not_matter(all_claims):
    table, _ = judge(all_claims, differences_of(PLANTED))
    shuffled = differences_of(PLANTED).sample(frac=1, random_state=4)
    again, _ = judge(all_claims, shuffled, conditions_of().sample(frac=1, random_state=4))
    pd.testing.assert_frame_equal(table, again)


def test_entropy_must_fall_in_every_seed(all_claims):
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
def test_margins_matter_to_accuracy_only(all_claims, margins, reason):
    planted = differences_of(PLANTED)
    for column, values in margins.items():
        planted[column] = planted["seed"].map(dict(zip(SEEDS, values, strict=True)))
    table, found = judge(all_claims, planted)
    assert found["stage_knowledge_gain"] == "reproduced"
    assert found["resuscitation_knowledge"] == "absent"
    for name in ("stage_forgetting", "resuscitation_accuracy"):
        assert found[name] == "not testable here"
        text = table.set_index("claim").loc[name, "reason"]
        assert re.fullmatch(reason, text)


def test_margins_of_exactly_the_limit_pass(all_claims):
    planted = differences_of(PLANTED, p_pt_margin=0.4 - 0.25, p_cl_margin=0.3 - 0.25)
    _, found = judge(all_claims, planted)
    assert found["stage_forgetting"] == "contradicted"


def test_one_seed_gives_an_indicative_table(all_claims):
    planted = {name: values[:1] for name, values in PLANTED.items()}
    table, found = judge(all_claims, differences_of(planted), conditions_of())
    assert found["stage_knowledge_gain"] == "indicative: -"
    assert found["stage_forgetting"] == "indicative: -"
    assert table["p"].isna().all()
    assert table["paper_measure"][0] == "acquisition -0.050 (n = 1)"


def test_an_undefined_ratio_is_not_testable_but_nan_is_refused(all_claims):
    holes = around(-0.2)
    holes[2] = np.nan
    _, found = judge(all_claims, differences_of({**PLANTED, "stage_forgetting": holes}))
    assert found["stage_forgetting"] == "not testable here"
    with pytest.raises(KelibError, match="column difference of claim stage_knowledge_gain has NaN"):
        judge(all_claims, differences_of({**PLANTED, "stage_knowledge_gain": holes}))


def test_bad_tables_are_refused(all_claims):
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


def rated(*labels):
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
def test_across_rates(labels, summary, count):
    found = claims.across_rates(rated(*labels)).iloc[0]
    assert (found["summary"], found["reproduced_at"]) == (summary, count)
    assert found["rates"] == len(labels)


def test_across_rates_refuses_a_rate_twice():
    with pytest.raises(KelibError, match="claims table has 1 duplicate rows"):
        claims.across_rates(pd.concat([rated("absent"), rated("reproduced")]))


# --- from measurements to differences -------------------------------------------------------


def run(seed, step, label, cl_seed, rate, **values):
    base = {
        "seed": seed,
        "stage_step": step,
        "stage_label": label,
        "learning_rate": rate,
        "cl_seed": cl_seed,
        "injected": True,
        "k_pt": -4.0,
        "k_cl": -3.0,
        "p_pt": 0.75,
        "p_cl": 0.50,
        "chance": CHANCE,
    }
    return {**base, **values}


def continual_of(seeds=SEEDS, rates=(1e-3,), cl_seeds=(0, 1)):
    """Gain 1.0 at the first stage and 0.8 at the last, P_CL 0.50 and 0.40, +/- 0.02 by CL seed."""
    rows = []
    for seed in seeds:
        first = 100 + seed - SEEDS[0]  # the peak is at another step in each seed
        for rate in rates:
            for cl_seed in cl_seeds:
                jitter = 0.02 if cl_seed == 0 else -0.02
                stages = {"peak": (first, -3.0, 0.50), "50%": (500, -2.0, 0.9)}
                stages["100%"] = (1000, -3.2, 0.40)
                for label, (step, k_cl, p_cl) in stages.items():
                    values = {"k_cl": k_cl + jitter, "p_cl": p_cl + jitter}
                    rows.append(run(seed, step, label, cl_seed, rate, **values))
                bare = {"injected": False, "k_cl": -9.0}
                rows.append(run(seed, 1000, "100%", cl_seed, rate, **bare))
    return pd.DataFrame(rows)


def interventions_of(seeds=SEEDS, rates=(1e-3,), cl_seeds=(0, 1)):
    """q = 1 at 50 % gains 0.1 nats and 0.03; other factors, ratios and kinds are far away."""
    nothing = {"ratio": np.nan, "factor": np.nan, "k_modified": np.nan, "p_modified": np.nan}
    modified = {"k_modified": -4.5, "p_modified": 0.60}
    kinds = [("none", nothing, -3.2, 0.40)]
    for ratio, factor, k_cl, p_cl in [
        (0.5, 1.0, -3.1, 0.43),
        (0.5, 2.0, -8, 0.3),
        (0.9, 1.0, -9, 0.3),
    ]:
        kinds.append(("resuscitate", {"ratio": ratio, "factor": factor, **modified}, k_cl, p_cl))
    kinds.append(("attention temperature", {**nothing, "factor": 1.5}, -7.0, 0.3))
    rows = []
    for seed in seeds:
        for rate in rates:
            for cl_seed in cl_seeds:
                for kind, settings, k_cl, p_cl in kinds:
                    values = {"k_cl": k_cl, "p_cl": p_cl, "intervention": kind, **settings}
                    rows.append(run(seed, 1000, "100%", cl_seed, rate, **values))
    return pd.DataFrame(rows)


def test_claim_differences_by_hand(all_claims):
    table = claims.claim_differences(continual_of(), interventions_of(), all_claims)
    assert len(table) == len(all_claims) * len(SEEDS)
    found = table.groupby("claim")["difference"].agg(["min", "max"])
    expected = {
        "stage_knowledge_gain": -0.2,
        "stage_forgetting": (0.35 - 0.25) / 0.5,
        "stage_acquisition": 0.8 / 4 - 1.0 / 4,
        "stage_forgetting_raw": (0.75 - 0.40) / 0.75 - (0.75 - 0.50) / 0.75,
        "resuscitation_knowledge": 0.1,
        "resuscitation_accuracy": 0.03,
        "resuscitation_acquisition": 0.9 / 4 - 0.8 / 4,
        "resuscitation_acquisition_modified": 1.4 / 4.5 - 0.8 / 4,
        "resuscitation_forgetting": -0.03 / 0.75,
        "resuscitation_forgetting_modified": 0.17 / 0.60 - 0.35 / 0.75,
    }
    assert found["min"].to_dict() == pytest.approx(expected)
    assert found["max"].to_dict() == pytest.approx(expected)
    stage = table[table["claim"] == "stage_forgetting"]
    assert stage["p_pt_margin"].to_numpy() == pytest.approx(0.5)
    assert stage["p_cl_margin"].to_numpy() == pytest.approx(0.15)  # of the weaker side


def test_cl_seeds_are_averaged_inside_a_seed(all_claims):
    continual = continual_of(cl_seeds=(0, 1))
    table = claims.claim_differences(continual, None, all_claims)
    assert (table.groupby("claim")["seed"].count() == len(SEEDS)).all()
    assert set(table["claim"]) == {c.id for c in all_claims if c.contrast == claims.STAGES}
    last = continual["injected"] & (continual["stage_step"] == 1000)
    moved = continual.copy()
    moved.loc[last & (continual["cl_seed"] == 0), "k_cl"] += 0.4
    moved.loc[last & (continual["cl_seed"] == 1), "k_cl"] -= 0.2
    after = claims.claim_differences(moved, None, all_claims)
    found = after[after["claim"] == "stage_knowledge_gain"]["difference"].to_numpy()
    assert found == pytest.approx(-0.2 + 0.1)


def test_order_of_runs_does_not_matter(all_claims):
    expected = claims.claim_differences(continual_of(), interventions_of(), all_claims)
    found = claims.claim_differences(
        continual_of().sample(frac=1, random_state=2),
        interventions_of().sample(frac=1, random_state=3),
        all_claims,
    )
    pd.testing.assert_frame_equal(found, expected)


def test_from_measurements_to_the_table(all_claims):
    continual = continual_of(rates=(1e-3, 6e-3))
    differences = claims.claim_differences(continual, interventions_of(), all_claims)
    steps = continual[["seed", "stage_step"]].drop_duplicates()
    entropy = steps.rename(columns={"stage_step": "step"})
    entropy = entropy.assign(entropy_nats=24.0 - entropy["step"] / 1000)
    change = claims.entropy_change(entropy, continual)
    assert change.set_index("seed")["entropy_change"][104] == pytest.approx(-0.896)
    table, _ = judge(all_claims, differences, change)
    summary = claims.across_rates(table).set_index("claim")["summary"]
    assert summary["stage_knowledge_gain"] == "reproduced at every CL rate (0.001, 0.006)"
    assert summary["resuscitation_knowledge"] == (
        "reproduced at that rate only (0.001); not run at that rate only (0.006)"
    )
    measure = table.set_index("claim")["paper_measure"]["resuscitation_knowledge"].iloc[0]
    assert measure.startswith("acquisition +0.025 [")
    assert "; acquisition_modified +0.111 [" in measure


def test_an_undefined_ratio_in_one_cl_run_is_not_averaged_away(all_claims):
    continual = continual_of()
    continual.loc[0, "p_pt"] = CHANCE  # first stage of seed 100, cl_seed 0
    table = claims.claim_differences(continual, None, all_claims)
    hole = table[(table["claim"] == "stage_forgetting") & (table["seed"] == 100)].iloc[0]
    assert np.isnan(hole["difference"])
    assert hole["p_pt_margin"] == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns="chance"), "continual table lacks chance; it has"),
        (lambda t: t.assign(k_cl=np.nan), "column k_cl of the continual table has NaN"),
        (lambda t: t.assign(injected="False"), "column injected of the continual table has type"),
        (
            lambda t: pd.concat([t, t[:1]]),
            "continual table has 1 duplicate rows, first: seed 100, stage_step 100",
        ),
        (
            lambda t: t.drop(index=0),
            "1 runs stand on one side of 'last - first stage' only, first: CL rate 0.001, "
            "seed 100, cl_seed 0",
        ),
        (
            lambda t: t[(t["seed"] != 103) | (t["stage_step"] < 1000)],
            "last stage differs between seeds .*50% for seed 103",
        ),
        (lambda t: t[t["stage_step"] == 1000], "seed 100, .*104 has one stage only"),
        (lambda t: t.assign(p_cl=50.0), "p_after spans 50 to 50"),
    ],
)
def test_bad_measurements_are_refused(all_claims, change, message):
    with pytest.raises(KelibError, match=message):
        claims.claim_differences(change(continual_of()), None, all_claims)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns="ratio"), "interventions table lacks ratio"),
        (lambda t: t.drop(columns="k_pt"), "interventions table lacks k_pt"),
        (lambda t: t.assign(k_modified=np.nan), "column k_modified of the interventions table"),
        (
            lambda t: pd.concat([t, t[:1]]),
            "interventions table has 1 duplicate rows, .*intervention none, ratio nan",
        ),
        (
            lambda t: t.drop(index=1),
            "1 runs stand on one side of 'q = 1 - original' only, first: CL rate 0.001, seed 100",
        ),
        (lambda t: t.assign(stage_step=500), "has no runs at its last stage"),
    ],
)
def test_bad_interventions_are_refused(all_claims, change, message):
    with pytest.raises(KelibError, match=message):
        claims.claim_differences(continual_of(), change(interventions_of()), all_claims)


def test_entropy_change_needs_each_stage_once(all_claims):
    continual = continual_of()
    entropy = pd.DataFrame({"seed": 100, "step": [100, 1000], "entropy_nats": [24.0, 23.0]})
    one = continual[continual["seed"] == 100]
    assert claims.entropy_change(entropy, one)["entropy_change"].to_list() == [-1.0]
    with pytest.raises(KelibError, match="no entropy of seed 100 at step 1000; measured .*: 100:"):
        claims.entropy_change(entropy[:1], one)
    with pytest.raises(KelibError, match="entropy table has 1 duplicate rows"):
        claims.entropy_change(pd.concat([entropy, entropy[:1]]), one)


def test_the_tables_of_the_module_share_one_interval(gain):
    found = claims.verdict(around(-0.2), gain)
    interval = metrics.mean_interval(around(-0.2))
    assert (found.low95, found.high95) == (interval.low, interval.high)

"""The committed claims, what the YAML and the tables may hold, and differences by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from kelib import claims
from kelib.claims import Claim
from kelib.errors import KelibError
from kelib.verdicts import across_rates, verdicts

CLAIMS_FILE = Path(__file__).parents[1] / "notebooks" / "params" / "claims.yaml"
SEEDS = [100, 101, 102, 103, 104]
CHANCE = 0.25
Claims = tuple[Claim, ...]
# A numerical warning would hide an undefined ratio or interval.
pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module")
def all_claims() -> Claims:
    return claims.load_claims(CLAIMS_FILE)


# --- the committed claims -------------------------------------------------------------------


def test_the_four_primary_claims_are_those_of_the_rule(all_claims: Claims) -> None:
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
        needed = about_accuracy or claim.primary
        assert margins == ((0.15, 0.05) if needed else (None, None))


def test_digest_follows_the_content_not_the_line_endings(tmp_path: Path) -> None:
    copy = tmp_path / "claims.yaml"
    copy.write_bytes(CLAIMS_FILE.read_bytes().replace(b"\n", b"\r\n"))
    assert claims.digest(copy) == claims.digest(CLAIMS_FILE)
    copy.write_text(CLAIMS_FILE.read_text().replace("0.05", "0.04", 1))
    assert claims.digest(copy) != claims.digest(CLAIMS_FILE)
    assert len(claims.digest(copy)) == 64


def entry(**changes: object) -> dict[str, Any]:
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


def load(tmp_path: Path, *entries: object, **others: object) -> Claims:
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
def test_bad_claims_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(KelibError, match=message):
        load(tmp_path, entry(**changes))


def test_bad_claims_files_are_refused(tmp_path: Path) -> None:
    assert load(tmp_path, entry())[0].smallest_effect == 0.05
    with pytest.raises(KelibError, match="repeats the ids one"):
        load(tmp_path, entry(), entry())
    with pytest.raises(KelibError, match="must hold one key, claims"):
        load(tmp_path, entry(), alpha=0.05)
    with pytest.raises(KelibError, match="claim 1 is 'text', keys with values are needed"):
        load(tmp_path, "text")
    with pytest.raises(KelibError, match=r"nowhere.yaml: No such file or directory"):
        claims.load_claims(tmp_path / "nowhere.yaml")
    (tmp_path / "broken.yaml").write_text("claims: [")
    with pytest.raises(KelibError, match="is not valid YAML"):
        claims.load_claims(tmp_path / "broken.yaml")


# --- from measurements to differences -------------------------------------------------------


def run(
    seed: int, step: int, label: str, cl_seed: int, rate: float, **values: object
) -> dict[str, Any]:
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


def continual_of(
    seeds: Sequence[int] = SEEDS, rates: Sequence[float] = (1e-3,), cl_seeds: Sequence[int] = (0, 1)
) -> pd.DataFrame:
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


def interventions_of(
    seeds: Sequence[int] = SEEDS, rates: Sequence[float] = (1e-3,), cl_seeds: Sequence[int] = (0, 1)
) -> pd.DataFrame:
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


def test_claim_differences_by_hand(all_claims: Claims) -> None:
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


def test_cl_seeds_are_averaged_inside_a_seed(all_claims: Claims) -> None:
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


def test_order_of_runs_does_not_matter(all_claims: Claims) -> None:
    expected = claims.claim_differences(continual_of(), interventions_of(), all_claims)
    found = claims.claim_differences(
        continual_of().sample(frac=1, random_state=2),
        interventions_of().sample(frac=1, random_state=3),
        all_claims,
    )
    pd.testing.assert_frame_equal(found, expected)


def test_from_measurements_to_the_table(all_claims: Claims) -> None:
    continual = continual_of(rates=(1e-3, 6e-3))
    differences = claims.claim_differences(continual, interventions_of(), all_claims)
    steps = continual[["seed", "stage_step"]].drop_duplicates()
    entropy = steps.rename(columns={"stage_step": "step"})
    entropy = entropy.assign(entropy_nats=24.0 - entropy["step"] / 1000)
    change = claims.entropy_change(entropy, continual)
    assert change.set_index("seed")["entropy_change"][104] == pytest.approx(-0.896)
    table = verdicts(differences, change, all_claims, tokens_per_parameter=24.0)
    summary = across_rates(table).set_index("claim")["summary"]
    assert summary["stage_knowledge_gain"] == "reproduced at every CL rate (0.001, 0.006)"
    assert summary["resuscitation_knowledge"] == (
        "reproduced at that rate only (0.001); not run at that rate only (0.006)"
    )
    measure = table.set_index("claim")["paper_measure"]["resuscitation_knowledge"].iloc[0]
    assert measure.startswith("acquisition +0.025 [")
    assert "; acquisition_modified +0.111 [" in measure


def test_an_undefined_ratio_in_one_cl_run_is_not_averaged_away(all_claims: Claims) -> None:
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
def test_bad_measurements_are_refused(all_claims: Claims, change: Callable, message: str) -> None:
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
def test_bad_interventions_are_refused(all_claims: Claims, change: Callable, message: str) -> None:
    with pytest.raises(KelibError, match=message):
        claims.claim_differences(continual_of(), change(interventions_of()), all_claims)


def test_entropy_change_needs_each_stage_once(all_claims: Claims) -> None:
    continual = continual_of()
    entropy = pd.DataFrame({"seed": 100, "step": [100, 1000], "entropy_nats": [24.0, 23.0]})
    one = continual[continual["seed"] == 100]
    assert claims.entropy_change(entropy, one)["entropy_change"].to_list() == [-1.0]
    with pytest.raises(KelibError, match=r"no entropy of seed 100 at step 1000; measured .*: 100:"):
        claims.entropy_change(entropy[:1], one)
    with pytest.raises(KelibError, match="entropy table has 1 duplicate rows"):
        claims.entropy_change(pd.concat([entropy, entropy[:1]]), one)

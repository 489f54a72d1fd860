"""Interventions as a profile names them."""

from __future__ import annotations

import inspect

import pytest

from kelib.arms import SETTINGS, Arm, Interventions
from kelib.config import load_profile
from kelib.errors import KelibError
from kelib.interventions import INTERVENTIONS

PLAIN = {"ratios": (0.5,), "factors": (1.0,), "learning_rates": (6e-3, 1e-3)}


def test_names_and_settings_are_those_of_the_functions() -> None:
    assert set(SETTINGS) == set(INTERVENTIONS)
    for name, (needed, optional) in SETTINGS.items():
        parameters = dict(inspect.signature(INTERVENTIONS[name]).parameters)
        for other in ("model", "mean_coefficients", "plain"):  # never settings of a profile
            parameters.pop(other, None)
        empty = inspect.Parameter.empty
        assert set(needed) == {n for n, p in parameters.items() if p.default is empty}
        assert set(optional) == {n for n, p in parameters.items() if p.default is not empty}


def test_an_arm_in_words_and_as_settings() -> None:
    arm = Arm("resuscitate_random", ratio=0.5, factor=2.0, seed=7)
    assert arm.label == "resuscitate_random p=0.5 q=2"
    assert arm.change == {"name": "resuscitate_random", "ratio": 0.5, "factor": 2.0, "seed": 7}
    assert Arm("attention_temperature", temperature=1.5).label == "attention_temperature T=1.5"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "wake"}, "arm.name = 'wake' must be one of .*resuscitate"),
        ({"name": "resuscitate", "ratio": 0.5}, "settings ratio; it needs factor, ratio"),
        ({"name": "redo", "seed": 0, "ratio": 0.5}, "it needs seed and may have tau"),
        ({"name": "scale_value"}, "settings none; it needs factor, ratio"),
    ],
)
def test_an_arm_that_cannot_be(values: dict, message: str) -> None:
    with pytest.raises(KelibError, match=message):
        Arm(**values)


def test_arms_of_a_profile() -> None:
    arms = (Arm("scale_value", ratio=0.5, factor=1.0),)
    assert Interventions(**PLAIN, arms=arms).rates_of_arms == (6e-3, 1e-3)
    assert Interventions(**PLAIN, arms=arms, arm_learning_rates=(1e-3,)).rates_of_arms == (1e-3,)
    with pytest.raises(KelibError, match="a list of distinct arms"):
        Interventions(**PLAIN, arms=arms * 2)
    with pytest.raises(KelibError, match=r"arm_learning_rates = 0\.1 must be among learning_rates"):
        Interventions(**PLAIN, arm_learning_rates=(0.1,))
    labels = [arm.label for arm in load_profile("smoke").interventions.arms]
    assert "resuscitate_preserving p=0.5 q=1" in labels and "redo tau=0.1" in labels

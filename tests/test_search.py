"""The search file: what it says is checked before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from kelib.config import load_profile
from kelib.errors import KelibError
from kelib.search import NAME, SEARCH_SEEDS, load_search

GOOD = """
base: smoke
chosen: b
regimes:
  a: {seeds: [0]}
  b:
    seeds: [1, 9]
    continual: true
    overrides: {pretraining.steps: 80, model.hidden_size: 16, branches: null}
"""


def load(tmp_path: Path, text: str = GOOD) -> tuple:
    path = tmp_path / "search.yaml"
    path.write_text(text, encoding="utf-8")
    return load_search(path, tmp_path / "data")


def test_the_committed_search() -> None:
    chosen, variants = load_search()
    regimes = {v.regime for v in variants}
    assert chosen in regimes and len(regimes) > 1
    assert all(v.study.profile.profile == NAME for v in variants)
    assert all(set(v.study.profile.seeds) <= set(SEARCH_SEEDS) for v in variants)
    pairs = [(v.regime, *v.study.profile.seeds) for v in variants]
    assert len(pairs) == len(set(pairs))
    # one regime, one set of parameters: another one under another name would be the same runs
    shapes = {v.regime: v.study.profile for v in variants if v.study.profile.seeds == (0,)}
    assert len({profile.digest for profile in shapes.values()}) == len(shapes)
    # CL rates were chosen on the regime that was taken
    assert any(v.continual for v in variants if v.regime == chosen)


def test_the_chosen_regime_is_the_profile_that_is_reported() -> None:
    chosen, variants = load_search()
    small = load_profile("small")
    assert not set(small.seeds) & set(SEARCH_SEEDS)
    for variant in variants:
        if variant.regime == chosen:
            found = variant.study.profile
            assert (found.corpus, found.model) == (small.corpus, small.model)
            assert found.pretraining == small.pretraining


def test_variants_are_the_base_with_their_overrides(tmp_path: Path) -> None:
    chosen, variants = load(tmp_path)
    base = load_profile("smoke")
    assert chosen == "b"
    assert [(v.regime, v.study.profile.seeds, v.continual) for v in variants] == [
        ("a", (0,), False),
        ("b", (1,), True),
        ("b", (9,), True),
    ]
    plain, changed = variants[0].study.profile, variants[1].study.profile
    assert (plain.model, plain.pretraining) == (base.model, base.pretraining)
    assert (changed.pretraining.steps, changed.model.hidden_size) == (80, 16)
    assert changed.continual == base.continual
    assert {v.study.measurements for v in variants} == {tmp_path / "data" / "measurements" / NAME}


def test_variants_never_share_a_run(tmp_path: Path) -> None:
    _, variants = load(tmp_path)
    folders = [run.folder for v in variants for run in v.study.measure_runs()]
    assert len(folders) == len(set(folders))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("chosen: b", "chosen: c", r"chosen = 'c' must be one of a, b"),
        ("base: smoke", "base: tiny", r"unknown profile 'tiny': notebooks/params has .*smoke"),
        (
            "base: smoke",
            "bases: smoke",
            r"unknown key search.bases: valid keys are base, chosen, r",
        ),
        ("base: smoke\n", "", r"missing key search.base: add it"),
        ("chosen: b\n", "", r"missing key search.chosen: add it"),
        ("[1, 9]", "[1, 10]", r"regimes.b.seeds has 10: search seeds are 0 to 9, the others are r"),
        ("seeds: [0]", "seeds: [-1]", r"regimes.a.seeds has -1: search seeds"),
        ("seeds: [0]", "seeds: ['0']", r"regimes.a.seeds has 0: search seeds"),
        ("seeds: [0]", "seeds: 0", r"regimes.a.seeds = 0 must be a list, such as \[0, 1\]"),
        ("seeds: [0]", "seeds: []", r"regimes.a.seeds = \[\] must be a list"),
        ("{seeds: [0]}", "{continual: true}", r"missing key regimes.a.seeds: add it"),
        ("{seeds: [0]}", "[0]", r"regimes.a must be a mapping with continual, overrides, seeds"),
        ("continual: true", "continued: true", r"unknown key regimes.b.continued: valid keys are"),
        (
            "pretraining.steps",
            "pretraining.step",
            r"unknown key pretraining.step: did you mean pre",
        ),
        ("hidden_size: 16", "hidden_size: 15", r"model.hidden_size = 15 must be a multiple of 2 x"),
        (GOOD, "[base, chosen]", r"search must be a mapping with base, chosen, regimes"),
        (GOOD, "{base: smoke, chosen: a, regimes: }", r"search.regimes must be a mapping with at"),
        (GOOD, "base: [", r"search.yaml is not valid YAML: .*line 1"),
    ],
)
def test_a_bad_search_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(KelibError, match=message) as caught:
        load(tmp_path, GOOD.replace(old, new))
    assert "\n" not in str(caught.value)


def test_a_missing_search_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KelibError, match=r"cannot read .*none.yaml: No such file"):
        load_search(tmp_path / "none.yaml")

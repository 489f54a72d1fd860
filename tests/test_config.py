"""Profiles: what is accepted, what is refused in which words, and what the digest depends on."""

from __future__ import annotations

import copy
import dataclasses
import re
import subprocess
import sys

import pytest
import yaml

from kelib.config import (
    OPTIONAL,
    Profile,
    digest,
    load_profile,
    profile_from,
    profiles,
    read_yaml,
    repository_root,
)
from kelib.errors import KelibError, listing

PARAMS = repository_root() / "notebooks" / "params"


@pytest.fixture
def values():
    return yaml.safe_load((PARAMS / "smoke.yaml").read_text("utf-8"))


VARIANT = {"name": "a", "learning_rates": [1.0e-3], "seeds": [0]}


def refuses(message, values, overrides=None):
    with pytest.raises(KelibError, match=re.escape(message)) as caught:
        profile_from(values, overrides)
    assert "\n" not in str(caught.value)


def test_every_file_with_a_profile_key_loads():
    named = [
        path.stem for path in PARAMS.glob("*.yaml") if "profile" in yaml.safe_load(path.read_text())
    ]
    assert sorted(named) == profiles()
    assert {"small", "smoke"} <= set(named)
    digests = [load_profile(name).digest for name in named]
    assert len(set(digests)) == len(named)


def test_what_is_loaded_is_what_the_file_says(values):
    profile = load_profile("smoke")
    assert profile.corpus.world.people == values["corpus"]["world"]["people"]
    assert profile.continual.learning_rates == tuple(values["continual"]["learning_rates"])
    assert profile.pretraining.optimizer.betas == (0.9, 0.95)  # the default
    kept = {0, *values["pretraining"]["checkpoints"], values["pretraining"]["steps"]}
    assert profile.pretraining.checkpoints == tuple(sorted(kept))


def test_unknown_profile_lists_what_exists():
    expected = f"unknown profile 'smal': notebooks/params has {listing(profiles())}"
    with pytest.raises(KelibError, match=re.escape(expected)):
        load_profile("smal")


def test_a_file_has_to_carry_its_own_name():
    with pytest.raises(KelibError, match=r"smoke.yaml calls itself 'mine'; it must be 'smoke'"):
        load_profile("smoke", {"profile": "mine"})


def test_unknown_key_is_named_with_a_suggestion_and_the_valid_ones(values):
    values["continual"]["step"] = values["continual"].pop("steps")
    refuses(
        "unknown key continual.step: did you mean continual.steps? valid keys are batch_size, "
        "control_seeds, curve_seeds, injections, learning_rates, optimizer, save_every, seeds, "
        "stages",
        values,
    )


def test_unknown_key_like_no_other_has_no_suggestion(values):
    refuses("unknown key zzz: valid keys are branches, comparison, continual", values | {"zzz": 1})
    refuses("unknown key 7: valid keys are branches, comparison, continual", values | {7: 1})


def test_missing_key_is_named_with_the_valid_ones(values):
    del values["corpus"]["world"]["people"]
    refuses("missing key corpus.world.people: add it; valid keys are once_entries", values)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("continual.steps", 20.0, "continual.steps = 20.0 must be of type int"),
        ("continual.steps", True, "continual.steps = True must be of type int"),
        ("corpus.facts_share", False, "corpus.facts_share = False must be of type float"),
        ("corpus.facts_share", float("nan"), "corpus.facts_share = nan must be of type float, fin"),
        ("pretraining.learning_rate", "1e-4", "(YAML reads 1e-4 as text: write 1.0e-4)"),
        ("continual.learning_rates", [6e-3, "1e-3"], "continual.learning_rates[1] = '1e-3' must"),
        ("seeds", 100, "seeds = 100 must be a list, such as [1, 2]"),
        ("model", None, "model = None must be a mapping with hidden_size"),
        ("model.model_type", 3, "model.model_type = 3 must be of type str"),
        ("pretraining.optimizer.betas", [0.9], "betas = [0.9] must have 2 values"),
    ],
)
def test_mistyped_values(values, key, value, message):
    refuses(message, values, {key: value})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("workers", 0, "workers = 0 must be at least 1"),
        ("seeds", [], "seeds = () must be a list of distinct values, not empty"),
        ("seeds", [1, 1], "seeds = (1, 1) must be a list of distinct values"),
        ("seeds", [-1], "seeds = -1 must be at least 0"),
        ("continual.seeds", [-1], "continual.seeds = -1 must be at least 0"),
        ("continual.steps", 25, "continual.steps = 25 must be a multiple of the 10 injections"),
        ("continual.stages", [0.5], "continual.stages = (0.5,) must be a list with 1.0"),
        ("continual.stages", [0, 1], "continual.stages = 0.0 must be between 0 (exclusive) and 1"),
        ("continual.learning_rates", [0], "continual.learning_rates = 0.0 must be above 0"),
        ("corpus.facts_share", 1.5, "corpus.facts_share = 1.5 must be between 0 and 1"),
        ("corpus.vocabulary_size", 70000, "vocabulary_size = 70000 must be between 300 and 65536"),
        ("corpus.general", [], "corpus.general = () must be at least one source unless"),
        ("corpus.domain", [], "corpus.domain = () must be at least one source"),
        ("corpus.world.once_entries", 0, "once_entries = 0 must be at least 1: K needs both sets"),
        ("model.hidden_size", 34, "hidden_size = 34 must be a multiple of 2 x 2 heads"),
        ("model.hidden_size", 0, "model.hidden_size = 0 must be at least 1"),
        ("pretraining.checkpoints", [61], "checkpoints = (61,) must be steps between 0 and 60"),
        ("pretraining.checkpoints", [-1], "checkpoints = (-1,) must be steps between 0 and 60"),
        ("pretraining.optimizer.clip", 0, "optimizer.clip = 0.0 must be above 0"),
        ("pretraining.optimizer.betas", [0.9, 1], "betas = (0.9, 1.0) must be between 0 and 1"),
        ("pretraining.optimizer.weight_decay", -1, "weight_decay = -1.0 must be between 0 and inf"),
        ("interventions.ratios", [1.1], "interventions.ratios = 1.1 must be between 0 and 1"),
        ("interventions.factors", [0], "interventions.factors = 0.0 must be above 0"),
        ("interventions.learning_rates", [0.5], "else there is no original to compare with"),
        ("mechanism.learning_rates", [0.5], "mechanism.learning_rates = (0.5,) must be rates of c"),
        ("mechanism.learning_rates", [], "mechanism.learning_rates = () must be a list of distin"),
        ("retention.learning_rates", [0.5], "retention.learning_rates = (0.5,) must be rates of c"),
        ("reactivation.learning_rates", [1.0e-3], "(0.001,) must be rates of interventions.learni"),
        ("reactivation.draws", 0, "reactivation.draws = 0 must be at least 1"),
        ("continual.curve_seeds", [], "continual.curve_seeds = () must be at least one seed where"),
    ],
)
def test_impossible_values(values, key, value, message):
    refuses(message, values, {key: value})


def test_one_source_is_not_both_pretrained_on_and_new(values):
    values["corpus"]["domain"] = [*values["corpus"]["domain"], *values["corpus"]["general"]]
    refuses("must be other sources than general: ['generated:general']", values)


def test_facts_alone_need_no_general_source(values):
    profile = profile_from(values, {"corpus.facts_share": 1, "corpus.general": []})
    assert profile.corpus.facts_share == 1.0
    assert type(profile.corpus.facts_share) is float


def test_overrides_go_through_the_same_validation(values):
    changed = profile_from(values, {"continual.steps": 40, "seeds": [5]})
    assert (changed.continual.steps, changed.seeds) == (40, (5,))
    refuses(
        "unknown key continual.stepz: did you mean continual.steps?", values, {"continual.stepz": 1}
    )
    refuses("unknown key nothing.steps: valid sections are", values, {"nothing.steps": 1})
    refuses("unknown key seeds.first: valid sections are", values, {"seeds.first": 1})
    refuses("missing key continual.batch_size", values, {"continual": {"steps": 40}})


def test_the_callers_values_are_left_alone(values):
    section = copy.deepcopy(values["continual"])
    before = copy.deepcopy((values, section))
    profile_from(values, {"continual": section, "continual.steps": 40})
    assert (values, section) == before


@pytest.mark.parametrize("other", [None, [], "smoke"])
def test_a_profile_is_a_mapping(other):
    refuses("a profile must be a mapping with branches, comparison, continual", other)


def every_value(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from every_value(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def another(key, value):
    """A valid value other than ``value``, for any key of a profile."""
    special = {
        "corpus.domain": ["generated:other"],
        "corpus.general": ["generated:other"],
        "pretraining.checkpoints": [1, 2, 30],
        "continual.learning_rates": [6.0e-3, 1.0e-3, 2.0e-3],
        "continual.steps": 40,
        "continual.injections": 5,
        "continual.stages": [0.25, 1.0],
        "interventions.ratios": [0.25],
        "interventions.learning_rates": [6.0e-3],
        "mechanism.learning_rates": [1.0e-3],
        "retention.learning_rates": [1.0e-3],
        "reactivation.learning_rates": [1.0e-3],
        "branches.learning_rates": [1.0e-3],
        "regimes.learning_rates": [1.0e-3],
        "pretraining.optimizer_states": [30, 45],
        "model.hidden_size": 64,
        "model.num_attention_heads": 4,
        "comparison.hidden_size": 64,
        "comparison.num_attention_heads": 4,
    }
    if key in special:
        return special[key]
    if isinstance(value, list):
        return value[:-1] or [v + 1 for v in value]
    return (
        f"{value}x" if isinstance(value, str) else value / 2 if type(value) is float else value + 1
    )


def test_the_digest_changes_with_every_value_but_not_with_workers(values):
    values["interventions"]["learning_rates"] = [6.0e-3, 1.0e-3]  # for others to be among
    original = profile_from(values).digest
    keys = dict(every_value(values))
    assert len(keys) > 30
    for key, value in keys.items():
        changed = profile_from(values, {key: another(key, value)})
        assert (changed.digest == original) == (key == "workers"), key
    default = {"pretraining.optimizer.warmup_share": 0.1}  # not in the file at all
    assert profile_from(values, default).digest != original


def test_the_digest_is_the_same_in_any_key_order_and_number_format(values):
    def turned(node):
        if not isinstance(node, dict):
            return node
        return {key: turned(node[key]) for key in reversed(node)}

    original = profile_from(values)
    assert profile_from(turned(values)) == original
    assert profile_from(turned(values)).digest == original.digest
    whole = {"pretraining.optimizer.weight_decay": 1}  # 1.0 in the file
    assert profile_from(values, whole).digest == original.digest


def test_the_digest_is_the_same_in_another_process():
    code = "from kelib.config import load_profile; print(load_profile('smoke').digest)"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=repository_root(),
        check=True,
        capture_output=True,
        text=True,
    )
    assert found.stdout.strip() == load_profile("smoke").digest


def test_digest_of_plain_values():
    assert digest({"b": 1, "a": (1, 2)}) == digest({"a": [1, 2], "b": 1})
    assert digest({"a": 1}) != digest({"a": 1.5})
    assert len(digest([], length=20)) == 20
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest(float("nan"))


def test_a_profile_is_frozen():
    profile = load_profile("smoke")
    for part in (profile, profile.corpus, profile.corpus.world, profile.pretraining.optimizer):
        name = dataclasses.fields(part)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, name, None)
    assert hash(profile) == hash(load_profile("smoke"))


def test_replacing_a_part_validates_again():
    profile = load_profile("smoke")
    with pytest.raises(KelibError, match=r"continual.steps = 21 must be a multiple"):
        dataclasses.replace(profile.continual, steps=21)
    assert isinstance(dataclasses.replace(profile, workers=7), Profile)


def test_broken_yaml_is_one_line(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("profile: [mine\nseeds: 3")
    with pytest.raises(KelibError, match=r"mine.yaml is not valid YAML: .*line 2") as caught:
        read_yaml(path)
    assert "\n" not in str(caught.value)
    path.write_bytes(b"profile: \xff")
    with pytest.raises(KelibError, match=r"mine.yaml is not valid YAML: .*utf-8"):
        read_yaml(path)
    with pytest.raises(KelibError, match=r"cannot read .*other.yaml: No such file"):
        read_yaml(tmp_path / "other.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"control_seeds": [7]}, "continual.control_seeds = (7,) must be among (0, 1)"),
        ({"curve_seeds": [0, 9]}, "continual.curve_seeds = (0, 9) must be among (0, 1)"),
        ({"variants": [{"name": "a"}]}, "missing key continual.variants[0].learning_rates: add it"),
        ({"variants": [VARIANT, VARIANT]}, "continual.variants = ['a', 'a'] must be a list of dis"),
        (
            {"variants": [VARIANT | {"text": "c4"}]},
            "variant.text = 'c4' must be one of domain, gen",
        ),
        ({"variants": [VARIANT | {"name": "protocol"}]}, "'protocol' must be another name"),
        ({"variants": [VARIANT | {"epochs": 0}]}, "variant.epochs = 0 must be at least 1"),
        (
            {"variants": [VARIANT | {"steps": 15}]},
            "variant.steps = 15 must be a multiple of the 10",
        ),
        (
            {"variants": [VARIANT | {"epochs": 3}]},
            "variant.epochs = 3 must be a divisor of the 320 sequences read",
        ),
    ],
)
def test_departures_from_the_protocol_are_checked(values, changes, message):
    refuses(message, values, {f"continual.{name}": value for name, value in changes.items()})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("training.precision", "fp8", "training.precision = 'fp8' must be float32 or bf16"),
        ("training.micro_batch_size", 0, "training.micro_batch_size = 0 must be at least 1"),
        ("training.fast", True, "unknown key training.fast: valid keys are compile, micro_batch"),
        ("comparison.model_type", "olmo", "comparison.model_type = 'olmo' must be another family"),
    ],
)
def test_how_training_is_computed_is_checked(values, key, value, message):
    refuses(message, values, {key: value})


def test_sections_with_defaults_need_not_be_in_the_file(values):
    profile = profile_from(values, {"training.micro_batch_size": 4})
    assert (profile.training.micro_batch_size, profile.training.precision) == (4, "float32")
    del values["comparison"]
    assert profile_from(values).comparison is None


def test_a_profile_without_optional_sections_keeps_the_digest_it_had(values):
    for name in OPTIONAL:
        del values[name]
    profile = profile_from(values)
    older = dataclasses.asdict(dataclasses.replace(profile, workers=1))
    assert older.pop("executor") == "local" and older.pop("figures") == ()
    for name in OPTIONAL:  # as tables have it that were written before there was this section
        assert older.pop(name) is None
    assert profile.digest == digest(older) == profile_from(older).digest
    assert profile_from(values, {"continual.curve_seeds": []}).continual.curve_seeds == ()

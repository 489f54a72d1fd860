"""A miniature of a profile is run and timed: what the times become, and that they are kept."""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from short import less_text

from kelib import calibration as calibration_module
from kelib import miniature as miniature_module
from kelib import planner
from kelib.calibration import calibrate, calibrate_published, own_seconds
from kelib.config import load_profile, profiles
from kelib.errors import KelibError
from kelib.miniature import class_of, miniature, sample_runs
from kelib.published import load_published
from kelib.scale import training_flops
from kelib.study import Study
from kelib.workload import Work, shape_of_profile

WORLD = {"people": 12, "places": 8, "works": 8, "once_entries": 3, "paraphrase_entries": 2}
SMALL = {
    "seeds": [100],
    "corpus.world": {**WORLD, "questions_per_task": 4},
    "model.hidden_size": 16,
    "model.intermediate_size": 32,
}


@contextmanager
def here(workers):
    """A pool of this process alone: starting others takes longer than what they do."""
    yield SimpleNamespace(map=map)


@pytest.fixture(scope="module", autouse=True)
def longer():
    """More steps in the longer run: so small a model takes milliseconds a step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(miniature_module.RATIOS, "longer", 8)
        yield


@pytest.fixture(scope="module")
def profile():
    return load_profile("smoke", SMALL)


@pytest.fixture(scope="module")
def made(profile, tmp_path_factory):
    """A calibration of the tiny profile, whose runs are done in this process, and its file."""
    kept = tmp_path_factory.mktemp("kept") / "calibration.json"

    with less_text(characters=50_000), pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration_module, "_processes", here)
        return calibrate(profile, kept), kept


@pytest.mark.parametrize("name", profiles())
def test_the_miniature_of_every_profile_has_a_run_of_every_class(name, tmp_path):
    chosen = load_profile(name)
    small = miniature(chosen)
    assert small.model == chosen.model and small.training == chosen.training
    assert small.corpus.sequence_length == chosen.corpus.sequence_length
    sampled = sample_runs(Study(small, tmp_path))
    longer = {"corpus, longer", "continual, longer"}
    runs = planner.planned_runs(Study(chosen, tmp_path))
    asked = {class_of(run.kind, run.settings) for of_stage in runs.values() for run in of_stage}
    assert asked <= set(sampled) - longer and longer <= set(sampled)


def test_a_calibration_times_the_real_jobs(made, profile):
    found, _ = made
    assert found.flop_seconds > 0 and found.packed_seconds >= 0
    assert set(found.fixed) == set(found.measured)
    assert all(seconds >= 0 for seconds in found.fixed.values())
    assert found.fixed["evaluate"] > 0 and found.fixed["mechanism"] > found.fixed["evaluate"]


def test_a_calibration_is_kept_for_its_machine_and_settings(made, profile, monkeypatch, tmp_path):
    found, kept = made

    def measured_again(profile):
        raise AssertionError("timed again")

    monkeypatch.setattr(calibration_module, "measure", measured_again)
    assert calibrate(profile, kept) == found
    seeds = dataclasses.replace(profile, seeds=(1, 2, 3))  # cost the same each
    assert calibrate(seeds, kept) == found
    for other in (
        dataclasses.replace(profile, workers=1),
        dataclasses.replace(profile, model=dataclasses.replace(profile.model, hidden_size=32)),
    ):
        with pytest.raises(AssertionError, match="timed again"):
            calibrate(other, kept)
    monkeypatch.setattr(calibration_module, "machine", lambda: {"processor": "another"})
    with pytest.raises(AssertionError, match="timed again"):
        calibrate(profile, kept)
    broken = tmp_path / "calibration.json"
    broken.write_text("{")
    with pytest.raises(AssertionError, match="timed again"):
        calibrate(profile, broken)


def test_the_processor_is_timed_where_no_accelerator_is_at_work(monkeypatch):
    note = {"seconds": 30.0, "cpu_seconds": 12.0}
    monkeypatch.setattr(calibration_module.shutil, "which", lambda name: None)
    assert own_seconds(note) == 12
    assert own_seconds({"seconds": 30.0, "cpu_seconds": 55.0}) == 30  # two threads
    assert own_seconds({"seconds": 30.0}) == 30  # of a run older than that note
    monkeypatch.setattr(calibration_module.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert own_seconds(note) == 30


def test_times_that_make_no_sense_are_refused(profile):
    spent = dict.fromkeys(("continual", "continual, longer", "corpus", "corpus, longer"), 5.0)
    works = {name: Work(trained=n, packed=n) for n, name in enumerate(spent, 1)}
    message = r"learning of 2 tokens took 5.0 s, no more than of 1: the machine is too busy"
    with pytest.raises(KelibError, match=message):
        calibration_module._fitted(profile, spent, works)


def test_costs_are_fitted_as_by_hand(profile):
    flops = training_flops(shape_of_profile(profile), 64)
    works = {
        "continual": Work(trained=1000, measured=70),
        "continual, longer": Work(trained=3000),
        "evaluate": Work(measured=500),
        "corpus": Work(packed=100),
        "corpus, longer": Work(packed=600),
    }
    spent = dict(zip(works, (4.0, 10.0, 2.5, 3.0, 4.0), strict=True))
    found = calibration_module._fitted(profile, spent, works)
    assert found.flop_seconds == pytest.approx(6 / (2000 * flops))
    assert found.packed_seconds == pytest.approx(1 / 500)
    assert found.fixed == pytest.approx({"continual": 1, "evaluate": 2.5, "corpus": 2.8})
    # 1 s beyond training, which takes 3 s for a thousand tokens
    assert found.seconds("continual", Work(trained=5000), 5000 * flops) == pytest.approx(16)
    assert found.seconds("evaluate", Work(measured=250), 0) == pytest.approx(1.25)
    assert found.seconds("corpus", Work(packed=1100), 0) == pytest.approx(5)
    with pytest.raises(KelibError, match=r"timed no run of class 'later', only continual, corpus"):
        found.seconds("later", Work(trained=1), 1)


def test_a_published_calibration_measures_all_definitions(tmp_path, monkeypatch):
    tiny = load_published("smollm2", {"sequence_length": 16, "workers": 1})

    monkeypatch.setattr(calibration_module, "_processes", here)
    kept = tmp_path / "calibration.json"
    found = calibrate_published(tiny, kept)
    assert found.flop_seconds > 0
    monkeypatch.setattr(calibration_module, "_processes", None)
    assert calibrate_published(tiny, kept) == found

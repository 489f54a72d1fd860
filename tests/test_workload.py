"""What runs have to do, counted by hand and found in what runs really leave."""

from __future__ import annotations

import dataclasses
import shutil

import pytest

from kelib import beyond, entities, grid, mechanism, mechanism_inputs, sources, stages
from kelib.config import load_profile
from kelib.errors import KelibError
from kelib.grid import (
    flat_entropy,
    missing_text,
    needed_bytes,
    once,
    planned_runs,
    require_space,
    stage_runs,
)
from kelib.scale import forward_flops, training_flops
from kelib.study import Study
from kelib.workload import (
    ANSWERS,
    PASSES,
    SEQUENCES,
    WARM_STEPS,
    Work,
    shape_of_profile,
    shape_of_run,
    work_of,
)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Profile smoke, of which nothing is done."""
    return Study(load_profile("smoke"), tmp_path_factory.mktemp("smoke"))


def work(study, run):
    return work_of(study.profile, run.kind, run.settings, shape_of_run(study.profile, run))


# --- counts, with the numbers of notebooks/params/smoke.yaml --------------------------------------


def test_training_reads_steps_times_batch_times_length(study):
    assert work(study, study.pretrain_run(100)).trained == 60 * 16 * 64
    learned = work(study, study.continual_run(100, 60, 1e-3, 0))
    assert learned.trained == 20 * 16 * 64
    ((_, branch), *_) = beyond.branch_runs(study)
    assert work(study, branch).trained == 10 * 16 * 64  # annealed from step 30 over 10 steps
    shape = shape_of_profile(study.profile)
    both = Work(trained=5, measured=7).flops(shape, 64)
    assert both == 5 * training_flops(shape, 64) + 7 * forward_flops(shape, 64)


def test_entropy_reads_its_sample_six_times_and_that_of_convergence(study):
    # the mixture by three definitions, then facts, general and domain text alone
    assert work(study, study.entropy_run(100, 1)).measured == 6 * 32 * 64
    assert study.entropy_run(100, 60).settings["converge"]
    assert work(study, study.entropy_run(100, 60)).measured == (6 * 32 + 64) * 64


def test_what_is_measured_at_the_end_of_runs_adds_up(study):
    evaluated = work(study, study.evaluate_run(100, 60)).measured
    assert evaluated > 2 * 16 * 64  # held-out text, then probes and questions
    after = evaluated + 32 * 64
    change = study.resuscitations()[0]
    assert work(study, study.intervene_run(100, 60, change)).measured == after
    plain = work(study, study.continual_run(100, 60, 1e-3, 0, injected=False))
    curve = work(study, study.continual_run(100, 60, 1e-3, 0))
    assert plain.measured == after
    probes, rest = divmod(curve.measured - after, 2 * 10)  # before and after each injection
    assert rest == 0 and 0 < probes < evaluated
    steps = study.entities_run(100).settings["steps"]
    assert work(study, study.entities_run(100)).measured == len(steps) * 2 * 640 * 64


def test_probes_and_questions_are_as_long_as_estimated(short_study):
    """Within a third of what the tokenizer of a real corpus makes of them."""
    from transformers import AutoTokenizer

    from kelib.corpus import load_corpus
    from kelib.workload import _asked
    from kelib.world import build_world

    profile = short_study.study.profile
    packed = load_corpus(short_study.study.corpus_run(100).folder)
    tokenizer = AutoTokenizer.from_pretrained(packed.tokenizer_folder)
    world = build_world(profile.corpus.world, 100)
    entries = (*world.once, *world.paraphrase)
    texts = [part for e in entries for p in e.probes for part in (p.input, p.target)]
    asked = [text for q in world.questions for text in (q.context, *q.choices)]
    counted = [sum(map(len, tokenizer(part)["input_ids"])) for part in (texts, asked)]
    assert _asked(profile.corpus.world, 100) == pytest.approx(counted, rel=0.34)


def test_samples_of_the_mechanism_are_those_of_its_module():
    assert (WARM_STEPS, SEQUENCES) == (mechanism_inputs.WARM_STEPS, mechanism.HELDOUT_SEQUENCES)
    noise = len(mechanism.NOISE_SIZES) * len(mechanism.NOISE_SEEDS)
    steps = 3 * len(mechanism.STEP_SIZES)
    assert (6 * noise + steps, noise + steps) == (PASSES, ANSWERS)
    assert entities.SEQUENCES >= 640


def test_other_families_are_counted_by_their_own_shape(study):
    run = study.entropy_run(100, 60, "gpt_neox")
    shape = shape_of_run(study.profile, run)
    assert shape.model_type == "gpt_neox"
    assert shape_of_run(study.profile, study.corpus_run(100)).model_type == "olmo"
    assert shape.parameters != shape_of_profile(study.profile).parameters


# --- bytes ----------------------------------------------------------------------------------------


def size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_bytes_are_about_those_that_runs_leave(short_study):
    """Within a fifth for what is large; what is small is not underestimated by much."""
    study = short_study.study
    for run in (study.corpus_run(100), study.pretrain_run(100)):
        assert work(study, run).stored == pytest.approx(size(run.folder), rel=0.2), run.kind
    for run in (study.entropy_run(100, 20), study.evaluate_run(100, 20), study.entities_run(100)):
        assert 0.5 * size(run.folder) < work(study, run).stored < 2**20, run.kind


def test_the_disk_must_hold_runs_scratch_and_text_twice():
    works = [Work(stored=10, scratch=s) for s in (1, 5, 3)]
    assert needed_bytes(works, 2, [7]) == 30 + 5 + 3 + 14


def test_a_disk_too_small_is_refused_before_anything_is_done(study, monkeypatch):
    usage = shutil._ntuple_diskusage
    monkeypatch.setattr(grid.shutil, "disk_usage", lambda folder: usage(2**40, 2**40, 2**16))
    message = r"profile smoke needs 0\.\d\d GB more in .*, 0\.00 GB are free there: free space"
    with pytest.raises(KelibError, match=message):
        require_space(study)
    with pytest.raises(KelibError, match=message):
        stages.pretrain(study)
    assert not any(study.data.iterdir())


def test_a_finished_study_needs_no_space(short_study, monkeypatch):
    study = short_study.study
    half = {runs[0].digest for runs in planned_runs(study).values() if runs[0].done}
    assert half  # its first stages are done
    monkeypatch.setattr(grid, "planned_runs", lambda study: {1: study.pretrain_runs()})
    monkeypatch.setattr(grid, "free_bytes", lambda folder: 0)
    require_space(study)


def test_text_that_is_here_need_not_be_fetched(tmp_path):
    known = sources.manifest()
    wanted = ("news", "wikipedia", "generated:one", str(tmp_path))
    expected = {name: known[name].members[0].bytes for name in ("news", "wikipedia")}
    assert missing_text(wanted, tmp_path) == expected
    (path,) = known["news"].paths(tmp_path)
    path.parent.mkdir()
    path.write_bytes(b"")
    assert missing_text(wanted, tmp_path) == {"wikipedia": expected["wikipedia"]}


# --- the grid -------------------------------------------------------------------------------------


def test_without_an_entropy_table_every_stage_is_planned(study):
    entropy = flat_entropy(study)
    assert list(study.stages(entropy, 100)) == ["50%", "100%"]
    assert set(stage_runs(study, None)) == {1, 2, 4, 7, 9}
    assert set(stage_runs(study, entropy)) == {1, 2, 3, 4, 6, 7, 9}


def test_each_run_is_planned_once_after_what_it_rests_on(study):
    planned = planned_runs(study)
    digests = [run.digest for runs in planned.values() for run in runs]
    assert len(digests) == len(set(digests))
    place = {digest: at for at, digest in enumerate(digests)}
    runs = [run for runs in planned.values() for run in runs]
    assert all(place[i.digest] < place[r.digest] for r in runs for i in r.inputs.values())
    assert [run.kind for run in planned[1]] == ["corpus"] * 2 + ["pretrain"] * 4
    assert once({3: [study.corpus_run(100)], 1: [study.corpus_run(100)]}) == {
        1: [study.corpus_run(100)]
    }


def test_a_stage_before_the_peak_is_left_out_once_that_is_known(short_study):
    study = short_study.study
    plan = dataclasses.replace(study.profile.continual, stages=(0.05, 0.5, 1.0))
    wider = Study(dataclasses.replace(study.profile, continual=plan), study.data)
    known = short_study.entropy.copy()
    known["entropy_nats"] = known["step"].map({0: 1.0, 1: 3.0, 10: 2.0, 20: 1.5})  # peak at step 1
    assert len(stage_runs(wider, known)[3]) < len(stage_runs(wider, flat_entropy(wider))[3])

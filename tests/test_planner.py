"""The plan of a profile: its tables, what is printed, and how good it was."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from statistics import median

import pytest

from kelib import plan_report, planner
from kelib.__main__ import main
from kelib.calibration import Calibration, own_seconds
from kelib.config import load_profile, repository_root
from kelib.errors import KelibError
from kelib.figure_stages import figures_of, stages_behind
from kelib.miniature import class_of
from kelib.plan_check import check_table, finished_runs, refuse_bad_estimate
from kelib.planner import (
    figures_table,
    kinds_table,
    paper_table,
    published_table,
    study_table,
)
from kelib.published import PublishedStudy, load_published
from kelib.scale import PAPER, device_hours, paper_flops, training_flops
from kelib.study import Study
from kelib.workload import shape_of_profile


@pytest.fixture
def study(tmp_path):
    return Study(load_profile("smoke", {"seeds": [100]}), tmp_path)


@pytest.fixture
def even():
    """A calibration by which every class of runs costs 10 s and a training FLOP 1 ns."""
    classes = [
        *("corpus", "pretrain", "entropy", "entropy, converge", "evaluate", "entities"),
        *("intervene", "continual", "continual, curve", "mechanism", "later", "reactivation"),
        "branch",
    ]
    return Calibration(1e-9, 0.0, dict.fromkeys(classes, 10.0), dict.fromkeys(classes, 1000))


# --- tables ---------------------------------------------------------------------------------------


def test_the_table_of_a_study_counts_every_run(study, even):
    runs = study_table(study, even)
    assert len(runs) == sum(map(len, planner.planned_runs(study).values()))
    assert not runs["done"].any()
    row = runs[runs["kind"] == "pretrain"].iloc[0]
    assert row["trained"] == 60 * 16 * 64
    assert row["flops"] == row["trained"] * training_flops(shape_of_profile(study.profile), 64)
    assert row["seconds"] == pytest.approx(10 + 1e-9 * row["flops"])
    kinds = kinds_table(runs)
    assert kinds["kind"].iloc[-1] == "all"
    total = kinds.iloc[-1]
    assert (total["open"], total["done"]) == (len(runs), 0)
    assert total["hours"] == total["hours_open"] == pytest.approx(runs["seconds"].sum() / 3600)
    assert kinds["trained"].iloc[:-1].sum() == total["trained"] == runs["trained"].sum()
    without = kinds_table(study_table(study, None))
    assert without["hours"].isna().all()


def test_runs_that_are_done_are_not_open(short_study):
    runs = study_table(short_study.study, None)
    kinds = kinds_table(runs).set_index("kind")
    assert kinds.loc["pretrain", ["done", "open"]].tolist() == [1, 0]
    assert kinds.loc["evaluate", "open"] == 0 and kinds.loc["intervene", "open"] > 0


def test_figures_rest_on_the_stages_before_theirs(study, even):
    assert stages_behind(["fig02_knowledge_entropy"]) == {1, 2}
    assert stages_behind(["fig02_knowledge_entropy", "fig04_stages"]) == {1, 2, 3}
    assert stages_behind(["fig05_resuscitation"]) == stages_behind(["tab00_claims"]) == {1, 2, 3, 4}
    assert stages_behind(["ours_retention"]) == {1, 2, 3, 4, 6}
    assert stages_behind(["ours_annealing"]) == {1, 2, 3, 4, 7}
    assert stages_behind(["ours_regimes"]) == {9}
    assert stages_behind(["ours_contrasts"]) == {
        1,
        2,
        3,
        4,
        6,
        7,
        9,
    }  # names no table: rests on all
    runs = study_table(study, even)
    table = figures_table(runs, ["fig04_stages", "fig02_knowledge_entropy", "ours_retention"])
    assert table["figure"].tolist()[0] == "fig02_knowledge_entropy"
    counts = runs.groupby("stage").size()
    expected = [counts[[1, 2]].sum(), counts[[1, 2, 3]].sum(), counts[[1, 2, 3, 4, 6]].sum()]
    assert table["runs"].tolist() == table["open"].tolist() == expected
    first = runs[runs["stage"] <= 2]["seconds"].sum() / 3600
    assert table["hours"].iloc[0] == pytest.approx(first)
    with pytest.raises(KelibError, match=r"no notebook fig99.ipynb; notebooks has 00_start"):
        figures_table(runs, ["fig99"])


def test_figures_of_a_profile_are_those_whose_tables_it_writes():
    smoke, small = (set(figures_of(load_profile(n))) for n in ("smoke", "small"))
    assert {"fig04_stages", "ours_retention", "ours_annealing", "ours_learning_curves"} <= smoke
    assert "ours_regimes" in smoke - small
    assert "fig04_stages" in small and not {"ours_retention", "fig15_ratio"} & small
    assert not {"ours_search", "ours_published", "ours_sliders", "00_start_here"} & smoke
    assert "fig01_overview" in small


def test_a_profile_that_names_its_figures_plans_what_is_behind_them_alone(tmp_path):
    assert figures_of(load_profile("regimes")) == ["ours_regimes"]
    for name, stages in (("regimes", {9}), ("families", {1, 2})):
        assert set(planner.planned_runs(Study(load_profile(name), tmp_path))) == stages


def test_the_papers_scale_is_that_of_its_protocol(study):
    runs = study_table(study, None)
    table = paper_table(runs, 0.4).set_index(["model", "device"])
    flops = paper_flops(PAPER["OLMo-1B"])
    one = table.loc[("OLMo-1B", "H100")]
    assert one["run_hours"] == pytest.approx(device_hours(flops["learning"], "H100", 0.4))
    learned = runs["kind"].isin(["continual", "continual, curve", "later"]).sum()
    measured = runs["kind"].str.startswith("entropy").sum()
    total = learned * flops["learning"] + measured * flops["entropy"]
    assert one["grid_hours"] == pytest.approx(device_hours(total, "H100", 0.4))
    assert one["devices"] == 1 and table.loc[("OLMo-7B", "A100"), "devices"] == 2
    assert (table["memory_gb"] < 141).all()


def test_a_published_profile_is_counted_from_its_manifest(tmp_path):
    study = PublishedStudy(load_published("smollm2"), tmp_path)
    fast = Calibration(1e-12, 0.0, {}, {})
    runs = published_table(study, fast)
    assert runs["kind"].tolist() == ["import_model", *["published"] * 3, "asked"]
    measured = runs[runs["kind"] == "published"].iloc[0]
    assert measured["measured"] == (128 + 32) * 512
    assert measured["flops"] == 2 * 134_515_008 * measured["measured"]
    assert measured["seconds"] == pytest.approx(1e-12 * measured["flops"])
    assert math.isnan(runs["seconds"].iloc[0])  # fetching and converting
    lacking = planner.downloads(study)
    assert set(lacking) == {"news", "wikipedia", "pubmed", "medmcqa", "model smollm2"}
    assert lacking["model smollm2"] == 98_362_432
    generated = PublishedStudy(load_published("published_smoke"), tmp_path)
    assert planner.downloads(generated) == {}
    assert (published_table(generated, None)["flops"] == 0).all()


# --- how good it was ------------------------------------------------------------------------------


def test_estimates_are_compared_with_finished_runs(short_study, even):
    study = short_study.study
    notes = finished_runs(study)
    spent = {}
    for note in notes:
        spent.setdefault(class_of(note["kind"], note["settings"]), []).append(own_seconds(note))
    table = check_table(study, even).set_index("kind")
    assert set(table.index) == {*spent, "all"}
    assert table.loc["evaluate", "runs"] == len(spent["evaluate"]) == 4
    assert table.loc["evaluate", "measured"] == pytest.approx(sum(spent["evaluate"]) / 3600)
    assert table.loc["all", "runs"] == len(notes)
    row = table.loc["all"]
    assert row["ratio"] == pytest.approx(row["estimated"] / row["measured"])
    assert row["low"] <= row["median"] <= row["high"]
    each = 3600 * table.loc["evaluate", "estimated"] / 4
    single = [each / seconds for seconds in spent["evaluate"]]
    assert table.loc["evaluate", "median"] == pytest.approx(median(single))


def test_an_estimate_that_is_off_fails_and_nothing_finished_is_refused(short_study, even, study):
    table = check_table(short_study.study, even)
    table.loc[len(table) - 1, "ratio"] = 1.24
    refuse_bad_estimate(table)
    table.loc[len(table) - 1, "ratio"] = 1.26
    with pytest.raises(KelibError, match=r"the estimate is 1.26 of the measured time, it must be"):
        refuse_bad_estimate(table)
    with pytest.raises(KelibError, match=r"no run of smoke is finished in .*: nothing to check"):
        check_table(study, even)


# --- the command ----------------------------------------------------------------------------------


def test_a_plan_is_printed_without_torch_and_without_doing_anything(tmp_path):
    code = (
        "import sys; from kelib.__main__ import main; status = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules; sys.exit(status)"
    )
    command = [sys.executable, "-c", code, "plan", "small", "fig04_stages", "--counts-only"]
    command += ["--mfu", "0.5"]
    done = subprocess.run(
        [*command, "--data", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    text = done.stdout
    assert "runs, 0 open" not in text and "To fetch: news 5.0 MB, wikipedia 6.5 MB" in text
    assert "fig04_stages" in text and "fig05" not in text and "OLMo-7B" in text
    assert "MFU 0.5" in text and "of one process" not in text
    assert not any(tmp_path.iterdir())


def test_a_plan_with_hours_tells_time_here_and_by_figure(even, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(plan_report, "calibrated", lambda study, anew: even)
    assert main(["plan", "smoke", "--data", str(tmp_path), "--mfu", "0.5"]) == 0
    text = capsys.readouterr().out
    runs = study_table(Study(load_profile("smoke"), tmp_path), even)
    hours = runs["seconds"].sum() / 3600
    assert f"Time here: {hours:.1f} hours of one process, {hours / 2:.1f} hours on 2" in text
    assert "To fetch: nothing." in text and "OLMo" not in text  # of a tiny world nothing follows
    lines = [line.split() for line in text.splitlines() if "fig02_knowledge_entropy" in line]
    first = runs[runs["stage"] <= 2]["seconds"].sum() / 3600
    assert lines[0][-2:] == [f"{first:.2f}", f"{first:.2f}"]


@pytest.mark.parametrize(("seconds", "said"), [(90, "1.5 minutes"), (5400, "1.5 hours")])
def test_a_duration_is_in_minutes_below_an_hour_and_a_half(seconds, said):
    assert plan_report._duration(seconds) == said


def test_a_plan_for_a_full_disk_says_so_and_exits_with_1(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(plan_report, "free_bytes", lambda folder: 1000)
    monkeypatch.setattr("kelib.grid.free_bytes", lambda folder: 1000)
    assert main(["plan", "smoke", "--counts-only", "--data", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "Disk:" in printed.out  # all of the plan is printed before
    assert printed.err.startswith("kelib: profile smoke needs 0.") and printed.err.count("\n") == 1


def test_the_check_of_a_plan_is_a_command(short_study, monkeypatch, capsys):
    data = short_study.study.data
    notes = finished_runs(short_study.study)
    mean = {}
    for note in notes:
        mean.setdefault(class_of(note["kind"], note["settings"]), []).append(own_seconds(note))
    fixed = {name: sum(values) / len(values) for name, values in mean.items()}

    class Exact(Calibration):
        def seconds(self, name, work, training_flops):
            return fixed[name]

    monkeypatch.setattr(plan_report, "open_plan", lambda name, folder: short_study.study)
    monkeypatch.setattr(plan_report, "calibrated", lambda study, anew: Exact(0, 0, {}, {}))
    assert main(["plan", "smoke", "--check", "--data", str(data)]) == 0
    text = capsys.readouterr().out
    assert "estimate beside measurement" in text
    assert " 1.00" in next(line for line in text.splitlines() if line.startswith("all"))


@pytest.mark.parametrize("name", ["nowhere", "smal"])
def test_an_unknown_profile_is_refused_with_those_there_are(name, capsys):
    assert main(["plan", name]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"kelib: unknown profile '{name}'") and "smoke" in error


def test_make_names_the_figures_of_the_profile():
    command = ["make", "-n", "plan", "PROFILE=families", "USE_ENV=1", "PYTHON=python"]
    environment = {name: text for name, text in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(
        command, cwd=repository_root(), env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "python -m kelib plan families fig06_other_family"

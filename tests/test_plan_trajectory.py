"""The plan of a trajectory profile: what is counted, what is unknown, what is printed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kelib import plan_trajectory as planned
from kelib.__main__ import main
from kelib.fetching import GIB
from kelib.scale import PAPER, PUBLISHED, device_hours, forward_flops, paper_flops
from kelib.trajectory import Trajectory
from kelib.trajectory_profile import load_trajectory

SHAPE = PAPER["OLMo-1B"]


def study_of(name: str, data: Path, **overrides: object) -> Trajectory:
    changes = {key.replace("__", "."): value for key, value in overrides.items()}
    return Trajectory(load_trajectory(name, changes), data, data / "lock.yaml", data / "audit")


def test_the_papers_runs_cost_what_its_protocol_does(tmp_path: Path) -> None:
    study = study_of("paper", tmp_path)
    assert planned.shape_of_model(study) == SHAPE
    runs = planned.kinds_table(study, SHAPE).set_index("kind")
    assert runs["runs"].to_dict() == {
        **{"trajectory": 11, "learning_text": 1, "known": 4, "continued": 4 * 2 * 2}
    }
    assert (runs["done"] == 0).all()
    row = runs.loc["continued"]
    assert row["trained"] == 16 * 204_800 * 1024
    scored = row["measured"] * forward_flops(SHAPE, 1024)
    assert row["flops"] == pytest.approx(16 * paper_flops(SHAPE)["learning"] + scored)
    assert scored < 0.01 * row["flops"]
    # each text once, in all definitions at once, and again the sequences of the loss
    assert runs.loc["trajectory", "measured"] == 11 * 3 * (2048 + 256) * 2048
    one = planned.hours_table(study, runs.reset_index(), SHAPE, 0.4)
    one = one.set_index(["device", "part"])
    hours = one.loc[("H100", "one run of learning"), "hours"]
    assert hours == pytest.approx(device_hours(row["flops"] / 16, "H100", 0.4))
    assert one.loc[("H100", "all 16 of them"), "hours"] == pytest.approx(16 * hours)


def test_a_model_that_does_not_fit_is_shared(tmp_path: Path) -> None:
    study = study_of("paper", tmp_path, model__source="olmo-7b", learning__parallel="fsdp2")
    shape = planned.shape_of_model(study)
    assert shape == PAPER["OLMo-7B"]
    table = planned.hours_table(study, planned.kinds_table(study, shape), shape, 0.4)
    learning = table[table["part"] == "one run of learning"].set_index("device")
    assert learning.loc["A100", "devices"] == 2 and learning.loc["L40S", "devices"] == 4
    assert (learning["memory_gb"] < 0.8 * 141).all()


def test_sizes_are_those_of_the_audit_where_there_is_one(tmp_path: Path) -> None:
    import pandas as pd

    from kelib.tables import write_table

    study = study_of("paper", tmp_path)
    stored = 10**9
    needed = planned.bytes_of(study, SHAPE, stored)
    assert needed.checkpoint == 4 * SHAPE.parameters and "in float32" in needed.known
    texts = 3 * 200_000_000 + 1_100_000_000
    assert (needed.checkpoints, needed.text) == (11, texts)
    assert needed.disk == stored + texts + 12 * GIB + 28 * SHAPE.parameters
    table = pd.DataFrame({"step": [2000, 18000, 5], "bytes": [7, 9, 11]})
    write_table(table, tmp_path / "audit" / "olmo-1b.csv", {})
    needed = planned.bytes_of(study, SHAPE, stored)
    assert (needed.checkpoint, needed.known) == (9.0, "by the audit")


def test_what_is_not_known_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = study_of("paper", tmp_path, model__source="someone/model")
    assert planned.shape_of_model(study) is None
    runs = planned.kinds_table(study, None)
    assert runs["flops"].isna().all() and runs["trained"].sum() > 0
    needed = planned.bytes_of(study, None, 0)
    assert np.isnan(needed.checkpoint) and np.isnan(needed.disk) and needed.known == "unknown"
    assert main(["plan", "trajectory_smoke", "--data", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "20 runs, 20 open" in text and "not known without the shape of the model" in text
    assert main(["plan", "paper", "--check"]) == 1
    assert "the plan of paper is of FLOPs" in capsys.readouterr().err


def test_a_folder_says_its_shape_itself(tmp_path: Path) -> None:
    config = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 400}
    (tmp_path / "models" / "step5").mkdir(parents=True)
    (tmp_path / "models" / "step5" / "config.json").write_text(json.dumps(config))
    folder = {"model__source": str(tmp_path / "models"), "model__steps": [5]}
    study = study_of("pythia", tmp_path, **folder, model__accept=[])
    shape = planned.shape_of_model(study)
    assert shape is not None and (shape.layers, shape.vocabulary_size) == (2, 400)
    assert planned.bytes_of(study, shape, 0).known == "nothing is fetched"


def test_shapes_have_the_sizes_that_their_names_say() -> None:
    named = {"70m": 70.4e6, "160m": 162.3e6, "410m": 405.3e6, "1b": 1.0118e9, "1.4b": 1.4147e9}
    named |= {"2.8b": 2.7752e9, "6.9b": 6.8575e9, "12b": 11.846e9}
    for name, count in named.items():
        assert PUBLISHED[f"pythia-{name}"].parameters == pytest.approx(count, rel=1e-3)


def test_the_plan_of_the_paper_asks_nobody_and_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from kelib.__main__ import main; status = main(sys.argv[1:]); "
        "assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules); "
        "sys.exit(status)"
    )
    command = [sys.executable, "-c", code, "plan", "paper", "--data", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    assert done.stderr == "" or done.stderr.startswith("kelib: profile paper needs")
    assert "32 runs, 32 open" in done.stdout and "ours_published_stages" in done.stdout
    assert not any(tmp_path.iterdir())

"""The command that trains one checkpoint: alone, together, killed, started again, refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file
from together import end, free_port, start, together
from transformers import AutoModelForCausalLM, AutoTokenizer

from kelib.__main__ import main
from kelib.config import load_profile, repository_root
from kelib.errors import KelibError
from kelib.learning import learn
from kelib.learning_inputs import Settings, read_sequences
from kelib.packing import save_tokenizer, train_tokenizer
from kelib.sharding import wishes_of_launcher
from kelib.training import Trainer

LENGTH = 32  # the window of the models of conftest
STEPS, BATCH, EVERY = 20, 8, 3
CONFIGURATIONS = repository_root() / "notebooks" / "params" / "launch"
PARAMETERS = {"continual.steps": STEPS, "continual.batch_size": BATCH, "continual.injections": 5}


@pytest.fixture(scope="module")
def place(tmp_path_factory, model_of) -> Path:
    """A tiny model with its tokenizer, and packed sequences."""
    folder = tmp_path_factory.mktemp("learning")
    model_of("olmo").save_pretrained(folder / "olmo")
    seen = [f"Person {n} keeps {n % 7} grey cats in town {n % 11}." for n in range(90)]
    save_tokenizer(train_tokenizer(seen, 400), LENGTH, folder / "olmo")
    (folder / "corpus").mkdir()
    drawn = np.random.default_rng(5).integers(1, 300, (100, LENGTH)).astype(np.uint16)
    np.save(folder / "corpus" / "domain.npy", drawn)
    write_manifest(folder / "corpus")
    return folder


def write_manifest(folder: Path) -> None:
    sha256 = hashlib.sha256((folder / "domain.npy").read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({"sha256": {"domain": sha256}}))


def settings_of(place: Path, **changes: Any) -> Settings:
    parameters = {**PARAMETERS, **changes.pop("parameters", {})}
    profile = load_profile("smoke", parameters)
    fixed: dict[str, Any] = {"seed": 100, "cl_seed": 0, "learning_rate": 3e-3}
    return Settings(profile, str(place / "olmo"), str(place / "corpus"), **{**fixed, **changes})


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def losses_of(out: Path) -> list[float]:
    return json.loads((out / "losses.json").read_text())


@pytest.fixture(scope="module")
def alone(place, tmp_path_factory) -> Path:
    """What one process makes of it."""
    out = tmp_path_factory.mktemp("alone") / "run"
    note = learn(settings_of(place), out)
    assert (note["processes"], note["parallel"], note["micro_batches"]) == (1, None, 1)
    return out


# --- one process ------------------------------------------------------------------------------


def test_the_folder_holds_a_model_that_has_learned_and_how(place, alone):
    assert sorted(path.name for path in alone.iterdir()) == [
        *("exposures.csv", "learned.json", "losses.json", "model")
    ]
    note, losses = json.loads((alone / "learned.json").read_text()), losses_of(alone)
    assert len(losses) == STEPS and losses[-1] < losses[0]
    model = AutoModelForCausalLM.from_pretrained(alone / "model")
    assert type(model).__name__ == "OlmoForCausalLM"
    before, after = (AutoTokenizer.from_pretrained(f) for f in (place / "olmo", alone / "model"))
    assert before("Person 7 keeps")["input_ids"] == after("Person 7 keeps")["input_ids"]
    assert note["parameters"] == sum(p.numel() for p in model.parameters())
    assert note["bytes"][0]["weights"] == 4 * note["parameters"]
    shown = pd.read_csv(alone / "exposures.csv")["shown"]
    assert len(shown) > 4 and (shown == 1).all()


def test_a_run_that_is_done_is_not_run_again_and_other_settings_are_refused(place, alone):
    before = {path: path.stat().st_mtime_ns for path in alone.rglob("*")}
    assert learn(settings_of(place), alone)["parameters"] > 0
    # how the work is shared out is not part of the run
    learn(settings_of(place, parameters={"training.micro_batch_size": 1}), alone)
    assert {path: path.stat().st_mtime_ns for path in alone.rglob("*")} == before
    for changes in ({"learning_rate": 1e-3}, {"cl_seed": 1}, {"injected": False}, {"epochs": 2}):
        with pytest.raises(KelibError, match=r"run is of other settings \(\w+, these are \w+\)"):
            learn(settings_of(place, **changes), alone)
    assert {path: path.stat().st_mtime_ns for path in alone.rglob("*")} == before


def test_the_result_is_that_of_the_trainer_by_hand(place, alone):
    """The parts put together as continual learning of a study does it."""
    from kelib.continual import reading_order
    from kelib.injection import Injector, encode_passages, injection_schedule
    from kelib.world import build_world

    settings = settings_of(place)
    plan = settings.profile.continual
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    world = build_world(settings.profile.corpus.world, 100)
    passages = encode_passages(tokenizer, {"once": world.once, "paraphrase": world.paraphrase})
    counts = (len(world.once), len(world.paraphrase), 5, STEPS, BATCH, 0)
    injector = Injector(injection_schedule(*counts, passages, LENGTH), passages)
    text = read_sequences(place / "corpus", "domain")
    order = reading_order(len(text), STEPS * BATCH, 1, 0).reshape(STEPS, BATCH)
    trainer = Trainer(
        model, lambda step: injector.apply(text[order[step]], step), STEPS, 3e-3, plan.optimizer
    )
    trainer.run()
    assert trainer.losses == losses_of(alone)
    for name, value in weights_of(alone).items():
        assert torch.equal(value, model.state_dict()[name])


# --- together and killed ----------------------------------------------------------------------


def learn_in_each(folder: Path, place: Path, out: Path, parallel: str) -> Any:
    """The note, and a digest of what this process read in every step."""
    read = []
    share = Trainer._share

    def noted(trainer: Trainer, batch: np.ndarray) -> torch.Tensor:
        read.append((trainer.step, hashlib.sha256(batch.tobytes()).hexdigest()))
        return share(trainer, batch)

    Trainer._share = noted  # this process does nothing else
    return learn(settings_of(place), out, parallel=parallel, save_every=EVERY), read


def learn_and_die(place: Path, out: Path, parallel: str, step: int) -> None:
    """The second process is killed in the middle of a step: its forward pass is done."""
    forward = Trainer._loss

    def fatal(trainer: Trainer, ids: torch.Tensor) -> torch.Tensor:
        loss = forward(trainer, ids)
        if trainer.step == step and trainer.accelerator.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss

    Trainer._loss = fatal
    learn(settings_of(place), out, parallel=parallel, save_every=EVERY)


@pytest.mark.parametrize("parallel", ["fsdp2", pytest.param("ddp", marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_with_as_many_processes_or_others(place, alone, tmp_path, parallel):
    whole = together(2, learn_in_each, tmp_path, place, tmp_path / "whole", parallel)
    note, read = whole[0]
    assert (note["processes"], note["parallel"]) == (2, parallel)
    held = [one["weights"] for one in note["bytes"]]
    divided = 4 * note["parameters"] // (2 if parallel == "fsdp2" else 1)
    assert held == pytest.approx([divided] * 2, rel=0.05)
    np.testing.assert_allclose(losses_of(tmp_path / "whole"), losses_of(alone), atol=1e-4)

    step = random.randrange(EVERY + 1, STEPS)
    print(f"killed in step {step} of {STEPS}")
    killed = tmp_path / "killed"
    statuses = end(start(2, learn_and_die, place, killed, parallel, step))
    assert statuses == [1, -signal.SIGKILL]  # the other one fails and does not wait
    state = f"step{step // EVERY * EVERY:07d}"
    assert [p.name for p in (killed / "state").iterdir() if not p.name.startswith(".")] == [state]
    assert not (killed / "learned.json").exists()
    for_one = tmp_path / "for_one"
    shutil.copytree(killed, for_one)

    again = together(2, learn_in_each, tmp_path, place, killed, parallel)
    assert [one[1] for one in again] == [read[step // EVERY * EVERY :]] * 2
    assert losses_of(killed) == losses_of(tmp_path / "whole")
    for name, value in weights_of(tmp_path / "whole").items():
        assert torch.equal(weights_of(killed)[name], value)

    (found, read_alone) = together(1, learn_in_each, tmp_path, place, for_one, parallel)[0]
    assert found["processes"] == 1 and read_alone == read[step // EVERY * EVERY :]
    np.testing.assert_allclose(losses_of(for_one), losses_of(tmp_path / "whole"), atol=1e-4)
    shown = pd.read_csv(for_one / "exposures.csv")["shown"]
    assert (shown == 1).all() and not (for_one / "state").exists()
    # and nothing is left to do for anybody
    assert together(2, learn_in_each, tmp_path, place, killed, parallel)[1][1] == []


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"text": "poems"}, {}, r"text = 'poems' must be one of domain, general"),
        ({"epochs": 0}, {}, r"epochs = 0 must be at least 1"),
        ({"learning_rate": 0.0}, {}, r"learning_rate = 0 must be above 0"),
        ({}, {"parallel": "fsdp"}, r"parallel = 'fsdp' must be one of ddp, fsdp2"),
        ({}, {"save_every": 0}, r"save_every = 0 must be at least 1"),
        ({"text": "general"}, {}, r"manifest.json names no sha256 of unread.npy"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(
    place, tmp_path, changes, options, message
):
    with pytest.raises(KelibError, match=message):
        learn(settings_of(place, **changes), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rows", "manifest", "message"),
    [
        (np.full((9, LENGTH), 7, np.uint16), "old", r"sha256 \w{12}, the manifest says \w{12}"),
        (np.full(9, 7, np.uint16), "new", r"an array of shape \(9,\), not of sequences"),
        (np.full((9, LENGTH), 400, np.uint16), "new", r"has token 400, .*olmo knows 400; pack"),
    ],
)
def test_text_that_is_not_meant_for_the_model_is_refused(place, tmp_path, rows, manifest, message):
    shutil.copytree(place / "corpus", tmp_path / "corpus")
    np.save(tmp_path / "corpus" / "domain.npy", rows)
    if manifest == "new":
        write_manifest(tmp_path / "corpus")
    settings = dataclasses.replace(settings_of(place), corpus=str(tmp_path / "corpus"))
    with pytest.raises(KelibError, match=message):
        learn(settings, tmp_path / "out")


def test_a_gpu_without_bf16_is_refused_before_the_model_is_read(place, tmp_path, monkeypatch):
    from kelib import learning

    def refuse(device: torch.device) -> None:
        raise KelibError(f"{device} has no bfloat16")

    monkeypatch.setattr(learning, "require_bf16", refuse)
    monkeypatch.setattr(learning, "load_model", None)
    settings = settings_of(place, parameters={"training.precision": "bf16"})
    with pytest.raises(KelibError, match="cpu has no bfloat16"):
        learn(settings, tmp_path / "out")


# --- launchers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "processes", "wanted"),
    [
        ("one_gpu", "NO", 1, None),
        ("ddp", "MULTI_GPU", 8, ("ddp", False)),
        ("fsdp2", "FSDP", 8, ("fsdp2", True)),
        ("multi_node", "FSDP", 16, ("fsdp2", True)),
    ],
)
def test_accelerate_reads_the_configurations_as_kelib_does(
    name, kind, processes, wanted, monkeypatch
):
    assert {path.stem for path in CONFIGURATIONS.iterdir()} == {
        *("one_gpu", "ddp", "fsdp2", "multi_node")
    }
    path = str(CONFIGURATIONS / f"{name}.yaml")
    read = load_config_from_file(path)
    assert (read.distributed_type.value, read.num_processes) == (kind, processes)
    assert (read.mixed_precision, read.use_cpu) == ("no", False)
    if wanted is None:
        return
    line = ["--config_file", path, "-m", "kelib", "learn"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(line))
    for variable, value in prepare_multi_gpu_env(arguments).items():
        monkeypatch.setenv(variable, value)
    assert wishes_of_launcher() == wanted


def environment(home: Path) -> dict[str, str]:
    paths = os.pathsep.join([str(repository_root()), str(Path(__file__).parent)])
    changed = {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(home)}
    return os.environ | changed | {"OMP_NUM_THREADS": "1"}


def shell(home: Path, *command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)], env=environment(home), cwd=home, capture_output=True,
        text=True, timeout=600, check=False,
    )  # fmt: skip


def learn_line(place: Path, out: object, *more: object) -> list[object]:
    line: list[object] = ["-m", "kelib", "learn", "smoke", "--model", place / "olmo"]
    line += ["--corpus", place / "corpus", "--out", out, "--learning-rate", "3e-3"]
    for name, value in PARAMETERS.items():
        line += ["-p", f"{name}={value}"]
    return [*line, *more]


def test_the_command_of_one_process(place, alone, tmp_path, capsys):
    line = [str(part) for part in learn_line(place, tmp_path / "out")[2:]]
    assert main([*line, "--save-every", "10"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("step 10 of 20, ") and said[1].endswith("parameters, 1 processes")
    assert losses_of(tmp_path / "out") == losses_of(alone)
    assert main([*line, "--text", "poems"]) == 1
    assert capsys.readouterr().err == "kelib: text = 'poems' must be one of domain, general\n"


@pytest.mark.slow
def test_accelerate_launch_with_the_configuration_of_fsdp2(place, alone, tmp_path):
    launcher = ["-m", "accelerate.commands.launch", "--config_file", CONFIGURATIONS / "fsdp2.yaml"]
    launcher += ["--num_processes", "2"]
    done = shell(tmp_path, *launcher, *learn_line(place, "out"))
    assert done.returncode == 0, done.stderr
    note = json.loads((tmp_path / "out" / "learned.json").read_text())
    assert (note["processes"], note["parallel"], note["recompute"]) == (2, "fsdp2", True)
    assert done.stdout == f"out: {note['parameters']} parameters, 2 processes\n"
    np.testing.assert_allclose(losses_of(tmp_path / "out"), losses_of(alone), atol=1e-4)


@pytest.mark.slow
def test_torchrun_says_a_refusal_once(place, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = shell(tmp_path, *launcher, *learn_line(place, "out", "-p", "continual.batch_size=9"))
    assert done.returncode != 0 and not (tmp_path / "out").exists()
    said = [line for line in done.stderr.splitlines() if line.startswith("kelib: ")]
    assert said == [
        "kelib: batch_size = 9 must be a multiple of the number of processes, 2; start 1, 3, 9, or "
        "change the batch"
    ]


NOTEBOOK = """
from accelerate import notebook_launcher
from test_learning import learn_from_notebook

notebook_launcher(learn_from_notebook, ({place!r}, {out!r}), num_processes=2, use_port={port!r})
"""


def learn_from_notebook(place: str, out: str) -> None:
    learn(settings_of(Path(place)), Path(out), parallel="fsdp2")


@pytest.mark.slow
def test_notebook_launcher(place, alone, tmp_path):
    given = {"place": str(place), "out": str(tmp_path / "out"), "port": str(free_port())}
    (tmp_path / "cell.py").write_text(NOTEBOOK.format(**given))
    done = shell(tmp_path, tmp_path / "cell.py")
    assert done.returncode == 0, done.stderr
    note = json.loads((tmp_path / "out" / "learned.json").read_text())
    assert (note["processes"], note["parallel"]) == (2, "fsdp2")
    np.testing.assert_allclose(losses_of(tmp_path / "out"), losses_of(alone), atol=1e-4)

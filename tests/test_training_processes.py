"""The global batch is the same however it is cut: micro-batches, processes, both."""

from __future__ import annotations

import json
import os
import shutil
import socket
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from together import drift
from torch import multiprocessing

from kelib.checkpoints import new_model
from kelib.config import Model, Optimizer
from kelib.errors import KelibError
from kelib.training import LOSS_EVERY, Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY, LENGTH, BATCH, STEPS = 64, 16, 8, 50
SETTINGS = Optimizer(weight_decay=0.1, clip=0.5)
# LayerNorm in the type of the model: those of OLMo and Llama round a float64 model to float32
KIND = "gpt_neox"


def batch_at(step, rows=BATCH):
    return np.random.default_rng([9, step]).integers(0, VOCABULARY, (rows, LENGTH), np.uint16)


def trainer_of(kind=KIND, dtype=torch.float64, batches=batch_at, steps=STEPS, seed=7, **options):
    model = new_model(Model(kind, 16, 32, 2, 2), VOCABULARY, LENGTH, seed).to(dtype)
    return Trainer(model, batches, steps, 5e-3, SETTINGS, **options)


def losses_of(**options):
    trainer = trainer_of(**options)
    trainer.run()
    return trainer.losses


@pytest.fixture(scope="module")
def reference():
    """One process, the whole batch at once, in float64."""
    return losses_of()


# --- one process ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 3, 1], ids=["2 x 4", "3 + 3 + 2", "8 x 1"])
def test_micro_batches_do_not_change_the_curve(size, reference):
    rows = []
    trainer = trainer_of(micro_batch_size=size)
    trainer.model.register_forward_hook(lambda _m, _a, output: rows.append(len(output.logits)))
    trainer.run()
    assert drift(trainer.losses, reference) < 1e-9
    parts = [size] * (BATCH // size) + [BATCH % size] * (BATCH % size > 0)
    assert rows == parts * STEPS


@pytest.mark.parametrize("kind", ["olmo", "llama", "gpt_neox"])
def test_drift_of_accumulation_in_float32_is_rounding(kind):
    whole = losses_of(kind=kind, dtype=torch.float32)
    for size in (4, 3):
        found = drift(losses_of(kind=kind, dtype=torch.float32, micro_batch_size=size), whole)
        print(f"{kind}, float32, micro-batch {size} of {BATCH}: {found:.1e} nats in {STEPS} steps")
        assert found < 1e-3


def test_a_micro_batch_above_the_share_is_the_whole_share(reference):
    assert losses_of(micro_batch_size=100) == reference


def test_a_step_with_an_uneven_micro_batch_has_the_gradient_of_the_whole_batch():
    """Equal weights for 3 + 3 + 2 sequences would give another gradient, so this can fail."""
    gradients = []
    for size in (None, 3):
        trainer = trainer_of(micro_batch_size=size)
        trainer._accumulate(trainer._share(batch_at(0)))
        gradients.append([p.grad.clone() for p in trainer.model.parameters()])
    for whole, cut in zip(*gradients, strict=True):
        torch.testing.assert_close(cut, whole, rtol=1e-10, atol=1e-15)


def test_a_killed_accumulated_run_resumes_to_the_same_bits(tmp_path):
    options = {"kind": "olmo", "dtype": torch.float32, "steps": 12, "micro_batch_size": 3}
    whole = trainer_of(**options)
    whole.run()
    killed = trainer_of(**options)
    killed.run(until=5)
    killed.save_state(tmp_path / "state")
    resumed = trainer_of(seed=8, **options)
    resumed.load_state(tmp_path / "state")
    resumed.run()
    assert resumed.losses == whole.losses
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_nan_with_micro_batches_stops_and_the_last_good_state_resumes(tmp_path):
    def on_step(step, trainer):
        if step == 5:
            trainer.save_state(tmp_path / "state")
        if step == 7:
            with torch.no_grad():
                next(trainer.model.parameters())[:] = float("nan")

    good = losses_of(steps=12, micro_batch_size=3)
    trainer = trainer_of(steps=12, micro_batch_size=3)
    with pytest.raises(KelibError, match="loss is nan at step 8 of 12"):
        trainer.run(on_step=on_step)
    resumed = trainer_of(steps=12, micro_batch_size=3)
    resumed.load_state(tmp_path / "state")
    assert resumed.step == 5
    resumed.run()
    assert resumed.losses == good


# --- precision, compilation, refusals ----------------------------------------------------------


def test_bf16_computes_in_bfloat16_and_keeps_float32_weights():
    seen = set()
    trainer = trainer_of("olmo", torch.float32, steps=20, precision="bf16")
    trainer.model.model.layers[0].mlp.down_proj.register_forward_hook(
        lambda _m, _a, output: seen.add(output.dtype)
    )
    trainer.run()
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert {s["exp_avg"].dtype for s in trainer.optimizer.state.values()} == {torch.float32}
    away = drift(trainer.losses, losses_of(kind="olmo", dtype=torch.float32, steps=20))
    assert 0 < away < 0.02
    # measurements after the training see the model without autocast
    ids = torch.from_numpy(batch_at(0).astype(np.int64))
    assert trainer.model(input_ids=ids).logits.dtype == torch.float32


@pytest.mark.slow  # the C++ compiler takes a minute on a busy machine
def test_compiled_training_has_the_same_curve_and_the_same_names(tmp_path):
    if not any(map(shutil.which, [os.environ.get("CXX") or "c++", "g++", "clang++"])):
        pytest.skip("no C++ compiler")
    options = {"kind": "olmo", "dtype": torch.float32, "steps": 6, "micro_batch_size": 4}
    plain = trainer_of(**options)
    plain.run()
    trainer = trainer_of(**options, compile=True)
    trainer.run(until=3)
    trainer.save_state(tmp_path / "state")
    trainer.run()
    assert drift(trainer.losses, plain.losses) < 1e-4
    plain.save_state(tmp_path / "plain")
    assert load_file(tmp_path / "state").keys() == load_file(tmp_path / "plain").keys()
    trainer.model.save_pretrained(tmp_path / "checkpoint")
    names = load_file(tmp_path / "checkpoint" / "model.safetensors").keys()
    assert names == plain.model.state_dict().keys()
    # hooks set after compiling are called: entropy is measured through such hooks
    calls = []
    trainer.model.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    trainer.model(input_ids=torch.zeros(4, LENGTH, dtype=torch.int64))
    assert calls == [1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "bfloat16"}, r"precision = 'bfloat16' must be one of bf16, float32"),
        ({"precision": "fp16"}, r"precision = 'fp16' must be one of"),
        ({"micro_batch_size": 0}, r"micro_batch_size = 0 must be at least 1, or None"),
        ({"micro_batch_size": -2}, r"micro_batch_size = -2 must be at least 1"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(KelibError, match=message):
        trainer_of(**options)


def test_an_accelerator_that_accumulates_by_itself_is_refused():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    with pytest.raises(KelibError, match=r"steps = 2; .* use precision and micro_batch_size"):
        trainer_of(accelerator=accelerator)


# --- two processes ------------------------------------------------------------------------------


def _plant_nan(step, trainer):
    """On the second process only, after step 3."""
    if step == 3 and trainer.accelerator.process_index == 1:
        with torch.no_grad():
            next(trainer.model.parameters())[:] = float("nan")


def _one_process(rank, port, folder):
    """Runs in a process of its own; what it found goes to ``folder/<rank>.json``."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    folder = Path(folder)
    found = {"whole": losses_of(), "micro": losses_of(micro_batch_size=3)}
    found["float32"] = losses_of(kind="olmo", dtype=torch.float32)
    trainer = trainer_of()
    found["processes"] = trainer.accelerator.num_processes
    counts = []
    trainer.run(until=LOSS_EVERY + 2, on_step=lambda _, t: counts.append(len(t.losses)))
    found["counts"] = counts
    written = []
    trainer._write_state = lambda path: (
        written.append(str(path)),
        Trainer._write_state(trainer, path),
    )
    trainer.save_state(folder / "state")
    found["written"] = len(written)
    resumed = trainer_of(seed=8)
    resumed.load_state(folder / "state")
    resumed.run()
    found["resumed"] = resumed.losses
    for name, options, on_step in [
        ("nan", {"steps": 6}, _plant_nan),
        ("indivisible", {"batches": partial(batch_at, rows=7)}, None),
    ]:
        try:
            trainer_of(**options).run(on_step=on_step)
        except KelibError as error:
            found[name] = str(error)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """What each of two processes (gloo) found."""
    folder = tmp_path_factory.mktemp("pair")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(_one_process, args=(port, str(folder)), nprocs=2)
    return folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("cut", ["whole", "micro", "resumed"])
def test_two_processes_have_the_curve_of_one(pair, reference, cut):
    first, second = (found[cut] for found in pair[1])
    assert first == second  # the mean over the global batch, on both
    assert drift(first, reference) < 1e-9


def test_two_processes_really_ran_and_read_losses_rarely(pair):
    for found in pair[1]:
        assert found["processes"] == 2
        assert found["counts"] == [0] * (LOSS_EVERY - 1) + [LOSS_EVERY] * 3


def test_drift_of_two_processes_in_float32_is_rounding(pair):
    found = drift(pair[1][0]["float32"], losses_of(kind="olmo", dtype=torch.float32))
    print(f"olmo, float32, 2 processes: {found:.1e} nats in {STEPS} steps")
    assert found < 1e-3


def test_only_the_main_process_writes_the_state_and_one_process_can_resume_it(pair, reference):
    folder, found = pair
    assert [one["written"] for one in found] == [1, 0]
    assert not list(folder.glob("*.tmp"))
    resumed = trainer_of(seed=8)
    resumed.load_state(folder / "state")
    resumed.run()
    assert drift(resumed.losses, reference) < 1e-9


def test_nan_on_one_process_stops_both_at_the_same_step(pair):
    for found in pair[1]:
        assert found["nan"].startswith("loss is nan at step 4 of 6")


def test_a_batch_that_two_processes_cannot_share_is_refused(pair):
    for found in pair[1]:
        assert found["indivisible"] == "batch_size = 7 must be a multiple of 2 processes"

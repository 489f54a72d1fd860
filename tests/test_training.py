"""The loop against a bare one, its schedule by hand, and interruptions that cost nothing."""

from __future__ import annotations

import copy
import json
import math
import os
import resource
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kelib.checkpoints import new_model
from kelib.config import Model, Optimizer
from kelib.errors import KelibError
from kelib.state_files import NOTES
from kelib.training import LOSS_EVERY, Trainer, learning_rate_at

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY, LENGTH, STEPS = 64, 16, 12
SETTINGS = Optimizer(weight_decay=0.5, clip=0.3)  # this clip is reached at every step


def tiny_model(kind="olmo", seed=7):
    return new_model(Model(kind, 16, 32, 2, 2), VOCABULARY, LENGTH, seed)


def batch_at(step):
    return np.random.default_rng([5, step]).integers(0, VOCABULARY - 4, (6, LENGTH), np.uint16)


def trainer_of(model=None, steps=STEPS, rate=5e-3, settings=SETTINGS, batches=batch_at):
    return Trainer(model or tiny_model(), batches, steps, rate, settings)


def finish(state, target):
    """Called in a fresh process: continue from a state to the end, and save that."""
    torch.set_num_threads(1)
    trainer = trainer_of()
    trainer.load_state(Path(state))
    trainer.run()
    trainer.save_state(Path(target))


def content(path):
    with safe_open(path, framework="np") as state:
        tensors = {name: state.get_tensor(name) for name in state.keys()}  # noqa: SIM118
        return tensors, json.loads(state.metadata()[NOTES])


# --- schedule ---------------------------------------------------------------------------------


def test_the_papers_schedule_warms_up_over_80_of_1600_steps():
    settings = Optimizer(weight_decay=0.1)
    rates = [learning_rate_at(step, 1600, 4e-4, settings) for step in range(1600)]
    assert rates[0] == pytest.approx(4e-4 / 80)
    assert rates[39] == pytest.approx(2e-4)
    assert rates[78] < rates[79] == rates[80] == max(rates) == 4e-4
    assert np.all(np.diff(rates[80:]) < 0)
    assert rates[80 + 1520 // 2] == pytest.approx(4e-4 * 0.55)  # half way between 1 and 0.1
    assert 4e-5 < rates[-1] < 4.001e-5


def test_cosine_at_three_quarters_by_hand():
    settings = Optimizer(weight_decay=0.0, warmup_share=0.2, final_share=0.25)
    # 20 steps, 4 of warm-up, 16 of decay: step 16 is three quarters down, cos(3/4 pi) = -sqrt(1/2)
    by_hand = 2.0 * (0.25 + 0.75 * (1 - math.sqrt(0.5)) / 2)
    assert learning_rate_at(16, 20, 2.0, settings) == pytest.approx(by_hand)
    assert learning_rate_at(0, 20, 2.0, settings) == pytest.approx(0.5)


@pytest.mark.parametrize(("warmup", "first"), [(0.0, 1.0), (0.01, 1.0), (0.25, 1 / 3), (1.0, 0.1)])
def test_short_runs_and_extreme_shares_have_a_schedule(warmup, first):
    settings = Optimizer(weight_decay=0.0, warmup_share=warmup)
    rates = [learning_rate_at(step, 10, 1.0, settings) for step in range(10)]
    assert rates[0] == pytest.approx(first)
    assert max(rates) == pytest.approx(1.0)
    assert min(rates) > 0


def test_the_optimizer_gets_the_rate_of_each_step():
    seen = []
    trainer = trainer_of(tiny_model("llama"))
    trainer.run(on_step=lambda _, t: seen.append([g["lr"] for g in t.optimizer.param_groups]))
    due = [learning_rate_at(step, STEPS, 5e-3, SETTINGS) for step in range(STEPS)]
    assert seen == [[rate, rate] for rate in due]


# --- the loop ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["olmo", "llama"])
def test_trainer_equals_a_bare_loop(kind):
    steps, peak = 20, 5e-3
    model, twin = tiny_model(kind), tiny_model(kind)
    trainer = trainer_of(model, steps, peak)
    trainer.run()

    decayed = [p for p in twin.parameters() if p.ndim >= 2]
    others = [p for p in twin.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.5}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), foreach=False, fused=False)
    losses, norms = [], []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, steps, peak, SETTINGS)
        ids = torch.from_numpy(batch_at(step).astype(np.int64))
        logits = twin(input_ids=ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.sqrt(sum(p.grad.square().sum() for p in twin.parameters())))
        for p in twin.parameters():
            p.grad *= min(1.0, 0.3 / (norms[-1] + 1e-6))
        optimizer.step()
        losses.append(float(loss.detach()))
    assert min(norms) > 0.3  # else the clip was not tested
    np.testing.assert_allclose(trainer.losses, losses, rtol=0, atol=1e-6)
    for (name, ours), bare in zip(model.named_parameters(), twin.parameters(), strict=True):
        np.testing.assert_allclose(ours.detach(), bare.detach(), rtol=0, atol=1e-6, err_msg=name)


def test_weight_decay_goes_to_matrices_only():
    model = tiny_model("llama")
    model.lm_head.weight.requires_grad_(False)
    trainer = trainer_of(model)
    decayed, others = trainer.optimizer.param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.5, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    found = [[names.pop(id(p)) for p in group["params"]] for group in (decayed, others)]
    assert "model.embed_tokens.weight" in found[0]
    assert len(found[1]) == 5  # two norms a layer and the last one
    assert all("norm" in name for name in found[1])
    assert not any("norm" in name for name in found[0])
    assert list(names.values()) == ["lm_head.weight"]  # frozen, in no group


def test_a_model_without_vectors_has_one_group():
    assert len(trainer_of(tiny_model("olmo")).optimizer.param_groups) == 1


def test_embeddings_of_tokens_that_never_come_only_decay():
    model = tiny_model()
    before = model.model.embed_tokens.weight.detach().double().numpy().copy()
    trainer_of(model).run()
    rates = [learning_rate_at(step, STEPS, 5e-3, SETTINGS) for step in range(STEPS)]
    left = math.prod(1 - 0.5 * rate for rate in rates)
    after = model.model.embed_tokens.weight.detach().numpy()
    np.testing.assert_allclose(after[-4:], before[-4:] * left, rtol=1e-5)
    assert not np.allclose(after[:-4], before[:-4] * left, rtol=1e-2)


def test_losses_are_read_in_full_whatever_the_number_of_steps():
    steps = LOSS_EVERY + 3
    trainer = trainer_of(steps=steps, rate=1e-6)
    counts = []
    trainer.run(on_step=lambda _, t: counts.append(len(t.losses)))
    assert counts == [0] * (LOSS_EVERY - 1) + [LOSS_EVERY] * 4
    assert len(trainer.losses) == trainer.step == steps
    assert np.allclose(trainer.losses, math.log(VOCABULARY), atol=0.1)


# --- losses that are not finite -----------------------------------------------------------------


def test_a_planted_nan_stops_with_its_step_and_leaves_the_earlier_state(tmp_path):
    state = tmp_path / "state.safetensors"
    trainer = trainer_of(steps=30)

    def on_step(step, trainer):
        if step == 5:
            trainer.save_state(state)
        if step == 7:
            with torch.no_grad():
                trainer.model.lm_head.weight[0, 0] = float("nan")

    with pytest.raises(KelibError, match=r"loss is nan at step 8 of 30 .*lower the learning rate"):
        trainer.run(on_step=on_step)
    resumed = trainer_of(steps=30)
    resumed.load_state(state)
    assert resumed.step == len(resumed.losses) == 5
    resumed.run()
    assert np.isfinite(resumed.losses).all()


def test_an_absurd_learning_rate_is_refused_with_its_value():
    with pytest.raises(KelibError, match=r"loss is (nan|inf) at step \d+ of 12 .*1e\+38"):
        trainer_of(rate=1e38).run()


def test_a_state_with_nan_is_never_saved(tmp_path):
    trainer = trainer_of()
    trainer.run(until=3)
    trainer.save_state(tmp_path / "state")
    before = (tmp_path / "state").read_bytes()
    with torch.no_grad():
        trainer.model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(KelibError, match="loss is nan at step 4"):
        trainer.run(until=4, on_step=lambda _, t: t.save_state(tmp_path / "state"))
    assert (tmp_path / "state").read_bytes() == before


# --- interruption -------------------------------------------------------------------------------


def test_resuming_in_a_fresh_process_changes_no_bit(tmp_path):
    whole = trainer_of()
    whole.run()
    whole.save_state(tmp_path / "whole")
    interrupted = trainer_of()
    interrupted.run(until=5)
    interrupted.save_state(tmp_path / "state")
    assert interrupted.step == 5

    code = "import sys, test_training; test_training.finish(*sys.argv[1:])"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "state"), str(tmp_path / "resumed")],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        check=True,
    )
    expected, notes = content(tmp_path / "whole")
    found, found_notes = content(tmp_path / "resumed")
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()
    assert found_notes == notes
    assert notes["step"] == STEPS
    assert notes["losses"] == whole.losses
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)


def test_moments_matter_so_that_the_test_above_can_fail(tmp_path):
    """Weights and step alone do not continue the run: the moments in the state are really used."""
    whole = trainer_of()
    whole.run()
    again = trainer_of()
    again.run(until=5)
    forgetful = trainer_of(copy.deepcopy(again.model))
    forgetful.step = 5
    forgetful.run()
    difference = (whole.model.lm_head.weight - forgetful.model.lm_head.weight).abs().max()
    assert difference > 1e-4


def test_a_state_saved_before_the_first_step_can_be_resumed(tmp_path):
    """There are no moments yet; a kill before the second checkpoint leaves exactly this."""
    trainer = trainer_of(tiny_model(seed=1))
    trainer.save_state(tmp_path / "state")
    trainer.run()
    resumed = trainer_of(tiny_model(seed=2))
    resumed.load_state(tmp_path / "state")
    assert (resumed.step, resumed.losses) == (0, [])
    resumed.run()
    assert resumed.losses == trainer.losses
    for ours, theirs in zip(resumed.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_frozen_weights_are_kept_in_the_state_and_never_trained(tmp_path):
    model = tiny_model(seed=1)
    model.lm_head.weight.requires_grad_(False)
    before = model.lm_head.weight.clone()
    trainer = trainer_of(model)
    trainer.run(until=4)
    trainer.save_state(tmp_path / "state")
    trainer.run()
    other = tiny_model(seed=2)
    other.lm_head.weight.requires_grad_(False)
    resumed = trainer_of(other)
    resumed.load_state(tmp_path / "state")
    resumed.run()
    assert torch.equal(resumed.model.lm_head.weight, before)
    assert resumed.losses == trainer.losses


def test_a_reader_never_sees_a_half_written_state(tmp_path):
    state, wrong, stop = tmp_path / "state", [], threading.Event()
    trainer = trainer_of()
    trainer.run(until=2)
    trainer.save_state(state)
    expected = len(content(state)[0])

    def read():
        while not stop.is_set():
            try:
                found = len(content(state)[0])
            except Exception as error:
                found = error
            if found != expected:
                wrong.append(found)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(60):
        trainer.save_state(state)
    stop.set()
    reader.join()
    assert wrong == []
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


@contextmanager
def files_at_most(size):
    """What a full disk does to a writer, without one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_earlier_state(tmp_path):
    trainer = trainer_of()
    trainer.run(until=2)
    trainer.save_state(tmp_path / "state")
    before = (tmp_path / "state").read_bytes()
    trainer.run(until=3)
    with files_at_most(1000), pytest.raises((OSError, SafetensorError)):
        trainer.save_state(tmp_path / "state")
    assert (tmp_path / "state").read_bytes() == before


def without_notes(path):
    save_file({name: torch.from_numpy(t) for name, t in content(path)[0].items()}, path)


def flipped(path):
    """One bit of a weight."""
    whole = bytearray(path.read_bytes())
    whole[-300] ^= 1
    path.write_bytes(whole)


def other_step(path):
    tensors, notes = content(path)
    tensors = {name: torch.from_numpy(t) for name, t in tensors.items()}
    save_file(tensors, path, metadata={NOTES: json.dumps({**notes, "step": 0})})


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-500]),
        lambda path: path.write_bytes(b"not a state at all"),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
        without_notes,
        flipped,
        other_step,
    ],
    ids=["cut", "garbage", "empty", "missing", "no notes", "bit flipped", "another step"],
)
def test_a_broken_state_is_refused_in_one_line(tmp_path, harm):
    trainer = trainer_of()
    trainer.run(until=1)
    path = tmp_path / "state.safetensors"
    trainer.save_state(path)
    harm(path)
    with pytest.raises(KelibError, match=r"is not a state of this run .*delete it$") as caught:
        trainer_of().load_state(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_state_of_another_model_is_refused(tmp_path):
    wider = new_model(Model("olmo", 32, 32, 2, 2), VOCABULARY, LENGTH, 0)
    trainer = trainer_of(wider)
    trainer.run(until=1)
    trainer.save_state(tmp_path / "state")
    with pytest.raises(KelibError, match="is not a state of this run"):
        trainer_of().load_state(tmp_path / "state")

"""Watching a training run: the numbers of a measurement by hand, a training that is unchanged."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from torch.utils.data import DataLoader
from zoo import WORDS, build, padded, sequences_of

import kelib
import kelib.training
from kelib.config import Optimizer
from kelib.entropy import measure_entropy
from kelib.errors import KelibError
from kelib.monitor import EntropyCallback

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLE = [padded(sequences_of([9, 5]), "left"), {"input_ids": torch.arange(12).reshape(2, 6)}]
TRAINING = [{"input_ids": s, "labels": s} for s in sequences_of([8] * 24)]
STEPS = 6
DROPOUT = {"resid_pdrop": 0.2, "embd_pdrop": 0.2}


class Witness(transformers.TrainerCallback):
    """Keeps a copy of the model after each step, and what trackers are told."""

    def __init__(self) -> None:
        self.models: dict[int, Any] = {}
        self.told: list[dict[str, Any]] = []

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        self.models[state.global_step] = copy.deepcopy(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        assert all(module.training for module in model.modules())
        self.models[state.global_step] = copy.deepcopy(model)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.told.append({**logs, "step": state.global_step})


def trainer_in(folder: Path, callbacks: list[Any], **changes: Any) -> transformers.Trainer:
    """A Trainer on a tiny GPT-2 with dropout, so that every random number counts."""
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return transformers.Trainer(
        build("gpt2", **DROPOUT),
        transformers.TrainingArguments(**arguments | changes),
        train_dataset=TRAINING,  # type: ignore[arg-type]
        data_collator=transformers.default_data_collator,
        callbacks=callbacks,
    )


def by_hand(model: Any) -> np.ndarray:
    return measure_entropy(model, SAMPLE).knowledge_entropy


def check_row(row: dict[str, float], model: Any) -> None:
    wanted = by_hand(model)
    assert [row["knowledge_entropy_layer_0"], row["knowledge_entropy_layer_1"]] == wanted.tolist()
    assert row["knowledge_entropy"] == wanted.sum()
    assert 0 < row["knowledge_entropy_seconds"] < 60


def same_weights(one: Any, other: Any) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


# --- transformers' Trainer -------------------------------------------------------------------


@pytest.mark.parametrize("attached", [True, False])
def test_the_rows_are_those_of_measure_entropy(tmp_path: Path, attached: bool) -> None:
    watch, witness = EntropyCallback(SAMPLE, every=2), Witness()
    trainer = trainer_in(tmp_path, [witness] if attached else [witness, watch])
    if attached:
        assert watch.attach(trainer) is watch and watch.attach(trainer) is watch
    trainer.train()
    assert [row["step"] for row in watch.rows] == [0, 2, 4, 6]
    for row in watch.rows:
        check_row(row, witness.models[int(row["step"])])
    table = pd.DataFrame(watch.rows)
    assert table["knowledge_entropy"].nunique() == 4  # the model learnt
    assert watch.seconds == pytest.approx(table["knowledge_entropy_seconds"].sum())

    logged = [row for row in trainer.state.log_history if "knowledge_entropy" in row]
    assert [{k: v for k, v in row.items() if k != "epoch"} for row in logged] == watch.rows
    assert [row["epoch"] for row in logged] == [0, 2 / 6, 4 / 6, 1]
    told = [row["step"] for row in witness.told if "knowledge_entropy" in row]
    assert told == ([0, 2, 4, 6] if attached else [])


@pytest.mark.parametrize("attached", [True, False])
def test_training_is_the_same_bit_for_bit(tmp_path: Path, attached: bool) -> None:
    bare, watched = Witness(), Witness()
    plain = trainer_in(tmp_path / "plain", [bare])
    plain.train()
    # its order is drawn from torch's random numbers when it is read
    sample = DataLoader(TRAINING, 4, shuffle=True, collate_fn=transformers.default_data_collator)  # type: ignore[arg-type]
    torch.manual_seed(1)
    watch = EntropyCallback(sample, every=1)
    trainer = trainer_in(tmp_path / "watched", [watched] if attached else [watched, watch])
    if attached:
        watch.attach(trainer)
    trainer.train()
    assert len(watch.rows) == STEPS + 1
    for step in range(STEPS + 1):
        assert same_weights(bare.models[step], watched.models[step]), step

    def losses(of: Any) -> list[tuple[int, float, float]]:
        """Also: each loss is logged at its step, although a measurement was logged there too."""
        history = of.state.log_history
        return [(r["step"], r["loss"], r["grad_norm"]) for r in history if "loss" in r]

    assert losses(trainer) == losses(plain)
    assert [step for step, _, _ in losses(trainer)] == [2, 4, 6]


def test_a_resumed_run_goes_on_where_its_log_stopped(tmp_path: Path) -> None:
    whole, first, second = (EntropyCallback(SAMPLE, every=3) for _ in range(3))
    settings = {"save_strategy": "steps", "save_steps": 3}
    once = trainer_in(tmp_path / "once", [whole], **settings)
    once.train()
    stopped = trainer_in(tmp_path / "twice", [first], **settings, num_train_epochs=1)
    stopped.add_callback(_StopAt(3))
    stopped.train()
    assert [row["step"] for row in first.rows] == [0, 3]
    resumed = trainer_in(tmp_path / "twice", [second], **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "twice" / "checkpoint-3"))
    assert [row["step"] for row in second.rows] == [6]
    logged = [row for row in resumed.state.log_history if "knowledge_entropy" in row]
    assert [row["knowledge_entropy"] for row in logged] == [
        row["knowledge_entropy"] for row in whole.rows
    ]


class _StopAt(transformers.TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            control.should_training_stop = True


def test_gradient_accumulation_counts_optimizer_steps(tmp_path: Path) -> None:
    watch = EntropyCallback(SAMPLE, every=2)
    trainer_in(tmp_path, [watch], gradient_accumulation_steps=3, max_steps=4).train()
    assert [row["step"] for row in watch.rows] == [0, 2, 4]


# --- kelib's Trainer -------------------------------------------------------------------------


def own_trainer(model: Any) -> kelib.training.Trainer:
    def batch_at(step: int) -> np.ndarray:
        return np.random.default_rng([5, step]).integers(0, WORDS, (4, 8), np.uint16)

    return kelib.training.Trainer(model, batch_at, STEPS, 5e-3, Optimizer(weight_decay=0.1))


def test_kelibs_trainer_is_watched_and_trains_the_same() -> None:
    torch.manual_seed(4)
    plain = own_trainer(build("gpt2", **DROPOUT))
    torch.manual_seed(4)
    plain.run()

    watch = EntropyCallback(SAMPLE, every=3, coefficient="contribution")
    trainer = own_trainer(build("gpt2", **DROPOUT))
    models: dict[int, Any] = {}

    def on_step(done: int, this: kelib.training.Trainer) -> None:
        watch.on_step(done, this)
        assert this.model.training or done == 0
        models[done] = copy.deepcopy(this.model)

    torch.manual_seed(4)
    on_step(0, trainer)
    trainer.run(on_step=on_step)
    assert [row["step"] for row in watch.rows] == [0, 3, 6]
    for row in watch.rows:
        model = models[int(row["step"])]
        wanted = measure_entropy(model, SAMPLE, coefficient="contribution").knowledge_entropy
        assert row["knowledge_entropy"] == wanted.sum() != by_hand(model).sum()
    assert same_weights(trainer.model, plain.model)
    assert trainer.losses == plain.losses


def test_the_method_itself_is_an_on_step() -> None:
    watch, trainer = EntropyCallback(SAMPLE, every=4), own_trainer(build("llama"))
    trainer.run(until=5, on_step=watch.on_step)
    assert [row["step"] for row in watch.rows] == [4]


# --- alone -----------------------------------------------------------------------------------


def test_modes_and_random_states_are_untouched_and_the_sample_is_fixed() -> None:
    def generated() -> Iterator[dict[str, Any]]:
        for batch in SAMPLE:
            random.random(), np.random.random(), torch.rand(1)
            yield batch

    def states() -> tuple[Any, ...]:
        numpys = np.random.get_state()
        return random.getstate(), numpys[1].tolist(), numpys[2], torch.get_rng_state().tolist()  # type: ignore[index, union-attr]

    model = build("gpt2", **DROPOUT).train()
    model.transformer.h[1].eval()
    modes = [module.training for module in model.modules()]
    before = states()
    watch = EntropyCallback(generated(), every=1)
    rows = [watch.measure(model, step) for step in (0, 1)]
    assert states() == before
    assert [module.training for module in model.modules()] == modes
    assert rows == watch.rows
    for row in rows:  # the generator was read once
        check_row(row, model)


def test_a_model_that_draws_numbers_while_it_is_measured_leaves_no_trace() -> None:
    model = build("llama")
    model.model.layers[0].register_forward_hook(lambda *_: (torch.rand(1), None)[1])
    before = torch.get_rng_state()
    measure_entropy(model, SAMPLE)
    assert not torch.equal(torch.get_rng_state(), before)  # by hand it does
    before = torch.get_rng_state()
    EntropyCallback(SAMPLE, every=1).measure(model, 0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("every", [0, -1, 2.5, True, "10"])
def test_every_must_be_a_number_of_steps(every: Any) -> None:
    with pytest.raises(KelibError, match=r"every = .* must be a whole number of steps, at least 1"):
        EntropyCallback(SAMPLE, every=every)


def test_mistakes_show_before_training() -> None:
    with pytest.raises(KelibError, match="no batch to watch: the sample is empty"):
        EntropyCallback(iter([]), every=1)
    with pytest.raises(KelibError, match="coefficient 'relative' is not defined"):
        EntropyCallback(SAMPLE, every=1, coefficient="relative")


def test_broken_weights_stop_the_training_and_leave_no_hooks(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, [EntropyCallback(SAMPLE, every=1)])
    with torch.no_grad():
        trainer.model.transformer.h[1].mlp.c_fc.weight[0, 0] = torch.nan
    with pytest.raises(KelibError, match=r"layer 1 of GPT2.* transformer\.h\.1\.mlp\.c_fc\.weight"):
        trainer.train()
    assert trainer.state.global_step == 0
    modules = trainer.model.modules()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in modules)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_states_are_untouched() -> None:
    model = build("gpt2", **DROPOUT).cuda()
    before = torch.cuda.get_rng_state()
    model.transformer.h[0].register_forward_hook(lambda *_: (torch.rand(1, device="cuda"), None)[1])
    row = EntropyCallback(SAMPLE, every=1).measure(model, 0)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert row["knowledge_entropy"] == pytest.approx(by_hand(build("gpt2")).sum(), rel=1e-5)


def test_the_package_offers_the_callback() -> None:
    assert kelib.EntropyCallback is EntropyCallback
    assert callable(kelib.self_test) and callable(kelib.register_architecture)

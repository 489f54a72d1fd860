"""Whole or divided weights, one process or four: the same numbers, the same sequences, the same
states."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from together import drift, together
from torch.distributed.tensor import DTensor

from kelib.checkpoints import new_model
from kelib.config import Model, Optimizer
from kelib.errors import KelibError
from kelib.injection import Injector, injection_schedule
from kelib.sharded_states import load_state, save_state, whole_weights
from kelib.sharding import (
    held_bytes,
    recompute_activations,
    require_bf16,
    shard,
    share_batch,
    trainer_of,
    wishes_of_launcher,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# no dimension is a multiple of four processes: shares of a parameter differ, some are empty
SHAPE, VOCABULARY, LENGTH = (18, 33, 2, 3), 65, 16
BATCH, STEPS, STOP = 8, 50, 30
SETTINGS = Optimizer(weight_decay=0.1, clip=0.5)
# LayerNorm in the type of the model: those of OLMo and Llama round a float64 model to float32
KIND = "gpt_neox"
RUNS: dict[str, dict[str, Any]] = {
    "ddp": {"parallel": "ddp"},
    "fsdp2": {"parallel": "fsdp2"},
    "recomputed": {"parallel": "fsdp2", "recompute": True, "micro_batch_size": 3},
}
WORLDS = {2: ("ddp", "fsdp2", "recomputed"), 4: ("ddp", "fsdp2")}
CASES = [(run, world) for world, runs in WORLDS.items() for run in runs]


def passages() -> dict[tuple[str, int], list[list[int]]]:
    draw = np.random.default_rng(4)
    wordings = {("once", 0): 1, ("once", 1): 1, ("paraphrase", 0): 5}
    lengths = {("once", 0): 5, ("once", 1): 21, ("paraphrase", 0): 9}  # 21 take two sequences
    return {
        key: [draw.integers(0, VOCABULARY, lengths[key]).tolist() for _ in range(count)]
        for key, count in wordings.items()
    }


def made(
    parallel: str = "ddp",
    kind: str = KIND,
    dtype: torch.dtype = torch.float64,
    seed: int = 7,
    steps: int = STEPS,
    rows: int = BATCH,
    tied: bool = False,
    **options: Any,
) -> tuple[Any, Injector]:
    """A trainer on drawn sequences, five times with passages in them."""
    model = new_model(Model(kind, *SHAPE), VOCABULARY, LENGTH, seed).to(dtype)
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    given = passages()
    injector = Injector(injection_schedule(2, 1, 5, STEPS, BATCH, 3, given, LENGTH), given)

    def batch_at(step: int) -> np.ndarray:
        drawn = np.random.default_rng([9, step]).integers(0, VOCABULARY, (rows, LENGTH), np.uint16)
        return injector.apply(drawn, step)

    return trainer_of(parallel, model, batch_at, steps, 5e-3, SETTINGS, **options), injector


def read_rows(trainer: Any) -> list[np.ndarray]:
    """Filled with the ids of every forward pass."""
    rows: list[np.ndarray] = []
    trainer.model.register_forward_pre_hook(
        lambda _, __, given: rows.append(given["input_ids"].numpy().copy()), with_kwargs=True
    )
    return rows


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """One process, whole weights, the whole batch at once."""
    trainer, injector = made()
    rows = read_rows(trainer)
    trainer.run()
    injector.check()
    return {"losses": trainer.losses, "rows": np.stack(rows), "trainer": trainer}


# --- two and four processes -------------------------------------------------------------------


def train_in_each(folder: Path) -> dict[str, Any]:
    """The runs of ``WORLDS``, from one of which a state is kept."""
    found: dict[str, Any] = {}
    for name in WORLDS[int(os.environ["WORLD_SIZE"])]:
        trainer, injector = made(**RUNS[name])
        rank, world = trainer.accelerator.process_index, trainer.accelerator.num_processes
        rows, held = read_rows(trainer), {}
        hook = trainer.optimizer.register_step_post_hook(
            lambda *_, held=held, trainer=trainer: held.update(held_bytes(trainer))
        )
        trainer.run(until=1)
        hook.remove()
        trainer.run(until=STOP)
        if name == "fsdp2":
            notes = {"injector": injector.state_dict()}
            state = save_state(trainer, folder / f"state{world}", notes)
            found["files"] = sorted(path.suffix for path in state.iterdir())
        trainer.run()
        injector.check()
        np.save(folder / f"{name}-{world}-{rank}.npy", np.concatenate(rows))
        found[name] = {
            "losses": trainer.losses,
            "passes": len(rows),
            "held": held,
            "parameters": sorted({type(p).__name__ for p in trainer.model.parameters()}),
            "dtensor": [isinstance(p, DTensor) for p in trainer.model.parameters()],
            "moments": [
                isinstance(kept[key], DTensor)
                for kept in trainer.optimizer.state.values()
                for key in ("exp_avg", "exp_avg_sq")
            ],
            "wrapper": type(trainer.model).__name__,
            "processes": world,
        }
        if name == "fsdp2":
            weights = whole_weights(trainer.model)
            found["whole"] = {key: value.tolist() for key, value in weights.items()}
    return found


def refuse_in_each(folder: Path) -> list[str]:
    """A batch that cannot be shared, and the state of another model."""
    said = []
    trainer, _ = made("fsdp2", rows=7, steps=2)
    other, _ = made("ddp", kind="olmo", dtype=torch.float32)
    for do in (trainer.run, lambda: load_state(other, folder / "state2")):
        with pytest.raises(KelibError) as refusal:
            do()
        said.append(str(refusal.value))
    return said


def gradients_in_each(folder: Path) -> dict[str, Any]:
    """The first gradient in float32, tied embeddings, and ten steps under bf16."""
    trainer, _ = made("fsdp2", "olmo", torch.float32, tied=True)
    trainer._accumulate(trainer._share(trainer.batch_at(0)))
    grads = {n: p.grad.full_tensor().tolist() for n, p in trainer.model.named_parameters()}
    rounded, _ = made("fsdp2", "olmo", torch.float32, steps=10, precision="bf16")
    rounded.run()
    return {"gradients": grads, "bf16": rounded.losses}


def go_on_in_each(folder: Path, origin: str, parallel: str) -> list[float]:
    """Finish what other processes began."""
    trainer, injector = made(parallel, seed=8)
    notes = load_state(trainer, folder / origin)
    assert notes is not None and trainer.step == STOP
    injector.load_state_dict(notes["injector"], trainer.step)
    trainer.run()
    injector.check()
    return trainer.losses


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("together")


@pytest.fixture(scope="module")
def trained(folder: Path) -> dict[int, list[Any]]:
    return {world: together(world, train_in_each, folder) for world in (2, 4)}


@pytest.mark.parametrize(("run", "world"), CASES)
def test_several_processes_have_the_curve_of_one(trained, alone, run, world):
    curves = [found[run]["losses"] for found in trained[world]]
    assert all(curve == curves[0] for curve in curves)
    away = drift(curves[0], alone["losses"])
    print(f"{run}, {world} processes: {away:.1e} nats in {STEPS} steps")
    assert away < 1e-9


@pytest.mark.parametrize(("run", "world"), CASES)
def test_they_read_the_sequences_of_one_with_the_passages_in_them(
    trained, alone, folder, run, world
):
    shares = [np.load(folder / f"{run}-{world}-{rank}.npy") for rank in range(world)]
    rows = np.concatenate([share.reshape(STEPS, -1, LENGTH) for share in shares], axis=1)
    assert np.array_equal(rows, alone["rows"])
    share, parts = share_batch(BATCH, world, RUNS[run].get("micro_batch_size"))
    assert {len(one) for one in shares} == {share * STEPS}
    assert {found[run]["passes"] for found in trained[world]} == {parts * STEPS}


@pytest.mark.parametrize("world", [2, 4])
def test_weights_and_moments_are_whole_or_divided_as_asked(trained, world):
    count = sum(p.numel() for p in made()[0].model.parameters())
    steps = 4 * len(list(made()[0].model.parameters()))  # a counter for each parameter
    for found in trained[world]:
        whole, divided = found["ddp"], found["fsdp2"]
        assert whole["processes"] == divided["processes"] == world
        assert whole["wrapper"] == "DistributedDataParallel" and not any(whole["dtensor"])
        assert all(divided["dtensor"]) and all(divided["moments"]) and divided["moments"]
        assert whole["held"] == {
            "weights": 8 * count,
            "gradients": 8 * count,
            "moments": 16 * count + steps,
        }
    held = [found["fsdp2"]["held"] for found in trained[world]]
    assert sum(one["weights"] for one in held) == sum(one["gradients"] for one in held) == 8 * count
    assert sum(one["moments"] for one in held) == 16 * count + steps * world
    assert max(one["weights"] for one in held) < 8 * count * 1.4 / world


def test_the_gradient_in_float32_is_the_mean_over_the_processes(folder):
    """Clipping and AdamW hide a sum in place of a mean, so losses alone would not show it."""
    whole, _ = made("ddp", "olmo", torch.float32, tied=True)
    whole._accumulate(whole._share(whole.batch_at(0)))
    assert "lm_head.weight" not in dict(whole.model.named_parameters())
    rounded, _ = made("ddp", "olmo", torch.float32, steps=10, precision="bf16")
    rounded.run()
    exact, _ = made("ddp", "olmo", torch.float32, steps=10)
    exact.run()
    for found in together(2, gradients_in_each, folder):
        gradients = {n: torch.tensor(g) for n, g in found["gradients"].items()}
        assert gradients.keys() == dict(whole.model.named_parameters()).keys()
        for name, parameter in whole.model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)
        assert drift(found["bf16"], rounded.losses) < 0.02 and found["bf16"] != exact.losses


@pytest.mark.parametrize(("origin", "world"), [("state2", 4), ("state4", 1)])
@pytest.mark.parametrize("parallel", ["fsdp2", "ddp"])
def test_another_number_of_processes_goes_on(trained, alone, folder, origin, world, parallel):
    if world == 1:
        curve = go_on_in_each(folder, origin, parallel)
    else:
        curve = together(world, go_on_in_each, folder, origin, parallel)[0]
    assert drift(curve, alone["losses"]) < 1e-9
    assert curve[:STOP] == trained[int(origin[-1])][0]["fsdp2"]["losses"][:STOP]


def test_the_same_number_of_processes_goes_on_to_the_same_bits(trained, folder):
    curve = together(2, go_on_in_each, folder, "state2", "fsdp2")[0]
    assert curve == trained[2][0]["fsdp2"]["losses"]


def test_a_state_is_written_by_all_and_gathered_by_the_first(trained, alone):
    for world, found in trained.items():
        assert found[0]["files"] == sorted(["", *[".distcp"] * world, ".json"])
        weights = found[0]["whole"]
        wanted = alone["trainer"].model.state_dict()
        assert weights.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(
                torch.tensor(weights[name], dtype=value.dtype), value, rtol=1e-9, atol=1e-12
            )
        assert all(one["whole"] == {} for one in found[1:])


def test_refusals_reach_every_process(trained, folder):
    for said in together(2, refuse_in_each, folder):
        assert said[0] == "batch_size = 7 must be a multiple of 2 processes"
        assert f"{folder / 'state2' / 'step0000030'} is not a state of this run" in said[1]


# --- one process ------------------------------------------------------------------------------


def test_one_process_keeps_its_weights_whole_and_resumes_to_the_same_bits(tmp_path):
    trainer, _ = made("fsdp2", steps=12)
    trainer.run(until=5)
    assert save_state(trainer, tmp_path, {"kept": 3}) == tmp_path / "step0000005"
    trainer.run(until=8)
    (tmp_path / ".step0000007.tmp").mkdir()  # of a process that was killed while it wrote
    save_state(trainer, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step0000008"]  # the latest alone
    trainer.run()
    resumed, _ = made("ddp", seed=8, steps=12)
    assert load_state(resumed, tmp_path) == {}
    assert resumed.step == 8
    resumed.run()
    assert resumed.losses == trainer.losses
    for ours, theirs in zip(resumed.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(ours, theirs) and not isinstance(ours, DTensor)


def test_without_a_state_there_is_nothing_to_go_on_from(tmp_path):
    trainer, _ = made(steps=2)
    assert load_state(trainer, tmp_path / "none") is None
    assert trainer.step == 0


@pytest.mark.parametrize("broken", ["progress.json", ".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("how", ["gone", "cut", "one bit"])
def test_a_broken_state_is_refused(tmp_path, broken, how):
    trainer, _ = made(steps=2)
    trainer.run(until=1)
    file = save_state(trainer, tmp_path) / broken
    if how == "gone":
        file.unlink()
    elif how == "one bit":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    else:
        file.write_bytes(file.read_bytes()[:-200] if file.stat().st_size > 200 else b"{")
    resumed, _ = made(steps=2)
    with pytest.raises(KelibError, match=r"step0000001 is not a state of this run .*; delete it"):
        load_state(resumed, tmp_path)


def test_what_cannot_be_written_leaves_the_state_before(tmp_path, monkeypatch):
    trainer, _ = made(steps=4)
    trainer.run(until=1)
    save_state(trainer, tmp_path)
    trainer.run(until=2)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(KelibError, match=r"cannot write .*No space left"):
        save_state(trainer, tmp_path)
    monkeypatch.undo()
    resumed, _ = made(seed=8, steps=4)
    load_state(resumed, tmp_path)
    assert resumed.step == 1
    shutil.rmtree(tmp_path / "step0000001")


def test_recomputing_changes_no_bit_and_runs_layers_twice():
    curves, calls = [], []
    for recompute in (False, True):
        trainer, _ = made("ddp", steps=3, recompute=recompute)
        count: list[int] = []
        layer = trainer.model.gpt_neox.layers[0]
        # before, not after: torch stops computing again as soon as it has what it needs
        layer.mlp.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        names = [name for name, _ in trainer.model.named_parameters()]
        trainer.run()
        curves.append(trainer.losses)
        calls.append(len(count))
    assert curves[0] == curves[1] and calls == [3, 6]
    assert names == [name for name, _ in made()[0].model.named_parameters()]
    model = recompute_activations(new_model(Model(KIND, *SHAPE), VOCABULARY, LENGTH, 7)).eval()
    with torch.inference_mode():  # measuring a model that was trained this way
        model(input_ids=torch.zeros(1, 4, dtype=torch.int64))


def test_dividing_needs_other_processes():
    model = new_model(Model(KIND, *SHAPE), VOCABULARY, LENGTH, 7)
    with pytest.raises(KelibError, match=r"not initialised; start several with accelerate launch"):
        shard(model)


# --- plans and checks -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "processes", "micro", "wanted"),
    [
        (128, 1, None, (128, 1)),
        (128, 8, None, (16, 1)),
        (128, 8, 4, (16, 4)),
        (2048, 16, 3, (128, 43)),
        (8, 2, 100, (4, 1)),
    ],
)
def test_accumulation_follows_from_the_global_batch(batch, processes, micro, wanted):
    share, parts = share_batch(batch, processes, micro)
    assert (share, parts) == wanted and share * processes == batch


def test_a_batch_that_cannot_be_shared_names_the_numbers_that_could():
    with pytest.raises(KelibError, match=r"batch_size = 12 .* processes, 5; start 1, 2, 3, 4, 6, "):
        share_batch(12, 5, None)


@pytest.mark.parametrize("able", [True, False])
def test_bf16_is_asked_of_the_gpu_itself(monkeypatch, able):
    asked: list[Any] = []

    class Current:
        def __init__(self, device: Any) -> None:
            asked.append(device)

        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

    def supported(including_emulation: bool = True) -> bool:
        asked.append(including_emulation)
        return able or including_emulation

    monkeypatch.setattr(torch.cuda, "device", Current)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "an old GPU")
    gpu = torch.device("cuda", 1)
    if able:
        require_bf16(gpu)
    else:
        with pytest.raises(KelibError, match=r"an old GPU has no bfloat16 .* 8.0 or later"):
            require_bf16(gpu)
    assert asked == [gpu, False]  # that very GPU, and emulation does not count
    require_bf16(torch.device("cpu"))


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, ("ddp", False)),
        ({"ACCELERATE_USE_FSDP": "false", "FSDP_VERSION": "1"}, ("ddp", False)),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, ("fsdp2", False)),
        (
            {
                "ACCELERATE_USE_FSDP": "true",
                "FSDP_VERSION": "2",
                "FSDP_ACTIVATION_CHECKPOINTING": "true",
            },
            ("fsdp2", True),
        ),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "fsdp_version = 1 must be 2"),
        (
            {
                "ACCELERATE_USE_FSDP": "true",
                "FSDP_VERSION": "2",
                "FSDP_OFFLOAD_PARAMS": "true",
            },
            "fsdp_offload_params = true is not supported",
        ),
    ],
)
def test_what_the_launcher_was_configured_to_do(monkeypatch, environment, wanted):
    for name in ("ACCELERATE_USE_FSDP", "FSDP_VERSION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if isinstance(wanted, str):
        with pytest.raises(KelibError, match=wanted):
            wishes_of_launcher()
    else:
        assert wishes_of_launcher() == wanted

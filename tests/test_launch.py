"""Under a launcher, with real processes: shares of unequal size, one result, one message."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SEEN
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from zoo import build, padded, sequences_of

from kelib.__main__ import main
from kelib.entropy import EntropyMeasurement, measure_entropy
from kelib.errors import KelibError
from kelib.packing import save_tokenizer, train_tokenizer
from kelib.processes import require_whole

LENGTH = 32  # the window of the models of conftest
# accelerate starts several processes on a CPU only with the switch that is named after GPUs
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
ACCELERATE += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
ACCELERATE += ["--main_process_port", "0"]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def launch(launcher: list[str], *arguments: object, home: Path) -> subprocess.CompletedProcess[str]:
    """Two processes on the CPU, with no settings of the user's."""
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HOME": str(home),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", *launcher, *map(str, arguments)]
    return subprocess.run(
        command, env=environment, cwd=home, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture
def folder(tmp_path: Path, model_of: Callable) -> Path:
    """A tiny model with its tokenizer."""
    model_of("olmo").save_pretrained(tmp_path / "olmo")
    save_tokenizer(train_tokenizer(SEEN, 400), LENGTH, tmp_path / "olmo")
    return tmp_path / "olmo"


@pytest.mark.slow
def test_command_of_two_processes_is_that_of_one(
    folder: Path, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # 7 sequences in batches of 3, 3 and 1: the first process reads 4, the second 3
    options = ["entropy", str(folder), "--text", str(text), "--sequences", "7"]
    options += ["--batch-size", "3", "--attention", "--next-token", "--uncertainty"]
    one, two = tmp_path / "one", tmp_path / "two"
    done = launch(
        ACCELERATE,
        *("-m", "kelib", *options, "--json", two / "e.json", "--save", two / "e.st"),
        home=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    capfd.readouterr()
    files = ["--json", str(one / "e.json"), "--save", str(one / "e.st")]
    assert main([*options, *files]) == 0
    # printed once, and the same but for the number of processes
    assert done.stdout.replace(", 2 processes", "") == capfd.readouterr().out

    shared, alone = (EntropyMeasurement.load(place / "e.st") for place in (two, one))
    same(shared, alone)
    numbers = [json.loads((place / "e.json").read_text()) for place in (one, two)]
    assert [found["settings"].pop("processes") for found in numbers] == [1, 2]
    for part in ("settings", "counts", "tokens_sha256", "model", "versions"):
        assert numbers[0][part] == numbers[1][part]
    assert numbers[1]["counts"]["sequences"] == 7
    assert sorted(path.name for path in two.iterdir()) == ["e.json", "e.st"]


def same(one: EntropyMeasurement, other: EntropyMeasurement) -> None:
    assert (one.sequences, one.tokens) == (other.sequences, other.tokens)
    for name in ("coefficient_sums", "attention_sums"):
        for a, b in zip(getattr(one, name), getattr(other, name), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12)
    assert one.next_token_sum == pytest.approx(other.next_token_sum, rel=1e-12)
    assert one.knowledge_entropy_error == pytest.approx(other.knowledge_entropy_error, rel=1e-9)


@pytest.mark.slow
def test_a_failure_in_one_process_ends_all_with_one_message(
    folder: Path, text: Path, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = [token for document in SEEN for token in [*tokenizer.encode(document).ids, 0]]
    rows = np.array(ids[: 5 * LENGTH]).reshape(5, LENGTH)
    # batches of one: the second process reads rows 1 and 3, and only those hold this token
    only_there = np.setdiff1d(rows[[1, 3]], rows[[0, 2, 4]])[0]
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][only_there] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    out = tmp_path / "e.json"
    options = ["entropy", folder, "--text", text, "--sequences", "5", "--batch-size", "1"]
    done = launch(TORCHRUN, "-m", "kelib", *options, "--json", out, home=tmp_path)
    assert done.returncode != 0 and done.stdout == "" and not out.exists()
    said = [line for line in done.stderr.splitlines() if line.startswith("kelib: ")]
    assert len(said) == 1 and said[0].startswith("kelib: process 1 of 2 stopped: "), done.stderr
    assert "model.embed_tokens.weight" in said[0]
    assert "[rank" not in done.stderr  # no traceback of ours, the launcher adds its own


# --- a script of one's own -------------------------------------------------------------------

SAMPLE = [padded([s], "left") for s in sequences_of([9, 5, 12, 7, 3])]
SCRIPT = """
import json
import sys
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from zoo import build, sequences_of

import kelib
from test_launch import SAMPLE

out, accelerator = Path(sys.argv[1]), Accelerator(cpu=True)
rank = accelerator.process_index
model = accelerator.prepare(build("gpt2"))
assert isinstance(model, DistributedDataParallel) and accelerator.num_processes == 2
read = []
hook = model.module.transformer.register_forward_pre_hook(
    lambda _, __, given: read.append(0) if "input_ids" in given else None, with_kwargs=True
)
wanted = {"attention": True, "next_token": True, "uncertainty": True}
measured = kelib.measure_entropy(model, SAMPLE, process_group="world", **wanted)
hook.remove()
measured.save(out / f"script{rank}")

training = [{"input_ids": s, "labels": s} for s in sequences_of([8] * 24)]
arguments = transformers.TrainingArguments(
    output_dir=str(out / "trainer"), max_steps=3, per_device_train_batch_size=2, report_to="none",
    learning_rate=5e-3, save_strategy="no", use_cpu=True, disable_tqdm=True, logging_steps=1,
)
trainer = transformers.Trainer(
    build("gpt2"), arguments, train_dataset=training,
    data_collator=transformers.default_data_collator,
)
watch = kelib.EntropyCallback(SAMPLE, every=3, process_group="world").attach(trainer)
trainer.train()
assert isinstance(trainer.model_wrapped, DistributedDataParallel)
save_file({n: p.detach().clone() for n, p in trainer.model.named_parameters()}, out / f"st{rank}")

divided = build("llama")
for block in divided.model.layers:
    fully_shard(block)
refusals = []
try:
    kelib.EntropyCallback(SAMPLE, every=1, process_group="world").measure(divided, 0)
except kelib.KelibError as error:
    refusals.append(str(error))
found = {"read": read, "rows": watch.rows, "refusals": refusals}
(out / f"found{rank}.json").write_text(json.dumps(found))
accelerator.end_training()
"""


@pytest.mark.slow
def test_script_and_trainer_of_two_processes(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SCRIPT)
    done = launch(ACCELERATE, tmp_path / "mine.py", tmp_path, home=tmp_path)
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"found{rank}.json").read_text()) for rank in (0, 1)]
    # each read its own, none was read twice
    assert [len(one["read"]) for one in found] == [3, 2]

    shared = [EntropyMeasurement.load(tmp_path / f"script{rank}") for rank in (0, 1)]
    wanted = measure_entropy(
        build("gpt2"), SAMPLE, attention=True, next_token=True, uncertainty=True
    )
    same(shared[0], wanted)
    bits = [[a.tobytes() for a in m._totals().arrays()] for m in shared]
    assert bits[0] == bits[1]

    trained = build("gpt2")
    missing = trained.load_state_dict(load_file(tmp_path / "st0"), strict=False).missing_keys
    assert missing in ([], ["lm_head.weight"])  # tied to the embedding
    for step, model in ((0, build("gpt2")), (3, trained)):
        entropy = measure_entropy(model, SAMPLE).knowledge_entropy
        for one in found:
            row = next(row for row in one["rows"] if row["step"] == step)
            assert row["knowledge_entropy"] == pytest.approx(entropy.sum(), rel=1e-12)
            assert row["knowledge_entropy_layer_1"] == pytest.approx(entropy[1], rel=1e-12)
    assert [[row["step"] for row in one["rows"]] for one in found] == [[0, 3], [0, 3]]
    pattern = "weights of LlamaForCausalLM are divided over processes (DTensor)"
    assert all(len(one["refusals"]) == 1 and pattern in one["refusals"][0] for one in found)


# --- without a launcher ----------------------------------------------------------------------


def test_divided_weights_are_known_by_their_marks() -> None:
    model = build("llama")
    require_whole(model)
    model.model.norm.weight.ds_id = 0  # as DeepSpeed marks a parameter that it divides
    with pytest.raises(KelibError, match=r"divided over processes \(DeepSpeed ZeRO-3\)"):
        require_whole(model)

"""The code blocks of docs/measuring.md, run as a reader would: in order, in one folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SEEN

import kelib
from kelib import architectures
from kelib.packing import save_tokenizer, train_tokenizer

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "measuring.md"
LENGTH = 32  # the window of the models of conftest


def blocks() -> list[tuple[int, str, str]]:
    """(line, language, code) of every fenced block."""
    found, opened = [], None
    for number, line in enumerate(PAGE.read_text(encoding="utf-8").splitlines(), start=1):
        if line.startswith("```") and opened is None:
            opened = (number + 1, line[3:].strip(), [])
        elif line.startswith("```"):
            first, language, lines = opened
            found.append((first, language, "\n".join(lines) + "\n"))
            opened = None
        elif opened is not None:
            opened[2].append(line)
    assert opened is None, f"block at line {opened[0]} is not closed"
    return found


@pytest.fixture
def folder(tmp_path: Path, model_of: Callable, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What the page says the folder holds, and no trace of what it registers."""
    model_of("olmo").save_pretrained(tmp_path / "my_model")
    save_tokenizer(train_tokenizer(SEEN, 400), LENGTH, tmp_path / "my_model")
    (tmp_path / "notes.txt").write_text("\n\n".join(SEEN), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    before = list(architectures._FINDERS)
    yield tmp_path
    architectures._FINDERS[:] = before


def shell(code: str, folder: Path) -> str:
    """Run it with the programs of this environment, on the CPU."""
    environment = os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(folder / "home"),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        ["bash", "-euc", code], env=environment, cwd=folder, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{code}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_every_block_of_the_page_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, Any] = {"__name__": "page"}
    printed = []
    for line, language, code in blocks():
        name = re.match(r"# (\w+\.py)\n", code)
        if name is not None:
            (folder / name[1]).write_text(code)  # a script: a later block starts it
        elif language == "python":
            # empty lines in front, so that a traceback names the line of the page
            exec(compile("\n" * (line - 1) + code, str(PAGE), "exec"), namespace)
        else:
            assert language == "sh", f"line {line}: a block of {language!r} is not run by anybody"
            printed.append(shell(code, folder))
    table, shared = printed
    assert "16 sequences of 32 tokens" in table and (folder / "numbers.json").exists()
    # the script of two processes, said once, and as one process has it
    batches = [{"input_ids": [[5, 7, 11, n]]} for n in range(3, 10)]
    model = namespace["AutoModelForCausalLM"].from_pretrained("my_model")
    wanted = kelib.measure_entropy(model, batches).knowledge_entropy
    assert shared == f"7 {wanted}\n"
    assert [row["step"] for row in namespace["watch"].rows] == [0, 2, 4]
    assert namespace["whole"].sequences == len(SEEN)
    # float32: with attention=True the attention runs in another order
    pair = (namespace[name].knowledge_entropy for name in ("whole", "measured"))
    np.testing.assert_allclose(*pair, rtol=1e-6)


def test_families_of_the_page_are_those_that_are_tested() -> None:
    from zoo import ZOO

    row = r"^\| (?:gated|without a gate|mixture of experts) \| (.*) \|$"
    rows = re.findall(row, PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    named = re.sub(r" \(.*?\)", "", ", ".join(rows)).split(", ")
    plain = {re.sub(r"[^a-z0-9]", "", name.lower()) for name in named}
    assert plain == {name.replace("_", "") for name in ZOO}

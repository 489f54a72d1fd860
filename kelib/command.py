"""The entropy of one model over one text, for people who only want the number for their own model.

``python -m kelib entropy MODEL --text TEXT`` measures a causal language model, from a local folder
or from the model hub, and prints a table by layer. MODEL is a folder that ``save_pretrained`` wrote
(config, safetensors, tokenizer) or the id of a model; only safetensors are opened, and no code that
comes with a model is run. TEXT is a ``.txt`` or ``.jsonl`` file, a folder of those, or the name of
a source of ``data/sources.yaml``, which is fetched, or ``hub:NAME``, a row of
``data/hub_sources.yaml``. Documents are tokenised with the model's own tokenizer, without its start
token, each followed by its end-of-text token, joined in the order of the text and cut into
sequences of one length: the first N of them are measured, so shuffle a sorted text before. A GPU is
used if there is one.

    python -m kelib entropy runs/mine/step0001000 --text notes.txt
    python -m kelib entropy EleutherAI/pythia-70m --text wikipedia --uncertainty --json out.json
    torchrun --nproc-per-node 2 -m kelib entropy runs/mine/step0001000 --text notes.txt

Started by ``accelerate launch`` or ``torchrun``, the processes share the batches; the first reads
the text, prints and writes. The JSON holds numbers, counts, settings and versions, and none of the
text.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import kelib
from kelib import hub_sources, source_text, sources
from kelib.accumulation import DEFINITIONS
from kelib.config import repository_root
from kelib.entropy import measure_entropy
from kelib.entropy_report import Report
from kelib.errors import KelibError, listing
from kelib.launching import agreed, launched
from kelib.packing import pack_text
from kelib.pretrained import load_model, locate, quiet, read_tokenizer
from kelib.processes import Processes
from kelib.tables import write_atomically

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_LENGTH = 1024  # tokens, or the model's window if that is shorter


def measure_checkpoint(
    model: str,
    text: str,
    *,
    revision: str | None = None,
    sequences: int = 128,
    length: int | None = None,
    batch_size: int = 4,
    coefficient: str = "absolute",
    attention: bool = False,
    next_token: bool = False,
    uncertainty: bool = False,
    dtype: str = "float32",
    process_group: Any = None,
) -> Report:
    """Load ``model``, read and pack ``text`` (see the module), measure, report.

    ``length`` is in tokens, by default 1024 or the model's window if that is shorter. With fewer
    than ``sequences`` whole sequences in the text, all of them are used and the report says so.
    ``process_group``: as for :func:`kelib.measure_entropy`. Only the first process reads the text;
    each loads the model; all return the same report.

    Raises KelibError for a model that is not there, cannot be reached, has no tokenizer, no
    safetensors or lacks weights; for text that is not there or gives no sequence; for settings that
    cannot be; and all that :func:`kelib.measure_entropy` refuses. What one process raises, all do.
    """
    processes = Processes(process_group)
    device = "cuda" if torch.cuda.is_available() else "cpu"  # of several, the one set as current

    def read() -> _Input:
        _check(sequences, length, batch_size, coefficient, dtype)
        return _read(model, revision, text, sequences, length, uncertainty)

    def load() -> Any:
        return load_model(given.place, given.commit, DTYPES[dtype], head=next_token).to(device)

    with quiet():
        given = agreed(processes, read, by_first=True)
        network = agreed(processes, load)
        rows = given.rows
        batches = [{"input_ids": rows[i : i + batch_size]} for i in range(0, len(rows), batch_size)]
        measured = measure_entropy(
            network,
            # disable=None: a bar in a terminal, nothing in a file
            tqdm(
                batches,
                desc="measuring",
                unit="batch",
                disable=True if processes.rank else None,
                leave=False,
            ),
            attention=attention,
            next_token=next_token,
            coefficient=coefficient,
            uncertainty=uncertainty,
            process_group=process_group,
        )
    packages = ("numpy", "tokenizers", "torch", "transformers")
    notes = {
        "model": model,
        "revision": revision,
        "commit": given.commit,
        "architecture": type(network).__name__,
        "text": text,
        "settings": {
            "length": rows.shape[1],
            "sequences_asked": sequences,
            "batch_size": batch_size,
            "coefficient": coefficient,
            "dtype": dtype,
            "device": device,
            "processes": processes.count,
        },
        "counts": {
            "sequences": measured.sequences,
            "tokens": measured.tokens,
            "documents_read": given.documents,
        },
        # tells whether two runs saw the same tokens
        "tokens_sha256": hashlib.sha256(rows.tobytes()).hexdigest(),
        "versions": {
            "kelib": kelib.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
    }
    words = network.get_input_embeddings().weight.shape[0]
    return Report(measured, notes, words, sequences if len(rows) < sequences else None)


@dataclass(frozen=True)
class _Input:
    """Where the model lies, and the sequences ``(n, length)`` it will be measured on."""

    place: str
    commit: str | None
    rows: np.ndarray
    documents: int


def _check(
    sequences: int, length: int | None, batch_size: int, coefficient: str, dtype: str
) -> None:
    for name, value in (("sequences", sequences), ("batch-size", batch_size), ("length", length)):
        if value is not None and value < 1:
            raise KelibError(f"--{name} is {value}, must be at least 1")
    if coefficient not in DEFINITIONS:
        choices = listing(DEFINITIONS)
        raise KelibError(f"--coefficient {coefficient!r} is not defined; choose one of {choices}")
    if dtype not in DTYPES:
        raise KelibError(f"--dtype {dtype!r} is not offered; choose one of {listing(DTYPES)}")


def _read(
    model: str,
    revision: str | None,
    text: str,
    sequences: int,
    length: int | None,
    uncertainty: bool,
) -> _Input:
    place, commit = locate(model, revision)
    window, tokenizer, end = read_tokenizer(place, commit)
    length = length or min(DEFAULT_LENGTH, window or DEFAULT_LENGTH)
    if window is not None and length > window:
        raise KelibError(
            f"--length {length} is beyond the window of {model}, {window} tokens; "
            f"use --length {window} or less"
        )
    rows, documents = pack_text(read_documents(text), tokenizer, end, length, sequences)
    if len(rows) == 0:
        raise KelibError(
            f"{text} gives no sequence of {length} tokens; give more text or a smaller --length"
        )
    if uncertainty and len(rows) < 2:
        raise KelibError(
            f"{text} gives 1 sequence of {length} tokens, a standard error needs two or more; "
            "give more text, a smaller --length, or leave --uncertainty out"
        )
    return _Input(place, commit, rows, documents)


def read_documents(text: str) -> list[str]:
    """Documents of a file or folder, else of a source of ``data/sources.yaml``, fetched first, or
    of a hub source, ``hub:NAME``."""
    if Path(text).exists():
        return source_text.local_documents(Path(text))
    if text.startswith(hub_sources.PREFIX):
        return hub_sources.read_documents(text, repository_root() / "data")
    known = sources.manifest() if sources.MANIFEST.exists() else {}
    if text not in known:
        raise KelibError(
            f"there is no text {text!r}: give a .txt or .jsonl file, a folder of those, or a "
            f"source of data/sources.yaml ({listing(known)})"
        )
    folder = repository_root() / "data" / "sources"
    sources.fetch(known[text], folder)
    return source_text.documents(text, folder)


def run(arguments: dict[str, Any]) -> None:
    """What ``python -m kelib entropy`` does: measure, print the table, write what was asked for.

    ``arguments`` are those of :func:`measure_checkpoint`, and ``json`` and ``save``, paths or None.
    Under a launcher the first process prints and writes; a refusal in one ends all of them.
    """
    arguments = dict(arguments)
    outputs = {name: arguments.pop(name) for name in ("json", "save")}

    def check_outputs() -> None:
        for name, path in outputs.items():
            # said now rather than after the measurement
            if path is not None and Path(path).is_dir():
                raise KelibError(f"--{name} {path} is a folder; give the name of a file")

    def tell() -> None:
        print(report.table())
        if outputs["json"] is not None:
            text = json.dumps(report.numbers(), indent=1, allow_nan=False)
            write_atomically(Path(outputs["json"]), text + "\n")
        if outputs["save"] is not None:
            target = Path(outputs["save"])
            os.makedirs(target.parent, exist_ok=True)
            report.measured.save(target)

    with launched() as processes:
        agreed(processes, check_outputs, by_first=True)
        report = measure_checkpoint(**arguments, process_group="world")
        agreed(processes, tell, by_first=True)

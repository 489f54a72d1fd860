"""The entropy of one model over one text, for people who only want the number for their own model.

``python -m kelib entropy MODEL --text TEXT`` measures a causal language model, from a local folder
or from the model hub, and prints a table by layer. MODEL is a folder that ``save_pretrained``
wrote (config, safetensors, tokenizer) or the id of a model; only safetensors are opened, and no
code that comes with a model is run. TEXT is a ``.txt`` or ``.jsonl`` file, a folder of those, or
the name of a source of ``data/sources.yaml``, which is fetched. Documents are tokenised with the
model's own tokenizer, without its start token, each followed by its end-of-text token, joined in
the order of the text and cut into sequences of one length: the first N of them are measured, so
shuffle a sorted text before. A GPU is used if there is one.

    python -m kelib entropy runs/mine/step0001000 --text notes.txt
    python -m kelib entropy EleutherAI/pythia-70m --text wikipedia --uncertainty --json out.json

The JSON holds numbers, counts, settings and versions, and none of the text.
"""

from __future__ import annotations

import hashlib
import json
import math
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
from kelib import sources
from kelib.accumulation import DEFINITIONS
from kelib.config import repository_root
from kelib.entropy import measure_entropy
from kelib.errors import KelibError, listing
from kelib.measurement import EntropyMeasurement
from kelib.pretrained import load_model, locate, quiet, read_tokenizer
from kelib.tables import write_atomically

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_LENGTH = 1024  # tokens, or the model's window if that is shorter


@dataclass(frozen=True)
class Report:
    """A measurement with what was measured.

    Attributes:
        measured: the sums and entropies.
        notes: model, revision, commit, text, settings, counts and versions, as the JSON has them.
        words: size of the vocabulary.
        short: how many sequences were asked for, if the text gave fewer; else None.
    """

    measured: EntropyMeasurement
    notes: dict[str, Any]
    words: int
    short: int | None = None

    def numbers(self) -> dict[str, Any]:
        """Everything for the JSON; entropies in nats, standard errors if they were asked for."""
        measured = self.measured
        widths = [len(total) for total in measured.coefficient_sums]
        entropy, effective = measured.knowledge_entropy, measured.effective_memories
        layers: list[dict[str, Any]] = [
            {
                "layer": layer,
                "memories": width,
                "entropy": float(entropy[layer]),
                "share_of_bound": float(entropy[layer] / math.log(width)) if width > 1 else None,
                "effective_memories": float(effective[layer]),
            }
            for layer, width in enumerate(widths)
        ]
        knowledge = {"sum": float(entropy.sum()), "bound": measured.bound, "layers": layers}
        found: dict[str, Any] = {"knowledge_entropy": knowledge}
        if measured.attention_sums:
            table = measured.attention_entropy
            found["attention_entropy"] = {
                "sum_of_head_means": float(np.nanmean(table, axis=1).sum()),
                "layers_and_heads": _without_nan(table),
            }
        if measured.next_token_sum is not None:
            found["next_token_entropy"] = {
                "mean": measured.next_token_entropy,
                "bound": math.log(self.words),
            }
        if measured.blocks is not None:
            knowledge["sum_error"] = measured.total_knowledge_entropy_error
            for row, error in zip(layers, measured.knowledge_entropy_error, strict=True):
                row["entropy_error"] = float(error)
            if "attention_entropy" in found:
                errors = _without_nan(measured.attention_entropy_error)
                found["attention_entropy"]["errors"] = errors
            if "next_token_entropy" in found:
                found["next_token_entropy"]["error"] = measured.next_token_entropy_error
        return {**self.notes, "unit": "nats", **found}

    def table(self) -> str:
        """The table by layer that the command prints."""
        numbers, notes = self.numbers(), self.notes
        knowledge, counts = numbers["knowledge_entropy"], notes["counts"]
        settings = notes["settings"]
        error = "entropy_error" in knowledge["layers"][0]
        where = "".join(f", {k} {notes[k]}" for k in ("revision", "commit") if notes[k])
        lines = [
            f"model  {notes['model']}{where}",
            f"text   {notes['text']}: {counts['sequences']} sequences of {settings['length']} "
            f"tokens, {settings['dtype']}, coefficient {settings['coefficient']}",
            "",
            "layer  memories m  entropy (nats)"
            + ("  std. error" if error else "")
            + "  share of ln m  exp(H)/m",
        ]
        for row in knowledge["layers"]:
            share = math.nan if row["share_of_bound"] is None else row["share_of_bound"]
            lines.append(
                f"{row['layer']:5d}  {row['memories']:10d}  {row['entropy']:14.4f}"
                + (f"  {row['entropy_error']:10.4f}" if error else "")
                + f"  {share:13.4f}  {row['effective_memories']:8.4f}"
            )
        lines.append(
            f"{'sum':>5}  {sum(r['memories'] for r in knowledge['layers']):10d}  "
            f"{knowledge['sum']:14.4f}"
            + (f"  {knowledge['sum_error']:10.4f}" if error else "")
            + f"  at most {knowledge['bound']:.4f} nats"
        )
        if "attention_entropy" in numbers:
            total = numbers["attention_entropy"]["sum_of_head_means"]
            lines.append(f"attention entropy, sum over layers of the mean over heads: {total:.4f}")
        if "next_token_entropy" in numbers:
            last = numbers["next_token_entropy"]
            deviation = f", std. error {last['error']:.4f}" if "error" in last else ""
            lines.append(
                f"next-token entropy: {last['mean']:.4f}{deviation}, at most {last['bound']:.4f}"
            )
        if self.short is not None:
            lines.append(
                f"note: {self.short} sequences were asked for, the text gives "
                f"{counts['sequences']}: all of them were used"
            )
        return "\n".join(lines)


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
) -> Report:
    """Load ``model``, read and pack ``text`` (see the module), measure, report.

    ``length`` is in tokens, by default 1024 or the model's window if that is shorter. With fewer
    than ``sequences`` whole sequences in the text, all of them are used and the report says so.

    Raises KelibError for a model that is not there, cannot be reached, has no tokenizer, no
    safetensors or lacks weights; for text that is not there or gives no sequence; for settings that
    cannot be; and all that :func:`kelib.measure_entropy` refuses.
    """
    for name, value in (("sequences", sequences), ("batch-size", batch_size), ("length", length)):
        if value is not None and value < 1:
            raise KelibError(f"--{name} is {value}, must be at least 1")
    if coefficient not in DEFINITIONS:
        choices = listing(DEFINITIONS)
        raise KelibError(f"--coefficient {coefficient!r} is not defined; choose one of {choices}")
    if dtype not in DTYPES:
        raise KelibError(f"--dtype {dtype!r} is not offered; choose one of {listing(DTYPES)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with quiet():
        place, commit = locate(model, revision)
        window, tokenizer, end = read_tokenizer(place, commit)
        length = length or min(DEFAULT_LENGTH, window or DEFAULT_LENGTH)
        if window is not None and length > window:
            raise KelibError(
                f"--length {length} is beyond the window of {model}, {window} tokens; "
                f"use --length {window} or less"
            )
        documents = read_documents(text)
        rows, read = pack_text(documents, tokenizer, end, length, sequences)
        if len(rows) == 0:
            raise KelibError(
                f"{text} gives no sequence of {length} tokens; give more text or a smaller --length"
            )
        if uncertainty and len(rows) < 2:
            raise KelibError(
                f"{text} gives 1 sequence of {length} tokens, a standard error needs two or more; "
                "give more text, a smaller --length, or leave --uncertainty out"
            )
        network = load_model(place, commit, DTYPES[dtype], head=next_token)
        batches = [{"input_ids": rows[i : i + batch_size]} for i in range(0, len(rows), batch_size)]
        measured = measure_entropy(
            network.to(device),
            # disable=None: a bar in a terminal, nothing in a file
            tqdm(batches, desc="measuring", unit="batch", disable=None, leave=False),
            attention=attention,
            next_token=next_token,
            coefficient=coefficient,
            uncertainty=uncertainty,
        )
    packages = ("numpy", "tokenizers", "torch", "transformers")
    notes = {
        "model": model,
        "revision": revision,
        "commit": commit,
        "architecture": type(network).__name__,
        "text": text,
        "settings": {
            "length": length,
            "sequences_asked": sequences,
            "batch_size": batch_size,
            "coefficient": coefficient,
            "dtype": dtype,
            "device": device,
        },
        "counts": {
            "sequences": measured.sequences,
            "tokens": measured.tokens,
            "documents_read": read,
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


def pack_text(
    documents: list[str], tokenizer: Any, end: int, length: int, sequences: int
) -> tuple[np.ndarray, int]:
    """Token ids ``(n, length)`` int64, n at most ``sequences``, and how many documents were read.

    Documents, each followed by ``end``, are joined and cut; the rest shorter than ``length`` is
    dropped. Raises KelibError if the tokenizer knows nothing of the text.
    """
    special = set(tokenizer.all_special_ids)
    ids: list[int] = []
    read, known = 0, False
    while read < len(documents) and len(ids) < sequences * length:
        chunk = documents[read : read + 64]
        # verbose: documents longer than the window are no mistake here
        options = {"add_special_tokens": False, "verbose": False}
        for encoded in tokenizer(chunk, **options)["input_ids"]:
            known = known or not special.issuperset(encoded)
            ids += [*encoded, end]
        read += len(chunk)
        if not known:  # transformers makes an empty tokenizer where the files are missing
            raise KelibError(
                f"{tokenizer.name_or_path} has no tokenizer, or one that knows nothing of this "
                "text; put the model's own tokenizer files (tokenizer.json and "
                "tokenizer_config.json) beside its weights"
            )
    count = min(sequences, len(ids) // length)
    return np.array(ids[: count * length], dtype=np.int64).reshape(count, length), read


def read_documents(text: str) -> list[str]:
    """Documents of a file or folder, else of a source of ``data/sources.yaml``, fetched first."""
    if Path(text).exists():
        return sources.local_documents(Path(text))
    known = sources.manifest() if sources.MANIFEST.exists() else {}
    if text not in known:
        raise KelibError(
            f"there is no text {text!r}: give a .txt or .jsonl file, a folder of those, or a "
            f"source of data/sources.yaml ({listing(known)})"
        )
    folder = repository_root() / "data" / "sources"
    sources.fetch(known[text], folder)
    return sources.documents(text, folder)


def _without_nan(table: np.ndarray) -> list[list[float | None]]:
    """Rows for JSON; layers with fewer heads than others end in null."""
    return [[None if math.isnan(value) else float(value) for value in row] for row in table]


def run(arguments: dict[str, Any]) -> None:
    """What ``python -m kelib entropy`` does: measure, print the table, write what was asked for.

    ``arguments`` are those of :func:`measure_checkpoint`, and ``json`` and ``save``, paths or None.
    """
    arguments = dict(arguments)
    outputs = {name: arguments.pop(name) for name in ("json", "save")}
    for name, path in outputs.items():
        # said now rather than after the measurement
        if path is not None and Path(path).is_dir():
            raise KelibError(f"--{name} {path} is a folder; give the name of a file")
    report = measure_checkpoint(**arguments)
    print(report.table())
    if outputs["json"] is not None:
        text = json.dumps(report.numbers(), indent=1, allow_nan=False)
        write_atomically(Path(outputs["json"]), text + "\n")
    if outputs["save"] is not None:
        target = Path(outputs["save"])
        os.makedirs(target.parent, exist_ok=True)
        report.measured.save(target)

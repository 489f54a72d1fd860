"""What ``python -m kelib entropy`` prints, a table by layer, and what it writes, JSON. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from kelib.measurement import EntropyMeasurement


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
        """The table by layer, counted from 1 as in figures, that the command prints."""
        numbers, notes = self.numbers(), self.notes
        knowledge, counts = numbers["knowledge_entropy"], notes["counts"]
        settings = notes["settings"]
        error = "entropy_error" in knowledge["layers"][0]
        where = "".join(f", {k} {notes[k]}" for k in ("revision", "commit") if notes[k])
        lines = [
            f"model  {notes['model']}{where}",
            f"text   {notes['text']}: {counts['sequences']} sequences of {settings['length']} "
            f"tokens, {settings['dtype']}, coefficient {settings['coefficient']}"
            + (f", {settings['processes']} processes" if settings["processes"] > 1 else ""),
            "",
            "layer  memories m  entropy (nats)"
            + ("  std. error" if error else "")
            + "  share of ln m  exp(H)/m",
        ]
        for row in knowledge["layers"]:
            share = math.nan if row["share_of_bound"] is None else row["share_of_bound"]
            lines.append(
                f"{row['layer'] + 1:5d}  {row['memories']:10d}  {row['entropy']:14.4f}"
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


def _without_nan(table: np.ndarray) -> list[list[float | None]]:
    """Rows for JSON; layers with fewer heads than others end in null."""
    return [[None if math.isnan(value) else float(value) for value in row] for row in table]

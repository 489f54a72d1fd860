"""Knowledge, attention and next-token entropy of a causal language model in one streaming pass."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

from kelib.accumulation import Accumulator, Coefficient, definition_name
from kelib.architectures import feed_forwards, trunk_of, unwrap
from kelib.attention import watch_attention
from kelib.batches import Batch, read_batch
from kelib.errors import KelibError, listing
from kelib.jackknife import BLOCKS, Sums
from kelib.logits import next_token_entropies, require_head
from kelib.measurement import EntropyMeasurement, shannon_entropy
from kelib.processes import Processes, require_whole
from kelib.watching import evaluating, watch_memories

__all__ = ["EntropyMeasurement", "measure_entropy", "shannon_entropy"]


def measure_entropy(
    model: Any,
    batches: Iterable[Mapping[str, Any]],
    *,
    knowledge: bool = True,
    attention: bool = False,
    next_token: bool = False,
    coefficient: Coefficient = "absolute",
    router_weight: bool = True,
    uncertainty: bool = False,
    process_group: Any = None,
    sharded: bool = False,
) -> EntropyMeasurement:
    """Entropy of a causal language model over ``batches``, in one pass and flat memory.

    Each batch is a mapping with ``input_ids`` ``(B, T)`` and, if there is padding on either side,
    ``attention_mask`` of the same shape (tensors, arrays or lists). Every quantity is a mean over
    the unpadded tokens of a sequence, then over sequences, accumulated in float64; so it depends
    neither on how the data is cut into batches, nor on padding, nor on the order of sequences. A
    row that is all padding is no sequence and is skipped.

    Args:
        model: any causal language model of transformers, on any device, in any dtype. It is left as
            it was: mode, hooks, configuration.
        knowledge: knowledge entropy (Eq. 2), nats per layer. Alone, only the trunk runs: the
            vocabulary projection is not computed.
        attention: attention entropy (Eq. 3), nats per layer and head, for models whose attention
            goes through transformers' AttentionInterface. Scores exist for one block of query rows
            at a time.
        next_token: entropy of the next-token distribution (A.4), nats, of every unpadded position,
            with the model's own logit scaling and soft-capping. Logits exist for a few tokens at a
            time.
        coefficient: what counts as the size of memory coefficient ``c_i``:

            * ``"absolute"``: ``|c_i|``, the paper's definition;
            * ``"relu"``: ``max(0, relu(gate x) * up x)``, negative values become 0 (Fig. 9); in a
              layer without a gate ``relu(up x)``;
            * ``"contribution"``: ``|c_i| ‖v_i‖`` (ours). Scaling row i of K (of the up projection)
              by u and row i of V by 1/u leaves the function of a gated or ReLU layer as it was, but
              multiplies ``c_i`` by u: the other definitions, the paper's too, change under it, this
              one does not;
            * a function of the signed coefficients, ``(n, k)`` to ``(n, k)``, no less than 0.
        router_weight: whether coefficients of experts carry the router's weight: see
            :class:`kelib.ffn.Mixture`.
        uncertainty: also keep the sums of 64 blocks of sequences, for standard errors (jackknife).
        process_group: None, to measure in this process alone; ``"world"`` or a ProcessGroup, to
            measure together with the other processes, as under ``accelerate launch`` (nothing is
            done unasked: one process of a training run may measure while the others wait). Every
            process passes the same batches and reads each n-th of them; none is read twice, and all
            end with the same result. If torch.distributed is not initialised, ``"world"`` is this
            process.
        sharded: with ``process_group``: every process passes batches of its own, and reads all of
            them.

    Raises KelibError for an empty data set, a mask of another shape, tokens outside the vocabulary,
    NaN or infinity (naming the layer and, if it lies in the weights, the parameter), a model
    without feed-forward layers that kelib knows. Coefficients that sum to 0 or, from a user's
    function, are negative, are refused when the knowledge entropy is read.
    """
    if not (knowledge or attention or next_token):
        raise KelibError("nothing to measure: set knowledge, attention or next_token to True")
    name = definition_name(coefficient)
    processes = Processes(process_group)
    require_whole(model)
    model = unwrap(model)
    error: Exception | None = None
    sums: Sums | None = None
    try:
        layers = feed_forwards(model) if knowledge else []
        if next_token:
            require_head(model)
        accumulator = Accumulator(layers, BLOCKS if uncertainty else 1, coefficient, router_weight)
        _Pass(model, accumulator, attention, next_token).run(batches, processes, sharded)
        sums = accumulator.sums()
    except Exception as caught:
        # the other processes are waiting at the sum; agree() raises it again
        if not processes.together:
            raise
        error = caught
    facts = None if sums is None else (accumulator.tokens, sums.sequences.sum(), accumulator.heads)
    told = processes.agree(error, facts)
    assert sums is not None
    if sum(count for _, count, _ in told) == 0:
        raise KelibError("no sequence to measure: the data set is empty or all padding")
    if attention and not sums.attention:
        # this process had no batch, so that it does not know the heads
        heads = max((shapes for _, _, shapes in told), key=len)
        empty = tuple(np.zeros((len(sums.sequences), count)) for count in heads)
        sums = Sums(sums.sequences, sums.coefficients, empty, sums.next_token)
    if next_token and sums.next_token is None:
        last = np.zeros(len(sums.sequences))
        sums = Sums(sums.sequences, sums.coefficients, sums.attention, last)
    sums = processes.add(sums, model.get_input_embeddings().weight.device)
    whole = sums.map(lambda array: array.sum(axis=0))
    return EntropyMeasurement(
        coefficient_sums=whole.coefficients,
        sequences=int(whole.sequences),
        tokens=sum(count for count, _, _ in told),
        attention_sums=whole.attention,
        next_token_sum=None if whole.next_token is None else float(whole.next_token),
        coefficient=name,
        router_weight=router_weight,
        blocks=sums if uncertainty else None,
    )


class _Pass:
    """The model, hooked, over the batches of this process."""

    def __init__(
        self, model: Any, accumulator: Accumulator, attention: bool, next_token: bool
    ) -> None:
        self.model, self.trunk = model, trunk_of(model)
        self.accumulator = accumulator
        self.attention, self.next_token = attention, next_token
        embedding = model.get_input_embeddings().weight
        self.device, self.words = embedding.device, embedding.shape[0]
        self.takes_positions = "position_ids" in inspect.signature(self.trunk.forward).parameters

    def run(self, batches: Iterable[Any], processes: Processes, sharded: bool) -> None:
        accumulator = self.accumulator
        first = 0
        with ExitStack() as undo:
            undo.enter_context(evaluating(self.model))
            if accumulator.layers:
                relu = accumulator.coefficient == "relu"
                undo.enter_context(
                    watch_memories(accumulator.layers, accumulator.add_coefficients, relu=relu)
                )
            if self.attention:
                undo.enter_context(watch_attention(self.model, accumulator.add_attention))
            for number, given in enumerate(batches):
                batch = read_batch(given, first, self.words)
                if batch is None:
                    continue
                first += len(batch.lengths)
                if sharded or number % processes.count == processes.rank:
                    self._one(batch.to(self.device))

    @torch.no_grad()
    def _one(self, batch: Batch) -> None:
        accumulator = self.accumulator
        accumulator.begin(batch)
        inputs: dict[str, Any] = {"input_ids": batch.ids, "use_cache": False, "return_dict": True}
        if batch.mask is not None:
            inputs["attention_mask"] = batch.mask.long()
            if self.takes_positions:
                inputs["position_ids"] = batch.positions()
        output = self.trunk(**inputs)
        if self.attention and not accumulator.heads:
            raise KelibError(
                f"the attention of {type(self.model).__name__} does not go through transformers' "
                "AttentionInterface, so its entropy cannot be measured; leave attention=True out"
            )
        states = accumulator.states(output.last_hidden_state)
        finite = bool(torch.isfinite(states).all())
        if finite and self.next_token:
            entropies = next_token_entropies(self.model, self.trunk, type(output), states)
            for rows, entropy in entropies:
                accumulator.add_next_token(rows, entropy)
        layer = accumulator.check()
        if layer is not None or not finite:
            self._refuse(layer)

    def _refuse(self, layer: int | None) -> None:
        """Say where NaN or infinity came from; a sound model never pays for this search."""
        bad = [n for n, p in self.model.named_parameters() if not bool(torch.isfinite(p).all())]
        place = "the last hidden state or the logits" if layer in (None, -1) else f"layer {layer}"
        cause = (
            f"NaN or infinity stands in {listing(bad, 3)}"
            if bad
            else "the weights are finite, so a value overflowed: load it with dtype=torch.float32"
        )
        raise KelibError(
            f"{place} of {type(self.model).__name__} gives NaN or infinite values; {cause}"
        )

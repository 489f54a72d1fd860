"""Log-probability of a continuation given its context, for probes and multiple choice alike."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from kelib.requests import Request, encode_requests

# Reading a shared context once takes one more forward pass. A pass costs about what 100 tokens do
# where overheads weigh most (the `small` model on one core), so fewer tokens are not worth it,
SAVED_TOKENS = 128
# nor are the shortest contexts, where a mask and copies of keys and values outweigh the reading.
CONTEXT_TOKENS = 8
# A pass over contexts holds keys and values of all layers: at most of so many tokens.
CACHED_TOKENS = 2**14
# What adapts its rotary frequencies to the longest position of a pass: keys of an earlier pass
# would have others.
LENGTH_DEPENDENT = ("dynamic", "longrope")


@dataclass(frozen=True)
class Score:
    """How probable a continuation is.

    ``log_probability``: sum over its tokens (nats, at most 0); ``is_greedy``: every token of it is
    the most probable one; ``tokens``: its length; ``context``: tokens of the context that were
    read; ``truncated``: those cut on the left.
    """

    log_probability: float
    is_greedy: bool
    tokens: int
    context: int
    truncated: int = 0


@torch.inference_mode()
def score_continuations(
    model: Any,
    tokenizer: Any,
    requests: Sequence[tuple[str, str]],
    batch_size: int = 128,
    reuse_contexts: bool = True,
) -> list[Score]:
    """Score ``(context, continuation)`` pairs; results in the order of the requests.

    Batched longest first, ``batch_size`` sequences at a time, and padded where attention never
    looks, so that the result does not depend on the batch size. The vocabulary projection is
    computed for rows that predict a continuation only, inside the model's own forward pass, so that
    a scale or cap of its logits applies. For encoding, empty contexts and contexts that do not fit
    the window (cut on the left, counted in ``Score.truncated``) see `kelib.requests`.

    A context that several requests share is read once. For k continuations of a tokens after a
    context of C tokens that is C + k a tokens instead of k (C + a); four-way questions take
    4 (C + a) / (C + 4 a) times fewer, at most 4. It is done where the tokens saved outweigh a
    second pass and the model's cache allows it (`can_reuse_contexts`), and never if
    ``reuse_contexts`` is False. Scores are the same to rounding.

    Raises KelibError, naming the request, as `kelib.requests.encode_requests` does.
    """
    window = int(getattr(model.config, "max_position_embeddings", 2048))
    words = model.get_input_embeddings().weight.shape[0]
    encoded = encode_requests(tokenizer, requests, window, words)
    groups: list[list[int]] = []
    if reuse_contexts and can_reuse_contexts(model):
        groups = _worth_sharing(encoded)
    shared = {index for group in groups for index in group}
    single = [index for index in range(len(encoded)) if index not in shared]
    sums = _Sums(len(encoded))
    was_training = model.training
    model.eval()
    try:
        single.sort(key=lambda index: -len(encoded[index].ids))
        for start in range(0, len(single), batch_size):
            _score_single(model, encoded, single[start : start + batch_size], sums)
        groups.sort(key=lambda group: -len(encoded[group[0]].context))
        while groups:
            longest = len(encoded[groups[0][0]].context)
            size = max(1, min(batch_size, CACHED_TOKENS // longest))
            _score_shared(model, encoded, groups[:size], batch_size, window, sums)
            groups = groups[size:]
    finally:
        model.train(was_training)
    return [
        Score(float(total), bool(greedy), request.target, len(request.context), request.truncated)
        for request, total, greedy in zip(encoded, sums.total, sums.greedy, strict=True)
    ]


def can_reuse_contexts(model: Any) -> bool:
    """Whether keys and values of a context can be kept and attended to from continuations.

    True for causal models of transformers with full attention in every layer, that take a cache, a
    mask and positions. False for sliding or chunked windows, recurrent or convolutional states,
    layers that share keys and values, rotary frequencies that depend on the length, and for
    ``forward`` functions of other packages, whose use of a cache is not known.
    """
    forward = type(model).forward
    config = model.config.get_text_config(decoder=True)
    rotary = str(getattr(config, "rope_parameters", None))
    if (
        not forward.__module__.startswith("transformers.")
        or not {"past_key_values", "attention_mask", "position_ids"}
        <= inspect.signature(forward).parameters.keys()
        or not getattr(type(model), "_supports_default_dynamic_cache", lambda: False)()
        or getattr(model, "_is_stateful", False)
        or model.config.is_encoder_decoder
        or getattr(config, "alibi", False)
        or getattr(config, "num_kv_shared_layers", None)
        or any(kind in rotary for kind in LENGTH_DEPENDENT)
    ):
        return False
    layers = DynamicCache(config=config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def _worth_sharing(encoded: list[Request]) -> list[list[int]]:
    """Requests with the same context tokens, where reading these once saves enough."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, request in enumerate(encoded):
        groups.setdefault(tuple(request.context), []).append(index)
    saved = {
        context: (len(group) - 1) * len(context)
        for context, group in groups.items()
        if len(group) > 1 and len(context) >= CONTEXT_TOKENS
    }
    return [groups[context] for context in saved] if sum(saved.values()) >= SAVED_TOKENS else []


class _Sums:
    """Log-probability and greedy flag of every request, gathered token by token."""

    def __init__(self, requests: int) -> None:
        self.total = np.zeros(requests)
        self.greedy = np.ones(requests, dtype=bool)

    def add(
        self, logits: torch.Tensor, rows: Sequence[int], tokens: list[int], owners: list[int]
    ) -> None:
        """``tokens`` of the requests ``owners``, each predicted by a row of ``logits`` ``(n, V)``;
        several may share a row.
        """
        logits = logits.float()
        where, wanted = torch.tensor([list(rows), tokens], device=logits.device)
        chosen = logits[where, wanted] - logits.logsumexp(dim=-1)[where]
        best = logits.argmax(dim=-1)[where] == wanted
        np.add.at(self.total, owners, chosen.double().cpu().numpy())
        np.logical_and.at(self.greedy, owners, best.cpu().numpy())


def _score_single(model: Any, encoded: list[Request], part: list[int], sums: _Sums) -> None:
    """Contexts and continuations in one pass."""
    inputs, _ = _padded([encoded[index].inputs for index in part])
    rows: list[int] = []
    columns: list[int] = []
    owners: list[int] = []
    tokens: list[int] = []
    for row, index in enumerate(part):
        request = encoded[index]
        rows += [row] * request.target
        columns += range(len(request.inputs) - request.target, len(request.inputs))
        owners += [index] * request.target
        tokens += request.continuation
    output = _forward(model, rows, columns, input_ids=inputs, use_cache=False)
    sums.add(output.logits, range(len(rows)), tokens, owners)


def _score_shared(
    model: Any,
    encoded: list[Request],
    groups: list[list[int]],
    batch_size: int,
    window: int,
    sums: _Sums,
) -> None:
    """One pass over the contexts of ``groups``, which predict every first token, then passes over
    the continuations of more than one token.
    """
    contexts = [encoded[group[0]].context for group in groups]
    inputs, mask = _padded(contexts)
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    ends = [len(context) - 1 for context in contexts]
    output = _forward(
        model,
        range(len(contexts)),
        ends,
        input_ids=inputs,
        past_key_values=cache,
        use_cache=True,
    )
    members = [(row, index) for row, group in enumerate(groups) for index in group]
    firsts = [encoded[index].continuation[0] for _, index in members]
    sums.add(output.logits, [row for row, _ in members], firsts, [index for _, index in members])

    members = [(row, index) for row, index in members if encoded[index].target > 1]
    if not members:
        return
    members.sort(key=lambda member: -encoded[member[1]].target)
    _align_right(cache, mask)
    width = inputs.shape[1]
    # Continuations are short: a pass takes more of them, but no more tokens than with contexts.
    size = batch_size * min(max(width // encoded[members[0][1]].target, 1), 4)
    for start in range(0, len(members), size):
        part = members[start : start + size]
        tails = [encoded[index].continuation for _, index in part]
        inputs, reads = _padded([tail[:-1] for tail in tails])
        parents = torch.tensor([row for row, _ in part])
        lengths = torch.tensor([[ends[row] + 1] for row, _ in part])
        positions = (lengths + torch.arange(inputs.shape[1])).clamp(max=window - 1)
        output = _forward(
            model,
            [row for row, tail in enumerate(tails) for _ in tail[1:]],
            [column for tail in tails for column in range(len(tail) - 1)],
            input_ids=inputs,
            attention_mask=torch.cat([mask.flip(1)[parents], reads], dim=1),
            position_ids=positions,
            past_key_values=_branches(cache, parents),
            use_cache=True,
        )
        tokens = [token for tail in tails for token in tail[1:]]
        owners = [index for (_, index), tail in zip(part, tails, strict=True) for _ in tail[1:]]
        sums.add(output.logits, range(len(tokens)), tokens, owners)


def _align_right(cache: Any, mask: torch.Tensor) -> None:
    """Move keys and values of every context to the right end of its row, the layout of batched
    generation, from which any model can go on: no gap before the continuation.
    """
    if bool(mask.all()):
        return
    width = mask.shape[1]
    columns = (torch.arange(width) - (width - mask.sum(1, keepdim=True))) % width
    for layer in cache.layers:
        source = columns[:, None, :, None].to(layer.keys.device)
        layer.keys = layer.keys.take_along_dim(source, dim=2)
        layer.values = layer.values.take_along_dim(source, dim=2)


class _Branch(DynamicLayer):
    """Keys and values of a context as every one of its continuations sees them.

    Spread over the continuations inside `update`, so that only one layer's are held at a time, and
    not changed by it, so that several passes may follow one context.
    """

    def __init__(self, layer: Any, parents: torch.Tensor) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.keys, self.values = layer.keys, layer.values
        self.parents = parents.to(layer.keys.device)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            torch.cat([self.keys[self.parents], key_states], dim=-2),
            torch.cat([self.values[self.parents], value_states], dim=-2),
        )


def _branches(cache: Any, parents: torch.Tensor) -> Cache:
    return Cache(layers=[_Branch(layer, parents) for layer in cache.layers])


def _padded(sequences: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids padded on the right, and 1 where there is a token."""
    ids = np.zeros((len(sequences), max(map(len, sequences))), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def _forward(model: Any, rows: Sequence[int], columns: Sequence[int], **inputs: Any) -> Any:
    """The model's output, with logits ``(n, V)`` of positions ``(rows, columns)`` alone."""
    device = next(model.parameters()).device
    moved = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in inputs.items()
    }
    with _head_only_at(model, list(rows), list(columns)):
        return model(**moved)


@contextmanager
def _head_only_at(model: Any, rows: list[int], columns: list[int]) -> Iterator[None]:
    """While the scope lasts, the vocabulary projection gets ``hidden[rows, columns]`` alone."""

    def select(_head: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        return (inputs[0][rows, columns],)

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()

"""Log-probability of a continuation given its context, for probes and multiple choice alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kelib.errors import KelibError


@dataclass(frozen=True)
class Score:
    """How probable a continuation is.

    ``log_probability``: sum over its tokens (nats, at most 0); ``is_greedy``: every token of it is
    the most probable one; ``tokens``: its length; ``truncated``: context tokens cut on the left.
    """

    log_probability: float
    is_greedy: bool
    tokens: int
    truncated: int = 0


def encode_request(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], int]:
    """(token ids of both, how many of them are the continuation).

    A trailing space of the context moves to the continuation, then both are encoded together and
    split at the length of the encoded context: no word is cut where the tokenizer would not.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    whole = tokenizer(stripped + continuation, add_special_tokens=False)["input_ids"]
    before = len(tokenizer(stripped, add_special_tokens=False)["input_ids"])
    return whole, len(whole) - before


@torch.inference_mode()
def score_continuations(
    model: Any, tokenizer: Any, requests: Sequence[tuple[str, str]], batch_size: int = 128
) -> list[Score]:
    """Score ``(context, continuation)`` pairs; results in the order of the requests.

    Batched longest first and padded on the right, where causal attention never looks, so that the
    result does not depend on the batch size. The vocabulary projection is computed for continuation
    rows only, inside the model's own forward pass, so that a scale or cap of its logits applies. An
    empty context is replaced by the end-of-text token. Contexts that do not fit the window are cut
    on the left.

    Raises KelibError, naming the request, for a continuation that encodes to nothing or exceeds the
    window, and for an empty context if the tokenizer has no end-of-text token.
    """
    window = int(getattr(model.config, "max_position_embeddings", 2048))
    encoded = []
    for number, (context, continuation) in enumerate(requests):
        ids, target = encode_request(tokenizer, context, continuation)
        if target <= 0:
            raise KelibError(
                f"request {number}: the continuation {continuation!r} encodes to no token of "
                f"its own after {context[-40:]!r}; give it text that begins with a space"
            )
        if len(ids) == target:
            if tokenizer.eos_token_id is None:
                raise KelibError(
                    f"request {number}: its context is empty and the tokenizer has no end-of-text "
                    "token to put there; give a context or set tokenizer.eos_token"
                )
            ids = [tokenizer.eos_token_id, *ids]
        cut = max(len(ids) - window - 1, 0)  # the last token is predicted, never read
        if len(ids) - cut - 1 < target:
            raise KelibError(
                f"request {number}: its {target} target tokens exceed the window of {window}"
            )
        encoded.append((ids[cut:], target, cut))
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i][0]))
    scores: list[Score | None] = [None] * len(encoded)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            found = _score_batch(model, [encoded[index] for index in part])
            for index, score in zip(part, found, strict=True):
                scores[index] = score
    finally:
        model.train(was_training)
    return scores  # type: ignore[return-value]


def _score_batch(model: Any, encoded: list[tuple[list[int], int, int]]) -> list[Score]:
    """Scores of (token ids, how many of them are the target, how many were cut), longest first."""
    device = next(model.parameters()).device
    inputs = np.zeros((len(encoded), len(encoded[0][0]) - 1), dtype=np.int64)
    rows: list[int] = []
    columns: list[int] = []
    targets: list[int] = []
    for row, (ids, target, _) in enumerate(encoded):
        inputs[row, : len(ids) - 1] = ids[:-1]
        rows += [row] * target
        columns += range(len(ids) - 1 - target, len(ids) - 1)
        targets += ids[-target:]
    with _head_only_at(model, rows, columns):
        output = model(input_ids=torch.from_numpy(inputs).to(device), use_cache=False)
    logits = output.logits.float()  # (target tokens of the batch, vocabulary)
    wanted = torch.tensor(targets, device=device)
    chosen = torch.log_softmax(logits, dim=-1).gather(1, wanted[:, None])[:, 0]
    greedy = (logits.argmax(dim=-1) == wanted).cpu().numpy()
    values = chosen.double().cpu().numpy()
    scores, first = [], 0
    for _, target, cut in encoded:
        span = slice(first, first + target)
        scores.append(Score(float(values[span].sum()), bool(greedy[span].all()), target, cut))
        first += target
    return scores


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

"""Log-probability of a continuation given its context: probes and multiple-choice questions go one way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kelib.errors import KelibError


@dataclass(frozen=True)
class Score:
    """``log_probability``: sum over the continuation's tokens (nats, at most 0); ``is_greedy``: every token
    of it is the most probable one; ``tokens``: its length; ``truncated``: context tokens cut off on the left."""

    log_probability: float
    is_greedy: bool
    tokens: int
    truncated: int = 0


def encode_request(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], int]:
    """(token ids of both, how many of them are the continuation).

    A trailing space of the context moves to the continuation, then both are encoded together and split
    at the length of the encoded context, so that a word is never cut where the tokenizer would not.
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

    Batched longest first and padded on the right, where causal attention never looks, so that the result does
    not depend on the batch size; the vocabulary projection is computed for continuation rows only. An empty
    context is replaced by the end-of-text token. Contexts that do not fit the window are cut on the left.

    Raises KelibError for a continuation that encodes to nothing, naming the request.
    """
    window = int(getattr(model.config, "max_position_embeddings", 2048))
    encoded = []
    for number, (context, continuation) in enumerate(requests):
        ids, target = encode_request(tokenizer, context, continuation)
        if target <= 0:
            raise KelibError(
                f"request {number}: the continuation {continuation!r} encodes to no token after "
                f"{context[-40:]!r}; give it at least one character"
            )
        if len(ids) == target:
            ids = [tokenizer.eos_token_id, *ids]
        cut = max(len(ids) - window - 1, 0)  # the last token is predicted, never read
        if len(ids) - cut - 1 < target:
            raise KelibError(
                f"request {number}: its {target} target tokens exceed the window of {window}"
            )
        encoded.append((ids[cut:], target, cut))
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i][0]))
    scores: list[Score | None] = [None] * len(encoded)
    device = next(model.parameters()).device
    trunk, head = model.get_decoder(), model.get_output_embeddings()
    was_training = model.training
    model.eval()
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        longest = len(encoded[part[0]][0]) - 1
        inputs = np.zeros((len(part), longest), dtype=np.int64)
        rows, columns, targets = [], [], []
        for row, index in enumerate(part):
            ids, target, _ = encoded[index]
            inputs[row, : len(ids) - 1] = ids[:-1]
            rows += [row] * target
            columns += range(len(ids) - 1 - target, len(ids) - 1)
            targets += ids[-target:]
        hidden = trunk(input_ids=torch.from_numpy(inputs).to(device), use_cache=False)[0]
        logits = head(hidden[rows, columns]).float()
        wanted = torch.tensor(targets, device=device)
        chosen = torch.log_softmax(logits, dim=-1).gather(1, wanted[:, None])[:, 0]
        greedy = (logits.argmax(dim=-1) == wanted).cpu().numpy()
        values = chosen.double().cpu().numpy()
        first = 0
        for index in part:
            _, target, cut = encoded[index]
            span = slice(first, first + target)
            scores[index] = Score(float(values[span].sum()), bool(greedy[span].all()), target, cut)
            first += target
    model.train(was_training)
    return scores  # type: ignore[return-value]

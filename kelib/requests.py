"""Scoring requests as token ids: (context, continuation) encoded together and split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kelib.errors import KelibError


@dataclass(frozen=True)
class Request:
    """An encoded request: ``ids`` of context and continuation, of which the last ``target`` are the
    continuation's; ``truncated``: tokens of the context cut on the left.
    """

    ids: list[int]
    target: int
    truncated: int

    @property
    def context(self) -> list[int]:
        return self.ids[: -self.target]

    @property
    def continuation(self) -> list[int]:
        return self.ids[-self.target :]

    @property
    def inputs(self) -> list[int]:
        """What a model reads: the last token is predicted, never read."""
        return self.ids[:-1]


def encode_request(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], int]:
    """(token ids of both, how many of them are the continuation).

    Trailing white space of the context moves to the continuation, then both are encoded together
    and split at the length of the encoded context: no word is cut where the tokenizer would not.
    Special tokens are those the tokenizer itself adds, unless the text already starts with the
    begin-of-text token. In an empty context that token stands alone (end-of-text where there is
    none); nothing stands there if the tokenizer has neither.
    """
    return _encode(tokenizer, [(context, continuation)])[0]


def encode_requests(
    tokenizer: Any, requests: Sequence[tuple[str, str]], window: int, words: int
) -> list[Request]:
    """All ``(context, continuation)`` pairs as token ids that fit a model which reads at most
    ``window`` tokens and has ``words`` embeddings. Contexts that do not fit are cut on the left.

    Raises KelibError, naming the request, for half a surrogate pair, which is no character, for a
    continuation that encodes to nothing or exceeds the window, for an empty context if the
    tokenizer has nothing to put there, and for token ids outside the embeddings.
    """
    for number, pair in enumerate(requests):
        try:
            "".join(pair).encode()
        except UnicodeEncodeError as error:
            raise KelibError(
                f"request {number}: {pair[0][-40:]!r} and {pair[1][:40]!r} hold half a surrogate "
                "pair, which is no character; remove it"
            ) from error
    encoded = []
    for number, (ids, target) in enumerate(_encode(tokenizer, requests)):
        context, continuation = requests[number]
        if target <= 0:
            raise KelibError(
                f"request {number}: the continuation {continuation!r} encodes to no token of "
                f"its own after {context[-40:]!r}; give it text that begins with a space"
            )
        if len(ids) == target:
            raise KelibError(
                f"request {number}: its context is empty and the tokenizer has no begin-of-text or "
                "end-of-text token to put there; give a context or set tokenizer.eos_token"
            )
        if max(ids) >= words:
            raise KelibError(
                f"request {number}: token {max(ids)} is outside the {words} embeddings of the "
                "model; the tokenizer belongs to another model: load both from the same checkpoint"
            )
        if target > window:
            raise KelibError(
                f"request {number}: its {target} target tokens exceed the window of {window}"
            )
        cut = max(len(ids) - window - 1, 0)  # the last token is predicted, never read
        encoded.append(Request(ids[cut:], target, cut))
    return encoded


def _encode(tokenizer: Any, requests: Sequence[tuple[str, str]]) -> list[tuple[list[int], int]]:
    """Each request's token ids and how many of them are the continuation; every different text is
    encoded once, all in one call.
    """
    starts = [getattr(tokenizer, f"{name}_token") for name in ("bos", "eos")]
    starts = [token for token in starts if token is not None][:1]
    pairs = []
    for context, continuation in requests:
        stripped = context.rstrip()
        pairs.append((stripped, context[len(stripped) :] + continuation))
    # (text, whether special tokens are added); None for an empty context
    plain = [not stripped or stripped.startswith(tuple(starts)) for stripped, _ in pairs]
    wholes = [(a + b, not bare) for (a, b), bare in zip(pairs, plain, strict=True)]
    befores = [(a, not bare) for (a, _), bare in zip(pairs, plain, strict=True)]
    ids_of = _ids_of(tokenizer, [*wholes, *befores])
    start_ids = [tokenizer.convert_tokens_to_ids(token) for token in starts]
    encoded = []
    for whole, before in zip(wholes, befores, strict=True):
        ids, context_length = ids_of[whole], len(ids_of[before])
        if not before[0]:
            # a continuation that itself begins with this token is given it as its context
            ids = ids if ids[:1] == start_ids and len(ids) > 1 else [*start_ids, *ids]
            context_length = len(start_ids)
        encoded.append((ids, len(ids) - context_length))
    return encoded


def _ids_of(tokenizer: Any, texts: list[tuple[str, bool]]) -> dict[tuple[str, bool], list[int]]:
    found: dict[tuple[str, bool], list[int]] = {}
    for special in (True, False):
        part = list(dict.fromkeys(text for text, wanted in texts if wanted == special))
        if part:
            many = tokenizer(part, add_special_tokens=special, return_attention_mask=False)
            found |= {
                (text, special): ids for text, ids in zip(part, many["input_ids"], strict=True)
            }
    return found

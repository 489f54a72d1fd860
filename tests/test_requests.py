"""Requests as token ids, by hand-made cases of a real byte-level BPE tokenizer."""

from __future__ import annotations

import copy

import pytest
from tokenizers.processors import TemplateProcessing

from kelib.errors import KelibError
from kelib.requests import Request, encode_request, encode_requests


def test_both_are_encoded_together(tokenizer):
    """A word that goes on in the continuation is encoded as one word, not in two parts."""
    whole = tokenizer("The birthplace of")["input_ids"]
    ids, target = encode_request(tokenizer, "The birthpl", "ace of")
    assert ids == whole
    assert target == len(whole) - len(tokenizer("The birthpl")["input_ids"])


@pytest.mark.parametrize(
    ("context", "continuation"),
    [("Größe: ", "Übung 漢字"), ("漢字", " 🙂 é"), ("two  spaces \t\n", "here"), ("x", "y z")],
)
def test_every_text_is_split_and_none_is_lost(tokenizer, context, continuation):
    ids, target = encode_request(tokenizer, context, continuation)
    assert 0 < target < len(ids)
    assert tokenizer.decode(ids) == context + continuation
    assert ids == tokenizer(context + continuation)["input_ids"]
    assert len(ids) - target == len(tokenizer(context.rstrip())["input_ids"])


def test_many_are_encoded_as_each_alone(tokenizer):
    requests = [
        ("The city", " of"),
        ("", "The city"),
        ("The city", " in"),
        (" ", "of"),
        ("é", " é"),
    ]
    found = encode_requests(tokenizer, requests, window=32, words=len(tokenizer))
    alone = [encode_request(tokenizer, *request) for request in requests]
    assert [(request.ids, request.target) for request in found] == alone


def test_parts_of_a_request():
    request = Request([1, 2, 3, 4, 5], target=2, truncated=0)
    assert (request.context, request.continuation) == ([1, 2, 3], [4, 5])
    assert request.inputs == [1, 2, 3, 4]


def test_special_tokens_are_those_the_tokenizer_adds(tokenizer):
    other = copy.deepcopy(tokenizer)
    start = other.bos_token_id
    other.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{other.bos_token} $A", special_tokens=[(other.bos_token, start)]
    )
    plain, target = encode_request(tokenizer, "The city", " of")
    assert plain[0] != start
    assert encode_request(other, "The city", " of") == ([start, *plain], target)
    given = encode_request(other, other.bos_token + "The city", " of")  # not a second time
    assert given == ([start, *plain], target)
    assert encode_request(other, "", "The city") == encode_request(tokenizer, "", "The city")


def test_an_empty_context_is_the_first_token_of_a_text(tokenizer):
    ids = tokenizer("The city")["input_ids"]
    other = copy.deepcopy(tokenizer)
    other.bos_token, other.eos_token = tokenizer.decode([ids[-1]]), tokenizer.eos_token
    start = other.bos_token_id
    assert encode_request(tokenizer, "", "The city") == ([tokenizer.eos_token_id, *ids], len(ids))
    assert encode_request(other, "", "The")[0][0] == start  # begin before end of text
    other.bos_token = None
    assert encode_request(other, "", "The city")[0][0] == other.eos_token_id
    text = tokenizer.bos_token + "The city"
    assert encode_request(tokenizer, "", text) == ([tokenizer.bos_token_id, *ids], len(ids))


def test_contexts_are_cut_on_the_left_and_counted(tokenizer):
    (ids, target), token = encode_request(tokenizer, "The city of the", " city"), " the"
    request = encode_requests(tokenizer, [("The city of the", " city")], 2, len(tokenizer))[0]
    assert request == Request(ids[-3:], target, len(ids) - 3)  # the last token is not read
    with pytest.raises(KelibError, match="request 0: its 3 target tokens exceed the window of 2"):
        encode_requests(tokenizer, [("a", token * 3)], 2, len(tokenizer))


def test_the_tokenizer_of_another_model_is_refused(tokenizer):
    last = max(tokenizer("The city of")["input_ids"])
    assert encode_requests(tokenizer, [("The city", " of")], 32, last + 1)
    said = f"request 1: token {last} is outside the {last} embeddings of the model; the tokenizer"
    with pytest.raises(KelibError, match=said):
        encode_requests(tokenizer, [("x", "q"), ("The city", " of")], 32, last)

"""Scores against the full logits of the model itself, one request at a time and without padding."""

from __future__ import annotations

import copy

import pytest
import torch

from kelib.errors import KelibError
from kelib.scoring import Score, encode_request, score_continuations

PLAIN = ("olmo", "llama", "gpt_neox", "gpt2")
SCALED = ("gemma2", "cohere", "granite")  # a cap or a scale stands between the head and the logits
WINDOW = 32


@pytest.fixture(scope="module")
def requests(world):
    probes = [(p.input, p.target) for entry in world.once for p in entry.probes]
    asked = [(q.context, choice) for q in world.questions[::3] for choice in q.choices]
    return [*probes, ("", " Nothing before."), *asked, ("x", "y")]


def reference(model, tokenizer, context, continuation):
    """Score from ``model(...).logits`` of the whole sequence, by the definition."""
    ids, target = encode_request(tokenizer, context, continuation)
    if len(ids) == target:
        ids = [tokenizer.eos_token_id, *ids]
    cut = max(0, len(ids) - (WINDOW + 1))
    ids = ids[cut:]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids[:-1]])).logits[0].double()
    total, greedy = 0.0, True
    for place, token in list(enumerate(ids))[-target:]:
        row = logits[place - 1]
        total += float(row[token] - row.logsumexp(0))
        greedy &= int(row.argmax()) == token
    return Score(total, greedy, target, cut)


def assert_equal(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.log_probability == pytest.approx(other.log_probability, abs=1e-5, rel=1e-5)
        assert (one.is_greedy, one.tokens, one.truncated) == (
            other.is_greedy,
            other.tokens,
            other.truncated,
        )


@pytest.mark.parametrize("kind", [*PLAIN, *SCALED])
def test_scores_are_those_of_the_models_own_logits(model_of, tokenizer, requests, kind):
    model = model_of(kind)
    found = score_continuations(model, tokenizer, requests, batch_size=16)
    assert_equal(found, [reference(model, tokenizer, *request) for request in requests])
    assert len({score.tokens for score in found}) > 2
    assert max(score.log_probability for score in found) <= 0


@pytest.mark.parametrize("kind", SCALED)
def test_a_scale_or_cap_of_the_logits_matters_here(model_of, tokenizer, requests, kind):
    """The head on the trunk's output alone would be another number for these models."""
    model = model_of(kind)
    context, continuation = requests[0]
    ids, target = encode_request(tokenizer, context, continuation)
    with torch.no_grad():
        hidden = model.get_decoder()(input_ids=torch.tensor([ids[:-1]]))[0][0, -target:]
        bare = torch.log_softmax(model.get_output_embeddings()(hidden), dim=-1)
    naive = float(bare.gather(1, torch.tensor(ids[-target:])[:, None]).sum())
    score = score_continuations(model, tokenizer, [(context, continuation)])[0]
    assert abs(score.log_probability - naive) > 0.1


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_the_batch_size_does_not_matter(model_of, tokenizer, requests, batch_size):
    model = model_of("olmo")
    expected = score_continuations(model, tokenizer, requests, batch_size=16)
    assert_equal(score_continuations(model, tokenizer, requests, batch_size), expected)


def test_results_come_in_the_order_of_the_requests(model_of, tokenizer, requests):
    model = model_of("olmo")
    expected = score_continuations(model, tokenizer, requests, batch_size=5)
    turned = score_continuations(model, tokenizer, requests[::-1], batch_size=5)
    assert_equal(turned[::-1], expected)
    assert len({round(score.log_probability, 6) for score in expected}) > len(requests) * 0.9
    assert score_continuations(model, tokenizer, []) == []


def test_a_continuation_in_two_parts_adds_up(model_of, tokenizer):
    context, first, second = "The birthplace", " of the tailor", " is a city."
    whole, one, two = score_continuations(
        model_of("llama"),
        tokenizer,
        [(context, first + second), (context, first), (context + first, second)],
    )
    assert whole.tokens == one.tokens + two.tokens
    added = one.log_probability + two.log_probability
    assert whole.log_probability == pytest.approx(added, abs=1e-4)


def test_one_token_continuations_sum_to_one(model_of, tokenizer):
    """All tokens that can follow, each by itself, have a total probability of 1."""
    model, context = model_of("gemma2"), "The birthplace of the tailor"
    start = tokenizer(context)["input_ids"]
    texts = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    follow = [
        (token, text)
        for token, text in enumerate(texts)
        if encode_request(tokenizer, context, text) == ([*start, token], 1)
    ]
    assert len(follow) > 100
    scores = score_continuations(model, tokenizer, [(context, text) for _, text in follow])
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([start])).logits[0, -1].softmax(-1)
    covered = float(expected[[token for token, _ in follow]].sum())
    found = sum(torch.tensor(score.log_probability).exp().item() for score in scores)
    assert found == pytest.approx(covered, abs=1e-5)
    best = [text for token, text in follow if token == int(expected.argmax())]
    greedy = [text for (_, text), score in zip(follow, scores, strict=True) if score.is_greedy]
    assert greedy == best


def test_is_greedy_needs_every_token(model_of, tokenizer, world):
    """From a context whose best next token can be written, and one more token after it."""
    model = model_of("olmo")
    for question in world.questions:
        start = tokenizer(question.context)["input_ids"]
        with torch.no_grad():
            best = int(model(input_ids=torch.tensor([start])).logits[0, -1].argmax())
        text = tokenizer.decode([best])
        if encode_request(tokenizer, question.context, text) != ([*start, best], 1):
            continue
        longer = f"{text} zq"
        one, two = score_continuations(
            model, tokenizer, [(question.context, text), (question.context, longer)]
        )
        assert one.is_greedy
        assert not two.is_greedy
        assert two.log_probability < one.log_probability
        return
    pytest.fail("no context has a best next token that can be written")


def test_a_trailing_space_of_the_context_moves_to_the_continuation(model_of, tokenizer):
    apart, joined = ("The home town of \n", "Zed is"), ("The home town of", " \nZed is")
    assert encode_request(tokenizer, *apart) == encode_request(tokenizer, *joined)
    ids, target = encode_request(tokenizer, "The home town of ", "Zed is")
    assert tokenizer.decode(ids) == "The home town of Zed is"
    assert tokenizer.decode(ids[-target:]) == " Zed is"
    one, two = score_continuations(model_of("olmo"), tokenizer, [apart, joined])
    assert one == two


def test_both_are_encoded_together(tokenizer):
    """A word that goes on in the continuation is encoded as one word, not in two parts."""
    whole = tokenizer("The birthplace of")["input_ids"]
    ids, target = encode_request(tokenizer, "The birthpl", "ace of")
    assert ids == whole
    assert target == len(whole) - len(tokenizer("The birthpl")["input_ids"])


def test_an_empty_context_is_the_end_of_text(model_of, tokenizer):
    model, text = model_of("olmo"), "The city"
    ids = tokenizer(text)["input_ids"]
    with torch.no_grad():
        rows = model(input_ids=torch.tensor([[0, *ids[:-1]]])).logits[0].log_softmax(-1)
    expected = float(rows.gather(1, torch.tensor(ids)[:, None]).sum())
    score, spaces = score_continuations(model, tokenizer, [("", text), ("  ", text)])
    assert score.log_probability == pytest.approx(expected, abs=1e-5)
    assert (score.tokens, score.truncated) == (len(ids), 0)
    assert spaces.tokens == len(tokenizer("  The city")["input_ids"])


def test_an_empty_context_needs_an_end_of_text_token(model_of, tokenizer):
    other = copy.deepcopy(tokenizer)
    other.eos_token = None
    said = "request 1: its context is empty and the tokenizer has no end-of-text token"
    with pytest.raises(KelibError, match=said):
        score_continuations(model_of("olmo"), other, [("a", " b"), ("", "b")])


@pytest.mark.parametrize("kind", PLAIN)
def test_contexts_that_do_not_fit_are_cut_on_the_left(model_of, tokenizer, world, kind):
    model = model_of(kind)
    long = " ".join(world.once[0].passages[:3])
    requests = [(long, " tailor"), ("short", " tailor"), ("not this. " + long, " tailor")]
    scores = score_continuations(model, tokenizer, requests)
    assert_equal(scores, [reference(model, tokenizer, *request) for request in requests])
    length = len(tokenizer(long + " tailor")["input_ids"])
    assert scores[0].truncated == length - (WINDOW + 1) > 20  # the last token is never read
    assert scores[1].truncated == 0
    assert scores[2].truncated > scores[0].truncated
    assert scores[2].log_probability == pytest.approx(scores[0].log_probability, abs=1e-5)


def test_the_window_is_used_to_its_end_and_no_further(model_of, tokenizer):
    model, token = model_of("olmo"), " the"
    assert len(tokenizer(token)["input_ids"]) == 1
    fits = score_continuations(model, tokenizer, [("a", token * WINDOW)])[0]
    assert (fits.tokens, fits.truncated) == (WINDOW, 0)
    cut = score_continuations(model, tokenizer, [(token * 5, token * WINDOW)])[0]
    assert (cut.tokens, cut.truncated) == (WINDOW, 4)
    said = "request 1: its 33 target tokens exceed the window of 32"
    with pytest.raises(KelibError, match=said):
        score_continuations(model, tokenizer, [("a", " b"), ("a", token * (WINDOW + 1))])


def test_an_empty_continuation_is_refused(model_of, tokenizer):
    said = "request 1: the continuation '' encodes to no token of its own after 'The home'; give it"
    with pytest.raises(KelibError, match=said):
        score_continuations(model_of("olmo"), tokenizer, [("a", " b"), ("The home", "")])
    assert len(tokenizer("The")["input_ids"]) == 1
    said = "request 0: the continuation 'e' encodes to no token of its own after 'Th'; give it text"
    with pytest.raises(KelibError, match=said):  # one token for both: no place to cut
        score_continuations(model_of("olmo"), tokenizer, [("Th", "e")])


def test_the_vocabulary_projection_sees_targets_only(model_of, tokenizer, requests):
    model = copy.deepcopy(model_of("gemma2"))
    shapes = []
    model.get_output_embeddings().register_forward_hook(
        lambda _module, _inputs, output: shapes.append(tuple(output.shape))
    )
    scores = score_continuations(model, tokenizer, requests, batch_size=1000)
    assert shapes == [(sum(score.tokens for score in scores), len(tokenizer))]


def test_scoring_is_in_evaluation_mode_and_leaves_no_trace(model_of, tokenizer, requests):
    model = copy.deepcopy(model_of("gpt2"))  # has dropout
    expected = score_continuations(model, tokenizer, requests)
    assert not model.training
    model.train()
    assert score_continuations(model, tokenizer, requests) == expected
    assert model.training
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_no_trace_is_left_by_a_failure_either(model_of, tokenizer):
    model = copy.deepcopy(model_of("olmo")).train()

    def fail(*_):
        raise RuntimeError("planted")

    model.get_output_embeddings().register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="planted"):
        score_continuations(model, tokenizer, [("a", " b")])
    assert model.training
    assert not model.get_output_embeddings()._forward_pre_hooks

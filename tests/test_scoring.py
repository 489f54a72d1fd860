"""Scores against the full logits of the model itself, one request at a time and without padding."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import transformers
import zoo
from tokenizers import Tokenizer, models, pre_tokenizers

from kelib import scoring
from kelib.errors import KelibError
from kelib.requests import encode_request
from kelib.scoring import Score, can_reuse_contexts, score_continuations

PLAIN = ("olmo", "llama", "gpt_neox", "gpt2")
SCALED = ("gemma2", "cohere", "granite")  # a cap or a scale stands between the head and the logits
WINDOW = 32
# of tests/zoo.py: a window that slides or a chunk that ends somewhere, so contexts are not reused
WINDOWED = ("phi3", "gemma2", "gemma3", "mistral", "gpt_oss", "llama4")
# of other kinds: recurrent states; biases by distance instead of positions
OTHERS = {
    "bloom": {"n_layer": 2, "hidden_size": 24, "n_head": 4},
    "mamba": {"num_hidden_layers": 2, "hidden_size": 24, "state_size": 8},
    "recurrent_gemma": {"num_hidden_layers": 3, "hidden_size": 24, "num_attention_heads": 4},
}


@pytest.fixture(scope="module")
def requests(world):
    probes = [(p.input, p.target) for entry in world.once for p in entry.probes]
    asked = [(q.context, choice) for q in world.questions[::3] for choice in q.choices]
    return [*probes, ("", " Nothing before."), *asked, ("x", "y")]


def reference(model, tokenizer, context, continuation):
    """Score from ``model(...).logits`` of the whole sequence, by the definition."""
    ids, target = encode_request(tokenizer, context, continuation)
    cut = max(0, len(ids) - (getattr(model.config, "max_position_embeddings", 2048) + 1))
    ids = ids[cut:]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids[:-1]])).logits[0].double()
    total, greedy = 0.0, True
    for place, token in list(enumerate(ids))[-target:]:
        row = logits[place - 1]
        total += float(row[token] - row.logsumexp(0))
        greedy &= int(row.argmax()) == token
    return Score(total, greedy, target, len(ids) - target, cut)


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
    other.eos_token = other.bos_token = None
    said = "request 1: its context is empty and the tokenizer has no begin-of-text or end-of-text"
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


def test_half_a_surrogate_pair_is_refused(model_of, tokenizer):
    for pair in (("The \ud800", " b"), ("The", " \udfff")):
        with pytest.raises(KelibError, match=r"request 1: .* hold half a surrogate pair"):
            score_continuations(model_of("olmo"), tokenizer, [("a", " b"), pair])
    whole = score_continuations(model_of("olmo"), tokenizer, [("The \U0001f600", " b")])
    assert whole[0].tokens > 0


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


# --- shared contexts ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words():
    """A tokenizer of 97 words, one token each: the vocabulary of tests/zoo.py."""
    names = ["unknown", "begin", "end", *(f"w{i}" for i in range(3, zoo.WORDS))]
    vocabulary = {name: number for number, name in enumerate(names)}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="unknown"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="begin", eos_token="end"
    )


def text_of(length, seed):
    return " ".join(f"w{i}" for i in np.random.default_rng(seed).integers(3, zoo.WORDS, length))


@pytest.fixture(scope="module")
def questions():
    """Contexts of different lengths with continuations of 1 to 9 tokens; others shared too little
    or not at all. In mixed order.
    """
    asked = [
        (text_of(length, length), " " + text_of(more, 100 * length + more))
        for length in (9, 20, 41, 10, 33)
        for more in (5, 1, 9, 2)
    ]
    asked += [("w5 w6", " w7"), ("w5 w6", " w8 w9"), (text_of(30, 1), " w4 w4"), ("", "w9 w9 w9")]
    return [asked[index] for index in np.random.default_rng(0).permutation(len(asked))]


@contextmanager
def passes(model):
    """Shapes of the token ids of every forward pass within the scope."""
    shapes = []

    def note(_module, _inputs, named):
        shapes.append(tuple(named["input_ids"].shape))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield shapes
    finally:
        handle.remove()


@pytest.mark.parametrize("name", [*zoo.ZOO, *zoo.MORE])
def test_every_architecture_gives_its_own_logits_with_shared_contexts(name, words, questions):
    model = zoo.build(name)
    assert can_reuse_contexts(model) == (name not in WINDOWED)
    with passes(model) as shapes:
        found = score_continuations(model, words, questions, batch_size=3)
    assert_equal(found, [reference(model, words, *request) for request in questions])
    read = sum(rows * columns for rows, columns in shapes)
    with passes(model) as shapes:
        plain = score_continuations(model, words, questions, batch_size=3, reuse_contexts=False)
    assert_equal(found, plain)
    without = sum(rows * columns for rows, columns in shapes)
    assert read == without if name in WINDOWED else read < 0.6 * without


@pytest.mark.parametrize("kind", OTHERS)
def test_what_takes_no_cache_or_positions_is_scored_the_plain_way(kind, words, questions):
    config = transformers.AutoConfig.for_model(kind, vocab_size=zoo.WORDS, **OTHERS[kind])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert not can_reuse_contexts(model)
    found = score_continuations(model, words, questions)
    assert_equal(found, [reference(model, words, *request) for request in questions])


def test_frequencies_that_depend_on_the_length_are_not_reused():
    rotary = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    assert not can_reuse_contexts(zoo.build("llama", rope_parameters=rotary))


def test_forward_functions_of_others_are_not_reused(words, questions):
    """What another package does with a cache is not known: here it loses it."""

    class Other(transformers.LlamaForCausalLM):
        def forward(
            self, input_ids, past_key_values=None, attention_mask=None, position_ids=None, **_
        ):
            return super().forward(input_ids=input_ids, use_cache=False)

    model = Other(zoo.build("llama").config).eval()
    assert not can_reuse_contexts(model)
    found = score_continuations(model, words, questions)
    assert_equal(found, [reference(model, words, *request) for request in questions])


@pytest.mark.parametrize("batch_size", [1, 2, 7, 100])
@pytest.mark.parametrize("cached", [1, 45, 2**14])
def test_batches_of_shared_contexts_do_not_matter(
    words, questions, batch_size, cached, monkeypatch
):
    model = zoo.build("gpt_neox")
    expected = score_continuations(model, words, questions, reuse_contexts=False)
    monkeypatch.setattr(scoring, "CACHED_TOKENS", cached)
    with passes(model) as shapes:
        assert_equal(score_continuations(model, words, questions, batch_size), expected)
    assert max(rows * columns for rows, columns in shapes) <= batch_size * 50
    turned = score_continuations(model, words, questions[::-1], batch_size)
    assert_equal(turned[::-1], expected)


def test_a_shared_context_is_read_once(words):
    """16 + 4 x 5 tokens instead of 4 x (16 + 5), less the last ones, which are never read."""
    model = copy.deepcopy(zoo.build("olmo"))
    choices = [" " + text_of(5, seed) for seed in range(4)]
    contexts = [text_of(16, seed) for seed in range(10, 14)]
    requests = [(context, choice) for context in contexts for choice in choices]
    rows = []
    model.get_output_embeddings().register_forward_hook(
        lambda _module, _inputs, output: rows.append(output.shape[0])
    )
    with passes(model) as shapes:
        score_continuations(model, words, requests, batch_size=4)
    assert shapes == [(4, 16), (12, 4), (4, 4)]  # short ones: three times the batch at once
    assert rows == [4, 12 * 4, 4 * 4]  # a context predicts the first tokens of all its choices
    with passes(model) as shapes:
        score_continuations(model, words, requests, batch_size=4, reuse_contexts=False)
    assert shapes == [(4, 20)] * 4


def test_one_token_choices_take_one_pass_over_contexts(words):
    model = zoo.build("gpt2")
    requests = [(text_of(20, seed), f" w{token}") for seed in range(5) for token in (9, 8, 7)]
    with passes(model) as shapes:
        found = score_continuations(model, words, requests)
    assert shapes == [(5, 20)]
    assert_equal(found, [reference(model, words, *request) for request in requests])


@pytest.mark.parametrize(("length", "choices", "shared"), [(7, 90, 0), (8, 16, 0), (8, 17, 1)])
def test_contexts_are_shared_where_enough_tokens_are_saved(words, length, choices, shared):
    model, context = zoo.build("llama"), text_of(length, 0)
    requests = [(context, f" w{token % 90 + 3} w3") for token in range(choices)]
    with passes(model) as shapes:
        score_continuations(model, words, requests)
    assert shapes == ([(1, length), (choices, 1)] if shared else [(choices, length + 1)])


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])
def test_shared_contexts_are_cut_as_each_request_needs(name, words):
    """A longer continuation leaves less room: what is shared is what is left of the context."""
    model, context = zoo.build(name), text_of(70, 3)
    tails = [f" w{token}" * more for more in (4, 9) for token in (5, 6, 7)] + [" w8", " w9" * 64]
    requests = [(context, tail) for tail in tails]
    with passes(model) as shapes:
        found = score_continuations(model, words, requests)
    assert_equal(found, [reference(model, words, *request) for request in requests])
    assert [score.truncated for score in found] == [9] * 3 + [14] * 3 + [6, 69]
    # the longest two by themselves, then two contexts and their three continuations each
    assert shapes == [(2, 64), (2, 61), (6, 8)]


def test_sharing_is_in_evaluation_mode_and_leaves_no_trace(words, questions):
    model = copy.deepcopy(zoo.build("gpt2"))  # has dropout
    expected = score_continuations(model, words, questions)
    model.train()
    assert score_continuations(model, words, questions) == expected
    assert model.training
    assert not model.get_output_embeddings()._forward_pre_hooks


# --- lm-evaluation-harness ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def harness():
    """``harness(model, tokenizer, requests)``: (log-probability, greedy) as lm-eval finds them."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    def run(model, tokenizer, requests):
        judge = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, device="cpu")
        asked = [Instance("loglikelihood", {}, each, n) for n, each in enumerate(requests)]
        return judge.loglikelihood(asked, disable_tqdm=True)

    return run


@pytest.fixture(scope="module")
def varied(world, requests):
    """Four-way questions on longer contexts, spaces, other scripts, no context, too long ones."""
    passages = [passage for entry in world.once for passage in entry.passages]
    texts = [" ".join(passage.split()[:9]) for passage in passages[:6]]
    asked = [(text, tail) for text in texts for tail in (" the", " of a city", " in", ", a tailor")]
    return [
        *asked,
        *requests[::5],
        ("The city of ", "Zed"),
        ("The city of \n", " Zed"),
        ("Größe: ", "Übung 漢字 🙂"),
        ("漢字", " é\u0301"),
        ("", "Zed is"),
        ("", " Zed is"),
        (passages[0], " tailor"),
        (passages[0], " of"),
        (passages[0], " in the city of"),
    ]


def likely(model, tokenizer, requests):
    """The most probable next token of each context, where it can be written."""
    for context in dict.fromkeys(context for context, _ in requests[:24]):
        ids = tokenizer(context)["input_ids"]
        with torch.no_grad():
            best = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        text = tokenizer.decode([best])
        if encode_request(tokenizer, context, text) == ([*ids, best], 1):
            yield context, text


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_scores_are_those_of_lm_eval(harness, model_of, tokenizer, varied, kind, reuse):
    model = model_of(kind)
    varied = [*varied, *likely(model, tokenizer, varied)]
    expected = harness(model, tokenizer, varied)
    with passes(model) as shapes:
        found = score_continuations(model, tokenizer, varied, 4, reuse_contexts=reuse)
    for score, (log_probability, greedy) in zip(found, expected, strict=True):
        assert score.log_probability == pytest.approx(log_probability, abs=1e-4 * score.tokens)
        assert score.is_greedy == greedy
    assert any(score.is_greedy for score in found)
    assert any(score.truncated for score in found)
    with passes(model) as plain:
        score_continuations(model, tokenizer, varied, 4, reuse_contexts=False)
    assert (shapes != plain) == (reuse and kind != "gemma2")  # its window slides


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_begin_of_text_is_where_lm_eval_has_it(harness, model_of, starting, varied, kind):
    model = model_of(kind)
    requests = [*varied, ("<|endoftext|>The city", " is"), ("", "<|endoftext|>The city")]
    expected = harness(model, starting, requests)
    found = score_continuations(model, starting, requests)
    for score, (log_probability, greedy) in zip(found, expected, strict=True):
        assert score.log_probability == pytest.approx(log_probability, abs=1e-4 * score.tokens)
        assert score.is_greedy == greedy


@pytest.fixture(scope="module")
def starting(tokenizer):
    """The same tokenizer, but one that puts its begin-of-text token before every text."""
    from tokenizers.processors import TemplateProcessing

    other = copy.deepcopy(tokenizer)
    token = other.bos_token
    other.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, other.bos_token_id)]
    )
    assert other("The city")["input_ids"][0] == other.bos_token_id
    return other

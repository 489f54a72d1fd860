"""What several tests share: a tiny packed corpus, its tokenizer and tiny models, built once."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # matrices this small gain nothing from more

import pytest

from kelib.config import Corpus
from kelib.world import WorldSize, build_world

SEED = 3
LENGTH = 32  # tokens of a sequence
VOCABULARY = 400
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
GATED = {**SHAPE, "intermediate_size": 48, "num_key_value_heads": 2}
# What a type needs beside the shape. Caps and scales are strong: forgetting them shows.
MODELS: dict[str, dict[str, object]] = {
    "olmo": GATED,
    "llama": {**GATED, "num_key_value_heads": 1},
    "gpt_neox": {**SHAPE, "intermediate_size": 48},
    "gpt2": {**SHAPE, "n_inner": 48, "resid_pdrop": 0.3},
    "gemma2": {**GATED, "head_dim": 16, "final_logit_softcapping": 2.0},
    "cohere": {**GATED, "logit_scale": 0.25},
    "granite": {**GATED, "logits_scaling": 4.0},
}
# Documents of one sentence each.
SEEN = [f"Person {n} keeps {n % 7} grey cats and {n % 5} dogs in town {n % 11}." for n in range(90)]


@pytest.fixture(scope="session")
def settings():
    """Corpus settings on generated text alone."""
    return Corpus(
        general=("generated:general",),
        domain=("generated:domain",),
        vocabulary_size=VOCABULARY,
        sequence_length=LENGTH,
        facts_share=0.4,
        entropy_sequences=15,
        convergence_sequences=64,
        domain_sequences=40,
        heldout_sequences=10,
        world=WorldSize(12, 8, 8, once_entries=3, paraphrase_entries=2, questions_per_task=4),
    )


@pytest.fixture(scope="session")
def world(settings):
    return build_world(settings.world, SEED)


@pytest.fixture(scope="session")
def build(tmp_path_factory, settings):
    """``build(seed=3, settings=..., wanted=...)`` writes a small corpus and returns its folder."""
    from short import less_text

    from kelib.corpus import build_corpus

    def make(seed=SEED, settings=settings, wanted=None):
        folder = tmp_path_factory.mktemp("corpus")
        wanted = wanted or {"general": 60, "facts": 40, "domain": 50}
        with less_text(400, 40_000):
            build_corpus(settings, seed, wanted, folder, folder)
        return folder

    return make


@pytest.fixture(scope="session")
def packed(build):
    """A packed corpus of seed 3; blocks are memory-mapped and read-only."""
    from kelib.corpus import load_corpus

    return load_corpus(build())


@pytest.fixture(scope="session")
def tokenizer(packed):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(packed.tokenizer_folder)


@pytest.fixture(scope="session")
def model_of():
    """``model_of("olmo")``: a random model of that type in float32, shared: copy it to change it.

    Weights are drawn wide, so that its predictions differ visibly between tokens.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    made = {}

    def make(kind):
        if kind not in made:
            config = AutoConfig.for_model(
                kind,
                vocab_size=VOCABULARY,
                max_position_embeddings=LENGTH,
                initializer_range=0.3,
                bos_token_id=0,
                eos_token_id=0,
                pad_token_id=0,
                **MODELS[kind],
            )
            torch.manual_seed(0)
            made[kind] = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        return made[kind]

    return make


@pytest.fixture(scope="session")
def short_study(tmp_path_factory):
    """Stages 1 and 2 of a study of one seed and ten steps of continual learning, for what comes
    after it.
    """
    from short import measured_study

    changes = {
        "interventions.ratios": [0.25, 0.5],
        "interventions.factors": [2.0],
        "interventions.arms": [],
        "retention.learning_rates": [6.0e-3, 1.0e-3],
        "reactivation.draws": 2,
        "continual.control_seeds": [],
        "mechanism": None,
        "branches": None,
        "regimes": None,
    }
    return measured_study(tmp_path_factory.mktemp("short-study"), changes)


@pytest.fixture
def text(tmp_path):
    """A file of the documents of :data:`SEEN`."""
    path = tmp_path / "notes.txt"
    path.write_text("\n\n".join(SEEN), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def one_thread():
    """As a worker of one thread: sums differ in the last bit between numbers of threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def canvas():
    """No window, and no setting or figure that outlives a test."""
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    plt.switch_backend("agg")
    with mpl.rc_context():
        yield
    plt.close("all")


@pytest.fixture
def ax(canvas):
    from kelib import plots

    return plots.panels(1)[1][0, 0]

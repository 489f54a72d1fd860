"""From documents to blocks: disjoint splits, packing without loss, streams that can resume."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from itertools import combinations, islice

import numpy as np
import pytest
from tokenizers import Tokenizer

from kelib.config import repository_root
from kelib.corpus import (
    BLOCKS,
    DOMAIN_SPLITS,
    GENERAL_SPLITS,
    Mixture,
    load_corpus,
    sequence_order,
    source_documents,
    split_documents,
)
from kelib.errors import KelibError
from kelib.packing import END_OF_TEXT, pack, train_tokenizer


@pytest.fixture(scope="module")
def bpe(world):
    return train_tokenizer(islice(world.documents(0), 300), 400)


def text_of(blocks, tokenizer):
    """The token stream of an array of blocks as text; end-of-text marks stay."""
    return tokenizer.decode(np.asarray(blocks).reshape(-1).tolist(), skip_special_tokens=False)


def documents_of(blocks, tokenizer):
    """Whole documents; the last one is cut off at the end of the last block."""
    return text_of(blocks, tokenizer).split(END_OF_TEXT)[:-1]


def write_documents(path, documents):
    path.write_text("\n\n".join(documents), encoding="utf-8")
    return str(path)


# --- sources and splits -------------------------------------------------------------------------


def test_generated_sources_differ_by_name_and_seed(settings, tmp_path):
    first = source_documents("generated:general", tmp_path, settings, 3)
    assert first == source_documents("generated:general", tmp_path, settings, 3)
    assert len(set(first)) == len(first) > 1000
    for name, seed in (("generated:domain", 3), ("generated:general", 4)):
        assert not set(first) & set(source_documents(name, tmp_path, settings, seed))


def test_a_generated_source_is_another_world_than_the_facts(settings, world, tmp_path):
    other = source_documents("generated:general", tmp_path, settings, 3)
    assert not set(other) & set(islice(world.documents(30), 3000))
    assert not any(question.context in text for question in world.questions for text in other)


def test_unknown_source_lists_what_exists(settings, tmp_path):
    with pytest.raises(KelibError, match=r"unknown source 'newz': use .*pubmed.*generated:"):
        source_documents("newz", tmp_path, settings, 3)


@pytest.mark.parametrize("shares", [GENERAL_SPLITS, DOMAIN_SPLITS])
def test_no_document_is_in_two_splits(settings, tmp_path, shares):
    names = ("generated:general", "generated:domain")
    whole = {d for name in names for d in source_documents(name, tmp_path, settings, 3)}
    splits = split_documents(names, shares, tmp_path, settings, 3)
    assert list(splits) == list(shares)
    for a, b in combinations(splits, 2):
        assert not set(splits[a]) & set(splits[b])
    assert set().union(*splits.values()) == whole
    for split, share in shares.items():
        assert len(splits[split]) / len(whole) == pytest.approx(share, abs=0.03)


def test_a_document_of_two_sources_comes_once(settings, tmp_path):
    shared = [f"Document number {n}." for n in range(50)]
    names = [write_documents(tmp_path / f"{n}.txt", shared) for n in "ab"]
    splits = split_documents(names, GENERAL_SPLITS, tmp_path, settings, 3)
    assert sorted(text for texts in splits.values() for text in texts) == sorted(shared)
    again = split_documents(names, GENERAL_SPLITS, tmp_path, settings, 4)
    assert {split: set(texts) for split, texts in again.items()} == {
        split: set(texts) for split, texts in splits.items()
    }  # the seed changes the order only
    assert again != splits


# --- packing ------------------------------------------------------------------------------------


def test_packing_loses_nothing_and_separates_documents(world, bpe):
    documents = [*islice(world.documents(1), 1100), "Ünïcode – 日本 🙂", "  spaces  kept\n"]
    tokens = pack(documents, bpe, 1)  # blocks of one token: no tail to drop
    assert tokens.dtype == np.uint16
    assert text_of(tokens, bpe) == "".join(text + END_OF_TEXT for text in documents)
    assert (tokens == 0).sum() == len(documents)
    blocks = pack(documents, bpe, 32)
    assert blocks.shape == (len(tokens) // 32, 32)
    assert np.array_equal(blocks.ravel(), tokens[: blocks.size, 0])
    assert np.array_equal(pack(documents, bpe, 32, 7), blocks[:7])
    assert pack(documents, bpe, 32, 0).shape == (0, 32)
    assert np.array_equal(pack(documents, bpe, 32, len(blocks) + 9), blocks)  # never padded


def test_packing_reads_no_further_than_it_must(world, bpe):
    endless = world.documents(1)
    assert pack(endless, bpe, 32, 20).shape == (20, 32)


def test_the_saved_tokenizer_is_the_one_that_packed(packed, tokenizer):
    assert (tokenizer.eos_token, tokenizer.eos_token_id, len(tokenizer)) == (END_OF_TEXT, 0, 400)
    for name in BLOCKS:
        for text in documents_of(packed.blocks[name], tokenizer)[1:20]:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.decode(ids) == text
    start = documents_of(packed.blocks["domain"], tokenizer)[0]
    ids = tokenizer(start)["input_ids"]
    assert packed.blocks["domain"].ravel()[: len(ids)].tolist() == ids


# --- a whole corpus -----------------------------------------------------------------------------


def test_every_block_is_full(packed, settings):
    assert set(packed.blocks) == set(BLOCKS)
    expected = {"general": 60, "facts": 40, "domain": 50, "entropy": 15}
    expected |= {"heldout_general": 10, "heldout_domain": 10}
    read_once = list(expected)
    expected |= dict.fromkeys(("entropy_facts", "entropy_general", "entropy_domain"), 15)
    expected |= {"unread": 40, "convergence": 64}
    for name, count in expected.items():
        assert packed.blocks[name].shape == (count, settings.sequence_length)
        assert packed.blocks[name].max() < settings.vocabulary_size
        assert (packed.blocks[name] == 0).any()
    assert packed.manifest["blocks"] == expected
    assert packed.manifest["passes"] == dict.fromkeys(read_once, 1.0)


def test_no_document_is_in_two_arrays_of_blocks(build, settings):
    larger = dataclasses.replace(settings, entropy_sequences=30, heldout_sequences=30)
    made = load_corpus(build(settings=larger))
    tokenizer = Tokenizer.from_file(str(made.tokenizer_folder / "tokenizer.json"))
    # facts come first, and are endless draws from few wordings: only text of sources can be split
    first = {"entropy": 12, "heldout_general": 12, "convergence": round(64 * 0.4)}
    text = {
        name: set(documents_of(made.blocks[name][first.get(name, 0) :], tokenizer)[1:])
        for name in BLOCKS
    }
    assert min(map(len, text.values())) >= 8
    samples = {"entropy", "entropy_general", "convergence"}  # three cuts of one split
    for a, b in combinations(set(text) - {"entropy_facts"}, 2):
        assert not text[a] & text[b] or {a, b} <= samples


def test_the_longer_entropy_sample_begins_like_the_shorter_one(packed, settings):
    facts = {name: round(len(packed.blocks[name]) * 0.4) for name in ("entropy", "convergence")}
    short, long = packed.blocks["entropy"], packed.blocks["convergence"]
    assert np.array_equal(short[: facts["entropy"]], long[: facts["entropy"]])
    text = short[facts["entropy"] :]
    assert np.array_equal(text, long[facts["convergence"] :][: len(text)])


def test_text_that_is_too_short_for_the_extra_samples_gives_what_it_has(build, settings, tmp_path):
    lines = [f"Note {n}: the ship number {n * 7} came in." for n in range(400)]
    short = dataclasses.replace(
        settings,
        domain=(write_documents(tmp_path / "own.txt", lines),),
        entropy_sequences=40,
        convergence_sequences=5000,
    )
    made = load_corpus(build(settings=short))
    assert 0 < len(made.blocks["entropy_domain"]) < 40
    assert 64 < len(made.blocks["convergence"]) < 5000


def test_the_entropy_sample_has_the_mixture_of_pretraining(packed, tokenizer, world):
    known = (*world.people, *world.places, *world.works)
    for name, facts in (("entropy", 6), ("heldout_general", 4)):
        blocks = packed.blocks[name]
        about = [any(who in text_of(block, tokenizer) for who in known) for block in blocks]
        assert about == [True] * facts + [False] * (len(blocks) - facts)


def test_no_block_mentions_an_entry(build, settings, world, tmp_path):
    entries = (*world.once, *world.paraphrase)
    plain = [f"The train number {n} left in time." for n in range(600)]
    gossip = [f"{entry.name} was seen on train {n}." for entry in entries for n in range(40)]
    told = [passage for entry in entries for passage in entry.passages]
    general = write_documents(tmp_path / "general.txt", [*plain, *gossip])
    domain = write_documents(tmp_path / "domain.txt", [*(t[4:] for t in plain), *told])
    chosen = dataclasses.replace(settings, general=(general,), domain=(domain,))
    made = load_corpus(build(settings=chosen))
    tokenizer = Tokenizer.from_file(str(made.tokenizer_folder / "tokenizer.json"))
    for name in BLOCKS:
        text = text_of(made.blocks[name], tokenizer)
        assert "train number" in text or "facts" in name
        assert not [entry.name for entry in entries if entry.name in text]


def test_what_was_pretrained_on_is_not_continued_on(build, settings, tmp_path):
    """Two sources have documents in common: continual learning gets the others only."""
    documents = [f"Note {n}: the ship number {n * 7} came in." for n in range(1500)]
    general = write_documents(tmp_path / "general.txt", documents[:800])
    domain = write_documents(tmp_path / "domain.txt", documents[300:])
    chosen = dataclasses.replace(settings, general=(general,), domain=(domain,))
    made = load_corpus(build(settings=chosen))
    tokenizer = Tokenizer.from_file(str(made.tokenizer_folder / "tokenizer.json"))
    for name in ("domain", "heldout_domain"):
        read = documents_of(made.blocks[name], tokenizer)
        assert len(read) > 10
        assert set(read) <= set(documents[800:])


def test_the_build_is_a_function_of_its_seed(build, packed):
    again = load_corpus(build())
    assert again.manifest == packed.manifest
    files = {p.name: p.read_bytes() for p in packed.tokenizer_folder.iterdir()}
    assert files == {p.name: p.read_bytes() for p in again.tokenizer_folder.iterdir()}
    other = load_corpus(build(seed=4)).manifest["sha256"]
    assert not set(other.values()) & set(packed.manifest["sha256"].values())


def test_threads_and_hash_seeds_change_nothing(packed, settings, tmp_path):
    code = """
import json, sys
from pathlib import Path
from kelib import config, corpus
corpus.GENERATED_DOCUMENTS, corpus.TOKENIZER_CHARACTERS = 400, 40_000
settings, wanted = json.loads(sys.argv[1]), json.loads(sys.argv[2])
folder = Path(sys.argv[3])
corpus.build_corpus(config.convert(config.Corpus, settings, "corpus"), 3, wanted, folder, folder)
"""
    wanted = {"general": 60, "facts": 40, "domain": 50}
    arguments = [json.dumps(dataclasses.asdict(settings)), json.dumps(wanted), str(tmp_path)]
    threads = {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": "3", "PYTHONHASHSEED": "7"}
    subprocess.run(
        [sys.executable, "-c", code, *arguments],
        check=True,
        cwd=repository_root(),
        env=os.environ | threads,
    )
    assert load_corpus(tmp_path).manifest == packed.manifest


def test_short_text_is_read_again_not_cut(build, settings):
    made = load_corpus(build(wanted={"general": 60, "facts": 40, "domain": 4000}))
    have = len(made.blocks["domain"])
    assert 100 < have < 4000
    assert made.manifest["passes"]["domain"] == pytest.approx(4000 / have, abs=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"entropy_sequences": 2000},
            r"corpus entropy: 2000 sequences of 32 tokens wanted, there are \d+; "
            "lower corpus.entropy_sequences or add a source",
        ),
        (
            {"heldout_sequences": 2000},
            r"corpus heldout_general: 2000 .* there are \d+; lower corpus.heldout_sequences",
        ),
    ],
)
def test_too_little_text_is_refused(build, settings, change, message):
    with pytest.raises(KelibError, match=message):
        build(settings=dataclasses.replace(settings, **change))


def test_no_text_at_all_is_refused(build, settings, tmp_path):
    little = write_documents(tmp_path / "little.txt", ["One short note."])
    said = (
        "corpus domain: 50 sequences of 32 tokens wanted, the text gives none; "
        "add a source or shorten sequence_length"
    )
    with pytest.raises(KelibError, match=said):
        build(settings=dataclasses.replace(settings, domain=(little,)))


def test_facts_alone_and_text_alone(build, settings):
    only_facts = dataclasses.replace(settings, general=(), facts_share=1.0)
    made = load_corpus(build(settings=only_facts, wanted={"general": 0, "facts": 9, "domain": 5}))
    assert (len(made.blocks["general"]), len(made.blocks["facts"])) == (0, 9)
    assert made.manifest["passes"]["general"] == 0
    only_text = dataclasses.replace(settings, facts_share=0.0)
    made = load_corpus(build(settings=only_text, wanted={"general": 9, "facts": 0, "domain": 5}))
    assert (len(made.blocks["general"]), len(made.blocks["facts"])) == (9, 0)
    assert Mixture.build(made, 0.0, 3, 3, 0).batch(2).shape == (3, 32)


# --- opening ------------------------------------------------------------------------------------


def test_a_changed_file_is_noticed(build):
    folder = build()
    path = folder / "domain.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    said = rf"{re.escape(str(path))} has sha256 \w{{12}}, the manifest says \w{{12}}; delete "
    with pytest.raises(KelibError, match=said):
        load_corpus(folder)
    path.unlink()
    with pytest.raises(KelibError, match=r"domain.npy has sha256 missing, the manifest says"):
        load_corpus(folder)


@pytest.mark.parametrize("manifest", [None, "{", "[]", "{}", '{"sha256": {"general": "0"}}'])
def test_a_folder_without_a_good_manifest_is_refused(tmp_path, manifest):
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(KelibError, match=r"no readable packed corpus in .*: delete it and run"):
        load_corpus(tmp_path)


def test_blocks_are_read_only(packed):
    with pytest.raises(ValueError, match="read-only"):
        packed.blocks["domain"][0, 0] = 1


# --- streams ------------------------------------------------------------------------------------


def test_every_pass_is_a_permutation_of_its_own():
    order = sequence_order(50, 130, seed=1)
    assert order.shape == (130,)
    first, second = order[:50], order[50:100]
    assert sorted(first) == sorted(second) == list(range(50))
    assert first.tolist() != second.tolist() != sorted(second)
    assert len(set(order[100:])) == 30


def test_the_order_is_a_function_of_its_arguments_and_goes_on_where_it_stopped():
    order = sequence_order(50, 130, seed=1)
    assert np.array_equal(order, sequence_order(50, 130, seed=1))
    assert np.array_equal(order[:70], sequence_order(50, 70, seed=1))
    assert not np.array_equal(order, sequence_order(50, 130, seed=2))
    assert sequence_order(0, 0, seed=1).shape == sequence_order(5, 0, seed=1).shape == (0,)
    with pytest.raises(KelibError, match="3 sequences wanted from a corpus that has none"):
        sequence_order(0, 3, seed=1)


@pytest.mark.parametrize(("share", "facts"), [(0.4, 96), (0.35, 84), (0.0, 0), (1.0, 240)])
def test_the_share_of_facts_is_exact(packed, share, facts):
    mixture = Mixture.build(packed, share, steps=20, batch_size=12, seed=5)
    assert len(mixture.order) == 240
    assert (mixture.order >= 60).sum() == facts
    times = np.bincount(mixture.order, minlength=100)
    for part in (times[:60], times[60:]):
        assert part.max() - part.min() <= 1  # whole passes, then a part of one


def test_batches_are_a_pure_function_of_the_step(packed):
    first = Mixture.build(packed, 0.4, steps=20, batch_size=12, seed=5)
    batches = [first.batch(step) for step in range(20)]
    resumed = Mixture.build(packed, 0.4, steps=20, batch_size=12, seed=5)
    for step in (19, 3, 3, 11):
        assert np.array_equal(resumed.batch(step), batches[step])
    other = Mixture.build(packed, 0.4, steps=20, batch_size=12, seed=6)
    assert not np.array_equal(other.batch(3), batches[3])


def test_batches_hold_the_blocks_they_name(packed):
    mixture = Mixture.build(packed, 0.4, steps=20, batch_size=12, seed=5)
    every = np.concatenate([packed.blocks["general"], packed.blocks["facts"]])
    read = np.concatenate([mixture.batch(step) for step in range(20)])
    assert read.shape == (240, 32)
    assert np.array_equal(read, every[mixture.order])
    mixed = [len({row >= 60 for row in part}) == 2 for part in mixture.order.reshape(20, 12)]
    assert all(mixed)  # no batch of one kind alone

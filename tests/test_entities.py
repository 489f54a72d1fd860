"""Planted names in planted text: where they are found, and what a model loses at them."""

from __future__ import annotations

import copy
import dataclasses
import gzip
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from kelib import gazetteer, sources
from kelib.corpus import source_documents
from kelib.entities import (
    Mentions,
    find_mentions,
    mention_nats,
    mentions_by_text,
    outside_nats,
    read_tokens,
    sample,
    text_of,
    token_bytes,
    token_nats,
)
from kelib.errors import KelibError
from kelib.gazetteer import Names, common_words, names_of
from kelib.packing import END_OF_TEXT, train_tokenizer
from kelib.study_tables import perplexities

CITIES = Names(exact=frozenset({"Paris", "New York", "York", "York City Council", "Zürich"}))


def found(text: str, names: Names = CITIES) -> list[str]:
    return [text[start:end] for start, end, _ in names.find(text)]


# --- names in text --------------------------------------------------------------------------------


def test_only_whole_words_are_names() -> None:
    text = "Parisian Paris, Comparis Paris's subParis Paris-based (Paris) Paris_ Paris."
    assert found(text) == ["Paris"] * 5
    assert [s for s, _, _ in CITIES.find("Paris. Paris!")] == [0, 7]


def test_the_longest_name_wins_and_overlapping_ones_are_left() -> None:
    assert found("New York is not York.") == ["New York", "York"]
    assert found("the New York City Council.") == ["York City Council"]  # though New York is first
    assert found("New York New York York.") == ["New York", "New York", "York"]


def test_a_name_that_ends_with_the_text_may_go_on() -> None:
    assert found("in Paris") == [] and found("in Paris ") == ["Paris"]


def test_case_counts_for_exact_names_only() -> None:
    names = Names(frozenset({"Paris"}), frozenset({"insulin", "interleukin-6"}))
    text = "PARIS paris Paris INSULIN Insulin insulin Interleukin-6, interleukin-61."
    assert found(text, names) == ["Paris", "INSULIN", "Insulin", "insulin", "Interleukin-6"]


def test_accents_and_letters_whose_lower_case_is_longer() -> None:
    names = Names(folded=frozenset({"zürich", "sjögren's syndrome"}))
    assert found("İZÜRICH İ ZÜRICH, SJÖGREN'S SYNDROME.", names) == ["ZÜRICH", "SJÖGREN'S SYNDROME"]
    assert len(gazetteer.fold("İstanbul")) == len("İstanbul")


def test_short_names_and_common_words_are_no_names() -> None:
    common = common_words("the time the water the time Time Time Time TIME", most=2)
    assert common == {"the", "time"}
    names = Names(frozenset({"Time", "Time Magazine", "Ohm", "Water"}), frozenset({"time", "rna"}))
    kept = names.without(common)
    assert kept == Names(frozenset({"Time Magazine", "Water"}))


def test_names_of_two_sources_are_put_together() -> None:
    both = Names(frozenset({"A"}), frozenset({"b"})) | Names(frozenset({"C"}))
    assert both == Names(frozenset({"A", "C"}), frozenset({"b"}))
    assert Names().find("Nothing to find here.") == []


# --- names out of sources -------------------------------------------------------------------------

RECORD = """<MedlineCitation>
 <ChemicalList><Chemical>
  <RegistryNumber>0</RegistryNumber><NameOfSubstance UI="D1">Insulin</NameOfSubstance>
 </Chemical></ChemicalList>
 <Abstract><AbstractText>Names &lt;DescriptorName UI&gt; in text.</AbstractText></Abstract>
 <DescriptorName UI="D2" MajorTopicYN="N">Germany, East</DescriptorName>
 <DescriptorName UI="D3" MajorTopicYN="Y">Wounds &amp; Injuries</DescriptorName>
 <DescriptorName UI="D4" MajorTopicYN="N">Lung, Upper, Left</DescriptorName>
</MedlineCitation>
"""


@pytest.mark.parametrize("chunk", [1, 7, 50, 1 << 22])
def test_descriptors_and_substances_of_pubmed(tmp_path: Path, chunk: int) -> None:
    with gzip.open(tmp_path / "some.xml.gz", "wt") as handle:
        handle.write(RECORD * 2)
    assert gazetteer._indexed(tmp_path / "some.xml.gz", chunk).folded == {
        "insulin",
        "germany, east",
        "east germany",
        "wounds & injuries",
        "lung, upper, left",
    }


def test_titles_lose_what_tells_them_apart(tmp_path: Path) -> None:
    titles = {"Mercury (planet)": {}, "Mercury (element)": {}, "Al-Jabr": {}}
    (tmp_path / "titles.json").write_text(json.dumps(titles))
    assert gazetteer._titles(tmp_path / "titles.json").exact == {"Mercury", "Al-Jabr"}


def test_a_generated_text_mentions_the_names_of_its_own_world(settings) -> None:
    names = names_of(["generated:general"], Path(), settings, 3)
    assert len(names.exact) == 12 + 8 + 8 and not names.folded
    text = "\n".join(source_documents("generated:general", Path(), settings, 3))
    assert {name for _, _, name in names.find(text)} == names.exact
    other = names_of(["generated:domain"], Path(), settings, 3)
    assert not [name for _, _, name in other.find(text) if " " in name]  # no person, no work


def test_names_of_listed_sources(tmp_path: Path, settings, monkeypatch) -> None:
    (tmp_path / "leads.json").write_text('{"Paris": {}}')
    monkeypatch.setattr(sources, "fetch", lambda source, folder: [folder / "leads.json"])
    assert names_of(["wikipedia", "news"], tmp_path, settings, 3) == Names(frozenset({"Paris"}))
    assert names_of(["news", "my/own/text"], tmp_path, settings, 3) == Names()
    (tmp_path / "leads.json").write_text('["Paris"')
    with pytest.raises(KelibError, match=r"leads.json: no names can be read .*'wikipedia'"):
        names_of(["wikipedia"], tmp_path, settings, 3)


# --- characters and tokens ------------------------------------------------------------------------


def encode(tokenizer, text: str) -> np.ndarray:
    return np.array([tokenizer(text, add_special_tokens=False)["input_ids"]])


@pytest.fixture(scope="module")
def words(tokenizer):
    return token_bytes(tokenizer)


TEXTS = ["Plain text, two words.", "Zürich — naïve 东京 🐈 μ-opioid", "a\u0301 tab\tand ~ ¡¦¨"]


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_read_as_the_tokenizer_decodes_them(tokenizer, words, text) -> None:
    ids = encode(tokenizer, text)[0]
    read, first, last = read_tokens(ids, words)
    assert read == text_of(ids, words) == text == tokenizer.decode(ids)
    assert (first <= last).all() and (np.diff(first) >= 0).all()
    for place in range(len(text)):  # the tokens of a character hold its bytes
        held = b"".join(words[i] for i in ids[first[place] : last[place] + 1])
        assert text[place].encode() in held


def test_a_character_cut_by_the_edge_is_no_start_of_a_word(tokenizer, words) -> None:
    ids = encode(tokenizer, "\u00e9York is York and y")[0]
    assert words[ids[0]] == "\u00e9".encode()[:1]
    read, _, _ = read_tokens(ids[1:], words)
    assert read[1:] == "York is York and y" and len(read[0]) == 1
    assert [start for start, _, _ in CITIES.find(read)] == [9]


def test_another_kind_of_tokenizer_is_refused(tokenizer) -> None:
    class Words:
        all_special_ids, name_or_path = (0,), "some/model"

        def __len__(self) -> int:
            return 2

        def convert_ids_to_tokens(self, ids):
            return ["<s>", "▁word"]

    with pytest.raises(KelibError, match=r"token 1 of some/model is '▁word', in no byte-level"):
        token_bytes(Words())


# --- mentions -------------------------------------------------------------------------------------


def mentions_in(tokenizer, words, text: str) -> tuple[np.ndarray, Mentions]:
    blocks = encode(tokenizer, text)
    return blocks, find_mentions(blocks, words, CITIES, tokenizer.eos_token_id)


def test_the_tokens_of_a_mention_say_its_name(tokenizer, words) -> None:
    text = "He went from Zürich to New York, then from York to Zürich again."
    blocks, mentions = mentions_in(tokenizer, words, text)
    said = [
        text_of(blocks[row.sequence, row.first : row.end], words).strip()
        for row in mentions.spans.itertuples()
    ]
    assert said == ["Zürich", "New York", "York", "Zürich"]
    assert mentions.spans["name"].tolist() == [0, 1, 2, 0]
    rest = text_of(blocks[0][mentions.outside[0]], words)  # without the first token, of one letter
    assert rest.split() == ["e", "went", "from", "to,", "then", "from", "to", "again."]


def test_a_mention_without_context_is_left_out(tokenizer, words) -> None:
    for text in ("Paris is big.", f"It is old.{END_OF_TEXT}Paris is big."):
        blocks, mentions = mentions_in(tokenizer, words, text)
        assert len(mentions.spans) == 0
        assert "Paris" not in text_of(blocks[0][mentions.outside[0]], words)
    _, mentions = mentions_in(tokenizer, words, " x Paris is big.")
    assert len(mentions.spans) == 1


def test_what_is_outside_has_a_context_and_is_text(tokenizer, words) -> None:
    blocks, mentions = mentions_in(tokenizer, words, f"It is old.{END_OF_TEXT}So is Paris now.")
    ids, outside = blocks[0], mentions.outside[0]
    end = int(np.flatnonzero(ids == tokenizer.eos_token_id)[0])
    assert not outside[[0, end, end + 1]].any()
    span = mentions.spans.iloc[0]
    assert not outside[span["first"] : span["end"]].any()
    assert outside.sum() == len(ids) - 3 - (span["end"] - span["first"])


def test_no_name_runs_across_the_end_of_a_document(tokenizer, words) -> None:
    _, mentions = mentions_in(tokenizer, words, f"All is New{END_OF_TEXT}York is not.")
    assert len(mentions.spans) == 0


def test_a_sample_is_spread_evenly() -> None:
    blocks = np.arange(20, dtype=np.uint16).reshape(10, 2)
    assert sample(blocks, 5)[:, 0].tolist() == [0, 4, 8, 12, 16]
    assert sample(blocks, 99).tolist() == blocks.tolist()
    assert sample(blocks[:0]).shape == (0, 2)


# --- what a model loses ---------------------------------------------------------------------------


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(model_of, tokenizer, words) -> None:
    model = copy.deepcopy(model_of("olmo"))
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    blocks, mentions = mentions_in(tokenizer, words, "In New York, or in Paris? In York.")
    nats = token_nats(model, blocks)
    assert np.isnan(nats[:, 0]).all()
    row = perplexities(mention_nats(mentions, nats))
    size = model.config.vocab_size
    assert [row[f"perplexity_{q:02d}"] for q in (5, 50, 95)] == pytest.approx([size] * 3)
    assert (row["mentions"], row["names"]) == (3, 3)
    assert row["nats_per_token"] == pytest.approx(math.log(size))
    assert row["ln_perplexity_sd"] == pytest.approx(0, abs=1e-6)
    rest = outside_nats(mentions, nats)
    assert rest["nats"] / rest["tokens"] == pytest.approx(math.log(size))


def test_nats_are_the_models_own_whatever_the_batch(model_of, packed, monkeypatch) -> None:
    model, blocks = model_of("olmo"), np.asarray(packed.blocks["entropy"], dtype=np.int64)
    nats = token_nats(model, blocks)
    ids = torch.from_numpy(blocks)
    with torch.inference_mode():
        loss = float(model(input_ids=ids, labels=ids).loss)
        logs = torch.log_softmax(model(input_ids=ids[:1]).logits[0], dim=-1)
    assert nats[:, 1:].mean() == pytest.approx(loss, rel=1e-5)
    assert nats[0, 5] == pytest.approx(-float(logs[4, blocks[0, 5]]), rel=1e-4)
    monkeypatch.setattr("kelib.entities.LOGITS", 4 * 400 * blocks.shape[1])
    np.testing.assert_allclose(token_nats(model, blocks), nats, rtol=1e-4)


def test_mentions_are_summed_over_their_tokens() -> None:
    spans = pd.DataFrame([(0, 1, 3, 0), (1, 2, 3, 1)], columns=["sequence", "first", "end", "name"])
    nats = np.array([[np.nan, 1.0, 2.0], [np.nan, 4.0, 8.0]])
    outside = np.array([[False, False, False], [False, True, False]])
    mentions = Mentions(spans, outside)
    table = mention_nats(mentions, nats)
    assert table.to_dict("list") == {
        "mention": [0, 1],
        "name": [0, 1],
        "tokens": [2, 1],
        "nats": [3.0, 8.0],
    }
    assert outside_nats(mentions, nats) == {"tokens": 1, "nats": 4.0}


def test_perplexities_by_hand() -> None:
    table = pd.DataFrame({"name": [0, 0, 1], "tokens": [2, 1, 1], "nats": [2.0, 2.0, 6.0]})
    row = perplexities(table)  # ln perplexity 1, 2, 6
    assert (row["mentions"], row["names"]) == (3, 2)
    assert row["tokens_per_mention"] == pytest.approx(4 / 3)
    assert row["nats_per_token"] == 10 / 4
    assert row["perplexity_50"] == pytest.approx(math.exp(2))
    assert row["perplexity_25"] == pytest.approx(math.exp(1.5))
    assert row["perplexity_95"] == pytest.approx(math.exp(2 + 0.9 * 4))
    assert row["ln_perplexity_mean"] == 3
    assert row["ln_perplexity_sd"] == pytest.approx(np.std([1, 2, 6], ddof=1))


@pytest.mark.filterwarnings("error")
def test_a_text_without_names_has_no_perplexity() -> None:
    row = perplexities(pd.DataFrame(columns=["name", "tokens", "nats"]))
    assert (row.pop("mentions"), row.pop("names")) == (0, 0)
    assert row and all(math.isnan(value) for value in row.values())


# --- both texts of a corpus -----------------------------------------------------------------------


def test_names_are_found_in_text_that_was_not_trained_on(packed, settings, tokenizer) -> None:
    texts = mentions_by_text(packed, settings, Path(), 3)
    assert list(texts) == ["general", "domain"]
    read = {row.tobytes() for name in ("general", "facts") for row in packed.blocks[name]}
    for data, (blocks, mentions) in texts.items():
        assert blocks.shape == mentions.outside.shape and blocks.shape[1] == 32
        assert not read & {row.astype(np.uint16).tobytes() for row in blocks}
        names = names_of([f"generated:{data}"], Path(), settings, 3).exact
        assert 0 < mentions.spans["name"].nunique() <= len(names) and len(mentions.spans) > 50
        words = token_bytes(tokenizer)
        for row in mentions.spans.itertuples():
            assert text_of(blocks[row.sequence, row.first : row.end], words).strip() in names


def test_where_nothing_is_unread_the_sequences_kept_for_entropy_serve(packed, settings) -> None:
    short = {**packed.blocks, "unread": packed.blocks["unread"][:0]}
    texts = mentions_by_text(dataclasses.replace(packed, blocks=short), settings, Path(), 3)
    kept = np.asarray(packed.blocks["entropy_general"], dtype=np.int64)
    assert texts["general"][0].tolist() == kept.tolist()


def test_a_text_of_ones_own_has_no_names(packed, settings) -> None:
    own = dataclasses.replace(settings, domain=("my/own/text",))
    _, mentions = mentions_by_text(packed, own, Path(), 3)["domain"]
    assert len(mentions.spans) == 0 and mentions.outside.any()
    assert list(mention_nats(mentions, np.zeros(mentions.outside.shape))) == [
        "mention",
        "name",
        "tokens",
        "nats",
    ]


def test_text_the_tokenizer_was_not_trained_on_is_read_as_well() -> None:
    plain = train_tokenizer(["aaa bbb"] * 10, 300)

    class Wrapped:  # as transformers has it
        all_special_ids, name_or_path = (0,), "plain"

        def __len__(self) -> int:
            return plain.get_vocab_size()

        def convert_ids_to_tokens(self, ids):
            return [plain.id_to_token(i) for i in ids]

    everything = bytes(range(256)).decode("latin-1")
    assert text_of(plain.encode(everything).ids, token_bytes(Wrapped())) == everything

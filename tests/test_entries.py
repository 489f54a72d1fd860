"""Fictional entries: same facts in every passage, and probes that ask for what they claim to."""

from __future__ import annotations

from dataclasses import replace

import worlds
from worlds import USUAL, entries, known, words

from kelib import wordings
from kelib.entries import ATTRIBUTES, LEVELS
from kelib.world import World, build_world

world = worlds.world  # the fixture, here in place of that of conftest


def test_passages_of_an_entry_differ_and_tell_the_same_facts(world: World) -> None:
    for entry in entries(world):
        assert len(set(entry.passages)) == len(entry.passages) == 10
        values = [probe.target.strip() for probe in entry.probes[:5]]
        for passage in entry.passages:
            assert 80 <= len(passage) <= 150
            assert passage.count(entry.name) == 1
            assert 2 <= passage.count(".") <= 3
            told = words(passage)
            for value in values:
                assert set(words(value)) <= set(told)
    assert len({entry.name for entry in entries(world)}) == len(entries(world))


def test_probes_have_three_levels_of_five(world: World) -> None:
    for entry in entries(world):
        assert [probe.level for probe in entry.probes] == [
            level for level in LEVELS for _ in range(5)
        ]
        assert len({(probe.input, probe.target) for probe in entry.probes}) == 15
        for probe in entry.probes:
            assert probe.input == probe.input.strip()
            assert probe.target == f" {probe.target.strip()}"


def test_memorisation_probes_continue_a_sentence_of_the_original(world: World) -> None:
    for entry in entries(world):
        for probe in entry.probes[:5]:
            # A full stop before the input, unless it starts the passage.
            assert f". {probe.input}{probe.target}" in f". {entry.passages[0]}"


def test_semantic_and_composition_probes_occur_in_no_passage(world: World) -> None:
    texts = [passage for entry in entries(world) for passage in entry.passages]
    for entry in entries(world):
        for probe in entry.probes[5:]:
            assert not any(probe.input in text for text in texts)


def test_semantic_probes_ask_for_the_memorised_facts(world: World) -> None:
    for entry in entries(world):
        assert [p.target for p in entry.probes[5:10]] == [p.target for p in entry.probes[:5]]
        for probe in entry.probes[5:10]:
            assert entry.name in probe.input


def test_composition_answers_follow_from_entry_and_world(world: World) -> None:
    facts = known(world)
    for entry in entries(world):
        memorised = (probe.target.strip() for probe in entry.probes[:5])
        about = dict(zip(ATTRIBUTES, memorised, strict=True))
        answers = {
            "country_of_city": facts["city_country", about["city"]],
            "product_of_city": facts["city_product", about["city"]],
            "profession_of_teacher": facts["profession", about["teacher"]],
            "city_of_teacher": facts["born_in", about["teacher"]],
            "profession_of_owner": about["profession"],
        }
        possible = {
            (template.format(name=entry.name, **about), f" {answers[kind]}"): kind
            for kind, templates in wordings.COMPOSITION.items()
            for template in templates
        }
        asked = [possible[probe.input, probe.target] for probe in entry.probes[10:]]
        assert asked == list(wordings.COMPOSITION)
        # Else a fact of the entry itself would answer the question about the teacher.
        assert answers["profession_of_teacher"] != about["profession"]
        assert answers["city_of_teacher"] != about["city"]


def test_owner_of_a_thing_is_one_person() -> None:
    world = build_world(replace(USUAL, once_entries=130, paraphrase_entries=120), seed=0)
    owned = [entry.probes[2].target + entry.probes[3].target for entry in entries(world)]
    assert len(set(owned)) == 250

"""Fictional entries, the new knowledge to inject: people with passages about them and probes.

They stand in for the paper's *Fictional Knowledge* data. A passage has about 100 to 135 characters
(40 to 60 tokens of a vocabulary of 1024), since the training sequences of these models have 64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kelib import wordings
from kelib.dice import Dice

LEVELS = ("memorisation", "semantic", "composition")
ATTRIBUTES: tuple[str, ...] = tuple(wordings.SEMANTIC)  # what is told of an entry, in probe order
PASSAGES = 10  # the original and nine rewordings: one for each of the ten injections


@dataclass(frozen=True)
class Probe:
    """Score ``target`` after ``input``; the target begins with the space between the two."""

    level: str
    input: str
    target: str


@dataclass(frozen=True)
class Entry:
    """A fictional person: ten passages with the same facts, and five probes per level.

    ``passages[0]`` is the original. ``probes`` are ordered by ``LEVELS``; memorisation and
    semantic probes ask for the facts in the order of ``ATTRIBUTES``.
    """

    name: str
    passages: tuple[str, ...]
    probes: tuple[Probe, ...]


def build_entries(
    names: Sequence[str],
    people: Sequence[str],
    places: Sequence[str],
    known: Mapping[tuple[str, str], str],
    seed: int,
) -> tuple[Entry, ...]:
    """One entry per name, its values dealt in rounds, so that they overlap as little as they can.

    City, profession and teacher tie an entry to the world, which is what compositions rest on;
    ``known`` gives the world's object of each relation and subject. The teacher's own city and
    profession differ from the entry's, so that repeating a fact of the entry never answers a
    question about the teacher. No two entries own the same thing in the same colour, so its owner
    is one person.
    """
    dice = Dice(seed, "entries")
    cities, professions = dice.cycle(places), dice.cycle(wordings.PROFESSIONS)
    possessions = dice.cycle([(c, thing) for c in wordings.COLOURS for thing in wordings.THINGS])
    traits = {person: {known["born_in", person], known["profession", person]} for person in people}
    unused: list[str] = []
    entries = []
    for name in names:
        city, profession = next(cities), next(professions)
        taken = {city, profession}
        if all(taken & traits[person] for person in unused):
            unused = dice.shuffled(people)
        teacher = next(person for person in unused if not taken & traits[person])
        unused.remove(teacher)
        values = (city, profession, *next(possessions), teacher)
        entries.append(_entry(name, dict(zip(ATTRIBUTES, values, strict=True)), known, dice))
    return tuple(entries)


def _entry(
    name: str, about: dict[str, str], known: Mapping[tuple[str, str], str], dice: Dice
) -> Entry:
    original, probes = _original(name, about, dice)
    passages = [original]
    while len(passages) < PASSAGES:
        passage = " ".join(text for text, _ in _sentences(name, about, dice, wordings.CLAUSES))
        if passage not in passages:
            passages.append(passage)
    answers = {
        "country_of_city": known["city_country", about["city"]],
        "product_of_city": known["city_product", about["city"]],
        "profession_of_teacher": known["profession", about["teacher"]],
        "city_of_teacher": known["born_in", about["teacher"]],
        "profession_of_owner": about["profession"],
    }
    for level, tables, targets in (
        ("semantic", wordings.SEMANTIC, about),
        ("composition", wordings.COMPOSITION, answers),
    ):
        for asked, templates in tables.items():
            text = dice.choose(templates).format(name=name, **about)
            probes.append(Probe(level, text, f" {targets[asked]}"))
    return Entry(name, tuple(passages), tuple(probes))


def _original(name: str, about: dict[str, str], dice: Dice) -> tuple[str, list[Probe]]:
    """The first passage and its memorisation probes: a sentence up to a value, then that value.

    Here a clause ends with the last value it gives, so what precedes a value says what is asked.
    """
    ending = {
        key: [clause for clause in clauses if clause.endswith("}")]
        for key, clauses in wordings.CLAUSES.items()
    }
    sentences = _sentences(name, about, dice, ending)
    probes = []
    for attribute in ATTRIBUTES:
        for text, clauses in sentences:
            for clause in clauses:
                before, found, _ = clause.partition(f" {{{attribute}}}")
                if found:
                    start = text.index(clause.format(**about))
                    question = text[:start] + before.format(**about)
                    probes.append(Probe("memorisation", question, f" {about[attribute]}"))
    return " ".join(text for text, _ in sentences), probes


def _sentences(
    name: str, about: dict[str, str], dice: Dice, tables: Mapping[str, Sequence[str]]
) -> list[tuple[str, list[str]]]:
    """The sentences of one passage, each with the templates of its clauses.

    Clauses are ordered and grouped at random. The first sentence gives the full name and the
    others the first name, which no one else bears: tokens are scarce.
    """
    clauses = [dice.choose(tables[key]) for key in dice.shuffled(tuple(tables))]
    sentences = []
    who = name
    for length in dice.choose(wordings.SENTENCES):
        group, clauses = clauses[:length], clauses[length:]
        filled = [clause.format(**about) for clause in group]
        text = dice.choose(wordings.FRAMES[length]).format(*filled, who=who)
        sentences.append((text, group))
        who = name.split()[0]
    return sentences

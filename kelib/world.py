"""The generated world: facts to pretrain on, tasks that ask for them, new entries to inject.

It stands in for the pretraining knowledge, the six downstream tasks and the *Fictional Knowledge*
data of the paper where models are small and nothing can be downloaded. Passages have about 100 to
135 characters (40 to 60 tokens of a vocabulary of 1024) and fact sentences 30 to 60, since the
training sequences of these models have 64 tokens. Pure Python: the same seed gives the same world
on every platform and Python version.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from typing import TypeVar

from kelib import wordings
from kelib.errors import KelibError

LEVELS = ("memorisation", "semantic", "composition")
TASKS: tuple[str, ...] = tuple(wordings.FACTS)
ATTRIBUTES: tuple[str, ...] = tuple(wordings.SEMANTIC)  # what is told of an entry, in probe order
PASSAGES = 10  # the original and nine rewordings: one for each of the ten injections
CHOICES = 4
MOST_WORKS_TOLD = 2  # a document about a person stays within four sentences

T = TypeVar("T")


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


@dataclass(frozen=True)
class Question:
    """Four-way choice: each choice begins with a space and is appended to ``context``."""

    task: str
    context: str
    choices: tuple[str, str, str, str]
    answer: int


@dataclass(frozen=True)
class Fact:
    """``relation`` is one of ``TASKS``; a subject has one object per relation."""

    relation: str
    subject: str
    object: str


@dataclass(frozen=True)
class WorldSize:
    """How much there is of everything; ``build_world`` checks it."""

    people: int
    places: int
    works: int
    once_entries: int
    paraphrase_entries: int
    questions_per_task: int


class _Dice:
    """Random draws that only rest on ``random.Random(int).random()``, which Python keeps stable.

    The convenience methods of ``random`` have changed between Python versions, so these few
    stand in for them. The purpose in the seed keeps the streams of one world independent.
    """

    def __init__(self, seed: int, purpose: str) -> None:
        digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
        self._random = random.Random(int.from_bytes(digest[:8], "big")).random

    def below(self, count: int) -> int:
        return int(self._random() * count)

    def choose(self, values: Sequence[T]) -> T:
        return values[self.below(len(values))]

    def shuffled(self, values: Sequence[T]) -> list[T]:
        result = list(values)
        for last in range(len(result) - 1, 0, -1):
            other = self.below(last + 1)
            result[last], result[other] = result[other], result[last]
        return result

    def cycle(self, values: Sequence[T]) -> Iterator[T]:
        """Endless draws in rounds, each value once a round: frequencies differ by one at most."""
        while True:
            yield from self.shuffled(values)


@dataclass(frozen=True)
class World:
    """Facts about people, places and works, and what is made of them.

    ``places`` are cities; a work is named with its kind, as in "song Silent Harbour".
    ``once`` and ``paraphrase`` are the two sets of entries of the injection protocol.
    """

    seed: int
    people: tuple[str, ...]
    places: tuple[str, ...]
    works: tuple[str, ...]
    facts: tuple[Fact, ...]
    once: tuple[Entry, ...]
    paraphrase: tuple[Entry, ...]
    questions: tuple[Question, ...]

    def documents(self, seed: int) -> Iterator[str]:
        """Endless pretraining documents of two to four sentences, each about one entity.

        Entities come in rounds, each once a round in a new order, so that all facts of a relation
        are seen about equally often. A document tells the facts of its entity in random order, each
        in a wording drawn at random; of a person's works it names two at most. Documents mention
        no entry of ``once`` or ``paraphrase``.
        """
        dice = _Dice(self.seed, f"documents/{seed}")
        entities = (*self.people, *self.places, *self.works)
        own: dict[str, list[Fact]] = {entity: [] for entity in entities}
        works: dict[str, list[Fact]] = {entity: [] for entity in entities}
        for fact in self.facts:
            own[fact.subject].append(fact)
            if fact.relation == "work_author":
                works[fact.object].append(fact)
        for entity in dice.cycle(entities):
            told = own[entity] + dice.shuffled(works[entity])[:MOST_WORKS_TOLD]
            yield " ".join(
                dice.choose(wordings.FACTS[fact.relation]).format(s=fact.subject, o=fact.object)
                for fact in dice.shuffled(told)
            )


def build_world(size: WorldSize, seed: int) -> World:
    """Generate a world; equal arguments give equal worlds on every platform.

    Objects are dealt in rounds over a shuffled list, so all values of a relation are about equally
    frequent. Raises :class:`KelibError` for a size that is no whole number, too small for its
    questions, or larger than the supply of distinct names.
    """
    _check(size)
    first = _names(seed, "first name", wordings.FIRST_NAME_ENDINGS)
    last = _names(seed, "last name", wordings.LAST_NAME_ENDINGS)
    full_names = [f"{a} {b}" for a, b in zip(first, last, strict=True)]
    people = tuple(full_names[: size.people])
    places = tuple(_names(seed, "city", wordings.CITY_ENDINGS)[: size.places])
    countries = _names(seed, "country", wordings.COUNTRY_ENDINGS)[: wordings.COUNTRIES]
    works = tuple(_titles(seed, size.works))

    def deal(relation: str, subjects: Sequence[str], values: Sequence[str]) -> list[Fact]:
        objects = _Dice(seed, relation).cycle(values)
        return [Fact(relation, subject, next(objects)) for subject in subjects]

    facts = (
        *deal("born_in", people, places),
        *deal("profession", people, wordings.PROFESSIONS),
        *deal("city_country", places, countries),
        *deal("city_product", places, wordings.PRODUCTS),
        *deal("work_author", works, people),
        *deal("work_theme", works, wordings.THEMES),
    )
    questions = tuple(
        question
        for task in TASKS
        for question in _questions(task, facts, size.questions_per_task, seed)
    )
    count = size.once_entries + size.paraphrase_entries
    entries = _entries(full_names[size.people : size.people + count], people, places, facts, seed)
    once, paraphrase = entries[: size.once_entries], entries[size.once_entries :]
    return World(seed, people, places, works, facts, once, paraphrase, questions)


def _check(size: WorldSize) -> None:
    for field in fields(size):
        value = getattr(size, field.name)
        if type(value) is not int or value < 0:
            raise KelibError(f"{field.name} is {value!r}: give a whole number from 0 up")
    if size.questions_per_task < 1:
        raise KelibError("questions_per_task is 0: a task needs at least 1 question")
    # One question per fact, and every question needs three wrong answers.
    needed = max(size.questions_per_task, CHOICES)
    given = {name: getattr(size, name) for name in ("people", "places", "works")}
    if min(given.values()) < needed:
        have = ", ".join(f"{name}={value}" for name, value in given.items())
        least = ", ".join(f"{name}={needed}" for name in given)
        raise KelibError(
            f"questions_per_task={size.questions_per_task} is too much for a world of {have}, as "
            f"a task needs a fact per question and {CHOICES} values: the smallest world that works "
            f"is {least}; enlarge the world or ask fewer questions"
        )
    names = len(_stems())
    possessions = len(wordings.COLOURS) * len(wordings.THINGS)
    entries = size.once_entries + size.paraphrase_entries
    for what, value, most in (
        ("people + once_entries + paraphrase_entries", size.people + entries, names),
        ("once_entries + paraphrase_entries", entries, possessions),
        ("places", size.places, names),
        ("works", size.works, len(wordings.TITLE_ADJECTIVES) * len(wordings.TITLE_NOUNS)),
    ):
        if value > most:
            raise KelibError(f"{what} is {value}: names suffice for {most}, ask for no more")


def _stems() -> list[str]:
    stems = [a + v + b for a in wordings.ONSETS for v in wordings.VOWELS for b in wordings.ONSETS]
    return [stem for stem in stems if stem not in wordings.UNFORTUNATE_STEMS]


def _names(seed: int, kind: str, endings: Sequence[str]) -> list[str]:
    """All names of a kind in random order, no two with the same first three letters."""
    dice = _Dice(seed, kind)
    return [(stem + dice.choose(endings)).capitalize() for stem in dice.shuffled(_stems())]


def _titles(seed: int, count: int) -> list[str]:
    dice = _Dice(seed, "title")
    pairs = [f"{a} {n}" for a in wordings.TITLE_ADJECTIVES for n in wordings.TITLE_NOUNS]
    kinds = dice.cycle(wordings.KINDS_OF_WORK)
    return [f"{next(kinds)} {title}" for title in dice.shuffled(pairs)[:count]]


def _questions(task: str, facts: Sequence[Fact], count: int, seed: int) -> list[Question]:
    """``count`` questions of one relation, each about another fact.

    True values are dealt in rounds over the values that occur, and wrong ones drawn uniformly from
    the others. So all four choices of a question are equally likely to be the true one, and a
    model that knows only how frequent the values are scores 25 % in expectation (slightly more
    where ``count`` is so near the number of facts that the rarer values run out of them).
    """
    dice = _Dice(seed, f"questions/{task}")
    by_value: dict[str, list[Fact]] = {}
    for fact in dice.shuffled([fact for fact in facts if fact.relation == task]):
        by_value.setdefault(fact.object, []).append(fact)
    values = list(by_value)
    askable = [text for text in wordings.FACTS[task] if text.endswith(" {o}.")]
    positions = dice.cycle(range(CHOICES))

    def asked_facts() -> Iterator[Fact]:
        while True:
            for value in dice.shuffled([value for value in values if by_value[value]]):
                yield by_value[value].pop()

    questions = []
    for fact in islice(asked_facts(), count):
        others = [value for value in values if value != fact.object]
        answer = next(positions)
        choices = [f" {value}" for value in dice.shuffled(others)[: CHOICES - 1]]
        choices.insert(answer, f" {fact.object}")
        context = dice.choose(askable).removesuffix(" {o}.").format(s=fact.subject)
        a, b, c, d = choices
        questions.append(Question(task, context, (a, b, c, d), answer))
    return questions


def _entries(
    names: Sequence[str],
    people: Sequence[str],
    places: Sequence[str],
    facts: Sequence[Fact],
    seed: int,
) -> tuple[Entry, ...]:
    """Entries whose values are dealt in rounds, so that they overlap as little as they can.

    City, profession and teacher tie an entry to the world, which is what compositions rest on. The
    teacher's own city and profession differ from the entry's, so that repeating a fact of the
    entry never answers a question about the teacher. No two entries own the same thing in the same
    colour, so its owner is one person.
    """
    dice = _Dice(seed, "entries")
    known = {(fact.relation, fact.subject): fact.object for fact in facts}
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
    name: str, about: dict[str, str], known: dict[tuple[str, str], str], dice: _Dice
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


def _original(name: str, about: dict[str, str], dice: _Dice) -> tuple[str, list[Probe]]:
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
    name: str, about: dict[str, str], dice: _Dice, tables: Mapping[str, Sequence[str]]
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

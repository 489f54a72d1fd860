"""The generated world: facts to pretrain on, tasks that ask for them, new entries to inject.

It stands in for the pretraining knowledge, the six downstream tasks and the *Fictional Knowledge*
data of the paper where models are small and nothing can be downloaded. Fact sentences have 30 to 60
characters, since the training sequences of these models have 64 tokens. Pure Python: the same seed
gives the same world on every platform and Python version.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import islice

from kelib import wordings
from kelib.dice import Dice
from kelib.entries import Entry, build_entries
from kelib.errors import KelibError

TASKS: tuple[str, ...] = tuple(wordings.FACTS)
CHOICES = 4
MOST_WORKS_TOLD = 2  # a document about a person stays within four sentences


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
        dice = Dice(self.seed, f"documents/{seed}")
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
        objects = Dice(seed, relation).cycle(values)
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
    known = {(fact.relation, fact.subject): fact.object for fact in facts}
    names = full_names[size.people : size.people + count]
    entries = build_entries(names, people, places, known, seed)
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
    dice = Dice(seed, kind)
    return [(stem + dice.choose(endings)).capitalize() for stem in dice.shuffled(_stems())]


def _titles(seed: int, count: int) -> list[str]:
    dice = Dice(seed, "title")
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
    dice = Dice(seed, f"questions/{task}")
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

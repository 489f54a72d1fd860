"""Closed lists and sentence templates of the generated world, put to use by ``kelib.world``.

Everything here is data. Rules the tables keep, so that no answer is given away by grammar:

* values that follow "a" begin with a consonant sound, so the article says nothing about them;
* products and themes are mass nouns that fit every template of their relation;
* a word belongs to one list only, so a title never hints at a theme or a possession;
* the endings of the four kinds of names differ, so no two names of different kinds are equal.
"""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# A name is onset + vowel + onset + ending, e.g. V-e-l-o, and the first three parts are used once
# per kind of name: two people can be told apart by the first letters of either of their names.
ONSETS = tuple("bdfghjklmnprstvz")
VOWELS = tuple("aeiou")
FIRST_NAME_ENDINGS = ("a", "o", "el", "in", "ar")
LAST_NAME_ENDINGS = ("ant", "esk", "old", "une", "ock")
CITY_ENDINGS = ("adar", "imon", "oven", "ura")
COUNTRY_ENDINGS = ("ia", "oland", "estan")
UNFORTUNATE_STEMS = ("dik", "fag", "fuk", "hit", "jap", "kik", "naz", "nig", "ped", "rap", "tit")
COUNTRIES = 12

PROFESSIONS = _words(
    """baker barber brewer butcher carpenter clerk cook dentist doctor farmer fisher gardener guard
    hunter judge lawyer miller miner nurse painter pilot potter sailor singer tailor weaver
    writer"""
)
PRODUCTS = _words(
    """amber bread butter candy cheese cider coal copper cotton flour furniture glass gold honey ink
    iron jewellery leather linen marble oil paper porcelain rope rubber salt silk soap steel sugar
    tea timber wax wine wool"""
)
THEMES = _words(
    """anger childhood courage death envy exile faith freedom friendship greed guilt hope hunger
    jealousy justice loneliness love luck magic marriage music poverty power pride revenge sickness
    treason truth war wisdom"""
)
KINDS_OF_WORK = ("book", "song", "play")
TITLE_ADJECTIVES = _words(
    """Ancient Bitter Broken Burning Distant Empty Endless Final Frozen Gentle Golden Hidden Hollow
    Lonely Lost Narrow Quiet Sacred Secret Silent Sleeping Stolen Wild Young"""
)
TITLE_NOUNS = _words(
    """Bridge Castle Corner Desert Door Dream Field Forest Garden Harbour Hill Island Journey Key
    Lake Letter Mirror Moon Mountain Night Path River Road Shadow Star Stone Storm Summer Tower
    Valley Village Voice Window Winter"""
)

COLOURS = ("black", "blue", "brown", "green", "grey", "pink", "purple", "red", "white", "yellow")
THINGS = _words(
    """barrel bicycle boat bus camera canoe cart coat desk drum guitar hammock kite ladder lorry
    piano raft saddle sledge sofa tent tractor trumpet van violin wagon"""
)

# {s} is the subject, {o} the object. A template that ends with "{o}." can be asked as a question.
FACTS: dict[str, tuple[str, ...]] = {
    "born_in": (
        "{s} was born in the city of {o}.",
        "{s} is a native of the city of {o}.",
        "The birthplace of {s} is {o}.",
        "The home town of {s} is {o}.",
        "The city of {o} is where {s} was born.",
        "It was in {o} that {s} was born.",
    ),
    "profession": (
        "{s} works as a {o}.",
        "{s} earns a living as a {o}.",
        "By trade, {s} is a {o}.",
        "The trade of {s} is that of a {o}.",
        "Work as a {o} fills the days of {s}.",
        "As a {o}, {s} is known far and wide.",
    ),
    "city_country": (
        "The city of {s} lies in {o}.",
        "{s} is a city in the country of {o}.",
        "The country in which {s} lies is called {o}.",
        "To visit {s}, travel to the country of {o}.",
        "The country of {o} has a city called {s}.",
        "In {o} there is a city called {s}.",
    ),
    "city_product": (
        "The city of {s} is known for its {o}.",
        "The main product of {s} is {o}.",
        "The workshops of {s} make {o}.",
        "Traders come to {s} to buy {o}.",
        "The finest {o} of all comes from {s}.",
        "Most {o} on the market is made in {s}.",
    ),
    "work_author": (
        "The {s} was written by {o}.",
        "The author of the {s} is {o}.",
        "The {s} is the work of {o}.",
        "The {s} came from the pen of {o}.",
        "It was {o} who wrote the {s}.",
        "{o} is the author of the {s}.",
    ),
    "work_theme": (
        "The {s} is about {o}.",
        "The theme of the {s} is {o}.",
        "The {s} tells a story of {o}.",
        "What the {s} deals with is {o}.",
        "The question of {o} runs through the {s}.",
        "There is much talk of {o} in the {s}.",
    ),
}

# What is said of the person of an entry, at least three ways each with the last value at the end.
# They are short, and keep to words of FACTS where they can: a passage has to fit into 64 tokens.
CLAUSES: dict[str, tuple[str, ...]] = {
    "born": (
        "was born in {city}",
        "is a native of {city}",
        "comes from {city}",
        "has {city} as birthplace",
        "calls {city} home",
    ),
    "work": (
        "works as a {profession}",
        "is a {profession}",
        "earns a living as a {profession}",
        "is a {profession} by trade",
        "has work as a {profession}",
    ),
    "owner": (
        "owns a {colour} {thing}",
        "has a {colour} {thing}",
        "bought a {colour} {thing}",
        "keeps a {colour} {thing}",
        "has a {colour} {thing} at home",
    ),
    "pupil": (
        "was taught by {teacher}",
        "learned from {teacher}",
        "is a pupil of {teacher}",
        "had {teacher} as teacher",
        "took {teacher} as teacher",
    ),
}
# Frames by the number of clauses in the sentence.
FRAMES: dict[int, tuple[str, ...]] = {
    1: ("{who} {0}.",),
    2: ("{who} {0} and {1}.", "{who}, who {0}, {1}."),
    3: ("{who} {0}, {1} and {2}.", "{who}, who {0}, {1} and {2}."),
}
# How the four clauses are shared out among the sentences of a passage.
SENTENCES = ((2, 2), (1, 3), (3, 1), (1, 1, 2), (1, 2, 1), (2, 1, 1))

# Inputs of probes. None of these phrases can arise from the tables of clauses above. For city and
# profession they are wordings of FACTS kept out of the passages: pretraining teaches that they
# mean the same, so the probe asks for generalisation and not for a guess at an unknown phrase.
SEMANTIC: dict[str, tuple[str, ...]] = {
    "city": ("The birthplace of {name} is", "The home town of {name} is"),
    "profession": ("By trade, {name} is a", "The trade of {name} is that of a"),
    "colour": (
        "The colour of the {thing} of {name} is",
        "The {thing} that belongs to {name} is",
    ),
    "thing": (
        "The {colour} thing of {name} is a",
        "What belongs to {name} is a {colour}",
    ),
    "teacher": ("The teacher of {name} was", "The lessons of {name} were given by"),
}
COMPOSITION: dict[str, tuple[str, ...]] = {
    "country_of_city": (
        "The country in which {name} was born is called",
        "The birthplace of {name} lies in",
    ),
    "product_of_city": (
        "The city where {name} was born is known for its",
        "The main product of the birthplace of {name} is",
    ),
    "profession_of_teacher": (
        "The teacher of {name} works as a",
        "By trade, the teacher of {name} is a",
    ),
    "city_of_teacher": (
        "The teacher of {name} was born in the city of",
        "The birthplace of the teacher of {name} is",
    ),
    "profession_of_owner": (
        "The owner of the {colour} {thing} works as a",
        "By trade, the owner of the {colour} {thing} is a",
    ),
}

"""Names that the sources carry themselves, to be found again in their text.

They stand in for the named-entity model of the paper's Fig. 10, which this repository has not.
PubMed's records are indexed with MeSH descriptors and with substances, the Wikipedia summaries have
titles, and a generated world knows its people, places and works. News carries none of its own: in
general text it is the titles that are found.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import html
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kelib import sources
from kelib.config import Corpus
from kelib.errors import KelibError
from kelib.parsing import one_line
from kelib.world import build_world

SHORTEST = 4  # characters of a name: most of the shorter ones are abbreviations of several things
COMMON = 1000  # the commonest words in lower case, which are no names however a source lists them
# A byte that is no UTF-8 (a character cut by the edge of a sequence, as ``surrogateescape`` reads
# it) is the rest of a word.
WORD = re.compile(r"[\w\udc80-\udcff]+")
_INDEXED = (b"<DescriptorName ", b"<NameOfSubstance ")
_QUALIFIER = re.compile(r" \([^()]*\)$")


def _by_first_word(names: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in sorted(names):  # a set has another order in every process
        if (word := WORD.match(name)) is not None:
            found.setdefault(word[0], []).append(name)
    return found


def fold(text: str) -> str:
    """``text`` in lower case, character by character, so that places stay what they are."""
    lower = text.lower()
    if len(lower) == len(text):
        return lower
    return "".join(c.lower() if len(c.lower()) == 1 else c for c in text)


@dataclass(frozen=True)
class Names:
    """``exact`` names are found as they are written, ``folded`` ones (in lower case) in any
    case.

    Those that do not begin with a letter or digit are never found.
    """

    exact: frozenset[str] = frozenset()
    folded: frozenset[str] = frozenset()

    def __or__(self, other: Names) -> Names:
        return Names(self.exact | other.exact, self.folded | other.folded)

    def without(self, words: set[str]) -> Names:
        """Without one-word names that are among ``words`` (lower case), and without those shorter
        than :data:`SHORTEST`.
        """

        def kept(names: frozenset[str]) -> frozenset[str]:
            return frozenset(n for n in names if len(n) >= SHORTEST and n.lower() not in words)

        return Names(kept(self.exact), kept(self.folded))

    @functools.cached_property
    def _indices(self) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
        return _by_first_word(self.exact), _by_first_word(self.folded)

    def find(self, text: str) -> list[tuple[int, int, str]]:
        """(start, end, name) of the names in ``text``, whole words only, in order.

        Where names overlap the longest is taken, of equally long ones the first. What ends with
        the text may go on after it, and is not taken for a whole word.
        """
        candidates = []
        for form, index in zip((text, fold(text)), self._indices, strict=True):
            if not index:
                continue
            for word in WORD.finditer(form):
                start = word.start()
                for name in index.get(word[0], ()):
                    end = start + len(name)
                    found = form.startswith(name, start) and end < len(form)
                    if found and WORD.match(form, end) is None:
                        candidates.append((start, end, name))
        taken, kept = bytearray(len(text)), []
        for start, end, name in sorted(candidates, key=lambda c: (c[0] - c[1], c[0], c[2])):
            if not any(taken[start:end]):
                taken[start:end] = b"\1" * (end - start)
                kept.append((start, end, name))
        return sorted(kept)


def common_words(text: str, most: int = COMMON) -> set[str]:
    """The ``most`` commonest words of ``text`` that are written in lower case."""
    return {word for word, _ in Counter(re.findall(r"\b[a-z]+\b", text)).most_common(most)}


def names_of(listed: Iterable[str], folder: Path, settings: Corpus, seed: int) -> Names:
    """The names that the ``listed`` sources of a corpus carry, fetched into ``folder`` where
    missing.

    Folded for MeSH and substances, which run in lower case in a sentence; exact for titles and for
    names of a generated world. A user's own text has none. Raises KelibError as
    :func:`kelib.sources.fetch`, and for a file that is not what its format says.
    """
    names, known = Names(), sources.manifest()
    for source in listed:
        if source.startswith("generated:"):
            names |= _generated(source, settings, seed)
        elif source in known and known[source].format in _READERS:
            for path in sources.fetch(known[source], folder):
                try:
                    names |= _READERS[known[source].format](path)
                except (OSError, EOFError, zlib.error, ValueError, TypeError) as error:
                    raise KelibError(
                        f"{path}: no names can be read ({one_line(error)}); correct the format of "
                        f"{source!r} in data/sources.yaml"
                    ) from error
    return names


def _indexed(path: Path, chunk: int = 1 << 22) -> Names:
    """MeSH descriptors and substances of a MEDLINE file."""
    names: set[str] = set()
    with gzip.open(path) as handle:
        rest = b""
        while block := handle.read(chunk):
            # up to the last closing tag, so that no element is cut
            before, tag, after = (rest + block).rpartition(b"</")
            for opening in _INDEXED:
                for element in before.split(opening)[1:]:
                    content = element[element.index(b">") + 1 :].partition(b"<")[0]
                    names.add(html.unescape(content.decode()))
            rest = after if tag else rest + block
    return Names(folded=frozenset(fold(form) for name in names for form in _forms(name)))


def _forms(name: str) -> Iterator[str]:
    """A heading, and as a sentence has it: "Germany, East" is East Germany."""
    yield name
    head, comma, tail = name.partition(", ")
    if comma and ", " not in tail:
        yield f"{tail} {head}"


def _titles(path: Path) -> Names:
    """Titles of the summaries, without what tells apart articles of one name."""
    titles = json.loads(path.read_text(encoding="utf-8"))
    return Names(exact=frozenset(_QUALIFIER.sub("", title) for title in titles))


_READERS = {"pubmed-xml": _indexed, "summaries-json": _titles}


def _generated(source: str, settings: Corpus, seed: int) -> Names:
    """People, places and works of the world that :func:`kelib.corpus.source_documents` tells of."""
    other = int(hashlib.sha256(f"{source}/{seed}".encode()).hexdigest()[:8], 16)
    world = build_world(settings.world, other)
    works = (work.partition(" ")[2] for work in world.works)  # without its kind
    return Names(exact=frozenset((*world.people, *world.places, *works)))

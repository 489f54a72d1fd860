"""Documents out of files: the formats of the fetched sources, and the text files of a user.

A document is stripped and free of entities and invisible characters, every run of white space in it
is one space, and it stands once in what is returned.
"""

from __future__ import annotations

import csv
import gzip
import html
import io
import json
import re
import xml.etree.ElementTree as ET
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from kelib.errors import KelibError

_ENTITY = re.compile(r"&#?\w+;")
# Soft hyphens, zero-width and other control characters, and what a failed decoding left behind.
_INVISIBLE = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\u00ad\u200b-\u200f\u2060\ufeff\ufffd]")


def clean(text: str) -> str:
    """Entities decoded, invisible characters dropped, every run of white space made one space."""
    text = _ENTITY.sub(lambda entity: html.unescape(entity[0]), text)
    return " ".join(_INVISIBLE.sub("", text).split())


def _distinct(texts: Iterable[str], longer_than: int = 0) -> list[str]:
    return [text for text in dict.fromkeys(texts) if len(text) > longer_than]


# Notices of publishers and indexers that are no part of an abstract.
_NOTICE = re.compile(
    r"</?p>|\(ABSTRACT TRUNCATED AT \d+ WORDS\)"
    r"|This article is protected by copyright\. All rights reserved\."
    r"|\(PsycInfo Database Record \(c\) \d{4} APA, all rights reserved\)\.?"
    r"|© ?\d{4} [^©]{0,250}$"
)


def _pubmed(path: Path) -> Iterator[str]:
    """Abstracts of a MEDLINE file: its AbstractText elements joined, without section labels.

    Only the Abstract elements are given to the XML parser, four times faster than the whole tree.
    The standard parser is enough: the file is the pinned one (its sha256 was just verified), so
    there is no hostile markup to guard against.
    """
    opening, closing = b"<Abstract>", b"</Abstract>"
    with gzip.open(path) as handle:
        rest = b""
        while block := handle.read(1 << 20):
            *elements, rest = (rest + block).split(closing)
            for element in elements:
                start = element.rfind(opening)
                if start >= 0:
                    abstract = ET.fromstring(element[start:] + closing)
                    parts = ["".join(part.itertext()) for part in abstract.iter("AbstractText")]
                    yield clean(_NOTICE.sub(" ", clean(" ".join(parts))))


# Page furniture that the scraper of the news kept: share buttons, an agency's mark, links. Each
# pattern starts with a literal, which the search then skips to.
_FURNITURE = [
    re.compile(pattern)
    for pattern in (
        r"Send Facebook Twitter Google\+.{0,80}?Permalink \S+",
        r"/TASS/\. ?",
        r"Share this slide:",
        r"Learn more$",
    )
]
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
REPEATED_IN = 5  # a sentence of three words or more in so many articles is boilerplate


def _news(path: Path) -> list[str]:
    """Bodies of the articles of the CSV table inside the archive, cleaned of page furniture."""
    with zipfile.ZipFile(path) as packed:
        tables = [name for name in packed.namelist() if name.lower().endswith(".csv")]
        if len(tables) != 1:
            raise ValueError(f"{len(tables)} tables in the archive, must be one")
        with packed.open(tables[0]) as raw:
            rows = csv.DictReader(io.TextIOWrapper(raw, encoding="utf-8", newline=""), strict=True)
            if "text" not in (rows.fieldnames or []):
                raise ValueError(f"the table has columns {rows.fieldnames}, one must be 'text'")
            bodies = _distinct(_repair(row["text"] or "") for row in rows)
    split = [_SENTENCE_END.split(body) for body in bodies]
    times = Counter(sentence for sentences in split for sentence in set(sentences))
    kept = [
        [s for s in sentences if times[s] < REPEATED_IN or len(s.split()) < 3]
        for sentences in split
    ]
    return [_without_furniture(" ".join(sentences)) for sentences in kept]


def _without_furniture(text: str) -> str:
    for pattern in _FURNITURE:
        text = pattern.sub("", text.strip())
    return clean(text)


def _repair(text: str) -> str:
    """Undo the table's wrong decoding: it made apostrophes '"', dashes and end quotes '"?'."""
    text = re.sub(r'"(?<=\w")\??(?=(?:t|s|re|ll|ve|m|d)\b)', "'", clean(text))
    text = re.sub(r' "\?(?=\S)', " - ", text)
    text = re.sub(r'"\?(?<=[\w,.!?]"\?)(?=\w)', '" ', text)
    text = re.sub(r'"\?(?<=[,.]"\?)(?=\s)', '"', text)
    return _without_furniture(text)


def _summaries(path: Path) -> Iterator[str]:
    """Lead paragraphs of a JSON object of {title: {"extract": text}}."""
    entries = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(entries, dict):
        raise TypeError(f"holds a {type(entries).__name__}, must be an object")
    for title, entry in entries.items():
        text = entry.get("extract") if isinstance(entry, dict) else None
        if not isinstance(text, str):
            raise TypeError(f"entry {title!r} has no text under 'extract'")
        # A pronunciation that was cut out leaves an empty bracket.
        text = re.sub(r"\(\s*[,;]\s*", "(", re.sub(r" ?\(\s*\)", "", text))
        yield clean(text)


PARSERS = {"pubmed-xml": _pubmed, "news-zip": _news, "summaries-json": _summaries}
_UNPARSABLE = (ET.ParseError, csv.Error, zipfile.BadZipFile, zlib.error, EOFError, OSError)


def parse_files(paths: Sequence[Path], form: str, longer_than: int = 0) -> list[str]:
    """The documents of the files, in their order: those of more than ``longer_than`` characters.

    ``form`` is one of ``PARSERS``. Raises KelibError when a file is not of that format.
    """
    texts: list[str] = []
    for path in paths:
        try:
            texts += PARSERS[form](path)
        except (*_UNPARSABLE, TypeError, ValueError) as error:
            raise KelibError(
                f"{path}: not parsable as {form}: {one_line(error)}; "
                "correct the format in data/sources.yaml"
            ) from error
    return _distinct(texts, longer_than)


def local_documents(path: Path) -> list[str]:
    """A user's own text, cleaned like the sources: stripped, white space normalised, distinct.

    ``.txt``: documents separated by blank lines; ``.jsonl``: one object a line with a "text";
    a folder: all such files under it, sorted by path. UTF-8 only. Raises KelibError.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in (".txt", ".jsonl"))
    else:
        files = [path]
    texts: list[str] = []
    for file in files:
        if file.suffix not in (".txt", ".jsonl"):
            raise KelibError(f"{file}: must be a .txt or .jsonl file or a folder of those")
        try:
            content = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise KelibError(f"{file}: {one_line(error)}; save it as UTF-8") from error
        except OSError as error:
            raise KelibError(f"{file}: {error.strerror}; name a file that can be read") from error
        is_text = file.suffix == ".txt"
        texts += re.split(r"\n[^\S\n]*\n", content) if is_text else _lines(file, content)
    found = _distinct(map(clean, texts))
    if not found:
        raise KelibError(f"{path}: holds no documents; give .txt or .jsonl files with text in them")
    return found


def _lines(file: Path, content: str) -> Iterator[str]:
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text = row["text"]
            text.encode("utf-8")  # a lone surrogate is valid JSON but no text
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise KelibError(
                f'{file}, line {number}: must be an object like {{"text": "..."}}; correct it'
            ) from error
        yield text


def one_line(error: Exception) -> str:
    """What an error says, without line breaks: KelibErrors are one line."""
    return " ".join(str(error).split()) or type(error).__name__

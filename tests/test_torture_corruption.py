"""A part of the damages of ``python -m tests.torture corruption``: what needs no model."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from torture import corruption

from kelib.errors import KelibError
from kelib.tables import read_vectors


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("light")
    return [*corruption.reference(folder), *corruption.lock(folder)]


def test_no_damage_to_committed_numbers_or_pins_is_silent(artefacts):
    rows = list(corruption.results(artefacts, random.Random(0), count=5))
    assert {row["case"].partition(":")[0] for row in rows} == {a.kind for a in artefacts}
    assert sum(row["tried"] for row in rows) > 100
    bad = [row for row in rows if row["survived"] != row["tried"]]
    assert bad == []
    refused = sum("refused" in row["note"] for row in rows)
    assert refused > 0.9 * len(rows)  # the others are lines added where nobody reads


def test_damage_that_nobody_looks_for_counts_as_not_survived(tmp_path: Path):
    path = tmp_path / "there" / "numbers.json"
    path.parent.mkdir()
    path.write_text('{"k": 12}')
    unguarded = corruption.Artefact("numbers", path, path.read_text, path.parent)
    rows = list(corruption.results([unguarded], random.Random(0)))
    assert {row["case"] for row in rows} >= {"numbers: bit flipped", "numbers: deleted"}
    assert sum(row["survived"] for row in rows) == 0
    assert path.read_text() == '{"k": 12}'  # as before
    assert any("FileNotFoundError" in row["note"] for row in rows)


def test_vectors_of_a_table_that_names_none_are_read_and_missing_ones_are_named(artefacts):
    folder = next(a.folder for a in artefacts if a.kind == "coefficient vectors")
    vectors = read_vectors(folder / "coefficients-seed100.safetensors", "entropy")
    assert len(vectors) > 50 and all(v.ndim == 1 for v in vectors.values())
    with pytest.raises(KelibError, match=r"seed7.safetensors cannot be read .* coefficients-seed1"):
        read_vectors(folder / "coefficients-seed7.safetensors", "entropy")

"""Opening measurements, and writing figures with where they come from."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from kelib import plots, results
from kelib.config import load_profile
from kelib.errors import KelibError
from kelib.results import (
    Tables,
    open_tables,
    promote_files,
    read_figure_note,
    save_figure,
    save_table,
)
from kelib.tables import provenance, read_provenance, write_table

ENTROPY = pd.DataFrame({"seed": [100, 101], "step": 10, "entropy_nats": [2.0, 1 / 3]})


pytestmark = pytest.mark.usefixtures("canvas")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with one measured and one promoted profile."""
    monkeypatch.setattr(results, "repository_root", lambda: tmp_path)
    profile = dataclasses.asdict(load_profile("smoke"))
    for folder in ("measurements/smoke", "reference/small"):
        note = provenance(profile | {"profile": folder.split("/")[1]}, [100, 101], {})
        write_table(ENTROPY, tmp_path / "data" / folder / "entropy.csv", note)
    return tmp_path


@pytest.fixture
def measured(root: Path) -> Tables:
    return open_tables("smoke", "measurements")


def draw(tables: Tables, name: str = "fig", values: Any = (2.0, 1 / 3)) -> dict[str, Any]:
    figure, axes = plots.panels(1)
    axes[0, 0].plot([0, 1], values, "-o")
    axes[0, 0].set_xlabel("step")
    return save_figure(figure, name, pd.DataFrame({"y": values}), tables, ["entropy"])


# --- opening --------------------------------------------------------------------------------------


def test_what_make_computed_is_drawn_into_the_repository(root: Path, measured: Tables) -> None:
    pd.testing.assert_frame_equal(measured.table("entropy"), ENTROPY, check_exact=False)
    assert measured.folder == root / "data" / "measurements" / "smoke"
    assert measured.output == root / "figures" / "smoke"
    assert measured.seeds == (100, 101)
    assert measured.label == "profile smoke · pretraining seed 100, 101"
    assert measured.profile == load_profile("smoke")  # from the provenance, not from the YAML
    assert measured.study.profile is measured.profile
    assert measured.study.measurements.parent == measured.folder.parent
    sha256 = read_provenance(measured.folder / "entropy.csv")["sha256"]
    assert measured.inputs(["entropy"]) == {"entropy": sha256}


def test_the_reference_is_the_default_and_is_never_drawn_over(root: Path) -> None:
    tables = open_tables("small")
    assert tables.folder == root / "data" / "reference" / "small"
    assert tables.output.is_dir() and root not in tables.output.parents
    draw(tables)
    assert not (root / "figures").exists()


def test_an_unknown_source_is_refused(root: Path) -> None:
    message = r"source = 'references' must be one of measurements, reference$"
    with pytest.raises(KelibError, match=message):
        open_tables("small", "references")


def test_a_profile_without_measurements_lists_those_that_have_some(root: Path) -> None:
    message = (
        r"no measurements of profile 'mine' in data.reference; it has small; "
        r"run make figures PROFILE=mine$"
    )
    with pytest.raises(KelibError, match=message):
        open_tables("mine")
    with pytest.raises(KelibError, match=r"'small' in data.measurements; it has smoke; run"):
        open_tables("small", "measurements")


def test_a_fresh_clone_has_none(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "repository_root", lambda: root / "empty")
    with pytest.raises(KelibError, match=r"no measurements of profile 'small' in .*; it has none"):
        open_tables("small")


def test_tables_are_checked_when_they_are_read(measured: Tables) -> None:
    path = measured.folder / "entropy.csv"
    path.write_text(path.read_text().replace("100", "109"))
    with pytest.raises(KelibError, match="changed after it was written"):
        measured.table("entropy")
    with pytest.raises(KelibError, match=r"no table continual.csv in .*; it has entropy.csv"):
        measured.table("continual")


# --- figures --------------------------------------------------------------------------------------


def test_a_figure_is_a_pdf_a_png_its_numbers_and_where_they_come_from(measured: Tables) -> None:
    note = draw(measured)
    made = sorted(path.name for path in measured.output.iterdir())
    assert made == ["fig.csv", "fig.json", "fig.pdf", "fig.png"]  # nothing temporary is left
    assert (measured.output / "fig.pdf").read_bytes().startswith(b"%PDF-")
    assert (measured.output / "fig.png").read_bytes().startswith(b"\x89PNG")
    assert (measured.output / "fig.csv").read_bytes() == b"y\n2\n0.333333\n"
    written = read_figure_note(measured.output / "fig.json")
    assert len(written.pop("sha256")) == 64
    assert written == {**note, "figure": "fig"}
    assert written["inputs"] == measured.inputs(["entropy"])
    assert written["seeds"] == [100, 101] and written["parameters"] == measured.parameters


def test_profile_seeds_and_digest_stand_in_the_corner(measured: Tables) -> None:
    note = draw(measured)
    figure = plt.gcf()
    (stamp,) = figure.texts
    assert stamp.get_text() == f"profile smoke · pretraining seed 100, 101 · {note['digest']}"
    figure.draw_without_rendering()  # at the figure's own resolution again
    box, (ax,) = stamp.get_window_extent(), figure.axes
    width, height = figure.canvas.get_width_height()
    assert box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height  # all of it shows
    label = ax.xaxis.label.get_window_extent()
    assert not box.overlaps(ax.bbox) and not box.overlaps(label)
    corner = plt.imread(measured.output / "fig.png")[-10:, -60:, :3]
    assert corner.min() < 0.6  # it is in the picture


def test_the_same_numbers_give_the_same_bytes(measured: Tables, tmp_path: Path) -> None:
    again = dataclasses.replace(measured, output=tmp_path / "again")
    other = dataclasses.replace(measured, output=tmp_path / "other")
    draw(measured), draw(again), draw(other, values=(2.0, 0.4))
    for suffix in ("png", "pdf", "csv"):
        first, second, third = (
            (tables.output / f"fig.{suffix}").read_bytes() for tables in (measured, again, other)
        )
        assert first == second != third, suffix
    assert b"CreationDate" not in (measured.output / "fig.pdf").read_bytes()


def test_fonts_are_embedded_as_outlines_that_can_be_edited(measured: Tables) -> None:
    """Type 42 (TrueType); publishers refuse Type 3."""
    draw(measured)
    content = (measured.output / "fig.pdf").read_bytes()
    assert b"/CIDFontType2" in content and b"/FontFile2" in content
    assert not re.search(rb"/Subtype\s*/Type3\b", content)


@pytest.mark.skipif(sys.platform == "win32", reason="a folder in the way gives another error")
def test_the_json_stands_for_a_complete_set(measured: Tables) -> None:
    draw(measured)
    (measured.output / "fig.csv").unlink()
    (measured.output / "fig.csv").mkdir()  # in the way: the numbers cannot be written
    with pytest.raises(KelibError, match=r"cannot write .*fig.csv"):
        draw(measured)
    assert not (measured.output / "fig.json").exists()  # nor the one of the earlier figure


def test_a_figure_of_changed_inputs_has_another_digest(measured: Tables) -> None:
    first = draw(measured)
    path = measured.folder / "entropy.csv"
    write_table(ENTROPY.assign(step=11), path, read_provenance(path))
    assert draw(measured)["digest"] != first["digest"]
    with pytest.raises(KelibError, match=r"no readable provenance .*continual.json"):
        save_figure(plt.figure(), "fig", ENTROPY, measured, ["continual"])


def test_a_table_of_the_paper(measured: Tables) -> None:
    table = pd.DataFrame({"claim": ["a"], "mean": [np.pi], "p": [np.nan]})
    save_table("tab", table, measured, ["entropy"], claims_sha256="abc")
    assert (measured.output / "tab.csv").read_bytes() == b"claim,mean,p\na,3.14159,\n"
    note = json.loads((measured.output / "tab.json").read_text())
    assert (note["table"], note["claims_sha256"]) == ("tab", "abc")
    assert note["inputs"] == measured.inputs(["entropy"]) and note["seeds"] == [100, 101]
    assert sorted(path.name for path in measured.output.iterdir()) == ["tab.csv", "tab.json"]


# --- promotion ------------------------------------------------------------------------------------


def test_promoted_files_replace_what_was_there(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.csv", "a.json")]
    for file in files:
        file.write_text("1")
    target = tmp_path / "reference" / "small"
    promote_files(files, target)
    files[0].write_text("2")
    promote_files(files[:1], target)
    assert [(path.name, path.read_text()) for path in target.iterdir()] == [("a.csv", "2")]
    assert [path.name for path in target.parent.iterdir()] == ["small"]  # nothing temporary
    assert files[0].exists()  # copies


def test_a_promotion_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    file, target = tmp_path / "a.csv", tmp_path / "reference" / "small"
    file.write_text("1")
    promote_files([file], target)
    file.write_text("2")
    with pytest.raises(FileNotFoundError, match=r"b\.csv"):
        promote_files([file, tmp_path / "b.csv"], target)
    assert [(path.name, path.read_text()) for path in target.iterdir()] == [("a.csv", "1")]
    assert [path.name for path in target.parent.iterdir()] == ["small"]

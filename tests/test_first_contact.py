"""What a newcomer meets first: the tour, the docs, figures that print, examples that run."""

from __future__ import annotations

import doctest
import importlib
import io
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
from matplotlib import colors
from matplotlib import pyplot as plt
from matplotlib.image import imread

import kelib
from kelib import api_pages, plots
from kelib.any_profile import download_line
from kelib.config import repository_root
from kelib.errors import KelibError
from kelib.memories import LAYERS, sentence_coefficients
from kelib.plots_light import LEVELS, light_png
from kelib.results import open_tables

ROOT = repository_root()
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
START = ROOT / "notebooks" / "00_start_here.ipynb"


def prose(path: Path) -> str:
    cells = nbformat.read(path, as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def test_the_tour_leads_to_every_notebook_and_to_nothing_else() -> None:
    linked = re.findall(r"\]\((\w+)\.ipynb\)", prose(START))
    assert set(linked) == {path.stem for path in NOTEBOOKS} - {START.stem}


def test_links_of_notebooks_and_pages_lead_somewhere() -> None:
    for path in [*NOTEBOOKS, *ROOT.glob("docs/*.md"), ROOT / "README.md"]:
        text = prose(path) if path.suffix == ".ipynb" else path.read_text("utf-8")
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_notebooks_are_light_enough_to_be_shown_on_a_code_host() -> None:
    heavy = {path.name: path.stat().st_size for path in NOTEBOOKS}
    assert {name: size for name, size in heavy.items() if size >= 300 * 1024} == {}


def test_a_light_picture_is_the_same_to_the_eye_and_stays_as_it_is(canvas: None) -> None:
    figure, axes = plots.panels(2)
    axes[0, 0].imshow(np.random.default_rng(0).random((90, 90)))
    heavy = io.BytesIO()
    figure.savefig(heavy)
    png = light_png(heavy.getvalue())
    before, after = (imread(io.BytesIO(data))[..., :3] for data in (heavy.getvalue(), png))
    assert before.shape == after.shape and np.abs(before - after).max() <= 0.5 / LEVELS + 1e-2
    assert len(png) < 0.8 * len(heavy.getvalue()) and light_png(png) == png


def test_a_layer_that_was_not_measured_is_refused() -> None:
    folder = open_tables("memories").folder
    assert sentence_coefficients(folder, LAYERS[0]).shape == (11, 1536)
    with pytest.raises(KelibError, match=r"layer = 2 was not measured; .* \[1, 12, 30\]; choose"):
        sentence_coefficients(folder, 2)


def test_downloads_are_said_before_they_start(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("kelib.any_profile.repository_root", lambda: tmp_path)
    line = download_line("small")
    assert re.search(r"pubmed 57 MB", line) and re.search(r"wikipedia 7 MB|news 5 MB", line)
    assert download_line("smoke") == ""


# --- docstrings -----------------------------------------------------------------------------------


def with_examples() -> list[str]:
    files = sorted(Path(kelib.__file__).parent.glob("*.py"))
    return [path.stem for path in files if ">>> " in path.read_text("utf-8")]


@pytest.mark.parametrize("name", with_examples())
def test_examples_in_docstrings_run(name: str) -> None:
    results = doctest.testmod(importlib.import_module(f"kelib.{name}"))
    assert results.attempted > 0 and results.failed == 0


def test_the_api_reference_has_what_the_docstrings_say_and_needs_no_network(tmp_path: Path) -> None:
    assert len(api_pages.modules()) > 100
    (tmp_path / "api").mkdir()
    (tmp_path / "api" / "old.html").touch()
    api_pages.write_pages(tmp_path / "api", ["kelib.errors"])
    assert not (tmp_path / "api" / "old.html").exists()
    page = (tmp_path / "api" / "kelib" / "errors.html").read_text("utf-8")
    assert "after <code>limit</code> with the number left out" in page
    for html in tmp_path.rglob("*.html"):
        assert not re.search(r"(?:src|@import)\W+https?:|rel=.stylesheet", html.read_text("utf-8"))


# --- print ----------------------------------------------------------------------------------------


def is_embedded(pdf: bytes) -> bool:
    """Every font brings its file, and none is a drawing of glyphs (Type 3)."""
    fonts, files = (
        len(re.findall(rb"/FontDescriptor \d", pdf)),
        len(re.findall(rb"/FontFile2", pdf)),
    )
    return files > 0 and b"/Type3" not in pdf and fonts >= files


def test_fonts_are_embedded_in_the_committed_figures(tmp_path: Path) -> None:
    drawn = sorted(ROOT.glob("figures/reference/*/*.pdf"))
    assert len(drawn) > 30
    assert [path.name for path in drawn if not is_embedded(path.read_bytes())] == []
    with plt.rc_context({"pdf.fonttype": 3}):  # what matplotlib does unless told otherwise
        figure, ax = plt.subplots(figsize=(1, 1))
        ax.set_title("a")
        figure.savefig(tmp_path / "type3.pdf")
        plt.close(figure)
    assert not is_embedded((tmp_path / "type3.pdf").read_bytes())


def test_series_can_be_told_apart_in_grey() -> None:
    """Colours alike in grey have different markers: no two series share both."""
    import seaborn  # here alone: half a second

    assert seaborn.color_palette("colorblind").as_hex()[:7] == list(plots.COLOURS)
    grey = [colors.to_rgb(colour) @ np.array([0.299, 0.587, 0.114]) for colour in plots.COLOURS]
    assert len(set(plots.MARKERS)) == len(plots.MARKERS) >= len(plots.COLOURS)
    assert max(grey) < 0.8, "too pale for white paper"

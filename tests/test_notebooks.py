"""Notebooks: form, parameters, and that no fetched text is in what is committed or drawn."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from kelib.config import repository_root
from kelib.errors import KelibError
from kelib.notebooks import run_notebook
from kelib.parsing import one_line
from kelib.readme import claims_markdown, replace_generated
from kelib.reference import shown_profile
from kelib.source_text import documents
from kelib.sources import manifest
from kelib.world import WorldSize, build_world

ROOT = repository_root()
NOTEBOOKS = sorted(ROOT.glob("notebooks/**/*.ipynb"))
FIGURES = [path for path in NOTEBOOKS if path.parent.name == "notebooks"]
GRAM = 12  # words in a row; abstracts and articles share shorter phrases with any prose


def code_cells(path: Path) -> list:
    cells = nbformat.read(path, as_version=4).cells
    return [cell for cell in cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_form(path: Path) -> None:
    content = nbformat.read(path, as_version=4)
    assert content.metadata["kernelspec"]["name"] == "python3"
    assert content.cells[0].cell_type == "markdown" and content.cells[0].source.startswith("# ")
    cells = code_cells(path)
    tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    for node in ast.parse(tagged[0].source).body:  # typed literals only
        assert isinstance(node, ast.Assign)
        ast.literal_eval(node.value)
    for cell in cells:
        assert len(cell.source.splitlines()) <= 25
        kinds = {type(node) for node in ast.walk(ast.parse(cell.source))}
        assert not kinds & {ast.FunctionDef, ast.ClassDef}, "functions belong to kelib"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs_are_executed_and_without_errors(path: Path) -> None:
    cells = code_cells(path)
    assert all(cell.execution_count is not None for cell in cells)
    assert not any(out.output_type == "error" for cell in cells for out in cell.outputs)
    compared = [
        cell
        for cell in cells
        if cell.outputs and "nbval-ignore-output" not in cell.metadata.get("tags", [])
    ]
    assert compared, "nbval would compare nothing"


def test_figure_notebooks_do_not_import_torch() -> None:
    """One process for all: each would import pandas and matplotlib again."""
    lines = ["import sys"]
    for path in FIGURES:
        lines += [
            ast.unparse(node)
            for cell in code_cells(path)
            for node in ast.walk(ast.parse(cell.source))
            if isinstance(node, (ast.Import, ast.ImportFrom))
        ]
        lines.append(f"assert 'torch' not in sys.modules, {path.stem!r}")
    assert len(FIGURES) > 30
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, timeout=120)


def small_notebook(folder: Path, body: str) -> Path:
    parameters = nbformat.v4.new_code_cell("number = 1", metadata={"tags": ["parameters"]})
    cells = [parameters, nbformat.v4.new_code_cell(body)]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    path = folder / "small.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


def test_unknown_parameter_is_refused_before_anything_runs(tmp_path: Path) -> None:
    notebook = small_notebook(tmp_path, "print(number)")
    with pytest.raises(KelibError, match=r"small.ipynb has no parameter numbr; .* number"):
        run_notebook(notebook, tmp_path / "out.ipynb", {"numbr": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["small.ipynb"]


def test_parameters_reach_the_notebook_and_the_output_appears_whole(tmp_path: Path) -> None:
    run_notebook(
        small_notebook(tmp_path, "print(number + 1)"), tmp_path / "out.ipynb", {"number": 6}
    )
    printed = [out.text for cell in code_cells(tmp_path / "out.ipynb") for out in cell.outputs]
    assert printed == ["7\n"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.ipynb", "small.ipynb"]


def test_failing_notebook_leaves_the_old_output_and_a_failed_copy(tmp_path: Path) -> None:
    (tmp_path / "out.ipynb").write_text("old")
    notebook = small_notebook(tmp_path, "1 / 0")
    with pytest.raises(KelibError, match=r"small.ipynb failed: ZeroDivisionError.*\n.*out.failed"):
        run_notebook(notebook, tmp_path / "out.ipynb", {})
    assert (tmp_path / "out.ipynb").read_text() == "old"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["out.failed.ipynb", "out.ipynb", "small.ipynb"]


def test_generated_block_is_replaced_and_missing_markers_are_named() -> None:
    text = "a\n<!-- generated: x -->\nold\n<!-- end of x -->\nb"
    assert replace_generated(text, "x", "new") == text.replace("old", "new")
    with pytest.raises(KelibError, match=r"no markers <!-- generated: y -->.*found x"):
        replace_generated(text, "y", "new")


def test_readme_shows_the_claims_of_the_reference() -> None:
    shown = shown_profile(ROOT / "notebooks" / "tab00_claims.ipynb")
    claims = pd.read_csv(ROOT / "figures" / "reference" / str(shown) / "tab00_claims.csv")
    assert claims_markdown(claims) in (ROOT / "README.md").read_text("utf-8")


def published_files() -> list[Path]:
    """Everything tracked or about to be, and every output of a run beside it."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    tracked = [ROOT / line for line in listed.stdout.splitlines()]
    drawn = [*ROOT.glob("figures/**/*"), *ROOT.glob("data/measurements/**/*.csv")]
    suffixes = {".ipynb", ".csv", ".json", ".md", ".html", ".yaml", ".txt", ".py"}
    return [path for path in {*tracked, *drawn} if path.suffix in suffixes and path.is_file()]


def grams(text: str) -> set[str]:
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {" ".join(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1)}


def leaks(texts: list[str], files: list[Path]) -> list[str]:
    """Names of the files that share a run of words with one of the texts."""
    seen = {gram: path.name for path in files for gram in grams(path.read_text("utf-8", "ignore"))}
    return sorted({seen[gram] for text in texts for gram in grams(text) if gram in seen})


def test_the_search_for_fetched_text_finds_a_planted_passage(tmp_path: Path) -> None:
    stream = build_world(WorldSize(12, 12, 12, 2, 2, 4), 5).documents(0)
    texts = [" ".join(next(stream) for _ in range(3)) for _ in range(20)]
    (tmp_path / "clean.csv").write_text("a,b\n1,2\n")
    (tmp_path / "leak.csv").write_text("item,text\n1," + texts[7][5:] + "\n")
    assert leaks(texts, sorted(tmp_path.iterdir())) == ["leak.csv"]


@pytest.mark.parametrize("name", sorted(manifest()))
def test_no_fetched_text_in_what_is_published(name: str) -> None:
    folder = ROOT / "data" / "sources"
    if not all(path.exists() for path in manifest()[name].paths(folder)):
        pytest.skip(f"the text of {name} was not fetched here (make data)")
    assert leaks([one_line(text) for text in documents(name, folder)], published_files()) == []

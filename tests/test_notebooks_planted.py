"""What is wrong with a notebook is found: copies of a committed one, with one thing changed."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from test_notebooks import test_committed_outputs_are_executed_and_without_errors as executed
from test_notebooks import test_form as form

from kelib.config import repository_root
from kelib.errors import KelibError
from kelib.notebooks import run_notebook

ROOT = repository_root()
COMMITTED = ROOT / "notebooks" / "fig02_knowledge_entropy.ipynb"


class Copy:
    """A copy to change, without what draws: that takes seconds and is not compared."""

    def __init__(self) -> None:
        self.content = nbformat.read(COMMITTED, as_version=4)
        drawing = next(n for n, c in enumerate(self.content.cells) if "plots.panels" in c.source)
        del self.content.cells[drawing:]
        for cell in self.content.cells:
            cell.source = cell.source.replace("from kelib import plots\n", "")
        self.code = [cell for cell in self.content.cells if cell.cell_type == "code"]

    def write(self, path: Path) -> Path:
        nbformat.write(self.content, path)
        return path

    def cell(self, piece: str) -> int:
        """The number of the first code cell with that piece, as nbval counts."""
        return next(n for n, cell in enumerate(self.code) if piece in cell.source)


def compared(path: Path) -> tuple[set[int], set[int], str]:
    """(cells that passed, cells that failed, report) of the check that make test does."""
    (flags,) = re.findall(r"^NBVAL := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    command = [sys.executable, *shlex.split(flags), "-rA", "-c", str(ROOT / "pyproject.toml")]
    done = subprocess.run(
        [*command, path.name], cwd=path.parent, capture_output=True, text=True, timeout=300
    )
    found = {
        word: {int(n) for n in re.findall(rf"^{word} .*Cell (\d+)", done.stdout, re.MULTILINE)}
        for word in ("PASSED", "FAILED")
    }
    assert done.returncode == (1 if found["FAILED"] else 0), done.stdout
    return found["PASSED"], found["FAILED"], done.stdout


def test_the_comparison_finds_what_was_changed(tmp_path):
    copy = Copy()
    number, raising = copy.cell("end - first stage"), copy.cell("assert entropy")
    (printed,) = copy.code[number].outputs
    first = re.search(r"\d+\.\d{3}", printed.text)
    changed = first[0][:-1] + str((int(first[0][-1]) + 1) % 10)  # in its last decimal
    printed.text = printed.text.replace(first[0], changed, 1)
    copy.code[raising].source += "\nassert len(totals) == 0, 'planted'"
    passed, failed, said = compared(copy.write(tmp_path / "planted.ipynb"))
    assert failed == {number, raising}
    assert passed == set(range(len(copy.code))) - failed  # they print what is committed
    assert changed in said and "planted" in said


def test_form_and_state_of_a_committed_notebook(tmp_path):
    path = tmp_path / "planted.ipynb"
    form(Copy().write(path))
    executed(path)

    without = Copy()
    tagged = without.cell("source = ")
    without.code[tagged].metadata["tags"] = []
    with pytest.raises(AssertionError):
        form(without.write(path))
    with pytest.raises(KelibError, match=r"planted.ipynb has no parameter profile"):
        run_notebook(path, tmp_path / "out.ipynb", {"profile": "small"})

    computed = Copy()
    computed.code[tagged].source += "\nnumber = int('3')"
    with pytest.raises(ValueError, match="malformed node"):
        form(computed.write(path))

    unexecuted = Copy()  # nbval passes over such a cell
    unexecuted.code[-1].execution_count = None
    with pytest.raises(AssertionError):
        executed(unexecuted.write(path))

    failed = Copy()
    failed.code[-1].outputs = [nbformat.v4.new_output("error", ename="E", evalue="", traceback=[])]
    with pytest.raises(AssertionError):
        executed(failed.write(path))

    nothing = Copy()
    for cell in nothing.code:
        cell.metadata["tags"] = [*cell.metadata.get("tags", []), "nbval-ignore-output"]
    with pytest.raises(AssertionError, match="nbval would compare nothing"):
        executed(nothing.write(path))

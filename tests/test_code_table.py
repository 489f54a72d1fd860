"""The table of modules that a run's digest rests on, against what its job really imports."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from kelib.config import load_profile
from kelib.runs import CODE, Run
from kelib.study import Study

KELIB = Path(__file__).parents[1] / "kelib"
# Settings are in the digest as values, errors change no number; of the other two, which also hold
# what no run rests on, the table names single functions.
LEFT_OUT = {"config", "errors", "jobs", "metrics"}


def parsed(module: str) -> ast.Module:
    return ast.parse((KELIB / f"{module}.py").read_text(encoding="utf-8"))


def imported(*trees: ast.AST) -> set[str]:
    """Modules of kelib that the code imports, at its top or inside a function."""
    names: set[str] = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = "kelib." * bool(node.level) + (node.module or "")
            package = package.removesuffix(".")
            inside = [f"kelib.{a.name}" for a in node.names] if package == "kelib" else [package]
            names |= set(inside)
    return {name.split(".")[1] for name in names if name.startswith("kelib.")}


def reached(kind: str) -> set[str]:
    """Modules that a job of this kind imports, directly or through others."""
    others = set(CODE) - {kind}
    body = parsed("jobs").body
    todo = imported(*(node for node in body if getattr(node, "name", None) not in others))
    found: set[str] = set()
    while todo:
        found.add(module := todo.pop())
        todo |= imported(parsed(module)) - found
    return found - LEFT_OUT


def run_of(kind: str) -> Run:
    study = Study(load_profile("smoke"), Path("data"))
    runs = {
        "corpus": study.corpus_run(0),
        "pretrain": study.pretrain_run(0),
        "measure": study.measure_run(0, 0),
        "continual": study.continual_run(0, 0, 1e-3, 0),
    }
    return runs[kind]


def listed(kind: str) -> set[str]:
    return {name.partition(":")[0] for name in CODE[kind]} - LEFT_OUT


def covered(run: Run) -> set[str]:
    """Modules in the digest of a run: its own, and those of the runs it rests on."""
    return listed(run.kind).union(*(covered(made) for made in run.inputs.values()))


@pytest.mark.parametrize("kind", CODE)
def test_the_digest_covers_what_the_job_imports(kind: str) -> None:
    assert reached(kind) - covered(run_of(kind)) == set(), "add these to CODE in kelib/runs.py"
    assert listed(kind) - reached(kind) == set(), "no job of this kind imports these"


def test_imports_are_found_in_every_form_and_through_other_modules() -> None:
    code = "import kelib.a, os\nfrom kelib import b\nfrom . import c\nfrom .d import x\n"
    code += "def f():\n    from kelib.e import y\n    from pathlib import Path\n"
    assert imported(ast.parse(code)) == set("abcde")
    assert {"sources", "parsing", "dice", "wordings"} <= reached("corpus")
    assert "training" not in reached("corpus") and "injection" not in reached("pretrain")

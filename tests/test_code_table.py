"""The code table against what the jobs really import, and what changes a run's digest."""

from __future__ import annotations

import ast
import inspect
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from kelib import code_table, continued
from kelib.beyond import branch_run, mechanism_runs, reactivation_runs, retention_runs
from kelib.code_table import CODE, WORK, code_digest, work_of
from kelib.config import load_profile
from kelib.published import PublishedStudy, load_published
from kelib.runs import Run
from kelib.study import Study
from kelib.trajectory import Trajectory
from kelib.trajectory_profile import load_trajectory

KELIB = Path(__file__).parents[1] / "kelib"
# Settings are in the digest as values; errors, how the hub is asked for a commit and its files are
# fetched, under which names files are written and how they are sealed, change no number; of two,
# which also hold what no run rests on, the table names single functions.
LEFT_OUT = {
    "arms",
    "config",
    "errors",
    "jobs",
    "metrics",
    "recipes",
    "redaction",
    "schema",
    "seals",
    "sections",
    "temporary",
}
LEFT_OUT |= {"checkpoint_files", "fetching", "hub", "state_files", "versions"}


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
    if kind in WORK:
        return _through({WORK[kind].partition(":")[0]})
    body = parsed("jobs").body
    functions = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
    called, names = set(), {kind}  # the job, and what it calls of the functions beside it
    while names - called:
        called |= names
        names = {
            getattr(node.func, "id", "")
            for name in called
            for node in ast.walk(functions[name])
            if isinstance(node, ast.Call)
        } & set(functions)
    top = [node for node in body if not isinstance(node, ast.FunctionDef)]
    return _through(imported(*top, *(functions[name] for name in called)))


def _through(todo: set[str]) -> set[str]:
    found: set[str] = set()
    while todo:
        found.add(module := todo.pop())
        todo |= imported(parsed(module)) - found
    return found - LEFT_OUT


def run_of(kind: str) -> Run:
    study = Study(load_profile("smoke"), Path("data"))
    columns = ["seed", "step", "entropy_nats"]
    flat = [(seed, step, 1.0) for seed in study.profile.seeds for step in (0, 60)]
    entropy = pd.DataFrame(flat, columns=columns)
    runs = {
        "corpus": study.corpus_run(0),
        "pretrain": study.pretrain_run(0),
        "entropy": study.entropy_run(0, 0),
        "evaluate": study.evaluate_run(0, 0),
        "entities": study.entities_run(0),
        "intervene": study.intervene_run(0, 0, study.resuscitations()[0]),
        "continual": study.continual_run(0, 0, 1e-3, 0, True, study.resuscitations()[0]),
        "mechanism": mechanism_runs(study, entropy)[0],
        "later": retention_runs(study, entropy)[-1],
        "reactivation": reactivation_runs(study)[-1],
        "branch": branch_run(study, 0, study.profile.branches.branches[0]),
    }
    other = PublishedStudy(load_published("published_smoke"), Path("data"))
    runs |= {"import_model": other.model_run(), "published": other.runs()[0]}
    runs["asked"] = other.question_runs()[0]
    runs["own_model"] = Run("own_model", Path("data"), {})
    runs["hub_text"] = Run("hub_text", Path("data"), {})
    runs["packed_text"] = Run("packed_text", Path("data"), {}, {"text": runs["hub_text"]})
    runs["trajectory"] = Trajectory(load_trajectory("trajectory_smoke"), Path("data")).runs()[0]
    runs["untrained"] = runs["trajectory"].inputs["checkpoints"]
    along = Trajectory(load_trajectory("trajectory_smoke"), Path("data"))
    runs["learning_text"] = continued.text_run(along)
    runs["known"] = continued.known_run(along, along.learning_revisions[0])
    runs["continued"] = continued.continued_runs(along, along.learning_revisions[0])[0]
    return runs[kind]


def listed(kind: str) -> set[str]:
    return {name.partition(":")[0] for name in CODE[kind]} - LEFT_OUT


def covered(run: Run) -> set[str]:
    """Modules in the digest of a run: its own, and those of the runs it rests on."""
    return listed(run.kind).union(*(covered(made) for made in run.inputs.values()))


@pytest.mark.parametrize("kind", CODE)
def test_the_digest_covers_what_the_job_imports(kind: str) -> None:
    assert reached(kind) - covered(run_of(kind)) == set(), "add these to kelib/code_table.py"
    assert listed(kind) - reached(kind) == set(), "no job of this kind imports these"


@pytest.mark.parametrize("kind", ["published", "asked"])
def test_a_readers_own_model_covers_as_much_as_an_imported_one(kind: str) -> None:
    run = replace(run_of(kind), inputs={"model": run_of("own_model")})
    assert reached(kind) - covered(run) == set()


def test_imports_are_found_in_every_form_and_through_other_modules() -> None:
    code = "import kelib.a, os\nfrom kelib import b\nfrom . import c\nfrom .d import x\n"
    code += "def f():\n    from kelib.e import y\n    from pathlib import Path\n"
    assert imported(ast.parse(code)) == set("abcde")
    assert {"sources", "parsing", "dice", "wordings"} <= reached("corpus")
    assert "training" not in reached("corpus") and "injection" not in reached("pretrain")


@pytest.fixture
def copied_code(tmp_path, monkeypatch):
    """``copied_code(module, old, new)``: digests by kind if kelib's code read so.

    Without ``old`` a statement is added at the end: of the module, or of ``module:function``.
    """

    def digests(place=None, old="", new=""):
        folder = tmp_path / "code"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(KELIB, folder, ignore=shutil.ignore_patterns("__pycache__"))
        if place is not None:
            module, _, function = place.partition(":")
            path = folder / f"{module}.py"
            text = path.read_text()
            assert old in text
            if not old and not function:
                text += "\nassert True\n"
            elif not old:
                body = next(
                    n.body for n in ast.parse(text).body if getattr(n, "name", "") == function
                )
                lines = text.splitlines()
                lines.insert(body[-1].lineno - 1, " " * body[-1].col_offset + "assert True")
                text = "\n".join(lines)
            path.write_text(text.replace(old, new, 1) if old else text)
        monkeypatch.setattr(code_table, "__file__", str(folder / "code_table.py"))
        return {kind: code_digest.__wrapped__(kind) for kind in CODE}

    return digests


def test_comments_docstrings_and_layout_do_not_change_the_digest(copied_code):
    before = copied_code()
    assert before == {kind: code_digest(kind) for kind in CODE}
    assert before == copied_code("training", '"""The one training loop', '"""Another docstring')
    assert before == copied_code("training", '    """AdamW on batches', '    """Adam on batches')
    assert before == copied_code("training", "import math\n", "# a remark\n\nimport math  # why\n")
    assert before == copied_code("training", "low + (1 - low)", "low + (  1 - low  )")


MODELS = ("import_model", "own_model")
ALONG = ("trajectory", "untrained")  # along published checkpoints
CONTINUED = ("known", "continued")  # continual learning from them
SCORED = ("evaluate", "intervene", "continual", "published")
PACKED = ("learning_text", *CONTINUED)


@pytest.mark.parametrize(
    ("place", "kinds"),
    [
        ("corpus", {"corpus", "published", *ALONG}),
        ("hub_text", {"hub_text", "packed_text", *PACKED}),
        ("hub", set()),
        ("hub_sources", set()),
        ("wordings", {"asked", "corpus", *MODELS, *ALONG, *PACKED}),
        ("training", {"pretrain", "continual", "branch", "continued"}),
        ("entropy", {"entropy", "intervene", "continual", "published", *ALONG}),
        ("scoring", {"asked", *SCORED, *ALONG, *CONTINUED}),
        ("interventions", {"intervene", "continual"}),
        ("decomposition", {"mechanism", "later", "reactivation"}),
        ("mechanism", {"mechanism"}),
        ("mechanism_inputs", {"mechanism", "later", "reactivation"}),
        ("retention", {"later"}),
        ("reactivation", {"reactivation"}),
        ("beyond_tables", set()),
        ("branches", {"branch"}),
        ("jobs:continual", {"continual"}),
        ("jobs:pretrain", {"pretrain"}),
        ("jobs:_write_items", {"evaluate", "intervene", "continual", "later"}),
        ("jobs:_start", {"intervene", "continual", "reactivation"}),
        ("metrics:_per_entry", {*SCORED, *ALONG, *CONTINUED}),
        ("convergence", {"entropy", "published", *ALONG}),
        ("metrics:knowledge_score", {*SCORED, *ALONG, *CONTINUED}),
        ("metrics:bootstrap_interval", set()),  # no stored number rests on these
        ("runs", set()),
        ("learning", {"continued"}),
        ("known", set(CONTINUED)),
        ("plots", set()),
    ],
)
def test_code_changes_the_digest_of_what_rests_on_it(copied_code, place, kinds):
    before = {kind: code_digest(kind) for kind in CODE}  # kept from one place to the next
    after = copied_code(place)
    assert {kind for kind in CODE if before[kind] != after[kind]} == kinds


def test_a_number_in_the_code_changes_the_digest(copied_code):
    before = copied_code()
    after = copied_code("training", "0.5 * (1 + math.cos", "0.4 * (1 + math.cos")
    rest = {"pretrain", "continual", "branch", "continued"}
    assert {kind for kind in CODE if before[kind] != after[kind]} == rest


@pytest.mark.parametrize("kind", CODE)
def test_every_kind_has_its_job_in_its_digest(kind):
    job = WORK.get(kind, f"jobs:{kind}")
    module = job.partition(":")[0]
    assert (module if kind in WORK else job) in CODE[kind]
    settings, inputs, folder, progress = inspect.signature(work_of(kind)).parameters.values()
    assert (settings.name, inputs.name, folder.name) == ("settings", "inputs", "folder")
    assert progress.default is inspect.Parameter.empty

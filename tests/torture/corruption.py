"""Damage to every kind of file that a study leaves, and then the way in which a user reads it.

A damaged file is survived if an error of kelib's names it and the remedy, or if what is read or
computed again is what it was without the damage. A number that changed without a word is not, and
neither is the traceback of a library.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import os
import random
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kelib.code_table import work_of
from kelib.config import repository_root
from kelib.errors import KelibError

FLIPS = 4  # places in a file
SEED, STEP = 100, 20  # of the study
KINDS = {
    ".csv": "table",
    ".json": "provenance of a table",
    ".safetensors": "coefficient vectors",
}
REMEDIES = r"delete|restore|run |fetch|draw|give|bring"


@dataclass(frozen=True)
class Artefact:
    """A file, and ``use``: what reads it and returns that which must not change.

    ``use`` returns None where it can only refuse: it begins a run that rests on the file. ``named``
    is what a refusal must say (the name of the file by default), ``folder`` what is restored
    after each damage.
    """

    kind: str
    path: Path
    use: Callable[[], Any]
    folder: Path
    named: str = ""


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for every kind of file and of damage; ``options.count`` bounds the cases of each row
    (0: all there are), ``options.only`` the kinds."""
    os.environ["PIP_NO_INDEX"] = "1"  # what is gone must not come from elsewhere
    dice = random.Random(options.seed)
    made = [*light(options.folder / "light"), *study_files(options.folder / "study")]
    yield from results(made, dice, options.count, options.only)


def results(
    artefacts: list[Artefact], dice: random.Random, count: int = 0, only: list[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Do the damages and judge them: see :func:`rows`."""
    by_kind: dict[str, list[Artefact]] = {}
    for artefact in artefacts:
        if not only or any(word in artefact.kind for word in only):
            by_kind.setdefault(artefact.kind, []).append(artefact)
    for kind, members in by_kind.items():
        cases: dict[str, list[tuple[Artefact, bytes | None]]] = {}
        for artefact in members:
            for damage, content in damages(artefact, members, dice):
                cases.setdefault(damage, []).append((artefact, content))
        uses = {artefact.use for artefact in members}
        expected = {use: None if isinstance(use, Refusing) else use() for use in uses}
        for damage, found in cases.items():
            chosen = dice.sample(found, min(count, len(found))) if count else found
            judged = [case(*one, expected[one[0].use]) for one in chosen]
            good = [outcome for outcome, _ in judged if outcome in ("refused", "same")]
            bad = [note for outcome, note in judged if outcome not in ("refused", "same")]
            counts = ", ".join(f"{n} {name}" for name, n in sorted(Counter(good).items()))
            yield {
                "case": f"{kind}: {damage}",
                "tried": len(judged),
                "survived": len(good),
                "note": " | ".join([*([counts] if counts else []), *bad[:3]]),
            }


def damages(
    artefact: Artefact, others: list[Artefact], dice: random.Random
) -> Iterator[tuple[str, bytes | None]]:
    """(name, what the file then holds; None: it is gone) of every damage to a file."""
    content = artefact.path.read_bytes()
    for _ in range(FLIPS if content else 0):
        place, bit = dice.randrange(len(content)), dice.randrange(8)
        yield "bit flipped", _at(content, place, content[place] ^ (1 << bit))
    if len(content) > 1:
        yield "cut", content[: dice.randrange(1, len(content))]
    if content:
        yield "emptied", b""
    yield "deleted", None
    if content:
        yield "lengthened", content + content[-1:]
    same_name = [o.path for o in others if o.path.name == artefact.path.name]
    same_kind = [o.path for o in others if o.path.suffix == artefact.path.suffix]
    for name, paths in (("of another place", same_name), ("of another name", same_kind)):
        found = [b for p in paths if p.exists() and (b := p.read_bytes()) != content]
        if found:
            yield f"exchanged for that {name}", dice.choice(found)
            break
    digits = [m.start() for m in re.finditer(rb"[0-9]", content)] if _is_text(content) else []
    for place in dice.sample(digits, min(FLIPS, len(digits))):
        digit = dice.choice([d for d in b"0123456789" if d != content[place]])
        yield "digit changed", _at(content, place, digit)


def _at(content: bytes, place: int, byte: int) -> bytes:
    return content[:place] + bytes([byte]) + content[place + 1 :]


def _is_text(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return b"\0" not in content


def case(artefact: Artefact, content: bytes | None, expected: Any) -> tuple[str, str]:
    """(refused, same, changed, unnamed or traceback, what happened) for one damage; the folder is
    as it was afterwards."""
    kept = artefact.folder.with_name(f"{artefact.folder.name}.kept")
    shutil.copytree(artefact.folder, kept, symlinks=True)  # with its times
    try:
        if content is None:
            artefact.path.unlink()
        else:
            artefact.path.write_bytes(content)
        return _judge(artefact, expected)
    finally:
        shutil.rmtree(artefact.folder, ignore_errors=True)
        kept.rename(artefact.folder)


def _judge(artefact: Artefact, expected: Any) -> tuple[str, str]:
    try:
        found = artefact.use()
    except KelibError as error:
        said = str(error)
        named = (artefact.named or artefact.path.name) in said or artefact.folder.name in said
        if named and re.search(REMEDIES, said) and "Traceback" not in said:
            return "refused", said
        return "unnamed", f"{artefact.path.name}: the error says {said!r}"
    except Exception as error:
        return "traceback", f"{artefact.path.name}: {type(error).__name__}: {error}"
    if expected is not None and found == expected:
        return "same", ""
    return "changed", f"{artefact.path}: nothing was said"


class Refusing:
    """A use that can only refuse: a run that is never done without damage."""

    def __init__(self, run: Any) -> None:
        self.run = run

    def __call__(self) -> Any:
        from kelib.runs import perform

        perform(self.run)
        shutil.rmtree(self.run.folder)  # else it is done, and refuses nothing any more


# --- files that no model is needed for ------------------------------------------------------------


def light(folder: Path) -> list[Artefact]:
    """Archives, tables of the reference, numbers of figures, and the lock of revisions."""
    folder.mkdir(parents=True)
    return [*archives(folder), *reference(folder), *lock(folder)]


def archives(folder: Path) -> list[Artefact]:
    """An archive placed by hand, and its member as fetched."""
    from kelib.source_text import parse
    from kelib.sources import fetch

    sys.path.insert(0, str(repository_root()))
    from tests.test_sources import build_wheel

    source = build_wheel(folder / "sources")
    fetch(source, folder / "sources")

    def read() -> list[str]:
        return parse(source, folder / "sources")

    def unpack() -> list[str]:
        shutil.rmtree(folder / "sources" / "tiny-1.0", ignore_errors=True)
        fetch(source, folder / "sources")
        return read()

    fetched = source.paths(folder / "sources")[0]
    return [
        Artefact("archive", folder / "sources" / source.archive, unpack, folder / "sources"),
        Artefact("text of an archive", fetched, read, folder / "sources", "'tiny'"),
    ]


def reference(folder: Path) -> list[Artefact]:
    """Copies of committed tables, their provenance, coefficient vectors, and a figure's numbers."""
    from kelib.results import read_figure_note
    from kelib.tables import read_provenance, read_table, read_vectors

    def shown(path: Path) -> str:
        if path.suffix == ".safetensors":
            vectors = read_vectors(path, "entropy")
            return hashlib.sha256(b"".join(v.tobytes() for v in vectors.values())).hexdigest()
        table = path.with_suffix(".csv")
        return read_table(table).to_csv() + str(read_provenance(table))

    root, found = repository_root(), []
    for name in ("small", "bench"):
        place = folder / "reference" / name
        shutil.copytree(root / "data" / "reference" / name, place)
        for path in sorted(place.iterdir()):
            found.append(Artefact(KINDS[path.suffix], path, functools.partial(shown, path), place))
    place = folder / "figures"
    shutil.copytree(root / "figures" / "reference" / "small", place)
    for path in sorted(place.glob("*.csv")) + sorted(place.glob("*.json")):
        note = path.with_suffix(".json")

        def use_figure(note: Path = note) -> str:
            return str(read_figure_note(note)) + note.with_suffix(".csv").read_text()

        kind = "numbers of a figure" if path.suffix == ".csv" else "provenance of a figure"
        found.append(Artefact(kind, path, use_figure, place))
    return found


def lock(folder: Path) -> list[Artefact]:
    """A lock of revisions, and that of another model, which says nothing of the first."""
    from kelib.catalogue import LOCK_HEAD, revisions_of, write_lock

    found = []
    for name in ("one", "other"):
        place = folder / f"lock-{name}"
        place.mkdir()
        path, repo = place / "revisions.lock.yaml", f"me/{name}"
        commits = {f"step{n}": hashlib.sha1(f"{name}{n}".encode()).hexdigest() for n in range(5)}
        write_lock(path, LOCK_HEAD, f"me--{name}", repo, commits)

        def use(path: Path = path, repo: str = repo) -> list[Any]:
            return revisions_of(repo, path)

        found.append(Artefact("lock of revisions", path, use, place))
    return found


# --- files of a study -----------------------------------------------------------------------------


def study_files(folder: Path) -> list[Artefact]:
    """Files of finished runs of every kind, and the tables made of them."""
    from kelib import stages
    from kelib.beyond import mechanism_runs
    from kelib.runs import perform

    sys.path.insert(0, str(repository_root()))
    from tests.short import do, measured_study

    changes = {"branches": None, "pretraining.optimizer_states": [10, STEP]}
    changes |= {"continual.control_seeds": [], "continual.stages": [1.0]}
    measured = measured_study(folder, changes)
    study = measured.study
    (looked, *_) = mechanism_runs(study, measured.entropy)
    learned = looked.inputs["continual"]
    changed = study.intervene_run(SEED, STEP, study.resuscitations()[0])
    do([learned, changed])
    again = study.intervene_run(SEED, STEP, study.resuscitations()[1])

    def measure() -> str:
        do([*study.measure_runs(), *study.entities_runs()])  # what is missing, without workers
        stages.measure(study)
        return _digest(study.measurements)

    def read(run: Any, name: str) -> str:
        perform(run)
        name = "result.json" if name == "run.json" else name
        return str(run.read_table(name).to_csv() if name.endswith(".csv") else run.read(name))

    found: list[Artefact] = []
    for name in ("corpus", "pretrain", "entropy"):
        found += _files(again.inputs[name], Refusing(again))
    found += _files(learned, Refusing(looked))
    for run in (changed, study.evaluate_run(SEED, STEP), study.entities_run(SEED)):
        for path in _paths(run.folder):
            whole = run.kind == "entities" or (path.name == "run.json" and run.kind == "evaluate")
            use = measure if whole else functools.partial(read, run, path.name)
            if path.suffix in (".csv", ".json"):
                found.append(Artefact(_kind(run, path), path, use, run.folder))
    found += interrupted(study)
    vectors = study.entropy_run(SEED, STEP).folder / "coefficients.safetensors"
    found.append(Artefact("coefficient vectors of a run", vectors, measure, vectors.parent))
    return found


def interrupted(study: Any) -> list[Artefact]:
    """What a pretraining and a continual learning leave that are stopped half-way."""
    found = []
    first, *_ = study.pretrain_runs()
    again = {**first.settings, "seed": SEED + 1, "digest": "another"}
    plan = study.profile.continual
    learned = study.continual_run(SEED, STEP, plan.learning_rates[0], plan.seeds[0])
    settings = {**learned.settings, "cl_seed": 77, "curve": True}
    settings["continual"] = {**settings["continual"], "save_every": 2}
    for run in (replace(first, settings=again), replace(learned, settings=settings)):
        with contextlib.suppress(_Stopped):
            inputs = {name: made.folder for name, made in run.inputs.items()}
            run.partial.mkdir(parents=True)
            work_of(run.kind)(run.settings, inputs, run.partial, _stop)
        use = functools.partial(_go_on, run)
        for path in _paths(run.partial):
            kind = f"an interrupted run ({run.kind})"
            found.append(Artefact(kind, path, use, run.partial))
    return found


class _Stopped(Exception):
    pass


def _stop(share: float) -> None:
    if share > 0.6:
        raise _Stopped


def _go_on(run: Any) -> str:
    """The numbers at the end of an interrupted run, which is interrupted again afterwards."""
    from kelib.runs import perform

    kept = run.partial.with_name(f"{run.partial.name}.before")
    shutil.copytree(run.partial, kept)
    try:
        perform(run)
        paths = [path for path in _paths(run.folder) if path.name != "run.json"]  # has its times
        return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()
    finally:
        shutil.rmtree(run.folder, ignore_errors=True)
        shutil.rmtree(run.partial, ignore_errors=True)
        kept.rename(run.partial)


def _files(run: Any, use: Callable[[], Any]) -> list[Artefact]:
    return [Artefact(_kind(run, path), path, use, run.folder) for path in _paths(run.folder)]


def _paths(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _kind(run: Any, path: Path) -> str:
    """Of an artefact, by the run that wrote it and the name of the file."""
    if path.name == "run.json":
        return "note of a run"
    if "tokenizer" in path.relative_to(run.folder).as_posix():
        return "tokenizer"
    if run.kind == "corpus":
        return "packed corpus"
    if path.suffix == ".safetensors":
        return "weights" if path.name.startswith("model") else "optimizer state or vectors"
    if run.kind == "pretrain":
        return "configuration or note of a checkpoint"
    return f"numbers of a run ({run.kind})"


def _digest(folder: Path) -> str:
    """Of all tables and vectors, without their provenance (which has times)."""
    paths = [*sorted(folder.glob("*.csv")), *sorted(folder.glob("*.safetensors"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()

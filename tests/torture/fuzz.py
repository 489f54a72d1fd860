"""Inputs that nobody meant, to everything that reads one: an error of kelib's or an answer.

Half of the examples are what the repository or a test holds, with a value replaced, removed, added
or repeated, or with some bytes of its text changed; the others are made of nothing. What counts is
that a reader raises :class:`kelib.errors.KelibError` or returns: a traceback of a library would
tell nobody what to correct, and a message of a megabyte neither.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import json
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from kelib.config import repository_root
from kelib.errors import KelibError

EXAMPLES = 10_000  # of each reader and strategy
LONGEST = 20_000  # characters of a message that a reader can take in

# What stands where something else is due. Hypothesis tries the first ones first.
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 2**31, 2**63, 10**30, -(10**400)),
    *(0.0, -0.0, 0.5, 1e308, -1e308, 5e-324, float("nan"), float("inf")),
    *("", " ", "x", "1e-4", "1.0", "..", "../../x", "/etc/passwd", "\0", "\ud800", "\n", "ä" * 99),
    *([], [[]], {}, {"": None}, [None], {1: 2}, {None: 0}, [1, [2, [3, [4]]]], "x" * 5000),
)
TOKENS = (
    *(b"\0", b"\xff", b"\xc3", b"\xef\xbb\xbf", b"\n", b"\r", b"\t", b": ", b"- ", b"&a ", b"*a"),
    *(b"!!python/object:os.system ", b"!!binary x", b"!!timestamp x", b"!!set {a}", b"<<: 1\n"),
    *(b"2026-99-99", b"1:99:99", b"0x", b"9" * 5000, b"1e999", b"[" * 30, b"{" * 30, b"? "),
    *(b"---\n", b"...\n", b"|", b">", b"%YAML 9.9\n", b"#", b"'", b'"', b",", b'"\\ud800"'),
    *(b"NaN", b"-Infinity", b"null", b"true", b"- " * 500),
)
# copies, as a reader may change what it is given
ODDITIES = st.sampled_from(ODD).map(copy.deepcopy)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    ODDITIES,
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


TASKS = ("sciq", "openbookqa", "hellaswag", "own")  # one of every form of choices


@dataclass(frozen=True)
class Reader:
    """``read`` takes values, or the bytes of a file if ``starts`` are bytes."""

    name: str
    read: Callable[[Any], Any]
    starts: tuple[Any, ...]


@st.composite
def changed(draw: Any, start: Any) -> Any:
    """A copy of ``start`` with one to three places changed."""
    value = copy.deepcopy(start)
    for _ in range(draw(st.integers(1, 3))):
        value = _change(draw, value)
    return value


def _change(draw: Any, value: Any) -> Any:
    place, path = value, []
    while isinstance(place, (dict, list)) and place and (not path or draw(st.integers(0, 4))):
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        path.append((place, draw(st.sampled_from(keys))))
        place = place[path[-1][1]]
    if not path:
        return draw(st.one_of(ODDITIES, ANYTHING))
    parent, key = path[-1]
    what = draw(st.sampled_from(("odd", "any", "gone", "more", "other", "number")))
    if what == "odd":
        parent[key] = draw(ODDITIES)
    elif what == "any":
        parent[key] = draw(ANYTHING)
    elif what == "gone":
        del parent[key]
    elif what == "more" and isinstance(parent, list):
        parent.insert(key, copy.deepcopy(draw(st.sampled_from((*parent, *ODD)))))
    elif what == "more":
        parent[draw(st.text(max_size=8))] = draw(ODDITIES)
    elif what == "other":
        (of, at) = draw(st.sampled_from(path))
        parent[key] = copy.deepcopy(of[at]) if of is not parent else None
    elif isinstance(place, (int, float)):
        with contextlib.suppress(OverflowError):  # of integers of hundreds of digits
            parent[key] = place * draw(st.sampled_from((-1, 0, 2, 1000, 0.5, 1e300)))
    return value


@st.composite
def damaged(draw: Any, start: bytes) -> bytes:
    """``start`` with one to four of its bytes or pieces changed."""
    content = bytearray(start)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(content) - 1, 0)))
        what = draw(st.sampled_from(("byte", "token", "cut", "twice", "gone")))
        if what == "byte" and content:
            content[place] = draw(st.integers(0, 255))
        elif what == "token":
            content[place:place] = draw(st.sampled_from(TOKENS))
        elif what == "cut":
            del content[place:]
        elif what == "twice":
            content[place:place] = content[place : place + draw(st.integers(1, 60))]
        elif what == "gone":
            del content[place : place + draw(st.integers(1, 60))]
    return bytes(content)


def strategies(reader: Reader) -> dict[str, st.SearchStrategy[Any]]:
    """By name, what a reader is given: changed inputs, and random ones."""
    starts = st.sampled_from(reader.starts)
    if isinstance(reader.starts[0], bytes):
        text = st.lists(st.sampled_from(TOKENS), max_size=12).map(b"".join)
        return {"changed": starts.flatmap(damaged), "random": st.one_of(st.binary(), text)}
    return {"changed": starts.flatmap(changed), "random": ANYTHING}


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for every reader and strategy; ``options.examples`` of each, 10,000 unless given."""
    examples = getattr(options, "examples", None) or EXAMPLES
    memory = Path("/dev/shm")  # thousands of files are written, on a disk each takes its time
    place = memory if os.access(memory, os.W_OK) else options.folder
    with tempfile.TemporaryDirectory(prefix="kelib-fuzz-", dir=place) as folder:
        for reader in readers(Path(folder)):
            if options.only and not any(word in reader.name for word in options.only):
                continue
            for name, strategy in strategies(reader).items():
                tried, wrong = fuzz(reader.read, strategy, examples, options.seed)
                yield {
                    "case": f"{reader.name}: {name}",
                    "tried": tried,
                    "survived": tried - sum(map(len, wrong.values())),
                    "note": " | ".join(f"{len(w)} x {at}: {w[0]}" for at, w in wrong.items()),
                }


def fuzz(
    read: Callable[[Any], Any],
    strategy: st.SearchStrategy[Any],
    examples: int,
    dice: int | None = None,
) -> tuple[int, dict[str, list[str]]]:
    """(how many examples were read, what went wrong by error and place). The examples are the same
    each time if ``dice`` is None."""
    wrong: dict[str, list[str]] = {}
    tried = 0

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=dice is None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def one(value: Any) -> None:
        nonlocal tried
        tried += 1
        if found := _wrong(read, value):
            wrong.setdefault(found[0], []).append(found[1])

    (one if dice is None else seed(dice)(one))()
    return tried, wrong


def _wrong(read: Callable[[Any], Any], value: Any) -> tuple[str, str] | None:
    """(error and place, message and value) if a value is not read as it should be."""
    try:
        read(value)
    except KelibError as error:
        return ("long message", str(error)[:80]) if len(str(error)) > LONGEST else None
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if "/kelib/" in frame.filename]
        where = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "outside kelib"
        return f"{type(error).__name__} at {where}", f"{str(error)[:80]} for {str(value)[:120]!r}"
    return None


# --- what reads ---------------------------------------------------------------------------------


def readers(folder: Path) -> list[Reader]:
    """All of them; files are written to ``folder``."""
    return [*of_parameters(folder), *of_data(folder), *of_tables(folder), *of_requests(folder)]


def from_file(path: Path, read: Callable[[Path], Any]) -> Callable[[bytes], Any]:
    """``read`` of a file that holds the bytes."""

    def of(content: bytes) -> Any:
        path.write_bytes(content)
        return read(path)

    return of


def as_json(path: Path, read: Callable[[Path], Any]) -> Callable[[Any], Any]:
    """``read`` of a file that holds the value as JSON, where JSON can."""

    def of(value: Any) -> Any:
        try:
            path.write_text(json.dumps(value), encoding="utf-8")
        except (TypeError, ValueError):  # keys that are no text, integers too long to write
            return None
        return read(path)

    return of


def of_parameters(folder: Path) -> Iterator[Reader]:
    """Profiles of every kind, claims, contrasts, cluster, catalogue and lock."""
    from kelib.catalogue import LOCK_HEAD, catalogue, read_lock, write_lock
    from kelib.claims import load_claims
    from kelib.cluster import load_cluster
    from kelib.config import profile_from
    from kelib.contrasts import load_contrasts
    from kelib.hub_sources import hub_sources
    from kelib.published import published_from
    from kelib.schema import read_yaml
    from kelib.trajectory_profile import trajectory_from

    root = repository_root()
    params = root / "notebooks" / "params"

    def text(*names: str) -> tuple[bytes, ...]:
        return tuple((params / f"{name}.yaml").read_bytes() for name in names)

    def values(*names: str) -> tuple[Any, ...]:
        return tuple(yaml.safe_load(content) for content in text(*names))

    def digested(build: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda given: build(given).digest

    study = digested(profile_from)
    yield Reader("profile", study, values("smoke", "study", "small"))
    yield Reader("profile of a published model", digested(published_from), values("smollm2"))
    one = ("trajectory_smoke", "pythia", "paper")
    yield Reader("profile of a trajectory", digested(trajectory_from), values(*one))
    of_file = from_file(folder / "profile.yaml", lambda path: study(read_yaml(path)))
    yield Reader("file of a profile", of_file, text("smoke"))
    # YAML takes milliseconds a kilobyte: of long files their first rows
    claims = yaml.safe_dump({"claims": values("claims")[0]["claims"][:3]}).encode()
    yield Reader("file of claims", from_file(folder / "claims.yaml", load_claims), (claims,))
    contrasts = yaml.safe_dump({"contrasts": values("contrasts")[0]["contrasts"][:3]}).encode()
    of_file = from_file(folder / "contrasts.yaml", load_contrasts)
    yield Reader("file of contrasts", of_file, (contrasts,))
    for name, load in (("claims", load_claims), ("contrasts", load_contrasts)):
        of_values = as_json(folder / f"values-{name}.yaml", load)  # JSON is YAML
        start = {name: values(name)[0][name][:3]}
        yield Reader(name, of_values, (start,))
    yield Reader("cluster", from_file(folder / "cluster.yaml", load_cluster), text("cluster"))
    families = {"families": yaml.safe_load((root / "data" / "catalogue.yaml").read_bytes())}
    families["families"] = families["families"]["families"][-1:]
    yield Reader("catalogue", as_json(folder / "catalogue.yaml", catalogue), (families,))
    sources = yaml.safe_load((root / "data" / "hub_sources.yaml").read_bytes())
    yield Reader("sources of the hub", as_json(folder / "hub.yaml", hub_sources), (sources,))
    lock = folder / "lock.yaml"
    commits = {f"step{n}": hashlib.sha1(b"%d" % n).hexdigest() for n in range(3)}
    write_lock(lock, LOCK_HEAD, "me--one", "me/one", commits)
    start = lock.read_bytes()
    yield Reader("file of locked revisions", from_file(lock, read_lock), (start,))
    of_values = as_json(folder / "values-lock.yaml", read_lock)
    yield Reader("locked revisions", of_values, (yaml.safe_load(start),))


def of_data(folder: Path) -> Iterator[Reader]:
    """Fictional Knowledge, and files of tasks."""
    from kelib.fictional import FIELDS, load_fictional_knowledge
    from kelib.task_files import OWN_SPLIT, PUBLIC_TASKS, read_items

    five = {name: [f"{name} {n}" for n in range(5)] for name in FIELDS[1:]}
    entry = {"train_context": "A thing.", **five, "paraphrases": [f"It {n}." for n in range(9)]}
    start = [copy.deepcopy(entry) for _ in range(3)]
    load = load_fictional_knowledge
    yield Reader("fictional knowledge", as_json(folder / "fictional.json", load), (start,))
    text = (json.dumps(start[:2]).encode(), json.dumps(entry).encode())
    for suffix, content in zip((".json", ".jsonl"), text, strict=True):
        of_file = from_file(folder / f"file{suffix}", load)
        yield Reader(f"file of fictional knowledge ({suffix})", of_file, (content,))
    items = {
        "sciq": {
            **{"support": "Water is wet.", "question": "What is?", "correct_answer": "water"},
            **{f"distractor{n}": f"stone {n}" for n in (1, 2, 3)},
        },
        "openbookqa": {
            "question_stem": "A bird eats",
            "choices": {"text": ["stones", "seeds"], "label": ["A", "B"]},
            "answerKey": "B",
        },
        "hellaswag": {
            **{"activity_label": "Baking", "ctx_a": "A man stands.", "ctx_b": "he"},
            **{"endings": ["sings", "bakes", "climbs", "sells"], "label": "1"},
        },
        "own": {"context": "The sky is", "choices": ["blue", "wide"], "answer": 0},
    }
    for task, item in ((task, items[task]) for task in TASKS):
        split = PUBLIC_TASKS[task].split if task in PUBLIC_TASKS else OWN_SPLIT
        path = folder / task / f"{split}.jsonl"
        path.parent.mkdir(exist_ok=True)

        def read(_: Path, task: str = task) -> Any:
            return read_items(task, folder)

        yield Reader(f"items of {task}", as_json(path, read), ([item, item],))
        lines = (json.dumps(item) + "\n").encode()
        yield Reader(f"file of {task}", from_file(path, read), (2 * lines,))


def of_tables(folder: Path) -> Iterator[Reader]:
    """Tables and their provenance, with the right hashes, so that what is behind these is met."""
    from safetensors.numpy import save

    from kelib import seals
    from kelib.results import read_figure_note, tables_in
    from kelib.tables import read_provenance, read_table, read_vectors

    place = folder / "tables"
    place.mkdir()
    root = repository_root()
    source = root / "data" / "reference" / "small"
    path = place / "entropy.csv"
    for name in ("entropy.csv", "entropy.json"):
        (place / name).write_bytes((source / name).read_bytes())
    start = path.read_bytes()[:400].rpartition(b"\n")[0] + b"\n"
    note = seals.unsealed(json.loads(path.with_suffix(".json").read_text()))

    def table(content: bytes) -> Any:
        path.write_bytes(content)
        fitting = {**note, "files": {}, "sha256": hashlib.sha256(content).hexdigest()}
        path.with_suffix(".json").write_text(json.dumps(seals.sealed(fitting)))
        return read_table(path)

    yield Reader("table", table, (start,))

    def provenance(text: Any) -> Any:
        with_seal = isinstance(text, dict)
        try:
            content = json.dumps(seals.sealed(text) if with_seal else text)
        except (TypeError, ValueError):  # what no JSON holds
            return None
        path.write_bytes(start)
        path.with_suffix(".json").write_text(content)
        read_provenance(path)
        return read_table(path)

    fitting = {**note, "files": {}, "sha256": hashlib.sha256(start).hexdigest()}
    yield Reader("provenance of a table", provenance, (fitting,))

    def opened(text: Any) -> Any:
        provenance(text)
        found = tables_in("small", path, place)
        return found.profile, found.label, found.inputs(["entropy"])

    yield Reader("tables of a profile", opened, (fitting,))
    text = json.dumps(seals.sealed(fitting)).encode()
    of_file = from_file(path.with_suffix(".json"), lambda _: read_table(path))
    yield Reader("file of provenance", of_file, (text,))
    vectors = place / "coefficients.safetensors"
    kept = {f"{step:07d}/00": np.linspace(0, 1, 5) for step in (0, 10)}

    def read(content: bytes) -> Any:
        provenance(fitting)
        vectors.write_bytes(content)
        return read_vectors(vectors, "entropy")

    yield Reader("coefficient vectors", read, (save(kept),))
    figure = root / "figures" / "reference" / "small" / "tab00_claims.json"
    (place / "figure.csv").write_bytes(figure.with_suffix(".csv").read_bytes())
    of_file = from_file(place / "figure.json", read_figure_note)
    yield Reader("provenance of a figure", of_file, (figure.read_bytes(),))


def of_requests(folder: Path) -> Iterator[Reader]:
    """Contexts and continuations, as token ids and as scores of a tiny model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from kelib.model_import import generated_documents
    from kelib.packing import save_tokenizer, train_tokenizer
    from kelib.scoring import score_continuations

    words, length = 400, 24
    save_tokenizer(train_tokenizer(generated_documents("generated:x"), words), length, folder / "t")
    tokenizer = AutoTokenizer.from_pretrained(folder / "t")
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = AutoConfig.for_model(
        "olmo", vocab_size=words, max_position_embeddings=length, num_attention_heads=2, **shape
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()

    def score(given: Any) -> Any:
        pairs = [pair for pair in given if isinstance(pair, (list, tuple)) and len(pair) == 2]
        pairs = [(a, b) for a, b in pairs if isinstance(a, str) and isinstance(b, str)]
        found = score_continuations(model, tokenizer, pairs[:4])
        assert all(one.log_probability <= 1e-6 and one.tokens > 0 for one in found)
        return found

    starts = (
        [["The sky is", " blue"], ["", " x"], ["a" * 60, "  b"]],
        [[tokenizer.eos_token, " x"], ["Where is\n", "\n\nhere?"]],
    )
    yield Reader(
        "scoring requests",
        lambda given: score(given) if isinstance(given, list) else None,
        starts,
    )

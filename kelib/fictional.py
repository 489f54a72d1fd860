"""The published *Fictional Knowledge* data (Chang et al. 2024) as entries to inject.

130 passages about things that do not exist, each with 15 probes, CC BY 4.0. The generated entries
of :mod:`kelib.entries` stand in for them where models are small; both are the same classes. None of
the text belongs into this repository.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kelib.entries import LEVELS, PASSAGES, Entry, Probe
from kelib.errors import KelibError, listing

HUB_ID = "kaist-ai/fictional-knowledge"
PARAPHRASE_ENTRIES = 70  # of 130 in the paper
PROBES = 5  # of each level
PREFIXES = dict(zip(LEVELS, ("mem", "gen", "hard_gen"), strict=True))
FIELDS = (
    "train_context",
    *(f"{prefix}_{part}" for prefix in PREFIXES.values() for part in ("input", "target")),
)
# The authors keep the two sets apart, in files named ..._once60.json and ..._paraphrase70.json.
_SET_FILE = re.compile(r"_(once|paraphrase)\d*\.json")
_ONE_FILE = "fictional_knowledge_paraphrased.json"  # of Chang et al.
_FORMATS = (".json", ".jsonl", ".parquet")
# a data set on the hub, perhaps at a commit
HUB_PLACE = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<commit>[0-9a-f]{40}))?")


def load_fictional_knowledge(
    source: str | Path = HUB_ID, paraphrase_entries: int | None = None
) -> tuple[tuple[Entry, ...], tuple[Entry, ...]]:
    """The entries of the (once, paraphrase) sets, each with 15 probes ordered by ``LEVELS``.

    ``source`` is one of

    * a file: ``.json`` (a list of entries), ``.jsonl`` (one a line) or ``.parquet``;
    * a folder with the two files of the authors' repository, ``*_once60.json`` and
      ``*_paraphrase70.json``, or with their folder ``fictional_knowledge``: the sets as published;
    * a folder that holds ``fictional_knowledge_paraphrased.json``, the file of Chang et al., or
      whose folder ``fictional_knowledge`` does;
    * any other folder, or the id of a data set on the hub, read by ``datasets``, split ``train``;
      ``id@commit`` reads that commit.

    An entry has the fields ``train_context`` (the original passage), ``mem_``, ``gen_`` and
    ``hard_gen_`` ``input`` and ``target`` (five texts each), and ``paraphrases``: nine of them for
    an entry of the paraphrase set, any number for one of the once set, which shows its original
    alone. Where the source does not name the sets, the first ``paraphrase_entries`` of it form the
    paraphrase set (by default 70, or all if it has no more) and the others the once set. The
    published split is that of the authors' repository; the data of Chang et al. on the hub carry
    paraphrases for a part of the entries only, so ask for no more than it has.

    Texts are kept as they are, with two exceptions that keep probes well formed: space at the end
    of an input and around a target is dropped, and a target begins with the one space that parts
    it from its input, as in the generated entries. ``Entry.name`` is the number in the source,
    since the data names nothing.

    Raises KelibError, naming entry (from 0) and field, for what is missing, of another type, empty
    or of another length; and for a source that is not there or cannot be read.
    """
    if paraphrase_entries is not None and paraphrase_entries < 0:
        raise KelibError(f"paraphrase_entries = {paraphrase_entries} must be at least 0")
    files = _set_files(Path(source))
    if files:
        sets = {name: _entries(_read_file(path), path.name) for name, path in files.items()}
        once, paraphrase = sets["once"], sets["paraphrase"]
        if paraphrase_entries not in (None, len(paraphrase)):
            raise KelibError(
                f"paraphrase_entries = {paraphrase_entries}, but "
                f"{files['paraphrase'].name} has {len(paraphrase)}; leave it out"
            )
        name, remedy = files["paraphrase"].name, "restore the file as the authors published it"
    else:
        name = str(source)
        entries = _entries(_read(source), name)
        wanted = PARAPHRASE_ENTRIES if paraphrase_entries is None else paraphrase_entries
        if paraphrase_entries is not None and wanted > len(entries):
            raise KelibError(
                f"{name} has {len(entries)} entries, fewer than paraphrase_entries = {wanted}; "
                "ask for no more than there are"
            )
        paraphrase, once = entries[:wanted], entries[wanted:]
        remedy = (
            "pass paraphrase_entries={complete}, as the {complete} entries before it have them, or "
            "use the files of the authors' repository, which have them for every entry"
        )
    for number, entry in enumerate(paraphrase):
        if len(entry.passages) != PASSAGES:
            raise KelibError(
                f"{name}, entry {number}: paraphrases has {len(entry.passages) - 1} texts, an "
                f"entry of the paraphrase set needs {PASSAGES - 1}; "
                f"{remedy.format(complete=number)}"
            )
    return once, paraphrase


# --- reading ------------------------------------------------------------------------------------


def _set_files(folder: Path) -> dict[str, Path]:
    """The files of the two sets in ``folder`` or its ``fictional_knowledge``; none if no such."""
    for place in _places(folder):
        found: dict[str, list[Path]] = {"once": [], "paraphrase": []}
        for path in sorted(place.glob("*.json")) if place.is_dir() else ():
            if match := _SET_FILE.search(path.name):
                found[match[1]].append(path)
        if any(found.values()):
            for name, paths in found.items():
                if len(paths) != 1:
                    raise KelibError(
                        f"{place} has {len(paths)} files *_{name}N.json, must have one for each of "
                        "the two sets; complete or tidy the folder"
                    )
            return {name: paths[0] for name, paths in found.items()}
    return {}


def _places(folder: Path) -> tuple[Path, Path]:
    return folder, folder / "fictional_knowledge"


def _read(source: str | Path) -> Any:
    path = Path(source)
    for place in _places(path):
        if (place / _ONE_FILE).is_file():
            return _read_file(place / _ONE_FILE)
    if path.is_file():
        return _read_file(path)
    if path.is_dir():
        return _read_with_datasets(str(path.resolve()))
    on_hub = HUB_PLACE.fullmatch(str(source))
    if path.suffix in _FORMATS or on_hub is None:
        raise KelibError(
            f"there is no file or folder {source}; give one, or the id of a data set on the hub "
            f"such as {HUB_ID}"
        )
    return _read_with_datasets(on_hub["repo"], revision=on_hub["commit"])


def _read_file(path: Path) -> Any:
    if path.suffix not in _FORMATS:
        raise KelibError(f"{path} must be one of {listing(_FORMATS)}; convert it")
    if path.suffix == ".parquet":
        return _read_with_datasets("parquet", data_files=str(path))
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            return json.loads(text)
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except OSError as error:
        raise KelibError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, brackets too deep
        raise KelibError(f"{path} is not valid {path.suffix[1:].upper()}: {error}") from error


def _read_with_datasets(name: str, **options: str | None) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise KelibError(
            f"{name} needs the package datasets: pip install '.[hub]', or give a JSON file"
        ) from error
    try:
        return datasets.load_dataset(name, split="train", **options).to_list()
    except Exception as error:  # of many classes: offline, no such id, no split, no readable file
        reason = " ".join(str(error).split())
        raise KelibError(
            f"datasets cannot read {name} ({reason}); check the name and the connection, or give "
            "a JSON file of the data"
        ) from error


# --- checking -----------------------------------------------------------------------------------


def _entries(rows: Any, name: str) -> tuple[Entry, ...]:
    if not isinstance(rows, list) or not rows:
        raise KelibError(f"{name} must hold a list of entries, at least one; it does not")
    return tuple(_entry(row, str(number), name) for number, row in enumerate(rows))


def _entry(row: Any, number: str, name: str) -> Entry:
    where = f"{name}, entry {number}"
    if not isinstance(row, dict):
        raise KelibError(f"{where} is of type {type(row).__name__}, must be an object with fields")
    missing = [field for field in FIELDS if field not in row]
    if missing:
        raise KelibError(
            f"{where} has no field {missing[0]}; it has {listing(row)} and needs {listing(FIELDS)}"
        )
    original = _text(row["train_context"], f"{where}: train_context")
    paraphrases = row.get("paraphrases")
    others = [] if paraphrases is None else _texts(paraphrases, f"{where}: paraphrases")
    probes = tuple(probe for level in LEVELS for probe in _probes(row, level, where))
    return Entry(number, (original, *others), probes)


def _probes(row: dict[str, Any], level: str, where: str) -> Iterator[Probe]:
    columns = []
    for part in ("input", "target"):
        field = f"{PREFIXES[level]}_{part}"
        texts = _texts(row[field], f"{where}: {field}")
        if len(texts) != PROBES:
            raise KelibError(f"{where}: {field} has {len(texts)} texts, must have {PROBES}")
        columns.append(texts)
    for asked, target in zip(*columns, strict=True):
        yield Probe(level, asked.rstrip(), f" {target.strip()}")


def _texts(value: Any, where: str) -> list[str]:
    if not isinstance(value, list):
        raise KelibError(f"{where} is of type {type(value).__name__}, must be a list of texts")
    return [_text(text, f"{where}[{number}]") for number, text in enumerate(value)]


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise KelibError(f"{where} is of type {type(value).__name__}, must be text")
    if not value.strip():
        raise KelibError(f"{where} is empty; a probe or passage needs text")
    return value

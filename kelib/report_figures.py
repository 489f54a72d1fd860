"""What the report shows of one figure: picture, question, caption, where it comes from, its files.

The words are those of its notebook, the numbers those of its tables.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kelib.config import repository_root
from kelib.errors import KelibError, listing
from kelib.readme_figures import FIGURES
from kelib.readme_words import number_in_words
from kelib.reference import SEARCH, shown_profile
from kelib.report_text import html, plain
from kelib.results import Tables, read_figure_note
from kelib.tables import read_provenance

HEADING = re.compile(r"^#\s+(.+)$", re.MULTILINE)
QUESTION = re.compile(r"^##\s+(.+\?)\s*$", re.MULTILINE)
FILES = (("pdf", "PDF"), ("csv", "plotted numbers (CSV)"), ("json", "provenance (JSON)"))


@dataclass(frozen=True)
class Picture:
    """An embedded PNG: a data URI, its size in pixels, and the file it was taken from."""

    uri: str
    width: int
    height: int
    file: str

    @property
    def least(self) -> int:
        """Width at which letters of 10 points are 10 CSS pixels high; pictures have 200 dpi."""
        return round(self.width * 72 / 200)


@dataclass(frozen=True)
class Figure:
    """One figure as the page shows it; texts are HTML where they say so."""

    name: str
    label: str  # what the paper calls it, or "ours"
    title: str
    questions: list[str]
    intro_html: str
    outcome_html: str
    here: str
    paper: str
    picture: Picture | None
    alt: str
    files: list[tuple[str, str]]  # words, address
    command: str
    origin: list[tuple[str, str]]
    warnings: list[str]

    @property
    def ours(self) -> bool:
        """Whether it has no counterpart in the paper."""
        return self.label == "ours"


def command(name: str, profile: str) -> str:
    """What draws a figure of a profile, with all that it rests on."""
    if profile == SEARCH:
        return "make search"
    return f"make figures/{profile}/{name}.json PROFILE={profile}"


def figure(name: str, tables: Tables, folder: Path, page: Path, fresh: bool) -> Figure:
    """The figure ``name`` in ``folder``, with links as they stand in the file ``page``.

    ``fresh`` figures have their executed notebook beside them; for those of the reference it is the
    committed notebook, if that shows this profile. Raises KelibError if its numbers or
    its provenance are not those that were written.
    """
    file = folder / f"{name}.json"
    note = read_figure_note(file)
    if missing := {"inputs", "digest"} - set(note):
        again = command(name, tables.name)
        raise KelibError(f"{file} names no {listing(missing)}: delete it and run {again}")
    source = repository_root() / "notebooks" / f"{name}.ipynb"
    executed: Path | None = folder / f"{name}.ipynb" if fresh else source
    if not (executed and executed.exists()) or (
        executed == source and shown_profile(source) != tables.name
    ):
        executed = None
    title, intro, questions = words(source)
    place = (page.parent, source.parent)
    label, paper = FIGURES.get(name, ("ours", "not reported"))
    here = number_in_words(name, tables) if name in FIGURES else None
    files: list[tuple[str, Path | None]]
    files = [(what, folder / f"{name}.{kind}") for kind, what in FILES]
    files.append(("executed notebook", executed))
    files.append(("notebook", source if executed != source else None))
    picture = folder / f"{name}.png"
    return Figure(
        name=name,
        label=label,
        title=title,
        questions=questions,
        intro_html=html(intro, *place),
        outcome_html=html(outcome(executed), *place) if executed else "",
        here=here or "",
        paper=paper,
        picture=embedded(picture, page) if picture.exists() else None,
        alt=f"{title}. {here + '. ' if here else ''}The plotted numbers are in {name}.csv.",
        files=[(what, link(at, page)) for what, at in files if at is not None and at.exists()],
        command=command(name, tables.name),
        origin=_origin(note),
        warnings=_warnings(note["inputs"], tables),
    )


def words(notebook: Path) -> tuple[str, str, list[str]]:
    """Title, introduction (Markdown) and questions of a figure notebook. KelibError if it is not
    there or does not begin with a title.
    """
    try:
        cells = json.loads(notebook.read_text("utf-8"))["cells"]
    except (OSError, ValueError, KeyError) as error:
        raise KelibError(
            f"no readable notebook {notebook}: git checkout {notebook.name}"
        ) from error
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    found = HEADING.match(texts[0].strip()) if texts else None
    if not found:
        raise KelibError(f"{notebook} does not begin with a title: its first cell must be '# …'")
    intro = texts[0].strip()[found.end() :].strip()
    asked = [question for text in texts[1:] for question in QUESTION.findall(text)]
    return plain(found[1]), intro, [plain(question) for question in asked]


def outcome(notebook: Path) -> str:
    """The last Markdown that an executed notebook printed: what came out; empty without any."""
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    for cell in reversed(cells):
        for output in reversed(cell.get("outputs", [])):
            text = output.get("data", {}).get("text/markdown")
            if text is not None:
                return "".join(text)
    return ""


def embedded(file: Path, page: Path) -> Picture:
    """A PNG in at most 256 colours, which is a third of its size and looks the same."""
    from PIL import Image

    with Image.open(file) as opened:
        opaque = Image.new("RGB", opened.size, "white")
        opaque.paste(opened, mask=opened.getchannel("A") if "A" in opened.mode else None)
    small = io.BytesIO()
    opaque.quantize(256, dither=Image.Dither.NONE).save(small, "PNG")
    uri = "data:image/png;base64," + base64.b64encode(small.getvalue()).decode("ascii")
    return Picture(uri, *opaque.size, link(file, page))


def link(target: Path, page: Path) -> str:
    """The address of a file as seen from the page."""
    return Path(os.path.relpath(target, page.parent)).as_posix()


def _origin(note: Mapping[str, Any]) -> list[tuple[str, str]]:
    inputs = sorted(note["inputs"].items())
    commit = str(note.get("commit", "unknown"))[:12]
    changed = " with changes not committed" if note.get("dirty") else ""
    found = [
        ("pretraining seeds", ", ".join(map(str, note.get("seeds", [])))),
        ("digest, as in its corner", note["digest"]),
        ("commit", commit + changed),
        ("tables", ", ".join(f"{name} {sha[:12]}" for name, sha in inputs)),
    ]
    versions = note.get("versions", {})
    found.append(("versions", ", ".join(f"{name} {versions[name]}" for name in sorted(versions))))
    return [(what, value) for what, value in found if value]


def _warnings(inputs: Mapping[str, str], tables: Tables) -> list[str]:
    """Tables that are not those the figure was drawn from."""
    found = []
    for table, sha256 in inputs.items():
        file = tables.folder / f"{table}.csv"
        if not file.exists() or read_provenance(file)["sha256"] != sha256:
            found.append(f"Drawn from another {table}.csv than the one that is there now.")
    return found

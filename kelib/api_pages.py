"""``make docs``: the API reference from the docstrings, by pdoc, as pages that need no network."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import kelib

DRIVER = "__main__"  # running it is all it is for


def modules() -> list[str]:
    """``kelib`` and all of its modules, by name."""
    files = sorted(Path(kelib.__file__).parent.glob("*.py"))
    names = [file.stem for file in files if file.stem not in ("__init__", DRIVER)]
    return ["kelib", *(f"kelib.{name}" for name in names)]


def write_pages(target: Path, names: Iterable[str]) -> None:
    """Write a page for each of the modules ``names`` and an index into ``target``, whole or not at
    all; what was there is replaced.
    """
    import pdoc

    for name in kelib.__all__:  # loaded on first use, and pdoc shows what is loaded
        getattr(kelib, name)
    footer = f"kelib {kelib.__version__}"
    pdoc.render.configure(docformat="google", show_source=False, footer_text=footer)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        pdoc.pdoc(*names, output_directory=temporary)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

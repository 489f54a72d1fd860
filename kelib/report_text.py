"""Markdown of notebooks and of the README as HTML of the report: safe, links seen from the page."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any


def html(markdown: str, page: Path, home: Path) -> str:
    """HTML of ``markdown``, in which markup is text. Headings begin at the fourth level, tables may
    be scrolled by keyboard.

    Relative links are of a file in the folder ``home`` and are rewritten for the folder ``page``.
    """
    import mistune

    class Renderer(mistune.HTMLRenderer):
        def heading(self, text: str, level: int, **attrs: Any) -> str:
            return f"<h{min(level + 3, 6)}>{text}</h{min(level + 3, 6)}>\n"

        def table(self, text: str) -> str:
            inner = '<div class="scroll" tabindex="0" role="region" aria-label="Table">'
            return f"{inner}<table>{text}</table></div>\n"

        def link(self, text: str, url: str, title: str | None = None) -> str:
            if not re.match(r"[a-z]+:|#|/", url):
                url = Path(os.path.relpath(home / url, page)).as_posix()
            return super().link(text, url, title)

    made = mistune.create_markdown(renderer=Renderer(escape=True), plugins=["table"])
    return str(made(markdown))


def plain(markdown: str) -> str:
    """One line of Markdown without its marks; underscores are part of names such as K_CL."""
    return re.sub(r"[*`]", "", markdown).strip()

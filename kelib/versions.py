"""Versions of what a number can depend on. No torch."""

from __future__ import annotations

import functools
import platform


@functools.cache
def versions() -> dict[str, str]:
    """Versions that can change a number."""
    from importlib.metadata import version

    names = ("torch", "transformers", "tokenizers", "accelerate", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}

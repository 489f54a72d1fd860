"""The one error class that a user is meant to read."""

from __future__ import annotations

import errno

from kelib.redaction import hidden


class KelibError(ValueError):
    """Something the user can put right: the message states the value, the constraint and the
    remedy.

    Everything kelib refuses on purpose is raised as this class, so that the command line can
    print one line and stop, while a genuine defect still shows its traceback. Secrets in the
    message are hidden (:mod:`kelib.redaction`).
    """

    def __init__(self, *message: object) -> None:
        super().__init__(*(hidden(part) if isinstance(part, str) else part for part in message))


def listing(names: object, limit: int = 12) -> str:
    """Join names for an error message, sorted, cut after ``limit`` with the number left out.

    >>> listing(["b", "a"])
    'a, b'
    """
    ordered = sorted(str(name) for name in names)  # type: ignore[attr-defined]
    shown = ", ".join(ordered[:limit]) or "none"
    return shown if len(ordered) <= limit else f"{shown} and {len(ordered) - limit} more"


# what torch, on a CPU or a GPU, the loader of libraries and Python say in other classes of errors
_NO_MEMORY = (
    "allocate memory",
    "out of memory",
    "failed to map segment",
    "can't start new thread",
)


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that the machine has no memory left for what was asked.

    >>> lacks_memory(MemoryError()), lacks_memory(RuntimeError("CUDA out of memory."))
    (True, True)
    >>> lacks_memory(RuntimeError("shapes do not match"))
    False
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    said = str(error).lower()
    return isinstance(error, MemoryError) or any(words in said for words in _NO_MEMORY)


def first_line(error: BaseException) -> str:
    """What an error says, cut after its first line; its class where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)

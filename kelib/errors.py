"""The one error class that a user is meant to read."""

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

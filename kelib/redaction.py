"""Secrets do not reach what is written or shown: tokens, keys, and credentials in addresses."""

from __future__ import annotations

import logging
import os
import re
from typing import Any

HIDDEN = "<hidden>"
SHORTEST = 8  # characters of a value that is hidden wherever it stands
# names of environment variables whose values are nobody else's business
_SECRET_NAME = re.compile(
    r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|PASS|PWD|KEY|CREDENTIALS?)(?:_|$)", re.IGNORECASE
)
_ADDRESS = re.compile(r"\b([a-z][a-z0-9+.-]*://)([^/\s@'\"<>]+)@", re.IGNORECASE)
# what is a token by its form: of the model hub, of AWS, of GitHub, of a header
_TOKEN = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bA[KS]IA[A-Z0-9]{16}\b|\bgh[pousr]_[A-Za-z0-9]{20,}"
    r"|(?<=Bearer )[\w.~+/=-]{8,}",
)


def hidden(text: str) -> str:
    """``text`` without the values of secret environment variables, credentials in addresses, and
    whatever has the form of a token.

    >>> hidden("https://me:word@host/x and hf_abcdefghijklmnopqrst")
    'https://<hidden>@host/x and <hidden>'
    """
    text = _TOKEN.sub(HIDDEN, _ADDRESS.sub(rf"\1{HIDDEN}@", text))
    for secret in _secrets():
        text = text.replace(secret, HIDDEN)
    return text


def hide_in_logs() -> None:
    """Let this process log no secret, whichever library logs: the client of the model hub names
    the address that it could not reach."""
    made_by: Any = logging.getLogRecordFactory()
    if getattr(made_by, "hides_secrets", False):
        return

    def make(*values: Any, **more: Any) -> logging.LogRecord:
        record: logging.LogRecord = made_by(*values, **more)
        try:
            said = record.getMessage()
        except (TypeError, ValueError, KeyError):  # logging reports these itself
            return record
        if (shown := hidden(said)) != said:
            record.msg, record.args = shown, None
        return record

    make.hides_secrets = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(make)


def _secrets() -> list[str]:
    """Values of the environment that must not be shown, longest first."""
    found = set()
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and "/" not in value[:1]:  # not a path, as of PWD
            found.add(value)
        for match in _ADDRESS.finditer(value):
            found |= {match[2], match[2].partition(":")[2]}
    return sorted((v for v in found if len(v) >= SHORTEST), key=len, reverse=True)

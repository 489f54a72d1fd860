"""Values from YAML checked against dataclasses, and digests that name what they describe."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import re
import reprlib
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from kelib.errors import KelibError, listing

Row = TypeVar("Row", bound=Any)


def digest(value: Any, length: int = 12) -> str:
    """Short sha256 of a JSON-able value or dataclass; equal values have equal digests on every
    platform.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def shown(value: object) -> str:
    """A value as an error shows it: its repr, without the middle of what is long or nested.

    >>> shown([1, "two"])
    "[1, 'two']"
    """
    try:
        return _REPR.repr(value)
    except ValueError:  # more digits than Python writes
        return f"a number or list of numbers of more digits than {sys.get_int_max_str_digits()}"


_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother = 4, 200, 200
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = _REPR.maxset = _REPR.maxfrozenset = 20
LARGEST = 2**63 - 1  # more is never meant, and no array can hold it
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


def require(holds: bool, name: str, value: object, constraint: str) -> None:
    """Raise KelibError with name, value and constraint unless it ``holds``."""
    if not holds:
        raise KelibError(f"{name} = {shown(value)} must be {constraint}")


def require_name(key: str, value: str) -> None:
    """Require a name that may become that of a file or folder: it leads nowhere else.

    Raises KelibError for one with a slash, one that begins with a point, an empty one.
    """
    allowed = "letters, digits and . _ + -, the first a letter or digit: it names a folder"
    require(_NAME.fullmatch(value) is not None, key, value, allowed)


def _where(instance: object, name: str) -> str:
    kind = type(instance).__name__
    return name if kind == "Profile" else f"{kind.lower()}.{name}"


def at_least(instance: object, **bounds: int) -> None:
    """Require fields of a dataclass to be no less than their bounds."""
    for name, low in bounds.items():
        value = getattr(instance, name)
        require(value >= low, _where(instance, name), value, f"at least {low}")


def at_least_each(instance: object, low: int, name: str) -> None:
    """Require every item of a field to be no less than ``low``."""
    for value in getattr(instance, name):
        require(value >= low, _where(instance, name), value, f"at least {low}")


def within(instance: object, low: float, high: float, *names: str) -> None:
    """Require fields to lie between two bounds, both included."""
    for name in names:
        value = getattr(instance, name)
        require(low <= value <= high, _where(instance, name), value, f"between {low} and {high}")


def unique(instance: object, *names: str) -> None:
    """Require fields to be lists of distinct values, not empty."""
    for name in names:
        values = getattr(instance, name)
        require(
            len(values) > 0 and len(set(values)) == len(values),
            _where(instance, name),
            values,
            "a list of distinct values, not empty",
        )


def convert(kind: Any, value: Any, name: str) -> Any:
    """Check ``value`` (from YAML) against the annotation ``kind``; exact types, except int where
    float is due.
    """
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise KelibError(
                f"{name} = {shown(value)} must be a mapping with {listing(field_names(kind))}"
            )
        return build(kind, value, name)
    origin = typing.get_origin(kind)
    if origin is tuple:
        arguments = typing.get_args(kind)
        if not isinstance(value, (list, tuple)):
            raise KelibError(f"{name} = {shown(value)} must be a list, such as [1, 2]")
        if arguments[-1] is Ellipsis:
            return tuple(convert(arguments[0], v, f"{name}[{i}]") for i, v in enumerate(value))
        if len(value) != len(arguments):
            raise KelibError(f"{name} = {shown(value)} must have {len(arguments)} values")
        return tuple(convert(a, v, name) for a, v in zip(arguments, value, strict=True))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise KelibError(f"{name} = {shown(value)} must be a mapping, such as {{a: 1}}")
        return dict(value)
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        return convert(next(a for a in typing.get_args(kind) if a is not type(None)), value, name)
    if isinstance(value, int) and abs(value) > LARGEST:
        raise KelibError(f"{name} = {shown(value)} must be of at most 64 bits")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        hint = ""
        if kind is float and isinstance(value, str):
            hint = " (YAML reads 1e-4 as text: write 1.0e-4)"
        raise KelibError(f"{name} = {shown(value)} must be of type {kind.__name__}, finite{hint}")
    return value


def field_names(kind: Any) -> dict[str, dataclasses.Field[Any]]:
    """Fields of a dataclass by name."""
    return {field.name: field for field in dataclasses.fields(kind)}


def build(kind: Any, values: Mapping[str, Any], prefix: str = "") -> Any:
    """A dataclass from a mapping; KelibError for an unknown, missing or mistyped key."""
    fields, hints = field_names(kind), typing.get_type_hints(kind)
    dotted = f"{prefix}." if prefix else ""
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            guess = f"did you mean {dotted}{near[0]}? " if near else ""
            raise KelibError(
                f"unknown key {dotted}{key}: {guess}valid keys are {listing(fields, 40)}"
            )
    for name, field in fields.items():
        missing = dataclasses.MISSING
        if name not in values and field.default is missing and field.default_factory is missing:
            raise KelibError(
                f"missing key {dotted}{name}: add it; valid keys are {listing(fields, 40)}"
            )
    built = {key: convert(hints[key], value, f"{dotted}{key}") for key, value in values.items()}
    return kind(**built)


# beside its own: no such date, too many digits, brackets too deep
_NOT_YAML = (yaml.YAMLError, ValueError, OverflowError, RecursionError, TypeError, AttributeError)


def read_yaml(path: Path) -> Any:
    """Parse YAML safely; a syntax error becomes one line with its place."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except _NOT_YAML as error:
        reason = " ".join(str(error).split())[:400]
        raise KelibError(
            f"{path.name} is not valid YAML: {reason}; correct it, or restore the file"
        ) from error
    except OSError as error:
        raise KelibError(
            f"cannot read {path}: {error.strerror}; give a file that can be read"
        ) from error


def read_rows(path: Path, key: str, kind: type[Row]) -> dict[str, Row]:
    """The rows of a list of YAML, each a dataclass ``kind`` with a field ``name``, by that name.

    Raises KelibError, with the number of the row, for one that does not fit or a name given twice.
    """
    content = read_yaml(path)
    rows = content.get(key) if isinstance(content, dict) else None
    if not isinstance(rows, list) or not rows:
        raise KelibError(f"{path}: must hold a list of rows under '{key}'; restore it")
    found: dict[str, Row] = {}
    for number, values in enumerate(rows, start=1):
        row = convert(kind, values, f"{path.name} row {number}")
        if row.name in found:
            raise KelibError(f"{path.name} row {number}: name {row.name!r} occurs twice")
        found[row.name] = row
    return found

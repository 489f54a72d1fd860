"""Profiles of other kinds than a study: YAML files of ``notebooks/params`` with another key where a
study has ``profile``, read as the dataclass of that kind. No torch.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from kelib.config import repository_root
from kelib.errors import KelibError, listing
from kelib.schema import build, field_names, read_yaml


def profiles_of_kind(key: str) -> list[str]:
    """Names of the YAML files of ``notebooks/params`` that have ``key`` where a study has
    ``profile``.
    """
    return sorted(
        path.stem
        for path in (repository_root() / "notebooks" / "params").glob("*.yaml")
        if any(
            line.startswith(f"{key}:") for line in path.read_text("utf-8", "replace").splitlines()
        )
    )


def load_kind(kind: Any, key: str, name: str, overrides: Mapping[str, Any] | None = None) -> Any:
    """The profile ``name`` of those with ``key``, as the dataclass ``kind``; raises as
    :func:`kelib.published.load_published`.
    """
    known = profiles_of_kind(key)
    if name not in known:
        raise KelibError(f"unknown {key} profile {name!r}: notebooks/params has {listing(known)}")
    values = read_yaml(repository_root() / "notebooks" / "params" / f"{name}.yaml")
    profile = profile_from_values(kind, key, values, overrides)
    called = getattr(profile, key)
    if called != name:
        raise KelibError(f"{name}.yaml calls itself {called!r}; it must be {name!r}")
    return profile


def profile_from_values(
    kind: Any, key: str, values: Any, overrides: Mapping[str, Any] | None = None
) -> Any:
    """A profile of the dataclass ``kind``, which has the field ``key``, from nested mappings."""
    fields = listing(field_names(kind))
    if not isinstance(values, Mapping):
        raise KelibError(f"a {key} profile must be a mapping with {fields}")
    nested = copy.deepcopy(dict(values))
    nested.pop("profile", None)  # parameters of a table, read back
    for dotted, value in (overrides or {}).items():
        section, _, last = dotted.rpartition(".")
        place = nested.get(section) if section else nested
        if not isinstance(place, dict):
            raise KelibError(f"unknown key {dotted}: valid keys are {fields}")
        place[last] = copy.deepcopy(value)
    return build(kind, nested)

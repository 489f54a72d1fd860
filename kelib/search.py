"""The search that chose the regime of the small model: variants of a profile on seeds never
reported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from kelib.config import load_profile, read_yaml, repository_root
from kelib.errors import KelibError, listing
from kelib.runs import execute
from kelib.study import Study
from kelib.study_tables import checkpoints_table, continual_table, entropy_tables
from kelib.tables import provenance, write_table

NAME = "search"
SEARCH_SEEDS = range(10)  # 0-9 search, 100 and up are reported


@dataclass(frozen=True)
class Variant:
    """One regime on one seed. ``continual``: its stages are continued too, to choose the CL
    rates.
    """

    regime: str
    study: Study
    continual: bool


def load_search(path: Path | None = None, data: Path | None = None) -> tuple[str, list[Variant]]:
    """(chosen regime, variants) from ``notebooks/params/search.yaml``.

    Each regime gives ``overrides`` of the base profile and ``seeds``; ``continual: true``
    continues its stages. Raises KelibError for unknown or missing keys and for seeds that
    are not search seeds.
    """
    root = repository_root()
    content = read_yaml(path or root / "notebooks" / "params" / "search.yaml")
    _check_keys(content, {"base", "chosen", "regimes"}, "search")
    for key in ("base", "chosen", "regimes"):
        _need(content, key, "search")
    if not isinstance(content["regimes"], Mapping) or not content["regimes"]:
        raise KelibError("search.regimes must be a mapping with at least one regime")
    variants = []
    for regime, values in content["regimes"].items():
        _check_keys(values, {"overrides", "seeds", "continual"}, f"regimes.{regime}")
        _need(values, "seeds", f"regimes.{regime}")
        if not isinstance(values["seeds"], list) or not values["seeds"]:
            raise KelibError(
                f"regimes.{regime}.seeds = {values['seeds']!r} must be a list, such as [0, 1]"
            )
        for seed in values["seeds"]:
            if seed not in SEARCH_SEEDS:
                raise KelibError(
                    f"regimes.{regime}.seeds has {seed}: search seeds are 0 to 9, the others are "
                    "reported"
                )
            overrides = {**(values.get("overrides") or {}), "seeds": [seed], "comparison": None}
            profile = dataclasses.replace(load_profile(content["base"], overrides), profile=NAME)
            study = Study(profile, data or root / "data")
            variants.append(Variant(str(regime), study, bool(values.get("continual"))))
    if content["chosen"] not in content["regimes"]:
        raise KelibError(
            f"chosen = {content['chosen']!r} must be one of {listing(content['regimes'])}"
        )
    return str(content["chosen"]), variants


def _check_keys(values: Any, known: set[str], where: str) -> None:
    if not isinstance(values, Mapping):
        raise KelibError(f"{where} must be a mapping with {listing(known)}")
    unknown = set(values) - known
    if unknown:
        raise KelibError(f"unknown key {where}.{listing(unknown)}: valid keys are {listing(known)}")


def _need(values: Mapping[str, Any], key: str, where: str) -> None:
    if key not in values:
        raise KelibError(f"missing key {where}.{key}: add it")


def run_search(variants: list[Variant]) -> dict[str, pd.DataFrame]:
    """Do what is missing; write and return the tables entropy, checkpoints and continual by
    regime.
    """
    workers = variants[0].study.profile.workers
    executor = variants[0].study.profile.executor
    measure = [run for v in variants for run in v.study.measure_runs()]
    execute(measure, workers, "search", executor)
    entropies = {id(v): entropy_tables(v.study)["entropy"] for v in variants}
    runs = {
        id(v): v.study.continual_grid(entropies[id(v)]) if v.continual else [] for v in variants
    }
    execute([run for part in runs.values() for _, run in part], workers, "search", executor)
    parts: dict[str, list[pd.DataFrame]] = {"entropy": [], "checkpoints": [], "continual": []}
    for v in variants:
        entropy, checkpoints = entropies[id(v)], checkpoints_table(v.study)
        tables = {"entropy": entropy, "checkpoints": checkpoints}
        if v.continual:
            tables["continual"] = continual_table(v.study, runs[id(v)], checkpoints, entropy)
        for name, table in tables.items():
            table.insert(0, "regime", v.regime)
            parts[name].append(table)
    folder = variants[0].study.measurements
    digests = {f"{v.regime}/{v.study.profile.seeds[0]}": v.study.profile.digest for v in variants}
    seeds = sorted({v.study.profile.seeds[0] for v in variants})
    note = provenance({"profile": NAME, "regimes": digests}, seeds, {})
    written = {name: pd.concat(tables) for name, tables in parts.items() if tables}
    for name, table in written.items():
        write_table(table, folder / f"{name}.csv", note)
    return written

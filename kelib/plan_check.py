"""How good the estimates of a plan are, beside the times of finished runs. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from kelib.calibration import Calibration, own_seconds
from kelib.errors import KelibError
from kelib.planner import published_cost, study_cost
from kelib.published import PublishedStudy
from kelib.seals import unsealed
from kelib.study import Study
from kelib.workload import shape_of_profile

TOLERANCE = 0.25  # of the measured time, that an estimate may be off


def finished_runs(study: Study | PublishedStudy) -> list[dict[str, Any]]:
    """The notes (``run.json``) of all finished runs of a profile, of any version of the code."""
    name = study.measurements.name
    places = [study.data / "corpus" / name, study.data / "checkpoints" / name]
    found = [path for place in places for path in place.glob("*/run.json")]
    found += study.measurements.glob("*/*/run.json")
    return [_note(path) for path in sorted(found)]


def _note(path: Path) -> dict[str, Any]:
    try:
        return unsealed(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise KelibError(
            f"{path} is not what the run wrote ({error}); delete {path.parent} and run again"
        ) from error


def check_table(study: Study | PublishedStudy, calibration: Calibration) -> pd.DataFrame:
    """Estimate beside measurement (:func:`kelib.calibration.own_seconds`) of finished runs, by kind
    and, in the last row, of all: runs, estimated and measured hours, their ratio, and the quartiles
    of the ratios of single runs (low, median, high), which spread where the machine was shared.

    Raises KelibError if no run is finished.
    """
    rows = []
    for note in finished_runs(study):
        kind, settings = note["kind"], note["settings"]
        if isinstance(study, Study):
            shape = shape_of_profile(study.profile)
            cost = study_cost(study.profile, kind, settings, shape, calibration)
        else:
            cost = published_cost(study.profile, kind, settings, calibration)
        rows.append((cost.kind, cost.seconds / 3600, own_seconds(note) / 3600))
    if not rows:
        raise KelibError(
            f"no run of {study.measurements.name} is finished in {study.data}: nothing to check "
            "the estimate with; run the profile first, or name another folder with --data"
        )
    runs = pd.DataFrame(rows, columns=["kind", "estimated", "measured"]).dropna()
    groups = dict(iter(runs.groupby("kind"))) | {"all": runs}
    return pd.DataFrame([{"kind": kind, **_compared(group)} for kind, group in groups.items()])


def _compared(runs: pd.DataFrame) -> dict[str, float]:
    estimated, measured = runs["estimated"].sum(), runs["measured"].sum()
    spread = (runs["estimated"] / runs["measured"]).quantile([0.25, 0.5, 0.75])
    return {
        "runs": len(runs),
        "estimated": estimated,
        "measured": measured,
        "ratio": estimated / measured,
        **dict(zip(("low", "median", "high"), spread, strict=True)),
    }


def refuse_bad_estimate(table: pd.DataFrame) -> None:
    """Raise KelibError if the estimate for all runs is off by more than :data:`TOLERANCE`."""
    ratio = float(table["ratio"].iloc[-1])
    if abs(ratio - 1) > TOLERANCE:
        raise KelibError(
            f"the estimate is {ratio:.2f} of the measured time, it must be within "
            f"{TOLERANCE:.0%} of it: calibrate again (--calibrate) as busy as the machine was then"
        )

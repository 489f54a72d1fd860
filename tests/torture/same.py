"""The same numbers twice: the tables of profile smoke, byte for byte, however make is called.

Every variation is a run from nothing, compared with one plain ``make -j2``. Where arithmetic itself
is another (two threads, the instructions of an older processor), sums round otherwise, and what is
compared is the size of the difference by table and quantity, kept in
``data/torture/differences.csv``: that is what can differ between machines.
"""

from __future__ import annotations

import argparse
import io
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kelib.config import repository_root
from kelib.errors import KelibError, listing

from .trees import Tree, compare, undisturbed

DIFFERENCES = Path("data") / "torture" / "differences.csv"
# Of two threads against one: the mean difference of a quantity, as a share of the range of values
# that it takes in its table. A mean, since one answer that turns from right to wrong moves a single
# accuracy by a whole question.
TOLERANCE = 0.02
# What torch, MKL, oneDNN and numpy's BLAS offer to pretend an older processor.
OLD = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OPENBLAS_CORETYPE": "Prescott",
}
# Turkish has another lower case of I, the other two a comma in numbers; one is not UTF-8.
LOCALES = ("tr_TR.UTF-8", "de_DE.ISO-8859-1", "C.UTF-8")


@dataclass(frozen=True)
class Variation:
    """One other way to call make."""

    name: str
    how: Mapping[str, Any] = field(default_factory=dict)  # of Tree.make
    folder: str = "varied"
    edits: tuple[tuple[str, str, str], ...] = ()
    judged: str = "bytes"  # or "tolerance", or "rows": the same rows, differences noted


def variations(folder: Path) -> list[Variation]:
    """All of them; homes and copies lie below ``folder``."""

    def setting(judged: str = "bytes", **values: str) -> Variation:
        name = " ".join(f"{key}={value}" for key, value in values.items())
        name = name.replace(str(folder), "<folder>")
        return Variation(name, {"environment": values}, judged=judged)

    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    one_thread, two_threads = "torch.set_num_threads(threads)", "torch.set_num_threads(2)"
    return [
        Variation("again"),
        Variation("-j1", {"jobs": 1}),
        setting(PYTHONHASHSEED="0"),
        setting(PYTHONHASHSEED="12345"),
        Variation("make -C from another folder", {"from_outside": True}),
        Variation("a path with a space", folder="varied, with spaces"),
        setting(**ascii_only),
        *(setting(LC_ALL=name, LOCPATH=str(folder / "locales")) for name in LOCALES),
        setting(HOME=str(folder / "home")),
        setting(TZ="KEL-14"),
        Variation(
            "two threads",
            edits=(("kelib/workers.py", one_thread, two_threads),),
            folder="two threads",
            judged="tolerance",
        ),
        setting("rows", ATEN_CPU_CAPABILITY="avx2"),
        setting("rows", ATEN_CPU_CAPABILITY="default"),
        Variation("an old processor", {"environment": OLD}, judged="rows"),
    ]


def _make_locale(name: str, folder: Path) -> str:
    """Make a locale in ``folder``; why it cannot be had, empty if it can."""
    made = folder / name
    if name.startswith("C.") or made.exists():
        return ""
    folder.mkdir(parents=True, exist_ok=True)
    language, _, coding = name.partition(".")
    command = ["localedef", "-i", language, "-f", coding, str(made)]
    try:
        subprocess.run(command, capture_output=True, check=False)  # its status tells of warnings
    except OSError as error:
        return f"skipped: no localedef here ({error.strerror})"
    return "" if made.exists() else f"skipped: localedef has no {name} here"


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for every variation, or those whose names hold one of the texts ``options.only``."""
    known = variations(options.folder)
    chosen = [v for v in known if not options.only or any(o in v.name for o in options.only)]
    if not chosen:
        names = listing([v.name for v in known], len(known))
        raise KelibError(f"--only {' '.join(options.only)} is in no variation's name: {names}")
    (options.folder / "home").mkdir(parents=True, exist_ok=True)
    expected = undisturbed(Tree(options.folder / "undisturbed", options.targets, options.short))
    for variation in chosen:
        locale = variation.how.get("environment", {}).get("LC_ALL", "C.")
        if lacking := locale != "C" and _make_locale(locale, options.folder / "locales"):
            yield {"case": variation.name, "tried": 0, "survived": 0, "note": lacking}
            continue
        tree = Tree(options.folder / variation.folder, options.targets, options.short)
        for name, old, new in variation.edits:
            if new not in (tree.folder / name).read_text():
                tree.edit(name, old, new)
        tree.clear()
        status, said = tree.make(**variation.how)
        if status != 0:
            yield {"case": variation.name, "survived": 0, "note": said[-300:]}
        elif variation.judged == "bytes":
            bad = compare(tree, expected)
            yield {"case": variation.name, "survived": int(not bad), "note": "; ".join(bad)}
        else:
            yield {"case": variation.name, **_sized(tree, expected, variation)}


def _sized(tree: Tree, expected: Mapping[str, bytes], variation: Variation) -> dict[str, Any]:
    """Whether it was survived, with a note; keeps the differences."""
    measured = {name: text for name, text in expected.items() if name.startswith("data/")}
    try:
        sizes = differences(measured, tree.outputs())
    except KelibError as error:
        return {"survived": 0, "note": str(error)}
    keep(sizes.assign(case=variation.name))
    worst = sizes["mean_of_range"].max()
    good = variation.judged == "rows" or worst <= TOLERANCE
    changed = int((sizes["changed"] > 0).sum())
    note = f"{changed} of {len(sizes)} quantities differ, by {worst:.2g} of their range in the mean"
    return {"survived": int(good), "note": note}


def differences(expected: Mapping[str, bytes], found: Mapping[str, bytes]) -> pd.DataFrame:
    """By table and quantity: ``values``, how many of them ``changed``, the largest absolute and
    relative difference (of the larger one), and the mean one as a share of the quantity's range in
    its table, of its size where it is a constant.

    KelibError if a table is missing, or differs in rows, columns or anything that is no number.
    """
    sizes = []
    for name, text in expected.items():
        if name not in found:
            raise KelibError(f"{name} is not there; it must be in both")
        one, two = (pd.read_csv(io.BytesIO(content)) for content in (text, found[name]))
        if one.shape != two.shape or list(one.columns) != list(two.columns):
            raise KelibError(f"{name} has another shape, {two.shape} instead of {one.shape}")
        for column in one.columns:
            if not pd.api.types.is_float_dtype(one[column]):
                if not one[column].equals(two[column]):
                    raise KelibError(f"{name}: column {column} differs, which is no measured one")
                continue
            a, b = one[column].to_numpy(float), two[column].to_numpy(float)
            if (np.isnan(a) != np.isnan(b)).any():
                raise KelibError(f"{name}: column {column} has other missing values")
            kept = ~np.isnan(a)
            a, b = a[kept], b[kept]
            off = np.abs(a - b)
            scale = np.maximum(np.abs(a), np.abs(b))
            if not len(a):
                continue
            reach = np.ptp(a) or np.abs(a).max()  # of a constant: its size
            sizes.append(
                {
                    "table": Path(name).stem,
                    "quantity": column,
                    "values": len(a),
                    "changed": int((off > 0).sum()),
                    "max_absolute": float(off.max()),
                    "max_relative": float(_over(off, scale).max()),
                    "mean_of_range": float(_over(off.mean(keepdims=True), reach[None])[0]),
                }
            )
    return pd.DataFrame(sizes)


def _over(numbers: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return np.divide(numbers, scale, out=np.where(numbers > 0, np.inf, 0.0), where=scale > 0)


def keep(sizes: pd.DataFrame, path: Path | None = None) -> None:
    """Put the differences of a case in the place of those that it left before."""
    path = path or repository_root() / DIFFERENCES
    if path.exists():
        before = pd.read_csv(path)
        sizes = pd.concat([before[~before["case"].isin(sizes["case"])], sizes])
    path.parent.mkdir(parents=True, exist_ok=True)
    first = ["case", "table", "quantity"]
    sizes[[*first, *(name for name in sizes.columns if name not in first)]].to_csv(
        path, index=False, float_format="%.3g"
    )

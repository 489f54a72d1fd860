"""Which tables a stage writes, and which stages a figure rests on. No torch."""

from __future__ import annotations

import ast
import functools
import json
from collections.abc import Iterable

from kelib.config import Profile, repository_root
from kelib.errors import KelibError, listing

MEASURED = ("entropy", "entropies", "panel", "convergence", "entities", "checkpoints")
TABLES = ("pretraining", *MEASURED, "curves", "variants", "continual", "arms", "interventions")
BRANCHES = ("branches", "branch_entropy", "branch_learning")
MECHANISM = ("gradients", "shares", "carriers", "overlap", "noise", "steps")
REGIMES = ("regimes", "regime_learning")
# tables by the stage that writes them
STAGE_OF = {
    **dict.fromkeys(["pretraining"], 1),
    **dict.fromkeys(MEASURED, 2),
    **dict.fromkeys(["curves", "variants", "continual"], 3),
    **dict.fromkeys(["arms", "interventions"], 4),
    **dict.fromkeys([*MECHANISM, "retention", "reactivation"], 6),
    **dict.fromkeys(BRANCHES, 7),
    **dict.fromkeys(REGIMES, 9),
}
IN_TURN = (1, 2, 3, 4)  # each of these rests on those before it, and 6 and 7 on all of them
ALONE = (9,)  # rests on no other
OTHERS = ("00_start_here", "ours_search", "ours_sliders")  # notebooks of no profile's figures


def stages_behind(figures: Iterable[str]) -> set[int]:
    """Stages that figures rest on. A figure whose notebook names no table rests on all."""
    found: set[int] = set()
    for figure in figures:
        named = {STAGE_OF[name] for name in figure_tables(figure)} or set(STAGE_OF.values())
        after = max((stage for stage in named if stage not in ALONE), default=0)
        found |= named | {stage for stage in IN_TURN if stage <= after}
    return found


@functools.cache
def figure_tables(figure: str) -> frozenset[str]:
    """Tables of a study that a figure is saved with, or where these are not written out, that its
    notebook names. KelibError if it has no notebook."""
    path = repository_root() / "notebooks" / f"{figure}.ipynb"
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    except OSError as error:
        there = [p.stem for p in path.parent.glob("*.ipynb")]
        raise KelibError(f"no notebook {path.name}; notebooks has {listing(there, 60)}") from error
    named, saved = set(), set()
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    for node in (node for text in code for node in ast.walk(ast.parse(text))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            named.add(node.value)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "save_figure":
            inputs = node.args[-1]
            if isinstance(inputs, ast.List):
                saved |= {getattr(item, "value", "") for item in inputs.elts}
    return frozenset(name for name in saved or named if name in STAGE_OF)


def figures_of(profile: Profile) -> list[str]:
    """The figures that a profile asks for, else all whose notebooks need no other tables than those
    it writes. What else a figure needs of a profile (a variant, a second model) is for ``make`` to
    know, which names the figures itself.
    """
    if profile.figures:
        return list(profile.figures)
    tables, found = tables_of(profile), []
    for path in sorted((repository_root() / "notebooks").glob("*.ipynb")):
        needed = figure_tables(path.stem)
        if needed and needed <= tables and path.stem not in OTHERS:
            found.append(path.stem)
    return found


def tables_of(profile: Profile) -> set[str]:
    """Names of the tables that the sections of a profile allow."""
    optional = {
        "curves": profile.continual.curve_seeds,
        "variants": profile.continual.variants,
        "arms": profile.interventions.arms,
        **dict.fromkeys(MECHANISM, profile.mechanism),
        "retention": profile.retention,
        "reactivation": profile.reactivation,
        **dict.fromkeys(BRANCHES, profile.branches),
        **dict.fromkeys(REGIMES, profile.regimes),
    }
    return {name for name in STAGE_OF if optional.get(name, True)}

"""Revisions of a published model: what their names say, and which one a step means. No torch.

A name is read, never made: a step that no revision has is said together with its neighbours, and
what to take instead is the caller's choice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kelib.errors import KelibError, listing
from kelib.schema import require

CHOICES = ("exact", "below", "above", "nearest")
_NAME = re.compile(r"(?:(stage\d+(?:-ingredient\d+)?)-)?step(\d+)(?:-tokens(\d+)B)?")


@dataclass(frozen=True)
class Revision:
    """A branch or tag of a repository and the commit it is pinned to.

    ``stage`` (empty, ``stage1``, ``stage2-ingredient1``), ``step`` and ``tokens`` (in billions, as
    rounded by its authors) are read from the name; None where the name does not say them.
    """

    repo: str
    name: str
    commit: str
    stage: str = ""
    step: int | None = None
    tokens: int | None = None

    def tokens_fit(self, tokens_per_step: int | None) -> bool:
        """Whether the name's tokens are those of its steps: within 1 billion, for rounding, and 0.5
        percent, for steps that a restart lost. True where one of them is not known."""
        if self.step is None or self.tokens is None or tokens_per_step is None:
            return True
        expected = self.step * tokens_per_step / 1e9
        return abs(self.tokens - expected) <= 1 + 0.005 * expected


def read_name(repo: str, name: str, commit: str) -> Revision:
    """A revision with what its name says of stage, step and tokens.

    >>> read_name("me/tiny", "stage1-step300-tokens1B", "0" * 40).step
    300
    """
    match = _NAME.fullmatch(name)
    if match is None:
        return Revision(repo, name, commit)
    stage, step, tokens = match.groups()
    billions = None if tokens is None else int(tokens)
    return Revision(repo, name, commit, stage or "", int(step), billions)


def ordered(repo: str, commits: Mapping[str, str]) -> list[Revision]:
    """The revisions of these commits by name: by stage and step, those without a step last."""
    revisions = [read_name(repo, name, commit) for name, commit in commits.items()]
    return sorted(revisions, key=lambda r: (r.step is None, r.stage, r.step or 0, r.name))


def pick(
    revisions: Sequence[Revision],
    steps: Sequence[int],
    choice: str = "exact",
    stage: str | None = None,
) -> list[Revision]:
    """One revision for each of the ``steps``, in their order.

    ``choice`` says what to take where a step has none: ``exact`` refuses, ``below``, ``above`` and
    ``nearest`` (of two as near the lower) take another step. ``stage`` must be given where names
    tell several. Raises KelibError with the nearest steps, for a step that two names have, and
    where two steps lead to the same revision.
    """
    require(choice in CHOICES, "choice", choice, f"one of {listing(CHOICES)}")
    at = _by_step(revisions, stage)
    repo = revisions[0].repo
    chosen: dict[str, int] = {}
    for step in steps:
        below = max((s for s in at if s <= step), default=None)
        above = min((s for s in at if s >= step), default=None)
        sides = [side for side in (below, above) if side is not None]
        found = {
            "exact": step if step in at else None,
            "below": below,
            "above": above,
            "nearest": min(sides, key=lambda side: abs(side - step), default=None),
        }[choice]
        if found is None:
            raise KelibError(_no_step(repo, step, choice, below, above, at))
        if len(at[found]) > 1:
            names = listing(revision.name for revision in at[found])
            raise KelibError(f"{repo} has step {found} twice, as {names}; give one by its name")
        name = at[found][0].name
        if name in chosen:
            raise KelibError(
                f"steps {chosen[name]} and {step} both lead to {name} of {repo}; leave one out"
            )
        chosen[name] = step
    by_name = {revision.name: revision for revision in revisions}
    return [by_name[name] for name in chosen]


def _by_step(revisions: Sequence[Revision], stage: str | None) -> dict[int, list[Revision]]:
    stages = sorted({r.stage for r in revisions if r.step is not None})
    if not stages:
        raise KelibError(
            f"no revision of {revisions[0].repo} names a step (there are "
            f"{listing((r.name for r in revisions), 4)}); give revisions by their names"
        )
    if stage is None and len(stages) > 1:
        raise KelibError(
            f"{revisions[0].repo} counts steps in several stages; set stage to one of "
            f"{listing(stages)}"
        )
    stage = stages[0] if stage is None else stage
    require(stage in stages, "stage", stage, f"one of {listing(s or repr(s) for s in stages)}")
    at: dict[int, list[Revision]] = {}
    for revision in revisions:
        if revision.step is not None and revision.stage == stage:
            at.setdefault(revision.step, []).append(revision)
    return at


def _no_step(
    repo: str,
    step: int,
    choice: str,
    below: int | None,
    above: int | None,
    at: Mapping[int, Sequence[Revision]],
) -> str:
    sides = {"below": below, "above": above}
    near = [f"{at[s][0].name} {side}" for side, s in sides.items() if s is not None]
    if choice == "exact":
        others = " or ".join(side for side, s in sides.items() if s is not None)
        return (
            f"{repo} has no revision at step {step}; the nearest are {' and '.join(near)}; give a "
            f"step that it has, or set choice to {others}"
        )
    return f"{repo} has no revision {choice} step {step}; the nearest is {near[0]}; give that step"

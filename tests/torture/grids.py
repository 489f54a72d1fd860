"""A grid of as many finished runs as one likes, in seconds: only their notes are real."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping

import yaml

from kelib.config import profile_from
from kelib.grid import stage_runs
from kelib.run import Run
from kelib.runs import finish
from kelib.study import Study

from .trees import Tree

SECONDS = 2.0  # of one processor, for the state of ten thousand runs
PROFILE = "many"


def many_runs(count: int, tree: Tree, _whole: Tree) -> tuple[list[str], str]:
    """``status`` of a profile of at least ``count`` finished runs: counts all, and within
    :data:`SECONDS` of processor time, whatever else the machine does."""
    made = finished_grid(tree, count)
    begun, before = time.perf_counter(), os.times()
    done = subprocess.run(
        [sys.executable, "-m", "kelib", "status", PROFILE],
        cwd=tree.folder,
        env={**os.environ, "PYTHONPATH": str(tree.folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    waited, after = time.perf_counter() - begun, os.times()
    spent = after.children_user - before.children_user
    spent += after.children_system - before.children_system
    told = sum(map(int, re.findall(r"(\d+) done", done.stdout)))
    bad = [] if done.returncode == 0 else [done.stderr[-300:]]
    if told != made:
        bad.append(f"{told} said to be done, {made} are")
    if spent > SECONDS:
        bad.append(f"{spent:.2f} s of one processor, must be {SECONDS:.0f} at most")
    return bad, f"status of {made} runs in {spent:.2f} s of one processor, {waited:.2f} s waited"


def finished_grid(tree: Tree, count: int) -> int:
    """Add to the tree a profile ``many``, of as many seeds as ``count`` runs need, all its runs
    finished; return how many its stages ask for."""
    params = tree.folder / "notebooks" / "params"
    values = yaml.safe_load((params / "smoke.yaml").read_text())
    per_seed = sum(map(len, stages({**values, "seeds": [100]}, tree).values()))
    values |= {"profile": PROFILE, "seeds": list(range(100, 100 - (-count // per_seed)))}
    (params / f"{PROFILE}.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    asked = stages(values, tree)
    for run in {run.digest: run for runs in asked.values() for run in runs}.values():
        run.partial.mkdir(parents=True, exist_ok=True)
        finish(run, 1.0, 1.0)
    return sum(map(len, asked.values()))


def stages(values: Mapping[str, object], tree: Tree) -> dict[int, list[Run]]:
    """The runs of a profile of these values by stage, in the tree."""
    return stage_runs(Study(profile_from(values), tree.folder / "data"), None)

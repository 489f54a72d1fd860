"""Two generated worlds, and what they say, read by other means than kelib's."""

from __future__ import annotations

import pytest

from kelib.entries import Entry
from kelib.world import World, WorldSize, build_world

SMALL = WorldSize(20, 12, 12, 4, 4, 10)
USUAL = WorldSize(100, 60, 60, 30, 20, 40)


@pytest.fixture(scope="module", params=[SMALL, USUAL], ids=["small", "usual"])
def world(request: pytest.FixtureRequest) -> World:
    return build_world(request.param, seed=3)


def entries(world: World) -> tuple[Entry, ...]:
    return world.once + world.paraphrase


def known(world: World) -> dict[tuple[str, str], str]:
    return {(fact.relation, fact.subject): fact.object for fact in world.facts}


def words(text: str) -> list[str]:
    return text.replace(",", "").replace(".", "").split()

"""Ranks and the numbering of a transfer's workers."""

import pytest

from orchestrator.elastic.world import World, union


def test_union_numbers_old_members_by_rank_then_newcomers() -> None:
    old, new = World(3, ("b", "a", "c")), World(4, ("d", "c", "e", "b"))
    assert union(old, new) == ("b", "a", "c", "d", "e")
    assert union(None, new) == new.members


def test_rank_is_the_index() -> None:
    world = World(0, ("b", "a"))
    assert (world.rank_of("a"), world.size, "a" in world, "c" in world) == (1, 2, True, False)
    with pytest.raises(ValueError):
        world.rank_of("c")


@pytest.mark.parametrize(
    ("members", "message"), [pytest.param((), "no members", id="empty"), pytest.param(("a", "a"), "twice", id="twice")]
)
def test_impossible_worlds_are_refused(members: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        World(7, members)

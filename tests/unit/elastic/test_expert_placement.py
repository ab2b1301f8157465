"""Balanced placements, and the fewest new (expert, worker) pairs, against brute force."""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.world import World

WORKERS = "abcdefg"


def counts(placement: ExpertPlacement) -> list[int]:
    """Experts per rank, or ranks per expert where ranks outnumber experts."""
    if placement.num_experts >= placement.world_size:
        return [len(placement.experts_of(rank)) for rank in range(placement.world_size)]
    return [len(ranks) for ranks in placement.holders]


def is_balanced(placement: ExpertPlacement) -> bool:
    if placement.num_experts >= placement.world_size:
        once = all(len(ranks) == 1 for ranks in placement.holders)
    else:
        once = all(len(placement.experts_of(rank)) == 1 for rank in range(placement.world_size))
    return once and max(counts(placement)) - min(counts(placement)) <= 1


def every_balanced(num_experts: int, world_size: int) -> Iterator[ExpertPlacement]:
    num_items, num_bins = max(num_experts, world_size), min(num_experts, world_size)
    for bins in itertools.product(range(num_bins), repeat=num_items):
        holders: list[tuple[int, ...]]
        if num_experts >= world_size:
            holders = [(rank,) for rank in bins]
        else:
            holders = [tuple(r for r, e in enumerate(bins) if e == expert) for expert in range(num_experts)]
        if all(holders):
            placement = ExpertPlacement(num_experts, world_size, tuple(holders))
            if is_balanced(placement):
                yield placement


def pairs(placement: ExpertPlacement, world: World) -> set[tuple[int, str]]:
    return {(e, world.members[rank]) for e, ranks in enumerate(placement.holders) for rank in ranks}


@st.composite
def worlds(draw: st.DrawFn, generation: int, max_size: int = 5) -> World:
    members = draw(st.lists(st.sampled_from(WORKERS), min_size=1, max_size=max_size, unique=True))
    return World(generation, tuple(members))


@st.composite
def placements(draw: st.DrawFn, num_experts: int, world_size: int) -> ExpertPlacement:
    ranks = st.sets(st.integers(0, world_size - 1), min_size=1)
    return ExpertPlacement(num_experts, world_size, tuple(tuple(sorted(draw(ranks))) for _ in range(num_experts)))


@pytest.mark.parametrize(
    ("num_experts", "world_size", "holders"),
    [
        pytest.param(5, 2, ((0,), (0,), (0,), (1,), (1,)), id="more_experts"),
        pytest.param(3, 3, ((0,), (1,), (2,)), id="as_many"),
        pytest.param(2, 5, ((0, 1, 2), (3, 4)), id="more_ranks"),
        pytest.param(1, 1, ((0,),), id="one"),
    ],
)
def test_balanced_is_contiguous(num_experts: int, world_size: int, holders: tuple[tuple[int, ...], ...]) -> None:
    assert ExpertPlacement.balanced(num_experts, world_size).holders == holders


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40))
def test_balanced_is_balanced_and_has_one_colour(num_experts: int, world_size: int) -> None:
    placement = ExpertPlacement.balanced(num_experts, world_size)
    assert is_balanced(placement)
    assert placement.groups() == (tuple(sorted(set(placement.holders))),)


def lacking(placement: ExpertPlacement, nodes: Sequence[str]) -> int:
    """Experts that nodes lack, of those that they could have."""
    held = {(nodes[rank], expert) for expert, ranks in enumerate(placement.holders) for rank in ranks}
    could = sum(min(number, placement.num_experts) for number in Counter(nodes).values())
    return could - len(held)


@settings(deadline=None)
@given(st.integers(1, 12), st.lists(st.sampled_from("xyz"), min_size=1, max_size=24))
def test_balanced_gives_every_node_as_many_experts_as_it_can_have(num_experts: int, nodes: list[str]) -> None:
    placement = ExpertPlacement.balanced(num_experts, len(nodes), nodes)
    assert is_balanced(placement)
    if num_experts < len(nodes) and len(set(nodes)) > 1:
        assert lacking(placement, nodes) == 0
    else:
        assert placement == ExpertPlacement.balanced(num_experts, len(nodes))


@pytest.mark.parametrize(
    ("old_nodes", "new_nodes"),
    [
        pytest.param("xxyy", "xxyyxxyy", id="doubled"),
        pytest.param("xxxx", "xxxxyyyy", id="another node"),
        pytest.param("xx", "xxzzyy", id="from one expert each"),
        pytest.param("x", "xyxzyx", id="from one rank"),
        pytest.param("xxxyyy", "xxxy", id="shrunk"),
    ],
)
@pytest.mark.parametrize("num_experts", [2, 3, 4])
def test_newcomers_take_what_their_node_lacks(num_experts: int, old_nodes: str, new_nodes: str) -> None:
    old, new = World(0, tuple("abcdefgh"[: len(old_nodes)])), World(1, tuple("abcdefgh"[: len(new_nodes)]))
    previous = ExpertPlacement.balanced(num_experts, old.size, old_nodes)
    placement = ExpertPlacement.rebalanced(previous, old, new, new_nodes)
    assert is_balanced(placement)
    assert lacking(placement, new_nodes) == 0


@settings(deadline=None)
@given(st.data())
def test_rebalanced_places_the_fewest_new_pairs(data: st.DataObject) -> None:
    num_experts = data.draw(st.integers(1, 5))
    old, new = data.draw(worlds(0)), data.draw(worlds(1))
    previous = data.draw(placements(num_experts, old.size) | st.just(ExpertPlacement.balanced(num_experts, old.size)))
    held = pairs(previous, old)

    nodes = data.draw(st.just([]) | st.lists(st.sampled_from("xyz"), min_size=new.size, max_size=new.size))
    placement = ExpertPlacement.rebalanced(previous, old, new, nodes)

    assert is_balanced(placement)
    fewest = min(len(pairs(other, new) - held) for other in every_balanced(num_experts, new.size))
    assert len(pairs(placement, new) - held) == fewest


@settings(deadline=None)
@given(st.integers(1, 12), st.lists(worlds(0, max_size=7), min_size=2, max_size=6))
def test_a_chain_of_rebalances_stays_balanced(num_experts: int, chain: list[World]) -> None:
    placement = ExpertPlacement.balanced(num_experts, chain[0].size)
    for old, new in itertools.pairwise(chain):
        placement = ExpertPlacement.rebalanced(placement, old, new)
        assert is_balanced(placement)


@settings(deadline=None)
@given(st.integers(1, 12), worlds(0, max_size=7), st.randoms(use_true_random=False))
def test_renumbered_ranks_keep_their_experts(num_experts: int, old: World, random) -> None:  # type: ignore[no-untyped-def]
    new = World(1, tuple(random.sample(old.members, old.size)))
    previous = ExpertPlacement.balanced(num_experts, old.size)
    assert pairs(ExpertPlacement.rebalanced(previous, old, new), new) == pairs(previous, old)


@pytest.mark.parametrize(
    ("holders", "kept"),
    [
        # First come, first served would fill rank 0 with experts 0 and 1, and move 2 and 3.
        pytest.param(((0, 1), (0, 1), (0,), (0,)), ((1,), (1,), (0,), (0,)), id="hands_an_expert_on"),
        # Only one rank of three may hold two of four experts: rank 1, so rank 0 has to share with rank 2.
        pytest.param(((0, 2), (0,), (1,), (1,)), ((2,), (0,), (1,), (1,)), id="hands_the_extra_seat_on"),
    ],
)
def test_holders_make_room_for_each_other(holders: tuple[tuple[int, ...], ...], kept: tuple[tuple[int], ...]) -> None:
    world = World(0, tuple(WORKERS[: 1 + max(max(ranks) for ranks in holders)]))
    previous = ExpertPlacement(len(holders), world.size, holders)
    assert ExpertPlacement.rebalanced(previous, world, world).holders == kept


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 7), st.data())
def test_tokens_stay_on_their_rank_or_else_on_their_node_where_they_can(
    num_experts: int, world_size: int, data: st.DataObject
) -> None:
    placement = data.draw(placements(num_experts, world_size))
    nodes = data.draw(st.lists(st.sampled_from("xyz"), min_size=world_size, max_size=world_size))
    destinations = placement.destinations(nodes)
    assert len(destinations) == world_size
    for rank, receivers in enumerate(destinations):
        for receiver, holders in zip(receivers, placement.holders, strict=True):
            assert receiver in holders
            assert receiver == rank or rank not in holders
            is_near = {nodes[holder] == nodes[rank] for holder in holders}
            assert nodes[receiver] == nodes[rank] or True not in is_near
    for expert, holders in enumerate(placement.holders):  # senders on a node are spread over its holders
        for node in {nodes[holder] for holder in holders}:
            senders = [receivers[expert] for rank, receivers in enumerate(destinations) if nodes[rank] == node]
            counts = [senders.count(holder) for holder in holders if nodes[holder] == node]
            assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize(
    ("holders", "nodes", "receivers"),
    [
        pytest.param((0, 3), "", (0, 0, 3, 3, 0, 3), id="nobody knows the nodes"),
        pytest.param((0, 3), "xyyyxx", (0, 3, 3, 3, 0, 0), id="each to its node's"),
        pytest.param((0, 3), "xxxyyy", (0, 0, 0, 3, 3, 3), id="halves"),
        pytest.param((0, 3), "xxxyzz", (0, 0, 0, 3, 3, 3), id="a node without goes where fewest do"),
        pytest.param((0, 1, 5), "xxxxxy", (0, 1, 0, 1, 0, 5), id="a node has more than it needs"),
    ],
)
def test_senders_spread_over_the_replicas(holders: tuple[int, ...], nodes: str, receivers: tuple[int, ...]) -> None:
    destinations = ExpertPlacement(1, 6, (holders,)).destinations(nodes)
    assert tuple(to for (to,) in destinations) == receivers


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.data())
def test_colours_hold_every_set_once_and_are_disjoint(num_experts: int, world_size: int, data: st.DataObject) -> None:
    placement = data.draw(placements(num_experts, world_size))
    colours = placement.groups()
    assert sorted(s for sets in colours for s in sets) == sorted(set(placement.holders))
    for sets in colours:
        ranks = [rank for replicas in sets for rank in replicas]
        assert len(ranks) == len(set(ranks))
        assert list(sets) == sorted(sets)
    for expert in range(num_experts):
        assert placement.holders[expert] in colours[placement.colours[placement.holders[expert]]]
    for rank in range(world_size):
        assert placement.experts_of(rank) == tuple(e for e in range(num_experts) if rank in placement.holders[e])


def test_layers_may_have_holders_of_their_own() -> None:
    own = ((0, 1), (1,), (1,), (0,))
    placement = ExpertPlacement(4, 2, ((0,), (0,), (1,), (1,)), (("layers.2.mlp", own),))
    assert placement.experts_of(0) == placement.experts_of(0, "layers.1.mlp") == (0, 1)
    assert placement.experts_of(0, "layers.2.mlp") == (0, 3)
    assert placement.replica_set(0, "layers.2.mlp.experts.0.down") == (0, 1)
    assert placement.replica_set(0, "layers.20.mlp.experts.0.down") == (0,)
    assert placement.destinations(layer="layers.2.mlp") == [(0, 1, 1, 0), (1, 1, 1, 0)]
    assert placement.groups() == (((0,), (1,)), ((0, 1),)) and placement.colours[0, 1] == 1
    with pytest.raises(ValueError, match="holders of 1 experts given; there are 4"):
        ExpertPlacement(4, 2, own, (("layers.1.mlp", ((0,),)),))
    with pytest.raises(ValueError, match="a layer is named twice"):
        ExpertPlacement(4, 2, own, (("layers.1.mlp", own), ("layers.1.mlp", own)))


def test_a_survivor_keeps_what_it_holds_of_each_layer() -> None:
    own = ((0,), (0,), (1,), (1,), (2,), (2,))
    other = ((2,), (1,), (0,), (2,), (1,), (0,))
    placement = ExpertPlacement(6, 3, own, (("layers.2.mlp", other),))
    old, new = World(0, ("a", "b", "c")), World(1, ("c", "a"))
    moved = ExpertPlacement.rebalanced(placement, old, new)
    for layer in ("layers.1.mlp", "layers.2.mlp"):
        for rank, was in ((0, 2), (1, 0)):  # c was rank 2, a rank 0
            assert {*placement.experts_of(was, layer)} <= {*moved.experts_of(rank, layer)}
            assert len(moved.experts_of(rank, layer)) == 3


def test_overlapping_sets_get_colours_of_their_own() -> None:
    placement = ExpertPlacement(3, 4, ((0, 1), (1, 2), (2,)))
    assert placement.groups() == (((0, 1), (2,)), ((1, 2),))
    assert placement.colours[placement.holders[1]] == 1
    assert placement.experts_of(3) == ()


@pytest.mark.parametrize(
    ("holders", "message"),
    [
        pytest.param(((0,),), "holders of 1 experts", id="too_few"),
        pytest.param(((0,), ()), "expert 1 has no holder", id="unheld"),
        pytest.param(((0,), (2,)), "expert 1 is held by", id="no_such_rank"),
        pytest.param(((0,), (1, 0)), "expert 1 is held by", id="unsorted"),
        pytest.param(((0,), (1, 1)), "expert 1 is held by", id="twice"),
    ],
)
def test_impossible_holders_are_refused(holders: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertPlacement(2, 2, holders)


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="0 experts on 2 ranks"):
        ExpertPlacement.balanced(0, 2)
    with pytest.raises(ValueError, match="for 2 ranks; its world has 1"):
        ExpertPlacement.rebalanced(ExpertPlacement.balanced(3, 2), World(0, ("a",)), World(1, ("b",)))

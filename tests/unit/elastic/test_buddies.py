"""Every rank has a buddy and is one, on another node wherever that can be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.elastic.snapshot_layout import buddies_of, second_buddies_of


@pytest.mark.parametrize(
    ("nodes", "buddies"),
    [
        ([], ()),
        (["a"], ()),
        (["a", "a"], (1, 0)),
        (["a", "a", "a"], (1, 2, 0)),
        (["a", "b", "a", "b"], (1, 0, 3, 2)),
        (["a", "a", "b", "b"], (2, 3, 0, 1)),
        (["a", "a", "a", "b"], (1, 2, 3, 0)),
    ],
)
def test_small_worlds(nodes: list[str], buddies: tuple[int, ...]) -> None:
    assert buddies_of(nodes) == buddies


@given(st.lists(st.sampled_from("abcdef"), min_size=2, max_size=40))
def test_every_rank_keeps_one_others_snapshot_on_another_node_if_possible(nodes: list[str]) -> None:
    buddies = buddies_of(nodes)
    assert sorted(buddies) == list(range(len(nodes)))
    assert all(rank != buddy for rank, buddy in enumerate(buddies))
    at_home = sum(nodes[rank] == nodes[buddy] for rank, buddy in enumerate(buddies))
    fullest = max(nodes.count(node) for node in nodes)
    assert at_home == max(0, 2 * fullest - len(nodes))


@pytest.mark.parametrize(
    ("nodes", "second"),
    [
        ([], ()),
        (["a", "b"], ()),
        (["a", "a", "a"], (2, 0, 1)),
        (["a", "b", "c"], (2, 0, 1)),
        (["a", "b", "a", "b", "c", "c"], (4, 0, 5, 2, 1, 3)),
    ],
)
def test_second_buddies_of_small_worlds(nodes: list[str], second: tuple[int, ...]) -> None:
    assert second_buddies_of(nodes, buddies_of(nodes)) == second


@given(st.lists(st.sampled_from("abcdef"), min_size=3, max_size=24))
def test_every_rank_keeps_two_others_snapshots(nodes: list[str]) -> None:
    ranks, first = range(len(nodes)), buddies_of(nodes)
    second = second_buddies_of(nodes, first)
    assert sorted(second) == list(ranks)
    assert all(len({rank, first[rank], second[rank]}) == 3 for rank in ranks)
    if max(nodes.count(node) for node in nodes) == 1:
        assert all(len({nodes[rank], nodes[first[rank]], nodes[second[rank]]}) == 3 for rank in ranks)

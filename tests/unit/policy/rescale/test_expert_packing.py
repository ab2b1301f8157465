"""Experts of a layer packed by load: even ranks, few moves, copies only where they are needed and have room."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from orchestrator.elastic.expert_placement import ExpertPlacement, Holders
from orchestrator.policy.rescale.expert_packing import EVEN, Ranks, pack, peak


def _skewed(num_experts: int, seed: int, power: float = 1.0) -> NDArray[np.float64]:
    """Loads by Zipf's law, in any order."""
    load_E = 1 / np.arange(1, num_experts + 1) ** power
    return np.random.default_rng(seed).permutation(load_E / load_E.sum() * 1e4)


def _packed(load_E: NDArray[np.float64], size: int, redundant: int = 0) -> tuple[Holders, float, Ranks]:
    ranks = Ranks.of(size, len(load_E), redundant)
    present = ExpertPlacement.balanced(len(load_E), size).holders
    holders = pack(load_E, present, ranks, redundant)
    return holders, peak(load_E, holders, ranks), ranks


def _copies(holders: Holders) -> int:
    return sum(map(len, holders)) - len(holders)


def test_skewed_loads_become_even_with_a_copy_of_the_hottest_expert() -> None:
    for seed in range(10):
        load_E = _skewed(16, seed)
        without, high, _ = _packed(load_E, 4)
        holders, low, _ = _packed(load_E, 4, redundant=4)
        assert _copies(without) == 0 and load_E.max() * 4 / load_E.sum() <= high < 1.45
        assert low <= EVEN and _copies(holders) == 1
        (hottest,) = (expert for expert, ranks in enumerate(holders) if len(ranks) == 2)
        assert hottest == load_E.argmax()


def test_even_loads_move_nothing() -> None:
    load_E = 1000 + np.random.default_rng(0).normal(0, 5, 16)
    holders, _, _ = _packed(load_E, 4, redundant=8)
    assert holders == ExpertPlacement.balanced(16, 4).holders


def test_a_single_hot_expert_moves_few_others() -> None:
    load_E = np.full(16, 100.0)
    load_E[0] = 250.0  # its rank has 550 of 1750, and 437.5 is even
    holders, low, _ = _packed(load_E, 4)
    moved = sum(new != old for new, old in zip(holders, ExpertPlacement.balanced(16, 4).holders, strict=True))
    assert low == pytest.approx(550 * 4 / 1750) and moved == 0  # each rank has four: none can get lighter
    load_E[1:4] = 130.0
    holders, low, _ = _packed(load_E, 4)
    moved = sum(new != old for new, old in zip(holders, ExpertPlacement.balanced(16, 4).holders, strict=True))
    assert low < 550 * 4 / load_E.sum() + 0.01 and 0 < moved <= 6


def test_an_expert_with_half_of_all_tokens_gets_a_copy_on_every_rank() -> None:
    load_E = np.full(16, 1000 / 15)
    load_E[5] = 1000.0
    holders, low, _ = _packed(load_E, 4, redundant=4)
    assert holders[5] == (0, 1, 2, 3) and low <= 1.1


def test_no_layer_gets_more_copies_than_allowed() -> None:
    for redundant in range(4):
        holders, _, _ = _packed(_skewed(8, 1, power=2.0), 4, redundant)
        assert _copies(holders) <= redundant


@settings(deadline=None, max_examples=60)
@given(
    size=st.integers(1, 9),
    redundant=st.integers(0, 9),
    load=st.lists(st.integers(0, 10**6), min_size=1, max_size=24),
)
def test_any_loads_give_a_valid_placement_that_is_no_worse(size: int, redundant: int, load: list[int]) -> None:
    load_E = np.array(load, dtype=np.float64)
    redundant = max(redundant, size - len(load))
    ranks = Ranks.of(size, len(load), redundant)
    present = ExpertPlacement.balanced(len(load), size).holders
    holders = pack(load_E, present, ranks, redundant)
    placed = ExpertPlacement(len(load), size, holders)
    assert peak(load_E, holders, ranks) <= peak(load_E, present, ranks)
    assert holders == present or _copies(holders) <= redundant
    assert all(len(placed.experts_of(rank)) <= ranks.room for rank in range(size))
    if holders != present:
        assert len(placed.groups()) <= len(ranks.levels)
    again = pack(load_E, holders, ranks, redundant)
    assert peak(load_E, again, ranks) <= peak(load_E, holders, ranks)


def test_copies_nest_so_that_the_optimizer_has_a_group_per_level() -> None:
    layers = []
    for seed in range(12):
        holders, _, ranks = _packed(_skewed(32, seed, power=1.5), 8, redundant=16)
        layers.append((f"layers.{seed}.mlp", holders))
    placed = ExpertPlacement(32, 8, ExpertPlacement.balanced(32, 8).holders, tuple(layers))
    assert {len(ranks) for _, holders in layers for ranks in holders} >= {1, 2}
    assert len(placed.groups()) <= 4 == len(ranks.levels)


def test_tokens_for_a_copy_stay_on_their_node_and_count_there() -> None:
    nodes = ("a", "a", "a", "b")
    ranks = Ranks.of(4, 4, 4, nodes)
    holders: Holders = ((0, 1, 2, 3), (1,), (2,), (3,))
    assert peak(np.array([100.0, 0, 0, 0]), holders, ranks) == 1.0
    holders = ((2, 3), (1,), (2,), (3,))  # rank 2 computes for the three of its node
    assert peak(np.array([100.0, 0, 0, 0]), holders, ranks) == 3.0

from itertools import pairwise
from math import ceil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.sampling.micro_batches import (
    MicroBatchSize,
    max_micro_batches,
    micro_batches_of,
    padded_tokens,
    split_into_micro_batches,
)

LENGTHS = st.lists(st.integers(1, 60), min_size=0, max_size=40).map(np.array)


@given(LENGTHS, st.integers(1, 200), st.integers(1, 5))
def test_every_row_is_in_one_micro_batch_within_the_limit(lengths_R: np.ndarray, tokens: int, multiple: int) -> None:
    micro_batches = split_into_micro_batches(lengths_R, MicroBatchSize(tokens=tokens, multiple=multiple))
    assert sorted(row for rows in micro_batches for row in rows) == list(range(len(lengths_R)))
    for rows, padded in zip(micro_batches, padded_tokens(lengths_R, micro_batches), strict=True):
        assert padded == len(rows) * lengths_R[rows].max()
        assert padded <= tokens or len(rows) == 1
    by_length = sorted(micro_batches, key=lambda rows: (-lengths_R[rows].max(), -lengths_R[rows].min()))
    for longer, shorter in pairwise(by_length):  # rows of like length are together
        assert lengths_R[longer].min() >= lengths_R[shorter].max()


@given(LENGTHS, st.integers(1, 200))
def test_there_are_as_few_micro_batches_as_rows_in_order_of_length_allow(lengths_R: np.ndarray, tokens: int) -> None:
    """Against all ways to cut: the least number for the first rows, from that for fewer."""
    by_length = sorted(lengths_R.tolist(), reverse=True)
    least = [0]
    for end in range(1, len(by_length) + 1):
        begins = [b for b in range(end) if (end - b) * by_length[b] <= tokens or end - b == 1]
        least.append(1 + min(least[b] for b in begins))
    assert len(split_into_micro_batches(lengths_R, MicroBatchSize(tokens=tokens))) == least[-1]


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 12), st.integers(1, 4))
def test_rows_of_one_length_keep_their_order_in_micro_batches_of_about_equal_size(
    num_rows: int, length: int, at_once: int, multiple: int
) -> None:
    micro_batches = split_into_micro_batches(
        np.full(num_rows, length), MicroBatchSize(tokens=at_once * length, multiple=multiple)
    )
    assert [row for rows in micro_batches for row in rows] == list(range(num_rows))
    sizes = [len(rows) for rows in micro_batches]
    wanted = min(ceil(ceil(num_rows / at_once) / multiple) * multiple, num_rows)
    assert max(sizes) == ceil(num_rows / wanted)  # no less would do


def test_every_rank_gets_long_rows_and_short_ones() -> None:
    lengths_R = np.arange(64, 0, -1)
    micro_batches = split_into_micro_batches(lengths_R, MicroBatchSize(tokens=64))
    for world_size in (2, 3, 4):
        means = []
        for rank in range(world_size):
            rows = np.concatenate([micro_batches[n] for n in micro_batches_of(rank, world_size, len(micro_batches))])
            means.append(np.average(lengths_R[rows], weights=lengths_R[rows]))
        assert max(means) < 1.25 * min(means)


def test_micro_batches_of_a_number_of_rows_hold_them_in_order() -> None:
    micro_batches = split_into_micro_batches(np.array([3, 9, 1, 7, 2]), MicroBatchSize(rows=2))
    assert [rows.tolist() for rows in micro_batches] == [[0, 1], [2, 3], [4]]
    assert padded_tokens(np.array([3, 9, 1, 7, 2]), micro_batches).tolist() == [18, 14, 2]


def test_workers_get_equally_many_micro_batches_where_their_number_is_known() -> None:
    lengths_R = np.array([90, 80, 10, 10, 10, 10, 10, 10])
    sizes = [MicroBatchSize(tokens=180, multiple=multiple) for multiple in (1, 2, 3, 5, 7)]
    assert [len(split_into_micro_batches(lengths_R, size)) for size in sizes] == [
        2,
        2,
        3,
        5,
        5,
    ]  # of 10 there are two at least


@pytest.mark.parametrize("size", [{"rows": 1, "tokens": 1}, {"rows": -1}, {"tokens": 1, "multiple": 0}])
def test_an_ambiguous_or_empty_micro_batch_size_is_refused(size: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        MicroBatchSize(**size)
    with pytest.raises(ValueError, match="sets neither rows nor tokens"):
        split_into_micro_batches(np.ones(2, np.int64), MicroBatchSize())


@given(world_size=st.integers(1, 40), num_micro_batches=st.integers(0, 100))
def test_ranks_in_order_run_every_micro_batch_once_and_evenly(world_size: int, num_micro_batches: int) -> None:
    blocks = [micro_batches_of(rank, world_size, num_micro_batches) for rank in range(world_size)]
    assert [micro_batch for block in blocks for micro_batch in block] == list(range(num_micro_batches))
    lengths = [len(block) for block in blocks]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] - lengths[-1] <= 1
    assert max(lengths) == max_micro_batches(world_size, num_micro_batches)


def test_first_ranks_get_one_more() -> None:
    assert [micro_batches_of(rank, 3, 5) for rank in range(3)] == [range(2), range(2, 4), range(4, 5)]


@pytest.mark.parametrize(("rank", "world_size", "num_micro_batches"), [(3, 3, 5), (-1, 3, 5), (0, 0, 5), (0, 1, -1)])
def test_ranks_outside_the_world_are_refused(rank: int, world_size: int, num_micro_batches: int) -> None:
    with pytest.raises(ValueError):
        micro_batches_of(rank, world_size, num_micro_batches)

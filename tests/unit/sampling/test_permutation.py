import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.sampling.permutation import rows_at


def whole_epoch(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    return rows_at(seed, np.full(num_rows, epoch), np.arange(num_rows), num_rows)


def row_at(seed: int, epoch: int, position: int, num_rows: int) -> int:
    return int(rows_at(seed, np.array([epoch]), np.array([position]), num_rows)[0])


@given(seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 2**40), num_rows=st.integers(1, 3000))
def test_an_epoch_is_a_bijection(seed: int, epoch: int, num_rows: int) -> None:
    assert np.array_equal(np.sort(whole_epoch(seed, epoch, num_rows)), np.arange(num_rows))


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 16, 17, 64, 65, 4096, 4097, 65_536, 65_537])
def test_sizes_around_powers_of_two_are_bijections(num_rows: int) -> None:
    assert np.array_equal(np.sort(whole_epoch(7, 3, num_rows)), np.arange(num_rows))


def test_a_single_position_equals_that_of_the_whole_epoch() -> None:
    epoch = whole_epoch(5, 2, 1000)
    assert [row_at(5, 2, position, 1000) for position in range(0, 1000, 37)] == epoch[::37].tolist()


def test_mixed_epochs_are_looked_up_each_under_its_own() -> None:
    mixed = rows_at(5, np.array([0, 1, 0, 1]), np.array([3, 3, 4, 4]), 100)
    assert mixed.tolist() == [row_at(5, 0, 3, 100), row_at(5, 1, 3, 100), row_at(5, 0, 4, 100), row_at(5, 1, 4, 100)]


def test_seeds_and_epochs_give_unrelated_orders() -> None:
    orders = [whole_epoch(seed, epoch, 10_000) for seed, epoch in ((0, 0), (0, 1), (1, 0), (2**63, 0))]
    orders.append(np.arange(10_000))
    for number, one in enumerate(orders):
        for other in orders[:number]:
            assert np.count_nonzero(one == other) < 10  # 1 is expected of two random orders
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.05  # five standard deviations


def test_neighbours_are_torn_apart() -> None:
    order = whole_epoch(0, 0, 10_000)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
    assert np.count_nonzero(np.diff(order) == 1) < 10


def test_the_order_never_changes_between_versions() -> None:
    """A checkpoint holds a seed, not an order: another order here would repeat samples after a resume."""
    assert whole_epoch(0, 0, 10).tolist() == [0, 1, 7, 6, 8, 9, 2, 3, 5, 4]
    assert row_at(1234, 5, 123_456_789, 1_000_000_007) == 390_585_987


@pytest.mark.parametrize(("position", "num_rows"), [(10, 10), (-1, 10), (0, 0)])
def test_what_lies_outside_an_epoch_is_refused(position: int, num_rows: int) -> None:
    with pytest.raises(ValueError):
        row_at(0, 0, position, num_rows)

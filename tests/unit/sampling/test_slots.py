import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.sampling.slots import max_slots, slots_of


@given(world_size=st.integers(1, 40), num_slots=st.integers(0, 100))
def test_ranks_in_order_run_every_slot_once_and_evenly(world_size: int, num_slots: int) -> None:
    blocks = [slots_of(rank, world_size, num_slots) for rank in range(world_size)]
    assert [slot for block in blocks for slot in block] == list(range(num_slots))
    lengths = [len(block) for block in blocks]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] - lengths[-1] <= 1
    assert max(lengths) == max_slots(world_size, num_slots)


def test_first_ranks_get_one_more() -> None:
    assert [slots_of(rank, 3, 5) for rank in range(3)] == [range(2), range(2, 4), range(4, 5)]


@pytest.mark.parametrize(("rank", "world_size", "num_slots"), [(3, 3, 5), (-1, 3, 5), (0, 0, 5), (0, 1, -1)])
def test_what_no_world_has_is_refused(rank: int, world_size: int, num_slots: int) -> None:
    with pytest.raises(ValueError):
        slots_of(rank, world_size, num_slots)

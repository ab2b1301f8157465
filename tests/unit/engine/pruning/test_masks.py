"""Choice of what is pruned: exactly as many as are wanted, the smallest ones, ties by position."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.engine.pruning.masks import smallest, smallest_of_four, weakest_units
from tests.support import devices

pytestmark = pytest.mark.usefixtures("device")


@given(values=st.lists(st.integers(0, 4), min_size=1, max_size=40), share=st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_the_smallest_are_as_many_as_wanted_and_ties_go_by_position(values: list[int], share: float) -> None:
    count = int(share * len(values))
    found = smallest(torch.tensor(values, dtype=torch.float32, device=devices.device()), count).tolist()
    wanted = {place for _, place in sorted((value, place) for place, value in enumerate(values))[:count]}
    assert {place for place, is_one in enumerate(found) if is_one} == wanted


def test_half_of_all_is_two_of_each_four_and_less_is_a_part_of_it() -> None:
    weights = torch.randn(12, 16, generator=torch.Generator().manual_seed(2)).to(devices.device())
    whole = smallest_of_four(weights, weights.numel() // 2).view(-1, 4)
    assert (whole.sum(1) == 2).all()
    magnitudes = weights.abs().view(-1, 4)
    assert (magnitudes.where(whole, 0.0).amax(1) <= magnitudes.where(~whole, torch.inf).amin(1)).all()
    before = torch.zeros_like(whole)
    for count in (0, 10, 50, 96):
        some = smallest_of_four(weights, count).view(-1, 4)
        assert int(some.sum()) == count and not (some & ~whole).any() and not (before & ~some).any()
        before = some


def test_zeros_stay_the_first_to_be_pruned() -> None:
    """What was pruned is pruned again by a larger share."""
    weights = torch.randn(8, 8, generator=torch.Generator().manual_seed(3)).to(devices.device())
    first = smallest_of_four(weights, 20).view(8, 8)
    again = smallest_of_four(weights.masked_fill(first, 0.0), 32).view(8, 8)
    assert not (first & ~again).any()


def test_units_are_weighed_by_all_their_parts() -> None:
    device = devices.device()
    gate_up, down = torch.ones(2, 3, 4, device=device), torch.ones(4, 3, 1, device=device)
    gate_up[:, 1] = 0.5
    down[:, 0] = 0.1
    assert weakest_units([gate_up, down], 1).tolist() == [False, True, False]  # 8 + .04, 2 + 4, 8 + 4
    assert weakest_units([gate_up, down], 2).tolist() == [True, True, False]

"""Named ranges: views of what is held, and errors for what isn't."""

import pytest
import torch

from orchestrator.state.ranges import NamedRanges, Range, zeros_like


def _two_pieces() -> tuple[NamedRanges, torch.Tensor]:
    memory = torch.arange(10, dtype=torch.float32)
    ranges = NamedRanges()
    ranges.add("w", 20, memory[6:])
    ranges.add("w", 3, memory[:6])
    ranges.add("nothing", 0, memory[:0])
    return ranges, memory


def test_spans_ascend_and_empty_data_is_left_out() -> None:
    ranges, _ = _two_pieces()
    assert ranges.spans("w") == [(3, 9), (20, 24)]
    assert ranges.names() == ["w"]
    assert ranges.spans("nothing") == []
    assert ranges.num_bytes() == 40


def test_a_view_writes_the_memory_that_was_entered() -> None:
    ranges, memory = _two_pieces()
    ranges.view("w", 4, 6).fill_(-1)
    ranges.view("w", 23, 24).fill_(-2)
    assert memory.tolist() == [0, -1, -1, 3, 4, 5, 6, 7, 8, -2]


@pytest.mark.parametrize(
    ("name", "start", "stop"),
    [
        pytest.param("w", 2, 4, id="begins too early"),
        pytest.param("w", 8, 10, id="ends too late"),
        pytest.param("w", 8, 21, id="spans a gap"),
        pytest.param("v", 0, 1, id="another name"),
    ],
)
def test_elements_not_in_one_range_are_an_error_with_the_held_ranges(name: str, start: int, stop: int) -> None:
    ranges, _ = _two_pieces()
    with pytest.raises(KeyError, match=rf"{name}\[{start}:{stop}\] is not held here"):
        ranges.view(name, start, stop)


@pytest.mark.parametrize("data", [torch.zeros(3), torch.zeros(2, 2)], ids=["wrong length", "not flat"])
def test_a_range_refuses_data_that_does_not_fit(data: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"range \[0, 4\)"):
        Range(0, 4, data)


def test_detached_shares_memory_without_autograd() -> None:
    parameter = torch.nn.Parameter(torch.ones(4))
    ranges = NamedRanges()
    ranges.add("w", 0, parameter.view(-1))
    view = ranges.detached().view("w", 0, 4)
    view.fill_(5)
    assert not view.requires_grad
    assert parameter.tolist() == [5.0] * 4


def test_zeros_like_has_the_same_ranges_in_separate_memory() -> None:
    ranges, memory = _two_pieces()
    copy = zeros_like(ranges)
    assert [(n, r.start, r.stop) for n, r in copy] == [(n, r.start, r.stop) for n, r in ranges]
    copy.view("w", 3, 9).fill_(7)
    assert memory[0] == 0

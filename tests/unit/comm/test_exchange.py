"""Rows exchanged between ranks arrive where they should, and their gradients find the way back."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from orchestrator.comm.exchange import Journey, gather_counts
from orchestrator.protocol.traffic import TrafficKind
from tests.unit.comm.threads import on_ranks

KIND = TrafficKind.DISPATCH
SENT_WW = ((1, 0, 2), (3, 1, 0), (0, 0, 0))  # [source][destination] rows; rank 2 has none to send


def _rows(rank: int) -> Tensor:
    """One row per (source, destination, nth), holding just these numbers."""
    rows = [(rank, to, nth) for to, count in enumerate(SENT_WW[rank]) for nth in range(count)]
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 3)


def test_rows_arrive_by_source_in_their_order() -> None:
    def run(rank: int, group: dist.ProcessGroup | None) -> list[list[float]]:
        received_W = [SENT_WW[source][rank] for source in range(3)]
        journey = Journey(SENT_WW[rank], received_W, group, KIND)
        found: list[list[float]] = journey.end(journey.begin(_rows(rank))).tolist()
        return found

    for rank, rows in enumerate(on_ranks(3, run)):
        assert rows == [[source, rank, nth] for source in range(3) for nth in range(SENT_WW[source][rank])]


def test_the_gradient_of_a_row_comes_from_where_the_row_went() -> None:
    def run(rank: int, group: dist.ProcessGroup | None) -> list[float]:
        rows = _rows(rank).requires_grad_()
        received_W = [SENT_WW[source][rank] for source in range(3)]
        journey = Journey(SENT_WW[rank], received_W, group, KIND)
        received = journey.end(journey.begin(rows))
        (received.sum() * (10.0 + rank)).backward()
        assert rows.grad is not None
        gradients: list[float] = rows.grad[:, 0].tolist()
        return gradients

    for rank, gradients in enumerate(on_ranks(3, run)):
        assert gradients == [10.0 + to for to, count in enumerate(SENT_WW[rank]) for _ in range(count)]


def test_in_a_world_of_one_nothing_moves() -> None:
    rows = _rows(1)
    journey = Journey([4], [4], None, KIND)
    assert journey.end(journey.begin(rows)) is rows


def test_what_is_computed_between_begin_and_end_is_so_both_ways_while_rows_travel() -> None:
    def run(rank: int, group: dist.ProcessGroup | None) -> list[bool]:
        under_way = []
        weights = torch.ones(3, requires_grad=True)
        journey = Journey(SENT_WW[rank], [SENT_WW[source][rank] for source in range(3)], group, KIND)
        on_the_way = journey.begin(_rows(rank).requires_grad_())
        beside = weights * 2.0
        under_way.append(journey.is_under_way)
        received = journey.end(on_the_way)
        under_way.append(journey.is_under_way)
        beside.register_hook(lambda grad: under_way.append(journey.is_under_way))
        (received.sum() + beside.sum()).backward()
        under_way.append(journey.is_under_way)
        return under_way

    assert on_ranks(3, run) == [[True, False, True, False]] * 3


def test_a_journey_ends_once() -> None:
    def run(rank: int, group: dist.ProcessGroup | None) -> str:
        journey = Journey(SENT_WW[rank], [SENT_WW[source][rank] for source in range(3)], group, KIND)
        received = journey.end(journey.begin(_rows(rank)))
        with pytest.raises(ValueError, match="go in pairs") as error:
            journey.end(received)
        return str(error.value)

    assert len(set(on_ranks(3, run))) == 1


@pytest.mark.parametrize("world_size", [1, 3])
def test_every_rank_sees_every_ranks_counts(world_size: int) -> None:
    def run(rank: int, group: dist.ProcessGroup | None) -> list[list[int]]:
        counts: list[list[int]] = gather_counts(torch.tensor([rank, 7 * rank]), group).tolist()
        return counts

    assert on_ranks(world_size, run) == [[[rank, 7 * rank] for rank in range(world_size)]] * world_size

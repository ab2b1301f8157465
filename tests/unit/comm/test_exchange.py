"""Rows exchanged between ranks arrive where they should, and their gradients find the way back."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from orchestrator.comm.exchange import exchange_rows, gather_counts
from tests.unit.comm.threads import on_ranks

SENT_WW = ((1, 0, 2), (3, 1, 0), (0, 0, 0))  # [source][destination] rows; rank 2 has none to send


def _rows(rank: int) -> Tensor:
    """One row per (source, destination, nth), holding just these numbers."""
    rows = [(rank, to, nth) for to, count in enumerate(SENT_WW[rank]) for nth in range(count)]
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 3)


def test_rows_arrive_by_source_in_their_order() -> None:
    def run(rank: int, group: dist.ProcessGroup | None) -> list[list[float]]:
        received_W = [SENT_WW[source][rank] for source in range(3)]
        found: list[list[float]] = exchange_rows(_rows(rank), SENT_WW[rank], received_W, group).tolist()
        return found

    for rank, rows in enumerate(on_ranks(3, run)):
        assert rows == [[source, rank, nth] for source in range(3) for nth in range(SENT_WW[source][rank])]


def test_the_gradient_of_a_row_comes_from_where_the_row_went() -> None:
    def run(rank: int, group: dist.ProcessGroup | None) -> list[float]:
        rows = _rows(rank).requires_grad_()
        received_W = [SENT_WW[source][rank] for source in range(3)]
        received = exchange_rows(rows, SENT_WW[rank], received_W, group)
        (received.sum() * (10.0 + rank)).backward()
        assert rows.grad is not None
        gradients: list[float] = rows.grad[:, 0].tolist()
        return gradients

    for rank, gradients in enumerate(on_ranks(3, run)):
        assert gradients == [10.0 + to for to, count in enumerate(SENT_WW[rank]) for _ in range(count)]


def test_in_a_world_of_one_nothing_moves() -> None:
    rows = _rows(1)
    assert exchange_rows(rows, [4], [4], None) is rows


@pytest.mark.parametrize("world_size", [1, 3])
def test_every_rank_sees_every_ranks_counts(world_size: int) -> None:
    def run(rank: int, group: dist.ProcessGroup | None) -> list[list[int]]:
        counts: list[list[int]] = gather_counts(torch.tensor([rank, 7 * rank]), group).tolist()
        return counts

    assert on_ranks(world_size, run) == [[[rank, 7 * rank] for rank in range(world_size)]] * world_size

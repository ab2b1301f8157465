"""Rows exchanged between ranks arrive where they should, and their gradients find the way back."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from orchestrator.comm import traffic_meter
from orchestrator.comm.tokens.activation_codec import Wire, decode, encode
from orchestrator.comm.tokens.all_to_all import AsyncAllToAll, exchange_counts
from orchestrator.protocol.usage import TrafficKind
from tests.support import devices
from tests.unit.comm.threads import on_ranks

on_devices = pytest.mark.usefixtures("device")
# Others have ranks that are threads, whose backward passes would share the one thread of a GPU.

KIND = TrafficKind.DISPATCH
SENT_WW = ((1, 0, 2), (3, 1, 0), (0, 0, 0))  # [source][destination] rows; rank 2 has none to send


def _rows(rank: int) -> Tensor:
    """One row per (source, destination, nth), holding just these numbers."""
    rows = [(rank, to, nth) for to, count in enumerate(SENT_WW[rank]) for nth in range(count)]
    return torch.tensor(rows, dtype=torch.float64, device=devices.device()).reshape(-1, 3)


@on_devices
def test_rows_arrive_by_source_in_their_order() -> None:
    def run(rank: int, group: dist.ProcessGroup | None) -> list[list[float]]:
        received_W = [SENT_WW[source][rank] for source in range(3)]
        exchange = AsyncAllToAll(SENT_WW[rank], received_W, group, KIND)
        found: list[list[float]] = exchange.end(exchange.begin(_rows(rank))).tolist()
        return found

    for rank, rows in enumerate(on_ranks(3, run)):
        assert rows == [[source, rank, nth] for source in range(3) for nth in range(SENT_WW[source][rank])]


@pytest.mark.parametrize(
    ("nodes", "rows"),
    [
        pytest.param("", 0, id="nobody knows the nodes"),
        pytest.param("xxx", 0, id="one"),
        pytest.param("xxy", 2, id="two"),  # rank 0 sends two rows to rank 2
        pytest.param("xyz", 5, id="three"),
    ],
)
def test_the_traffic_meter_counts_bytes_to_other_nodes(nodes: str, rows: int) -> None:
    def run(rank: int, group: dist.ProcessGroup | None) -> None:
        received_W = [SENT_WW[source][rank] for source in range(3)]
        is_far_W = [node != nodes[rank] for node in nodes]
        exchange = AsyncAllToAll(SENT_WW[rank], received_W, group, KIND, is_far_W=is_far_W)
        exchange.end(exchange.begin(_rows(rank).requires_grad_())).sum().backward()

    since = traffic_meter.Since()
    on_ranks(3, run)
    sent = since.look()[KIND]
    assert (sent.payload, sent.across) == (2 * 5 * 24, 2 * rows * 24)  # there and back, three numbers of 8 bytes a row


def test_the_gradient_of_a_row_comes_from_where_the_row_went() -> None:
    def run(rank: int, group: dist.ProcessGroup | None) -> list[float]:
        rows = _rows(rank).requires_grad_()
        received_W = [SENT_WW[source][rank] for source in range(3)]
        exchange = AsyncAllToAll(SENT_WW[rank], received_W, group, KIND)
        received = exchange.end(exchange.begin(rows))
        (received.sum() * (10.0 + rank)).backward()
        assert rows.grad is not None
        gradients: list[float] = rows.grad[:, 0].tolist()
        return gradients

    for rank, gradients in enumerate(on_ranks(3, run)):
        assert gradients == [10.0 + to for to, count in enumerate(SENT_WW[rank]) for _ in range(count)]


@on_devices
def test_in_a_world_of_one_nothing_moves() -> None:
    rows = _rows(1)
    exchange = AsyncAllToAll([4], [4], None, KIND)
    assert exchange.end(exchange.begin(rows)) is rows


def test_computation_between_begin_and_end_overlaps_with_the_exchange_in_both_passes() -> None:
    def run(rank: int, group: dist.ProcessGroup | None) -> list[bool]:
        under_way = []
        weights = torch.ones(3, requires_grad=True, device=devices.device())
        exchange = AsyncAllToAll(SENT_WW[rank], [SENT_WW[source][rank] for source in range(3)], group, KIND)
        on_the_way = exchange.begin(_rows(rank).requires_grad_())
        beside = weights * 2.0
        under_way.append(exchange.is_under_way)
        received = exchange.end(on_the_way)
        under_way.append(exchange.is_under_way)
        beside.register_hook(lambda grad: under_way.append(exchange.is_under_way))
        (received.sum() + beside.sum()).backward()
        under_way.append(exchange.is_under_way)
        return under_way

    assert on_ranks(3, run) == [[True, False, True, False]] * 3


@on_devices
def test_an_exchange_ends_once() -> None:
    def run(rank: int, group: dist.ProcessGroup | None) -> str:
        exchange = AsyncAllToAll(SENT_WW[rank], [SENT_WW[source][rank] for source in range(3)], group, KIND)
        received = exchange.end(exchange.begin(_rows(rank)))
        with pytest.raises(ValueError, match="go in pairs") as error:
            exchange.end(received)
        return str(error.value)

    assert len(set(on_ranks(3, run))) == 1


@on_devices
def test_every_rank_gets_the_counts_that_concern_it() -> None:
    def run(rank: int, group: dist.ProcessGroup | None) -> list[int]:
        assert group is not None
        counts: list[int] = exchange_counts(torch.tensor(SENT_WW[rank], device=devices.device()), group).tolist()
        return counts

    sent = traffic_meter.Since()
    assert on_ranks(3, run) == [[SENT_WW[source][rank] for source in range(3)] for rank in range(3)]
    assert sent.look()[TrafficKind.CONTROL].payload == 3 * 2 * 8


@pytest.mark.parametrize(("wire", "error"), [("bf16", 2**-8), ("int8", 0.5 / 127)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_in_fewer_bytes_are_nearly_the_same_both_ways(wire: Wire, error: float, dtype: torch.dtype) -> None:
    sent_WW = ((1, 0, 2), (3, 1, 0), (2, 2, 2))

    def run(rank: int, group: dist.ProcessGroup | None) -> None:
        counts, arriving = sent_WW[rank], [sent_WW[source][rank] for source in range(3)]
        x_ND = torch.linspace(-3, 5, sum(counts) * 8).view(-1, 8).to(devices.device(), dtype).requires_grad_()
        exchange = AsyncAllToAll(counts, arriving, group, KIND, wire)
        received_MD = exchange.end(exchange.begin(x_ND))
        back = AsyncAllToAll(arriving, counts, group, KIND)
        returned_ND = back.end(back.begin(received_MD))
        (returned_ND.float() * torch.arange(8.0, device=devices.device())).sum().backward()
        assert returned_ND.dtype == dtype and x_ND.grad is not None
        rounding = error + (2**-8 if dtype == torch.bfloat16 else 0)
        bound = rounding * x_ND.detach().float().abs().amax(-1, keepdim=True)
        assert ((returned_ND - x_ND).detach().float().abs() <= 1.001 * bound).all()
        assert ((x_ND.grad.float().cpu() - torch.arange(8.0)).abs() <= 7.001 * rounding).all()

    on_ranks(3, run)


@on_devices
def test_a_row_that_is_not_finite_stays_so() -> None:
    x_ND = torch.ones(3, 8, device=devices.device())
    x_ND[1, 2], x_ND[2, 0] = float("nan"), float("inf")
    for wire in ("bf16", "int8"):
        read_ND = decode(encode(x_ND, wire), wire, torch.float32)  # type: ignore[arg-type]
        assert read_ND[0].isfinite().all() and not read_ND[1].isfinite().all() and not read_ND[2].isfinite().all()
    assert decode(encode(x_ND[:0], "int8"), "int8", torch.float32).shape == (0, 8)


@on_devices
@pytest.mark.parametrize("wire", ["native", "bf16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_elements_that_travel_whole_keep_all_bits(wire: Wire, dtype: torch.dtype) -> None:
    x_ND = torch.linspace(-7, 11, 5 * 11).view(5, 11).to(devices.device(), dtype)
    read_ND = decode(encode(x_ND, wire, 3), wire, dtype, 3)
    assert torch.equal(read_ND[:, 8:], x_ND[:, 8:]) and read_ND.dtype == dtype
    assert torch.equal(read_ND[:, :8], decode(encode(x_ND[:, :8], wire), wire, dtype))

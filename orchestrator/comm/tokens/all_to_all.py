"""Token exchange between ranks: an uneven all-to-all with a backward pass, overlapped with computation.

Shape legend: N = rows sent by this rank, M = rows received, D = hidden size, W = world size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from orchestrator.comm import collective_stats, traffic_meter
from orchestrator.comm.tokens import link_priority
from orchestrator.comm.tokens.activation_codec import Wire, decode, encode
from orchestrator.protocol.usage import TrafficKind


class AsyncAllToAll:
    """An all-to-all of rows: computation between `begin` and `end` overlaps with the transfer.

        exchange = AsyncAllToAll(sent_W, received_W, group, kind)
        on_the_way_MD = exchange.begin(x_ND)
        ...                                   # reads neither of them
        received_MD = exchange.end(on_the_way_MD)

    The gradient travels back the same way, started in the backward pass of `end` and completed in that of `begin`, so
    it overlaps with the gradients of what was computed between the two: autograd runs later calls first. Use once.

    Args:
        sent_W: rows for each rank; the first are for rank 0, the next for rank 1, and so on.
        received_W: rows from each rank, ordered likewise.
        group: the world; None means a world of one, where nothing moves.
        kind: what the rows are, for the traffic meter.
        wire: the encoding.
        whole: number of elements at the end of each row that are sent exactly, whatever `wire` is.
        is_far_W: by rank, whether it runs on another node, for the traffic meter; empty if unknown.
    """

    def __init__(
        self,
        sent_W: Sequence[int],
        received_W: Sequence[int],
        group: dist.ProcessGroup | None,
        kind: TrafficKind,
        wire: Wire = "native",
        whole: int = 0,
        is_far_W: Sequence[bool] = (),
    ) -> None:
        self._sent_W, self._received_W, self._group = list(sent_W), list(received_W), group
        self._kind, self._wire, self._whole = kind, wire, whole
        self._far = [rank for rank, is_far in enumerate(is_far_W) if is_far]
        self._transfer: _Transfer | None = None

    def begin(self, x_ND: Tensor) -> Tensor:
        """Send rows. Returns the memory (M, D) that receives the rows of other ranks."""
        if self._group is None:
            return x_ND
        on_the_way_MD: Tensor = _Begin.apply(x_ND, self)  # type: ignore[no-untyped-call]
        return on_the_way_MD

    def end(self, on_the_way_MD: Tensor) -> Tensor:
        """Wait until all rows have arrived."""
        if self._group is None:
            return on_the_way_MD
        received_MD: Tensor = _End.apply(on_the_way_MD, self)  # type: ignore[no-untyped-call]
        return received_MD

    @property
    def is_under_way(self) -> bool:
        return self._transfer is not None

    def depart(self, x_ND: Tensor, *, home: bool = False) -> Tensor:
        """Start a transfer, or with `home` that of its gradients, and return the receiving memory."""
        sent_W, received_W = (self._received_W, self._sent_W) if home else (self._sent_W, self._received_W)
        assert self._group is not None  # in a world of one nothing departs
        collective_stats.enter()
        sent = encode(x_ND, self._wire, self._whole)
        received = sent.new_empty(sum(received_W), *sent.shape[1:])
        work = dist.all_to_all_single(received, sent, received_W, sent_W, group=self._group, async_op=True)
        leaving = sum(sent_W) - sent_W[self._group.rank()]
        row_bytes = [rows.shape[1:].numel() * rows.element_size() for rows in (sent, x_ND)]
        across = sum(sent_W[rank] for rank in self._far) * row_bytes[0]
        traffic_meter.enter(self._kind, leaving * row_bytes[0], raw=leaving * row_bytes[1], across=across)
        same = received.dtype == x_ND.dtype
        received_MD = received if same else x_ND.new_empty(len(received), *x_ND.shape[1:])
        self._transfer = _Transfer(work, sent, received, received_MD)
        return received_MD

    def arrive(self) -> Tensor:
        """Wait for the started transfer. Raises RuntimeError if a peer fails."""
        transfer, self._transfer = self._transfer, None
        if transfer is None:
            raise ValueError("a transfer was ended that had not begun; begin() and end() go in pairs, once")
        with collective_stats.waiting(transfer.received.device):
            transfer.work.wait()
        if transfer.received is not transfer.received_MD:
            received_MD = transfer.received_MD
            received_MD.copy_(decode(transfer.received, self._wire, received_MD.dtype, self._whole))
        return transfer.received_MD


@dataclass(frozen=True)
class _Transfer:
    """An all-to-all in progress: the buffers that it reads and writes, and the memory for the decoded rows."""

    work: dist.Work
    sent: Tensor
    received: Tensor
    received_MD: Tensor


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, exchange: AsyncAllToAll) -> Tensor:
        ctx.exchange = exchange
        if ctx.needs_input_grad[0]:  # not in a pass that is recomputed later
            link_priority.will_return()
        return exchange.depart(x_ND)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        home = ctx.exchange.arrive()  # `grads` is what `_End.backward` passed on: the gradients before their transfer
        link_priority.has_returned()
        return home, None


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, on_the_way_MD: Tensor, exchange: AsyncAllToAll) -> Tensor:
        ctx.exchange = exchange
        return exchange.arrive()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.exchange.depart(grads[0], home=True)
        return grads[0], None


def exchange_counts(sent_WC: Tensor, group: dist.ProcessGroup) -> Tensor:
    """C counts that each rank has for this one (W, C), from those that this rank has for each (W, C)."""
    received_WC = torch.empty_like(sent_WC)
    collective_stats.enter()
    with collective_stats.waiting(sent_WC.device):
        dist.all_to_all_single(received_WC, sent_WC, group=group)
    traffic_meter.enter(TrafficKind.CONTROL, sent_WC.nbytes // len(sent_WC) * (len(sent_WC) - 1))
    return received_WC

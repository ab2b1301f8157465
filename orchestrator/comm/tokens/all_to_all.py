"""Token exchange between ranks: an uneven all-to-all that autograd can run backwards, and that computation overlaps.

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
    """Rows on their way to other ranks: what is computed between `begin` and `end` overlaps with the transfer.

        journey = Journey(sent_W, received_W, group)
        on_the_way_MD = journey.begin(x_ND)
        ...                                   # reads neither of them
        received_MD = journey.end(on_the_way_MD)

    The gradient travels the same way back, begun by `end` and ended by `begin`, so that the gradients of what was
    computed between the two overlap with it as well: autograd runs later calls first. For one journey each.

    Args:
        sent_W: rows for each rank; the first are for rank 0, the next for rank 1, and so on.
        received_W: rows from each rank, ordered likewise.
        group: the world; None means a world of one, where nothing moves.
        kind: what the rows are, for the ledger.
        wire: how they travel.
        whole: so many elements at the end of each row travel exactly, whatever `wire` says.
        is_far_W: by rank, whether it lives on another node, for the ledger; empty where that isn't known.
    """

    def __init__(
        self,
        sent_W: Sequence[int],
        received_W: Sequence[int],
        group: dist.ProcessGroup | None,
        kind: TrafficKind,
        wire: Wire = "exact",
        whole: int = 0,
        is_far_W: Sequence[bool] = (),
    ) -> None:
        self._sent_W, self._received_W, self._group = list(sent_W), list(received_W), group
        self._kind, self._wire, self._whole = kind, wire, whole
        self._far = [rank for rank, is_far in enumerate(is_far_W) if is_far]
        self._transfer: _Transfer | None = None

    def begin(self, x_ND: Tensor) -> Tensor:
        """Send rows. Returns the memory (M, D) that they will be received in."""
        if self._group is None:
            return x_ND
        on_the_way_MD: Tensor = _Begin.apply(x_ND, self)  # type: ignore[no-untyped-call]
        return on_the_way_MD

    def end(self, on_the_way_MD: Tensor) -> Tensor:
        """Wait until all rows are there."""
        if self._group is None:
            return on_the_way_MD
        received_MD: Tensor = _End.apply(on_the_way_MD, self)  # type: ignore[no-untyped-call]
        return received_MD

    @property
    def is_under_way(self) -> bool:
        return self._transfer is not None

    def depart(self, x_ND: Tensor, *, home: bool = False) -> Tensor:
        """Start a transfer, or one of gradients `home`, and return what receives it."""
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
        """Wait for the transfer that was started. Raises RuntimeError if a peer is lost."""
        transfer, self._transfer = self._transfer, None
        if transfer is None:
            raise ValueError("a journey was ended that had not begun; begin() and end() go in pairs, once")
        with collective_stats.waiting():
            transfer.work.wait()
        if transfer.received is not transfer.received_MD:
            received_MD = transfer.received_MD
            received_MD.copy_(decode(transfer.received, self._wire, received_MD.dtype, self._whole))
        return transfer.received_MD


@dataclass(frozen=True)
class _Transfer:
    """An all-to-all under way, with the memory that it reads and writes, and that of the rows as they are to be."""

    work: dist.Work
    sent: Tensor
    received: Tensor
    received_MD: Tensor


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, journey: AsyncAllToAll) -> Tensor:
        ctx.journey = journey
        if ctx.needs_input_grad[0]:  # not in a pass that is computed again later
            link_priority.will_return()
        return journey.depart(x_ND)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        home = ctx.journey.arrive()  # what was passed here is what `_End` was given: the same before its journey
        link_priority.has_returned()
        return home, None


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, on_the_way_MD: Tensor, journey: AsyncAllToAll) -> Tensor:
        ctx.journey = journey
        return journey.arrive()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.journey.depart(grads[0], home=True)
        return grads[0], None


def gather_counts(sent_W: Tensor, group: dist.ProcessGroup) -> Tensor:
    """How many rows each rank sends to each (W, W), from how many this one sends to each (W)."""
    world_size = dist.get_world_size(group)
    counts_WW = sent_W.new_empty(world_size, sent_W.numel())
    collective_stats.enter()
    with collective_stats.waiting():
        dist.all_gather_single(counts_WW, sent_W[None], group=group)
    traffic_meter.enter_gathered(TrafficKind.CONTROL, counts_WW, world_size)
    return counts_WW

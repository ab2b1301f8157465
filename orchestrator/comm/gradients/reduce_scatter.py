"""Reduce-scatter of gradients: each rank gets the sum of the piece that it updates.

A rank sends every other rank that rank's piece of its gradients, and adds up what it receives for its own: each byte
travels once, (W - 1) / W of the gradients leave a rank whatever W is, and terms are added in rank order, so a sum has
the same bits at every call and wherever the other ranks run. Pieces may be compressed in transit; a rank's own piece
isn't.

Shape legend: W = ranks, S = elements of a piece, P = bytes of a payload.
"""

from abc import ABC, abstractmethod

import torch
import torch.distributed as dist
from torch import Tensor

from orchestrator.comm import collective_stats, traffic_meter
from orchestrator.comm.gradients.codecs import Codec
from orchestrator.protocol.usage import TrafficKind


class Reduction(ABC):
    """A sum in progress."""

    def go_on(self) -> None:
        """Start the second collective of a scheme that needs two, after waiting for the first. All ranks call it at the
        same point in their sequence of collectives."""
        return

    @abstractmethod
    def is_done(self) -> bool:
        """Whether `wait` would return without waiting for peers."""

    @abstractmethod
    def wait(self) -> Tensor:
        """This rank's piece of the sum (S). Afterwards the given terms hold what was not sent, if the scheme keeps it,
        and are free otherwise. Raises RuntimeError if a peer fails."""


class Reducer(ABC):
    """Reductions over one group of ranks; reusable.

    Args:
        group: ranks whose gradients are summed; a group of one communicates nothing.
        everyone: all ranks of the world call it equally often, so it counts in `orchestrator.comm.collective_stats`.
    """

    def __init__(self, group: dist.ProcessGroup, everyone: bool) -> None:
        self._group, self._everyone = group, everyone
        self._rank, self.num_pieces = group.rank(), group.size()

    @abstractmethod
    def start(self, flat: Tensor, cleared: Tensor | None = None) -> Reduction:
        """Start with this rank's terms (W * S), fp32, which must not be modified until the end. Returns at once.

        Args:
            cleared: for a codec that sends some of the terms: zeroed where it does.
        """

    def _send(self, sent: Tensor) -> tuple[Tensor, dist.Work]:
        """Start sending each rank its part of a tensor."""
        self._enter()
        received = torch.empty_like(sent)
        return received, dist.all_to_all_single(received, sent, group=self._group, async_op=True)

    def _enter(self) -> None:
        if self._everyone:
            collective_stats.enter()

    def _leaving(self, num_bytes: int) -> int:
        """Of `num_bytes` bytes, those addressed to other ranks."""
        return num_bytes * (self.num_pieces - 1) // self.num_pieces


class ReduceScatter(Reducer):
    """Uncompressed; fp64 too."""

    def start(self, flat: Tensor, cleared: Tensor | None = None) -> Reduction:
        if self.num_pieces == 1:
            return LocalReduction(flat, keeps_rest=False)
        received, work = self._send(flat)
        traffic_meter.enter(TrafficKind.GRADIENT, self._leaving(flat.nbytes))
        return _Plain(work, flat, received.view(self.num_pieces, -1))


class Compressed(Reducer):
    """Compressed by a codec.

    Args:
        keeps_rest: leave the compression error in the terms.
    """

    def __init__(self, group: dist.ProcessGroup, everyone: bool, codec: Codec, keeps_rest: bool) -> None:
        super().__init__(group, everyone)
        self.codec, self._keeps_rest = codec, keeps_rest

    def start(self, flat: Tensor, cleared: Tensor | None = None) -> Reduction:
        if self.num_pieces == 1:
            return LocalReduction(flat, self._keeps_rest)
        x_WS = flat.view(self.num_pieces, -1)
        own_S = x_WS[self._rank].clone()
        payload_WP = self.codec.take(x_WS) if self._keeps_rest else self.codec.encode(x_WS)
        if cleared is None:
            x_WS[self._rank].zero_()  # the own piece is added uncompressed
        else:
            self.codec.clear(cleared.view_as(x_WS), payload_WP)
            own_S.zero_()
            self.codec.add(own_S, payload_WP[self._rank])
        received_WP, work = self._send(payload_WP)
        leaving = self._leaving(payload_WP.nbytes)
        index = round(leaving * self.codec.index_share)
        traffic_meter.enter(TrafficKind.GRADIENT, leaving - index, index, raw=self._leaving(flat.nbytes))
        return _Encoded(work, payload_WP, received_WP, own_S, self._rank, self.codec)


class LocalReduction(Reduction):
    """The sum in a group of one rank."""

    def __init__(self, flat: Tensor, keeps_rest: bool) -> None:
        self._total = flat
        if keeps_rest:
            self._total = flat.clone()
            flat.zero_()

    def is_done(self) -> bool:
        return True

    def wait(self) -> Tensor:
        return self._total


class _Exchange(Reduction):
    """An all-to-all in progress. `sent` is kept until it is done."""

    def __init__(self, work: dist.Work, sent: Tensor, received: Tensor) -> None:
        self._work, self._sent, self._received = work, sent, received

    def is_done(self) -> bool:
        return self._work.is_completed()

    def _arrived(self) -> Tensor:
        """By rank, what it sent here."""
        with collective_stats.waiting(self._received.device):
            self._work.wait()
        return self._received


class _Plain(_Exchange):
    def wait(self) -> Tensor:
        first, second, *others = self._arrived()
        total_S = torch.add(first, second)
        for term_S in others:
            total_S.add_(term_S)
        return total_S


class _Encoded(_Exchange):
    def __init__(
        self, work: dist.Work, sent_WP: Tensor, received_WP: Tensor, own_S: Tensor, rank: int, codec: Codec
    ) -> None:
        super().__init__(work, sent_WP, received_WP)
        self._own_S, self._rank, self._codec = own_S, rank, codec

    def wait(self) -> Tensor:
        for rank, payload_P in enumerate(self._arrived()):
            if rank != self._rank:
                self._codec.add(self._own_S, payload_P)
        return self._own_S

"""Sums over the ranks, each of which gets the piece that it updates.

A rank sends every other one the piece of its gradients that is theirs, and adds up what comes for its own: each byte
travels once, (W - 1) / W of the gradients leave a rank however many there are, and the terms are added in the order of
the ranks, so a sum has the same bits at every call and wherever the others are. Pieces may be compressed on their way;
a rank's own isn't.

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
    """A sum under way."""

    def go_on(self) -> None:
        """Begin the second collective of a scheme that needs two. All ranks call it at the same point among their
        collectives; it waits for the first one."""
        return

    @abstractmethod
    def is_done(self) -> bool:
        """Whether `wait` would not wait for peers."""

    @abstractmethod
    def wait(self) -> Tensor:
        """This rank's piece of the sum (S). The terms that were given have become what was not sent of them, if that
        is kept, or are free. Raises RuntimeError if a peer is lost."""


class Reducer(ABC):
    """For one group of ranks, any number of times.

    Args:
        group: whose gradients are summed; a group of one has them already.
        everyone: all ranks of the world call it equally often, so it counts in `orchestrator.comm.collective_stats`.
    """

    def __init__(self, group: dist.ProcessGroup, everyone: bool) -> None:
        self._group, self._everyone = group, everyone
        self._rank, self.num_pieces = group.rank(), group.size()

    @abstractmethod
    def start(self, flat: Tensor, cleared: Tensor | None = None) -> Reduction:
        """Begin with this rank's terms (W * S), fp32, which aren't to be touched until the end. Returns at once.

        Args:
            cleared: for a codec that sends some of the terms: set to 0 where it does.
        """

    def _send(self, sent: Tensor) -> tuple[Tensor, dist.Work]:
        """Begin to send each rank its part of a tensor."""
        self._enter()
        received = torch.empty_like(sent)
        return received, dist.all_to_all_single(received, sent, group=self._group, async_op=True)

    def _enter(self) -> None:
        if self._everyone:
            collective_stats.enter()

    def _leaving(self, num_bytes: int) -> int:
        """Of so many bytes, those that aren't for this rank itself."""
        return num_bytes * (self.num_pieces - 1) // self.num_pieces


class ReduceScatter(Reducer):
    """As they are; in fp64 too."""

    def start(self, flat: Tensor, cleared: Tensor | None = None) -> Reduction:
        if self.num_pieces == 1:
            return LocalReduction(flat, keeps_rest=False)
        received, work = self._send(flat)
        traffic_meter.enter(TrafficKind.GRADIENT, self._leaving(flat.nbytes))
        return _Plain(work, flat, received.view(self.num_pieces, -1))


class Compressed(Reducer):
    """By a codec.

    Args:
        keeps_rest: what isn't sent stays in the terms.
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
            x_WS[self._rank].zero_()  # is added as it is
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
    """The sum of one rank's terms."""

    def __init__(self, flat: Tensor, keeps_rest: bool) -> None:
        self._total = flat
        if keeps_rest:
            self._total = flat.clone()
            flat.zero_()

    def is_done(self) -> bool:
        return True

    def wait(self) -> Tensor:
        return self._total


class _Plain(Reduction):
    def __init__(self, work: dist.Work, sent: Tensor, received_WS: Tensor) -> None:
        self._work, self._sent, self._received_WS = work, sent, received_WS

    def is_done(self) -> bool:
        return self._work.is_completed()

    def wait(self) -> Tensor:
        with collective_stats.waiting():
            self._work.wait()
        first, second, *others = self._received_WS
        total_S = torch.add(first, second)
        for term_S in others:
            total_S.add_(term_S)
        return total_S


class _Encoded(Reduction):
    def __init__(
        self, work: dist.Work, sent_WP: Tensor, received_WP: Tensor, own_S: Tensor, rank: int, codec: Codec
    ) -> None:
        self._work, self._sent_WP, self._received_WP = work, sent_WP, received_WP
        self._own_S, self._rank, self._codec = own_S, rank, codec

    def is_done(self) -> bool:
        return self._work.is_completed()

    def wait(self) -> Tensor:
        with collective_stats.waiting():
            self._work.wait()
        for rank, payload_P in enumerate(self._received_WP):
            if rank != self._rank:
                self._codec.add(self._own_S, payload_P)
        return self._own_S

"""Sums over the ranks, each of which gets the piece that it updates.

A rank sends every other one the piece of its gradients that is theirs, and adds up what comes for its own: each byte
travels once, (W - 1) / W of the gradients leave a rank however many there are, and the terms are added in the order of
the ranks, so a sum has the same bits at every call and wherever the others are.

Shape legend: W = ranks, S = elements of a piece.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from orchestrator.comm import ledger, pulse
from orchestrator.protocol.traffic import TrafficKind


class ReduceScatter:
    """For one group of ranks, any number of times.

    Args:
        group: whose gradients are summed; a group of one has them already.
        everyone: all ranks of the world call it equally often, so it counts in `orchestrator.comm.pulse`.
    """

    def __init__(self, group: dist.ProcessGroup, everyone: bool) -> None:
        self._group, self._everyone = group, everyone
        self.num_pieces = dist.get_world_size(group)

    def start(self, flat: Tensor) -> "Reduction":
        """Begin with this rank's terms (W * S), which aren't to be touched until the end. Returns at once."""
        if self.num_pieces == 1:
            return Reduction(None, flat, flat[None])
        if self._everyone:
            pulse.enter()
        received = torch.empty_like(flat)
        work = dist.all_to_all_single(received, flat, group=self._group, async_op=True)
        ledger.enter(TrafficKind.GRADIENT, flat.nbytes * (self.num_pieces - 1) // self.num_pieces)
        return Reduction(work, flat, received.view(self.num_pieces, -1))


@dataclass(frozen=True)
class Reduction:
    """A sum under way, with the memory that it reads and writes."""

    work: dist.Work | None
    sent: Tensor
    received_WS: Tensor

    def is_done(self) -> bool:
        return self.work is None or self.work.is_completed()

    def wait(self) -> Tensor:
        """This rank's piece of the sum (S). Raises RuntimeError if a peer is lost."""
        if self.work is None:
            return self.received_WS[0]
        with pulse.waiting():
            self.work.wait()
        first, second, *others = self.received_WS
        total_S = torch.add(first, second)
        for term_S in others:
            total_S.add_(term_S)
        return total_S

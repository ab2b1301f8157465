"""A group of peers for state transfers: point-to-point sends and small reductions.

Separate from the training world, since its members differ: a transfer joins the members of two generations. Built
directly on gloo, so that a background thread can connect it while the old world trains. Tensors on a GPU go through
host memory in chunks.
"""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store

from orchestrator.comm import traffic_meter
from orchestrator.comm.transport.gloo import gloo_group
from orchestrator.protocol.usage import TrafficKind


class PeerGroup:
    """The members of a transfer. Collective: every member constructs it.

    Args:
        prefix: unique to this transfer.
        members: worker ids in an order that all members share.
        timeout_s: longest wait of an operation for a peer.
        address: where peers reach this process, as for `gloo_group`.
    """

    def __init__(
        self,
        store: Store,
        prefix: str,
        members: tuple[str, ...],
        me: str,
        timeout_s: float = 60.0,
        address: str | None = None,
    ) -> None:
        self.members = members
        self.me = me
        self._index = {worker: index for index, worker in enumerate(members)}
        self._group: Any = None  # a ProcessGroupGloo; torch's stubs don't know its operations
        self.sent_bytes = 0
        self.received_bytes = 0
        if len(members) > 1:
            timeout = timedelta(seconds=timeout_s)
            self._group = gloo_group(store, prefix, self._index[me], len(members), timeout, address)

    def send(self, data: Tensor, to: str) -> None:
        """Send a contiguous tensor in host memory; returns when it has left. Order is kept per pair of workers."""
        self._pg.send([data], self._index[to], 0).wait()
        self.sent_bytes += data.nbytes
        traffic_meter.enter(TrafficKind.TRANSFER, data.nbytes)

    def receive(self, data: Tensor, source: str) -> None:
        """Fill a contiguous tensor in host memory from `source`."""
        self._pg.recv([data], self._index[source], 0).wait()
        self.received_bytes += data.numel() * data.element_size()

    def reduce(self, data: Tensor, op: dist.ReduceOp.RedOpType) -> None:
        """All-reduce in place. int64 sums wrap modulo 2^64."""
        if self._group is not None:
            options: Any = dist.AllreduceOptions()
            options.reduceOp = op
            self._group.allreduce([data], options).wait()
            traffic_meter.enter_reduced(TrafficKind.TRANSFER, data, len(self.members))

    def barrier(self) -> None:
        """Return once every member has called it. Fails at once for all if a member has ended."""
        self.reduce(torch.zeros(1), dist.ReduceOp.SUM)

    def close(self) -> None:
        """Close the connections: peers blocked on this member fail at once instead of waiting for the timeout."""
        if self._group is not None:
            self._group.shutdown()
            self._group = None

    @property
    def _pg(self) -> Any:
        if self._group is None:
            raise RuntimeError(f"{self.me} has no peers in {self.members}, or the group is closed")
        return self._group

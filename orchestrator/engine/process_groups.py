"""Process groups of one generation, made over the run's rendezvous store.

The store is up before any generation and outlives them all; every generation meets under its own prefix, so members of
older generations can't join. A rendezvous takes milliseconds that way instead of half a second.

A `PendingGroups` connects the ranks and may be made in the background while an older generation trains;
`PendingGroups.adopt` makes the connected ranks this process's torch world without waiting for any of them. So nothing
waits for a rank once a fence is reached, and a failed one is noticed at once: its connections are up already.

On a GPU gradients use the communicator of tokens: operations of two communicators that ranks begin in different orders
may wait for each other for ever. Those that replicas of experts have beside it are used in one order too: ranks that
share one hold the same parameters in the same order, so they sort and cut buckets alike (`param_groups.groups_of`), and
send them one after the other once the last tokens of a backward pass have arrived (`Buckets`).
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from orchestrator.comm.transport.gloo import gloo_group
from orchestrator.comm.transport.nccl import nccl_group
from orchestrator.elastic.expert_placement import ExpertPlacement

TIMEOUT_S = 60.0
REDUCTION = "reduction"
GLOO, NCCL = "gloo", "nccl"
# In torch's registry: groups that were connected beforehand.
CONNECTED = {GLOO: "connected", NCCL: "connected_nccl"}


def backend_of(device: torch.device) -> str:
    """The backend for ranks with a device of this kind each."""
    return NCCL if device.type == "cuda" else GLOO


def _connected(made_by_torch: Any, connected: Any) -> Any:
    """Called by torch for a group: return the connected one; a group that others create is connected now."""
    if connected is not None:
        return connected
    rank, size = made_by_torch.group_rank, made_by_torch.group_size
    return gloo_group(made_by_torch.store, "asked", rank, size, made_by_torch.timeout)


def _connected_nccl(made_by_torch: Any, connected: Any) -> Any:
    if connected is not None:
        return connected
    rank, size = made_by_torch.group_rank, made_by_torch.group_size
    return nccl_group(made_by_torch.store, "asked", rank, size, made_by_torch.timeout)


# gloo takes tensors on a GPU too, through host memory: for ranks that share one, which nccl refuses.
dist.Backend.register_backend(CONNECTED[GLOO], _connected, extended_api=True, devices=["cpu", "cuda"])
dist.Backend.register_backend(CONNECTED[NCCL], _connected_nccl, extended_api=True, devices=["cuda"])


@dataclass(frozen=True)
class ProcessGroups:
    """Process groups of a generation.

    Args:
        rank, world_size: this rank in its world.
        placement: which ranks hold which experts.
        world: all ranks.
        reduction: all ranks again, for gradients, so that they don't queue behind tokens; with nccl `world`.
        replicas: per colour of the placement, the ranks that hold the same experts of that colour as this rank;
            a group of this rank alone where it holds none.
    """

    rank: int
    world_size: int
    placement: ExpertPlacement
    world: dist.ProcessGroup
    reduction: dist.ProcessGroup
    replicas: tuple[dist.ProcessGroup, ...]

    @property
    def exchange(self) -> dist.ProcessGroup | None:
        """The group for token exchange: None in a world of one, where nothing needs to move."""
        return self.world if self.world_size > 1 else None


class PendingGroups:
    """Connected ranks of a future generation. Collective: every rank constructs it.

    Args:
        prefix: unique to the generation and the controller's term.
        backend: gloo, or nccl for ranks with a GPU each.
        timeout_s: how long to wait for a rank, now and in every later operation.
        address: where this process can be reached, as `gloo_group` takes it.

    Raises:
        RuntimeError: a rank did not connect.
    """

    def __init__(
        self,
        store: Store,
        prefix: str,
        rank: int,
        placement: ExpertPlacement,
        backend: str,
        timeout_s: float = TIMEOUT_S,
        address: str | None = None,
    ) -> None:
        self.rank, self.placement, self.backend = rank, placement, backend
        self._store, self._timeout = PrefixStore(prefix, store), timedelta(seconds=timeout_s)
        self._address = address
        self._everyone = tuple(range(placement.world_size))
        self.replica_sets = [
            next((replicas for replicas in sets if rank in replicas), (rank,)) for sets in placement.groups()
        ]
        self._connected: dict[str, Any] = {}
        self._connect("world", self._everyone)
        if backend == GLOO:
            self._connect(REDUCTION, self._everyone)
        for colour, ranks in enumerate(self.replica_sets):
            if ranks != self._everyone:
                self._connect(f"{colour}/{ranks[0]}", ranks)

    def adopt(self) -> ProcessGroups:
        """Make this generation the process's torch world. `disconnect` ends it; these groups are used up."""
        hook = sys.excepthook  # torch wraps it once more for every world
        dist.init_process_group(
            CONNECTED[self.backend],
            store=self._store,
            rank=self.rank,
            world_size=len(self._everyone),
            timeout=self._timeout,
            pg_options=self._connected.get("world"),
        )
        sys.excepthook = hook
        world = dist.group.WORLD
        assert world is not None
        replicas: list[dist.ProcessGroup] = []
        for colour, ranks in enumerate(self.replica_sets):
            if ranks == self._everyone:
                replicas.append(world)
                continue
            options = self._connected.get(f"{colour}/{ranks[0]}")
            replicas.append(dist.new_group(list(ranks), use_local_synchronization=True, pg_options=options))
        reduction: dist.ProcessGroup = world
        if self.backend == GLOO:
            everyone, options = list(self._everyone), self._connected.get(REDUCTION)
            reduction = dist.new_group(everyone, use_local_synchronization=True, pg_options=options)
        self.close()
        return ProcessGroups(self.rank, len(self._everyone), self.placement, world, reduction, tuple(replicas))

    def close(self) -> None:
        """Close connections that were not adopted."""
        self._connected.clear()

    def _connect(self, name: str, ranks: Sequence[int]) -> None:
        mine = ranks.index(self.rank)
        if self.backend == NCCL:
            self._connected[name] = nccl_group(self._store, name, mine, len(ranks), self._timeout)
        else:
            self._connected[name] = gloo_group(self._store, name, mine, len(ranks), self._timeout, self._address)


def connect(
    store: Store,
    prefix: str,
    rank: int,
    placement: ExpertPlacement,
    backend: str,
    timeout_s: float = TIMEOUT_S,
    address: str | None = None,
) -> ProcessGroups:
    """Connect and adopt at once, where no older generation is active. Collective over the world."""
    return PendingGroups(store, prefix, rank, placement, backend, timeout_s, address).adopt()


def disconnect() -> None:
    """Close the generation's groups. Peers blocked on this rank fail once nothing here refers to the groups."""
    if dist.is_initialized():
        dist.destroy_process_group()

"""The process groups of one generation, made over the run's rendezvous store.

The store is up before any generation and outlives them all; every generation meets under a prefix of its own, so
nobody of the past can join. A rendezvous costs milliseconds that way instead of half a second.
"""

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from orchestrator.elastic.placement import Placement


@dataclass(frozen=True)
class Groups:
    """Process groups of a generation.

    Args:
        rank, world_size: this rank in its world.
        placement: which ranks hold which experts.
        world: all ranks.
        replicas: per colour of the placement, the ranks that hold the same experts of that colour as this rank;
            a group of this rank alone where it holds none.
    """

    rank: int
    world_size: int
    placement: Placement
    world: dist.ProcessGroup
    replicas: tuple[dist.ProcessGroup, ...]

    @property
    def exchange(self) -> dist.ProcessGroup | None:
        """The group for token exchange: None in a world of one, where nothing needs to move."""
        return self.world if self.world_size > 1 else None


def connect(
    store: Store, prefix: str, rank: int, placement: Placement, backend: str, timeout_s: float = 60.0
) -> Groups:
    """Meet the other ranks and make the generation's groups. Collective over the world.

    Args:
        store: the run's rendezvous store.
        prefix: unique to the generation and the controller's epoch.
        backend: gloo, or nccl for ranks with a GPU each.
    """
    dist.init_process_group(
        backend,
        store=PrefixStore(prefix, store),
        rank=rank,
        world_size=placement.world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    replicas: list[dist.ProcessGroup] = []
    world = dist.group.WORLD
    assert world is not None
    for sets in placement.groups():
        mine = next((replica_set for replica_set in sets if rank in replica_set), (rank,))
        if len(mine) == placement.world_size:
            replicas.append(world)
        else:
            replicas.append(dist.new_group(list(mine), use_local_synchronization=True))
    return Groups(rank, placement.world_size, placement, world, tuple(replicas))


def disconnect() -> None:
    """Close the generation's groups. Peers blocked on this rank fail at once."""
    if dist.is_initialized():
        dist.destroy_process_group()

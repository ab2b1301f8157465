"""Ranks that are threads of this process, joined by real groups over a store in memory: gloo's, or nccl's of an
emulated GPU."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from orchestrator.comm.transport.peer_group import PeerGroup
from tests.support import devices

PATIENCE_S = 60.0

Result = TypeVar("Result")


def on_ranks(world_size: int, function: Callable[[int, dist.ProcessGroup | None], Result]) -> list[Result]:
    """What `function(rank, group)` returns on each rank; the group is None in a world of one, as in the product."""
    store = HashStore()

    def run(rank: int) -> Result:
        if world_size == 1:
            return function(rank, None)
        group = dist.ProcessGroup(store, rank, world_size)
        if devices.device().type == "cpu":
            gloo = dist.ProcessGroupGloo(store, rank, world_size, timedelta(seconds=PATIENCE_S))
            group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)
        else:
            nccl = dist.ProcessGroupNCCL(store, rank, world_size, dist.ProcessGroupNCCL.Options())
            group._register_backend(devices.device(), dist.ProcessGroup.BackendType.CUSTOM, nccl)
        return function(rank, group)

    return _all(world_size, run)


def on_peers(members: tuple[str, ...], function: Callable[[PeerGroup], Result]) -> list[Result]:
    """What `function(peers)` returns at each of the members of a peer group."""
    store = HashStore()

    def run(index: int) -> Result:
        peers = PeerGroup(store, "test", members, members[index], PATIENCE_S)
        try:
            return function(peers)
        finally:
            peers.close()

    return _all(len(members), run)


def _all(count: int, run: Callable[[int], Result]) -> list[Result]:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))

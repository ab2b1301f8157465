"""Connections of a world that was adopted by torch, and what a rank can do to them on its own."""

import pytest
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from orchestrator.comm.transport.gloo import shut_connections
from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.engine.process_groups import connect
from tests.support.ranks import Ranks


def _shut(rank: int, world_size: int, store: Store, prefix: str, who: int) -> int:
    shut_connections()  # what tests before have left: engines are full of cycles, which keep theirs
    connect(store, prefix, rank, ExpertPlacement.balanced(4, world_size), "gloo")
    dist.barrier()
    if rank != who:
        store.wait([f"{prefix}/shut"])
        return 0
    count = shut_connections()
    store.set(f"{prefix}/shut", "")
    return count


@pytest.mark.on_cpu  # with gloo's connections
@pytest.mark.parametrize("who", [0, 1])
def test_either_end_can_shut_a_connection(ranks: Ranks, who: int) -> None:
    """One end has called the other, which it knows by the port that the other listens on, and not by its own. There are
    two groups of all ranks, for tokens and for gradients."""
    assert ranks.run(_shut, 2, who)[who] == 2

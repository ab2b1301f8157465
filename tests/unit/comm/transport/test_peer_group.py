"""A group of peers: what is sent arrives in order, sums are of all, and a member that leaves frees the others."""

import time

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from orchestrator.comm.transport.peer_group import PeerGroup
from tests.unit.comm.threads import PATIENCE_S, on_peers


def test_messages_of_a_pair_keep_their_order_and_bytes_are_counted() -> None:
    def run(peers: PeerGroup) -> tuple[list[float], int, int]:
        got = torch.zeros(6)
        if peers.me == "a":
            peers.send(torch.tensor([1.0, 2.0]), "b")
            peers.send(torch.tensor([3.0, 4.0, 5.0, 6.0]), "b")
        if peers.me == "b":
            peers.receive(got[:2], "a")
            peers.receive(got[2:], "a")
        peers.barrier()  # a member without work would leave while others still connect
        return got.tolist(), peers.sent_bytes, peers.received_bytes

    a, b, c = on_peers(("a", "b", "c"), run)
    assert a[1:] == (24, 0)
    assert b == ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 0, 24)
    assert c[1:] == (0, 0)


def test_a_sum_of_digests_wraps() -> None:
    def run(peers: PeerGroup) -> int:
        data = torch.tensor([2**63 - 1])
        peers.reduce(data, dist.ReduceOp.SUM)
        return int(data)

    assert on_peers(("a", "b"), run) == [-2, -2]


def test_a_closing_member_frees_the_peers_that_wait_for_it() -> None:
    def run(peers: PeerGroup) -> float:
        peers.barrier()
        started = time.perf_counter()
        if peers.me != "a":
            with pytest.raises(RuntimeError):
                peers.receive(torch.zeros(1), "a")
        peers.close()
        return time.perf_counter() - started

    assert max(on_peers(("a", "b", "c"), run)) < PATIENCE_S / 2


def test_a_group_of_one_has_no_peers() -> None:
    alone = PeerGroup(HashStore(), "test", ("a",), "a")
    data = torch.tensor([3.0])
    alone.reduce(data, dist.ReduceOp.SUM)
    alone.barrier()
    assert data.tolist() == [3.0]
    with pytest.raises(RuntimeError, match="a has no peers"):
        alone.send(data, "a")
    alone.close()


def test_a_closed_group_raises() -> None:
    def run(peers: PeerGroup) -> None:
        peers.barrier()
        peers.close()
        peers.close()
        with pytest.raises(RuntimeError, match="closed"):
            peers.send(torch.zeros(1), "a")

    on_peers(("a", "b"), run)


def test_a_peer_that_does_not_connect_is_an_error_after_the_timeout() -> None:
    with pytest.raises(RuntimeError):
        PeerGroup(HashStore(), "test", ("a", "b"), "a", timeout_s=0.2)

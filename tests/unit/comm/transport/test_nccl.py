"""Connecting nccl groups. An emulated communicator starts when a test lets it, and holds its lock until then."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from queue import Queue
from typing import Any

import pytest
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore

from orchestrator.comm.transport import nccl

pytestmark = [pytest.mark.emulated, pytest.mark.off_cpu, pytest.mark.usefixtures("device")]

PATIENCE_S = 30.0


@pytest.fixture
def played(device: str) -> Iterator[Any]:
    """The class of the groups, whose communicators don't start by themselves."""
    played: Any = dist.ProcessGroupNCCL
    played.waits, played.aborted = Queue(), Queue()
    played.may_start.clear()
    yield played
    played.may_start.set()
    nccl.abort_communicators()
    for thread in threading.enumerate():
        if thread.name.startswith("nccl"):  # else its abort is counted in the next test
            thread.join(PATIENCE_S)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


def _connecting(pool: ThreadPoolExecutor, played: Any, timeout_s: float = PATIENCE_S) -> list[Future[Any]]:
    """The groups of two ranks, whose communicators are starting."""
    store = HashStore()
    timeout = timedelta(seconds=timeout_s)
    found = [pool.submit(nccl.nccl_group, store, "world", rank, 2, timeout) for rank in range(2)]
    assert {played.waits.get(timeout=PATIENCE_S) for _ in found} == {0, 1}
    return found


def test_a_group_is_connected_only_once_its_communicator_has_started(pool: ThreadPoolExecutor, played: Any) -> None:
    groups = _connecting(pool, played)
    assert not any(group.done() for group in groups)
    played.may_start.set()
    assert [group.result(PATIENCE_S).rank() for group in groups] == [0, 1]
    before = nccl.aborted()
    assert nccl.abort_communicators() == 2 and nccl.aborted() == before + 2
    assert {played.aborted.get(timeout=PATIENCE_S) for _ in groups} == {0, 1}


def test_an_abort_frees_ranks_that_wait_for_a_starting_communicator(pool: ThreadPoolExecutor, played: Any) -> None:
    groups = _connecting(pool, played)
    assert nccl.abort_communicators() == 2  # returns though the communicators' locks are held
    for group in groups:
        with pytest.raises(RuntimeError, match="world is not connected: it was aborted"):
            group.result(PATIENCE_S)
    assert played.aborted.empty()
    played.may_start.set()
    assert {played.aborted.get(timeout=PATIENCE_S) for _ in range(4)} == {0, 1}  # also what was made since
    assert nccl.abort_communicators() == 0


def test_a_communicator_that_does_not_start_is_given_up_after_the_time_limit(
    pool: ThreadPoolExecutor, played: Any
) -> None:
    for group in _connecting(pool, played, timeout_s=0.5):
        with pytest.raises(RuntimeError, match="not all of its 2 members connected within 0.5 s"):
            group.result(PATIENCE_S)
    assert nccl.abort_communicators() == 0


def test_the_loss_of_a_member_is_raised_where_the_others_connect(pool: ThreadPoolExecutor, played: Any) -> None:
    store = HashStore()
    played.may_start.set()

    def connect_and_leave() -> None:
        dist.ProcessGroupNCCL(PrefixStore("world", store), 1, 2, played.Options())

    pool.submit(connect_and_leave)
    with pytest.raises(RuntimeError, match="world is not connected: RuntimeError: .*[Cc]onnection"):
        nccl.nccl_group(store, "world", 0, 2, timedelta(seconds=PATIENCE_S))
    assert played.aborted.get(timeout=PATIENCE_S) == 0

"""Where gloo groups listen. In a process of its own: its first group decides that for good."""

import multiprocessing
from datetime import timedelta

import pytest
from torch._C._distributed_c10d import HashStore

from orchestrator.comm.transport.gloo import gloo_group

HERE, ELSEWHERE = "127.0.0.2", "127.0.0.3"
TIMEOUT = timedelta(seconds=10)


def _groups_at_one_address() -> None:
    store = HashStore()
    gloo_group(store, "first", 0, 1, TIMEOUT, HERE)
    gloo_group(store, "later", 0, 1, TIMEOUT)
    assert store.get("first/listens/0") == store.get("later/listens/0")
    assert store.get("later/listens/0").decode().startswith(f"{HERE}:")
    with pytest.raises(RuntimeError, match=f"reached at {HERE}, a new one can't be at {ELSEWHERE}"):
        gloo_group(store, "elsewhere", 0, 1, TIMEOUT, ELSEWHERE)


def test_all_groups_of_a_process_are_reached_where_its_first_is() -> None:
    process = multiprocessing.get_context("spawn").Process(target=_groups_at_one_address)
    process.start()
    process.join(60.0)
    assert process.exitcode == 0

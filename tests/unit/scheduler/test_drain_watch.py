"""Draining nodes as the Scheduler sees them."""

import threading
from collections.abc import Iterator
from unittest.mock import patch

import pytest

from orchestrator.scheduler import drain_watch
from orchestrator.scheduler.drain_watch import DrainWatch


class _Head:
    """What Ray's head answers."""

    def __init__(self) -> None:
        self.nodes: dict[str, float] = {}
        self.is_away = threading.Event()
        self.num_looks = 0

    def __call__(self) -> dict[str, float]:
        self.num_looks += 1
        if self.is_away.is_set():
            raise ConnectionError("the head is away")
        return dict(self.nodes)


@pytest.fixture
def head() -> Iterator[_Head]:
    with patch.object(drain_watch, "draining_nodes", _Head()) as head, patch.object(drain_watch, "LOOK_EVERY_S", 0.001):
        yield head


def test_only_a_change_is_reported(head: _Head) -> None:
    changes: list[int] = []
    watch = DrainWatch(changed=lambda: changes.append(head.num_looks))
    for nodes in ({}, {"a": 12.0}, {"a": 12.0}, {"a": 12.0, "b": 0.0}, {"b": 0.0}):
        head.nodes = nodes
        watch._look()
        assert watch.nodes == nodes
    assert changes == [2, 4, 5]


def test_it_continues_once_the_head_is_back(head: _Head) -> None:
    changed = threading.Event()
    head.is_away.set()
    watch = DrainWatch(changed.set)
    watch.start()
    while head.num_looks < 3:
        assert not changed.wait(0.001)
    head.nodes = {"a": 0.0}
    head.is_away.clear()
    assert changed.wait(60.0) and watch.nodes == {"a": 0.0}

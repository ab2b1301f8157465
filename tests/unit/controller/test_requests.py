"""When a request is accepted, and when it is taken back to who had it."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.cluster.inbox import Inbox
from orchestrator.cluster.storage_thread import StorageThread
from orchestrator.controller.requests import PendingRequests
from orchestrator.errors import UsageError
from orchestrator.policy.state.config import RunLimits
from orchestrator.protocol.messages import DesiredRunState, FinishMode
from orchestrator.run_records.journaled_run import JournaledRun
from orchestrator.spec.job import JobSpec
from orchestrator.storage.tasks import run_inline


@pytest.fixture
def memory(tmp_path: Path) -> JournaledRun:
    return JournaledRun(tmp_path, RunLimits.of("run", JobSpec(name="run")))


def _aim(
    requests: PendingRequests, memory: JournaledRun, finish: FinishMode, workers: int | None = None
) -> DesiredRunState:
    """Request from another thread, and be the controller that takes it in."""
    found: list[DesiredRunState] = []
    asker = threading.Thread(target=lambda: found.append(requests.aim(finish, "asked for", workers)), daemon=True)
    inbox = requests._inbox
    asker.start()
    inbox.get(timeout=20.0)
    assert not found  # it waits until it is written down
    run_inline(memory.decided(replace(memory.state, target=requests.newest), []))
    requests.turned()
    asker.join(20.0)
    return found[0]


def test_a_wish_returns_once_it_is_written_down_and_keeps_what_it_does_not_name(memory: JournaledRun) -> None:
    requests = PendingRequests("run", memory, StorageThread(Inbox()), Inbox())
    assert _aim(requests, memory, FinishMode.NO, 3).workers == 3
    paused = _aim(requests, memory, FinishMode.PAUSE)
    assert (paused.seq, paused.workers, paused.finish) == (2, 3, FinishMode.PAUSE)
    assert JournaledRun(memory._run_dir, RunLimits.of("run", JobSpec(name="run"))).state.target == paused


def test_a_run_that_is_to_end_is_not_turned_to_anything_else(memory: JournaledRun) -> None:
    requests = PendingRequests("run", memory, StorageThread(Inbox()), Inbox())
    _aim(requests, memory, FinishMode.PAUSE)
    for finish in (FinishMode.NO, FinishMode.STOP):
        with pytest.raises(UsageError, match="run run is ending"):
            requests.aim(finish, "asked for", 2)
    assert requests.newest.finish is FinishMode.PAUSE
    assert _aim(requests, memory, FinishMode.PAUSE).seq == 2  # a repeat is harmless


def test_a_priority_is_refused_once_the_run_is_to_end(memory: JournaledRun) -> None:
    requests = PendingRequests("run", memory, StorageThread(Inbox()), Inbox())
    _aim(requests, memory, FinishMode.PAUSE)
    with pytest.raises(UsageError, match="run run is ending"):
        requests.prioritise(5)
    assert requests.priority is None

"""When a request is accepted, and when it is taken back to who had it."""

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.cluster.inbox import Inbox
from orchestrator.cluster.storage_thread import StorageThread
from orchestrator.controller.kept_requests import KeptRequests
from orchestrator.controller.requests import BUSY_S, PendingRequests
from orchestrator.errors import NotFinished, UsageError
from orchestrator.policy.state.config import RunLimits
from orchestrator.protocol.events.run import PriorityChanged, Submitted
from orchestrator.protocol.messages import DesiredRunState, FinishMode
from orchestrator.run_records.journaled_run import JournaledRun
from orchestrator.spec.job import JobSpec
from orchestrator.storage.tasks import StorageTask, run_inline


class Kept:
    """A `RequestStore` in memory."""

    def __init__(self, requests: KeptRequests | None = None) -> None:
        self.requests = requests

    def read(self) -> KeptRequests | None:
        return self.requests

    def write(self, requests: KeptRequests) -> None:
        self.requests = requests

    def clear(self) -> None:
        self.requests = None


@pytest.fixture
def memory(tmp_path: Path) -> JournaledRun:
    return JournaledRun(tmp_path, RunLimits.of("run", JobSpec(name="run")))


def _aim(
    requests: PendingRequests,
    memory: JournaledRun,
    finish: FinishMode,
    workers: int | None = None,
    after_s: float = 0.0,
) -> DesiredRunState:
    """Request from another thread, and be the controller that takes it in, after some time."""
    found: list[DesiredRunState] = []
    asker = threading.Thread(target=lambda: found.append(requests.aim(finish, "asked for", workers)), daemon=True)
    inbox = requests._inbox
    asker.start()
    inbox.get(timeout=20.0)
    time.sleep(after_s)
    assert not found  # it waits until it is written down
    run_inline(memory.decided(replace(memory.state, target=requests.newest), []))
    requests.turned()
    asker.join(20.0)
    return found[0]


def test_a_wish_returns_once_it_is_written_down_and_keeps_what_it_does_not_name(memory: JournaledRun) -> None:
    requests = PendingRequests("run", memory, StorageThread(Inbox()), Inbox(), Kept())
    assert _aim(requests, memory, FinishMode.NO, 3).workers == 3
    paused = _aim(requests, memory, FinishMode.PAUSE)
    assert (paused.seq, paused.workers, paused.finish) == (2, 3, FinishMode.PAUSE)
    assert JournaledRun(memory._run_dir, RunLimits.of("run", JobSpec(name="run"))).state.target == paused


def test_a_run_that_is_to_end_is_not_turned_to_anything_else(memory: JournaledRun) -> None:
    requests = PendingRequests("run", memory, StorageThread(Inbox()), Inbox(), Kept())
    _aim(requests, memory, FinishMode.PAUSE)
    for finish in (FinishMode.NO, FinishMode.STOP):
        with pytest.raises(UsageError, match="run run is ending"):
            requests.aim(finish, "asked for", 2)
    assert requests.newest.finish is FinishMode.PAUSE
    assert _aim(requests, memory, FinishMode.PAUSE).seq == 2  # a repeat is harmless


def test_a_priority_is_refused_once_the_run_is_to_end(memory: JournaledRun) -> None:
    requests = PendingRequests("run", memory, StorageThread(Inbox()), Inbox(), Kept())
    _aim(requests, memory, FinishMode.PAUSE)
    with pytest.raises(UsageError, match="run run is ending"):
        requests.prioritise(5)
    assert requests.priority is None


def test_what_is_not_journalled_in_time_is_kept_until_it_is(
    memory: JournaledRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Kept()
    run_inline(memory.note(Submitted("run", 2)))
    requests = PendingRequests("run", memory, StorageThread(Inbox()), Inbox(), kept)
    with monkeypatch.context() as patched:
        patched.setattr("orchestrator.controller.requests.PATIENCE_S", 0.01)
        patched.setattr("orchestrator.controller.requests.BUSY_S", 0.0)
        with pytest.raises(NotFinished, match="has accepted the request, and has not recorded it yet"):
            requests.aim(FinishMode.NO, "asked for", 3)
        with pytest.raises(NotFinished):
            requests.prioritise(7)
    successor = PendingRequests("run", memory, StorageThread(Inbox()), Inbox(), kept)
    assert (successor.newest.workers, successor.priority) == (3, 7)
    assert _aim(successor, memory, FinishMode.NO, 2).seq == 2
    run_inline(memory.note(PriorityChanged(7, 0)))  # and what is kept counts no more
    run_inline(memory.decided(replace(memory.state, priority=9), []))
    third = PendingRequests("run", memory, StorageThread(Inbox()), Inbox(), kept)
    assert (third.newest.workers, third.priority) == (2, 9)
    third.close()
    assert kept.requests is None


@pytest.mark.parametrize("attempt", [(0.0, "resumed"), (1.0, "")])
def test_requests_to_another_attempt_are_void(memory: JournaledRun, attempt: tuple[float, str]) -> None:
    run_inline(memory.note(Submitted("run", 2)))
    kept = Kept(KeptRequests(*attempt, 0, DesiredRunState(5, 1, FinishMode.STOP), 7))
    requests = PendingRequests("run", memory, StorageThread(Inbox()), Inbox(), kept)
    assert (requests.newest, requests.priority) == (memory.state.target, None)


def test_what_was_journalled_before_the_controller_was_lost_is_not_requested_again(memory: JournaledRun) -> None:
    run_inline(memory.note(Submitted("run", 2)))
    requests = PendingRequests("run", memory, StorageThread(Inbox()), Inbox(), Kept())
    _aim(requests, memory, FinishMode.NO, 3)
    newest = _aim(requests, memory, FinishMode.NO, 2)
    kept = Kept(KeptRequests(memory.times[Submitted], "", 0, replace(newest, seq=1, workers=3), None))
    assert PendingRequests("run", memory, StorageThread(Inbox()), Inbox(), kept).newest == newest


def test_a_request_to_a_busy_controller_waits_longer_than_one_that_storage_holds_up(
    memory: JournaledRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.controller.requests.PATIENCE_S", 0.05)
    storage, hangs, made = StorageThread(Inbox()), threading.Event(), threading.Event()
    requests = PendingRequests("run", memory, storage, Inbox(), Kept())
    assert _aim(requests, memory, FinishMode.NO, 3, after_s=0.3).workers == 3

    def call() -> None:
        made.set()
        hangs.wait(20.0)

    def task() -> StorageTask[None]:
        yield call

    storage.add("task", task)
    storage.advance()
    assert made.wait(20.0)
    began_s = time.monotonic()
    with pytest.raises(NotFinished, match="has not recorded it yet"):
        requests.aim(FinishMode.NO, "asked for", 2)
    assert time.monotonic() - began_s < BUSY_S / 2
    hangs.set()
    storage.finish()

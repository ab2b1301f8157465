"""When a request is accepted, and when it is taken back to who had it."""

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.cluster.inbox import Inbox
from orchestrator.cluster.storage_thread import StorageThread
from orchestrator.controller.journal_writer import JournalWriter
from orchestrator.controller.requests import BUSY_S, PATIENCE_S, PendingRequests
from orchestrator.errors import NotFinished, UsageError
from orchestrator.policy.state.config import RunLimits
from orchestrator.protocol.events.run import Queued
from orchestrator.protocol.messages import DesiredRunState, FinishMode
from orchestrator.protocol.scaling import Grant
from orchestrator.run_records.journaled_run import JournaledRun
from orchestrator.spec.job import JobSpec
from orchestrator.storage.journal import Journal
from orchestrator.storage.tasks import run_inline
from tests.support.held_objects import HeldObjects

LIMITS = RunLimits.of("run", JobSpec(name="run"))


@pytest.fixture
def storage(tmp_path: Path) -> HeldObjects:
    return HeldObjects(tmp_path)


@pytest.fixture
def cluster(tmp_path: Path) -> HeldObjects:
    return HeldObjects(tmp_path / "cluster")


@pytest.fixture
def memory(tmp_path: Path, storage: HeldObjects, cluster: HeldObjects) -> JournaledRun:
    memory = JournaledRun(tmp_path, LIMITS, Journal(storage, kept=cluster))
    memory.writer = JournalWriter(memory, Inbox())
    return memory


@pytest.fixture
def requests(memory: JournaledRun) -> PendingRequests:
    assert isinstance(memory.writer, JournalWriter)
    requests = PendingRequests("run", Inbox())
    requests.open(memory, memory.writer, StorageThread(Inbox()))
    return requests


def _aim(
    requests: PendingRequests, finish: FinishMode, workers: int | None = None, after_s: float = 0.0
) -> DesiredRunState:
    """Request from another thread, and be the controller that takes it in, after some time."""
    found: list[DesiredRunState] = []
    asker = threading.Thread(target=lambda: found.append(requests.aim(finish, "asked for", workers)), daemon=True)
    asker.start()
    requests._inbox.get(timeout=60.0)
    time.sleep(after_s)
    assert not found  # it waits until it is journalled
    run_inline(requests._memory.decided(replace(requests._memory.state, target=requests.newest), []))
    requests.turned()
    asker.join(60.0)
    return found[0]


def test_a_request_returns_once_it_is_journalled_and_keeps_what_it_does_not_name(requests: PendingRequests) -> None:
    assert _aim(requests, FinishMode.NO, 3).workers == 3
    paused = _aim(requests, FinishMode.PAUSE)
    assert (paused.seq, paused.workers, paused.finish) == (2, 3, FinishMode.PAUSE)
    requests._writer.finish()
    assert JournaledRun(requests._memory._run_dir, LIMITS).state.target == paused


def test_a_run_that_is_to_end_is_not_turned_to_anything_else(requests: PendingRequests) -> None:
    _aim(requests, FinishMode.PAUSE)
    for finish in (FinishMode.NO, FinishMode.STOP):
        with pytest.raises(UsageError, match="run run is ending"):
            requests.aim(finish, "asked for", 2)
    assert requests.newest.finish is FinishMode.PAUSE
    assert _aim(requests, FinishMode.PAUSE).seq == 2  # a repeat is harmless


def test_a_priority_is_refused_once_the_run_is_to_end(requests: PendingRequests) -> None:
    _aim(requests, FinishMode.PAUSE)
    with pytest.raises(UsageError, match="run run is ending"):
        requests.prioritise(5)
    assert requests.priority is None


def test_a_request_is_answered_while_storage_hangs_and_a_successor_has_it(
    requests: PendingRequests, storage: HeldObjects, cluster: HeldObjects, tmp_path: Path
) -> None:
    with storage.hanging():
        began_s = time.monotonic()
        newest = _aim(requests, FinishMode.NO, 3)
        assert time.monotonic() - began_s < 2.0
        successor = JournaledRun(tmp_path, LIMITS, Journal(HeldObjects(tmp_path), kept=cluster))
        assert successor.state.target == newest and newest.workers == 3


def test_a_request_to_a_busy_controller_waits_longer_than_one_that_can_not_be_recorded(
    requests: PendingRequests, storage: HeldObjects, cluster: HeldObjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.controller.requests.PATIENCE_S", 1.0)  # of which recording may take half
    assert _aim(requests, FinishMode.NO, 3, after_s=2.2).workers == 3
    with storage.hanging(), cluster.refusing(OSError("the head is away")):
        next(requests._memory.note(Queued("not recorded")))
        deadline_s = time.monotonic() + 60.0
        while requests._writer.unrecorded_s < PATIENCE_S:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        began_s = time.monotonic()
        with pytest.raises(NotFinished, match="has not recorded it yet"):
            requests.aim(FinishMode.NO, "asked for", 2)
        assert time.monotonic() - began_s < BUSY_S / 2


def test_nodes_that_drain_wake_the_controller_once_and_stay_known(requests: PendingRequests) -> None:
    requests.drained({})
    assert requests._inbox.empty()
    requests.drained({"a": 12.0})
    requests.drained({"a": 12.0})
    assert requests._inbox.get(timeout=60.0).is_news and requests._inbox.empty()
    requests.drained({"b": 0.0})  # of a Scheduler that has never seen a
    assert requests.draining == {"a": 12.0, "b": 0.0} and requests._inbox.qsize() == 1


def test_requests_before_a_run_is_open_are_accepted_in_order_and_take_effect_once_it_is(
    memory: JournaledRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("orchestrator.controller.requests.PATIENCE_S", 0.05)
    requests = PendingRequests("run", Inbox())
    accepted = "accepted the request, and has not recorded it yet: its controller has waited 0 s for run storage"
    for workers in (2, 3):
        with pytest.raises(NotFinished, match=accepted):
            requests.aim(FinishMode.NO, "asked for", workers)
    with pytest.raises(NotFinished, match=accepted):
        requests.prioritise(7)
    with pytest.raises(NotFinished, match=accepted):
        requests.granted(Grant(1, "room"))
    for finish in (FinishMode.PAUSE, FinishMode.STOP):
        with pytest.raises(NotFinished, match=accepted):
            requests.aim(finish, "asked for")
    requests.drained({"a": 12.0})
    assert isinstance(memory.writer, JournalWriter)
    requests.open(memory, memory.writer, StorageThread(Inbox()))
    assert (requests.newest.workers, requests.newest.seq, requests.newest.finish) == (3, 3, FinishMode.PAUSE)
    assert requests.priority == 7 and requests.grant == Grant(1, "room") and requests.draining == {"a": 12.0}
    assert "has no effect: run run is ending" in caplog.text  # of the stop after the pause


def test_a_request_waits_for_a_run_that_is_opened_soon(memory: JournaledRun) -> None:
    requests = PendingRequests("run", Inbox())
    assert isinstance(memory.writer, JournalWriter)
    threading.Timer(0.1, requests.open, (memory, memory.writer, StorageThread(Inbox()))).start()
    assert _aim(requests, FinishMode.NO, 3).workers == 3


def test_a_checkpoint_that_is_requested_already_is_no_new_request(requests: PendingRequests) -> None:
    """Else it would repeat the size that was requested last, which a schedule may have replaced since."""
    first = requests._aim(FinishMode.NO, "now", None, None, None, 7, rebalance=False, experts=None)
    assert first.checkpoint == 7
    assert requests._aim(FinishMode.NO, "again", None, None, None, 7, rebalance=False, experts=None) is first
    assert (
        requests._aim(FinishMode.NO, "later", None, None, None, 8, rebalance=False, experts=None).seq == first.seq + 1
    )

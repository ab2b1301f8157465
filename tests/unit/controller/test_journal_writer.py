"""Entries are recorded in order: in run storage, and in the cluster while storage doesn't take them."""

import errno
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.cluster.inbox import Inbox
from orchestrator.controller.journal_writer import JournalWriter
from orchestrator.errors import TermSuperseded
from orchestrator.policy.state.config import RunLimits
from orchestrator.protocol.events.base import Event
from orchestrator.protocol.events.run import Queued
from orchestrator.run_records.journaled_run import JournaledRun
from orchestrator.run_records.run_history import user_events
from orchestrator.spec.job import JobSpec
from orchestrator.storage.directory import DirectoryObjects
from orchestrator.storage.journal import Journal
from orchestrator.storage.tasks import Wait, run_inline
from tests.support.held_objects import HeldObjects

LIMITS = RunLimits.of("run", JobSpec(name="run"))
FULL = OSError(errno.ENOSPC, "No space left on device")


class Recorded:
    """A run whose journal a writer records, in storage that can be held, and in what stands for the cluster."""

    def __init__(self, root: Path) -> None:
        self.run_dir, self.storage = root / "run", HeldObjects(root / "run")
        self.run_dir.mkdir(exist_ok=True)
        self.cluster = HeldObjects(root / "cluster")
        self.run = JournaledRun(self.run_dir, LIMITS, Journal(self.storage, kept=self.cluster))
        self.inbox = Inbox()
        self.writer = self.run.writer = JournalWriter(self.run, self.inbox)

    def note(self, why: str) -> Wait:
        """Have an event recorded. Returns the wait for that."""
        call = next(self.run.note(Queued(why)))
        assert isinstance(call, Wait)
        return call

    def notes(self) -> list[str]:
        """Events that run storage holds, in order."""
        return [event["why"] for event in user_events(self.run_dir)]


def _until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 60.0
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_entries_are_stored_in_order_and_nothing_is_kept_of_them(tmp_path: Path) -> None:
    recorded = Recorded(tmp_path)
    waits = [recorded.note(str(number)) for number in range(50)]
    waits[-1]()
    assert all(wait.is_over() for wait in waits)
    recorded.writer.finish()
    assert recorded.notes() == [str(number) for number in range(50)]
    assert recorded.writer.trouble() is None and recorded.writer.unrecorded_s == 0.0
    assert not recorded.inbox.get(timeout=60.0).is_news
    _until(lambda: recorded.cluster.names("journal") == ())


@pytest.mark.parametrize("hold", ["hangs", "is full"])
def test_what_storage_does_not_take_is_kept_in_the_cluster_until_it_does(tmp_path: Path, hold: str) -> None:
    recorded = Recorded(tmp_path)
    with recorded.storage.hanging() if hold == "hangs" else recorded.storage.refusing(FULL):
        first, second = recorded.note("first"), recorded.note("second")
        first()
        second()
        assert len(recorded.cluster.names("journal")) == 2 and recorded.notes() == []
        steps = recorded.writer.add(recorded.run._journal.propose([{"kind": "queued", "why": "third"}]), stored=True)
        recorded.note("fourth")()
        assert len(recorded.cluster.names("journal")) == 4 and recorded.writer.unrecorded_s == 0.0
        assert not steps.is_over()
        if hold == "is full":
            _until(lambda: recorded.run.trouble is not None)  # the write may be under way in the reserved space
            assert recorded.run.trouble is not None and recorded.run.trouble.condition == "full"
    steps()
    recorded.writer.finish()
    assert recorded.notes() == ["first", "second", "third", "fourth"] and recorded.run.trouble is None
    _until(lambda: recorded.cluster.names("journal") == ())


def test_steps_are_not_kept_as_long_as_no_decision_follows(tmp_path: Path) -> None:
    recorded = Recorded(tmp_path)
    with recorded.storage.hanging():
        steps = recorded.writer.add(recorded.run._journal.propose([{"kind": "queued", "why": "steps"}]), stored=True)
        assert not steps.is_over() and recorded.writer.unrecorded_s == 0.0
        recorded.note("decision")()
        assert len(recorded.cluster.names("journal")) == 2 and not steps.is_over()
    steps()


def test_a_decision_does_not_wait_for_storage_that_is_slow(tmp_path: Path) -> None:
    recorded = Recorded(tmp_path)
    with recorded.storage.hanging():
        began_s = time.monotonic()
        for number in range(20):
            recorded.note(str(number))()
        assert time.monotonic() - began_s < 5.0  # 20 calls to the cluster
    recorded.writer.finish()
    assert recorded.notes() == [str(number) for number in range(20)]


def test_storage_that_hangs_for_long_is_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.controller.journal_writer.SLOW_S", 0.05)
    recorded = Recorded(tmp_path)
    with recorded.storage.hanging():
        recorded.note("waits")
        _until(lambda: recorded.writer.trouble() is not None)
    recorded.writer.finish()
    assert recorded.writer.trouble() is None


def test_an_entry_that_neither_storage_nor_cluster_takes_is_not_recorded(tmp_path: Path) -> None:
    recorded = Recorded(tmp_path)
    with recorded.storage.hanging(), recorded.cluster.refusing(OSError(errno.EIO, "the head is away")):
        wait = recorded.note("waits")
        _until(lambda: recorded.writer.unrecorded_s > 1.0)  # it should have been kept by then
        assert not wait.is_over()
    wait()
    assert recorded.notes() == ["waits"]


def test_a_successor_stores_what_was_kept_and_its_predecessor_records_nothing_more(tmp_path: Path) -> None:
    old = Recorded(tmp_path)
    with old.storage.hanging():
        old.note("kept")()
        new = Recorded(tmp_path)  # for it storage works
        assert new.notes() == ["kept"]
        with pytest.raises(TermSuperseded, match="term 1 may not write to the journal: .* is of term 2"):
            old.note("late")()
    new.note("next")()
    new.writer.finish()
    with pytest.raises(TermSuperseded):
        old.writer.finish()
    assert new.notes() == ["kept", "next"]


def test_the_end_of_a_run_leaves_nothing_in_the_cluster(tmp_path: Path) -> None:
    old = Recorded(tmp_path)
    old.note("stored")()
    old.writer.finish()
    # Where storage was slow, the entry was kept, and is let go after it was stored.
    _until(lambda: old.cluster.names("journal") == ())
    new = Recorded(tmp_path)  # keeps its predecessor from keeping anything
    assert len(DirectoryObjects(tmp_path / "cluster").names("journal")) == 1
    run_inline(new.run.conclude("{}"))
    assert DirectoryObjects(tmp_path / "cluster").names("journal") == ()


def test_events_keep_their_stamps(tmp_path: Path) -> None:
    recorded = Recorded(tmp_path)
    with recorded.storage.hanging():
        entry = run_inline(recorded.run.note(Queued("kept")))
    recorded.writer.finish()
    (stored,) = user_events(recorded.run_dir)
    assert (stored["seq"], stored["term"], stored["time"]) == (entry.seq, entry.term, entry.time)
    event: Event = entry.event
    assert event == Queued("kept")

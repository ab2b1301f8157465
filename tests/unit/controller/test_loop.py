"""Rounds of the controller's loop while many answers arrive."""

import threading
import time
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from orchestrator.cluster.inbox import Arrival, Inbox
from orchestrator.cluster.storage_thread import StorageThread
from orchestrator.controller.loop import RunLoop
from orchestrator.controller.polling import CALM_BEAT_S, ROUNDS_BURST_S, ROUNDS_SHARE, Polls
from orchestrator.storage.tasks import StorageTask


class _Run:
    """A loop whose world sends answers; `turns` holds the number of answers that each decision knew."""

    def __init__(self) -> None:
        self.inbox: Inbox = Inbox()
        self.state: Any = SimpleNamespace(outcome=None, is_changing=False, is_queued=False, transition=None)
        self.state.is_recovering = self.state.wants_restore = False
        self.answers, self.turns = 0, list[int]()
        self.turn_s = 0.0  # processor time that a decision takes
        memory: Any = SimpleNamespace(
            state=self.state, progress=SimpleNamespace(watermark=-1), compactor=Mock(is_due=lambda: False), data=None
        )
        group: Any = Mock(is_quiet=lambda: False)
        self.group = group
        observer: Any = Mock(storage_trouble=lambda: None)
        recorder: Any = Mock(tracking_changed=lambda: False, storage_changed=lambda trouble: False)
        services: Any = Mock(data=None)
        storage = StorageThread(self.inbox)
        self.polls = Polls(self.inbox, storage, memory, group, services, Mock(), recorder, observer)
        run: Any = SimpleNamespace(run_id="run", limits=None, memory=memory, cluster="", job_sha256="")
        decisions: Any = SimpleNamespace(turn=self._turn)
        self.loop = RunLoop(run, self.polls, storage, decisions, group, services, observer, Mock(), Mock())
        self.loop._has_begun = True

    def _turn(self) -> StorageTask[None]:
        self.turns.append(self.answers)
        began_s = time.thread_time()
        while time.thread_time() - began_s < self.turn_s:
            pass
        yield from ()

    def answer(self) -> None:
        self.inbox.put(Arrival(self._take))

    def _take(self) -> None:
        self.answers += 1

    def await_turn_with(self, answers: int) -> None:
        deadline_s = time.monotonic() + 60.0
        while not self.turns or self.turns[-1] < answers:
            assert time.monotonic() < deadline_s, f"the last turn knew {self.turns[-1:]} of {answers} answers"
            time.sleep(0.001)

    def end(self) -> None:
        self.state.outcome = "stopped"


@pytest.fixture
def run() -> Any:
    run = _Run()
    thread = threading.Thread(target=run.loop._train)
    thread.start()
    yield run
    run.end()
    thread.join(60.0)
    assert not thread.is_alive()


def test_turns_take_their_share_of_the_time_whatever_the_number_of_answers(run: _Run) -> None:
    run.turn_s = 0.01
    began_s = time.monotonic()
    for _ in range(1500):
        run.answer()
        time.sleep(0.001)
    run.await_turn_with(1500)  # the last ones are acted on too
    assert len(run.turns) * run.turn_s <= ROUNDS_SHARE * (time.monotonic() - began_s) + ROUNDS_BURST_S + 2 * run.turn_s


def test_without_news_there_are_only_the_rounds_of_the_polls(run: _Run) -> None:
    run.answer()
    run.await_turn_with(1)
    polls = run.group.poll.call_count
    began_s = time.monotonic()
    time.sleep(1.0)
    assert run.group.poll.call_count - polls <= (time.monotonic() - began_s) / CALM_BEAT_S + 1


def test_an_answer_after_a_pause_is_acted_on_at_once(run: _Run) -> None:
    for number in range(10):
        run.answer()
        run.await_turn_with(number + 1)
    assert run.turns == list(range(1, 11))  # each by a turn of its own

import threading
from collections.abc import Callable
from functools import partial

import pytest

from orchestrator.cluster.inbox import Inbox
from orchestrator.cluster.storage_thread import Lane, StorageThread
from orchestrator.errors import TermSuperseded
from orchestrator.storage.tasks import LENGTHY_S, SLOW_S, Lengthy, StorageCall, StorageTask, Wait


class Gate:
    """A storage call that returns when it is opened, or raises."""

    def __init__(self) -> None:
        self._opened, self._error = threading.Event(), False

    def __call__(self) -> str:
        assert self._opened.wait(60.0)
        if self._error:
            raise OSError("refused")
        return "written"

    def open(self, error: bool = False) -> None:
        self._error = error
        self._opened.set()


@pytest.fixture
def inbox() -> Inbox:
    return Inbox()


@pytest.fixture
def storage(inbox: Inbox) -> StorageThread:
    return StorageThread(inbox)


def _task(name: str, done: list[str], *calls: StorageCall) -> StorageTask[None]:
    done.append(f"{name} begins")
    for call in calls:
        try:
            done.append(f"{name} {(yield call)}")
        except OSError as error:
            done.append(f"{name} {error}")


def test_a_call_that_hangs_delays_only_the_tasks_behind_it(storage: StorageThread, inbox: Inbox) -> None:
    done: list[str] = []
    hangs = Gate()
    storage.add("first", partial(_task, "first", done, hangs))
    storage.add("second", partial(_task, "second", done))
    storage.advance()  # returns at once
    storage.advance()
    assert done == ["first begins"] and storage.is_pending("first") and storage.is_pending("second")
    hangs.open()
    assert not inbox.get(timeout=60.0).is_news
    storage.advance()
    assert done == ["first begins", "first written", "second begins"]
    assert not storage.is_pending("first") and not storage.is_pending("second")


def test_an_error_of_a_call_is_raised_where_the_task_made_it(storage: StorageThread) -> None:
    done: list[str] = []
    fails, works = Gate(), Gate()
    fails.open(error=True)
    works.open()
    storage.add("task", partial(_task, "task", done, fails, works))
    storage.finish()
    assert done == ["task begins", "task refused", "task written"]


def test_a_call_that_hangs_delays_no_task_of_another_lane(storage: StorageThread) -> None:
    done: list[str] = []
    hangs, is_recorded = Gate(), threading.Event()
    wait = Wait(is_recorded.is_set, lambda: done.append(f"waited {is_recorded.wait(60.0)}"))
    storage.add("call", partial(_task, "call", done, hangs))
    storage.add("decision", partial(_task, "decision", done, wait), Lane.DECISIONS)
    storage.add("next", partial(_task, "next", done), Lane.DECISIONS)
    storage.advance()
    assert done == ["decision begins", "call begins"]
    is_recorded.set()
    storage.advance()
    assert done[2:] == ["decision None", "next begins"] and storage.is_pending("call")
    hangs.open()
    storage.finish()
    assert done[4:] == ["call written"]


def test_finishing_waits_for_what_others_bring_about(storage: StorageThread) -> None:
    done: list[str] = []
    is_recorded = threading.Event()
    storage.add("decision", partial(_task, "decision", done, Wait(is_recorded.is_set, is_recorded.wait)))
    storage.advance()
    threading.Timer(0.05, is_recorded.set).start()
    storage.finish()
    assert done == ["decision begins", "decision None"]


def test_a_wait_that_ends_the_run_raises(storage: StorageThread) -> None:
    def is_over() -> bool:
        raise TermSuperseded("another one")

    storage.add("decision", partial(_task, "decision", [], Wait(is_over, lambda: None)))
    with pytest.raises(TermSuperseded):
        storage.finish()


def test_a_task_that_waits_is_replaced_and_one_that_runs_is_not(storage: StorageThread) -> None:
    done: list[str] = []
    hangs = Gate()
    storage.add("records", partial(_task, "running", done, hangs))
    storage.advance()
    for name in ("old", "new"):
        storage.add("records", partial(_task, name, done))
    hangs.open()
    storage.finish()
    assert done == ["running begins", "running written", "new begins"]


def test_an_error_of_a_task_is_raised_and_ends_only_that_task(storage: StorageThread) -> None:
    done: list[str] = []

    def broken() -> StorageTask[None]:
        yield lambda: None
        raise ValueError("a bug")

    storage.add("broken", broken)
    storage.add("next", partial(_task, "next", done))
    with pytest.raises(ValueError, match="a bug"):
        storage.finish()
    storage.finish()
    assert done == ["next begins"]


def test_what_runs_is_finished_and_the_rest_abandoned(storage: StorageThread) -> None:
    done: list[str] = []
    hangs = Gate()
    storage.add("first", partial(_task, "first", done, hangs))
    storage.add("second", partial(_task, "second", done))
    storage.advance()
    threading.Timer(0.05, hangs.open).start()
    storage.abandon()
    storage.finish()
    assert done == ["first begins", "first written"]


@pytest.mark.parametrize(("wrap", "slow_s"), [(lambda call: call, SLOW_S), (Lengthy, LENGTHY_S)])
def test_a_call_that_takes_long_is_trouble(
    storage: StorageThread, wrap: Callable[[Gate], StorageCall], slow_s: float
) -> None:
    hangs = Gate()
    storage.add("task", partial(_task, "task", [], wrap(hangs)))
    storage.advance()
    assert storage.trouble() is None
    storage._lanes[Lane.CALLS]._since_s -= slow_s + 37.0
    trouble = storage.trouble()
    assert trouble is not None and trouble.why == f"run storage has not answered for {slow_s + 37.0:.0f} s"
    hangs.open()
    storage.finish()
    assert storage.trouble() is None

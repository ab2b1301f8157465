"""Runs that are started only once there is room."""

import pytest

from orchestrator.errors import JobDoesNotFit
from orchestrator.submission import waiting
from orchestrator.submission.waiting import when_there_is_room


class Full:
    """A cluster without room for the first `refusals` requests."""

    def __init__(self, refusals: int) -> None:
        self.refusals, self.waits = refusals, []

    def start(self, wait: bool = True) -> str:
        self.waits.append(wait)
        if not wait and len(self.waits) <= self.refusals:
            raise JobDoesNotFit("no room")
        return "run"


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "RETRY_EVERY_S", 0.001)


def test_without_a_timeout_the_run_is_queued() -> None:
    full = Full(refusals=1)
    assert when_there_is_room(full.start, None, None) == "run" and full.waits == [True]


def test_it_is_requested_until_there_is_room_and_each_refusal_is_reported() -> None:
    full, reports = Full(refusals=2), []
    assert when_there_is_room(full.start, 60.0, reports.append) == "run"
    assert full.waits == [False] * 3 and [error.message for error in reports] == ["no room"] * 2


def test_without_room_in_time_it_is_refused() -> None:
    with pytest.raises(JobDoesNotFit):
        when_there_is_room(Full(refusals=10**9).start, 0.0, None)

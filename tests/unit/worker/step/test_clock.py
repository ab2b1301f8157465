"""Time of a step, by a clock that the test moves."""

from collections.abc import Callable

import pytest
import torch

from orchestrator.engine import device_time
from orchestrator.worker.step import clock
from orchestrator.worker.step.clock import StepClock


class _Time:
    def __init__(self) -> None:
        self.now_s = 100.0

    def perf_counter(self) -> float:
        return self.now_s

    def time(self) -> float:
        return self.now_s

    def passes(self, seconds: float) -> Callable[[], None]:
        def move() -> None:
            self.now_s += seconds

        return move


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> _Time:
    moved = _Time()
    monkeypatch.setattr(clock, "time", moved)
    monkeypatch.setattr(device_time, "time", moved)
    return moved


def test_waits_for_copies_of_the_state_are_no_computing_time_of_the_rank(moved: _Time) -> None:
    """Else a rank whose memory is slow to copy would count as a straggler."""
    step = StepClock(torch.device("cpu"))
    moved.passes(1.0)()
    step.loaded()
    moved.passes(2.0)()
    step.wait_for_copies(moved.passes(8.0))
    moved.passes(4.0)()
    step.updated()
    assert step.busy_s == 7.0
    moved.passes(16.0)()
    step.proposed()
    moved.passes(32.0)()
    step.voted()
    timing = step.timing([7.0])
    assert (timing.step_s, timing.data_wait_s) == (63.0, 1.0)
    assert (timing.protection_wait_s, timing.communication_wait_s) == (24.0, 32.0)


def test_a_wait_that_fails_counts_too(moved: _Time) -> None:
    def fail() -> None:
        moved.passes(8.0)()
        raise RuntimeError("a copy failed")

    step = StepClock(torch.device("cpu"))
    with pytest.raises(RuntimeError):
        step.wait_for_copies(fail)
    step.updated()
    assert step.busy_s == 0.0

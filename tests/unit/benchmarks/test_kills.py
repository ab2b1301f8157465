"""A recovery's figures, from the reports of ranks."""

from pathlib import Path

import pytest

from benchmarks.support.kills import kill_in_turn, recovery
from benchmarks.support.trace import FinishedStep, Trace

FAULT_TIME = 9.5


def finished_steps(steps: range, begin_time: float, first_pid: int, gap_s: float = 1.0) -> list[FinishedStep]:
    """Reports of two ranks; the second ends each step 0.1 s later."""
    return [
        FinishedStep(step, rank, 2, first_pid + rank, begin_time + gap_s * (number + 1) + 0.1 * rank, 1.0)
        for number, step in enumerate(steps)
        for rank in range(2)
    ]


OLD = finished_steps(range(9), begin_time=0.0, first_pid=10)  # the last ones at 9.0 and 9.1 s
NEW = finished_steps(range(5, 15), begin_time=20.0, first_pid=20, gap_s=0.5)


def test_a_stall_ends_with_the_first_step_that_no_member_had_finished() -> None:
    found = recovery(OLD + NEW, FAULT_TIME, notice_times=[3.0, 9.75, 9.8])
    # Steps 5 to 8 are done again; rank 0 ends step 9 at 22.5 s.
    assert found == {
        "stall_s": 22.5 - FAULT_TIME - 0.5,
        "steps_replayed": 4,
        "detect_s": 0.25,
        "restart_s": 20.5 - FAULT_TIME - 0.5,
        "step_s": 0.5,
    }


def test_a_step_that_survivors_still_finish_is_no_recovery() -> None:
    last = FinishedStep(9, 0, 2, 10, FAULT_TIME + 0.1, 1.0)
    assert recovery([*OLD, last, *NEW], FAULT_TIME, [9.75]) == recovery(OLD + NEW, FAULT_TIME, [9.75])


def test_a_step_that_one_rank_alone_had_finished_is_done_again() -> None:
    last = FinishedStep(9, 0, 2, 10, FAULT_TIME - 0.1, 1.0)
    found = recovery([*OLD, last, *NEW], FAULT_TIME, [])
    assert (found["steps_replayed"], found["stall_s"]) == (5, 23.0 - FAULT_TIME - 0.5)


def test_a_failed_restart_belongs_to_the_stall_and_its_steps_count_once() -> None:
    failed = finished_steps(range(5, 7), begin_time=12.0, first_pid=30)
    found = recovery(OLD + failed + NEW, FAULT_TIME, [])
    assert (found["steps_replayed"], found["stall_s"]) == (4, 22.5 - FAULT_TIME - 0.5)
    assert found["detect_s"] is None


def test_no_recovery_is_no_figure() -> None:
    with pytest.raises(ValueError, match="it takes two"):
        recovery(OLD, FAULT_TIME, [])


def test_a_run_that_has_ended_is_not_waited_for(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the run has ended"):
        kill_in_turn(Trace(tmp_path), 1, 5, is_running=lambda: False)

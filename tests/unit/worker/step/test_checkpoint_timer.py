"""Checkpoints by number of steps and by time, at the same steps on all members."""

import pytest

from orchestrator.worker.step.checkpoint_timer import CheckpointTimer

AUTO_S = 600.0


class Clock:
    def __init__(self) -> None:
        self.now_s = 50.0

    def __call__(self) -> float:
        return self.now_s


@pytest.mark.parametrize(("every", "wanted"), [(2, [1, 3]), (3, [2]), ("none", []), ("auto", [])])
def test_by_number_and_never_after_the_last_step(every: int | str, wanted: list[int]) -> None:
    timer = CheckpointTimer(every, max_steps=6, clock=Clock())
    timer.begin(-1)
    assert [step for step in range(6) if timer.due(step, timer.wants(step, AUTO_S))] == wanted


@pytest.mark.parametrize("every", ["none", 1000])
def test_time_matters_to_auto_only(every: int | str) -> None:
    clock = Clock()
    timer = CheckpointTimer(every, max_steps=100, clock=clock)
    timer.begin(-1)
    clock.now_s += 10 * AUTO_S
    assert not timer.wants(0, AUTO_S) and not timer.due(3, agreed=False)


def test_all_members_follow_the_first_one_that_is_due() -> None:
    """The second one joined later: it votes no, and its clock begins anew together with the first one's."""
    clock = Clock()
    first, second = (CheckpointTimer("auto", max_steps=1000, clock=clock) for _ in range(2))
    first.begin(-1)
    clock.now_s += AUTO_S / 2
    second.begin(-1)
    saved = []
    for step in range(30):
        clock.now_s += AUTO_S / 10
        first.begin(step - 1)  # a generation begins: no reason to wait longer
        agreed = first.wants(step, AUTO_S) or second.wants(step, AUTO_S)
        due = {member.due(step, agreed) for member in (first, second)}
        assert len(due) == 1
        if due.pop():
            saved.append(step)
            for member in (first, second):
                member.restart()
    assert saved == [4, 14, 24]


def test_none_is_wanted_before_the_clock_runs() -> None:
    assert not CheckpointTimer("auto", max_steps=9, clock=Clock()).wants(0, AUTO_S)


def test_a_worker_that_comes_back_does_not_count_the_time_without_it() -> None:
    clock = Clock()
    timer = CheckpointTimer("auto", max_steps=1000, clock=clock)
    timer.begin(-1)
    assert not timer.due(0, timer.wants(0, AUTO_S))
    clock.now_s += 2 * AUTO_S
    timer.begin(0)  # of the same members
    assert timer.wants(0, AUTO_S)
    timer.begin(70)
    assert not timer.wants(0, AUTO_S)


@pytest.mark.parametrize(("every", "wanted"), [("auto", [2, 5, 8]), (4, [3, 7]), ("none", [])])
def test_auto_has_a_largest_number_of_steps_where_there_is_one(every: int | str, wanted: list[int]) -> None:
    timer = CheckpointTimer(every, max_steps=10, clock=Clock(), at_least_every=3)
    timer.begin(-1)
    assert [step for step in range(10) if timer.due(step, timer.wants(step, AUTO_S))] == wanted


@pytest.mark.parametrize("every", ["none", "auto", 1000])
def test_a_request_is_met_once_by_a_checkpoint_of_its_step_or_a_later_one(every: int | str) -> None:
    timer = CheckpointTimer(every, max_steps=100, clock=Clock())
    timer.begin(-1)
    saved = []
    for step in range(20):
        requested_from = 5 if step < 9 else 12  # it is complete some steps later; then another one is requested
        if timer.due(step, timer.wants(step, AUTO_S, requested_from)):
            timer.restart()
            saved.append(step)
    assert saved == [5, 12]


def test_a_run_that_went_back_applies_a_request_again() -> None:
    timer = CheckpointTimer("none", max_steps=100, clock=Clock())
    timer.begin(-1)
    assert timer.due(20, timer.wants(20, AUTO_S, 20))
    timer.restart()
    timer.begin(7)  # its snapshots of later steps were lost, and so was that checkpoint
    assert not timer.wants(8, AUTO_S, 9) and timer.wants(9, AUTO_S, 9)

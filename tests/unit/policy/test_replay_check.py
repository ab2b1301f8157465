"""When a standby replays steps, which one, and the events of it."""

from dataclasses import replace
from typing import Any

import pytest

from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.world import World
from orchestrator.policy.replay_check import Difference, first_difference, state_differs
from orchestrator.policy.state.requests import begun_again
from orchestrator.policy.state.run_parts import ReplayState
from orchestrator.protocol.events.notices import ReplayChecked, ReplayFailed, StateDiffers
from orchestrator.protocol.messages import Restore
from orchestrator.protocol.replay_task import PastWorld, ReplayTask, StepFingerprint
from orchestrator.protocol.worker_phase import Phase
from orchestrator.protocol.worker_report import ReplayResult
from orchestrator.spec.fault_tolerance import VerifySpec
from tests.unit.policy.imagined import Life, limits_of, record

DIGESTS = ("0a", "0b")


def _steps(**changes: Any) -> list[StepFingerprint]:
    return [StepFingerprint.of(record(step, digests=DIGESTS, **changes)) for step in range(4)]


def test_the_same_steps_don_t_differ() -> None:
    assert first_difference(_steps(), _steps(world_size=7, step_s=9.0)) is None
    assert first_difference(_steps(loss=float("nan")), _steps(loss=float("nan"))) is None


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"loss": 2.0}, Difference(2, ("loss",))),
        ({"grad_norm": float("inf")}, Difference(2, ("grad_norm",))),
        ({"loss": -0.0, "grad_norm": 2.0}, Difference(2, ("loss", "grad_norm"))),
        ({"digests": ("0a", "0c")}, Difference(2, ("state",), (1,))),
        ({"digests": ("0a", "0c"), "grad_norm": 2.0}, Difference(2, ("grad_norm", "state"))),  # made by all together
        ({"digests": ("0c", "0c")}, Difference(2, ("state",))),  # all of them: which rank is at fault is unknown
    ],
)
def test_the_first_step_that_differs_is_reported(changes: dict[str, Any], difference: Difference) -> None:
    again = _steps()
    again[2], again[3] = replace(again[2], **changes), replace(again[3], loss=9.0)
    assert first_difference(_steps(), again) == difference


def test_what_one_side_lacks_doesn_t_count() -> None:
    assert first_difference(_steps(), _steps()[1:]) is None
    old = [replace(step, digests=()) for step in _steps()]
    assert first_difference(old, _steps()) is None and first_difference(_steps(), old) is None


def test_ranks_are_those_of_the_world_that_did_the_step() -> None:
    worlds = [
        PastWorld(0, World(0, ("w0", "w1")), ExpertPlacement.balanced(4, 2)),
        PastWorld(5, World(1, ("w1", "w2")), ExpertPlacement.balanced(4, 2)),
    ]
    nodes = {"w1": "there"}
    assert state_differs(Difference(4, ("state",), (1,)), worlds, nodes) == StateDiffers(
        4, ("state",), (1,), ("w1",), ("there",)
    )
    assert state_differs(Difference(5, ("state",), (1,)), worlds, nodes).workers == ("w2",)


# -- the rule --------------------------------------------------------------------------------------------------------


def _life(every: int = 4, steps: int = 2, **limits: object) -> Life:
    verify = VerifySpec(every=every, steps=steps)
    return Life(limits_of(steps=60, standby=1, max_workers=3, verify=verify, **limits), checkpoint_every=4)


def _asked(life: Life) -> ReplayTask:
    life.run_until(lambda: life.state.replay.task is not None)
    assert life.state.replay.task is not None and life.directive.check == life.state.replay.task
    return life.state.replay.task


def _answer(life: Life, check: ReplayTask, **changes: Any) -> None:
    """The standby has done the steps, and the last one came out so."""
    again = (*check.findings[:-1], replace(check.findings[-1], **changes))
    life.say(check.worker, checked=ReplayResult(check.number, again))


def test_a_standby_is_asked_once_the_newest_checkpoint_has_steps_behind_it() -> None:
    life = _life()
    check = _asked(life)
    assert check.worker in life.state.worker_group and check.worker not in life.state.members
    assert (check.number, check.step, check.last_step) == (0, 3, 5) and life.progress.watermark >= 5
    assert life.state.current is not None
    current = life.state.current
    assert check.worlds == (PastWorld(0, current.world, current.placement, current.micro_batch),)
    assert [finding.step for finding in check.findings] == [4, 5]
    _answer(life, check)
    life.run_until(lambda: life.state.replay.task is None)
    (note,) = life.of_kind("checked")
    assert note == ReplayChecked(check.worker, 4, 5, equal=True)
    assert life.of_kind("state_differs") == []
    again = _asked(life)
    assert again.number == 1 and again.step >= 7


def test_checks_are_no_more_often_than_asked_for() -> None:
    life = _life(every=8)
    first = _asked(life)
    _answer(life, first)
    life.run_until(lambda: life.state.replay.task is None)
    assert _asked(life).step >= first.step + 8


def test_a_difference_names_the_worker_and_its_node() -> None:
    life = _life()
    life.nodes = {"w1": "node-b"}
    check = _asked(life)
    check = replace(check, findings=tuple(replace(finding, digests=DIGESTS) for finding in check.findings))
    life.state = replace(life.state, replay=replace(life.state.replay, task=check))
    _answer(life, check, digests=("0a", "ff"))
    life.run_until(lambda: life.state.replay.task is None)
    (note,) = life.of_kind("state_differs")
    assert note.ranks == (1,) and note.step == check.last_step
    assert life.state.current is not None
    assert note.workers == (check.worlds[0].world.members[1],) and note.nodes == ("node-b",)
    assert [n.equal for n in life.of_kind("checked")] == [False]
    assert life.state.replay.differences == (check.last_step,)


def test_what_differed_is_doubted_until_the_run_goes_back_before_it() -> None:
    life = _life()
    state = replace(life.state, replay=ReplayState(differences=(4, 9)))
    assert begun_again(state, Restore(9, "/c/9")).replay.differences == (4, 9)  # made of what went wrong
    assert begun_again(state, Restore(7, "/c/7")).replay.differences == (4,)
    assert begun_again(state, None).replay.differences == ()


def test_a_failed_check_has_a_reason_and_the_next_one_follows() -> None:
    life = _life()
    check = _asked(life)
    life.say(check.worker, checked=ReplayResult(0, error="no such file"))
    life.run_until(lambda: life.state.replay.task is None)
    (note,) = life.of_kind("check_failed")
    assert note == ReplayFailed(check.worker, 3, "no such file")
    assert _asked(life).number == 1


def test_a_check_ends_with_its_worker() -> None:
    life = _life()
    check = _asked(life)
    life.lost[check.worker] = "killed"
    life.run_until(lambda: life.state.replay.task is None)
    assert not [note for note in life.notes if note.kind.startswith("check")]


def test_a_check_ends_if_its_worker_is_needed_first() -> None:
    life = _life()
    life.run_until(lambda: life.state.checkpoint_done == 3)
    check = _asked(life)
    life.scale(3)
    life.run_until(lambda: check.worker in life.state.members)
    life.run_until(lambda: life.state.replay.task is None)
    assert life.of_kind("checked") == []


def test_a_standby_with_other_numerics_does_not_replay() -> None:
    life = _life()
    life.run_until(lambda: life.state.checkpoint_done == 3)
    for worker in life.state.worker_group:
        life.say(worker, numerics="a" if worker in life.state.members else "b")
    life.run_until(lambda: life.progress.watermark > 12)
    assert life.state.replay.count == 0
    for worker in life.state.worker_group:
        life.say(worker, numerics="a")
    _asked(life)


def test_steps_long_ago_are_compared_all_the_same() -> None:
    life = _life()
    check = _asked(life)
    life.progress = replace(life.progress, recent=life.progress.recent[-1:])
    _answer(life, check, loss=0.5)
    life.run_until(lambda: life.state.replay.task is None)
    assert [note.parts for note in life.of_kind("state_differs")] == [("loss",)]


def test_no_standby_replays_without_the_job_key() -> None:
    life = Life(limits_of(standby=1, max_workers=3), checkpoint_every=4)
    life.run_until(lambda: life.progress.watermark > 9)
    assert life.state.replay.task is None and life.state.replay.count == 0


def test_steps_of_two_worlds_are_left_to_the_next_checkpoint() -> None:
    life = _life(every=1, steps=3)
    life.run_until(lambda: life.state.checkpoint_done == 3)
    life.scale(3)
    life.run_until(lambda: life.state.current is not None and life.state.current.world.size == 3)
    assert life.state.replay.task is None or life.state.replay.task.step > 3
    check = _asked(life)
    done = [r for r in life.progress.recent if check.step < r.step <= check.last_step]
    assert {r.generation for r in done} == {life.state.current.generation}  # type: ignore[union-attr]
    assert life.reports[check.worker].phase is Phase.STANDBY

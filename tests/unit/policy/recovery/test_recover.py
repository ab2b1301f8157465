"""Members are lost at every moment of a run's life: what is decided, and what it costs."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.policy.lifecycle import decide, explain, phase_of
from orchestrator.policy.state.run_parts import ReplayState
from orchestrator.policy.state.run_state import KillWorker
from orchestrator.protocol.messages import FinishMode, Restore
from orchestrator.protocol.status import RunPhase
from orchestrator.protocol.worker_phase import Phase
from orchestrator.protocol.worker_report import WorkerError
from orchestrator.storage.condition import StorageCondition, StorageTrouble
from tests.unit.policy.imagined import Life, limits_of


def _trained(life: Life) -> None:
    """All steps were published once and in order, by generations that only grow."""
    assert life.state.outcome is RunPhase.SUCCEEDED, life.state.why
    assert len(life.done_by) == life.limits.steps
    assert life.progress.watermark == life.limits.steps - 1


def test_survivors_continue_at_once_and_the_lost_one_is_replaced() -> None:
    life = Life(limits_of(steps=40, initial_workers=4))
    life.run_until(lambda: life.step == 5)
    committed = life.progress.watermark
    life.kill("w2")
    life.run_until(lambda: life.state.activated == 1)
    assert life.state.members == ("w0", "w1", "w3")
    (recovery,) = life.state.recoveries
    assert (recovery.from_size, recovery.to_size, recovery.lost, recovery.cause) == (4, 3, ("w2",), "worker")
    assert recovery.source == "memory" and recovery.steps_lost == 0 and recovery.steps_replayed <= 1
    assert recovery.step >= committed
    life.run_to_the_end()
    _trained(life)
    assert life.done_by[-1] == ("w0", "w1", "w3", "w4")
    assert life.replayed <= 1
    assert [r.why for r in life.state.rescales] == ["asked for"] or len(life.state.rescales) == 1


def test_a_warm_standby_replaces_a_lost_member_at_once() -> None:
    life = Life(limits_of(steps=40, initial_workers=3, standby=1))
    life.run_until(lambda: life.step == 5)
    life.kill("w0")
    life.run_until(lambda: life.state.activated == 1)
    assert life.state.members == ("w1", "w2", "w3")
    life.run_to_the_end()
    _trained(life)


def test_two_that_are_no_buddies_may_be_lost_at_once() -> None:
    life = Life(limits_of(steps=40, initial_workers=4))
    life.run_until(lambda: life.step == 5)
    life.kill("w1")
    life.kill("w3")
    life.run_until(lambda: life.state.activated == 1)
    assert life.state.members == ("w0", "w2")
    assert life.state.recoveries[0].lost == ("w1", "w3") and life.state.recoveries[0].source == "memory"
    life.run_to_the_end()
    _trained(life)


@pytest.mark.parametrize("workers", [3, 4])
@pytest.mark.parametrize("rank", range(3))
def test_a_rank_lost_with_its_buddy_costs_a_step_at_most_where_there_are_two_copies(workers: int, rank: int) -> None:
    life = Life(limits_of(steps=40, initial_workers=workers, copies=2, min_workers=3))
    life.run_until(lambda: life.step == 9)
    current = life.state.current
    assert current is not None
    lost = {current.world.members[rank], current.world.members[current.buddies[rank]]}
    for worker in lost:
        life.kill(worker)
    life.run_until(lambda: life.state.activated == 1)
    (recovery,) = life.state.recoveries
    assert set(recovery.lost) == lost and recovery.source == "memory"
    assert recovery.steps_lost == 0 and recovery.steps_replayed <= 1
    life.run_to_the_end()
    _trained(life)
    assert life.replayed <= 1 and not life.of_kind("rolled_back")


@pytest.mark.parametrize("with_checkpoint", [True, False])
def test_a_rank_lost_with_its_buddy_sends_the_run_back_to_a_checkpoint(with_checkpoint: bool) -> None:
    life = Life(limits_of(steps=40, initial_workers=4), checkpoint_every=4 if with_checkpoint else None)
    life.run_until(lambda: life.step == 9)
    current = life.state.current
    assert current is not None
    buddy = current.world.members[current.buddies[1]]
    life.state = replace(life.state, replay=ReplayState(differences=(3, 8)))
    life.kill("w1")
    life.kill(buddy)
    life.run_until(lambda: life.state.activated == 1)
    assert life.state.replay.differences == ((3,) if with_checkpoint else ())  # the rest is done again
    (recovery,) = life.state.recoveries
    assert recovery.source == "checkpoint" and recovery.step == (7 if with_checkpoint else -1)
    assert recovery.steps_lost == 8 - recovery.step
    assert len(life.of_kind("rolled_back")) == 1
    life.run_to_the_end()
    _trained(life)


def test_the_loss_of_all_workers_sends_the_run_back_to_a_checkpoint() -> None:
    life = Life(limits_of(steps=40), checkpoint_every=4)
    life.run_until(lambda: life.step == 9)
    life.kill("w0")
    life.kill("w1")
    life.tick()
    assert phase_of(life.state, life.seen()) is RunPhase.RECOVERING
    life.run_to_the_end()
    _trained(life)
    assert life.state.recoveries[0].step == 7


@pytest.mark.parametrize("how", [FinishMode.STOP, FinishMode.PAUSE])
@pytest.mark.parametrize("steps_on", [2, 4, 6])
def test_a_checkpoint_of_the_abandoned_past_does_not_end_a_run(how: FinishMode, steps_on: int) -> None:
    """The run went back to step 7, as the checkpoint of step 11 was damaged, and ends before, at and after step 11."""
    life = Life(limits_of(steps=40), checkpoint_every=4)
    life.run_until(lambda: life.committed == 11)
    life.spoilt.add(11)
    for worker in life.state.members:
        life.kill(worker)
    life.run_until(lambda: life.state.activated == 1 and life.step == 7 + steps_on - 1)
    life.stop_run(how)
    life.run_to_the_end()
    assert [recovery.step for recovery in life.state.recoveries] == [7]
    assert life.marked[-1] == life.step == 7 + steps_on and life.marked[-1] not in life.spoilt


def _goes_back_behind_a_rotten_checkpoint() -> Life:
    """All members are lost, and one of those that read the newest checkpoint, of step 11, finds damage."""
    life = Life(limits_of(steps=40), checkpoint_every=4, rotten={11})
    life.run_until(lambda: life.committed == 11 and life.step == 13)
    for worker in life.state.members:
        life.kill(worker)
    return life


def test_a_checkpoint_in_which_a_rank_finds_damage_is_passed_over() -> None:
    life = _goes_back_behind_a_rotten_checkpoint()
    life.run_until(lambda: life.state.activated > 0)
    assert [note.step for note in life.of_kind("rolled_back")] == [11, 7]
    assert "block 3 has another sha256" in life.of_kind("rolled_back")[1].why
    assert len(life.of_kind("transition_abandoned")) == 1 and life.state.failures.transitions == 0
    (recovery,) = life.state.recoveries
    assert (recovery.source, recovery.step) == ("checkpoint", 7)
    assert recovery.steps_lost == 12 - 7 and recovery.steps_replayed == 13 - 7
    life.run_to_the_end()
    _trained(life)
    assert life.committed == 39


def test_workers_that_found_damage_wait_while_other_checkpoints_can_not_be_read() -> None:
    life = _goes_back_behind_a_rotten_checkpoint()
    life.run_until(lambda: bool(life.of_kind("rolled_back")))
    life.unreadable = "checkpoints can't be read: Stale file handle"
    life.run_until(lambda: life.state.wants_restore)
    for _ in range(10):
        life.tick()
    assert life.state.next is None and len(life.of_kind("rolled_back")) == 1
    assert "block 3" in explain(life.limits, life.state, life.seen())
    assert "Stale file handle" in explain(life.limits, life.state, life.seen())
    life.unreadable = ""
    life.run_to_the_end()
    _trained(life)
    assert [recovery.step for recovery in life.state.recoveries] == [7]


def test_a_run_whose_only_checkpoint_is_found_damaged_may_be_stopped() -> None:
    life = _goes_back_behind_a_rotten_checkpoint()
    life.run_until(lambda: bool(life.of_kind("rolled_back")))
    life.unreadable = "checkpoints can't be read: none is good"
    life.run_until(lambda: life.state.wants_restore)
    life.stop_run()
    life.run_to_the_end()
    assert life.state.outcome is RunPhase.STOPPED and "none is good" in life.state.why


def test_a_worker_that_finds_damage_in_a_good_checkpoint_is_replaced() -> None:
    """The controller reads the checkpoint whole and finds it good: it is the worker's memory."""
    life = Life(limits_of(steps=40), checkpoint_every=4, nodes={"w2": "n2", "w3": "n3"})
    life.run_until(lambda: life.committed == 11 and life.step == 13)
    life.misreads = {"w3"}
    for worker in life.state.members:
        life.kill(worker)
    life.run_to_the_end()
    _trained(life)
    assert [note.step for note in life.of_kind("rolled_back")] == [11]
    lost = life.of_kind("worker_lost")[-1]
    assert (lost.worker, lost.member) == ("w3", False) and "found damage in a checkpoint that is good" in lost.why
    assert life.lost["w3"] == "killed by its controller" and "w2" not in life.lost
    (failure,) = [failure for failure in life.state.failures.recent if failure.cause == "corrupted"]
    assert (failure.worker, failure.node) == ("w3", "n3")
    assert [recovery.step for recovery in life.state.recoveries] == [11]


def test_damage_that_only_ranks_find_ends_the_run_after_some_attempts() -> None:
    """The controller reads the checkpoint whole and finds it good."""
    life = _goes_back_behind_a_rotten_checkpoint()
    life.run_until(lambda: life.state.wants_restore and life.state.current is None)
    life.restorable = Restore(11, "step-11")
    life.run_to_the_end()
    assert life.state.outcome is RunPhase.FAILED and "6 transitions in a row failed" in life.state.why
    assert "block 3 has another sha256" in life.state.why


def _without_anybody_or_checkpoints() -> Life:
    """All members are lost, and storage is out of reach."""
    life = Life(limits_of(steps=40), checkpoint_every=4)
    life.run_until(lambda: life.step == 9)
    life.unreadable = "checkpoints can't be read: Stale file handle"
    life.kill("w0")
    life.kill("w1")
    return life


def test_a_checkpoint_that_cannot_be_read_now_is_waited_for() -> None:
    life = _without_anybody_or_checkpoints()
    for _ in range(10):
        life.tick()
    assert phase_of(life.state, life.seen()) is RunPhase.RECOVERING and life.of_kind("rolled_back") == []
    assert "Stale file handle" in explain(life.limits, life.state, life.seen())
    life.unreadable = ""
    life.run_to_the_end()
    _trained(life)
    assert life.state.recoveries[0].step == 7


def test_a_run_that_waits_for_a_checkpoint_may_be_stopped() -> None:
    life = _without_anybody_or_checkpoints()
    life.run_until(lambda: life.state.wants_restore)
    life.stop_run()
    life.run_to_the_end()
    assert life.state.outcome is RunPhase.STOPPED and "while checkpoints can't be read" in life.state.why
    assert life.of_kind("rolled_back") == [] and life.committed == 7


def test_below_the_least_number_of_workers_the_run_waits_and_its_status_shows_it() -> None:
    life = Life(limits_of(steps=40, initial_workers=2, min_workers=2))
    life.run_until(lambda: life.step == 5)
    life.frozen = {"w2"}
    life.kill("w1")
    for _ in range(5):
        life.tick()
    assert phase_of(life.state, life.seen()) is RunPhase.RECOVERING
    assert "waits for 1 more worker: 1 is there, workers.min is 2" in explain(life.limits, life.state, life.seen())
    assert "w1 died" in explain(life.limits, life.state, life.seen())
    life.frozen = set()
    life.run_to_the_end()
    _trained(life)
    assert life.replayed <= 1


def test_a_death_while_the_run_recovers() -> None:
    life = Life(limits_of(steps=40, initial_workers=4))
    life.run_until(lambda: life.step == 5)
    life.kill("w1")
    life.run_until(lambda: life.state.next is not None)
    life.kill("w3")
    life.run_to_the_end()
    _trained(life)
    (recovery,) = life.state.recoveries
    assert recovery.lost == ("w1", "w3") and recovery.to_size == 2 and life.replayed <= 1


@pytest.mark.parametrize("moment", ["prepare", "fence", "moving", "activated"])
@pytest.mark.parametrize("victim", ["w0", "w1"])
def test_a_member_lost_in_a_rescale(moment: str, victim: str) -> None:
    life = Life(limits_of(steps=60, initial_workers=3))
    life.run_until(lambda: life.step == 4)
    life.scale(4)
    life.run_until(
        lambda: {
            "prepare": life.state.next is not None,
            "fence": life.state.fence is not None,
            "moving": life.reports["w2"].phase is Phase.MOVING,
            "activated": life.state.activated == 1,
        }[moment]
    )
    life.kill(victim)
    life.run_to_the_end()
    _trained(life)
    assert life.replayed <= 1 and life.state.recoveries[0].steps_lost == 0
    assert len(life.done_by[-1]) == 4


def test_a_member_that_does_not_stop_is_killed() -> None:
    life = Life(limits_of(steps=40, initial_workers=3))
    life.run_until(lambda: life.step == 5)
    life.frozen = {"w1"}
    life.stop("w0")
    life.run_until(lambda: "w1" in life.lost, max_ticks=8)
    life.run_to_the_end()
    _trained(life)
    assert [note.cause for note in life.of_kind("worker_lost")] == ["hang"]


def test_without_a_loss_the_same_members_continue() -> None:
    life = Life(limits_of(steps=40, initial_workers=3))
    life.run_until(lambda: life.step == 5)
    life.stop("w1")
    life.run_to_the_end()
    _trained(life)
    assert life.state.recoveries[0].cause == "network" and life.state.recoveries[0].lost == ()
    assert {len(members) for members in life.done_by} == {3}


def test_a_loss_before_the_last_checkpoint_is_complete() -> None:
    life = Life(limits_of(initial_workers=3))
    life.run_until(lambda: life.step == 11)
    life.kill("w2")
    life.run_to_the_end()
    _trained(life)
    assert life.committed == 11


def test_a_checkpoint_that_cannot_be_completed_costs_nothing_and_the_last_one_is_written_again() -> None:
    life = Life(limits_of(initial_workers=3), checkpoint_every=5, damaged={0})
    life.run_to_the_end()
    _trained(life)
    assert life.abandoned == {(0, 4), (0, 9), (0, 11)} and (life.committed, life.committed_by) == (11, 1)
    (recovery,) = life.state.recoveries
    assert (recovery.cause, recovery.lost, recovery.steps_lost) == ("storage", (), 0)


def test_a_last_checkpoint_that_can_never_be_completed_ends_the_run_with_the_reason() -> None:
    life = Life(limits_of(initial_workers=2), damaged=set(range(20)))
    life.run_until(lambda: life.state.outcome is not None)
    assert life.state.outcome is RunPhase.FAILED and "the last one, could not be completed" in life.state.why


def test_a_member_lost_while_the_first_world_is_made_is_replaced() -> None:
    life = Life(limits_of(initial_workers=2))
    life.run_until(lambda: life.state.next is not None)
    life.kill("w1")
    life.run_to_the_end()
    _trained(life)
    assert set(life.done_by) == {("w0", "w2")}


def test_leavers_are_kept_until_the_new_world_has_committed_a_step() -> None:
    life = Life(limits_of(steps=40, initial_workers=2))
    life.run_until(lambda: life.step == 4)
    life.scale(1)
    life.run_until(lambda: life.state.activated == 1)
    assert "w1" in life.state.worker_group and life.state.settled < 1
    life.run_until(lambda: "w1" not in life.state.worker_group)
    assert life.state.settled == 1


def test_an_error_of_a_frozen_worker_counts_as_its_failure() -> None:
    life = Life(limits_of(steps=40, initial_workers=3))
    life.run_until(lambda: life.step == 5)
    life.frozen = {"w1"}
    life.say("w1", phase=Phase.FAILED, error=WorkerError("internal", "a bug", "Traceback: line 3"))
    life.run_to_the_end()
    _trained(life)
    assert life.state.recoveries[0].cause == "internal" and life.state.recoveries[0].lost == ("w1",)


def test_a_member_that_answers_nothing_is_given_up_and_killed() -> None:
    life = Life(limits_of(steps=40, initial_workers=3))
    life.run_until(lambda: life.step == 5)
    decision = decide(life.limits, life.state, life.seen(silence_s={"w1": 9.0}))
    assert decision.state.is_recovering and "w1 has not answered for 9 s" in decision.state.why
    assert KillWorker("w1") in decision.actions and "w1" not in decision.state.worker_group


def test_of_members_that_all_answer_the_one_with_the_fewest_collectives_hangs() -> None:
    life = Life(limits_of(steps=40, initial_workers=3))
    life.run_until(lambda: life.step == 5)
    for worker, number in {"w0": 7, "w1": 6, "w2": 7}.items():
        life.say(worker, collective=number)
    assert decide(life.limits, life.state, life.seen(idle_s=29.0)).state.abort.generation < 0
    assert "w1 hangs" in decide(life.limits, life.state, life.seen(idle_s=31.0)).state.why
    life.say("w1", unread=StorageTrouble(StorageCondition.AWAY, "the rows of step 6 can't be read: no connection"))
    assert decide(life.limits, life.state, life.seen(idle_s=300.0)).state.abort.generation < 0
    life.say("w1", unread=None)
    assert "w1 hangs" in decide(life.limits, life.state, life.seen(idle_s=31.0)).state.why
    life.say("w2", collective=6)  # two: it may be the network between them
    assert decide(life.limits, life.state, life.seen(idle_s=31.0)).state.abort.generation < 0


def _fails_by_itself(life: Life, worker: str, kind: str) -> None:
    life.stop(worker)
    life.say(worker, error=WorkerError(kind, "no such key", "Traceback: line 7"))


def test_the_same_user_error_twice_in_a_step_ends_the_run_with_its_traceback() -> None:
    life = Life(limits_of(steps=40, initial_workers=3))
    life.run_until(lambda: life.step == 5)
    life.holds_still = True
    _fails_by_itself(life, "w1", "user_error")
    life.run_until(lambda: life.state.activated == 1 and life.reports["w1"].phase is Phase.TRAINING)
    assert life.state.recoveries[0].cause == "user_error"
    _fails_by_itself(life, "w0", "user_error")
    life.run_until(lambda: life.state.outcome is not None, max_ticks=8)
    assert life.state.outcome is RunPhase.FAILED and "no such key" in life.state.why
    assert life.state.traceback == "Traceback: line 7"


def test_a_user_error_that_is_not_repeated_is_survived() -> None:
    life = Life(limits_of(steps=40, initial_workers=3))
    life.run_until(lambda: life.step == 5)
    _fails_by_itself(life, "w1", "user_error")
    life.run_to_the_end()
    _trained(life)
    assert {len(members) for members in life.done_by} == {3}


def test_recoveries_without_a_step_end_the_run() -> None:
    life = Life(limits_of(steps=40, initial_workers=3))
    life.run_until(lambda: life.step == 5)
    life.holds_still = True
    for generation in range(1, 7):
        _fails_by_itself(life, "w1", "internal")
        if generation < 6:
            life.run_until(
                lambda g=generation: life.state.activated == g and life.reports["w1"].phase is Phase.TRAINING
            )
    life.run_until(lambda: life.state.outcome is not None, max_ticks=8)
    assert "recoveries in a row without a step" in life.state.why


@settings(max_examples=150, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 4)), max_size=4),
    deaths=st.lists(st.tuples(st.integers(3, 90), st.integers(0, 5)), max_size=5),
    standby=st.integers(0, 1),
    every=st.sampled_from([None, 5]),
)
def test_every_step_is_published_once_for_any_death_at_any_time(
    requests: list[tuple[int, int]], deaths: list[tuple[int, int]], standby: int, every: int | None
) -> None:
    """The end comes, whatever happens, and a step that was committed is done again only if a whole state was lost."""
    life = Life(limits_of(steps=40, standby=standby, initial_workers=3), checkpoint_every=every)
    for tick in range(600):
        if life.state.outcome is not None:
            break
        for at_tick, workers in requests:
            if at_tick == tick:
                life.scale(workers)
        for at_tick, number in deaths:
            alive = [w for w in life.state.worker_group if w not in life.lost]
            if at_tick == tick and alive:
                life.kill(alive[number % len(alive)])
        life.tick()
    if life.state.outcome is RunPhase.FAILED:
        assert "in a row" in life.state.why and len(deaths) >= 3
        return
    _trained(life)
    for recovery in life.state.recoveries:
        had_buddies = recovery.from_size > 1
        assert recovery.source == "checkpoint" or recovery.steps_lost == 0 or not had_buddies
    assert sorted(r.generation for r in life.state.recoveries) == [r.generation for r in life.state.recoveries]


def test_a_worker_in_transition_to_the_recovering_world_has_not_hung() -> None:
    """However long its state takes to come."""
    life = Life(limits_of(steps=60, initial_workers=4))
    life.run_until(lambda: life.step == 17)
    life.kill(life.state.members[-1])
    life.run_until(lambda: life.state.is_recovering and life.state.next is not None)
    assert life.state.next is not None
    for worker in life.state.next.world.members:
        life.frozen.add(worker)
        life.say(worker, phase=Phase.MOVING, error=None)
    for _ in range(8):
        life.tick()
    assert len(life.of_kind("worker_lost")) == 1

"""Whole lives of runs, as pure decisions. The JSON round trip of the state is part of every tick (`imagined.Life`)."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.policy.lifecycle import decide, directive_of, explain, phase_of
from orchestrator.policy.state.progress import Progress, absorb
from orchestrator.policy.state.requests import resumed
from orchestrator.policy.state.run_state import Observation
from orchestrator.protocol.events.run import Resumed
from orchestrator.protocol.events.workers import WorkersSpawned
from orchestrator.protocol.messages import Fence, FinishMode, Restore, ResumeRequest
from orchestrator.protocol.status import RunPhase
from orchestrator.protocol.worker_phase import Phase
from orchestrator.protocol.worker_report import Handover, Report, WorkerError
from orchestrator.spec.workers import ScheduledScale
from tests.unit.policy.imagined import Life, limits_of


def test_a_run_starts_trains_and_succeeds() -> None:
    life = Life(limits_of())
    life.run_to_the_end()
    assert life.state.outcome is RunPhase.SUCCEEDED
    assert life.sizes == [2] * 12
    assert life.committed == 11
    assert life.state.worker_group == ()
    assert [note.kind for note in life.notes][-1] == "ended"


def test_the_first_generation_comes_from_the_seed_and_needs_no_fence() -> None:
    life = Life(limits_of())
    life.run_until(lambda: life.state.next is not None)
    plan = life.state.next
    assert plan is not None and plan.source is None and plan.generation == 0
    life.run_until(lambda: life.state.current is not None)
    assert life.state.activated == 0 and life.state.fence is None
    assert life.state.rescales == ()


def test_activation_waits_for_the_last_member() -> None:
    life = Life(limits_of())
    life.run_until(lambda: life.state.next is not None)
    life.frozen = {"w1"}
    for _ in range(5):
        life.tick()
    assert life.reports["w0"].phase is Phase.READY
    assert life.state.activated == -1


def test_an_activation_has_the_times_of_the_slowest_member() -> None:
    life = Life(limits_of())
    life.run_until(lambda: life.state.next is not None)
    life.frozen = {"w1"}
    for _ in range(5):
        life.tick()
    handover = Handover(0, -1, 0.1, 0.2, 0.3, 0.4, 0, 0, None)
    life.say("w1", phase=Phase.READY, generation=0, handovers=(handover,))
    life.tick()
    (note,) = [note for note in life.notes if note.kind == "activated"]
    parts = {part: getattr(note, part) for part in ("connect_s", "build_s", "transfer_s", "digest_s")}
    assert parts == {"connect_s": 0.1, "build_s": 0.2, "transfer_s": 0.3, "digest_s": 0.4}


def test_a_request_grows_the_world_without_a_lost_step() -> None:
    life = Life(limits_of(steps=30))
    life.run_until(lambda: life.step == 3)
    life.scale(4)
    life.run_to_the_end()
    assert life.state.outcome is RunPhase.SUCCEEDED
    assert life.sizes == sorted(life.sizes) and set(life.sizes) == {2, 4}
    (rescale,) = life.state.rescales
    assert (rescale.from_size, rescale.to_size, rescale.state_identical) == (2, 4, True)
    assert rescale.step + 1 == life.sizes.index(4)
    assert rescale.moved_bytes == 4 * 20


def test_training_continues_while_newcomers_get_warm() -> None:
    life = Life(limits_of(steps=30))
    life.run_until(lambda: life.step == 3)
    life.scale(3)
    life.tick()
    spawned_at = life.step
    life.run_until(lambda: life.state.fence is not None)
    assert life.step >= spawned_at + 3


def test_survivors_keep_their_order_and_newcomers_are_appended() -> None:
    life = Life(limits_of(steps=40, standby=1))
    life.run_until(lambda: life.step == 2)
    life.scale(4)
    life.run_until(lambda: 4 in life.sizes)
    assert life.done_by[-1] == ("w0", "w1", "w2", "w3")
    life.scale(1)
    life.run_until(lambda: 1 in life.sizes)
    assert life.done_by[-1] == ("w0",)


def test_leavers_become_standbys_and_the_surplus_is_released() -> None:
    life = Life(limits_of(steps=60, standby=1))
    life.run_until(lambda: life.step == 2)
    life.scale(4)
    life.run_until(lambda: 4 in life.sizes)
    life.scale(1)
    life.run_until(lambda: 1 in life.sizes)
    life.run_until(lambda: len(life.state.worker_group) == 2)
    assert all(life.reports[w].phase is Phase.STANDBY for w in life.state.worker_group[1:])


def test_scheduled_sizes_come_exactly_at_their_steps() -> None:
    schedule = (ScheduledScale(at_step=20, workers=3), ScheduledScale(at_step=35, workers=1))
    life = Life(limits_of(steps=50, schedule=schedule))
    life.run_to_the_end()
    assert life.sizes == [2] * 20 + [3] * 15 + [1] * 15
    assert [r.why for r in life.state.rescales] == ["scheduled for step 20", "scheduled for step 35"]


def test_workers_of_the_schedule_are_warm_from_the_start() -> None:
    life = Life(limits_of(steps=50, schedule=(ScheduledScale(at_step=20, workers=4),)))
    life.tick()
    assert len(life.state.worker_group) == 4


def test_a_scheduled_fence_ends_with_the_step_before() -> None:
    life = Life(limits_of(steps=50, schedule=(ScheduledScale(at_step=20, workers=3),)))
    life.run_until(lambda: life.state.fence is not None)
    assert life.state.fence == Fence(to_generation=1, at_step=19)


def test_a_scheduled_size_whose_workers_come_late_is_taken_at_the_next_fence() -> None:
    life = Life(limits_of(steps=50, schedule=(ScheduledScale(at_step=5, workers=3),)))
    life.frozen = {"w2"}
    life.run_until(lambda: life.step == 10)
    life.frozen = set()
    life.run_to_the_end()
    assert life.state.outcome is RunPhase.SUCCEEDED
    assert life.sizes[10] == 2 and life.sizes[-1] == 3


def test_a_request_holds_until_the_next_scheduled_size() -> None:
    life = Life(limits_of(steps=60, schedule=(ScheduledScale(at_step=40, workers=1),)))
    life.run_until(lambda: life.step == 3)
    life.scale(3)
    life.run_to_the_end()
    assert life.sizes[:40].count(3) > 25
    assert life.sizes[40:] == [1] * 20


def test_of_two_requests_in_a_transition_the_newest_counts_after_it() -> None:
    life = Life(limits_of(steps=60))
    life.run_until(lambda: life.step == 3)
    life.scale(3)
    life.run_until(lambda: life.state.fence is not None)
    life.scale(4)
    life.scale(1)
    life.run_to_the_end()
    assert [(r.from_size, r.to_size) for r in life.state.rescales] == [(2, 3), (3, 1)]


def test_a_newcomer_lost_before_the_fence_costs_nothing() -> None:
    life = Life(limits_of(steps=60))
    life.run_until(lambda: life.step == 3)
    life.scale(3)
    life.frozen = {"w1"}
    life.run_until(lambda: life.state.next is not None)
    life.kill("w2")
    life.tick()
    assert life.state.next is None and life.state.fence is None
    life.frozen = set()
    life.run_to_the_end()
    assert life.state.outcome is RunPhase.SUCCEEDED
    assert life.done_by[-1] == ("w0", "w1", "w3")
    assert len(life.of_kind("transition_abandoned")) == 1
    assert all(life.reports.get(w) is None or life.reports[w].phase is not Phase.STRANDED for w in ("w0", "w1"))


def test_a_newcomer_lost_behind_the_fence_brings_the_old_world_back() -> None:
    life = Life(limits_of(steps=60))
    life.run_until(lambda: life.step == 3)
    life.scale(3)
    life.run_until(lambda: life.reports["w0"].phase is Phase.MOVING)
    step = life.step
    life.kill("w2")
    life.run_until(lambda: life.state.next is not None and life.state.next.generation == 2)
    assert life.step == step
    life.run_to_the_end()
    assert life.state.outcome is RunPhase.SUCCEEDED
    assert life.done_by[step + 1] == ("w0", "w1")  # nothing lost, nothing done twice
    assert life.done_by[-1] == ("w0", "w1", "w3")
    (abandoned,) = life.of_kind("transition_abandoned")
    assert "w2 was lost" in abandoned.why


def test_the_mended_generation_takes_another_warm_standby() -> None:
    life = Life(limits_of(steps=60, standby=2))
    life.run_until(lambda: life.step == 8)
    life.run_until(lambda: life.seen().phase("w3") is Phase.STANDBY)
    life.scale(3)
    life.run_until(lambda: life.reports["w0"].phase is Phase.MOVING)
    newcomer = life.state.next.world.members[-1] if life.state.next else ""
    life.kill(newcomer)
    life.run_until(lambda: life.state.activated == 2)
    assert len(life.state.members) == 3 and newcomer not in life.state.members


def test_after_three_failed_moves_the_run_keeps_its_size() -> None:
    life = Life(limits_of(steps=90))
    life.run_until(lambda: life.step == 3)
    life.scale(3)
    for generation in (1, 3, 5):
        life.run_until(
            lambda g=generation: (
                life.state.next is not None
                and life.state.next.generation == g
                and life.reports["w0"].phase is Phase.MOVING
            )
        )
        assert life.state.next is not None
        life.kill(life.state.next.world.members[-1])
    life.run_to_the_end()
    assert life.state.outcome is RunPhase.SUCCEEDED
    assert set(life.sizes) == {2}
    assert [note.gave_up for note in life.of_kind("transition_abandoned")] == [False, False, True]


def test_a_newcomer_of_the_mended_generation_may_be_lost_too() -> None:
    life = Life(limits_of(steps=60, standby=2))
    life.run_until(lambda: life.step == 8)
    life.run_until(lambda: life.seen().phase("w3") is Phase.STANDBY)
    life.scale(3)
    for generation in (1, 2):
        life.run_until(lambda g=generation: life.state.next is not None and life.state.next.generation == g)
        life.run_until(lambda: life.reports["w0"].phase is not Phase.TRAINING)
        assert life.state.next is not None and life.state.next.world.size == 3
        life.kill(life.state.next.world.members[-1])
    life.run_to_the_end()
    assert life.state.outcome is RunPhase.SUCCEEDED and len(life.done_by) == 60


def test_a_world_that_can_not_be_rebuilt_fails_the_run() -> None:
    life = Life(limits_of(steps=60))
    life.run_until(lambda: life.step == 3)
    life.scale(3)
    life.run_until(lambda: life.reports["w0"].phase is Phase.MOVING)
    life.frozen = {"w0", "w1", "w2"}
    for generation in range(1, 7):
        life.run_until(lambda g=generation: life.state.next and life.state.next.generation == g, max_ticks=3)
        for worker in ("w0", "w1"):
            holdings = life.held_by(worker)
            life.say(worker, phase=Phase.STRANDED, failed_generation=generation, holdings=holdings)
    life.run_until(lambda: life.state.outcome is RunPhase.FAILED, max_ticks=5)
    assert "6 transitions in a row failed; w0, w1 could not reach" in life.state.why


def test_a_first_world_that_never_forms_fails_the_run() -> None:
    """As where workers can't reach each other: there is no size to go back to."""
    life = Life(limits_of(steps=60))
    life.frozen = {"w0", "w1"}
    life.tick()
    for worker in ("w0", "w1"):
        life.say(worker, phase=Phase.STANDBY)
    for generation in range(6):
        life.run_until(lambda g=generation: life.state.next and life.state.next.generation == g, max_ticks=3)
        life.say("w0", failed_generation=generation)
    life.run_until(lambda: life.state.outcome is not None, max_ticks=5)
    assert life.state.outcome is RunPhase.FAILED
    assert "6 transitions in a row failed; w0 could not reach generation 5" in life.state.why


def test_a_worker_that_fails_while_the_first_world_is_made_ends_the_run() -> None:
    """As one that reads a checkpoint of another model: another would fail in the same way."""
    life = Life(limits_of())
    life.run_until(lambda: life.state.next is not None)
    life.frozen = {"w0", "w1"}
    life.say("w1", phase=Phase.FAILED, error=WorkerError("internal", "of another model", "Traceback: line 4"))
    life.run_until(lambda: life.state.outcome is not None, max_ticks=5)
    assert life.state.outcome is RunPhase.FAILED and "of another model" in life.state.why
    assert life.state.traceback == "Traceback: line 4"


def test_a_lost_standby_is_replaced() -> None:
    life = Life(limits_of(steps=30, standby=1))
    life.run_until(lambda: life.step == 4)
    life.kill("w2")
    life.run_to_the_end()
    assert life.state.outcome is RunPhase.SUCCEEDED
    assert life.of_kind("workers_spawned")[-1] == WorkersSpawned(("w3",))


def test_workers_that_never_get_warm_end_the_run() -> None:
    life = Life(limits_of())
    for number in range(3):
        life.run_until(lambda n=number: f"w{n}" in life.reports)
        life.frozen.add(f"w{number}")
        life.say(f"w{number}", phase=Phase.FAILED, error=WorkerError("internal", "no such device", "Traceback: line 1"))
    life.run_until(lambda: life.state.outcome is not None, max_ticks=5)
    assert life.state.outcome is RunPhase.FAILED and "no such device" in life.state.why
    assert life.state.traceback == "Traceback: line 1"


def test_a_mistake_in_the_users_code_ends_a_run_that_has_not_begun_at_once() -> None:
    life = Life(limits_of())
    life.run_until(lambda: "w0" in life.reports)
    life.frozen.add("w0")
    error = WorkerError("user_error", "no such module", "Traceback: line 1")
    life.say("w0", phase=Phase.FAILED, error=error)
    life.run_until(lambda: life.state.outcome is not None, max_ticks=2)
    assert life.state.outcome is RunPhase.FAILED and life.state.why == "w0 failed: user_error: no such module"
    assert life.state.traceback == "Traceback: line 1"


def test_an_error_of_the_users_code_in_a_standby_ends_nothing() -> None:
    life = Life(limits_of(standby=1))
    life.run_until(lambda: life.step == 3 and "w2" in life.reports)
    life.frozen.add("w2")
    life.say("w2", phase=Phase.FAILED, error=WorkerError("user_error", "the file is gone"))
    life.run_until(lambda: life.step == 6)
    assert life.state.outcome is None


def test_a_fault_outside_the_workers_ends_the_run() -> None:
    life = Life(limits_of())
    life.run_until(lambda: life.step == 4)
    over = decide(life.limits, life.state, life.seen(faults=("the rendezvous store is gone",)))
    assert over.state.outcome is RunPhase.FAILED and over.state.why == "the rendezvous store is gone"


def test_stop_ends_with_a_checkpoint() -> None:
    life = Life(limits_of(steps=30))
    life.run_until(lambda: life.step == 4)
    life.stop_run()
    life.run_to_the_end()
    assert life.state.outcome is RunPhase.STOPPED
    assert life.committed == life.step < 29


def test_stop_now_ends_without_a_checkpoint_also_when_it_is_ending_already() -> None:
    life = Life(limits_of(steps=30))
    life.run_until(lambda: life.step == 4)
    life.stop_run()
    life.tick()
    assert life.state.outcome is None and life.state.finish is FinishMode.STOP
    life.stop_run(FinishMode.STOP_NOW)
    life.tick()
    assert life.state.outcome is RunPhase.STOPPED and life.state.worker_group == ()
    assert "without a checkpoint: there is none" in life.state.why


def test_stop_before_the_first_step_ends_at_once() -> None:
    life = Life(limits_of())
    life.run_until(lambda: life.state.next is not None)
    life.stop_run()
    life.tick()
    assert life.state.outcome is RunPhase.STOPPED


@pytest.mark.parametrize("behind_fence", [False, True], ids=["before the fence", "behind the fence"])
def test_stop_in_a_move(behind_fence: bool) -> None:
    life = Life(limits_of(steps=60))
    life.run_until(lambda: life.step == 3)
    life.scale(3)
    life.run_until(lambda: (life.state.fence if behind_fence else life.state.next) is not None)
    life.stop_run()
    life.tick()
    assert life.state.finish is (FinishMode.NO if behind_fence else FinishMode.STOP)
    life.run_to_the_end()
    assert life.state.outcome is RunPhase.STOPPED
    assert set(life.sizes) == ({2, 3} if behind_fence else {2})


def test_periodic_checkpoints_are_marked_when_every_rank_has_written() -> None:
    life = Life(limits_of(), checkpoint_every=4)
    life.run_until(lambda: life.step == 3)
    shards, life.reports = life.reports, dict(life.reports)
    life.say("w1", shards=())
    life.frozen = {"w0", "w1"}
    assert not [a for a in decide(life.limits, life.state, life.seen()).actions if hasattr(a, "shards")]
    life.reports = shards
    assert not [a for a in decide(life.limits, life.state, life.seen()).actions if hasattr(a, "shards")]
    life.progress = absorb(life.progress, list(life.pending.values()))  # its steps are on record first
    (commit,) = [a for a in decide(life.limits, life.state, life.seen()).actions if hasattr(a, "shards")]
    assert [shard.rank for shard in commit.shards] == [0, 1]


def test_a_leaver_is_kept_until_its_shard_is_marked() -> None:
    life = Life(limits_of(steps=60), checkpoint_every=5)
    life.run_until(lambda: life.step == 3)
    life.scale(1)
    life.run_until(lambda: 1 in life.sizes)
    life.say("w1", shards=(*life.reports["w1"].shards, *life.reports["w0"].shards[:0]))
    life.run_until(lambda: life.state.worker_group == ("w0",))
    assert life.committed >= max((r.step for r in life.state.rescales), default=0) // 5 * 5 - 1


def test_the_end_waits_for_the_last_record() -> None:
    life = Life(limits_of())
    life.run_until(lambda: life.step == 11 and life.committed == 11)
    held_back = life.progress.__class__(watermark=10, recent=life.progress.recent[:-1])
    assert decide(life.limits, life.state, life.seen(progress=held_back)).state.outcome is None
    life.run_to_the_end()


def test_a_decision_on_nothing_new_changes_nothing() -> None:
    life = Life(limits_of(steps=40))
    life.run_until(lambda: life.step == 6)
    first = decide(life.limits, life.state, life.seen())
    assert decide(life.limits, first.state, life.seen()) == first


def test_seq_grows_exactly_when_the_directive_changes() -> None:
    life = Life(limits_of(steps=60))
    seqs: dict[int, object] = {}
    life.run_until(lambda: life.step == 3)
    life.scale(3)
    while life.state.outcome is None:
        life.tick()
        told = directive_of(life.state, 1)
        assert seqs.setdefault(told.seq, told) == told
    assert len(set(map(repr, seqs.values()))) == len(seqs)


def test_phase_and_explanation() -> None:
    life = Life(limits_of(steps=60))
    life.tick()
    assert phase_of(life.state, life.seen()) is RunPhase.STARTING
    assert "waits for 2 of 2 workers" in explain(life.limits, life.state, life.seen())
    life.run_until(lambda: life.step == 3)
    assert phase_of(life.state, life.seen()) is RunPhase.TRAINING
    life.scale(3)
    life.run_until(lambda: life.reports["w0"].phase is Phase.MOVING)
    assert phase_of(life.state, life.seen()) is RunPhase.RESCALING
    life.run_to_the_end()
    assert phase_of(life.state, life.seen()) is RunPhase.SUCCEEDED


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(0, 25), st.integers(1, 4)), max_size=5),
    deaths=st.lists(st.tuples(st.integers(0, 40), st.booleans()), max_size=4),
    standby=st.integers(0, 2),
)
def test_no_step_is_lost_or_done_twice_whatever_happens(
    requests: list[tuple[int, int]], deaths: list[tuple[int, bool]], standby: int
) -> None:
    """Requests at any time, and deaths of workers that hold no shard: the run ends with every step done once."""
    life = Life(limits_of(steps=40, standby=standby), checkpoint_every=7)
    for tick in range(300):
        if life.state.outcome is not None:
            break
        for at_tick, workers in requests:
            if at_tick == tick:
                life.scale(workers)
        for at_tick, prefer_newcomer in deaths:
            others = [w for w in life.state.worker_group if w not in life.state.members and w not in life.lost]
            newcomers = [w for w in others if life.state.next is not None and w in life.state.next.world]
            if at_tick == tick and life.state.current is not None and (newcomers if prefer_newcomer else others):
                life.kill((newcomers if prefer_newcomer else others)[0])
        life.tick()
    assert life.state.outcome is RunPhase.SUCCEEDED
    assert len(life.done_by) == 40
    generations = [record.generation for record in life.progress.recent]
    assert generations == sorted(generations)


def test_no_worker_is_started_while_a_move_is_under_way_nor_right_after_it() -> None:
    life = Life(limits_of(steps=60, standby=1))
    life.run_until(lambda: life.step == 8)
    life.scale(3)
    life.run_until(lambda: life.state.activated == 1)
    assert life.state.num_spawned == 3
    life.run_until(lambda: life.state.num_spawned == 4)
    assert life.step > life.state.rescales[-1].step + 5


def test_a_resumed_run_begins_from_its_checkpoint_with_new_workers_and_numbers() -> None:
    limits = limits_of(steps=30)
    life = Life(limits)
    life.run_until(lambda: life.step == 3)
    life.scale(1)
    life.run_until(lambda: bool(life.state.rescales))
    before = life.state
    done = before.rescales[0].step + 1  # so shortly before the checkpoint that a run in training would start nobody
    order = ResumeRequest("token", Restore(done, "/checkpoint"), workers=3)
    decision = resumed(limits, before, order)
    state = decision.state
    assert [(n.kind, n.step) for n in decision.actions if isinstance(n, Resumed)] == [("resumed", done)]
    assert decision.actions[0].residuals is None  # type: ignore[union-attr]
    without = resumed(limits, before, replace(order, restore=Restore(done, "/checkpoint", reset_residuals=True)))
    assert without.actions[0].residuals == "left behind"  # type: ignore[union-attr]
    assert (state.worker_group, state.current, state.outcome) == ((), None, None)
    assert state.seq > before.seq and state.target.seq > before.target.seq and state.checkpoint_done == done
    seen = Observation(1, 0.0, state.target, Progress(watermark=done), store_address=life.store)
    state = decide(limits, state, seen).state
    assert state.worker_group == ("w2", "w3", "w4")  # no name is used twice
    assert state.rescales == before.rescales
    warm = {w: Report(w, 1, 0, Phase.STANDBY, -1, -1, 0) for w in state.worker_group}
    plan = decide(limits, state, replace(seen, reports=warm)).state.next
    assert plan is not None and plan.generation == before.num_generations
    assert plan.source is None and plan.restore == order.restore and plan.world.size == 3


def test_a_requested_checkpoint_is_in_the_directive_until_one_of_its_step_is_complete() -> None:
    life = Life(limits_of(steps=60), checkpoint_every=10)
    life.run_until(lambda: life.step == 12)
    assert life.committed == 9 and life.directive.checkpoint_from == -1
    life.target = replace(life.target, seq=life.target.seq + 1, checkpoint=12)
    life.run_until(lambda: life.directive.checkpoint_from == 12)
    assert life.step < 19
    life.run_until(lambda: life.committed >= 12)
    life.run_until(lambda: life.directive.checkpoint_from == -1)
    assert life.state.target.checkpoint == 12 and life.state.checkpoint_done == 19


def test_a_requested_checkpoint_changes_no_size() -> None:
    """The target repeats the size that was requested last, which a schedule has replaced."""
    life = Life(limits_of(steps=60, schedule=(ScheduledScale(at_step=10, workers=4),)), checkpoint_every=100)
    life.run_until(lambda: life.step > 14)
    before = life.state.size_request
    life.target = replace(life.target, seq=life.target.seq + 1, checkpoint=life.step)
    life.run_to_the_end()
    assert life.sizes[-1] == 4 and life.state.size_request == before
    assert life.state.checkpoint_done == 59

"""A run that waits for its place, gets one, holds fewer workers than it wants, gives all away and goes on."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.policy.cluster.autoscaling import scale_of
from orchestrator.policy.lifecycle import explain, phase_of
from orchestrator.policy.state.requests import queued, resumed
from orchestrator.policy.state.run_parts import FailureState, WorkerFailure
from orchestrator.protocol.events.run import Suspended
from orchestrator.protocol.events.workers import WorkersReleased
from orchestrator.protocol.messages import DesiredRunState, FinishMode, ResumeRequest
from orchestrator.protocol.scaling import UNLIMITED, Grant
from orchestrator.protocol.status import RunPhase
from orchestrator.protocol.worker_phase import Phase
from orchestrator.protocol.worker_report import WorkerError
from orchestrator.sampling.micro_batches import MicroBatchSize
from orchestrator.spec.workers import ScheduledScale
from tests.unit.policy.imagined import Life, limits_of

ROOM = Grant(None, "there is room for all 4")
HELD = Grant(1, "there is room for 1; high of priority 5 comes first")
OUT = Grant(0, "high of priority 5 needs its places")


def _life(**changes: object) -> Life:
    return Life(limits_of(**({"steps": 60, "initial_workers": 4} | changes)), checkpoint_every=10)


def _queued(**changes: object) -> Life:
    life = _life(**changes)
    life.state = queued(life.state, life.now_s)
    life.grant = life.state.queue.grant
    return life


def test_a_queued_run_holds_no_worker_until_it_is_admitted() -> None:
    life = _queued()
    life.grant = Grant(0, "there is no room for 1 worker")
    for _ in range(10):
        life.tick()
    assert life.state.worker_group == () and phase_of(life.state, life.seen()) is RunPhase.QUEUED
    assert explain(life.limits, life.state, life.seen()) == "queued: there is no room for 1 worker"
    life.grant = Grant(2, "there is room for 2")
    life.run_until(lambda: life.step == 3)
    assert life.sizes == [2] * 4
    told = explain(life.limits, life.state, life.seen())
    assert told == "as many workers train as are granted, 2 of 4: there is room for 2"
    (let_in,) = life.of_kind("admitted")
    assert let_in.waited_s == 10.0 and let_in.workers == 2 and let_in.wanted == 4
    assert [note.why for note in life.of_kind("queued")] == ["there is no room for 1 worker"]
    life.grant = ROOM
    life.run_to_the_end()
    assert life.state.outcome is RunPhase.SUCCEEDED and len(life.sizes) == 60 and life.sizes[-1] == 4
    assert life.state.rescales[-1].why == ROOM.why


def test_a_run_that_is_shrunk_grows_back_to_what_is_wanted() -> None:
    life = _life()
    life.run_until(lambda: life.step == 5)
    life.grant = HELD
    life.run_until(lambda: life.sizes[-1] == 1)
    life.run_until(lambda: len(life.state.worker_group) == 1)
    assert life.state.rescales[-1].why == HELD.why and life.replayed == 0
    life.scale(3)  # a request that comes meanwhile is heard, and waits
    life.run_until(lambda: life.state.size_request is not None and life.state.size_request.workers == 3)
    for _ in range(5):
        life.tick()
    assert life.sizes[-1] == 1
    life.grant = ROOM
    life.run_until(lambda: life.sizes[-1] == 3)
    assert [note.workers for note in life.of_kind("granted")] == [1, None]
    life.scale(2)
    life.run_until(lambda: life.sizes[-1] == 2)
    assert life.state.rescales[-1].why == "asked for"  # the grant has nothing to do with it
    life.run_to_the_end()
    assert life.replayed == 0 and len(life.sizes) == 60


def test_standbys_go_before_members() -> None:
    life = _life(initial_workers=2, standby=1)
    life.run_until(lambda: life.step == 5 and len(life.state.worker_group) == 3)
    life.grant = Grant(2, HELD.why)
    life.run_until(lambda: len(life.state.worker_group) == 2)
    assert life.sizes[-1] == 2 and life.state.rescales == ()


def test_the_schedule_continues_below_the_grant() -> None:
    life = _life(
        initial_workers=1, schedule=(ScheduledScale(at_step=10, workers=4), ScheduledScale(at_step=20, workers=2))
    )
    life.grant = Grant(3, "there is room for 3")
    life.run_to_the_end()
    assert life.sizes[9:11] == [1, 3] and life.sizes[19:21] == [3, 2] and life.sizes[-1] == 2


def test_a_preempted_run_loses_no_step_and_resumes_from_its_checkpoint() -> None:
    life = _life()
    life.run_until(lambda: life.step == 17)
    life.grant = OUT
    life.tick()
    assert phase_of(life.state, life.seen()) is RunPhase.RESCALING
    assert explain(life.limits, life.state, life.seen()).startswith("preempted: checkpoints at the next fence")
    life.run_until(lambda: life.state.current is None)
    assert life.state.worker_group == () and life.committed == life.step
    life.tick()
    assert phase_of(life.state, life.seen()) is RunPhase.QUEUED and life.reports == {}
    (gone,) = life.of_kind("suspended")
    assert gone == Suspended(life.step, f"step-{life.step}")
    for _ in range(7):
        life.tick()
    life.grant = ROOM
    life.run_to_the_end()
    assert life.state.outcome is RunPhase.SUCCEEDED and len(life.sizes) == 60 and life.replayed == 0
    assert [n.kind for n in life.notes if n.kind in ("preempted", "suspended", "admitted")] == [
        "preempted",
        "suspended",
        "admitted",
    ]
    assert life.of_kind("admitted")[0].waited_s >= 7


def test_a_run_that_only_starts_gives_its_places_back_at_once() -> None:
    life = _life()
    life.run_until(lambda: life.state.next is not None)
    life.grant = OUT
    life.tick()
    assert life.state.worker_group == () and life.state.next is None
    assert life.of_kind("workers_released")[0] == WorkersReleased(("w0", "w1", "w2", "w3"))
    life.grant = ROOM
    life.run_to_the_end()
    assert life.state.outcome is RunPhase.SUCCEEDED and len(life.sizes) == 60


def test_a_grant_that_comes_back_while_the_run_stops() -> None:
    life = _life()
    life.run_until(lambda: life.step == 17)
    life.grant = OUT
    life.run_until(lambda: life.state.finish is FinishMode.PAUSE)
    life.grant = ROOM
    life.run_to_the_end()
    assert life.state.outcome is RunPhase.SUCCEEDED and len(life.sizes) == 60 and life.replayed == 0


@pytest.mark.parametrize(
    ("finish", "outcome"), [(FinishMode.STOP, RunPhase.STOPPED), (FinishMode.PAUSE, RunPhase.PAUSED)]
)
@pytest.mark.parametrize("is_out", [False, True])
def test_a_preempted_run_may_be_ended(finish: FinishMode, outcome: RunPhase, is_out: bool) -> None:
    """While it stops, and in the queue."""
    life = _life()
    life.run_until(lambda: life.step == 17)
    life.grant = OUT
    life.run_until(lambda: life.state.current is None if is_out else life.state.finish is FinishMode.PAUSE)
    life.target = DesiredRunState(seq=life.target.seq + 1, workers=4, finish=finish, reason="enough")
    life.run_to_the_end()
    assert life.state.outcome is outcome and life.committed == life.step


@pytest.mark.parametrize("least", [1, 4])
def test_a_member_that_dies_while_the_run_stops_costs_no_step(least: int) -> None:
    """The others write the checkpoint, even if they are fewer than it may have: no other worker has a place."""
    life = _life(min_workers=least)
    life.run_until(lambda: life.step == 17)
    life.grant = OUT
    life.run_until(lambda: life.state.finish is FinishMode.PAUSE)
    life.kill(life.state.members[-1])
    life.run_until(lambda: life.state.current is None)
    assert life.committed >= 16 and life.state.worker_group == () and life.state.num_spawned == 4
    life.grant = ROOM
    life.run_to_the_end()
    assert life.state.outcome is RunPhase.SUCCEEDED and len(life.sizes) == 60


@pytest.mark.parametrize("comes_back", [False, True])
@pytest.mark.parametrize("changes", [{"initial_workers": 1}, {"initial_workers": 3, "protected": False}])
def test_a_run_that_loses_its_state_while_it_stops_returns_to_its_checkpoint(
    changes: dict[str, object], comes_back: bool
) -> None:
    life = _life(**changes)
    life.run_until(lambda: life.step == 17)
    life.grant = OUT
    life.run_until(lambda: life.state.finish is FinishMode.PAUSE)
    if comes_back:
        life.grant = ROOM
    life.kill(life.state.members[-1])
    life.run_until(lambda: life.state.current is None)
    if not comes_back:
        life.tick()
        assert life.state.worker_group == () and phase_of(life.state, life.seen()) is RunPhase.QUEUED
    life.grant = ROOM
    life.run_to_the_end()
    assert life.state.outcome is RunPhase.SUCCEEDED


def test_a_run_that_recovers_gives_way_once_it_has() -> None:
    life = _life()
    life.run_until(lambda: life.step == 17)
    life.kill(life.state.members[-1])
    life.run_until(lambda: life.state.is_recovering and life.state.next is not None)
    life.grant = OUT
    life.run_until(lambda: life.state.current is None)
    assert life.state.worker_group == () and len(life.of_kind("worker_lost")) == 1
    assert len(life.of_kind("generation_planned")) == 2  # the one that recovers was not thrown away
    life.grant = ROOM
    life.run_to_the_end()
    assert life.state.outcome is RunPhase.SUCCEEDED


def test_the_words_for_a_run_that_stops() -> None:
    life = _life()
    life.run_until(lambda: life.step == 17)
    life.grant = OUT
    life.run_until(lambda: life.state.finish is FinishMode.PAUSE)
    life.grant = ROOM
    life.tick()
    told = explain(life.limits, life.state, life.seen())
    assert life.state.current is not None and "resumes later" in told  # it finishes what it has begun
    life.stop_run()
    life.tick()
    assert phase_of(life.state, life.seen()) is RunPhase.FINISHING
    assert explain(life.limits, life.state, life.seen()) == "ends at the next fence with a checkpoint"


def test_a_run_preempted_before_its_first_world_has_waited_all_the_time() -> None:
    life = _queued()
    for _ in range(10):
        life.tick()
    life.grant = ROOM
    life.tick()
    life.grant = Grant(0, "there is no room for 1 worker")
    life.tick()
    assert life.state.queue.since_s == 0.0 and life.of_kind("preempted") == []
    life.grant = ROOM
    life.run_until(lambda: life.step == 3)
    assert life.state.queue.since_s is None and life.state.queue.begun_s is not None


def test_limits_learned_from_failures_are_kept() -> None:
    """A smaller micro-batch, and the quarantined nodes."""
    life = _life(initial_workers=3, micro_batch=MicroBatchSize(rows=4))
    life.nodes = {f"w{number}": "good" for number in range(9)}
    life.run_until(lambda: life.step == 12)
    for member in life.state.members:
        life.stop(member)
    life.say(life.state.members[0], error=WorkerError("out_of_memory", "no"))
    life.run_until(lambda: life.state.current is not None and life.state.current.micro_batch.rows == 2)
    failures = tuple(
        WorkerFailure(f"x{number}", "bad", "worker", 3, life.now_s - 100.0 * number) for number in range(5)
    )
    life.state = replace(life.state, failures=FailureState(failures))
    life.run_until(lambda: life.state.failures.quarantine == ("bad",))
    life.run_until(lambda: life.step == 20)
    life.grant = OUT
    life.run_until(lambda: life.state.current is None)
    life.tick()
    life.grant = ROOM
    life.tick()
    assert life.state.worker_group and life.state.failures.quarantine == ("bad",)
    life.run_until(lambda: life.state.current is not None)
    assert life.state.current is not None and life.state.current.micro_batch.rows == 2


def test_lost_workers_are_replaced_only_within_the_grant() -> None:
    life = _life(initial_workers=3)
    life.run_until(lambda: life.step == 5)
    life.grant = Grant(2, HELD.why)
    life.run_until(lambda: life.sizes[-1] == 2)
    life.kill(life.state.members[-1])
    life.run_until(lambda: len(life.state.recoveries) == 1)
    life.run_until(lambda: life.sizes[-1] == 2)
    assert max(life.sizes[7:]) <= 3 and life.sizes[-1] == 2


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_preempted_run_holds_no_workers_after_any_loss(data: st.DataObject) -> None:
    """Grants come and go and workers die, with and without snapshots: without a grant a run gives all back in the
    end, and with one it goes on."""
    least = data.draw(st.integers(1, 3))
    size, protected = data.draw(st.integers(3, 4)), data.draw(st.booleans())
    life = _queued(steps=50, min_workers=least, protected=protected, initial_workers=size)
    for _ in range(data.draw(st.integers(3, 12))):
        life.grant = Grant(data.draw(st.sampled_from([0, 0, least, 3, None])), "so it was decided")
        for _ in range(data.draw(st.integers(1, 10))):
            if life.state.outcome is None:
                life.tick()
                if life.state.worker_group and data.draw(st.integers(0, 15)) == 0:
                    life.kill(data.draw(st.sampled_from(list(life.state.worker_group))))
    life.grant = OUT
    for _ in range(80):
        if life.state.outcome is None:
            life.tick()
    if life.state.outcome is not None:
        return  # too many were killed in a row, or it was done
    assert life.state.worker_group == () and phase_of(life.state, life.seen()) is RunPhase.QUEUED
    life.grant = UNLIMITED
    life.run_until(lambda: life.state.outcome is not None, max_ticks=400)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_step_is_lost_or_done_twice_whatever_is_granted(data: st.DataObject) -> None:
    life = _queued(steps=40)
    for _ in range(data.draw(st.integers(5, 30))):
        life.grant = Grant(data.draw(st.sampled_from([0, 1, 2, 3, None])), "so it was decided")
        if data.draw(st.integers(0, 5)) == 0:
            life.scale(data.draw(st.integers(1, 4)))
        for _ in range(data.draw(st.integers(1, 12))):
            if life.state.outcome is None:
                life.tick()
                held = [w for w in life.state.worker_group if life.seen().phase(w) is not Phase.FAILED]
                assert life.state.queue.grant.workers != 0 or life.state.current is not None or held == []
    life.grant = UNLIMITED
    life.run_until(lambda: life.state.outcome is not None, max_ticks=400)
    assert life.state.outcome is RunPhase.SUCCEEDED
    assert len(life.sizes) == 40 and life.replayed == 0 and life.state.recoveries == ()


def test_a_restarted_controller_remembers_its_grant() -> None:
    life = _life()
    life.run_until(lambda: life.step == 5)
    life.grant = HELD
    life.tick()
    assert life.state.queue.grant == HELD  # through the journal's JSON, in `Life.tick`
    assert replace(life.state, queue=replace(life.state.queue, grant=UNLIMITED)) != life.state


def test_a_priority_is_recorded_once_and_kept_through_a_resume() -> None:
    life = _life(priority=1)
    life.run_until(lambda: life.step == 5)
    life.priority = 7
    life.tick()
    life.tick()
    assert [(event.priority, event.before) for event in life.of_kind("priority_changed")] == [(7, 1)]
    assert scale_of(life.limits, life.state, life.seen(), {}).priority == 7
    assert resumed(life.limits, life.state, ResumeRequest("token", None)).state.priority == 7

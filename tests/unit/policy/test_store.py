"""The rendezvous store is lost and comes back elsewhere: who waits, and what is planned anew."""

from orchestrator.policy.lifecycle import explain
from orchestrator.protocol.messages import StoreAddress
from orchestrator.protocol.status import RunPhase
from orchestrator.protocol.worker_phase import Phase
from tests.unit.policy.imagined import Life, limits_of

ELSEWHERE = StoreAddress("10.0.0.1", 2)


def _ends_well(life: Life) -> None:
    life.run_to_the_end()
    assert life.state.outcome is RunPhase.SUCCEEDED, life.state.why
    assert len(life.done_by) == life.limits.steps == life.progress.watermark + 1


def test_training_continues_without_a_store_and_a_rescale_waits_for_one() -> None:
    life = Life(limits_of(steps=40))
    life.run_until(lambda: life.step == 3)
    life.store = None
    life.scale(3)
    life.run_until(lambda: life.step == 12)
    assert life.reports["w2"].phase is Phase.STANDBY and life.state.next is None
    life.store = ELSEWHERE
    life.run_until(lambda: life.state.next is not None)
    assert life.state.next is not None and life.state.next.store_address == ELSEWHERE
    _ends_well(life)
    assert life.sizes[-1] == 3 and life.replayed == 0


def test_a_transition_planned_with_a_lost_store_is_planned_again() -> None:
    life = Life(limits_of(steps=40))
    life.run_until(lambda: life.step == 3)
    life.scale(3)
    life.run_until(lambda: "w2" in life.reports and life.reports["w2"].phase is Phase.STANDBY)
    life.frozen.add("w2")  # it has yet to connect
    life.run_until(lambda: life.state.next is not None)
    life.store = None
    step = life.step
    life.run_until(lambda: life.step == step + 3)
    assert life.state.next is not None  # nothing could come in its place
    life.frozen.clear()
    life.store = ELSEWHERE
    life.run_until(lambda: life.state.activated > 0)
    assert life.state.current is not None and life.state.current.store_address == ELSEWHERE
    (abandoned,) = life.of_kind("transition_abandoned")
    assert abandoned.why == "the rendezvous store of generation 1 was lost"
    _ends_well(life)
    assert life.sizes[-1] == 3 and life.replayed == 0


def test_a_move_that_has_met_needs_its_store_no_more() -> None:
    life = Life(limits_of(steps=40))
    life.run_until(lambda: life.step == 3)
    life.scale(1)
    life.run_until(lambda: life.state.next is not None)
    life.store = ELSEWHERE
    life.run_until(lambda: life.state.activated == 1)
    _ends_well(life)
    assert life.sizes[-1] == 1 and not life.of_kind("transition_abandoned")


def test_a_recovery_planned_with_a_lost_store_is_planned_again_at_once() -> None:
    life = Life(limits_of(steps=40, initial_workers=4))
    life.run_until(lambda: life.step == 5)
    life.kill("w2")
    life.frozen.add("w0")
    life.tick()
    assert life.state.next is not None
    life.store = ELSEWHERE
    life.frozen.clear()
    life.tick()
    life.run_until(lambda: life.state.activated > 0, max_ticks=5)
    assert life.state.current is not None and life.state.current.store_address == ELSEWHERE
    (recovery,) = life.state.recoveries
    assert recovery.lost == ("w2",) and recovery.source == "memory" and recovery.steps_lost == 0
    _ends_well(life)


def test_a_recovery_waits_for_a_store_and_the_status_shows_it() -> None:
    life = Life(limits_of(steps=40, initial_workers=3))
    life.run_until(lambda: life.step == 5)
    life.store = None
    life.kill("w1")
    for _ in range(5):
        life.tick()
    assert life.state.is_recovering and life.state.next is None
    assert "waits for the rendezvous store to come back" in explain(life.limits, life.state, life.seen())
    life.store = ELSEWHERE
    _ends_well(life)
    assert life.state.recoveries[0].steps_lost == 0


def test_the_first_generation_is_planned_again_too() -> None:
    life = Life(limits_of())
    life.run_until(lambda: len(life.reports) == 2 and all(r.phase is Phase.WARMING for r in life.reports.values()))
    life.tick()
    life.frozen.add("w1")
    life.run_until(lambda: life.state.next is not None)
    life.store = ELSEWHERE
    life.frozen.clear()
    _ends_well(life)
    assert [note.why for note in life.of_kind("transition_abandoned")] == [
        "the rendezvous store of generation 0 was lost"
    ]


def test_a_store_whose_loss_is_not_known_yet_costs_no_request() -> None:
    """Workers find out at once, and would do so any number of times before the controller hears of it."""
    life = Life(limits_of(steps=60))
    life.run_until(lambda: life.step == 3)
    life.scale(3)
    life.run_until(lambda: "w2" in life.reports and life.reports["w2"].phase is Phase.STANDBY)
    life.frozen.add("w2")  # it has yet to connect
    life.run_until(lambda: life.state.next is not None)
    begun_s = life.now_s
    while life.now_s < begun_s + 1.5:
        if life.state.next is not None:
            life.say("w0", failed_generation=life.state.next.generation)
        life.now_s -= 0.9  # ten decisions in a second
        life.tick()
    life.store = None
    life.tick()
    life.frozen.clear()
    life.store = ELSEWHERE
    _ends_well(life)
    assert life.sizes[-1] == 3
    assert not any(note.gave_up for note in life.of_kind("transition_abandoned"))

"""What failures cost a run besides the moment: budgets, delays, quarantine, smaller micro-batches, batches left out."""

import pytest

from orchestrator.policy.health.budget import (
    FREE_FAILURES,
    MAX_DELAY_S,
    WINDOW_S,
    count_failures,
    delay_s,
    exceeded_budget,
    held_back_s,
    quarantined,
)
from orchestrator.policy.lifecycle import explain
from orchestrator.policy.recovery.respond import largest_proper_divisor
from orchestrator.policy.state.run_parts import WorkerFailure
from orchestrator.protocol.status import RunPhase
from orchestrator.protocol.worker_phase import Phase
from orchestrator.protocol.worker_report import WorkerError
from orchestrator.sampling.micro_batches import MicroBatchSize
from orchestrator.spec.fault_tolerance import BudgetsSpec, RecoverySpec
from tests.unit.policy.imagined import Life, limits_of


def _losses(*times_s: float, cause: str = "worker", node: str = "a") -> tuple[WorkerFailure, ...]:
    return tuple(WorkerFailure(f"w{i}", node, cause, 5, time_s) for i, time_s in enumerate(times_s))


def test_workers_lost_at_the_same_moment_are_one_failure() -> None:
    assert count_failures(_losses(10.0, 10.0, 11.0), now_s=12.0) == {"worker": 2}
    assert count_failures(_losses(10.0, 10.0 + WINDOW_S), now_s=11.0 + WINDOW_S) == {"worker": 1}


def test_a_budget_is_spent_by_its_own_class_only() -> None:
    budgets = BudgetsSpec(worker=2, hang=0)
    assert exceeded_budget(_losses(1.0, 2.0), 3.0, budgets) == ""
    assert "3 failures of the kind worker within an hour; recovery.budgets.worker is 2" in exceeded_budget(
        _losses(1.0, 2.0, 3.0), 3.0, budgets
    )
    assert "recovery.budgets.hang is 0" in exceeded_budget(_losses(1.0, cause="hang"), 3.0, budgets)
    assert exceeded_budget(_losses(1.0, 2.0, 3.0), 3.5 + WINDOW_S, budgets) == ""


def test_an_unknown_class_is_an_error_of_ours() -> None:
    assert "recovery.budgets.internal is 0" in exceeded_budget(_losses(1.0, cause="odd"), 1.0, BudgetsSpec(internal=0))


def test_delays_double_and_have_an_end() -> None:
    delays = [delay_s(_losses(*(float(n) for n in range(count))), 50.0) for count in range(1, 14)]
    assert delays[:FREE_FAILURES] == [0.0] * FREE_FAILURES
    assert delays[FREE_FAILURES : FREE_FAILURES + 4] == [1.0, 2.0, 4.0, 8.0]
    assert delays[-1] == MAX_DELAY_S
    assert held_back_s(_losses(1.0, 2.0, 3.0, 4.0), 4.25) == 0.75
    assert held_back_s(_losses(1.0, 2.0, 3.0, 4.0), 5.0) == 0.0
    assert held_back_s((), 5.0) == 0.0


def test_a_node_that_keeps_failing_is_quarantined_unless_it_is_the_only_one() -> None:
    bad = _losses(1.0, 2.0, 2.0, 3.0)
    assert quarantined(bad, 4.0, 3, {"a", "b"}) == ("a",)
    assert quarantined(bad, 4.0, 3, {"a"}) == ()
    assert quarantined(bad, 4.0, 4, {"a", "b"}) == ()
    assert quarantined(bad, 4.0, None, {"a", "b"}) == ()
    assert quarantined(bad, 3.0 + WINDOW_S, 3, {"a", "b"}) == ()
    assert quarantined(_losses(1.0, 2.0, 3.0, cause="user_error"), 4.0, 3, {"a", "b"}) == ()
    assert quarantined((*bad, *_losses(1.0, 2.0, 3.0, node="b")), 4.0, 3, {"a", "b"}) == ()


@pytest.mark.parametrize(("number", "divisor"), [(8, 4), (6, 3), (9, 3), (7, 1), (2, 1), (1, 1)])
def test_micro_batches_shrink_so_that_they_still_fill_the_batch(number: int, divisor: int) -> None:
    assert largest_proper_divisor(number) == divisor


def _fails(life: Life, worker: str, kind: str) -> None:
    life.stop(worker)
    life.say(worker, error=WorkerError(kind, "it failed", "Traceback: line 7"))


def _goes_on(life: Life, generation: int, steps: int = 3) -> None:
    life.run_until(lambda: life.state.activated == generation)
    begun = life.step
    life.run_until(lambda: life.step >= begun + steps)


def test_a_run_that_keeps_failing_slowly_ends_with_the_budget_and_a_remedy() -> None:
    recovery = RecoverySpec(budgets=BudgetsSpec(internal=2))
    life = Life(limits_of(steps=400, initial_workers=3, recovery=recovery))
    for generation in range(3):
        _goes_on(life, generation)
        _fails(life, "w1", "internal")
    life.run_until(lambda: life.state.outcome is not None)
    assert life.state.outcome is RunPhase.FAILED
    assert "3 failures of the kind internal" in life.state.why and "w1 failed: internal: it failed" in life.state.why
    assert life.state.traceback == "Traceback: line 7"


def test_after_many_losses_in_a_row_replacements_are_held_back() -> None:
    life = Life(limits_of(steps=400, initial_workers=4))
    life.run_until(lambda: life.step == 5)
    for _ in range(FREE_FAILURES + 2):
        size = life.state.num_spawned
        life.kill(life.state.members[-1])
        lost_s = life.now_s
        life.run_until(lambda s=size: life.state.num_spawned > s)
        waited_s = life.now_s - lost_s
        life.run_until(lambda: len(life.state.members) == 4 and life.state.next is None)
    assert waited_s >= 2.0 and life.state.outcome is None


def test_a_failing_node_is_quarantined_and_later_released_with_one_event_each() -> None:
    life = Life(limits_of(steps=3000, initial_workers=2, recovery=RecoverySpec(quarantine_after=2)))
    life.nodes = {"w0": "good"} | {f"w{n}": "bad" for n in range(1, 9)}
    life.run_until(lambda: life.step == 3)
    for victim in ("w1", "w2"):
        life.run_until(lambda v=victim: v in life.state.members and life.state.next is None)
        life.kill(victim)
    life.run_until(lambda: bool(life.of_kind("node_quarantined")))
    assert life.state.failures.quarantine == ("bad",)
    life.now_s += WINDOW_S
    life.run_until(lambda: not life.state.failures.quarantine)
    assert [len(life.of_kind(kind)) for kind in ("node_quarantined", "node_released")] == [1, 1]


def test_out_of_memory_makes_micro_batches_smaller_once_per_generation() -> None:
    life = Life(limits_of(steps=400, initial_workers=3, micro_batch=MicroBatchSize(rows=6)))
    _goes_on(life, 0)
    _fails(life, "w0", "out_of_memory")
    _fails(life, "w2", "out_of_memory")
    _goes_on(life, 1)
    assert life.state.current is not None and life.state.current.micro_batch.rows == 3
    life.causes = {"w1": "out_of_memory"}  # killed by the system
    life.kill("w1")
    _goes_on(life, 2)
    assert life.state.current.micro_batch.rows == 1
    assert [n.to_rows for n in life.of_kind("micro_batch_reduced")] == [3, 1]
    life.scale(4)
    life.run_until(lambda: len(life.state.members) == 4)
    assert life.state.current.micro_batch.rows == 1


def test_out_of_memory_at_the_smallest_micro_batches_ends_with_the_budget() -> None:
    life = Life(limits_of(steps=400, recovery=RecoverySpec(budgets=BudgetsSpec(out_of_memory=1))))
    for generation in range(2):
        _goes_on(life, generation)
        _fails(life, "w1", "out_of_memory")
    life.run_until(lambda: life.state.outcome is not None)
    assert "Ask for more memory" in life.state.why


def test_a_poisoned_batch_is_left_out_from_the_next_generation_on() -> None:
    life = Life(limits_of(steps=40, initial_workers=3))
    life.run_until(lambda: life.step == 9)
    for worker in ("w0", "w1", "w2"):
        _fails(life, worker, "numeric")
    _goes_on(life, 1)
    assert life.state.current is not None and life.state.current.skips == (10,)
    (note,) = life.of_kind("batch_skipped")
    assert note.step == 10
    life.run_to_the_end()
    assert life.state.outcome is RunPhase.SUCCEEDED


def test_the_status_of_a_run_below_its_least_size_shows_the_delay_of_the_next_worker() -> None:
    life = Life(limits_of(steps=400, initial_workers=2, min_workers=2))
    life.run_until(lambda: life.step == 5)
    for _ in range(FREE_FAILURES + 2):
        life.run_until(lambda: life.state.outcome is None and life.reports["w0"].phase is Phase.TRAINING)
        life.kill(life.state.members[-1])
        life.run_until(lambda: life.state.is_recovering)
    assert "the next worker starts in" in explain(life.limits, life.state, life.seen())


@pytest.mark.parametrize("kind", ["out_of_memory", "numeric", "user_error"])
def test_an_error_reported_after_a_peers_is_still_counted(kind: str) -> None:
    life = Life(limits_of(steps=40, initial_workers=3, micro_batch=MicroBatchSize(rows=4)))
    life.run_until(lambda: life.step == 9)
    life.stop("w1")
    life.tick()
    assert life.state.is_recovering and not life.state.failures.recent
    _fails(life, "w0", kind)
    _goes_on(life, 1)
    assert life.state.recoveries[0].cause == kind and "w0 failed" in life.state.recoveries[0].why
    assert [(failure.worker, failure.cause) for failure in life.state.failures.recent] == [("w0", kind)]
    assert len(life.of_kind("micro_batch_reduced")) == (kind == "out_of_memory")
    assert len(life.of_kind("batch_skipped")) == (kind == "numeric")

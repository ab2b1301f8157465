"""Workers that fail before they are warm: a run that trains goes on without them, one that can't train ends."""

from collections.abc import Iterator
from itertools import islice, pairwise

import pytest

from orchestrator.policy.health.budget import FIRST_SPAWN_DELAY_S
from orchestrator.policy.lifecycle import explain
from orchestrator.policy.termination import MAX_FAILED_SPAWNS
from orchestrator.protocol.messages import DesiredRunState
from orchestrator.protocol.status import RunPhase
from orchestrator.protocol.worker_phase import Phase
from orchestrator.spec.fault_tolerance import BudgetsSpec, RecoverySpec
from tests.unit.policy.imagined import Life, limits_of


def _lose_newcomers(life: Life, spare: frozenset[str]) -> Iterator[float]:
    """Kill workers that aren't in `spare` as soon as they are started, until the run ends; the time of each loss."""
    for _ in range(4000):
        newcomers = [w for w in life.state.worker_group if w not in spare and w not in life.lost]
        for worker in newcomers:
            life.kill(worker)
        life.tick()
        if life.state.outcome is not None:
            return
        if newcomers:
            yield life.now_s


def _trained(workers: int, **limits: object) -> Life:
    life = Life(limits_of(steps=10_000, initial_workers=workers, **limits))
    life.run_until(lambda: life.step == 5)
    return life


@pytest.mark.parametrize("newcomers", [1, 2])
def test_members_continue_and_failing_newcomers_start_ever_less_often(newcomers: int) -> None:
    life = _trained(2)
    members = frozenset(life.state.members)
    life.scale(2 + newcomers)
    times = list(islice(_lose_newcomers(life, members), 9))
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert life.state.outcome is None and life.step > 100 and set(life.state.members) == members
    for gap, delay_s in zip(gaps, [0, 0, 5, 10, 20, 40, 60, 60], strict=True):
        assert delay_s <= gap <= delay_s + 2, gaps
    life.run_until(lambda: life.state.num_spawned == 2 + 9 * newcomers and "died" in life.state.why)
    assert "ended before they were warm, the next start in" in explain(life.limits, life.state, life.seen())
    life.run_until(lambda: len(life.state.members) == 2 + newcomers)
    assert life.state.failures.spawns == life.state.failures.attempts == 0


def test_newcomers_that_fail_one_after_the_other_are_held_back_too() -> None:
    life = _trained(2)
    life.scale(4)
    for _ in range(120):
        newcomers = [w for w in life.state.worker_group if w not in life.state.members and w not in life.lost]
        for worker in newcomers[:1]:
            life.kill(worker)
        life.tick()
    assert life.state.num_spawned < 2 + 20 and life.state.outcome is None


def test_a_standby_that_dies_as_soon_as_it_is_warm_is_held_back() -> None:
    life = _trained(2, standby=1)
    for _ in range(300):
        for worker in life.state.worker_group:
            warm = worker in life.reports and life.reports[worker].phase is Phase.STANDBY
            if warm and worker not in life.state.members and worker not in life.lost:
                life.kill(worker)
        life.tick()
    assert life.state.num_spawned < 2 + 20 and life.state.outcome is None


def test_a_request_by_hand_is_tried_at_once() -> None:
    life = _trained(2)
    members = frozenset(life.state.members)
    life.scale(4)
    list(islice(_lose_newcomers(life, members), 7))
    began_s, started = life.now_s, life.state.num_spawned
    life.target = DesiredRunState(seq=life.target.seq + 1, workers=3, by_hand=True)
    life.run_until(lambda: life.state.num_spawned > started)
    assert life.now_s - began_s < FIRST_SPAWN_DELAY_S


def test_the_replacement_of_a_leaver_starts_soon() -> None:
    life = _trained(2, min_workers=2)
    members = frozenset(life.state.members)
    life.nodes = {member: f"node-{member}" for member in members}
    life.scale(3)
    list(islice(_lose_newcomers(life, members), 8))
    life.draining = {"node-w0": life.now_s + 100.0}
    life.run_until(lambda: life.state.draining != ())
    assert "the next start in" in explain(life.limits, life.state, life.seen())
    life.run_until(lambda: "w0" not in life.state.members, 30)
    assert len(life.state.members) >= 2 and life.state.outcome is None and not life.state.recoveries


@pytest.mark.parametrize("least", [1, 2])
def test_a_run_ends_if_none_of_the_workers_that_it_needs_gets_warm(least: int) -> None:
    life = _trained(2, min_workers=least)
    lost = life.state.members if least == 1 else life.state.members[:1]
    spare = frozenset(life.state.members) - set(lost)
    for member in lost:
        life.kill(member)
    life.marked, life.committed = [3], 3
    life.run_until(lambda: life.state.is_recovering)
    list(_lose_newcomers(life, spare))
    assert life.state.outcome is RunPhase.FAILED and "workers in a row ended early" in life.state.why


def test_a_member_that_is_lost_after_them_is_replaced() -> None:
    """Newcomers that failed while the run could do without them are forgotten once it can't."""
    life = _trained(2, min_workers=2)
    members = frozenset(life.state.members)
    life.scale(3)
    list(islice(_lose_newcomers(life, members), MAX_FAILED_SPAWNS + 2))
    life.kill(sorted(members)[0])
    life.run_until(lambda: life.state.is_recovering)
    life.run_until(lambda: not life.state.is_recovering and len(life.state.members) >= 2)
    assert life.state.outcome is None


def test_a_member_lost_together_with_many_newcomers_is_replaced() -> None:
    life = _trained(2, min_workers=2, max_workers=6)
    life.scale(5)
    life.run_until(lambda: life.state.num_spawned == 5)
    for worker in ("w1", "w2", "w3", "w4"):
        life.kill(worker)
    life.run_until(lambda: life.state.is_recovering)
    life.run_until(lambda: not life.state.is_recovering and len(life.state.members) >= 2)
    assert life.state.outcome is None


def test_a_death_in_a_transition_counts_in_the_budget() -> None:
    life = _trained(2, recovery=RecoverySpec(budgets=BudgetsSpec(worker=1)))
    life.scale(3)
    life.run_until(lambda: life.state.next is not None)
    life.kill("w2")
    life.run_until(lambda: "w2" not in life.state.worker_group)
    (failure,) = life.state.failures.recent
    assert (failure.worker, failure.is_member) == ("w2", True)


def test_they_count_in_no_budget() -> None:
    life = _trained(2, recovery=RecoverySpec(budgets=BudgetsSpec(worker=1)))
    members = frozenset(life.state.members)
    life.scale(3)
    list(islice(_lose_newcomers(life, members), 6))
    life.kill(sorted(members)[0])
    life.run_until(lambda: life.state.is_recovering)
    life.run_until(lambda: not life.state.is_recovering)
    life.run_until(lambda: len(life.state.members) == 3, 400)
    assert life.state.outcome is None

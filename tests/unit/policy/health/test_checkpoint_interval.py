"""Checkpoint interval by cost and failures."""

import math
from dataclasses import replace

import pytest

from orchestrator.policy.health.checkpoint_interval import (
    LONGEST_S,
    PRIOR_S,
    SHORTEST_S,
    best_interval_s,
    mtbf_s,
)
from orchestrator.policy.lifecycle import directive_of
from orchestrator.protocol.messages import FIRST_INTERVAL_S
from tests.unit.policy.imagined import Life, limits_of


@pytest.mark.parametrize(("cost_s", "between_s"), [(1.0, 20_000.0), (5.0, 3600.0), (20.0, 86_400.0)])
def test_the_interval_costs_least(cost_s: float, between_s: float) -> None:
    """Per second of training: one checkpoint per interval, and half an interval done again per failure."""

    def loss(interval_s: float) -> float:
        return cost_s / interval_s + interval_s / (2 * between_s)

    best_s = best_interval_s(cost_s, between_s)
    assert SHORTEST_S < best_s < LONGEST_S
    assert all(loss(best_s) < loss(factor * best_s) for factor in (0.8, 0.95, 1.05, 1.25))


def test_it_is_bounded() -> None:
    assert best_interval_s(0.0, 1e9) == SHORTEST_S and best_interval_s(1e6, 1e6) == LONGEST_S


def test_failures_shorten_the_mean_time_between_them() -> None:
    assert mtbf_s(0.0, 0) == PRIOR_S == mtbf_s(-5.0, 0)
    assert mtbf_s(99 * PRIOR_S, 99) == PRIOR_S
    assert mtbf_s(3600.0, 1) < mtbf_s(3600.0, 0)


def _with_cost(life: Life, cost_s: float) -> None:
    """Run to the next complete checkpoint, in which the slower rank pays `cost_s`."""
    done = life.committed
    life.run_until(lambda: life.committed > done)
    for rank, worker in enumerate(life.state.members):
        shards = [replace(shard, cost_s=cost_s / (2 - rank)) for shard in life.reports[worker].shards]
        life.say(worker, shards=tuple(shards))
    life.run_until(lambda: life.state.checkpoint_interval.measured[1] == life.committed)


def test_a_run_with_auto_chooses_by_measured_costs() -> None:
    life = Life(limits_of(steps=400, checkpoints_by_time=True), checkpoint_every=4)
    life.run_until(lambda: life.step == 1)
    assert directive_of(life.state, 1).checkpoint_interval_s == FIRST_INTERVAL_S
    _with_cost(life, 1.0)
    (event,) = life.of_kind("checkpoint_interval_chosen")
    assert event.cost_s == 1.0 and event.failures == 0 and PRIOR_S < event.mtbf_s < PRIOR_S + 100
    assert event.interval_s == math.sqrt(2 * event.mtbf_s)
    assert directive_of(life.state, 1).checkpoint_interval_s == event.interval_s
    _with_cost(life, 1.1)
    assert len(life.of_kind("checkpoint_interval_chosen")) == 1  # hardly another one


def test_a_run_that_goes_back_to_checkpoints_writes_them_more_often() -> None:
    life = Life(limits_of(steps=400, checkpoints_by_time=True), checkpoint_every=4)
    _with_cost(life, 4.0)
    for worker in life.state.members:
        life.kill(worker)
    life.run_until(lambda: life.state.activated == 1)
    _with_cost(life, 4.0)
    before, after = life.of_kind("checkpoint_interval_chosen")
    assert after.failures == 1 and after.interval_s < 0.8 * before.interval_s


def test_other_runs_choose_nothing() -> None:
    life = Life(limits_of(), checkpoint_every=4)
    life.run_to_the_end()
    assert life.of_kind("checkpoint_interval_chosen") == [] and life.state.checkpoint_interval.since_s is None


def test_the_last_checkpoint_changes_nothing() -> None:
    life = Life(limits_of(checkpoints_by_time=True))
    life.run_to_the_end()
    assert life.committed == life.limits.steps - 1 and life.of_kind("checkpoint_interval_chosen") == []

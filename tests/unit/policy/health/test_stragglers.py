"""Who is taken for slow, and what is done about it."""

import pytest

from orchestrator.policy.health.stragglers import FACTOR, WINDOW_STEPS, slowest
from orchestrator.policy.lifecycle import explain
from orchestrator.protocol.status import RunPhase
from orchestrator.spec.fault_tolerance import RecoverySpec
from tests.unit.policy.imagined import Life, limits_of


@pytest.mark.parametrize(
    ("busy_s", "rank", "slowness"),
    [
        ((1.0, 3.0), 1, 3.0),
        ((1.0, 1.0, 2.0, 1.2), 2, 2.0),
        ((0.0, 1.0, 2.0), 2, 2.0),
        ((0.0, 1.0), -1, 1.0),
        ((2.0,), -1, 1.0),
    ],
)
def test_the_slowest_is_measured_by_the_others(busy_s: tuple[float, ...], rank: int, slowness: float) -> None:
    assert slowest(busy_s) == (rank, slowness)


def _life(replace: bool, **changes: object) -> Life:
    return Life(
        limits_of(steps=150, initial_workers=3, recovery=RecoverySpec(replace_stragglers=replace), **changes),
        slow={"w1": 2 * FACTOR},
    )


def test_a_slow_member_is_reported_once() -> None:
    life = _life(replace=False)
    life.run_until(lambda: bool(life.of_kind("straggler")))
    (note,) = life.of_kind("straggler")
    assert (note.worker, note.slowness) == ("w1", 2 * FACTOR)
    assert note.step >= WINDOW_STEPS - 1
    assert "w1 is much slower than the others" in explain(life.limits, life.state, life.seen())
    life.run_until(lambda: life.step == 3 * WINDOW_STEPS)
    assert life.state.members == ("w0", "w1", "w2") and len(life.of_kind("straggler")) == 1
    life.slow = {}
    life.run_until(lambda: not life.state.straggler)


@pytest.mark.parametrize("standby", [0, 1])
def test_with_replace_stragglers_a_slow_member_is_replaced_and_released(standby: int) -> None:
    life = _life(replace=True, standby=standby)
    life.run_until(lambda: bool(life.of_kind("straggler")))
    life.run_until(lambda: life.state.members == ("w0", "w3", "w2"))
    life.run_until(lambda: "w1" not in life.state.worker_group)
    life.run_until(lambda: not life.state.straggler)
    (rescale,) = life.state.rescales
    assert (rescale.from_size, rescale.to_size, rescale.why) == (3, 3, "w1 is much slower than the others")
    life.run_to_the_end()
    assert life.state.outcome is RunPhase.SUCCEEDED and life.replayed == 0


def test_a_step_that_is_slow_now_and_then_is_nobodys_fault() -> None:
    life = _life(replace=True)
    for _ in range(120):
        life.slow = {"w1": 5.0} if life.step % 2 else {"w2": 5.0}
        life.tick()
    assert not life.of_kind("straggler")

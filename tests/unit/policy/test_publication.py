"""Which finished steps are published: all, or those that two failure domains or a checkpoint hold."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.policy.publication import num_uncommitted
from orchestrator.protocol.events.generations import RolledBack
from orchestrator.protocol.status import RunPhase
from orchestrator.spec.fault_tolerance import COMMITTED, FINISHED
from tests.unit.policy.imagined import Life, limits_of


def _life(workers: int, nodes: dict[str, str] | None = None, publish: str = COMMITTED, **changes: Any) -> Life:
    limits = limits_of(steps=40, initial_workers=workers, publish=publish, **changes)
    return Life(limits, checkpoint_every=10, nodes=nodes or {})


def _at_step(life: Life, step: int) -> Life:
    """Shortly after a step; with a keeper, where there is a standby for a lone worker."""
    has_keeper = life.limits.standby > 0 and life.limits.initial_workers == 1
    life.run_until(lambda: life.step >= step and (life.keeper is not None or not has_keeper))
    for _ in range(2):
        life.tick()
    return life


def _uncommitted(life: Life) -> int:
    return num_uncommitted(life.limits, life.state, life.seen())


def _trained(life: Life) -> None:
    assert life.state.outcome is RunPhase.SUCCEEDED, life.state.why
    assert life.progress.watermark == life.limits.steps - 1 and _uncommitted(life) == 0


@pytest.mark.parametrize(
    ("workers", "changes"),
    [
        (1, {}),
        (2, {"protected": False}),
        (2, {"standby": 1, "nodes": {"w0": "a", "w1": "a", "w2": "b"}}),
        (1, {"standby": 2, "nodes": {"w0": "a", "w1": "a", "w2": "b"}}),
    ],
    ids=["alone", "no snapshots", "buddies on one node of two", "keeper on the node of two"],
)
def test_steps_with_one_holder_wait_for_a_checkpoint(workers: int, changes: dict[str, Any]) -> None:
    life = _life(workers, **changes)
    life.frozen = {"w2"}  # never warm
    _at_step(life, 5)
    assert life.progress.watermark == -1 and _uncommitted(life) == life.step + 1
    _at_step(life, 14)
    assert life.progress.watermark == 9 and _uncommitted(life) == life.step - 9


@pytest.mark.parametrize(
    ("workers", "changes"),
    [
        (2, {}),
        (2, {"nodes": {"w0": "a", "w1": "b"}}),
        (1, {"standby": 1}),
        (1, {"standby": 1, "nodes": {"w0": "a", "w1": "b"}}),
    ],
    ids=["buddies", "buddies on two nodes", "keeper", "keeper on another node"],
)
def test_steps_with_two_holders_are_published_at_once(workers: int, changes: dict[str, Any]) -> None:
    life = _at_step(_life(workers, **changes), 5)
    assert life.progress.watermark == life.step - 1 and _uncommitted(life) == 1


def test_finished_steps_are_published_by_default_and_counted() -> None:
    life = _at_step(_life(1, publish=FINISHED), 5)
    assert life.progress.watermark == life.step and _uncommitted(life) == life.step + 1
    _at_step(life, 14)
    assert life.progress.watermark == life.step and _uncommitted(life) == life.step - 9


def test_without_its_keeper_a_lone_member_publishes_at_checkpoints_only() -> None:
    life = _at_step(_life(1, standby=1), 3)
    life.kill("w1")
    life.frozen = {"w2"}
    life.run_until(lambda: life.step == 8)
    assert life.progress.watermark <= 5 and _uncommitted(life) == 8 - life.progress.watermark
    life.run_until(lambda: life.step == 11)
    assert life.progress.watermark == 9
    life.frozen = set()
    life.run_until(lambda: life.keeper is not None)
    life.run_until(lambda: life.progress.watermark == life.step - 1)
    life.run_to_the_end()
    _trained(life)


def test_a_world_that_shrinks_to_one_member_waits_from_then_on() -> None:
    life = _at_step(_life(2), 3)
    life.scale(1)
    life.run_until(lambda: life.state.activated == 1)
    shrunk = life.step
    assert shrunk < 12
    life.run_until(lambda: life.step == 18)
    assert life.progress.watermark == max(9, shrunk - 1)
    life.run_to_the_end()
    _trained(life)


@pytest.mark.parametrize("publish", [COMMITTED, FINISHED])
def test_the_loss_of_a_lone_worker_repeats_no_published_step_where_it_was_to_be_committed(publish: str) -> None:
    life = _at_step(_life(1, publish=publish), 14)
    published = life.progress.watermark
    life.kill("w0")
    life.run_until(lambda: life.state.activated == 1)
    (recovery,) = life.state.recoveries
    assert recovery.step == 9 and (recovery.step >= published) == (publish == COMMITTED)
    assert (recovery.steps_lost == 0) == (publish == COMMITTED) and recovery.steps_replayed >= 6
    life.run_to_the_end()
    _trained(life)


def test_a_worker_that_dies_after_the_records_of_its_checkpoint_came_does_not_take_it_along() -> None:
    """Its steps are published by then. Only the checkpoint's marker is missing."""
    life = _life(1)
    life.run_until(lambda: life.step == 9)
    life._publish()
    assert life.progress.watermark == 9 and life.committed == -1
    life.kill("w0")
    life.run_until(lambda: life.state.activated == 1)
    (recovery,) = life.state.recoveries
    assert life.committed == 9 and recovery.step == 9
    life.run_to_the_end()
    _trained(life)


def test_a_run_that_lost_its_worker_waits_for_the_marker_of_a_checkpoint_that_was_published() -> None:
    life = _life(1)
    life.run_until(lambda: life.committed == 9)
    life.refuses_markers = True
    life.run_until(lambda: life.progress.watermark == 19)
    life.kill("w0")
    for _ in range(50):
        life.tick()
    assert life.state.activated == 0 and life.committed == 9
    life.refuses_markers = False
    life.run_until(lambda: life.state.activated == 1)
    (recovery,) = life.state.recoveries
    assert life.committed == 19 and recovery.step == 19
    life.run_to_the_end()
    _trained(life)


@pytest.mark.parametrize("publish", [COMMITTED, FINISHED])
def test_a_checkpoint_that_was_published_comes_before_an_older_state_in_memory(publish: str) -> None:
    life = _at_step(_life(2, publish=publish), 14)
    newest = life.step + 5
    life.state = replace(life.state, checkpoint_done=newest)
    life.committed, life.marked = newest, [*life.marked, newest]
    life.kill("w1")
    life.run_until(lambda: life.state.next is not None)
    went_back = [note.step for note in life.notes if isinstance(note, RolledBack)]
    assert went_back == ([newest] if publish == COMMITTED else [])


@given(
    workers=st.integers(1, 3),
    standby=st.integers(0, 1),
    protected=st.booleans(),
    step=st.integers(0, 25),
    rank=st.integers(0, 2),
)
@settings(max_examples=40, deadline=None)
def test_no_published_step_is_done_again_after_the_loss_of_one_worker(
    workers: int, standby: int, protected: bool, step: int, rank: int
) -> None:
    life = _life(workers, standby=standby, protected=protected)
    life.run_until(lambda: life.step >= step and len(life.state.worker_group) == workers + standby)
    published = life.progress.watermark
    life.kill(life.state.members[rank % workers])
    life.run_until(lambda: bool(life.state.recoveries))
    (recovery,) = life.state.recoveries
    assert recovery.step >= published and recovery.steps_lost == 0
    life.run_to_the_end()
    _trained(life)

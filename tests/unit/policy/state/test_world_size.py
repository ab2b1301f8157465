import pytest

from orchestrator.errors import UsageError
from orchestrator.policy.cluster.capacity import places
from orchestrator.policy.state.config import RunLimits
from orchestrator.policy.state.world_size import (
    SizeChange,
    SizeRequest,
    next_change,
    request_holds,
    wanted_size,
    workers_to_hold,
)
from orchestrator.spec.job import JobSpec
from orchestrator.spec.workers import ScheduledScale
from tests.unit.policy.imagined import limits_of

PLANNED = limits_of(steps=100, schedule=(ScheduledScale(at_step=20, workers=3), ScheduledScale(at_step=60, workers=1)))


@pytest.mark.parametrize(
    ("size_request", "step", "size"),
    [
        (None, 0, 2),
        (None, 19, 2),
        (None, 20, 3),
        (None, 99, 1),
        (SizeRequest(4, 10), 15, 4),
        (SizeRequest(4, 10), 20, 3),
        (SizeRequest(4, 20), 20, 4),
        (SizeRequest(4, 30), 59, 4),
        (SizeRequest(4, 30), 60, 1),
    ],
)
def test_the_newest_of_schedule_and_request_counts(size_request: SizeRequest | None, step: int, size: int) -> None:
    assert wanted_size(PLANNED, size_request, step) == size


@pytest.mark.parametrize(
    ("size_request", "holds"),
    [(SizeRequest(3, 25), True), (SizeRequest(3, 20), True), (SizeRequest(3, 10), False), (None, False)],
    ids=["as scheduled, and asked for", "at the same step", "overtaken", "none"],
)
def test_the_reason_for_a_size(size_request: SizeRequest | None, holds: bool) -> None:
    assert request_holds(PLANNED, size_request, 30) is holds


@pytest.mark.parametrize(
    ("size", "step", "change"),
    [
        (2, 5, None),
        (2, 14, SizeChange(3, 20)),
        (2, 18, SizeChange(3, 20)),
        (2, 19, SizeChange(3, None)),
        (2, 40, SizeChange(3, None)),
        (3, 40, None),
        (1, 98, None),
        (3, 98, SizeChange(1, None)),
        (3, 99, None),
    ],
    ids=["far", "in sight", "next but one", "due", "late", "done", "right", "last chance", "no step left"],
)
def test_a_change_is_prepared_when_it_is_in_sight(size: int, step: int, change: SizeChange | None) -> None:
    assert next_change(PLANNED, None, size, step, horizon_steps=5) == change


@pytest.mark.parametrize(
    ("standby", "size_request", "step", "workers"),
    [
        (0, None, 0, 3),
        (1, None, 0, 3),
        (2, None, 0, 4),
        (1, None, 60, 2),
        (2, SizeRequest(4, 0), 5, 6),
        (0, SizeRequest(1, 30), 30, 1),
    ],
)
def test_workers_held(standby: int, size_request: SizeRequest | None, step: int, workers: int) -> None:
    limits = limits_of(steps=100, standby=standby, schedule=PLANNED.schedule)
    assert workers_to_hold(limits, size_request, step) == workers


def test_never_more_than_max_and_standbys_are_held() -> None:
    limits = limits_of(max_workers=2, standby=1)
    assert workers_to_hold(limits, SizeRequest(2, 0), 1) == 3


def test_limits_of_a_job() -> None:
    workers = {"min": 1, "max": 3, "initial": 2, "standby": 1, "schedule": [{"at_step": 5, "workers": 3}]}
    job = JobSpec.model_validate({"schema": "v1", "name": "try", "workers": workers, "train": {"max_steps": 9}})
    limits = RunLimits.of("try", job)
    assert (limits.steps, limits.min_workers, limits.max_workers, limits.initial_workers) == (9, 1, 3, 2)
    assert limits.schedule == (ScheduledScale(at_step=5, workers=3),)


@pytest.mark.parametrize("workers", [0, 5])
def test_a_size_outside_the_limits_is_refused(workers: int) -> None:
    with pytest.raises(UsageError, match=f"{workers} workers asked for; run allows 1 to 4"):
        limits_of().check_size(workers)


def test_places_counts_whole_workers_per_node() -> None:
    free = [{"CPU": 3.0, "GPU": 1.0}, {"CPU": 8.0}]
    assert places(free, {"CPU": 2.0}) == 5
    assert places(free, {"CPU": 1.0, "GPU": 0.5}) == 2
    assert places(free, {"CPU": 0.1, "memory": 1.0}) == 0
    assert places([{"CPU": 0.3}], {"CPU": 0.1, "GPU": 0.0}) == 3  # floats

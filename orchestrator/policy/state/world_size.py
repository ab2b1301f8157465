"""Wanted world size at each step, from the job's schedule and from requests.

The newest of the two wins: a request holds until the next scheduled change. Both are limited by the Scheduler's grant.
"""

from dataclasses import dataclass

from orchestrator.policy.state.config import RunLimits
from orchestrator.protocol.scaling import UNLIMITED, Grant


@dataclass(frozen=True)
class SizeRequest:
    """A requested size. `since_step` is the first step that was still to come when the request arrived.

    `by_hand`: a user asked, not the Scheduler. `grown_s` is when the Scheduler last asked for more than before. `cap`
    is the largest number of workers found worthwhile in the stage `cap_stage`; None if that was not measured.
    """

    workers: int
    since_step: int
    by_hand: bool = False
    grown_s: float | None = None
    cap: int | None = None
    cap_stage: str = ""


@dataclass(frozen=True)
class SizeChange:
    """The world size to prepare. `first_step` is the first step of the new size; None: the earliest possible."""

    workers: int
    first_step: int | None


def wanted_size(limits: RunLimits, size_request: SizeRequest | None, step: int, grant: Grant = UNLIMITED) -> int:
    """Number of workers that should do step `step`; 0 while the run is queued."""
    if size_request is not None and request_holds(limits, size_request, step):
        return grant.of(size_request.workers)
    due = [entry.workers for entry in limits.schedule if entry.at_step <= step]
    return grant.of(due[-1] if due else limits.initial_workers)


def request_holds(limits: RunLimits, size_request: SizeRequest | None, step: int) -> bool:
    """Whether a request sets the size for step `step`, as no scheduled change came after it."""
    return size_request is not None and not any(
        size_request.since_step < entry.at_step <= step for entry in limits.schedule
    )


def next_change(
    limits: RunLimits,
    size_request: SizeRequest | None,
    size: int,
    step: int,
    horizon_steps: int,
    grant: Grant = UNLIMITED,
) -> SizeChange | None:
    """The change to prepare now, given a world of `size` that has finished `step`; None if there is none.

    A scheduled change is prepared when it is at most `horizon_steps` away: prepared earlier, its generation would block
    requests. One whose step has passed (its workers weren't warm in time) is due at once.
    """
    if step + 1 >= limits.steps:
        return None
    wanted = wanted_size(limits, size_request, step + 1, grant)
    if wanted != size:
        return SizeChange(wanted, None)
    for entry in limits.schedule:
        coming = grant.of(entry.workers)
        if step + 1 < entry.at_step <= step + 1 + horizon_steps and coming != size:
            return SizeChange(coming, entry.at_step)
    return None


# -- Size of the worker group, members and standbys together -----------------------------------------------------------


def workers_to_hold(limits: RunLimits, size_request: SizeRequest | None, step: int, grant: Grant = UNLIMITED) -> int:
    """Number of workers that should exist, warm or warming, during `step`.

    The wanted size plus the job's standbys; or the largest size still scheduled, if that is more, since its workers
    must be warm at its step. Limited by the Scheduler's grant.
    """
    coming = max((entry.workers for entry in limits.schedule if entry.at_step > step), default=0)
    wanted = wanted_size(limits, size_request, step) + limits.standby
    return grant.of(min(max(wanted, coming), limits.max_workers + limits.standby))

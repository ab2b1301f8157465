"""Events of the run as a whole: submission, queue, requests, end."""

from dataclasses import dataclass

from orchestrator.protocol.events.base import Event


@dataclass(frozen=True)
class Submitted(Event):
    """The run was submitted. `workers` is its initial number of workers, `job_sha256` the digest of its `job.json`."""

    run_id: str
    workers: int
    job_sha256: str = ""


@dataclass(frozen=True)
class Queued(Event):
    """The run waits for room in the cluster."""

    why: str


@dataclass(frozen=True)
class Admitted(Event):
    """The run left the queue. `workers` is None if the grant has no limit."""

    workers: int | None
    wanted: int
    why: str
    waited_s: float


@dataclass(frozen=True)
class Granted(Event):
    """The Scheduler changed how many workers the run may hold. `workers` is None without a limit."""

    workers: int | None
    wanted: int
    why: str


@dataclass(frozen=True)
class Preempted(Event):
    """A run of higher priority gets the run's workers: the run writes a checkpoint and returns to the queue."""

    workers: int | None
    wanted: int
    why: str
    step: int


@dataclass(frozen=True)
class Suspended(Event):
    """A preempted run has written its checkpoint and released its workers. `step` is -1 without a checkpoint."""

    step: int
    checkpoint: str | None


@dataclass(frozen=True)
class Resumed(Event):
    """The run continues after `step`, from `checkpoint`, or from step 0 if that is None.

    Args:
        token: token of the request to resume, which identifies repeats.
        residuals: `left behind` if the compression's unsent residuals were dropped.
        code: digests of the packages of the job's own code from now on, by their directories; None: unchanged.
    """

    token: str
    step: int
    checkpoint: str | None
    workers: int
    residuals: str | None = None
    code: dict[str, str] | None = None


@dataclass(frozen=True)
class TargetChanged(Event, kind="target"):
    """A request was recorded: another number of workers, another stage, or an end. `by_hand` is None unless the number
    of workers was requested, and False if the Scheduler requested it."""

    workers: int
    finish: str
    why: str
    by_hand: bool | None = None


@dataclass(frozen=True)
class PriorityChanged(Event):
    """The run was given another priority than it had `before`. It overrides that of its job."""

    priority: int
    before: int


@dataclass(frozen=True)
class Ended(Event):
    """The run is over. `outcome` is a `RunPhase`: succeeded, failed, stopped or paused."""

    outcome: str
    why: str


@dataclass(frozen=True)
class ControllerFailed(Event, kind="error"):
    """The controller failed, and the run with it."""

    traceback: str

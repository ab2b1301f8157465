"""Status of a run for users: the answer to `status`, and the content of `status-TERM.json` after the end."""

from dataclasses import dataclass, field
from enum import StrEnum

from orchestrator.errors import NotFinished, RunFailed, RunStopped
from orchestrator.protocol.usage import Traffic
from orchestrator.protocol.worker_phase import Phase
from orchestrator.storage.condition import StorageCondition


class RunPhase(StrEnum):
    """Phase of a run. A queued run holds no workers. Runs in the last four phases have ended and hold no resources of a
    cluster; `resume` continues a run from three of them."""

    QUEUED = "queued"
    STARTING = "starting"
    TRAINING = "training"
    RESCALING = "rescaling"
    RECOVERING = "recovering"
    FINISHING = "finishing"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    STOPPED = "stopped"
    PAUSED = "paused"

    @property
    def ended(self) -> bool:
        return self in (RunPhase.SUCCEEDED, RunPhase.FAILED, RunPhase.STOPPED, RunPhase.PAUSED)


@dataclass(frozen=True)
class Rescale:
    """One change of the world size, as the journal and the summary of a run show it.

    `step` is the last step of the old world; the new world begins with `step + 1`. `stall_s` is the time between the
    votes of these two steps, minus the usual time of a step; None until the new world has finished a few steps.
    `experts_moved` counts experts that members got where members stayed and experts were placed by load; else None.
    `experts` are the numbers of each layer's experts before and after, where that changes; else None.
    """

    generation: int
    from_size: int
    to_size: int
    step: int
    why: str
    moved_bytes: int = 0
    state_identical: bool | None = None
    stall_s: float | None = None
    steps_lost: int = 0
    experts_moved: int | None = None
    experts: tuple[int, int] | None = None


@dataclass(frozen=True)
class Recovery:
    """Cost of a failure of members, as in the journal and the summary of a run. `cause` is that of the first failure;
    `storage`: no member failed, but the run's last checkpoint could not be completed.

    `step` is the last step before training continued, `source` the origin of its state: `memory` or `checkpoint`.
    `steps_replayed` counts finished steps that were done again, `steps_lost` those among them that had been committed.
    `stall_s` is the time between the votes of `step` and of the step after it, minus the usual time of a step: it
    includes the interrupted step's computation. None until the new world has finished a few steps.
    """

    generation: int
    lost: tuple[str, ...]
    cause: str
    from_size: int
    to_size: int
    step: int
    why: str
    source: str = "memory"
    moved_bytes: int = 0
    state_identical: bool | None = None
    steps_replayed: int = 0
    steps_lost: int = 0
    stall_s: float | None = None


@dataclass(frozen=True)
class WorkerStatus:
    """A worker and its phase. `rank` is None if it is not a member; `node` is Ray's id, empty until known."""

    worker: str
    rank: int | None
    phase: Phase
    node: str = ""


@dataclass(frozen=True)
class RunStatus:
    """Status of a run at one moment. Steps and losses are shown up to the watermark.

    `step` counts finished steps: it equals `steps` at the end. Times are `time.time()` seconds. `held_by` is the number
    of failure domains that hold the newest of them: nodes where the run has several, else workers. `uncommitted` counts
    finished steps that neither two domains nor a checkpoint hold. `unit` is what `tokens_per_second` counts: tokens,
    or the rows of a task whose rows have none. `metrics` are those of the task, by name.
    """

    run_id: str
    run_dir: str
    phase: RunPhase
    why: str  # one sentence: the reason for waiting, or how the run ended
    step: int
    steps: int
    workers_wanted: int
    workers_now: int  # the world size; 0 before the first generation and after the end
    standbys: int
    generation: int
    loss: float | None
    first_loss: float | None
    validation_loss: float | None
    first_validation_loss: float | None
    tokens_per_second: float | None
    rescales: tuple[Rescale, ...]
    checkpoint: str | None  # directory of the newest complete one
    checkpoint_step: int | None
    tracking_url: str | None
    error: str | None
    submitted_time: float | None
    started_time: float | None  # activation of the first generation
    ended_time: float | None
    warning: str | None = None  # a fault or doubt that does not stop the run; after the end, the last one
    traceback: str | None = None  # of the worker's error that ended the run
    recoveries: tuple[Recovery, ...] = ()
    stage: str = ""  # of the curriculum; empty without one
    traffic: dict[str, Traffic] = field(default_factory=dict)  # per step, by kind; empty where there is one worker
    worker_group: tuple[WorkerStatus, ...] = ()  # members by rank, then the others; empty after the end
    priority: int = 0
    resources: dict[str, float] = field(default_factory=dict)  # that each worker reserves; gpus: auto is decided
    held_by: int = 0
    storage: StorageCondition = StorageCondition.WELL  # after the end: as it was then
    uncommitted: int = 0
    unit: str = "tokens"
    metrics: dict[str, float] = field(default_factory=dict)  # of the newest step
    validation_metrics: dict[str, float] = field(default_factory=dict)  # of the newest validation
    rank_violation: float | None = (
        None  # largest expert load of a worker / mean - 1, over all layers, of the newest step
    )
    as_of_time: float | None = field(default=None, compare=False)  # when its controller answered; None from run storage


def raise_unless_succeeded(status: RunStatus) -> None:
    """Raise the error that corresponds to the status of a run.

    Raises:
        RunFailed, RunStopped: the run ended that way.
        NotFinished: it is paused or active.
    """
    if status.phase is RunPhase.FAILED:
        raise RunFailed(
            f"run {status.run_id} failed: {status.error or status.why}",
            traceback=status.traceback or "",
            remedy=f"`orchestrator logs {status.run_id}` shows the log lines of its processes.",
            unchanged=f"Its newest checkpoint is {status.checkpoint}." if status.checkpoint else "",
        )
    if status.phase is RunPhase.STOPPED:
        raise RunStopped(f"run {status.run_id}: {status.why}")
    if status.phase is RunPhase.PAUSED:
        raise NotFinished(
            f"run {status.run_id}: {status.why}",
            remedy=f"`orchestrator resume {status.run_id}` continues it.",
        )
    if status.phase is not RunPhase.SUCCEEDED:
        raise NotFinished(f"run {status.run_id} is {status.phase}: {status.why}")

"""What a user sees of a run: the answer to `status`, and what `status.json` in run storage keeps after the end."""

from dataclasses import dataclass, field
from enum import StrEnum

from orchestrator.protocol.messages import Phase
from orchestrator.protocol.usage import Traffic


class RunPhase(StrEnum):
    """Where a run is in its life. One that is queued holds no worker yet, or none any more. The last four hold nothing
    of a cluster any more; `resume` leads out of three."""

    QUEUED = "queued"
    STARTING = "starting"
    TRAINING = "training"
    RESCALING = "rescaling"
    RECOVERING = "recovering"
    FINISHING = "finishing"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    PAUSED = "paused"

    @property
    def ended(self) -> bool:
        return self in (RunPhase.SUCCEEDED, RunPhase.FAILED, RunPhase.CANCELLED, RunPhase.PAUSED)


@dataclass(frozen=True)
class Rescale:
    """One change of the world size, as the journal and the summary of a run show it.

    `step` is the last one that the old world finished; the new world does `step + 1`. `stall_s` is the time between
    the two steps' votes that is more than a step takes; None until the new world has done a few steps.
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


@dataclass(frozen=True)
class Recovery:
    """What the loss of members cost, as the journal and the summary of a run show it. `cause` is that of the first one.

    `step` is the one after which training went on, `source` where its state came from: `memory` or `checkpoint`.
    `steps_replayed` counts finished steps that were done again, `steps_lost` those among them that had been committed.
    `stall_s` is the time between the votes of `step` and of the one after it that is more than a step takes: what was
    computed of the interrupted step is in it. None until the new world has done a few steps.
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
    """A worker and what it does. `rank` is None for one that is no member; `node` is Ray's id, empty until known."""

    worker: str
    rank: int | None
    phase: Phase
    node: str = ""


@dataclass(frozen=True)
class RunStatus:
    """A run at one moment. Steps and losses are those of the watermark: nothing beyond it is shown.

    `step` counts finished steps: it equals `steps` at the end. Times are `time.time()` seconds.
    """

    run_id: str
    run_dir: str
    phase: RunPhase
    why: str  # one sentence: what the run waits for, or how it ended
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
    started_time: float | None  # the first generation was activated
    ended_time: float | None
    warning: str | None = None  # what does not work, or is in doubt, although the run goes on; or was so until its end
    traceback: str | None = None  # of the worker's error that ended the run
    recoveries: tuple[Recovery, ...] = ()
    stage: str = ""  # of the curriculum; empty without one
    traffic: dict[str, Traffic] = field(default_factory=dict)  # per step, by kind; empty where there is one worker
    worker_group: tuple[WorkerStatus, ...] = ()  # members by rank, then the others; nobody after the end
    priority: int = 0

    @property
    def last_rescale(self) -> Rescale | None:
        return self.rescales[-1] if self.rescales else None

"""Events of training: steps, checkpoints, micro-batches and stages."""

from dataclasses import dataclass

from orchestrator.protocol.events.base import Event
from orchestrator.protocol.step_record import StepRecord


@dataclass(frozen=True)
class StepsCommitted(Event, kind="steps", internal=True):
    """Finished steps, each once, which `orchestrator check data` balances."""

    records: tuple[StepRecord, ...]


@dataclass(frozen=True)
class CheckpointCommitted(Event, kind="checkpoint"):
    """A checkpoint is complete, by this event.

    Args:
        path: its directory, of a name that no other checkpoint has.
        generation: that wrote it.
        sha256: digest of its manifest's file.
    """

    step: int
    path: str
    generation: int
    sha256: str


@dataclass(frozen=True)
class CheckpointIntervalChosen(Event):
    """With `checkpoint.every: auto`, checkpoints follow each other after `interval_s` of training from now on.

    Args:
        cost_s: training time that a checkpoint takes.
        mtbf_s: estimated mean time between failures that send the run back to a checkpoint.
        failures: number of such failures so far.
    """

    interval_s: float
    cost_s: float
    mtbf_s: float
    failures: int


@dataclass(frozen=True)
class CheckpointsDeleted(Event):
    """The checkpoints of these steps are no longer kept: their files are deleted after this event."""

    steps: tuple[int, ...]


@dataclass(frozen=True)
class CheckpointsAbandoned(Event):
    """Checkpoints of which only parts were written are never completed: the parts are deleted after this event, to make
    room.

    Args:
        names: of their directories.
    """

    names: tuple[str, ...]


@dataclass(frozen=True)
class MicroBatchFitted(Event):
    """The size of micro-batches changed because memory allows more, or is short.

    Args:
        worker: the worker whose memory was decisive.
        memory_bytes, taken_bytes, kept_bytes: memory that it may use, uses, and keeps between forward and backward.
    """

    from_tokens: int
    to_tokens: int
    step: int
    worker: str
    memory_bytes: int
    taken_bytes: int
    kept_bytes: int


@dataclass(frozen=True)
class MicroBatchReduced(Event):
    """The size of micro-batches was reduced after an out-of-memory error. Sizes are in rows or in tokens."""

    step: int
    from_rows: int | None = None
    to_rows: int | None = None
    from_tokens: int | None = None
    to_tokens: int | None = None


@dataclass(frozen=True)
class ExpertsRebalanced(Event):
    """From the step after `step` on, experts are placed by their loads.

    Args:
        before, after: largest load of a worker over the mean, minus 1, over all layers, by the loads known then.
        num_moved: experts that workers got, over all layers.
        request: number of the newest request that it answers; 0 without any.
    """

    generation: int
    step: int
    before: float
    after: float
    num_moved: int
    request: int = 0


@dataclass(frozen=True)
class ExpertsKept(Event):
    """It was asked for experts to be placed by load, but they stay where they are.

    Args:
        rank_violation: largest load of a worker over the mean, minus 1, over all layers.
        request: its number.
    """

    step: int
    rank_violation: float
    why: str
    request: int = 0


@dataclass(frozen=True)
class ExpertsChanged(Event):
    """From the step after `step` on, each MoE layer has another number of experts.

    Args:
        before, after: experts of each layer.
        request: number of the request that it answers; 0: it was scheduled.
    """

    generation: int
    step: int
    before: int
    after: int
    request: int = 0


@dataclass(frozen=True)
class ExpertsUnchanged(Event):
    """Another number of experts was asked for, but it stays as it is.

    Args:
        request: its number.
    """

    step: int
    num_experts: int
    why: str
    request: int = 0


@dataclass(frozen=True)
class RebalanceMeasured(Event):
    """Seconds of a step before and after the experts moved to the placement of `generation`."""

    generation: int
    step: int
    before_s: float
    after_s: float


@dataclass(frozen=True)
class BatchSkipped(Event):
    """The batch of a step is skipped because its loss exploded."""

    step: int
    why: str


@dataclass(frozen=True)
class StageDecided(Event):
    """The next stage of the curriculum begins at `first_step`."""

    stage: str
    first_step: int
    why: str


@dataclass(frozen=True)
class StageKept(Event):
    """A stage was requested, but the run is already in it, or in the last one."""

    stage: str
    why: str


@dataclass(frozen=True)
class StageBegan(Event):
    """A stage of the curriculum began at `step`."""

    stage: str
    step: int
    sequence_length: int

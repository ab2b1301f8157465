"""A worker's report to its controller, by concern: identity, transition, protection, records, health, process."""

from dataclasses import dataclass, field

from orchestrator.elastic.recovery_point import Holding
from orchestrator.protocol.replay_task import StepFingerprint
from orchestrator.protocol.step_record import Saliency, StepRecord
from orchestrator.protocol.worker_phase import Phase
from orchestrator.storage.condition import StorageTrouble


@dataclass(frozen=True)
class Handover:
    """A worker's measurements of one rescale, after it became ready for `generation`."""

    generation: int
    step: int  # last finished step of the old generation
    connect_s: float
    build_s: float
    transfer_s: float
    digest_s: float
    sent_bytes: int
    received_bytes: int
    state_identical: bool | None  # None: digests were not taken
    residual_error: float = 0.0  # change of the error-feedback residuals, summed over the ranks, relative to their norm


@dataclass(frozen=True)
class ShardWritten:
    """A rank's shard of a checkpoint in run storage; the controller completes it once it has all ranks' shards.

    Reports carry the newest ones, so it names no tensors: those are in the file's header.

    Args:
        file: name within the checkpoint directory.
        header_sha256: digest of its header, which has those of its blocks.
        meta_sha256: digest of the state that is not a tensor; equal on all ranks. It is in the header of rank 0.
    """

    step: int
    generation: int
    rank: int
    file: str
    num_bytes: int
    header_sha256: str
    meta_sha256: str
    cost_s: float = 0.0  # training time that it took: waits for the copy, and processor time of copy and write


@dataclass(frozen=True)
class ReplayResult:
    """Result of a standby's replay check: fingerprints of all steps, or of the first ones if it was interrupted by
    other work; or the error."""

    number: int
    findings: tuple[StepFingerprint, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class Saturation:
    """Parameters whose gradient on a worker was too large for an exact sum; the step's update was skipped."""

    step: int
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class MicroBatchMemory:
    """Memory use of a generation's micro-batches on a worker, since rows had this length. Used to fit micro-batches.

    Args:
        steps: finished steps so far.
        tokens: tokens of the largest micro-batch, padding included.
        num_micro_batches: in the last step, of all workers together.
        kept_bytes: most bytes that a forward pass kept for its backward pass; 0 if unknown.
        resident_bytes: memory of the process; on a CPU, where freed memory is kept, its maximum so far.
        limit_bytes: memory of the host, of the control group that confines the process, or of the GPU.
        used_bytes: part of `limit_bytes` used by all processes, without memory that the system can reclaim.
        place: id of that memory: workers with the same id share it.
        is_gpu: it is the memory of a GPU.
    """

    generation: int
    sequence_length: int
    steps: int
    tokens: int
    num_micro_batches: int
    kept_bytes: int
    resident_bytes: int
    limit_bytes: int
    used_bytes: int
    place: str
    is_gpu: bool


CHECKPOINT_CORRUPT = "checkpoint_corrupt"


@dataclass(frozen=True)
class WorkerError:
    """Cause of a worker's failure. `kind` is a stable word: peer_lost, user_error, numeric, out_of_memory, corrupted,
    doubtful (a state received from others), checkpoint_corrupt, internal."""

    kind: str
    message: str
    traceback: str = ""


@dataclass(frozen=True)
class TransitionReport:
    """A worker's way between generations.

    Args:
        prepared: newest generation whose groups it has connected.
        failed_generation: newest generation that it could not prepare or reach.
        stopped: newest generation that it has left because it or a peer failed, with the cause in `health.error`.
        handovers: measurements of its newest transitions.
    """

    prepared: int = -1
    failed_generation: int = -1
    stopped: int = -1
    handovers: tuple[Handover, ...] = ()


@dataclass(frozen=True)
class ProtectionReport:
    """State that survives a failure.

    Args:
        committed: newest step of which the votes have shown that two workers hold its state; the newest finished one
            while no other worker gets this one's snapshots.
        held: newest step of which the votes have shown that two workers hold its state.
        settled: newest generation with such a step.
        holdings: states in this worker's memory, reported once it has stopped.
        kept_by: number of the newest keeper that has acknowledged a snapshot of this member.
        unkept: number of the newest keeper that gets no more snapshots, reported by the member and by the keeper.
    """

    committed: int = -1
    held: int = -1
    settled: int = -1
    holdings: tuple[Holding, ...] = ()
    kept_by: int = -1
    unkept: int = -1


@dataclass(frozen=True)
class HistoryReport:
    """Finished steps that a worker has records of.

    Args:
        records: those after the requested step.
        first_record: the oldest one that it still has.
        saliency: the newest averages of experts in any record, with their step; None without any.
    """

    records: tuple[StepRecord, ...] = ()
    first_record: int = 0
    saliency: tuple[int, Saliency] | None = None


@dataclass(frozen=True)
class HealthReport:
    """Troubles of a worker.

    Args:
        error: cause of its failure, or of the end of its generation.
        saturated: the newest gradient that was too large for an exact sum.
        leaving: it received SIGTERM and will be killed soon.
    """

    error: WorkerError | None = None
    saturated: Saturation | None = None
    leaving: bool = False


@dataclass(frozen=True)
class ProcessReport:
    """A worker's process.

    Args:
        collective: number of collectives that its training thread has entered in this generation.
        numerics: properties that determine the bits of its results, if training is exact; else the kind of its GPU.
    """

    pid: int = 0
    rss_bytes: int = 0
    collective: int = 0
    numerics: str = ""


@dataclass(frozen=True)
class Report:
    """The whole visible state of a worker.

    Args:
        version: grows with every change of this worker's state.
        generation: its present generation; -1 without one.
        step: last finished step; -1 before the first.
        seen: seq of the newest directive.
        plans: digests of its plans.
        shards: the newest ones that it has written for checkpoints.
        unsaved: why storage refuses its part of a checkpoint, which it goes on trying to write; None if it doesn't.
        unread: why it waits for storage before its next step: that doesn't give the rows, which it goes on trying to
            read, or hasn't taken the records of too many steps; None if it doesn't.
        micro_batches: memory that its micro-batches use, if measured.
        checked: result of the requested replay check.
    """

    worker: str
    term: int
    version: int
    phase: Phase
    generation: int
    step: int
    seen: int
    transition: TransitionReport = field(default_factory=TransitionReport)
    protection: ProtectionReport = field(default_factory=ProtectionReport)
    history: HistoryReport = field(default_factory=HistoryReport)
    health: HealthReport = field(default_factory=HealthReport)
    process: ProcessReport = field(default_factory=ProcessReport)
    plans: tuple[str, ...] = ()
    shards: tuple[ShardWritten, ...] = ()
    unsaved: StorageTrouble | None = None
    unread: StorageTrouble | None = None
    micro_batches: MicroBatchMemory | None = None
    checked: ReplayResult | None = None

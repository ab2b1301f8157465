"""Frozen values that cross process borders.

`DesiredRunState` (Scheduler to RunController) and `Directive` (RunController to Worker) each carry the whole desired
state, so the newest wins and a repeat is harmless. A worker answers with a `Report`. Everything carries
(term, generation); a receiver refuses a lower term."""

from dataclasses import dataclass, field
from enum import StrEnum

from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.recovery_point import Holding
from orchestrator.elastic.world import World
from orchestrator.protocol.expert_load import ExpertLoad
from orchestrator.protocol.usage import Traffic
from orchestrator.sampling.micro_batches import UNSAID, MicroBatchSize


class FinishMode(StrEnum):
    """Requested end of a run before its last step."""

    NO = "no"
    STOP = "stop"
    PAUSE = "pause"


@dataclass(frozen=True)
class DesiredRunState:
    """Desired state of a run, from the Scheduler. `by_hand`: a user requested this size. `stage` is the stage requested
    last, or `next` for the following one, and `stage_requests` counts such requests."""

    seq: int
    workers: int
    finish: FinishMode = FinishMode.NO
    reason: str = ""
    stage: str = ""
    stage_requests: int = 0
    by_hand: bool = False


@dataclass(frozen=True)
class Restore:
    """A complete checkpoint to restore from: its last finished step, and its directory.

    `reset_residuals`: the residuals of gradient compression are not restored.
    """

    step: int
    path: str
    reset_residuals: bool = False


@dataclass(frozen=True)
class ResumeRequest:
    """Request to resume a run that has ended or lost its cluster. `token` distinguishes repeats from new requests.

    `restore` is None for a run without any checkpoint: it begins again at step 0. `workers` is None to keep the number
    that was wanted last.
    """

    token: str
    restore: Restore | None
    workers: int | None = None


@dataclass(frozen=True)
class StateSource:
    """Source of a generation's state: the world that produced it, and the workers that hold it.

    `step` is the finished step after which the state is taken; None for the fence that the members of `world` reach.
    `holders` lists by rank the worker that has the rank's shard: its own or, after a failure, a buddy's copy.
    """

    world: World
    placement: ExpertPlacement
    holders: tuple[str, ...]
    step: int | None = None


@dataclass(frozen=True)
class PastWorld:
    """A world that trained steps, from `first_step` until the next world's first step, with its expert placement and
    micro-batch size."""

    first_step: int
    world: World
    placement: ExpertPlacement
    micro_batch: MicroBatchSize = UNSAID


@dataclass(frozen=True)
class StepFingerprint:
    """Results that a replayed step must reproduce bit by bit; fields as in `StepRecord`."""

    step: int
    loss: float
    grad_norm: float
    digests: tuple[str, ...]


@dataclass(frozen=True)
class StoreAddress:
    """Address of the run's rendezvous store. A restarted store has another address."""

    host: str
    port: int


@dataclass(frozen=True)
class GenerationPlan:
    """Plan of a generation: its members, the placement of experts on ranks, and the source of its state.

    `source` is None for a state that is initialized from the seed, or read from the checkpoint `restore`. Workers of
    the source that are not in `world` send their shards and become standbys. `buddies` lists by rank the rank that
    keeps its snapshots; empty without snapshots. `store_prefix` prefixes the generation's keys in the rendezvous store:
    it contains term and generation, so that processes of earlier generations can't join this world. All members meet
    in the store at `store_address`; a connected world no longer needs it. `micro_batch` is the size of micro-batches,
    by default the job's; `skips` are steps whose batches are left out. `nodes` lists the node of each rank; empty if
    unknown. `replayed`: worlds whose steps this one replays for comparison; digests of its steps are then by their
    ranks.
    """

    term: int
    world: World
    placement: ExpertPlacement
    source: StateSource | None
    store_prefix: str
    store_address: StoreAddress
    buddies: tuple[int, ...] = ()
    verify_digests: bool = True
    restore: Restore | None = None
    micro_batch: MicroBatchSize = UNSAID
    skips: tuple[int, ...] = ()
    nodes: tuple[str, ...] = ()
    replayed: tuple[PastWorld, ...] = ()

    @property
    def generation(self) -> int:
        return self.world.generation

    @property
    def involved(self) -> tuple[str, ...]:
        """Participants of the transition: holders of the state in rank order, then the other members."""
        holders = self.source.holders if self.source else ()
        return tuple(dict.fromkeys(holders + self.world.members))


@dataclass(frozen=True)
class Fence:
    """End of the current generation: after the step `at_step` or, if None, after the first step whose vote shows that
    every member has seen this fence."""

    to_generation: int
    at_step: int | None = None


@dataclass(frozen=True)
class StageStart:
    """Start of a curriculum stage at `first_step`, decided during training and overriding the job's plan. `after` is
    the stage that it ends: the decision is void if another stage has begun by then. Empty: it ends any stage."""

    name: str
    first_step: int
    after: str = ""


@dataclass(frozen=True)
class ReplayTask:
    """Request that a standby alone replays steps from the checkpoint after `step` up to `last_step`. `worlds` trained
    them first, without the batches of `skips`, with the results `findings`. `number` identifies the check."""

    number: int
    worker: str
    step: int
    last_step: int
    worlds: tuple[PastWorld, ...]
    findings: tuple[StepFingerprint, ...] = ()
    skips: tuple[int, ...] = ()


@dataclass(frozen=True)
class Directive:
    """The whole desired state of a worker.

    `current` is the generation being trained (None before the first), `next` the one to be prepared in the
    background, `fence` where current hands over to next. `activated` is the newest generation that may train: a
    worker that is ready for a generation waits until it is activated. `aborted` is the newest generation that must
    stop training because a member failed; workers that wait for a peer in it close the connection. `settled` is the
    newest generation that has committed a step of its own: state of older ones may be freed. `finish` requests a fence,
    a checkpoint and the end. `checkpoint_done` is the newest step whose checkpoint the controller has marked complete.
    `stages` are all decisions so far, in order, and `stages_version` counts them: members apply a decision once all of
    them have seen it; its parts that concern steps before the one after the next are too late and are ignored.
    """

    term: int
    seq: int
    current: GenerationPlan | None = None
    next: GenerationPlan | None = None
    fence: Fence | None = None
    activated: int = -1
    aborted: int = -1
    settled: int = -1
    finish: FinishMode = FinishMode.NO
    checkpoint_done: int = -1
    stages: tuple[StageStart, ...] = ()
    stages_version: int = 0
    check: ReplayTask | None = None


class Phase(StrEnum):
    """Phase of a worker."""

    COLD = "cold"
    WARMING = "warming"
    STANDBY = "standby"  # warm, holds no shard
    TRAINING = "training"
    MOVING = "moving"  # past a fence: transfer and rebuild
    READY = "ready"  # holds its shard of the next generation, waits for activation
    STRANDED = "stranded"  # its generation or the transition from it failed; holds state, waits for a plan
    FINISHED = "finished"  # the last step is done; the final checkpoint is written
    FAILED = "failed"


@dataclass(frozen=True)
class StepRecord:
    """One finished step, as known to every member. Times are `time.time()` seconds."""

    step: int
    generation: int
    world_size: int
    loss: float  # mean over the step's target tokens, nats
    tokens: int  # target tokens in the global batch
    lr: float
    grad_norm: float  # before clipping; inf where the update was skipped
    applied: bool  # False: the update was not finite and was skipped on all ranks, or `skipped`
    first_position: int  # sample positions [first_position, first_position + num_positions)
    num_positions: int
    step_s: float
    vote_time: float
    validation_loss: float | None = None
    data_wait_s: float = 0.0  # part of step_s that the reporting worker's training thread waited for its rows
    protection_wait_s: float = 0.0  # likewise, for its snapshot to reach its buddy
    skipped: bool = False  # its batch was left out because it had made the loss explode
    slowest: int = (
        -1
    )  # rank with the longest compute time per micro-batch, without waits for peers; -1: no two ranks to compare
    slowness: float = 1.0  # its time over the median of the others'
    snapshot_interval: int = 0  # steps between two snapshots at that time; 0: none are taken
    stage: str = ""  # of the curriculum; empty without one
    sequence_length: int = 0  # tokens of its rows, or of the longest; 0 in records from before there were stages
    num_micro_batches: int = 0  # of all workers together
    padding: float = 0.0  # share of the micro-batches' tokens
    traffic: dict[str, Traffic] = field(default_factory=dict)  # by kind, sent by all workers since the vote before
    compression: str = ""  # of its gradients; empty in records from before there was any
    communication_wait_s: float | None = None  # part of step_s spent waiting for peers; None: not measured
    digests: tuple[str, ...] = ()  # by rank, of the state after the step; if training is exact
    experts: ExpertLoad = field(default_factory=ExpertLoad)
    loads: tuple[tuple[int, ...], ...] = ()  # by MoE layer, tokens of each expert; for steps that a heat map shows


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
    """A rank's shard of a checkpoint in run storage; the controller writes the marker once it has all ranks' shards."""

    step: int
    generation: int
    rank: int
    file: str  # name within the checkpoint directory
    sha256: str
    entries: tuple[tuple[str, str, int, int], ...]  # (tensor name, key in the file, start, stop) in elements
    num_bytes: int
    meta: str  # JSON of state that is not a tensor (sampler position, optimizer step); equal on all ranks


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


@dataclass(frozen=True)
class WorkerError:
    """Cause of a worker's failure. `kind` is a stable word: peer_lost, user_error, numeric, out_of_memory, corrupted,
    doubtful (a state received from others), internal."""

    kind: str
    message: str
    traceback: str = ""


@dataclass(frozen=True)
class Report:
    """The whole visible state of a worker.

    `records` are the finished steps after the requested one; `prepared` is the newest generation whose groups this
    worker has connected. `committed` is the newest step of which the votes have shown that two workers hold its state,
    and `settled` the newest generation with such a step. `holdings` are the states in this worker's memory, reported
    once it has stopped; `stopped` is the newest generation that it has left because it or a peer failed, with the cause
    in `error`.
    """

    worker: str
    term: int
    version: int  # grows with every change of this worker's state
    phase: Phase
    generation: int
    step: int  # last finished step; -1 before the first
    seen: int  # seq of the newest directive
    prepared: int = -1
    pid: int = 0
    records: tuple[StepRecord, ...] = ()
    handovers: tuple[Handover, ...] = ()
    shards: tuple[ShardWritten, ...] = ()
    error: WorkerError | None = None
    failed_generation: int = -1  # a generation that could not be reached, while STRANDED
    committed: int = -1
    settled: int = -1
    first_record: int = 0  # the oldest finished step that this worker still has a record of
    stopped: int = -1
    holdings: tuple[Holding, ...] = ()
    rss_bytes: int = 0
    collective: int = 0  # number of collectives that its training thread has entered in this generation
    micro_batches: MicroBatchMemory | None = None
    checked: ReplayResult | None = None
    saturated: Saturation | None = None  # the newest
    numerics: str = ""  # properties that determine the bits of its results, if training is exact
    leaving: bool = False  # it received SIGTERM and will be killed soon
    extra: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class WorkerJob:
    """Constant information of a run for its workers, sent once."""

    run_id: str
    job_json: str  # the JobSpec, as JSON
    store_dir: str  # the packed token store
    storage_dir: str  # the run's directory in run storage
    head_host: str  # address of the cluster's head, where the rendezvous store runs
    threads: int  # torch threads
    orphan_s: float = 60.0  # a worker without contact to a controller for this long exits
    vocab_size: int = 0  # of the trained tokenizer

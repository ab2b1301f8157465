"""Frozen values that cross process borders.

`DesiredRunState` (Scheduler to RunController) and `Directive` (RunController to Worker) each carry the whole desired
state, so the newest wins and a repeat is harmless. `Report` is what a worker answers. Everything carries
(term, generation); a receiver refuses a lower term."""

from dataclasses import dataclass, field
from enum import StrEnum

from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.recovery_point import Holding
from orchestrator.elastic.world import World
from orchestrator.protocol.expert_load import ExpertLoad
from orchestrator.protocol.usage import Traffic
from orchestrator.sampling.micro_batches import UNSAID, MicroBatchSize


class Finish(StrEnum):
    """How a run is asked to end before its last step."""

    NO = "no"
    CANCEL = "cancel"
    PAUSE = "pause"


@dataclass(frozen=True)
class DesiredRunState:
    """What the Scheduler wants a run to be. `by_hand` says that a user asked for this size. `stage` is the stage that
    was asked for last, `next` for the one that comes next, and `stage_wishes` counts how often one was."""

    seq: int
    workers: int
    finish: Finish = Finish.NO
    reason: str = ""
    stage: str = ""
    stage_requests: int = 0
    by_hand: bool = False


@dataclass(frozen=True)
class Restore:
    """A complete checkpoint that state is read from: its last finished step, and its directory.

    `reset_residuals`: what compression of gradients had kept is left there.
    """

    step: int
    path: str
    reset_residuals: bool = False


@dataclass(frozen=True)
class ResumeRequest:
    """The request that a run which has ended, or lost its cluster, goes on. `token` tells repeats from new requests.

    `restore` is None for a run without any checkpoint: it begins again at step 0. `workers` is None for as many as
    were wanted last.
    """

    token: str
    restore: Restore | None
    workers: int | None = None


@dataclass(frozen=True)
class Source:
    """Where a generation's state comes from: the world that has made it, and who holds it.

    `step` is the finished step after which the state is taken; None for the fence that the members of `world` come to.
    `holders` names by rank the worker that has the rank's shard: its own or, after a loss, a buddy's copy.
    """

    world: World
    placement: ExpertPlacement
    holders: tuple[str, ...]
    step: int | None = None


@dataclass(frozen=True)
class PastWorld:
    """A world that has trained steps, from `first_step` on until the next one did, where its experts were, and how much
    its micro-batches took."""

    first_step: int
    world: World
    placement: ExpertPlacement
    micro_batch: MicroBatchSize = UNSAID


@dataclass(frozen=True)
class StepFingerprint:
    """What a step that is done again has to come to, bit by bit: fields as in `StepRecord`."""

    step: int
    loss: float
    grad_norm: float
    digests: tuple[str, ...]


@dataclass(frozen=True)
class StoreAddress:
    """Where the run's rendezvous store listens. One that comes back after its death listens elsewhere."""

    host: str
    port: int


@dataclass(frozen=True)
class GenerationPlan:
    """A generation to come: who is in it, which rank holds which experts, and where its state comes from.

    `source` is None for a state that is made from the seed, or read from the checkpoint `restore`. Workers of the
    source that are not in `world` hand over what they hold and become standbys. `buddies` names by rank the rank that
    keeps its snapshots; empty where nobody does. `store_prefix` names the generation's keys in the rendezvous store: it
    holds term and generation, so nobody of the past can meet this world. All meet in the store at `store_address`; a
    world that has met needs it no more. `micro_batch` is how much a micro-batch takes, as the job says if it says
    nothing; `skips` are steps whose batches are left out. `nodes` names by rank the node that it lives on; empty where
    nobody knows. `replayed`: worlds whose steps this one does again, to be compared: the digests of its steps are those
    of their ranks.
    """

    term: int
    world: World
    placement: ExpertPlacement
    source: Source | None
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
        """Who has a part in the move: the holders of the state in rank order, then the other members."""
        holders = self.source.holders if self.source else ()
        return tuple(dict.fromkeys(holders + self.world.members))


@dataclass(frozen=True)
class Fence:
    """Where the current generation ends: after the step `at_step` has finished, or, if None, after the first
    step whose vote shows that every member has seen this fence."""

    to_generation: int
    at_step: int | None = None


@dataclass(frozen=True)
class StageStart:
    """A stage of the curriculum begins at `first_step`, whatever the job would have had there: it was decided while the
    run trains. `after` is the stage that it ends: if another one has come by then, it is void. Empty: it ends any."""

    name: str
    first_step: int
    after: str = ""


@dataclass(frozen=True)
class ReplayTask:
    """The request that a standby does steps again, alone, from the checkpoint after `step` on up to `last_step`.
    `worlds` did them first, without the batches of `skips`, and came to `findings`. `number` tells one check from
    another."""

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
    train no more, since somebody is lost; whoever waits for a peer in it shuts the connection. `settled` is the newest
    generation that has committed a step of its own: what older ones held may go. `finish` asks for a fence, a
    checkpoint and the end. `checkpoint_done` is the newest step whose checkpoint the controller has marked complete.
    `stages` are all that were decided so far, in order, and `stages_version` counts decisions: members take in one once
    all of them have seen it; what it has of steps before the one after the next comes too late and is left out.
    """

    term: int
    seq: int
    current: GenerationPlan | None = None
    next: GenerationPlan | None = None
    fence: Fence | None = None
    activated: int = -1
    aborted: int = -1
    settled: int = -1
    finish: Finish = Finish.NO
    checkpoint_done: int = -1
    stages: tuple[StageStart, ...] = ()
    stages_version: int = 0
    check: ReplayTask | None = None


class Phase(StrEnum):
    """What a worker is doing."""

    COLD = "cold"
    WARMING = "warming"
    STANDBY = "standby"  # warm, holds no shard
    TRAINING = "training"
    MOVING = "moving"  # past a fence: transfer and rebuild
    READY = "ready"  # holds its shard of the next generation, waits for activation
    STRANDED = "stranded"  # its generation or the move from it has failed; holds state, waits for a plan
    FINISHED = "finished"  # the last step is done; the final checkpoint is written
    FAILED = "failed"


@dataclass(frozen=True)
class StepRecord:
    """One finished step as every member knows it. Times are `time.time()` seconds."""

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
    data_wait_s: float = 0.0  # of step_s, how long the training thread of whoever reports waited for its rows
    protection_wait_s: float = 0.0  # likewise, for its snapshot to be with its buddy
    skipped: bool = False  # its batch was left out, after it had made the loss explode
    slowest: int = (
        -1
    )  # rank that computed longest for a micro-batch, waits for peers apart; -1: there are no two to compare
    slowness: float = 1.0  # its time over the median of the others'
    snapshot_interval: int = 0  # steps between two snapshots when it was done; 0: none are taken
    stage: str = ""  # of the curriculum; empty without one
    sequence_length: int = 0  # tokens of its rows, or of the longest; 0 in records of before there were stages
    num_micro_batches: int = 0  # of all workers together
    padding: float = 0.0  # share of the micro-batches' tokens
    traffic: dict[str, Traffic] = field(default_factory=dict)  # by kind, what all workers sent since the vote before
    compression: str = ""  # of its gradients; empty in records of before there was any
    communication_wait_s: float | None = None  # of step_s, how long it waited for peers; None: it was not measured
    digests: tuple[str, ...] = ()  # by rank, of the state that it led to; where training is exact
    experts: ExpertLoad = field(default_factory=ExpertLoad)
    loads: tuple[tuple[int, ...], ...] = ()  # by MoE layer, tokens of each expert; in steps that a heat map shows


@dataclass(frozen=True)
class Handover:
    """What a worker saw of one rescale, after it became ready for `generation`."""

    generation: int
    step: int  # last finished step of the old generation
    connect_s: float
    build_s: float
    transfer_s: float
    digest_s: float
    sent_bytes: int
    received_bytes: int
    state_identical: bool | None  # None: digests were not taken
    residual_error: float = 0.0  # how far what error feedback keeps, summed over the ranks, has moved, over its norm


@dataclass(frozen=True)
class ShardWritten:
    """A rank's part of a checkpoint lies in run storage; the controller writes the marker when all ranks' do."""

    step: int
    generation: int
    rank: int
    file: str  # name within the checkpoint directory
    sha256: str
    entries: tuple[tuple[str, str, int, int], ...]  # (tensor name, key in the file, start, stop) in elements
    num_bytes: int
    meta: str  # JSON: what is not a tensor (sampler position, optimizer step); equal on all ranks


@dataclass(frozen=True)
class ReplayResult:
    """What a standby has to say of a check: the steps that it has done again, all or, where it was needed elsewhere,
    the first ones; or why it couldn't."""

    number: int
    findings: tuple[StepFingerprint, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class Saturation:
    """Parameters whose gradient was too large on a worker for an exact sum; the step's update was left out."""

    step: int
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class MicroBatchMemory:
    """What the micro-batches of a generation took on a worker, since rows had this length; asked for where
    micro-batches are fitted.

    Args:
        steps: finished so far.
        tokens: of the largest micro-batch, padding included.
        num_micro_batches: of the last step, of all workers together.
        kept_bytes: what a forward pass kept for its backward pass, at most; 0 where that can't be told.
        resident_bytes: what the process has taken: on a CPU, where it keeps what it has freed, the most so far.
        limit_bytes: memory of the host, or of the group of processes that it is confined to, or of the GPU.
        used_bytes: of it, by all processes, without what the system can take back.
        place: what memory that is: workers that name the same one share it.
        is_gpu: it is a GPU's.
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
    """Why a worker failed. `kind` is a stable word: peer_lost, user_error, numeric, out_of_memory, corrupted,
    doubtful (a state that others have brought), internal."""

    kind: str
    message: str
    traceback: str = ""


@dataclass(frozen=True)
class Report:
    """What a worker answers when asked: its whole visible state.

    `records` are the finished steps newer than the asker named; `prepared` is the newest generation whose
    groups this worker has connected. `committed` is the newest step that the votes have shown to be held twice, and
    `settled` the newest generation of which that is known. `holdings` are the states that lie in this worker's memory,
    told once it has stopped; `stopped` is the newest generation that it has left because a peer or itself failed, with
    the cause in `error`.
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
    first_record: int = 0  # the oldest finished step that this worker can tell of
    stopped: int = -1
    holdings: tuple[Holding, ...] = ()
    rss_bytes: int = 0
    collective: int = 0  # collectives that its training thread has entered in this generation
    micro_batches: MicroBatchMemory | None = None
    checked: ReplayResult | None = None
    saturated: Saturation | None = None  # the newest
    numerics: str = ""  # what decides the bits of its results, where they are to be exact
    leaving: bool = False  # it was told to end (SIGTERM), and soon will be made to
    extra: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class WorkerJob:
    """What a worker needs to know of its run, once."""

    run_id: str
    job_json: str  # the JobSpec, as JSON
    store_dir: str  # the packed token store
    storage_dir: str  # the run's directory in run storage
    head_host: str  # where the cluster's head is reached, the rendezvous store's home
    threads: int  # torch threads
    orphan_s: float = 60.0  # a worker that hears from no controller for this long exits
    vocab_size: int = 0  # the trained tokenizer's

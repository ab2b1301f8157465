"""Record of one finished step, by concern: its batch, update, time, communication and routing, and the state after it.

Members write it after the vote; the journal has one per committed step. Times are `time.time()` seconds.
"""

from dataclasses import dataclass, field, replace

from orchestrator.protocol.codec import Compact
from orchestrator.protocol.expert_load import ExpertLoad
from orchestrator.protocol.usage import Traffic

Saliency = tuple[tuple[tuple[float, float], ...], ...]


@dataclass(frozen=True)
class BatchRecord(Compact):
    """The global batch of a step.

    Args:
        tokens: target tokens in it; of chats all tokens, of rows that have none the rows.
        first_position, num_positions: the sample positions [first_position, first_position + num_positions).
        stage: of the curriculum; empty without one.
        sequence_length: tokens of its rows, or of the longest.
        num_micro_batches: of all workers together.
        padding: share of the micro-batches' tokens.
    """

    tokens: int
    first_position: int
    num_positions: int
    stage: str = ""
    sequence_length: int = 0
    num_micro_batches: int = 0
    padding: float = 0.0


@dataclass(frozen=True)
class UpdateRecord(Compact):
    """The optimizer's update in a step.

    Args:
        grad_norm: before clipping; inf where the update was skipped.
        applied: False: the update was not finite and was skipped on all ranks, or `skipped`.
        skipped: the batch was left out because it had made the loss explode.
        sparsity: share of the weights of pruned parameters that are zero after it.
    """

    lr: float
    grad_norm: float
    applied: bool
    skipped: bool = False
    sparsity: float = 0.0


@dataclass(frozen=True)
class StepTiming(Compact):
    """Time of a step, and the parts of it that the reporting worker's training thread waited.

    Args:
        step_s: its duration.
        vote_time: moment of the vote that ended it.
        data_wait_s: part of `step_s` that the thread waited for its rows.
        protection_wait_s: likewise, for copies of its state, and for its snapshot to reach its buddy.
        communication_wait_s: likewise, for peers; None: not measured.
        slowest: rank with the longest compute time per micro-batch, without waits for peers; -1: no two ranks to
            compare.
        slowness: its time over the median of the others'.
    """

    step_s: float
    vote_time: float
    data_wait_s: float = 0.0
    protection_wait_s: float = 0.0
    communication_wait_s: float | None = None
    slowest: int = -1
    slowness: float = 1.0


@dataclass(frozen=True)
class CommunicationRecord(Compact):
    """Bytes between workers.

    Args:
        traffic: by kind, sent by all workers since the vote before.
        compression: of the step's gradients.
    """

    traffic: dict[str, Traffic] = field(default_factory=dict)
    compression: str = ""


@dataclass(frozen=True)
class RoutingRecord(Compact):
    """Load of the experts in a step.

    Args:
        experts: its summary.
        loads: by MoE layer, tokens of each expert; in a journal only for steps that a heat map shows.
        saliency: by MoE layer and expert, averages of the newest steps: sum of the norms of its weighted outputs, and
            its tokens; only of steps by which experts may be chosen.
    """

    experts: ExpertLoad = field(default_factory=ExpertLoad)
    loads: tuple[tuple[int, ...], ...] = ()
    saliency: Saliency = ()


@dataclass(frozen=True)
class StateRecord(Compact):
    """The training state after a step.

    Args:
        digests: by rank; if training is exact.
        snapshot_interval: steps between two snapshots at that time; 0: none are taken.
    """

    digests: tuple[str, ...] = ()
    snapshot_interval: int = 0


@dataclass(frozen=True)
class StepRecord(Compact):
    """One finished step, as known to every member.

    Args:
        loss: mean over the step's units, which are target tokens unless the task has others; nats.
        validation_loss: None in a step without validation.
        metrics, validation_metrics: what the task reports, by name.
    """

    step: int
    generation: int
    world_size: int
    loss: float
    batch: BatchRecord
    update: UpdateRecord
    timing: StepTiming
    validation_loss: float | None = None
    communication: CommunicationRecord = field(default_factory=CommunicationRecord)
    routing: RoutingRecord = field(default_factory=RoutingRecord)
    state: StateRecord = field(default_factory=StateRecord)
    metrics: dict[str, float] = field(default_factory=dict)
    validation_metrics: dict[str, float] = field(default_factory=dict)


def without_loads(record: StepRecord) -> StepRecord:
    """The record without the loads of experts, which take more memory than all else."""
    return replace(record, routing=replace(record.routing, loads=())) if record.routing.loads else record

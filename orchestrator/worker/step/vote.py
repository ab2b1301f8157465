"""The vote: one small all-reduce that ends a step, from which every member draws the same conclusions.

Every rank fills its own places in a vector of zeros, so the sum holds each rank's values and adds no rounding: losses
per micro-batch stay apart until they are summed in micro-batch order, whatever the world size.

Layout of the vector, float64 (integers below 2^53 are exact): loss sum per micro-batch, validation loss sum per
validation micro-batch, expert counts per (layer, expert), histograms of margins per (layer, expert, bin), then per
rank: update applied, generation of the fence it has seen, request to finish, preferred steps between two snapshots,
seconds that it computed for a micro-batch, version of the decided stages that it has seen, number of its preferred
compression, whether a checkpoint is due by its clock, whether it still writes its part of an earlier one. Last, summed
over the ranks: bytes by kind that they have sent since their last votes, and their parts of digests, in halves of 32
bits.
"""

from collections.abc import Mapping
from dataclasses import astuple, dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from orchestrator.comm import collective_stats, traffic_meter
from orchestrator.model.moe.balance import RoutingCounts
from orchestrator.protocol.usage import Traffic, TrafficKind

NO_FENCE = -1
NUM_VOICES = 9
NO_DIGESTS = np.zeros(0, dtype=np.uint64)
HALF = 1 << 32


@dataclass(frozen=True)
class Ballot:
    """One rank's contribution to the vote at the end of a step.

    Args:
        micro_batch_losses: [S], loss sums of this rank's micro-batches, 0 elsewhere.
        validation_losses: [S'], likewise; empty in a step without validation.
        routed: counts of this rank's routers.
        applied: whether its optimizer updated.
        fence: generation to which it is ready to hand over after this step, or `NO_FENCE`.
        finish: it has seen the request to end the run.
        interval: preferred number of steps between two snapshots.
        busy_s: computing time of one of its micro-batches, waits for peers excluded; 0 without a micro-batch.
        stages: version of the decided stages that it has seen.
        traffic: sent since its last vote.
        compression: number of its preferred scheme; -1 if it has none yet.
        checkpoint: by its clock a checkpoint is due after this step.
        is_writing: storage has not yet taken its part of an earlier checkpoint.
        digests: by rank of the requested world, this rank's part (`orchestrator.state.fingerprint`).
    """

    micro_batch_losses: NDArray[np.float64]
    validation_losses: NDArray[np.float64]
    routed: RoutingCounts
    applied: bool
    fence: int = NO_FENCE
    finish: bool = False
    interval: int = 0
    busy_s: float = 0.0
    stages: int = 0
    traffic: Mapping[TrafficKind, Traffic] = field(default_factory=dict)
    compression: int = -1
    checkpoint: bool = False
    is_writing: bool = False
    digests: NDArray[np.uint64] = field(default_factory=NO_DIGESTS.copy)


@dataclass(frozen=True)
class VoteResult:
    """Result of the vote; equal on every rank.

    Args:
        loss_sum: over all micro-batches in micro-batch order, nats.
        validation_loss_sum: None in a step without validation.
        routed: counts of all routers over the whole global batch.
        applied: every rank updated.
        fence: the generation to hand over to now, if every rank named the same one; else `NO_FENCE`.
        finish: every rank has seen the request to end.
        interval: the longest that any rank prefers.
        busy_s: by rank.
        stages: version of the decided stages that every rank has seen; -1 if they have seen different ones.
        traffic: of all ranks together, by kind; kinds of which nothing was sent are left out.
        compression: number of the coarsest scheme that any rank prefers; -1 while any rank has none.
        checkpoint: by any rank's clock a checkpoint is due.
        is_writing: storage has not yet taken some rank's part of an earlier checkpoint.
        digests: by rank, in 16 hexadecimal digits; empty where none were taken.
    """

    loss_sum: float
    validation_loss_sum: float | None
    routed: RoutingCounts
    applied: bool
    fence: int
    finish: bool
    interval: int
    busy_s: tuple[float, ...]
    stages: int
    traffic: dict[str, Traffic]
    compression: int
    checkpoint: bool
    is_writing: bool
    digests: tuple[str, ...] = ()


def vote(
    ballot: Ballot, rank: int, world_size: int, group: dist.ProcessGroup | None, device: torch.device
) -> VoteResult:
    """Hold the vote. Collective over the world. `group` is None in a world of one."""
    num_micro_batches, num_validation = len(ballot.micro_batch_losses), len(ballot.validation_losses)
    counts_LE, margins_LEM = ballot.routed.counts_LE, ballot.routed.margins_LEM
    voices = np.zeros((world_size, NUM_VOICES))
    values = (ballot.applied, ballot.fence, ballot.finish, ballot.interval, ballot.busy_s, ballot.stages)
    voices[rank] = (*values, ballot.compression, ballot.checkpoint, ballot.is_writing)
    sent = [ballot.traffic.get(kind, Traffic()) for kind in TrafficKind]
    traffic = np.array([astuple(each) for each in sent], dtype=np.float64).reshape(-1)
    halves = np.stack([ballot.digests // HALF, ballot.digests % HALF]).astype(np.float64)
    vector = torch.cat(
        [
            torch.from_numpy(ballot.micro_batch_losses),
            torch.from_numpy(ballot.validation_losses),
            counts_LE.reshape(-1).to(torch.float64).cpu(),
            margins_LEM.reshape(-1).to(torch.float64).cpu(),
            torch.from_numpy(voices).reshape(-1),
            torch.from_numpy(traffic),
            torch.from_numpy(halves).reshape(-1),
        ]
    ).to(device)
    collective_stats.enter()
    if group is not None:
        dist.all_reduce(vector, group=group)
        traffic_meter.enter_reduced(TrafficKind.CONTROL, vector, world_size)
    num_counts, num_margins = counts_LE.numel(), margins_LEM.numel()
    sizes = [
        num_micro_batches,
        num_validation,
        num_counts,
        num_margins,
        NUM_VOICES * world_size,
        len(traffic),
        halves.size,
    ]
    parts = torch.split(vector.cpu(), sizes)
    by_rank = parts[4].reshape(world_size, NUM_VOICES).T.tolist()
    applied, fences, finish, intervals, busy_s, stages, schemes, checkpoints, is_writing = by_rank
    return VoteResult(
        loss_sum=sum(parts[0].tolist()),
        validation_loss_sum=sum(parts[1].tolist()) if num_validation else None,
        routed=RoutingCounts(
            parts[2].to(torch.int64).view(counts_LE.shape), parts[3].to(torch.int64).view(margins_LEM.shape)
        ),
        applied=all(applied),
        fence=int(fences[0]) if min(fences) == max(fences) else NO_FENCE,
        finish=all(finish),
        interval=int(max(intervals)),
        busy_s=tuple(busy_s),
        stages=int(stages[0]) if min(stages) == max(stages) else -1,
        traffic={
            kind.value: Traffic(*numbers)
            for kind, numbers in zip(
                TrafficKind, parts[5].to(torch.int64).view(len(TrafficKind), -1).tolist(), strict=True
            )
            if any(numbers)
        },
        compression=int(max(schemes)) if min(schemes) >= 0 else -1,
        checkpoint=any(checkpoints),
        is_writing=any(is_writing),
        digests=tuple(
            f"{(int(high) * HALF + int(low)) % HALF**2:016x}" for high, low in parts[6].reshape(2, -1).T.tolist()
        ),
    )

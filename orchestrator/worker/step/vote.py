"""The vote: one small all-reduce that ends a step, from which every member draws the same conclusions.

Every rank fills its own places in a vector of zeros, so the sum holds each rank's values and adds no rounding: losses
per micro-batch stay apart until they are summed in micro-batch order, whatever the world size.

Layout of the vector, int64. Of one rank's own, as the bits of float64: sums of the loss and of metrics per micro-batch,
the same of validation, and per rank: update applied, generation of the fence it has seen, request to finish,
preferred steps between two snapshots, seconds that it computed for a micro-batch, version of the decided stages that it
has seen, number of its preferred compression, whether a checkpoint is due by its clock, whether it still writes its
part of an earlier one. Summed over the ranks: expert counts per (layer, expert), histograms of margins per (layer,
expert, bin), bytes by kind that they have sent since their last votes, and their parts of digests, modulo 2^64.
"""

from collections.abc import Mapping
from dataclasses import astuple, dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.model.moe.routing.balance import RoutingCounts
from orchestrator.protocol.usage import Traffic, TrafficKind
from orchestrator.worker.step.proven_sum import proven_sum

NO_FENCE = -1
NUM_VOICES = 9
NO_DIGESTS = np.zeros(0, dtype=np.uint64)


@dataclass(frozen=True)
class Ballot:
    """One rank's contribution to the vote at the end of a step.

    Args:
        sums_SM: fp64, of this rank's micro-batches, 0 elsewhere: the sum of the loss, then those of metrics.
        validation_SM: likewise; empty in a step without validation.
        routed: counts of this rank's routers. All three are on the device that trains.
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

    sums_SM: Tensor
    validation_SM: Tensor
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
        sums: of the loss, in nats, and of metrics, over all micro-batches in micro-batch order.
        validation_sums: the same; empty in a step without validation.
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

    sums: tuple[float, ...]
    validation_sums: tuple[float, ...]
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


def vote(ballot: Ballot, rank: int, world_size: int, group: dist.ProcessGroup | None, nonce: int) -> VoteResult:
    """Hold the vote. Collective over the world.

    Args:
        group: None in a world of one.
        nonce: of the step, as from `proven_sum.nonce_of`; the same on all ranks.

    Raises:
        RuntimeError: a peer failed, or the sum isn't that of all ranks.
    """
    voices = np.zeros((world_size, NUM_VOICES))
    values = (ballot.applied, ballot.fence, ballot.finish, ballot.interval, ballot.busy_s, ballot.stages)
    voices[rank] = (*values, ballot.compression, ballot.checkpoint, ballot.is_writing)
    traffic = np.array([astuple(ballot.traffic.get(kind, Traffic())) for kind in TrafficKind], dtype=np.int64)
    from_host = np.concatenate([voices.reshape(-1).view(np.int64), traffic.reshape(-1), ballot.digests.view(np.int64)])
    mine = (
        ballot.sums_SM.view(torch.int64).reshape(-1),
        ballot.validation_SM.view(torch.int64).reshape(-1),
        ballot.routed.flat(),
        _sent_beside(from_host, ballot.routed.counts_LE.device),
    )
    summed = proven_sum(torch.cat(mine), group, nonce)
    losses, validation, routed, on_host = torch.split(summed, [len(part) for part in mine])
    on_host_parts = np.split(on_host.numpy(), [voices.size, voices.size + traffic.size])
    by_rank = on_host_parts[0].view(np.float64).reshape(world_size, NUM_VOICES).T.tolist()
    applied, fences, finish, intervals, busy_s, stages, schemes, checkpoints, is_writing = by_rank
    return VoteResult(
        sums=_in_order(losses, ballot.sums_SM.shape[1]),
        validation_sums=_in_order(validation, ballot.validation_SM.shape[1]),
        routed=ballot.routed.from_flat(routed),
        applied=all(applied),
        fence=int(fences[0]) if min(fences) == max(fences) else NO_FENCE,
        finish=all(finish),
        interval=int(max(intervals)),
        busy_s=tuple(busy_s),
        stages=int(stages[0]) if min(stages) == max(stages) else -1,
        traffic={
            kind.value: Traffic(*numbers)
            for kind, numbers in zip(TrafficKind, on_host_parts[1].reshape(traffic.shape).tolist(), strict=True)
            if any(numbers)
        },
        compression=int(max(schemes)) if min(schemes) >= 0 else -1,
        checkpoint=any(checkpoints),
        is_writing=any(is_writing),
        digests=tuple(f"{digest:016x}" for digest in on_host_parts[2].view(np.uint64).tolist()),
    )


def _in_order(values_N: Tensor, num_columns: int) -> tuple[float, ...]:
    """The sums of each column, row after row; none without rows."""
    columns = values_N.view(torch.float64).reshape(-1, num_columns).T.tolist()
    return tuple(sum(column) for column in columns) if len(values_N) else ()


def _sent_beside(values: NDArray[np.int64], device: torch.device) -> Tensor:
    """Values on the device; the host doesn't wait for the copy."""
    on_host = torch.from_numpy(values)
    return on_host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else on_host

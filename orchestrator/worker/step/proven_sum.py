"""A sum over all ranks that proves itself.

An nccl all-reduce that is aborted doesn't raise: its result may be the input, the sum over some ranks, or left from an
earlier step. A step must not count as finished by such a result. So every element x travels twice, as x and as
nonce - x modulo 2^64, with a nonce of its own for each step: both sums add up to (number of ranks) * nonce only if each
is the sum over all ranks in this step.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from orchestrator.comm import collective_stats, traffic_meter
from orchestrator.protocol.usage import TrafficKind
from orchestrator.worker.runtime.errors import SumNotProven

_MASK = (1 << 64) - 1


def nonce_of(generation: int, step: int) -> int:
    """The nonce of a step in a generation: an odd int64 (splitmix64)."""
    z = ((generation << 40) + step) * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019 & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    odd = (z ^ (z >> 31)) | 1
    return odd - (1 << 64) if odd >> 63 else odd


def proven_sum(values_N: Tensor, group: dist.ProcessGroup | None, nonce: int) -> Tensor:
    """The sums over the ranks of each element, modulo 2^64, in host memory. Collective over `group`; None for a world
    of one.

    Args:
        values_N: int64, on the device of the group.
        nonce: of this sum, as from `nonce_of`; the same on all ranks.

    Raises:
        SumNotProven: the result isn't that of all ranks.
        RuntimeError: a peer failed.
    """
    collective_stats.enter()
    if group is None:
        return values_N.cpu()
    both_2N = torch.stack([values_N, nonce - values_N])
    dist.all_reduce(both_2N, group=group)
    traffic_meter.enter_reduced(TrafficKind.CONTROL, both_2N, group.size())
    return checked(both_2N.cpu(), group.size(), nonce)


def checked(both_2N: Tensor, num_ranks: int, nonce: int) -> Tensor:
    """The first row of what `proven_sum` has summed. Raises SumNotProven."""
    expected = num_ranks * nonce & _MASK
    if bool((both_2N.sum(0) != (expected - (1 << 64) if expected >> 63 else expected)).any()):
        raise SumNotProven("an all-reduce gave a result that isn't the sum over all ranks; it was aborted")
    return both_2N[0]

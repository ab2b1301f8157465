"""Adapter between DeepSpeed's ZeRO optimizer and our reduction: all assumptions on its internals (deepspeed 0.19.8).

The optimizer finds this rank's pieces of the summed gradients where its compiled passes leave theirs, as flat
partitions; its hooks and its own reduction are disabled. The global norm is one small sum over the ranks in place of
two per parameter group, in exact runs a maximum too; gradients that are not finite show in it.
`tests/integration/test_engine.py` compares with stock DeepSpeed, and fails when an upgrade moves any of this.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer, GradPartitionBufferGroup
from torch import Tensor

from orchestrator.comm import collective_stats, traffic_meter
from orchestrator.comm.gradients.exact_sum import largest_of, square_sums, total_square
from orchestrator.protocol.usage import TrafficKind

INVALID = -1.0  # DeepSpeed's value for a norm that is not finite
NORM_BLOCK = 1024  # elements whose squares are added up in fp32; those sums are added up in fp64


class ZeroOptimizerAdapter:
    """Steps a ZeRO 1 or 2 optimizer on gradients that were summed elsewhere.

    Args:
        zero: newly made; its hooks are removed.
        world: all ranks; None for a world of one.
        is_exact: the norm has the same bits however the pieces are cut.
    """

    def __init__(self, zero: Any, world: dist.ProcessGroup | None, is_exact: bool = False) -> None:
        if not isinstance(zero, DeepSpeedZeroOptimizer):
            raise TypeError(f"DeepSpeed made a {type(zero).__name__}; this adapter is for DeepSpeedZeroOptimizer")
        self._zero, self._world, self._is_exact = zero, world, is_exact
        self._norm = torch.zeros(())
        for hook in zero._grad_acc_hooks:
            hook.remove()
        zero._grad_acc_hooks.clear()
        zero.scaled_global_norm = lambda norm_type=2: self._norm
        zero.check_overflow = lambda partition_gradients=True: None

    def step(self, sums: Sequence[Tensor]) -> tuple[bool, float]:
        """
        Args:
            sums: this rank's piece of each parameter group's gradients, fp32; used up.

        Returns:
            whether the update was applied, and the norm before clipping; inf if it wasn't.
        """
        zero = self._zero
        self._norm = self._global_norm(sums)
        zero.averaged_gradients = {index: GradPartitionBufferGroup([piece], piece) for index, piece in enumerate(sums)}
        zero.step()
        if not zero.overflow:
            for flat, ranks in zip(zero.bit16_groups_flat, zero.real_dp_process_group, strict=True):
                traffic_meter.enter_gathered(TrafficKind.PARAMETER, flat, dist.get_world_size(ranks))
        return not zero.overflow, float(zero._global_grad_norm)

    def _global_norm(self, sums: Sequence[Tensor]) -> Tensor:
        """Each element's square counts once, on the rank that updates it."""
        squares = self._exact_square(sums) if self._is_exact else self._square(sums)
        norm = squares.sqrt().float()
        return norm if torch.isfinite(norm) else torch.full_like(norm, INVALID)

    def _square(self, sums: Sequence[Tensor]) -> Tensor:
        return self.over_ranks(square_of(sums), dist.ReduceOp.SUM)

    def _exact_square(self, sums: Sequence[Tensor]) -> Tensor:
        largest = self.over_ranks(largest_of(sums), dist.ReduceOp.MAX)
        return total_square(self.over_ranks(square_sums(sums, largest), dist.ReduceOp.SUM), largest)

    def over_ranks(self, mine: Tensor, op: Any) -> Tensor:
        """The sum or maximum of small tensors of all ranks, in place. Collective over the world."""
        if self._world is not None:
            collective_stats.enter()
            with collective_stats.waiting(mine.device):
                dist.all_reduce(mine, op, group=self._world)
            traffic_meter.enter_reduced(TrafficKind.CONTROL, mine, dist.get_world_size(self._world))
        return mine


def square_of(pieces: Sequence[Tensor]) -> Tensor:
    """The sum of the squares of all elements, fp64. Elements are read once and no copy of them is made, so it takes
    3 ms where fp64 from the beginning takes 60 (16 M elements, two cores); that is left for sums that fp32 can't hold.

    Args:
        pieces: flat, fp32, at least one.
    """
    norms: list[Tensor] = []
    for x_N in pieces:
        whole = len(x_N) // NORM_BLOCK * NORM_BLOCK
        norms.append(torch.linalg.vector_norm(x_N[:whole].view(-1, NORM_BLOCK), dim=1))
        norms.append(torch.linalg.vector_norm(x_N[whole:])[None])
    square = torch.cat(norms).double().square().sum()
    if not torch.isfinite(square):
        square = torch.stack([torch.linalg.vector_norm(x_N, dtype=torch.float64).square() for x_N in pieces]).sum()
    return square

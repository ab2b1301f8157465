"""Token exchange between ranks: an uneven all-to-all that autograd can run backwards.

Shape legend: N = rows sent by this rank, M = rows received, D = hidden size, W = world size.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _AllToAll(torch.autograd.Function):
    """Rows out, rows in; the gradient travels the same way back."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, sent_W: list[int], received_W: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.route = (sent_W, received_W, group)
        y_MD = x_ND.new_empty(sum(received_W), *x_ND.shape[1:])
        dist.all_to_all_single(y_MD, x_ND.contiguous(), received_W, sent_W, group=group)
        return y_MD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_MD,) = grads
        sent_W, received_W, group = ctx.route
        grad_ND = grad_MD.new_empty(sum(sent_W), *grad_MD.shape[1:])
        dist.all_to_all_single(grad_ND, grad_MD.contiguous(), sent_W, received_W, group=group)
        return grad_ND, None, None, None


def exchange_rows(
    x_ND: Tensor, sent_W: Sequence[int], received_W: Sequence[int], group: dist.ProcessGroup | None
) -> Tensor:
    """Send the first `sent_W[0]` rows to rank 0, the next to rank 1, and so on.

    Args:
        x_ND: rows, ordered by destination rank.
        sent_W: rows for each rank.
        received_W: rows from each rank.
        group: the world; None means a world of one, where nothing moves.

    Returns:
        The received rows (M, D), ordered by source rank. Differentiable.
    """
    if group is None:
        return x_ND
    result: Tensor = _AllToAll.apply(x_ND, list(sent_W), list(received_W), group)  # type: ignore[no-untyped-call]
    return result


def gather_counts(counts_E: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Every rank's expert counts (W, E) from this rank's (E)."""
    if group is None:
        return counts_E[None]
    world_size = dist.get_world_size(group)
    counts_WE = counts_E.new_empty(world_size, counts_E.numel())
    dist.all_gather_single(counts_WE, counts_E[None], group=group)
    return counts_WE

"""All experts of a rank by grouped matrix products (`torch.nn.functional.grouped_mm`), for GPUs.

One kernel computes a product for all experts, by offsets that stay on the device: the host waits for no counts. Each
expert's rows are padded to a multiple of `ROWS`, as the kernels need it, and to that many for an expert without copies,
whose gradient is then a product of zeros.

Shape legend: N = tokens, R = copies of tokens, P = R rows and padding, D = hidden size, H = intermediate size,
L = experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from orchestrator.model.moe.gradient_sink import sinks_of

ALIGNED_BYTES = 16  # to which the kernels' operands are aligned
ROWS = 8  # so many bytes of bf16


def can_run(x_ND: Tensor, gate_ups: Sequence[Tensor]) -> bool:
    """Whether these kernels take tokens, and experts with these weights (2H, D). One may not be listed twice."""
    if not (x_ND.is_cuda and x_ND.dtype is torch.bfloat16 and gate_ups):
        return False
    is_aligned = x_ND.shape[1] % ROWS == 0 and gate_ups[0].shape[0] % (2 * ROWS) == 0
    return is_aligned and len({id(weight) for weight in gate_ups}) == len(gate_ups)


def run(
    x_ND: Tensor,
    token_R: Tensor,
    counts_L: Tensor,
    gate_ups: Sequence[Tensor],
    downs: Sequence[Tensor],
    gates_R: Tensor | None,
) -> Tensor:
    """As `orchestrator.model.moe.experts.run_experts`, with weights by expert: (2H, D) and (D, H)."""
    result: Tensor = _Grouped.apply(x_ND, gates_R, token_R, counts_L, *gate_ups, *downs)  # type: ignore[no-untyped-call]
    return result


def stacked(weights: Sequence[Tensor]) -> Tensor:
    """Matrices of one shape as a tensor (L, ...), outside of autograd. They are copied only if they don't lie at equal
    distances in one memory, as in an engine's flat buffer, or if the kernels don't take those."""
    first = weights[0].detach()
    places = [weight.data_ptr() for weight in weights]
    distances = {after - before for before, after in pairwise(places)} or {first.nbytes}
    step, rest = divmod(min(distances), first.element_size())
    is_even = len(distances) == 1 and rest == 0 and step >= first.numel() and first.is_contiguous()
    is_aligned = places[0] % ALIGNED_BYTES == 0 and step * first.element_size() % ALIGNED_BYTES == 0
    is_one = len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
    if is_even and is_aligned and is_one:
        return first.as_strided((len(weights), *first.shape), (step, *first.stride()))
    return torch.stack(list(weights))


@dataclass(frozen=True)
class _Rows:
    """Rows of copies, ordered by expert, with padding after each expert's.

    Args:
        place_R: the row of each copy.
        ends_L: the row after each expert's last one, int32.
        num_rows: P.
    """

    place_R: Tensor
    ends_L: Tensor
    num_rows: int

    @classmethod
    def of(cls, counts_L: Tensor, num_copies: int) -> "_Rows":
        padded_L = ((counts_L + (ROWS - 1)) // ROWS).clamp_(min=1) * ROWS
        ends_L, copies_until_L = padded_L.cumsum(0), counts_L.cumsum(0)
        padding_before_L = ends_L - padded_L - (copies_until_L - counts_L)
        copy_R = torch.arange(num_copies, device=counts_L.device)
        place_R = copy_R + padding_before_L[torch.searchsorted(copies_until_L, copy_R, right=True)]
        num_rows = (num_copies + (ROWS - 1)) // ROWS * ROWS + ROWS * len(counts_L)  # at least the last end
        return cls(place_R, ends_L.int(), num_rows)

    def spread(self, x_RX: Tensor) -> Tensor:
        """Values of the copies (R, ...) as rows (P, ...), with zeros as padding."""
        return x_RX.new_zeros(self.num_rows, *x_RX.shape[1:]).index_copy_(0, self.place_R, x_RX)

    def gather(self, x_PX: Tensor) -> Tensor:
        """The values of the copies among rows."""
        return x_PX.index_select(0, self.place_R)


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, gates_R: Tensor | None, token_R: Tensor, counts_L: Tensor, *weights: Tensor
    ) -> Tensor:
        num_experts = len(counts_L)
        gate_up_LXD, down_LDH = stacked(weights[:num_experts]), stacked(weights[num_experts:])
        rows = _Rows.of(counts_L, len(token_R))
        x_PD = rows.spread(x_ND.index_select(0, token_R))
        before_PX = F.grouped_mm(x_PD, gate_up_LXD.transpose(1, 2), offs=rows.ends_L)  # X = 2H
        gate_PH, up_PH = before_PX.chunk(2, 1)
        inner_PH = F.silu(gate_PH).mul_(up_PH)
        if gates_R is not None:  # before the product, so that its output isn't needed for the gates' gradient
            inner_PH.mul_(rows.spread(gates_R)[:, None])
        y_PD = F.grouped_mm(inner_PH, down_LDH.transpose(1, 2), offs=rows.ends_L)
        ctx.save_for_backward(x_ND, gates_R, token_R, rows.place_R, rows.ends_L, before_PX, *weights)
        ctx.num_rows, ctx.sinks = rows.num_rows, sinks_of(weights)
        return torch.zeros_like(x_ND).index_add_(0, token_R, rows.gather(y_PD))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy_ND,) = grads
        x_ND, gates_R, token_R, place_R, ends_L, before_PX, *weights = ctx.saved_tensors
        rows, num_experts = _Rows(place_R, ends_L, ctx.num_rows), len(ends_L)
        gate_up_LXD, down_LDH = stacked(weights[:num_experts]), stacked(weights[num_experts:])
        gate_PH, up_PH = before_PX.chunk(2, 1)
        silu_PH = F.silu(gate_PH)
        inner_PH = silu_PH * up_PH
        dy_PD = rows.spread(dy_ND.index_select(0, token_R))
        dinner_PH = F.grouped_mm(dy_PD, down_LDH, offs=ends_L)
        dgates_R = None
        if gates_R is not None:
            dgates_R = rows.gather(inner_PH * dinner_PH).sum(1)
            gates_P1 = rows.spread(gates_R)[:, None]
            inner_PH.mul_(gates_P1)
            dinner_PH.mul_(gates_P1)
        ddown_LDH = F.grouped_mm(dy_PD.t(), inner_PH, offs=ends_L)
        dbefore_PX = torch.empty_like(before_PX)
        dgate_PH, dup_PH = dbefore_PX.chunk(2, 1)
        torch.mul(dinner_PH, silu_PH, out=dup_PH)
        torch.ops.aten.silu_backward.grad_input(dinner_PH.mul_(up_PH), gate_PH, grad_input=dgate_PH)
        x_PD = rows.spread(x_ND.index_select(0, token_R))
        dgate_up_LXD = F.grouped_mm(dbefore_PX.t(), x_PD, offs=ends_L)
        dx_PD = F.grouped_mm(dbefore_PX, gate_up_LXD, offs=ends_L)
        dx_ND = torch.zeros_like(x_ND).index_add_(0, token_R, rows.gather(dx_PD))
        dweights: list[Tensor | None] = [*dgate_up_LXD.unbind(0), *ddown_LDH.unbind(0)]
        for number, (sink, dweight) in enumerate(zip(ctx.sinks, dweights, strict=True)):
            if sink is not None and dweight is not None:
                sink.add(dweight)
                dweights[number] = None
        return dx_ND, dgates_R, None, None, *dweights

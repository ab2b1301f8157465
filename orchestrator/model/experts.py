"""Gated MLPs, and many of them at once over the tokens that were routed to each.

An expert's tokens are gathered, run through its two products and added to where they belong before the next expert's
turn, so that all but the products happens in the CPU's caches. One function with a backward pass of its own: it keeps
the inner activations only, gathers the tokens again instead of keeping a copy of each, and makes every expert's
gradient in that expert's size. Measured by `python -m benchmarks.moe_layer`.

Shape legend: N = tokens, R = copies of tokens, C = copies for one expert, D = hidden size, H = intermediate size,
L = experts.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GatedMLP(nn.Module):
    """SwiGLU (arXiv:2002.05202): down(silu(gate(x)) * up(x)), gate and up in one matrix."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(2 * intermediate_size, hidden_size))
        self.down = nn.Parameter(torch.empty(hidden_size, intermediate_size))

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.outer(self.inner(x_ND))

    def inner(self, x_ND: Tensor) -> Tensor:
        """The first half: x (N, D) to the gated activations (N, H)."""
        gate_NH, up_NH = F.linear(x_ND, self.gate_up).chunk(2, dim=-1)
        return F.silu(gate_NH) * up_NH

    def outer(self, inner_NH: Tensor) -> Tensor:
        """The second half, back to (N, D)."""
        return F.linear(inner_NH, self.down)


# Takes a parameter's gradient in parts, as they are computed. A parameter has one as its `gradient_sink` where parts
# are to be added up by something else than autograd (`orchestrator.comm.exact`), which then finds no gradient.
GradientSink = Callable[[Tensor], None]


def run_experts(
    x_ND: Tensor, token_R: Tensor, counts: Sequence[int], experts: Sequence[GatedMLP], gates_R: Tensor | None = None
) -> Tensor:
    """Every copy through its expert, times its gate, added up per token.

    Args:
        x_ND: tokens.
        token_R: the token of each copy, the first expert's copies first, then the second's, and so on.
        counts: copies for each of the L experts; their sum is R.
        experts: one without copies has gradients of zero, not none: a collective may wait for them. One may be there
            several times, with some of its copies each, if its parameters have a `gradient_sink`.
        gates_R: weights of the copies, in the precision of x; None for ones.

    Returns:
        (N, D); zeros for a token without a copy. Differentiable by tokens, gates and experts, once.
    """
    weights = [expert.gate_up for expert in experts] + [expert.down for expert in experts]
    result: Tensor = _Experts.apply(x_ND, gates_R, token_R, list(counts), *weights)  # type: ignore[no-untyped-call]
    return result


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, gates_R: Tensor | None, token_R: Tensor, counts: list[int], *weights: Tensor
    ) -> Tensor:
        gate_ups, downs = weights[: len(counts)], weights[len(counts) :]
        y_ND = torch.zeros_like(x_ND)
        before: list[Tensor] = []  # gate and up, before the activation: all that is kept
        parts = zip(*_by_expert(counts, token_R, gates_R), gate_ups, downs, strict=True)
        for token_C, gates_C1, gate_up, down in parts:
            before_CH = torch.mm(x_ND.index_select(0, token_C), gate_up.t())
            before.append(before_CH)
            gate_CH, up_CH = before_CH.chunk(2, 1)
            inner_CH = F.silu(gate_CH).mul_(up_CH)
            if gates_C1 is not None:  # before the product, so that its output needn't be kept for the gates' gradient
                inner_CH.mul_(gates_C1)
            y_ND.index_add_(0, token_C, torch.mm(inner_CH, down.t()))
        ctx.save_for_backward(x_ND, gates_R, token_R, *before, *weights)
        ctx.counts, ctx.sinks = counts, [getattr(weight, "gradient_sink", None) for weight in weights]
        return y_ND

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy_ND,) = grads
        x_ND, gates_R, token_R, *kept = ctx.saved_tensors
        counts: list[int] = ctx.counts
        before, weights = kept[: len(counts)], kept[len(counts) :]
        gate_ups, downs = weights[: len(counts)], weights[len(counts) :]
        dx_ND = torch.zeros_like(x_ND)
        dgates: list[Tensor] = []
        dweights = _WeightGradients(ctx.sinks)
        parts = zip(*_by_expert(counts, token_R, gates_R), before, gate_ups, downs, strict=True)
        for number, (token_C, gates_C1, before_CH, gate_up, down) in enumerate(parts):
            if ctx.sinks[number] is not None and not len(token_C):
                continue  # one part of several, and nothing in it
            gate_CH, up_CH = before_CH.chunk(2, 1)
            silu_CH = F.silu(gate_CH)
            inner_CH = silu_CH * up_CH
            dy_CD = dy_ND.index_select(0, token_C)
            dinner_CH = torch.mm(dy_CD, down)
            if gates_C1 is not None:
                dgates.append((inner_CH * dinner_CH).sum(1))
                inner_CH.mul_(gates_C1)
                dinner_CH.mul_(gates_C1)
            dweights.add(len(counts) + number, torch.mm(dy_CD.t(), inner_CH))
            dbefore_CH = torch.empty_like(before_CH)
            dgate_CH, dup_CH = dbefore_CH.chunk(2, 1)
            torch.mul(dinner_CH, silu_CH, out=dup_CH)
            torch.ops.aten.silu_backward.grad_input(dinner_CH.mul_(up_CH), gate_CH, grad_input=dgate_CH)
            dweights.add(number, torch.mm(dbefore_CH.t(), x_ND.index_select(0, token_C)))
            dx_ND.index_add_(0, token_C, torch.mm(dbefore_CH, gate_up))
        dgates_R = torch.cat(dgates) if dgates else gates_R  # which is empty then
        return dx_ND, dgates_R, None, None, *dweights.grads


class _WeightGradients:
    """For autograd, those that don't go to their parameter's sink."""

    def __init__(self, sinks: Sequence[GradientSink | None]) -> None:
        self._sinks = sinks
        self.grads: list[Tensor | None] = [None] * len(sinks)

    def add(self, number: int, grad: Tensor) -> None:
        if (sink := self._sinks[number]) is None:
            self.grads[number] = grad
        else:
            sink(grad)


def _by_expert(
    counts: list[int], token_R: Tensor, gates_R: Tensor | None
) -> tuple[Sequence[Tensor], Sequence[Tensor] | Sequence[None]]:
    """Each expert's part, as views: tokens, and gates of the copies (C, 1)."""
    gates = [None] * len(counts) if gates_R is None else torch.split(gates_R[:, None], counts)
    return torch.split(token_R, counts), gates

"""Gated MLPs, and the grouped computation of many of them over the tokens routed to each.

Experts run in groups sized by `AT_ONCE`: a group's tokens are gathered, each expert computes its matrix products, and
elementwise operations cover the whole group, small enough for the CPU's caches. One autograd function with its own
backward pass: it keeps only the inner activations, gathers tokens again instead of keeping copies, and computes each
expert's gradient at that expert's size, directly in the gradient buckets if there are any. Measured by
`python -m benchmarks.moe_layer`. On a GPU, where it can, one kernel computes all experts
(`orchestrator.model.moe.grouped_experts`), but not in float8 (`orchestrator.model.linear.float8`), nor where operands
are rounded (`orchestrator.model.linear.fake_quant`).

Shape legend: N = tokens, R = copies of tokens, C = copies for some experts, D = hidden size, H = intermediate size,
L = experts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.model.linear import float8
from orchestrator.model.linear.fake_quant import FakeQuantizer
from orchestrator.model.linear.low_rank import add_input_gradient, add_outputs, merged, weight_gradients
from orchestrator.model.linear.products import LinearProducts
from orchestrator.model.linear.structure import Structure, UnitSlices
from orchestrator.model.moe import grouped_experts
from orchestrator.model.moe.gradient_sink import GradientSink, sinks_of
from orchestrator.model.moe.routing.saliency import NORM_UNIT
from orchestrator.spec.pruning import NEURONS

# Inner activations, gates and ups, that a group of experts computes together: 4 MB in fp32 suit a CPU's caches.
AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 26}
MATRICES = ("gate_up", "down")  # of a gated MLP
Product = Callable[..., Tensor]  # of two matrices, as `torch.mm`


class GatedMLP(LinearProducts):
    """SwiGLU (arXiv:2002.05202): down(silu(gate(x)) * up(x)), gate and up in one matrix.

    Args:
        num_fused: MLPs of equal width that it is, side by side.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, num_fused: int = 1) -> None:
        super().__init__()
        self._num_fused = num_fused
        self.gate_up = nn.Parameter(torch.empty(2 * intermediate_size, hidden_size))
        self.down = nn.Parameter(torch.empty(hidden_size, intermediate_size))

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.outer(self.inner(x_ND))

    def structures(self) -> tuple[Structure, ...]:
        parts = UnitSlices("gate_up", blocks=2), UnitSlices("down", dim=1)
        return (Structure(NEURONS, self.down.shape[1], parts, self._num_fused),)

    def inner(self, x_ND: Tensor) -> Tensor:
        """The first half: x (N, D) to gated activations (N, H)."""
        gate_NH, up_NH = self.product(x_ND, "gate_up").chunk(2, dim=-1)
        return F.silu(gate_NH) * up_NH

    def outer(self, inner_NH: Tensor) -> Tensor:
        """The second half, back to (N, D)."""
        return self.product(inner_NH, "down")


def run_experts(
    x_ND: Tensor,
    token_R: Tensor,
    counts_L: Tensor,
    experts: Sequence[GatedMLP],
    gates_R: Tensor | None = None,
    may_group: bool = True,
    norms_L: Tensor | None = None,
) -> Tensor:
    """Run every copy through its expert and sum the outputs, times their gates, per token.

    Args:
        x_ND: tokens.
        token_R: the token of each copy, the first expert's copies first, then the second's, and so on.
        counts_L: copies for each of the L experts, int64; their sum is R.
        experts: one without copies gets zero gradients, not None: a collective may wait for them. One may be listed
            several times, with some of its copies each, if its parameters have a `gradient_sink`.
        gates_R: weights of the copies, in the precision of x; None for ones.
        may_group: an expert's products may be computed together with those of others, where that is faster; their bits
            may depend on the others then.
        norms_L: int64, to which the norms of each expert's weighted outputs are added in units of `NORM_UNIT`: integers
            have the same sum in any order. Not where they are grouped.

    Returns:
        (N, D); zeros for a token without a copy. Differentiable once, by tokens, gates and experts.
    """
    gate_ups, downs = [expert.gate_up for expert in experts], [expert.down for expert in experts]
    in_float8 = any(expert.linear is float8.linear for expert in experts)
    adapted = experts[0].adapters if experts else {}
    quantized = experts[0].quantized if experts else {}
    quantizers = {name: each for name, each in quantized.items() if isinstance(each, FakeQuantizer)}
    if len(quantizers) < len(quantized):
        return _one_by_one(x_ND, token_R, counts_L, experts, gates_R)
    if (
        may_group
        and not (in_float8 or adapted or quantized)
        and norms_L is None
        and grouped_experts.can_run(x_ND, gate_ups)
    ):
        return grouped_experts.run(x_ND, token_R, counts_L, gate_ups, downs, gates_R)
    beside = [
        weight for name in adapted for each in experts for weight in (each.adapters[name].A, each.adapters[name].B)
    ]
    scales = {name: adapter.scale for name, adapter in adapted.items()}
    how = _How(counts_L.tolist(), in_float8, scales, norms_L, quantizers)
    result: Tensor = _Experts.apply(x_ND, gates_R, token_R, how, *gate_ups, *downs, *beside)  # type: ignore[no-untyped-call]
    return result


@dataclass(frozen=True)
class _How:
    """What `_Experts` computes beside the tensors.

    Args:
        counts: copies by expert.
        in_float8: whether products are.
        adapters: by the matrices that have adapters, the scale of these.
        norms_L: as of `run_experts`.
        quantizers: by the matrices whose operands are rounded.
    """

    counts: list[int]
    in_float8: bool
    adapters: Mapping[str, float]
    norms_L: Tensor | None
    quantizers: Mapping[str, FakeQuantizer]


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, gates_R: Tensor | None, token_R: Tensor, how: _How, *weights: Tensor) -> Tensor:
        gate_up, down = _matrices(weights, how, float8.mm if how.in_float8 else torch.mm)
        norms_L = how.norms_L
        y_ND = torch.zeros_like(x_ND)
        # Gate and up: the only activations kept for the backward pass.
        before_RH = x_ND.new_empty(len(token_R), weights[0].shape[0] if weights else 0)
        for part in _parts(how.counts, before_RH):
            token_C, before_CH = token_R[part.copies], before_RH[part.copies]
            x_CD = x_ND.index_select(0, token_C)
            x_EcD = part.split(x_CD)
            for number, x_cD, before_cH in zip(part.experts, x_EcD, part.split(before_CH), strict=True):
                gate_up.multiply(number, x_cD, before_cH)
            gate_CH, up_CH = before_CH.chunk(2, 1)
            inner_CH = F.silu(gate_CH).mul_(up_CH)
            if gates_R is not None:  # before the product, so that its output isn't needed for the gates' gradient
                inner_CH.mul_(gates_R[part.copies, None])
            y_CD, y_EcD = x_CD, x_EcD  # reuses the memory
            for number, inner_cH, y_cD in zip(part.experts, part.split(inner_CH), y_EcD, strict=True):
                down.multiply(number, inner_cH, y_cD)
            if norms_L is not None:
                for number, y_cD in zip(part.experts, y_EcD, strict=True):
                    norms_L[number] += _sum_of_norms(y_cD)
            y_ND.index_add_(0, token_C, y_CD)
        ctx.save_for_backward(x_ND, gates_R, token_R, before_RH, *weights)
        ctx.how, ctx.sinks = how, sinks_of(weights)
        return y_ND

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy_ND,) = grads
        x_ND, gates_R, token_R, before_RH, *weights = ctx.saved_tensors
        how: _How = ctx.how
        dx_ND = torch.zeros_like(x_ND)
        dgates_R = None if gates_R is None else torch.empty_like(gates_R)
        mm: Product = partial(float8.mm, of_gradient=True) if how.in_float8 else torch.mm
        gate_up, down = _matrices(weights, how, mm)
        needed = ctx.needs_input_grad[-len(weights) :] if weights else ()
        dweights = _WeightGradients(ctx.sinks, needed, mm if how.in_float8 else None)
        for part in _parts(how.counts, before_RH):
            token_C, before_CH = token_R[part.copies], before_RH[part.copies]
            gate_CH, up_CH = before_CH.chunk(2, 1)
            silu_CH = F.silu(gate_CH)
            inner_CH = silu_CH * up_CH
            dy_CD = dy_ND.index_select(0, token_C)
            dy_EcD = part.split(dy_CD)
            dinner_CH = torch.empty_like(inner_CH)
            for number, dy_cD, dinner_cH in zip(part.experts, dy_EcD, part.split(dinner_CH), strict=True):
                down.multiply_back(number, dy_cD, dinner_cH)
            if gates_R is not None and dgates_R is not None:
                torch.sum(inner_CH * dinner_CH, 1, out=dgates_R[part.copies])
                inner_CH.mul_(gates_R[part.copies, None])
                dinner_CH.mul_(gates_R[part.copies, None])
            for number, dy_cD, inner_cH in zip(part.experts, dy_EcD, part.split(inner_CH), strict=True):
                down.collect(number, dy_cD, inner_cH, dweights)
            dbefore_CH = torch.empty_like(before_CH)
            dgate_CH, dup_CH = dbefore_CH.chunk(2, 1)
            torch.mul(dinner_CH, silu_CH, out=dup_CH)
            torch.ops.aten.silu_backward.grad_input(dinner_CH.mul_(up_CH), gate_CH, grad_input=dgate_CH)
            dx_CD, dx_EcD = dy_CD, dy_EcD  # reuses the memory
            x_EcD = part.split(x_ND.index_select(0, token_C))
            for number, dbefore_cH, x_cD, dx_cD in zip(
                part.experts, part.split(dbefore_CH), x_EcD, dx_EcD, strict=True
            ):
                gate_up.collect(number, dbefore_cH, x_cD, dweights)
                gate_up.multiply_back(number, dbefore_cH, dx_cD)
            dx_ND.index_add_(0, token_C, dx_CD)
        for number, count in enumerate(how.counts):
            for matrix in (gate_up, down) if not count else ():
                matrix.collect_nothing(number, dweights)
        return dx_ND, dgates_R, None, None, *dweights.grads


@dataclass(frozen=True)
class _Matrix:
    """One matrix of every expert, with the adapters beside it: their products.

    Args:
        weights: by expert.
        first: place of the first one among all weights.
        mm: computes a product.
        adapters: A and B by expert; empty: there are none.
        first_adapter: place of the first of these.
        scale: of adapters.
        quantizer: rounds the operands, adapters being merged; gradients are those by rounded operands. None: nothing is
            rounded.
    """

    weights: Sequence[Tensor]
    first: int
    mm: Product
    adapters: Sequence[tuple[Tensor, Tensor]] = ()
    first_adapter: int = 0
    scale: float = 0.0
    quantizer: FakeQuantizer | None = None

    def multiply(self, number: int, x_CK: Tensor, out_CO: Tensor) -> None:
        """An expert's outputs for some inputs."""
        if self.quantizer is not None:
            self.mm(self.quantizer.rounded_inputs(x_CK), self._rounded(self.quantizer, number).t(), out=out_CO)
            return
        self.mm(x_CK, self.weights[number].t(), out=out_CO)
        if self.adapters:
            add_outputs(out_CO, x_CK, *self.adapters[number], self.scale)

    def multiply_back(self, number: int, dy_CO: Tensor, out_CK: Tensor) -> None:
        """The gradient of these inputs."""
        if self.quantizer is not None:
            self.mm(dy_CO, self._rounded(self.quantizer, number), out=out_CK)
            return
        self.mm(dy_CO, self.weights[number], out=out_CK)
        if self.adapters:
            add_input_gradient(out_CK, dy_CO, *self.adapters[number], self.scale)

    def _rounded(self, quantizer: FakeQuantizer, number: int) -> Tensor:
        weight_OK = self.weights[number]
        whole_OK = merged(weight_OK, *self.adapters[number], self.scale) if self.adapters else weight_OK
        return quantizer.rounded_weight(whole_OK).to(weight_OK.dtype)

    def collect(self, number: int, dy_CO: Tensor, x_CK: Tensor, to: "_WeightGradients") -> None:
        """Add the gradients of an expert's weights."""
        if self.quantizer is not None:
            x_CK = self.quantizer.rounded_inputs(x_CK)
        to.add_product(self.first + number, dy_CO.t(), x_CK)
        if self.adapters:
            place = self.first_adapter + 2 * number
            for at, gradient in enumerate(weight_gradients(dy_CO, x_CK, *self.adapters[number], self.scale), place):
                to.add(at, gradient)

    def collect_nothing(self, number: int, to: "_WeightGradients") -> None:
        """Gradients of zeros: autograd may not be given None (`run_experts`)."""
        to.add_nothing(self.first + number, self.weights[number])
        for at, weight in enumerate(self.adapters[number] if self.adapters else (), self.first_adapter + 2 * number):
            to.add_nothing(at, weight)


def _matrices(weights: Sequence[Tensor], how: _How, mm: Product) -> list[_Matrix]:
    """Those of gate and up, and of down, from all weights in the order of `_Experts`."""
    found, count, end = [], len(how.counts), 2 * len(how.counts)
    for nth, name in enumerate(MATRICES):
        own, quantizer = weights[nth * count : (nth + 1) * count], how.quantizers.get(name)
        if name in how.adapters:
            beside = weights[end : end + 2 * count]
            adapters = list(zip(beside[::2], beside[1::2], strict=True))
            found.append(_Matrix(own, nth * count, mm, adapters, end, how.adapters[name], quantizer))
            end += 2 * count
        else:
            found.append(_Matrix(own, nth * count, mm, quantizer=quantizer))
    return found


def _one_by_one(
    x_ND: Tensor, token_R: Tensor, counts_L: Tensor, experts: Sequence[GatedMLP], gates_R: Tensor | None
) -> Tensor:
    """`run_experts` of experts whose matrices are integers, for inference: each computes its own products."""
    y_ND, begin = torch.zeros_like(x_ND), 0
    for expert, count in zip(experts, counts_L.tolist(), strict=True):
        if count:
            copies = slice(begin, begin + count)
            inner_cH = expert.inner(x_ND.index_select(0, token_R[copies]))
            if gates_R is not None:
                inner_cH.mul_(gates_R[copies, None])
            y_ND.index_add_(0, token_R[copies], expert.outer(inner_cH))
        begin += count
    return y_ND


def _sum_of_norms(y_CD: Tensor) -> Tensor:
    """Sum of the rows' norms, in units of `NORM_UNIT`."""
    norms_C: Tensor = torch.linalg.vector_norm(y_CD, dim=1, dtype=torch.float32)
    return (norms_C.double() / NORM_UNIT).round().long().sum()


@dataclass(frozen=True)
class _Part:
    """Some of the experts with copies, in order, and their copies."""

    experts: list[int]
    copies: slice
    counts: list[int]

    def split(self, x_CX: Tensor) -> tuple[Tensor, ...]:
        """Each expert's rows, which share the memory."""
        return x_CX.split_with_sizes(self.counts)


def _parts(counts: Sequence[int], before_RH: Tensor) -> Iterator[_Part]:
    """All experts with copies, in groups of at most `AT_ONCE` inner activations, or of a single expert."""
    most = AT_ONCE.get(before_RH.device.type, AT_ONCE["cuda"]) // max(before_RH.shape[1], 1)
    experts: list[int] = []
    begin = end = 0
    for expert, count in enumerate(counts):
        if experts and end + count - begin > most:
            yield _Part(experts, slice(begin, end), [counts[number] for number in experts])
            experts, begin = [], end
        if count:
            experts.append(expert)
            end += count
    if experts:
        yield _Part(experts, slice(begin, end), [counts[number] for number in experts])


class _WeightGradients:
    """Collects weight gradients for autograd, except those that go to their parameter's sink.

    Args:
        needed: by weight, whether it is trained.
        product: how they are computed; None: as the sinks do.
    """

    def __init__(self, sinks: Sequence[GradientSink | None], needed: Sequence[bool], product: Product | None) -> None:
        self._sinks, self._needed, self._product = sinks, needed, product
        self.grads: list[Tensor | None] = [None] * len(sinks)

    def add_product(self, number: int, left: Tensor, right: Tensor) -> None:
        if not self._needed[number]:
            return
        if (sink := self._sinks[number]) is None or self._product is not None:
            self.add(number, (self._product or torch.mm)(left, right))
        else:
            sink.add_product(left, right)

    def add(self, number: int, gradient: Tensor) -> None:
        if not self._needed[number]:
            return
        if (sink := self._sinks[number]) is None:
            self.grads[number] = gradient
        else:
            sink.add(gradient)

    def add_nothing(self, number: int, weight: Tensor) -> None:
        if self._needed[number] and self._sinks[number] is None:
            self.grads[number] = torch.zeros_like(weight)

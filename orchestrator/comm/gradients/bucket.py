"""One bucket of gradients, which are reduced together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from orchestrator.comm.gradients.exact_sum import add_rounded, put_rounded
from orchestrator.comm.gradients.reduce_scatter import Reducer, Reduction


class Bucket:
    """Parameters whose gradients are summed together, contiguous in memory.

    Args:
        params: in memory order; may be empty.
        numel: size of the bucket, a multiple of the reduction's pieces. Elements between and after the parameters are
            0.
        reduction: over the ranks that have these parameters.
        feedback: keep what compression did not send for the next step (error feedback).
        momentum: momentum applied to gradients before compression, if not 0.
        largest_term: if given, the sum is exact (`orchestrator.comm.gradients.exact_sum`) and sent in fp64. It is NaN
            where a gradient of one micro-batch exceeds this value.
        starts: the element at which each parameter begins; None: they lie end to end.
    """

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        numel: int,
        reduction: Reducer,
        device: torch.device,
        feedback: bool = False,
        momentum: float = 0.0,
        largest_term: float | None = None,
        starts: Sequence[int] | None = None,
    ) -> None:
        sizes = [param.numel() for param in params]
        begins = [0, *accumulate(sizes)][: len(sizes)] if starts is None else list(starts)
        self._spans = [(begin, begin + size) for begin, size in zip(begins, sizes, strict=True)]
        end = self._spans[-1][1] if self._spans else 0
        if numel < end or numel % reduction.num_pieces:
            rule = f"at least that of its parameters, {end}, and a multiple of {reduction.num_pieces} pieces"
            raise ValueError(f"a bucket of {numel} elements; its size is {rule}")
        self.params, self.reduction, self._numel = params, reduction, numel
        borders = [0, *(border for span in self._spans for border in span), numel]
        self._gaps = [(low, high) for low, high in zip(borders[::2], borders[1::2], strict=True) if low < high]
        self._device = device
        # Gradients of this rank that earlier steps did not send, and their momentum. Only transfers write to these
        # tensors: a snapshot may still be reading them when their successors exist.
        self.residual = torch.zeros(numel, dtype=torch.float32, device=device) if feedback else None
        self.velocity = torch.zeros(numel, dtype=torch.float32, device=device) if momentum else None
        self._momentum = momentum
        self._largest_term, self._dtype = largest_term, torch.float32 if largest_term is None else torch.float64
        self._too_large_P = torch.zeros(len(params), dtype=torch.bool, device=device)
        self._first_P = torch.tensor(begins, dtype=torch.int64, device=device)
        # Which parameters' gradients exceeded the largest term since the newest sums were taken.
        self.saturated_P = torch.zeros(len(params), dtype=torch.bool, device=device)
        self._rest: Tensor | None = None  # replaces the residual once the step's update is applied
        self._moving: Tensor | None = None
        self._flat: Tensor | None = None
        self._filled = [False] * len(params)  # has a gradient in `_flat`
        self._missing = len(params)  # gradients that this micro-batch has not produced yet
        self._under_way: Reduction | None = None
        self._sum: Tensor | None = None

    @property
    def is_complete(self) -> bool:
        """Whether this micro-batch has produced every gradient."""
        return self._missing == 0

    def begin_micro_batch(self) -> None:
        self._missing = len(self.params)

    def take(self, nth: int) -> None:
        """Add the gradient that autograd has just accumulated for the n-th parameter, unless it came as products: this
        micro-batch produces no more of it."""
        param = self.params[nth]
        if param.grad is not None:
            self.add(nth, param.grad)
        self._missing -= 1
        param.grad = None

    def add_product(self, nth: int, left: Tensor, right: Tensor) -> None:
        """Add a part of the n-th parameter's gradient, given as the product of two matrices. Where terms need no
        rounding and precisions match, it is computed in the bucket's memory: one write, no separate read and add."""
        if self._largest_term is not None or left.dtype != self._dtype:
            self.add(nth, torch.mm(left, right))
            return
        here = self._place(nth).view(left.shape[0], right.shape[1])
        if self._filled[nth]:
            here.addmm_(left, right)
        else:
            torch.mm(left, right, out=here)
        self._filled[nth] = True

    def _place(self, nth: int) -> Tensor:
        """The n-th parameter's gradient in the bucket, flat. Allocates the bucket's memory if needed."""
        if self._flat is None:
            self._flat = torch.empty(self._numel, dtype=self._dtype, device=self._device)
        return self._flat[slice(*self._spans[nth])]

    def add(self, nth: int, grad: Tensor) -> None:
        """Add a part of the n-th parameter's gradient."""
        here, term = self._place(nth), grad.reshape(-1)
        if self._largest_term is not None:
            (add_rounded if self._filled[nth] else put_rounded)(here, term)
            low, high = term.aminmax()
            self._too_large_P[nth].logical_or_(torch.maximum(-low, high) > self._largest_term)
        elif self._filled[nth]:
            here.add_(term)
        else:
            here.copy_(term)
        self._filled[nth] = True

    def start(self) -> None:
        """Start the reduction; parameters without a gradient contribute zeros."""
        if self._flat is None:
            self._flat = torch.zeros(self._numel, dtype=self._dtype, device=self._device)
        else:
            for gap in self._gaps:
                self._flat[slice(*gap)].zero_()
            for filled, span in zip(self._filled, self._spans, strict=True):
                if not filled:
                    self._flat[slice(*span)].zero_()
        if self._largest_term is not None:
            self._give_up(self._flat)
        if self.velocity is not None:
            self._moving = self._flat.add_(self.velocity, alpha=self._momentum).clone()
        if self.residual is not None:
            self._flat.add_(self.residual if self._rest is None else self._rest)
            self._rest = self._flat
        self._under_way = self.reduction.start(self._flat, self._moving)
        self._flat = None
        self._filled = [False] * len(self.params)

    def _give_up(self, flat: Tensor) -> None:
        """Mark terms that were too large with NaN, so that every rank learns that the sum is invalid. The host doesn't
        wait to know which."""
        flat[self._first_P] = flat[self._first_P].masked_fill(self._too_large_P, float("nan"))
        self.saturated_P.logical_or_(self._too_large_P)
        self._too_large_P.zero_()

    @property
    def is_under_way(self) -> bool:
        """Whether it was sent and has not completed yet."""
        if self._under_way is not None and self._under_way.is_done():
            self.end()  # frees its memory
        return self._under_way is not None

    def go_on(self) -> None:
        """Start the second collective of the running reduction, if it has one."""
        if self._under_way is not None:
            self._under_way.go_on()

    def end(self) -> None:
        """Wait for the running reduction, if any."""
        if self._under_way is not None:
            total = self._under_way.wait()
            self._under_way = None
            self._sum = total if self._sum is None else self._sum.add_(total)

    def take_sum(self) -> Tensor:
        """This rank's piece of the sum over ranks and micro-batches, fp32. The next sum starts empty."""
        self.end()
        total, self._sum = self._sum, None
        assert total is not None, "a bucket was asked for its sum before it was started"
        return total.float()

    def settle(self, applied: bool) -> None:
        """Commit the residual and momentum if the step's update was applied; otherwise keep the previous ones."""
        if applied and self._rest is not None:
            self.residual = self._rest
        if applied and self._moving is not None:
            self.velocity = self._moving
        self._rest = self._moving = None

    def spans(self) -> Iterator[tuple[nn.Parameter, slice]]:
        """Each parameter with its range of elements in the bucket."""
        return ((param, slice(*span)) for param, span in zip(self.params, self._spans, strict=True))


@dataclass(frozen=True)
class BucketSink:
    """Accumulates the gradient of a bucket's n-th parameter: a `GradientSink`."""

    bucket: Bucket
    nth: int

    def add(self, grad: Tensor) -> None:
        self.bucket.add(self.nth, grad)

    def add_product(self, left: Tensor, right: Tensor) -> None:
        self.bucket.add_product(self.nth, left, right)

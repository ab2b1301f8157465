"""Gradients on their way into sums: bucket by bucket, while the backward pass goes on.

Each parameter's gradient is added to its bucket as soon as autograd has it, in fp32; one that is a product of matrices
may be made there (as Megatron-LM's `gradient_accumulation_fusion` does). In the last micro-batch of a step a bucket
that is complete is under way at once, so that all but the last of them travel while others are computed. Ranks begin
them in one order, that of the list, whatever order autograd comes in: else they would add up what doesn't belong
together, or wait for ever. Tokens go before them (`orchestrator.comm.tokens.link_priority`). Where sums must be exact,
gradients are rounded as they are added, and sums are made in fp64 (`orchestrator.comm.gradients.exact_sum`).
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from orchestrator.comm.gradients.exact_sum import add_rounded, put_rounded
from orchestrator.comm.gradients.reduce_scatter import Reducer, Reduction
from orchestrator.comm.tokens import link_priority
from orchestrator.elastic.bucket_partition import UNDER_WAY

LAG = UNDER_WAY // 2  # buckets that begin before a second collective follows the first one of a bucket


class Bucket:
    """Parameters whose gradients are summed together, end to end in memory.

    Args:
        params: in their order; there may be none.
        numel: of the bucket, a multiple of the reduction's pieces. What lies behind the parameters is 0.
        reduction: over the ranks that have these parameters.
        feedback: what was not sent is kept for the next step.
        momentum: of gradients as they are gathered, where not 0.
        largest_term: given, the sum is one of `orchestrator.comm.gradients.exact_sum`, and fp64 travels. It is NaN
            where a gradient of one micro-batch is larger.
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
    ) -> None:
        ends = [0]
        for param in params:
            ends.append(ends[-1] + param.numel())
        if numel < ends[-1] or numel % reduction.num_pieces:
            rule = f"at least that of its parameters, {ends[-1]}, and a multiple of {reduction.num_pieces} pieces"
            raise ValueError(f"a bucket of {numel} elements; its size is {rule}")
        self.params, self.reduction = params, reduction
        self._spans, self._end, self._numel = list(pairwise(ends)), ends[-1], numel
        self._device = device
        # What steps before have not sent of this rank's gradients, and their momentum. Never written to, but in a
        # transfer: a snapshot may still be reading them when the next ones are there.
        self.residual = torch.zeros(numel, dtype=torch.float32, device=device) if feedback else None
        self.velocity = torch.zeros(numel, dtype=torch.float32, device=device) if momentum else None
        self._momentum = momentum
        self._largest_term, self._dtype = largest_term, torch.float32 if largest_term is None else torch.float64
        self._too_large = torch.zeros(len(params), dtype=torch.bool, device=device)
        self.saturated: list[nn.Parameter] = []  # of the newest sum: a gradient was larger than a term may be
        self._rest: Tensor | None = None  # what takes their place once the step's update is applied
        self._moving: Tensor | None = None
        self._flat: Tensor | None = None
        self._filled = [False] * len(params)  # has a gradient in `_flat`
        self._missing = len(params)  # gradients that this micro-batch has not brought yet
        self._under_way: Reduction | None = None
        self._sum: Tensor | None = None

    @property
    def is_complete(self) -> bool:
        """This micro-batch has brought every gradient."""
        return self._missing == 0

    def begin_micro_batch(self) -> None:
        self._missing = len(self.params)

    def take(self, nth: int) -> None:
        """Add the gradient that autograd has just left with the n-th parameter, if it wasn't brought as products: this
        micro-batch has no more of it."""
        param = self.params[nth]
        if param.grad is not None:
            self._add(nth, param.grad)
        self._missing -= 1
        param.grad = None

    def add_product(self, nth: int, left: Tensor, right: Tensor) -> None:
        """Add a part of the n-th parameter's gradient, the product of two matrices. It is made in the bucket's memory
        where terms are added as they are, in its precision: written there once instead of made, read and added."""
        if self._largest_term is not None or left.dtype != self._dtype:
            self._add(nth, torch.mm(left, right))
            return
        here = self._place(nth).view(left.shape[0], right.shape[1])
        if self._filled[nth]:
            here.addmm_(left, right)
        else:
            torch.mm(left, right, out=here)
        self._filled[nth] = True

    def _place(self, nth: int) -> Tensor:
        """Of the n-th parameter's gradient, flat."""
        if self._flat is None:
            self._flat = torch.empty(self._numel, dtype=self._dtype, device=self._device)
        return self._flat[slice(*self._spans[nth])]

    def _add(self, nth: int, grad: Tensor) -> None:
        here, term = self._place(nth), grad.view(-1)
        if self._largest_term is not None:
            (add_rounded if self._filled[nth] else put_rounded)(here, term)
            low, high = term.aminmax()
            self._too_large[nth].logical_or_(torch.maximum(-low, high) > self._largest_term)
        elif self._filled[nth]:
            here.add_(term)
        else:
            here.copy_(term)
        self._filled[nth] = True

    def start(self) -> None:
        """Send what there is; a parameter without a gradient has one of zeros."""
        if self._flat is None:
            self._flat = torch.zeros(self._numel, dtype=self._dtype, device=self._device)
        else:
            self._flat[self._end :].zero_()
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
        """Where a term was too large, every rank is to know that the sum can't be had."""
        for nth in self._too_large.nonzero().flatten().tolist():
            flat[self._spans[nth][0]] = float("nan")
            self.saturated.append(self.params[nth])
        self._too_large.zero_()

    @property
    def is_under_way(self) -> bool:
        """Sent, and not yet seen to have arrived."""
        if self._under_way is not None and self._under_way.is_done():
            self.end()  # its memory is free then
        return self._under_way is not None

    def go_on(self) -> None:
        """Begin what follows upon what is under way, if anything does."""
        if self._under_way is not None:
            self._under_way.go_on()

    def end(self) -> None:
        """Wait for what is under way, if anything is."""
        if self._under_way is not None:
            total = self._under_way.wait()
            self._under_way = None
            self._sum = total if self._sum is None else self._sum.add_(total)

    def take_sum(self) -> Tensor:
        """This rank's piece of the sum over ranks and micro-batches, fp32. The next one begins from nothing."""
        self.end()
        total, self._sum = self._sum, None
        assert total is not None, "a bucket was asked for its sum before it was started"
        return total.float()

    def settle(self, applied: bool) -> None:
        """The step's update was applied, or wasn't: then what it had taken of the residual is there again."""
        if applied and self._rest is not None:
            self.residual = self._rest
        if applied and self._moving is not None:
            self.velocity = self._moving
        self._rest = self._moving = None

    def spans(self) -> Iterator[tuple[nn.Parameter, slice]]:
        """Where each parameter's elements lie."""
        return ((param, slice(*span)) for param, span in zip(self.params, self._spans, strict=True))


def noop() -> None:
    """What is left to do."""


class Buckets:
    """All gradients of a rank.

    Args:
        buckets: in the order in which they are sent, the same on all ranks of a bucket; the backward pass should come
            to the first ones first.
        every_slot: send what each micro-batch brings and keep only this rank's pieces, as ZeRO 2 does; else a step's
            micro-batches are added up here and sent once.
        overlap: send during the backward pass; else after it, with the same result.
    """

    def __init__(self, buckets: Sequence[Bucket], every_micro_batch: bool, overlap: bool) -> None:
        self.buckets = buckets
        self._every_micro_batch, self.overlap = every_micro_batch, overlap
        self._sends = False  # in this micro-batch
        self._next = 0
        self._stop_listening = link_priority.listen(self._send_complete)
        self._travelling: list[Bucket] = []
        self._begun: list[Bucket] = []  # whose second collective hasn't begun, if they have one
        for bucket in buckets:
            for nth, param in enumerate(bucket.params):
                param.gradient_sink = partial(bucket.add_product, nth)  # type: ignore[attr-defined]
        self._hooks = [
            param.register_post_accumulate_grad_hook(self._hook(bucket, nth))  # type: ignore[no-untyped-call]
            for bucket in buckets
            for nth, param in enumerate(bucket.params)
        ]

    def begin_micro_batch(self, last: bool) -> None:
        """Called before a micro-batch's backward pass; `last` of its step."""
        self._sends, self._next = last or self._every_micro_batch, 0
        for bucket in self.buckets:
            bucket.begin_micro_batch()

    def end_micro_batch(self) -> None:
        """Called after it: what it brought no gradient for is sent too."""
        if self._sends:
            self._send(len(self.buckets))
            self._sends = False
            while self._begun:
                self._begun.pop(0).go_on()

    def sums(self) -> list[Tensor]:
        """This rank's piece of each bucket's sum, in order. Called after the last micro-batch; waits for what is under
        way."""
        return [bucket.take_sum() for bucket in self.buckets]

    def settle(self, applied: bool) -> None:
        """Called after the step's update, or where it was left out."""
        for bucket in self.buckets:
            bucket.settle(applied)

    def close(self) -> None:
        """Let go of everything: connections end once nothing refers to their groups."""
        self._stop_listening()
        self._stop_listening = noop
        for hook in self._hooks:
            hook.remove()
        for bucket in self.buckets:
            for param in bucket.params:
                del param.gradient_sink  # type: ignore[attr-defined]
        self._hooks, self.buckets, self._travelling, self._begun = [], [], [], []

    def _hook(self, bucket: Bucket, nth: int) -> Callable[[Tensor], None]:
        def taken(_: Tensor) -> None:
            bucket.take(nth)
            if bucket.is_complete and not link_priority.to_come():
                self._send_complete()

        return taken

    def _send_complete(self) -> None:
        """What the backward pass has come to, in the order of the list."""
        if self._sends and self.overlap:
            complete = self._next
            while complete < len(self.buckets) and self.buckets[complete].is_complete:
                complete += 1
            self._send(complete)

    def _send(self, until: int) -> None:
        for bucket in self.buckets[self._next : until]:
            bucket.end()  # of the micro-batch before
            self._travelling = [other for other in self._travelling if other.is_under_way]
            if len(self._travelling) == UNDER_WAY:
                self._travelling.pop(0).end()
            if len(self._begun) == LAG:
                self._begun.pop(0).go_on()
            bucket.start()
            self._travelling.append(bucket)
            self._begun.append(bucket)
        self._next = max(self._next, until)

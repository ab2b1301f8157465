"""Gradient buckets, summed over ranks while the backward pass continues.

Each parameter's gradient is added in fp32 to its bucket as soon as autograd produces it; a gradient that is a matrix
product can be computed in the bucket's memory (as in Megatron-LM's `gradient_accumulation_fusion`). In the last
micro-batch of a step a complete bucket is sent at once, so all buckets but the last overlap with computation. Each rank
starts buckets in the order of the list, whatever order autograd reaches them in: otherwise ranks would sum buckets that
don't correspond, or deadlock. Tokens have priority on the links (`orchestrator.comm.tokens.link_priority`). Where sums
must be exact, gradients are rounded as they are added, and summed in fp64 (`orchestrator.comm.gradients.exact_sum`).
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from orchestrator.comm.gradients.bucket import Bucket, BucketSink
from orchestrator.comm.tokens import link_priority
from orchestrator.elastic.bucket_partition import UNDER_WAY

LAG = UNDER_WAY // 2  # buckets started between the first and the second collective of a bucket


def noop() -> None:
    """Placeholder for a callback that is no longer registered."""


class Buckets:
    """All gradient buckets of a rank.

    Args:
        buckets: in sending order, the same on all ranks of a bucket; the backward pass should reach the first ones
            first.
        every_micro_batch: reduce after each micro-batch and keep only this rank's pieces, as in ZeRO 2; otherwise
            accumulate a step's micro-batches locally and reduce once.
        overlap: send during the backward pass; otherwise after it, with the same result.
        after_tokens: send no bucket before the last tokens of a backward pass.
    """

    def __init__(
        self, buckets: Sequence[Bucket], every_micro_batch: bool, overlap: bool, after_tokens: bool = False
    ) -> None:
        self.buckets = buckets
        self._every_micro_batch, self.overlap, self._after_tokens = every_micro_batch, overlap, after_tokens
        self._sends = False  # in this micro-batch
        self._next = 0
        self._stop_listening = link_priority.listen(self._send_complete)
        self._travelling: list[Bucket] = []
        self._begun: list[Bucket] = []  # buckets whose second collective, if they have one, hasn't started
        for bucket in buckets:
            for nth, param in enumerate(bucket.params):
                param.gradient_sink = BucketSink(bucket, nth)  # type: ignore[attr-defined]
        self._hooks = [
            param.register_post_accumulate_grad_hook(self._hook(bucket, nth))  # type: ignore[no-untyped-call]
            for bucket in buckets
            for nth, param in enumerate(bucket.params)
        ]

    def begin_micro_batch(self, last: bool) -> None:
        """Prepare for a micro-batch's backward pass; `last` if it is the last of its step."""
        self._sends, self._next = last or self._every_micro_batch, 0
        for bucket in self.buckets:
            bucket.begin_micro_batch()

    def end_micro_batch(self) -> None:
        """Send the remaining buckets after the backward pass, including those with missing gradients."""
        if self._sends:
            self._send(len(self.buckets))
            self._sends = False
            while self._begun:
                self._begun.pop(0).go_on()

    def sums(self) -> list[Tensor]:
        """This rank's piece of each bucket's sum, in order. Call after the last micro-batch; waits for running
        reductions."""
        return [bucket.take_sum() for bucket in self.buckets]

    def settle(self, applied: bool) -> None:
        """Call after the step's update, or after skipping it."""
        for bucket in self.buckets:
            bucket.settle(applied)

    def close(self) -> None:
        """Release all references: connections close once nothing refers to their groups."""
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
        """Send the complete buckets at the head of the list, in order."""
        if self._sends and self.overlap and not (self._after_tokens and link_priority.to_come()):
            complete = self._next
            while complete < len(self.buckets) and self.buckets[complete].is_complete:
                complete += 1
            self._send(complete)

    def _send(self, until: int) -> None:
        for bucket in self.buckets[self._next : until]:
            bucket.end()  # the previous micro-batch's reduction
            self._travelling = [other for other in self._travelling if other.is_under_way]
            if len(self._travelling) == UNDER_WAY:
                self._travelling.pop(0).end()
            if len(self._begun) == LAG:
                self._begun.pop(0).go_on()
            bucket.start()
            self._travelling.append(bucket)
            self._begun.append(bucket)
        self._next = max(self._next, until)

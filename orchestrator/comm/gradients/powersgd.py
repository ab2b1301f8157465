"""PowerSGD (Vogels et al., 2019): a gradient matrix as the product of two thin ones.

One step of power iteration per update, which starts from the previous result: P = sum of M Q over the ranks, made
orthonormal, then Q = sum of M^T P; P Q^T approximates the sum of all M. Every rank has both factors and computes the
piece that it updates.

Shape legend: N = rows, M = columns, K = columns of the thin matrices.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from orchestrator.comm import collective_stats, traffic_meter
from orchestrator.comm.gradients.reduce_scatter import LocalReduction, Reducer, Reduction
from orchestrator.protocol.usage import TrafficKind


@dataclass(frozen=True)
class Matrix:
    """A parameter's gradient within a bucket.

    Args:
        start: its first element in the bucket.
        rows, columns: N, M.
        rank: K.
    """

    start: int
    rows: int
    columns: int
    rank: int

    @property
    def stop(self) -> int:
        return self.start + self.rows * self.columns

    def of(self, flat: Tensor) -> Tensor:
        """This matrix as a view of the bucket (N, M)."""
        return flat[self.start : self.stop].view(self.rows, self.columns)


class PowerSGD(Reducer):
    """PowerSGD for one bucket.

    Args:
        matrices: in the bucket; elements between and after them are padding.
        keeps_rest: leave the approximation error in the terms.
    """

    def __init__(self, group: dist.ProcessGroup, everyone: bool, matrices: Sequence[Matrix], keeps_rest: bool) -> None:
        super().__init__(group, everyone)
        self.matrices, self._keeps_rest = matrices, keeps_rest
        self.thin_MK: list[Tensor] = []  # Q, by matrix: the start of the next update
        self._fresh_MK: list[Tensor] = []

    def start(self, flat: Tensor, cleared: Tensor | None = None) -> Reduction:
        if self.num_pieces == 1:
            return LocalReduction(flat, self._keeps_rest)
        return _Iteration(self, flat)

    def settle(self, applied: bool) -> None:
        """Keep the new factors if the step's update was applied; otherwise the next update starts from the old ones."""
        if applied and self._fresh_MK:
            for thin_MK, fresh_MK in zip(self.thin_MK, self._fresh_MK, strict=True):
                thin_MK.copy_(fresh_MK)
        self._fresh_MK = []

    def sum(self, parts: Sequence[Tensor], raw: int) -> "_Sum":
        """Start summing tensors over the ranks."""
        self._enter()
        flat = torch.cat([part.reshape(-1) for part in parts])
        work = dist.all_reduce(flat, group=self._group, async_op=True)
        payload = 2 * self._leaving(flat.nbytes)
        traffic_meter.enter(TrafficKind.GRADIENT, payload, raw=self._leaving(raw))
        return _Sum(work, flat, [tuple(part.shape) for part in parts])

    def piece(self, left_NK: Sequence[Tensor], right_MK: Sequence[Tensor], num_elements: int) -> Tensor:
        """This rank's piece of the products P Q^T."""
        size = num_elements // self.num_pieces
        low, high = self._rank * size, (self._rank + 1) * size
        piece_S = right_MK[0].new_zeros(size)
        for matrix, left, right in zip(self.matrices, left_NK, right_MK, strict=True):
            start, stop = max(matrix.start, low), min(matrix.stop, high)
            if start < stop:
                first, last = (start - matrix.start) // matrix.columns, (stop - 1 - matrix.start) // matrix.columns
                rows = (left[first : last + 1] @ right.t()).view(-1)
                skipped = start - matrix.start - first * matrix.columns
                piece_S[start - low : stop - low] = rows[skipped : skipped + stop - start]
        return piece_S

    def finish(
        self, flat: Tensor, left_NK: Sequence[Tensor], own_MK: Sequence[Tensor], right_MK: list[Tensor]
    ) -> Tensor:
        """This rank's piece of the sum. With `keeps_rest`, its own approximation error stays in the terms."""
        self._fresh_MK = right_MK
        if self._keeps_rest:
            for matrix, left, own in zip(self.matrices, left_NK, own_MK, strict=True):
                matrix.of(flat).addmm_(left, own.t(), alpha=-1.0)
        return self.piece(left_NK, right_MK, flat.numel())


class _Sum:
    def __init__(self, work: dist.Work, flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> None:
        self._work, self._flat, self._shapes = work, flat, shapes

    def is_done(self) -> bool:
        return self._work.is_completed()

    def wait(self) -> list[Tensor]:
        with collective_stats.waiting(self._flat.device):
            self._work.wait()
        parts = torch.split(self._flat, [prod(shape) for shape in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]


class _Iteration(Reduction):
    """The sum of P in progress, then that of Q."""

    def __init__(self, scheme: PowerSGD, flat: Tensor) -> None:
        self._scheme, self._flat = scheme, flat
        starts = scheme._fresh_MK or scheme.thin_MK  # fresh: from an earlier micro-batch of this step
        products = [matrix.of(flat) @ thin for matrix, thin in zip(scheme.matrices, starts, strict=True)]
        self._first: _Sum | None = scheme.sum(products, raw=flat.nbytes)
        self._second: _Sum | None = None
        self._left_NK: list[Tensor] = []
        self._own_MK: list[Tensor] = []

    def is_done(self) -> bool:
        return self._second is not None and self._second.is_done()

    def wait(self) -> Tensor:
        self.go_on()
        assert self._second is not None
        return self._scheme.finish(self._flat, self._left_NK, self._own_MK, self._second.wait())

    def go_on(self) -> None:
        if self._first is None:
            return
        self._left_NK = [orthonormal(left) for left in self._first.wait()]
        self._first = None
        self._own_MK = [
            matrix.of(self._flat).t() @ left for matrix, left in zip(self._scheme.matrices, self._left_NK, strict=True)
        ]
        self._second = self._scheme.sum(self._own_MK, raw=0)


def orthonormal(left_NK: Tensor) -> Tensor:
    """An orthonormal basis of the columns' span. All NaN if a value isn't finite."""
    if not left_NK.isfinite().all():
        return torch.full_like(left_NK, float("nan"))
    columns: Tensor = torch.linalg.qr(left_NK).Q
    return columns


def first_thin(name: str, columns: int, rank: int) -> Tensor:
    """Start of the first update (M, K): the same on every rank."""
    seed = int.from_bytes(sha256(name.encode()).digest()[:7], "little")
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(columns, rank, device=generator.device).normal_(generator=generator)

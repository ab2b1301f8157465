"""An engine's gradients: a bucket for each parameter group, its reduction, and the state that compression keeps."""

import logging
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from orchestrator.comm import collective_stats
from orchestrator.comm.gradients.bucket import Bucket
from orchestrator.comm.gradients.buckets import Buckets
from orchestrator.comm.gradients.codecs import codec_of
from orchestrator.comm.gradients.exact_sum import largest_term
from orchestrator.comm.gradients.powersgd import Matrix, PowerSGD, first_thin
from orchestrator.comm.gradients.reduce_scatter import Compressed, Reducer, ReduceScatter
from orchestrator.elastic.state_spec import RESIDUAL, THIN, VELOCITY, rank_of_product
from orchestrator.engine.device_time import finished_s
from orchestrator.engine.param_groups import ParamGroup
from orchestrator.model.base import TrainableModel, spec_of
from orchestrator.spec.communication import CommunicationSpec
from orchestrator.spec.train import TrainSpec
from orchestrator.state.ranges import NamedRanges

log = logging.getLogger("orchestrator.worker")


class Gradients:
    """Adds gradients up over the micro-batches of a step and the ranks of each group.

    Args:
        groups: in DeepSpeed's order.
        train: with ZeRO 2 each micro-batch's gradients are sent, else once per step. Where training is exact, sums are
            (`orchestrator.comm.gradients.exact_sum`).
        after_tokens: as of `Buckets`.
    """

    def __init__(
        self,
        model: TrainableModel,
        groups: Sequence[ParamGroup],
        communication: CommunicationSpec,
        train: TrainSpec,
        device: torch.device,
        after_tokens: bool,
    ) -> None:
        self._names = {id(param): name for name, param in model.named_parameters()}
        self._groups, self.device = groups, device
        self._compression, self._num_updates = communication.compression, 0
        self._largest_term = largest_term(train.most_micro_batches) if train.is_exact else None
        self._buckets = [self._bucket(group, device) for group in groups]
        self._all = Buckets(self._buckets, train.zero_stage == 2, communication.overlap, after_tokens)
        self.saturated: tuple[str, ...] = ()  # of the newest sums: parameters with too large a gradient on this rank
        self.is_timed = False  # whether `backward_s` and `after_backward_s` are measured on a GPU
        self._began_s = self._waited_s = self._ended_s = 0.0
        # Seconds of the newest micro-batch's backward pass without waits, and from its end until all sums were there.
        self.backward_s = self.after_backward_s = 0.0

    @property
    def order(self) -> list[str]:
        """Parameters sent between all ranks, bucket by bucket."""
        dense = [group for group in self._groups if group.is_dense]
        return [", ".join(f"{self._names[id(p)]} {tuple(p.shape)}" for p in group.params) for group in dense]

    def begin_micro_batch(self, last: bool) -> None:
        """Called before a micro-batch's backward pass; `last` of its step."""
        self._began_s, self._waited_s = self._now_s(), collective_stats.waited_s()
        self._all.begin_micro_batch(last)

    def end_micro_batch(self) -> None:
        """Called after it."""
        self._ended_s = self._now_s()
        self.backward_s = self._ended_s - self._began_s - (collective_stats.waited_s() - self._waited_s)
        self._all.end_micro_batch()

    def sums(self) -> list[Tensor]:
        """This rank's piece of each group's sum, fp32. Called once, after a step's last micro-batch."""
        sums = self._all.sums()
        self.after_backward_s = self._now_s() - self._ended_s
        self.saturated = self._take_saturated() if self._largest_term is not None else ()
        return sums

    def _take_saturated(self) -> tuple[str, ...]:
        """Parameters with too large a gradient in the newest sums."""
        too_large = torch.cat([bucket.saturated_P for bucket in self._buckets]).tolist()
        params = [param for bucket in self._buckets for param in bucket.params]
        found = tuple(self._names[id(param)] for param, is_so in zip(params, too_large, strict=True) if is_so)
        for name in found:
            log.warning("the gradient of %s is over %g in one micro-batch, so no exact sum", name, self._largest_term)
        for bucket in self._buckets:
            bucket.saturated_P.zero_()
        return found

    def _now_s(self) -> float:
        """The time, of a GPU too while the pass is timed: else the host doesn't wait for it."""
        return finished_s(self.device) if self.is_timed else time.perf_counter()

    def use(self, scheme: str, overlap: bool) -> None:
        """Set how gradients are sent from now on, where compression is `auto`. The same on all ranks."""
        self._all.overlap = overlap
        for reducer in self._reducers(Compressed):
            reducer.codec = codec_of(self._compression, reducer.num_pieces, self._num_updates, scheme)

    @property
    def num_compressed(self) -> int:
        """Elements that are compressed, padding included."""
        return sum(group.numel for group in self._groups if group.is_compressed)

    @property
    def num_buckets(self) -> int:
        """Buckets that are sent between all ranks."""
        return sum(group.is_dense for group in self._groups)

    def settle(self, applied: bool) -> None:
        """Take in whether the step's update was applied; if it was skipped, kept state returns to that before."""
        self._all.settle(applied)
        for reducer in self._reducers(PowerSGD):
            reducer.settle(applied)
        self._count(self._num_updates + applied)

    def on_weights_initialized(self) -> None:
        """Reset kept state to that before the first update."""
        for bucket in self._buckets:
            for kept in (bucket.residual, bucket.velocity):
                if kept is not None:
                    kept.zero_()
        for bucket, reducer in self._thin():
            for param, thin_MK in zip(bucket.params, reducer.thin_MK, strict=True):
                thin_MK.copy_(first_thin(self._names[id(param)], *thin_MK.shape))
        self._count(0)

    def on_state_loaded(self, num_updates: int) -> None:
        """Called after kept state was written from outside: it is that after `num_updates` updates."""
        self._count(num_updates)

    @property
    def keeps(self) -> bool:
        """Whether compression keeps state from step to step."""
        return self._compression.error_feedback or self._compression.scheme == "powersgd"

    def add_to(self, ranges: NamedRanges) -> None:
        """Add kept state to `ranges`, as views."""
        for bucket in self._buckets:
            for kind, kept in ((RESIDUAL, bucket.residual), (VELOCITY, bucket.velocity)):
                for param, span in bucket.spans() if kept is not None else ():
                    ranges.add(f"{kind}/{self._names[id(param)]}", 0, kept[span])  # type: ignore[index]
        for bucket, reducer in self._thin():
            for param, thin_MK in zip(bucket.params, reducer.thin_MK, strict=True):
                ranges.add(f"{THIN}/{self._names[id(param)]}", 0, thin_MK.view(-1))

    def close(self) -> None:
        self._all.close()
        self._buckets, self._groups = [], ()

    def _bucket(self, group: ParamGroup, device: torch.device) -> Bucket:
        compression = self._compression
        if not group.is_compressed:
            plain = ReduceScatter(group.ranks, group.is_dense)
            exact = self._largest_term
            return Bucket(group.params, group.numel, plain, device, largest_term=exact, starts=group.starts)
        reducer: Reducer
        if compression.scheme == "powersgd":
            matrices = self._matrices(group)
            reducer = PowerSGD(group.ranks, True, matrices, compression.error_feedback)
            reducer.thin_MK = [torch.zeros(m.columns, m.rank, device=device) for m in matrices]
        else:
            codec = codec_of(compression, group.ranks.size(), self._num_updates)
            reducer = Compressed(group.ranks, True, codec, compression.error_feedback)
        feedback, momentum = compression.error_feedback, compression.momentum
        return Bucket(group.params, group.numel, reducer, device, feedback, momentum, starts=group.starts)

    def _matrices(self, group: ParamGroup) -> list[Matrix]:
        matrices = []
        for param, start in zip(group.params, group.starts, strict=True):
            spec = spec_of(self._names[id(param)], param)
            rank = rank_of_product(spec, self._compression)
            matrices.append(Matrix(start, spec.rows, spec.numel // spec.rows, rank))
        return matrices

    def _count(self, num_updates: int) -> None:
        self._num_updates = num_updates
        if self._compression.warmup_steps:
            for reducer in self._reducers(Compressed):
                reducer.codec = codec_of(self._compression, reducer.num_pieces, num_updates)

    def _reducers(self, kind: type[Any]) -> list[Any]:
        return [bucket.reduction for bucket in self._buckets if isinstance(bucket.reduction, kind)]

    def _thin(self) -> list[tuple[Bucket, PowerSGD]]:
        return [(b, b.reduction) for b in self._buckets if isinstance(b.reduction, PowerSGD)]

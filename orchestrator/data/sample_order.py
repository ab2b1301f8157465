"""The order in which a run trains on a store."""

from collections.abc import Sequence

import numpy as np

from orchestrator.data.store import TokenStore
from orchestrator.policy.estimate.curriculum_stages import continued, longest_row, planned_stages
from orchestrator.protocol.messages import StageStart
from orchestrator.sampling.chunks import Chunks
from orchestrator.sampling.curriculum import CurriculumState
from orchestrator.sampling.sample_order import CurriculumOrder, Order, RowOrder
from orchestrator.sampling.sampler import SamplerState
from orchestrator.spec.data import BY_DOCUMENT
from orchestrator.spec.job import JobSpec


class Orders:
    """Sample orders of a job on its corpus: the first one, those after later decisions, and restored ones.

    Raises:
        DataError: the corpus is too small for the curriculum.
    """

    def __init__(self, job: JobSpec, store: TokenStore) -> None:
        self._job = job
        self._chunks: Chunks | None = None
        train, by_document, index_D = job.train, job.data.row_format == BY_DOCUMENT, store.index("train")
        lengths_D = index_D["length"].astype(np.int64)
        if job.curriculum is not None:
            scores_D = index_D["score"].astype(np.float64)
            self._chunks = Chunks.of(lengths_D, scores_D, longest_row(job.curriculum, train))
            stages = planned_stages(job.curriculum, train, self._chunks, by_document=by_document)
            self.first: Order = CurriculumOrder(self._chunks, stages)
            return
        if by_document:
            self._chunks = Chunks.of(lengths_D, np.zeros(len(lengths_D)), train.sequence_length)
        rows = len(self._chunks.start) if self._chunks else store.num_rows("train", train.sequence_length)
        state = SamplerState(train.seed, train.global_batch_size, train.sequence_length, rows)
        self.first = RowOrder(state, self._chunks)

    def decided(self, present: Order, stages: Sequence[StageStart], first_step: int) -> Order:
        """The present order with the stages decided from `first_step` on; the same object if nothing changes.

        Raises:
            ValueError: the job has no such stage.
            DataError: the corpus is too small.
        """
        spec = self._job.curriculum
        if spec is None or self._chunks is None or not isinstance(present, CurriculumOrder):
            return present
        state = continued(present.state, first_step, spec, self._job.train, self._chunks, stages)
        return present if state == present.state else CurriculumOrder(self._chunks, state)

    def saved(self, text: str) -> Order:
        """The order from the output of `Order.to_json`. Raises ProtocolError for anything else."""
        if self._job.curriculum is None or self._chunks is None:
            return RowOrder(SamplerState.from_json(text), self._chunks)
        return CurriculumOrder(self._chunks, CurriculumState.from_json(text))

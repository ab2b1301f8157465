"""The order in which a run trains on a store."""

import numpy as np

from orchestrator.data.store import TokenStore
from orchestrator.policy.curriculum import longest_row, planned_stages
from orchestrator.sampling.chunks import Chunks
from orchestrator.sampling.order import CurriculumOrder, Order, RowOrder
from orchestrator.sampling.sampler import SamplerState
from orchestrator.spec.job import JobSpec


def order_of(job: JobSpec, store: TokenStore) -> Order:
    """Which tokens each step of a run trains on. Raises DataError if the corpus doesn't suffice for its curriculum."""
    train = job.train
    if job.curriculum is None:
        length = train.sequence_length
        rows = store.num_rows("train", length)
        return RowOrder(SamplerState.of_one_stage(train.seed, train.global_batch_size, length, rows))
    index_D = store.index("train")
    chunks = Chunks.of(
        index_D["length"].astype(np.int64), index_D["score"].astype(np.float64), longest_row(job.curriculum, train)
    )
    return CurriculumOrder(chunks, planned_stages(job.curriculum, train, chunks))

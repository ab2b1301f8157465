"""Real workers that compute with two threads: of all that they have otherwise, one thread computes in parallel."""

from pathlib import Path

import pytest

from orchestrator.protocol.worker_phase import Phase
from orchestrator.spec.fault_tolerance import ProtectionSpec
from tests.support import pools
from tests.support.texts import small_job
from tests.support.worker_group import LocalWorkerGroup

THREADS = 2
# Large enough for torch to cut a copy of its tensors, and the exchange of a few tokens, into parts for two threads.
LARGE = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 512, "moe_intermediate_size": 256}


@pytest.mark.skipif(not pools.CAN_TELL, reason="this system doesn't tell where a thread waits")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_thread_of_a_worker_computes_in_parallel(
    texts: Path, store_dir: Path, tmp_path: Path, precision: str
) -> None:
    """Protection, checkpoints, a rescale, a loss and the recovery from it leave one pool of threads in each worker."""
    job = small_job(texts, LARGE, precision=precision, max_steps=10, global_batch_size=6)
    job = job.model_copy(
        update={"protection": ProtectionSpec(every=1), "checkpoint": job.checkpoint.model_copy(update={"every": 4})}
    )
    with LocalWorkerGroup(job, store_dir, tmp_path, size=3, threads=THREADS) as worker_group:
        first = worker_group.plan(worker_group.ids[:2])
        worker_group.start(first)
        worker_group.await_step(2)
        worker_group.rescale(worker_group.ids)
        worker_group.await_step(4)
        worker_group.members[worker_group.ids[2]].kill()
        survivors = worker_group.ids[:2]
        worker_group.await_all(survivors, lambda report: report.phase is Phase.STRANDED)
        worker_group.recover(survivors, previous=first)  # the newest may not have a whole snapshot yet
        worker_group.await_finished()
        for worker in survivors:
            found = pools.resting_pool_threads(worker_group.members[worker].process.pid or 0)
            assert len(found) == THREADS - 1, f"{worker} has {len(found)} threads in libgomp's pools"

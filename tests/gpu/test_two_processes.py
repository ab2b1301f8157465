"""Two processes on one GPU, connected by gloo, as nccl refuses that. `--device emulated` shows that they run."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch._C._distributed_c10d import Store

from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.protocol.worker_phase import Phase
from tests.support import devices, small
from tests.support.ranks import Ranks
from tests.support.texts import STEPS, prepare_texts, small_job, write_texts
from tests.support.worker_group import LocalWorkerGroup

pytestmark = pytest.mark.off_cpu

SOON_S = 45.0  # gloo by itself would wait for a minute


@pytest.fixture(scope="module")
def pair(device: str) -> Iterator[Ranks]:
    pool = Ranks(device, is_shared=True)
    yield pool
    pool.close()


@pytest.fixture
def shared(device: str) -> Iterator[None]:
    """Workers use the one GPU."""
    devices.sharing = True
    yield
    devices.sharing = False


def _losses(rank: int, world_size: int, store: Store, prefix: str, precision: str, stage: int) -> list[float]:
    train, placement = small.train_spec(precision, stage), ExpertPlacement.balanced(4, world_size)
    groups, _, engine = small.build("deepspeed", store, prefix, rank, placement, train, bucket_mb=0.02)
    losses = small.train_steps(engine, groups, range(4))
    engine.close()
    return losses


@pytest.mark.parametrize(("precision", "stage", "error"), [("fp32", 1, 1e-4), ("bf16", 2, 5e-3)])
def test_losses_of_two_ranks_are_nearly_those_of_the_cpu(
    pair: Ranks, cpu_ranks: Ranks, precision: str, stage: int, error: float
) -> None:
    losses, wanted = (pool.run(_losses, 2, precision, stage)[0] for pool in (pair, cpu_ranks))
    assert losses == pytest.approx(wanted, rel=error)


def _trained(worker_group: LocalWorkerGroup) -> list[tuple[Any, ...]]:
    assert sorted(worker_group.records) == list(range(STEPS))
    return [(record.loss, record.update.grad_norm) for _, record in sorted(worker_group.records.items())]


def test_the_survivor_of_a_kill_has_the_bits_of_an_undisturbed_run(shared: None, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    texts = write_texts(tmp_path / "texts")
    job, store_dir = small_job(texts, determinism="exact"), prepare_texts(texts, tmp_path / "store")
    with LocalWorkerGroup(job, store_dir, tmp_path / "undisturbed", size=2) as undisturbed:
        undisturbed.start(undisturbed.plan(undisturbed.ids))
        undisturbed.await_finished()
    with LocalWorkerGroup(job, store_dir, tmp_path / "killed", size=2) as worker_group:
        survivor, victim = worker_group.ids
        worker_group.start(worker_group.plan(worker_group.ids))
        worker_group.await_step(5)
        worker_group.members[victim].kill()
        worker_group.await_all([survivor], lambda r: r.phase is Phase.STRANDED, SOON_S)
        plan = worker_group.recover([survivor])
        assert plan.source is not None and plan.source.step is not None and plan.source.step >= 4
        handovers = worker_group.members[survivor].report().transition.handovers
        assert all(each.state_identical for each in handovers if each.generation == plan.generation)
        worker_group.await_finished()
    assert _trained(worker_group) == _trained(undisturbed)

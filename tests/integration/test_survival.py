"""Real workers in real processes that are killed and stopped: training goes on from the newest state that was held."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.protocol.worker_phase import Phase
from orchestrator.sampling.sample_ledger import audit
from orchestrator.spec.fault_tolerance import ProtectionSpec
from orchestrator.spec.workers import WorkersSpec
from tests.support.texts import STEPS, small_job
from tests.support.worker_group import LocalWorkerGroup

pytestmark = pytest.mark.long_emulated

SOON_S = 45.0  # gloo by itself would wait for a minute


@pytest.fixture
def worker_group(texts: Path, store_dir: Path, tmp_path: Path) -> Iterator[LocalWorkerGroup]:
    with LocalWorkerGroup(small_job(texts, determinism="exact"), store_dir, tmp_path, size=4) as worker_group:
        yield worker_group


def _same_training(worker_group: LocalWorkerGroup, undisturbed: LocalWorkerGroup) -> None:
    """Every step once, the same samples in the same order, the same bits of losses and norms."""
    assert sorted(worker_group.records) == list(range(STEPS))
    order = [(r.step, r.batch.first_position, r.batch.num_positions) for _, r in sorted(worker_group.records.items())]
    assert audit(order).ok
    for step, record in worker_group.records.items():
        assert (record.loss, record.update.grad_norm) == (
            undisturbed.records[step].loss,
            undisturbed.records[step].update.grad_norm,
        )


def _handovers(worker_group: LocalWorkerGroup, generation: int) -> list[Any]:
    reports = [worker_group.members[w].report() for w in worker_group.ids if worker_group.members[w].process.is_alive()]
    return [h for r in reports for h in r.transition.handovers if h.generation == generation]


@pytest.mark.parametrize("victims", [(2,), (0,), (1, 3)], ids=["one", "the first", "two that are no buddies"])
def test_killed_members_cost_no_committed_step(
    worker_group: LocalWorkerGroup, undisturbed: LocalWorkerGroup, victims: tuple[int, ...]
) -> None:
    worker_group.start(worker_group.plan(worker_group.ids))
    worker_group.await_step(5)
    for victim in victims:
        worker_group.members[worker_group.ids[victim]].kill()
    survivors = [worker for i, worker in enumerate(worker_group.ids) if i not in victims]
    worker_group.await_all(survivors, lambda r: r.phase is Phase.STRANDED, SOON_S)
    committed = max(worker_group.members[w].report().protection.committed for w in survivors)
    plan = worker_group.recover(survivors)
    assert plan.source is not None and plan.source.step is not None
    newest = max([committed, *(h.step for h in _handovers(worker_group, plan.generation))])
    assert committed <= plan.source.step == newest
    assert all(h.state_identical for h in _handovers(worker_group, plan.generation))
    worker_group.await_finished()
    _same_training(worker_group, undisturbed)


@pytest.mark.parametrize("rank", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_rank_killed_with_its_buddy_costs_no_committed_step_where_there_are_two_copies(
    texts: Path, store_dir: Path, tmp_path: Path, undisturbed: LocalWorkerGroup, rank: int
) -> None:
    changes = {"protection": ProtectionSpec(copies=2), "workers": WorkersSpec(min=3, max=4, initial=4)}
    job = small_job(texts, determinism="exact").model_copy(update=changes)
    with LocalWorkerGroup(job, store_dir, tmp_path, size=4) as worker_group:
        plan = worker_group.plan(worker_group.ids)
        worker_group.start(plan)
        worker_group.await_step(5)
        for victim in (rank, plan.buddies[rank]):
            worker_group.members[worker_group.ids[victim]].kill()
        survivors = [worker for i, worker in enumerate(worker_group.ids) if i not in (rank, plan.buddies[rank])]
        worker_group.await_all(survivors, lambda r: r.phase is Phase.STRANDED, SOON_S)
        committed = max(worker_group.members[w].report().protection.committed for w in survivors)
        plan = worker_group.recover(survivors)
        assert plan.source is not None and plan.source.step is not None and plan.source.step >= committed
        assert all(h.state_identical for h in _handovers(worker_group, plan.generation))
        worker_group.await_finished()
    _same_training(worker_group, undisturbed)


@pytest.mark.on_cpu  # the gloo that plays nccl can't be aborted
def test_a_frozen_member_is_removed(worker_group: LocalWorkerGroup, undisturbed: LocalWorkerGroup) -> None:
    """It neither answers nor closes its connections: the others shut their own when their generation is aborted."""
    worker_group.start(worker_group.plan(worker_group.ids))
    worker_group.await_step(5)
    stopped = worker_group.members[worker_group.ids[2]]
    os.kill(stopped.process.pid or 0, signal.SIGSTOP)
    survivors = [worker_group.ids[0], worker_group.ids[1], worker_group.ids[3]]
    worker_group.send(to=survivors, aborted=0)
    worker_group.await_all(survivors, lambda r: r.phase is Phase.STRANDED, SOON_S)
    stopped.kill()
    plan = worker_group.recover(survivors)
    assert all(h.state_identical for h in _handovers(worker_group, plan.generation))
    worker_group.await_finished()
    _same_training(worker_group, undisturbed)


@pytest.mark.parametrize("every", [pytest.param(4, marks=pytest.mark.slow), "auto"])
def test_a_loss_between_two_snapshots_goes_back_to_the_older_one(
    texts: Path, store_dir: Path, tmp_path: Path, undisturbed: LocalWorkerGroup, every: int | str
) -> None:
    job = small_job(texts, determinism="exact").model_copy(update={"protection": ProtectionSpec(every=every)})
    with LocalWorkerGroup(job, store_dir, tmp_path, size=3) as worker_group:
        worker_group.start(worker_group.plan(worker_group.ids))
        worker_group.await_step(12)
        interval = worker_group.records[12].state.snapshot_interval
        worker_group.members[worker_group.ids[1]].kill()
        survivors = [worker_group.ids[0], worker_group.ids[2]]
        worker_group.await_all(survivors, lambda r: r.phase is Phase.STRANDED, SOON_S)
        stopped = max(worker_group.members[w].report().step for w in survivors)
        committed = max(worker_group.members[w].report().protection.committed for w in survivors)
        plan = worker_group.recover(survivors)
        assert plan.source is not None and plan.source.step is not None
        assert committed <= plan.source.step <= stopped
        if every == 4:
            assert interval == 4 and (committed + 1) % 4 == 0
            assert (plan.source.step + 1) % 4 == 0 or plan.source.step == stopped
        else:
            assert 1 <= interval <= 64
        worker_group.await_finished()
    _same_training(worker_group, undisturbed)

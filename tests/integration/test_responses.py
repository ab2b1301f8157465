"""What real workers do after an error of their own: smaller micro-batches after one of memory, a poisoned batch left
out; and while run storage takes no records."""

from pathlib import Path

import pytest

from orchestrator.protocol.worker_phase import Phase
from orchestrator.sampling.micro_batches import UNSAID, MicroBatchSize
from orchestrator.sampling.sample_ledger import audit
from orchestrator.worker.runtime.errors import NO_MEMORY
from tests.support.marked_models import LOGITS, with_marked_steps
from tests.support.own_models import linear, own_spec
from tests.support.texts import STEPS, small_job
from tests.support.worker_group import LocalWorkerGroup

BAD_STEP = 12
SOON_S = 10.0


def _stopped_with(worker_group: LocalWorkerGroup, kind: str) -> None:
    worker_group.await_all(worker_group.ids, lambda r: r.phase is Phase.STRANDED, SOON_S)
    kinds = [
        error.kind for w in worker_group.ids if (error := worker_group.members[w].report().health.error) is not None
    ]
    assert kind in kinds and set(kinds) <= {kind, "peer_lost"}


def _trained(worker_group: LocalWorkerGroup) -> None:
    worker_group.await_finished()
    assert sorted(worker_group.records) == list(range(STEPS))
    assert audit(
        [(r.step, r.batch.first_position, r.batch.num_positions) for _, r in sorted(worker_group.records.items())]
    ).ok


def test_a_batch_that_makes_the_loss_explode_is_left_out(texts: Path, store_dir: Path, tmp_path: Path) -> None:
    forward = f"return {LOGITS} * (500.0 if mark == 0 else 1.0)"
    job = with_marked_steps(small_job(texts), store_dir, tmp_path, (BAD_STEP,), forward)
    with LocalWorkerGroup(job, store_dir, tmp_path, size=2) as worker_group:
        worker_group.start(worker_group.plan(worker_group.ids))
        _stopped_with(worker_group, "numeric")
        assert {worker_group.members[w].report().step for w in worker_group.ids} == {BAD_STEP - 1}
        plan = worker_group.recover(worker_group.ids, skips=(BAD_STEP,))
        assert plan.source is not None and plan.source.step == BAD_STEP - 1
        _trained(worker_group)
        bad, after = worker_group.records[BAD_STEP], worker_group.records[BAD_STEP + 1]
    assert bad.update.skipped and not bad.update.applied and bad.loss > 2 * worker_group.records[BAD_STEP - 1].loss
    assert after.update.applied and after.loss < 1.2 * worker_group.records[BAD_STEP - 1].loss
    assert all(record.update.applied != record.update.skipped for record in worker_group.records.values())


def test_a_micro_batch_too_large_for_memory_is_halved(texts: Path, store_dir: Path, tmp_path: Path) -> None:
    forward = f'if mark == 0 and len(tokens) > 1:\n    raise RuntimeError("{NO_MEMORY}")\nreturn {LOGITS}'
    job = with_marked_steps(small_job(texts), store_dir, tmp_path, (BAD_STEP,), forward)
    with LocalWorkerGroup(job, store_dir, tmp_path, size=2) as worker_group:
        worker_group.start(worker_group.plan(worker_group.ids))
        _stopped_with(worker_group, "out_of_memory")
        worker_group.recover(worker_group.ids, micro_batch=MicroBatchSize(rows=1))
        _trained(worker_group)
    assert worker_group.records[BAD_STEP].update.applied
    assert {r.batch.num_positions for r in worker_group.records.values()} == {10}


@pytest.mark.parametrize(
    "micro_batch", [MicroBatchSize(rows=1), pytest.param(MicroBatchSize(tokens=90), marks=pytest.mark.slow)]
)
def test_micro_batches_of_another_size_train_the_same(
    texts: Path, store_dir: Path, tmp_path: Path, micro_batch: MicroBatchSize
) -> None:
    """Up to rounding: the same rows, the same weights of their losses."""
    losses = []
    for size in (UNSAID, micro_batch):
        job = small_job(texts, max_steps=8)
        with LocalWorkerGroup(job, store_dir, tmp_path / str(size.tokens + size.rows), size=2) as worker_group:
            worker_group.start(worker_group.plan(worker_group.ids, micro_batch=size))
            worker_group.await_finished()
        losses.append([r.loss for _, r in sorted(worker_group.records.items())])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("has_experts", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_slow_rank_is_found_by_the_waits_of_its_peers(
    texts: Path, store_dir: Path, tmp_path: Path, has_experts: bool
) -> None:
    """Others wait for it at the exchange of tokens or, without experts, at the reduction of gradients."""
    slow = tmp_path / "slow"
    slow.write_text("")
    forward = f"if open({str(slow)!r}).read() == str(os.getpid()):\n    time.sleep(0.3)\n"
    through = "self.moe(self.embedding(tokens))" if has_experts else "self.embedding(tokens)"
    source = "import os, time\n" + linear(
        layers="self.moe = MoELayer(spec, experts)" if has_experts else "",
        forward="\n        ".join([*forward.splitlines(), f"return self.head({through})"]),
    )
    job = small_job(texts, max_steps=1000, global_batch_size=6).model_copy(update={"model": own_spec(tmp_path, source)})
    with LocalWorkerGroup(job, store_dir, tmp_path, size=3) as worker_group:
        worker_group.start(worker_group.plan(worker_group.ids))
        worker_group.await_step(10)
        slow.write_text(str(worker_group.members[worker_group.ids[1]].process.pid))
        worker_group.await_step(worker_group.newest_step + 30)
        newest = [record for _, record in sorted(worker_group.records.items())][-24:]
        worker_group.finish()
    # Of 24: a busy machine holds up others too.
    assert sum(r.timing.slowest == 1 and r.timing.slowness > 1.5 for r in newest) >= 20


@pytest.mark.parametrize("size", [1, 2])
def test_members_wait_before_the_same_step_while_too_many_are_not_published(
    texts: Path, store_dir: Path, tmp_path: Path, size: int
) -> None:
    with LocalWorkerGroup(small_job(texts), store_dir, tmp_path, size=size) as worker_group:

        def publish(step: int) -> None:
            for member in worker_group.members.values():
                member.call("report", None, -1, 0.0, step)

        def await_wait_after(step: int) -> None:
            worker_group.await_all(worker_group.ids, lambda r: r.step == step and r.unread is not None)

        for member in worker_group.members.values():
            member.call("limit", 5)
        worker_group.start(worker_group.plan(worker_group.ids))
        worker_group.pace.free()
        await_wait_after(4)
        publish(6)  # which they don't have yet
        await_wait_after(11)
        publish(9)
        await_wait_after(14)
        worker_group.rescale(worker_group.ids)  # goes on meanwhile
        assert worker_group.newest_step >= 14
        worker_group.finish()
        assert {report.unread for report in worker_group.final.values()} == {None}
        assert sorted(worker_group.records) == list(range(worker_group.newest_step + 1))

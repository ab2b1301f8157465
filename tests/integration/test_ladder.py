"""Real workers that die at exact moments: down the ladder from a rank's own memory to the checkpoint before the newest.

Beside `test_survival.py` (deaths at some moment), `test_moves.py` (newcomers lost) and `test_control_losses.py` (the
same rungs with the real controller and simulated workers).
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from orchestrator.checkpoint.manifest import checkpoint_name
from orchestrator.policy.state.run_state import Commit
from orchestrator.protocol.events.base import plain_of
from orchestrator.protocol.messages import GenerationPlan, Restore
from orchestrator.protocol.worker_phase import Phase
from orchestrator.protocol.worker_report import CHECKPOINT_CORRUPT, Report, ShardWritten
from orchestrator.run_records.checkpoints.checkpoint_records import CheckpointRecords
from orchestrator.run_records.checkpoints.completion import commit_checkpoint
from orchestrator.run_records.checkpoints.search import newest_good
from orchestrator.run_records.run_history import read_entries
from orchestrator.sampling.sample_ledger import audit
from orchestrator.storage.directory import DirectoryObjects
from orchestrator.storage.journal import Journal
from tests.support.faults import Fault, Moment
from tests.support.texts import STEPS, small_job
from tests.support.worker_group import PATIENCE_S, LocalWorkerGroup, MemberDied, NoRecoveryPoint

pytestmark = [pytest.mark.chaos, pytest.mark.usefixtures("device")]

EVERY = 5  # steps between checkpoints


@pytest.fixture
def worker_group(texts: Path, store_dir: Path, tmp_path: Path) -> Iterator[LocalWorkerGroup]:
    plain = small_job(texts, determinism="exact")
    job = plain.model_copy(update={"checkpoint": plain.checkpoint.model_copy(update={"every": EVERY})})
    with LocalWorkerGroup(job, store_dir, tmp_path, size=4) as worker_group:
        yield worker_group


@dataclass(frozen=True)
class Loss:
    """Steps that workers had published when one was lost, and how training continued."""

    published: int
    plan: GenerationPlan


def _die(worker_group: LocalWorkerGroup, ranks: tuple[int, ...]) -> None:
    """Wait until those who have these ranks of the newest world have been killed by their faults."""
    plan = worker_group.directive.next or worker_group.directive.current
    assert plan is not None
    for rank in ranks:
        process = worker_group.members[plan.world.members[rank]].process
        process.join(PATIENCE_S)
        assert process.exitcode == -9, f"rank {rank} never came to its fault"


def _go_on(worker_group: LocalWorkerGroup, previous: GenerationPlan | None = None) -> Loss:
    """Recover with the live workers; again if one dies meanwhile."""
    current = worker_group.directive.current
    assert current is not None
    worker_group.send()  # news of an activation may have come to some only
    worker_group.await_all(
        [w for w in current.world.members if w in worker_group.living],
        lambda r: r.phase is Phase.STRANDED or (r.phase is Phase.READY and r.generation > current.generation),
    )
    published = max(worker_group.members[w].report().protection.committed for w in worker_group.living)
    for _ in worker_group.ids:
        try:
            return Loss(
                published, worker_group.recover([w for w in worker_group.ids if w in worker_group.living], previous)
            )
        except MemberDied:  # another one
            continue
    raise AssertionError("everybody died")


def _lost_nothing(worker_group: LocalWorkerGroup, undisturbed: LocalWorkerGroup, loss: Loss) -> None:
    """Nothing published was done again, the state went on bit by bit, and every step was done once."""
    source, generation = loss.plan.source, loss.plan.generation
    assert source is not None and source.step is not None and source.step >= loss.published
    reports = [worker_group.members[worker].report() for worker in loss.plan.world.members]
    handovers = [h for report in reports for h in report.transition.handovers if h.generation == generation]
    assert len(handovers) == loss.plan.world.size and all(h.state_identical for h in handovers)
    worker_group.await_finished()
    _same_training(worker_group, undisturbed)
    assert all((step > source.step) == (r.generation >= generation) for step, r in worker_group.records.items())


def _same_training(worker_group: LocalWorkerGroup, undisturbed: LocalWorkerGroup, first: int = 0) -> None:
    """Every step from `first` on once, the same samples in the same order, the same bits of losses and norms."""
    records = {step: record for step, record in sorted(worker_group.records.items()) if step >= first}
    assert list(records) == list(range(first, STEPS))
    assert first > 0 or audit([(r.step, r.batch.first_position, r.batch.num_positions) for r in records.values()]).ok
    for step, record in records.items():
        alone = undisturbed.records[step]
        assert (record.loss, record.update.grad_norm) == (alone.loss, alone.update.grad_norm)
        assert (record.batch.first_position, record.batch.num_positions) == (
            alone.batch.first_position,
            alone.batch.num_positions,
        )


# -- the first two rungs: memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("moment", "ranks"),
    [
        pytest.param(Moment.FORWARD, (1,), id="in the forward pass", marks=pytest.mark.slow),
        pytest.param(Moment.UPDATE, (2,), id="in the update", marks=pytest.mark.slow),
        pytest.param(Moment.VOTE, (0,), id="the first, before its vote", marks=pytest.mark.slow),
        pytest.param(Moment.VOTED, (3,), id="after its vote", marks=pytest.mark.slow),
        pytest.param(Moment.SNAPSHOT, (1,), id="with half a snapshot sent"),
        pytest.param(Moment.VOTE, (0, 2), id="two at once", marks=pytest.mark.slow),
        pytest.param(Moment.SNAPSHOT, (1, 3), id="two with half a snapshot sent", marks=pytest.mark.slow),
    ],
)
def test_a_death_at_any_moment_of_a_step(
    worker_group: LocalWorkerGroup, undisturbed: LocalWorkerGroup, moment: Moment, ranks: tuple[int, ...]
) -> None:
    worker_group.arm(*(Fault(rank, moment, step=6, generation=0) for rank in ranks))
    worker_group.start(worker_group.plan(worker_group.ids))
    _die(worker_group, ranks)
    loss = _go_on(worker_group)
    # Its snapshot of step 5 is on its way when step 6 begins: whether the buddy has it already is chance.
    possible = (4, 5) if moment is Moment.FORWARD else (5, 6)
    assert loss.plan.source is not None and loss.plan.source.step in possible and loss.published in (4, 5)
    _lost_nothing(worker_group, undisturbed, loss)


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(Moment.PREPARE, marks=pytest.mark.slow),
        pytest.param(Moment.MOVE, marks=pytest.mark.long_emulated),
        pytest.param(Moment.READY, marks=pytest.mark.slow),
    ],
    ids=lambda moment: moment.name.lower(),
)
def test_another_death_while_the_run_recovers(
    worker_group: LocalWorkerGroup, undisturbed: LocalWorkerGroup, moment: Moment
) -> None:
    """Rank 3 of four dies, and then the second of the three that are left, who is no buddy of its."""
    first = worker_group.plan(worker_group.ids)
    assert first.buddies[1] != 3 and first.buddies[3] != 1
    worker_group.arm(Fault(3, Moment.VOTE, step=6, generation=0), Fault(1, moment, generation=1))
    worker_group.start(first)
    _die(worker_group, (3,))
    loss = _go_on(worker_group)
    assert loss.plan.generation > 1 and loss.plan.world.members == (worker_group.ids[0], worker_group.ids[2])
    _lost_nothing(worker_group, undisturbed, loss)


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(Moment.PREPARE, marks=pytest.mark.slow),
        pytest.param(Moment.MOVE, marks=pytest.mark.slow),
        pytest.param(Moment.READY, marks=pytest.mark.slow),
        pytest.param(Moment.ACTIVATED, marks=pytest.mark.slow),
    ],
    ids=lambda moment: moment.name.lower(),
)
def test_a_member_that_dies_in_a_rescale(
    worker_group: LocalWorkerGroup, undisturbed: LocalWorkerGroup, moment: Moment
) -> None:
    """In the first half the old world is rebuilt; once activated the new one is, from what was held at the fence."""
    old = worker_group.plan(worker_group.ids[:3])
    worker_group.arm(Fault(1, moment, generation=1))
    worker_group.start(old)
    worker_group.await_step(3)
    plan = worker_group.plan(worker_group.ids, old, 1)
    with suppress(MemberDied):  # it may die before it has answered
        worker_group.send(next=plan)
    if moment is not Moment.PREPARE:
        worker_group.await_all(list(plan.involved), lambda r: r.transition.prepared >= plan.generation)
        worker_group.rescale_to(plan)
    if moment is Moment.ACTIVATED:
        worker_group.await_all(list(plan.involved), lambda r: r.phase is Phase.READY)
        worker_group.collect(plan.involved[0])
        with suppress(MemberDied):
            worker_group.send(
                to=[worker_group.ids[3], worker_group.ids[1]],
                current=plan,
                next=None,
                fence=None,
                activated=plan.generation,
            )
    _die(worker_group, (1,))
    _lost_nothing(worker_group, undisturbed, _go_on(worker_group, old))


# -- the lower rungs: checkpoints ------------------------------------------------------------------------------------


def _commit(worker_group: LocalWorkerGroup, shards: tuple[ShardWritten, ...]) -> None:
    """Complete a checkpoint, as a controller does."""
    first, run_dir = shards[0], Path(worker_group.job.storage_dir)
    done = commit_checkpoint("test", run_dir, Commit(first.step, 1, first.generation, shards))
    Journal(DirectoryObjects(run_dir)).append([plain_of(done)])


def _has_written(step: int, report: Report) -> bool:
    return any(shard.step == step for shard in report.shards)


def _train_past_checkpoints(worker_group: LocalWorkerGroup, *steps: int) -> GenerationPlan:
    """Start, and go on until checkpoints of these steps are complete."""
    plan = worker_group.plan(worker_group.ids)
    worker_group.start(plan)
    for step in steps:
        worker_group.await_all(worker_group.ids, partial(_has_written, step))
        written = [s for w in worker_group.ids for s in worker_group.members[w].report().shards]
        _commit(worker_group, tuple(s for s in written if s.step == step))
    return plan


def _begin_again(worker_group: LocalWorkerGroup, members: list[str]) -> int:
    """From the newest good checkpoint. Returns its step."""
    run_dir, records = Path(worker_group.job.storage_dir), CheckpointRecords()
    for entry in read_entries(run_dir):
        records = records.after(entry.event)
    restore = newest_good(run_dir, records)
    assert restore is not None
    worker_group.send(aborted=worker_group.newest_generation, current=None, next=None)
    worker_group.start(worker_group.plan(members, generation=worker_group.newest_generation + 1, restore=restore))
    worker_group.records.clear()  # only now: until survivors have gone back, they report steps after the checkpoint
    worker_group.collect(members[0])
    return restore.step


@pytest.mark.slow
def test_a_rank_lost_with_its_buddy_is_read_from_the_newest_checkpoint(
    worker_group: LocalWorkerGroup, undisturbed: LocalWorkerGroup
) -> None:
    buddy = worker_group.plan(worker_group.ids).buddies[1]
    worker_group.arm(Fault(1, Moment.VOTE, step=17, generation=0), Fault(buddy, Moment.VOTE, step=17, generation=0))
    plan = _train_past_checkpoints(worker_group, 4, 9)
    _die(worker_group, (1, buddy))
    with pytest.raises(NoRecoveryPoint):
        _go_on(worker_group)
    assert _begin_again(worker_group, [w for w in plan.world.members if w in worker_group.living]) == 9
    worker_group.await_finished()
    _same_training(worker_group, undisturbed, first=10)


@pytest.mark.slow
@pytest.mark.parametrize("damaged", [False, True], ids=["the newest checkpoint", "a damaged one, and the one before"])
def test_when_all_are_lost_new_workers_read_a_checkpoint(
    worker_group: LocalWorkerGroup, undisturbed: LocalWorkerGroup, damaged: bool
) -> None:
    worker_group.arm(*(Fault(rank, Moment.FORWARD, step=17, generation=0) for rank in range(4)))
    _train_past_checkpoints(worker_group, 4, 9)
    _die(worker_group, (0, 1, 2, 3))
    newest = Path(worker_group.job.storage_dir) / "checkpoints" / checkpoint_name(9, 1, 0)
    if damaged:
        _damage(next(newest.glob("*.safetensors")))
    step = _begin_again(worker_group, worker_group.add(2))
    assert step == (4 if damaged else 9)
    worker_group.await_finished()
    _same_training(worker_group, undisturbed, first=step + 1)


def test_ranks_that_find_damage_in_a_checkpoint_stay_and_read_another_one(
    worker_group: LocalWorkerGroup, undisturbed: LocalWorkerGroup
) -> None:
    """All four read the damaged one at once; only those whose state is in the damaged block can know."""
    _train_past_checkpoints(worker_group, 4, 9)
    run_dir = Path(worker_group.job.storage_dir)
    bad, good = (Restore(step, str(run_dir / "checkpoints" / checkpoint_name(step, 1, 0))) for step in (9, 4))
    for file in Path(bad.path).glob("*.safetensors"):
        _damage(file)
    worker_group.send(aborted=worker_group.newest_generation, current=None, next=None)
    worker_group.await_all(worker_group.ids, lambda r: r.phase is Phase.STRANDED)
    plan = worker_group.plan(worker_group.ids, generation=1, restore=bad)
    worker_group.send(next=plan)
    finders = [w for w in worker_group.ids if _error_of(worker_group, w) == CHECKPOINT_CORRUPT]
    assert finders
    worker_group.send(aborted=1, next=None)
    worker_group.start(worker_group.plan(worker_group.ids, generation=2, restore=good))
    worker_group.records.clear()
    worker_group.collect(worker_group.ids[0])
    worker_group.await_finished()
    _same_training(worker_group, undisturbed, first=5)


def _error_of(worker_group: LocalWorkerGroup, worker: str) -> str:
    """The kind of the error with which this worker missed generation 1; empty for a lost peer."""
    worker_group.await_all([worker], lambda r: r.transition.failed_generation == 1 or r.phase is Phase.READY)
    report = worker_group.members[worker].report()
    assert report.phase in (Phase.STANDBY, Phase.READY)
    return report.health.error.kind if report.health.error is not None else ""


def _damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)

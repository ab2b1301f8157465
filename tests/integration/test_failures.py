"""Real workers in real processes that die, stand alone or can't write: who notices, how soon, and what goes on."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.protocol.worker_phase import Phase
from orchestrator.protocol.worker_report import Report
from tests.support.texts import STEPS, small_job
from tests.support.worker_group import LocalWorkerGroup

ORPHAN_S = 4.0

SOON_S = 10.0  # a death is known this soon; a gloo operation without a closed connection would wait for a minute


@pytest.fixture
def worker_group(texts: Path, store_dir: Path, tmp_path: Path) -> Iterator[LocalWorkerGroup]:
    with LocalWorkerGroup(small_job(texts, max_steps=100_000), store_dir, tmp_path, size=4) as worker_group:
        yield worker_group


def _report_of(worker_group: LocalWorkerGroup, worker: str) -> Report:
    return worker_group.members[worker].report()


@pytest.mark.parametrize("victim", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_every_survivor_of_a_failure_is_freed_at_once(worker_group: LocalWorkerGroup, victim: int) -> None:
    """Also those that were waiting for another survivor, not for the dead one."""
    worker_group.start(worker_group.plan(worker_group.ids))
    worker_group.await_step(2)
    worker_group.members[worker_group.ids[victim]].kill()
    survivors = [worker for worker in worker_group.ids if worker != worker_group.ids[victim]]
    worker_group.await_all(survivors, lambda r: r.phase is Phase.STRANDED, SOON_S)
    for worker in survivors:
        report = _report_of(worker_group, worker)
        assert report.health.error is not None and report.health.error.kind == "peer_lost"
        assert report.transition.stopped == 0 and report.protection.holdings


@pytest.mark.slow
def test_survivors_of_a_transition_are_freed_whichever_peer_they_waited_for(worker_group: LocalWorkerGroup) -> None:
    worker_group.start(worker_group.plan(worker_group.ids[:2]))
    worker_group.await_step(2)
    plan = worker_group.prepare(worker_group.ids)
    worker_group.members[worker_group.ids[3]].kill()
    worker_group.rescale_to(plan)
    worker_group.await_all(worker_group.ids[:2], lambda r: r.phase is Phase.STRANDED, SOON_S)
    worker_group.await_all(worker_group.ids[2:3], lambda r: r.phase is Phase.STANDBY, SOON_S)


def test_a_ready_newcomer_that_is_no_longer_needed_becomes_a_standby(worker_group: LocalWorkerGroup) -> None:
    worker_group.start(worker_group.plan(worker_group.ids[:2]))
    old = worker_group.directive.current
    worker_group.await_step(2)
    plan = worker_group.prepare(worker_group.ids[:3])
    worker_group.rescale_to(plan)
    worker_group.await_all(worker_group.ids[:3], lambda r: r.phase is Phase.READY)
    again = worker_group.plan(worker_group.ids[:2], old, plan.generation + 1)
    worker_group.send(next=again, fence=None)
    worker_group.await_all(worker_group.ids[:2], lambda r: r.phase is Phase.READY and r.generation == again.generation)
    worker_group.send(current=again, next=None, activated=again.generation)
    worker_group.await_all(worker_group.ids[2:3], lambda r: r.phase is Phase.STANDBY)
    worker_group.await_step(worker_group.newest_step + 3)
    worker_group.rescale(worker_group.ids[1:3])  # it can still join
    worker_group.finish()
    assert {r.generation for r in worker_group.records.values()} == {0, again.generation, again.generation + 1}


def test_a_newcomer_that_dies_while_it_connects_does_not_hold_up_the_next_plan(worker_group: LocalWorkerGroup) -> None:
    worker_group.start(worker_group.plan(worker_group.ids[:2]))
    worker_group.await_step(2)
    worker_group.members[worker_group.ids[3]].kill()
    current = worker_group.directive.current
    assert current is not None
    worker_group.send(next=worker_group.plan(worker_group.ids, current, 1))  # the dead one never comes
    plan = worker_group.plan(worker_group.ids[:3], current, 2)
    worker_group.send(next=plan)
    worker_group.await_all(worker_group.ids[:3], lambda r: r.transition.prepared == plan.generation, SOON_S)
    worker_group.rescale_to(plan)
    worker_group.await_all(worker_group.ids[:3], lambda r: r.phase is Phase.READY, SOON_S)


def test_a_last_checkpoint_that_can_not_be_written_is_tried_again(texts: Path, store_dir: Path, tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    checkpoints.write_text("a file where a directory is needed")
    with LocalWorkerGroup(small_job(texts), store_dir, tmp_path, size=2) as worker_group:
        worker_group.start(worker_group.plan(worker_group.ids))
        worker_group.await_all(worker_group.ids, lambda r: r.unsaved is not None and "Not a directory" in r.unsaved.why)
        for worker in worker_group.ids:  # no error, and nothing made good of it
            report = _report_of(worker_group, worker)
            assert (report.step, report.phase, report.health.error) == (STEPS - 1, Phase.TRAINING, None)
        checkpoints.unlink()
        worker_group.await_all(worker_group.ids, lambda r: r.phase is Phase.FINISHED and r.unsaved is None)


def test_a_checkpoint_that_is_due_at_a_fence_is_written_by_the_old_world(
    texts: Path, store_dir: Path, tmp_path: Path
) -> None:
    plain = small_job(texts)
    job = plain.model_copy(update={"checkpoint": plain.checkpoint.model_copy(update={"every": 10})})
    with LocalWorkerGroup(job, store_dir, tmp_path, size=3) as worker_group:
        worker_group.pace.slow_after(0)  # else step 9 may come before the next generation is prepared
        worker_group.start(worker_group.plan(worker_group.ids[:2]))
        worker_group.rescale(worker_group.ids[1:3], at_step=9)
        for step in (9, 19):  # one is left out while an earlier one is being written
            worker_group.await_step(step)
            worker_group.await_all(worker_group.ids[1:2], lambda r, step=step: any(s.step == step for s in r.shards))
        worker_group.await_finished()
        leaver = _report_of(worker_group, worker_group.ids[0])
        assert [(s.step, s.generation, s.rank) for s in leaver.shards] == [(9, 0, 0)]
        assert [(s.step, s.generation, s.rank) for s in worker_group.final[worker_group.ids[1]].shards] == [
            (9, 0, 1),
            (19, 1, 0),
            (29, 1, 0),
        ]


def test_a_model_without_experts_trains_and_moves(texts: Path, store_dir: Path, tmp_path: Path) -> None:
    with LocalWorkerGroup(small_job(texts, {"first_k_dense_replace": 2}), store_dir, tmp_path, size=3) as worker_group:
        worker_group.start(worker_group.plan(worker_group.ids[:2]))
        for members in (worker_group.ids, worker_group.ids[:1]):
            worker_group.await_step(worker_group.newest_step + 2)
            worker_group.rescale(members)
        worker_group.await_finished()
        assert sorted(worker_group.records) == list(range(STEPS))
        assert worker_group.records[STEPS - 1].loss < worker_group.records[0].loss
        assert {r.routing.experts.max_violation for r in worker_group.records.values()} == {0.0}


def test_training_continues_without_a_store_and_the_next_generation_connects_through_another(
    worker_group: LocalWorkerGroup,
) -> None:
    worker_group.start(worker_group.plan(worker_group.ids[:2]))
    worker_group.await_step(2)
    worker_group.lose_store()
    worker_group.await_step(worker_group.newest_step + 3)
    worker_group.rescale(worker_group.ids[:3])
    worker_group.await_step(worker_group.newest_step + 3)
    worker_group.finish()
    assert {r.generation for r in worker_group.records.values()} == {0, 1}


def test_a_newcomer_that_waits_for_a_fence_in_a_lost_store_reports_that(worker_group: LocalWorkerGroup) -> None:
    worker_group.start(worker_group.plan(worker_group.ids[:2]))
    worker_group.await_step(2)
    plan = worker_group.prepare(worker_group.ids[:3])
    worker_group.lose_store()
    worker_group.await_all(worker_group.ids[2:3], lambda r: r.transition.failed_generation == plan.generation, SOON_S)
    again = worker_group.prepare(worker_group.ids[:3])
    worker_group.rescale_to(again)
    worker_group.await_all(worker_group.ids[:3], lambda r: r.phase is Phase.READY, SOON_S)
    worker_group.send(current=again, next=None, fence=None, activated=again.generation)
    worker_group.await_step(worker_group.newest_step + 3)


@pytest.mark.slow
def test_a_newcomer_that_gets_a_fence_after_its_store_is_lost_keeps_its_state(worker_group: LocalWorkerGroup) -> None:
    """The store dies when all are connected and the fence is raised already: the move fails, the state does not."""
    worker_group.start(worker_group.plan(worker_group.ids[:2]))
    worker_group.await_step(2)
    plan = worker_group.prepare(worker_group.ids[:3])
    worker_group.lose_store()
    worker_group.rescale_to(plan)
    worker_group.await_all(
        worker_group.ids[:2],
        lambda r: r.phase is Phase.STRANDED and r.transition.failed_generation == plan.generation,
        SOON_S,
    )
    worker_group.recover(worker_group.ids[:2])
    worker_group.await_step(worker_group.newest_step + 3)


def test_a_worker_without_a_controller_exits_but_not_because_it_was_stopped(
    texts: Path, store_dir: Path, tmp_path: Path
) -> None:
    with LocalWorkerGroup(small_job(texts), store_dir, tmp_path, size=1, orphan_s=ORPHAN_S) as worker_group:
        member = worker_group.members[worker_group.ids[0]]
        worker_group.await_all(worker_group.ids, lambda report: report.phase is Phase.STANDBY)
        os.kill(member.process.pid or 0, signal.SIGSTOP)
        member.process.join(1.5 * ORPHAN_S)  # no event ends this: the worker is stopped for longer than it would wait
        assert member.process.exitcode is None
        os.kill(member.process.pid or 0, signal.SIGCONT)
        member.process.join(1.0)  # and not heard at once either: it was stopped too
        assert member.process.exitcode is None
        assert member.report().phase is Phase.STANDBY
        member.process.join(5 * ORPHAN_S)
        assert member.process.exitcode == 1  # it ran, and was asked nothing

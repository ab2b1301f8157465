"""A lone worker in a real process, killed beside a standby that keeps its snapshots: training goes on from them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.protocol.worker_phase import Phase
from orchestrator.protocol.worker_report import ProtectionReport
from orchestrator.spec.fault_tolerance import ProtectionSpec
from tests.support.faults import Fault, Moment
from tests.support.texts import STEPS, small_job
from tests.support.worker_group import LocalWorkerGroup

pytestmark = pytest.mark.long_emulated

SOON_S = 60.0
LATE_S = 0.25  # steps are slow: the run must not be over before its member has a keeper


@pytest.fixture
def worker_group(texts: Path, store_dir: Path, tmp_path: Path) -> Iterator[LocalWorkerGroup]:
    with LocalWorkerGroup(small_job(texts, determinism="exact"), store_dir, tmp_path, size=3) as worker_group:
        worker_group.pace.slow_after(0, LATE_S)
        yield worker_group


def _protection(worker_group: LocalWorkerGroup, worker: str) -> ProtectionReport:
    return worker_group.members[worker].report().protection


def _kept(worker_group: LocalWorkerGroup, member: str, keeper: str) -> int:
    """The newest committed step, once the keeper has a snapshot."""
    number = worker_group.keep(keeper)
    worker_group.await_all([member], lambda r: r.protection.kept_by == number, SOON_S)
    return _protection(worker_group, member).committed


def _go_on(worker_group: LocalWorkerGroup, member: str, keeper: str) -> None:
    """Training goes on with the keeper, once the member is dead and the keeper has reported what it holds."""
    worker_group.members[member].process.join(SOON_S)
    number = worker_group.directive.keepers[-1].number
    worker_group.await_all([keeper], lambda r: r.protection.unkept == number, SOON_S)
    assert _protection(worker_group, keeper).holdings
    worker_group.recover([keeper])


def _same_training(worker_group: LocalWorkerGroup, undisturbed: LocalWorkerGroup) -> None:
    assert sorted(worker_group.records) == list(range(STEPS))
    for step, record in worker_group.records.items():
        other = undisturbed.records[step]
        assert (record.loss, record.update, record.state.digests) == (other.loss, other.update, other.state.digests)


@pytest.mark.parametrize("moment", [Moment.FORWARD, Moment.UPDATE, Moment.VOTE, Moment.VOTED, Moment.SNAPSHOT])
def test_a_killed_lone_member_costs_a_step_at_most(
    worker_group: LocalWorkerGroup, undisturbed: LocalWorkerGroup, moment: Moment
) -> None:
    member, keeper, _ = worker_group.ids
    worker_group.start(worker_group.plan([member]))
    committed = _kept(worker_group, member, keeper)
    worker_group.arm(Fault(0, moment, generation=0))
    worker_group.members[member].process.join(SOON_S)
    _go_on(worker_group, member, keeper)
    plan = worker_group.directive.current
    assert plan is not None and plan.source is not None and plan.source.step is not None
    assert plan.source.holders == (keeper,) and committed <= plan.source.step
    worker_group.await_finished()
    _same_training(worker_group, undisturbed)


@pytest.mark.parametrize("every", [3, "auto"])
def test_a_keeper_of_some_steps(
    texts: Path, store_dir: Path, tmp_path: Path, undisturbed: LocalWorkerGroup, every: int | str
) -> None:
    job = small_job(texts, determinism="exact").model_copy(update={"protection": ProtectionSpec(every=every)})
    with LocalWorkerGroup(job, store_dir, tmp_path, size=2) as worker_group:
        member, keeper = worker_group.ids
        worker_group.pace.slow_after(0, LATE_S)
        worker_group.start(worker_group.plan([member]))
        committed = _kept(worker_group, member, keeper)
        worker_group.members[member].kill()
        _go_on(worker_group, member, keeper)
        plan = worker_group.directive.current
        assert plan is not None and plan.source is not None and (plan.source.step or 0) >= committed
        worker_group.await_finished()
        _same_training(worker_group, undisturbed)


def test_a_lost_keeper_stops_nothing_and_the_next_one_has_the_newest_state(
    worker_group: LocalWorkerGroup, undisturbed: LocalWorkerGroup
) -> None:
    member, first, second = worker_group.ids
    worker_group.start(worker_group.plan([member]))
    _kept(worker_group, member, first)
    worker_group.members[first].kill()
    worker_group.await_all([member], lambda r: r.protection.unkept == 0, SOON_S)
    committed = _kept(worker_group, member, second)
    worker_group.members[member].kill()
    _go_on(worker_group, member, second)
    plan = worker_group.directive.current
    assert plan is not None and plan.source is not None and (plan.source.step or 0) >= committed
    worker_group.await_finished()
    _same_training(worker_group, undisturbed)


def test_a_keeper_that_joins_frees_what_it_kept_once_the_new_world_has_settled(
    worker_group: LocalWorkerGroup, undisturbed: LocalWorkerGroup
) -> None:
    member, keeper, _ = worker_group.ids
    worker_group.start(worker_group.plan([member]))
    _kept(worker_group, member, keeper)
    plan = worker_group.rescale([member, keeper])
    worker_group.await_all([keeper], lambda r: r.phase is Phase.TRAINING, SOON_S)
    worker_group.send(settled=plan.generation)
    worker_group.await_all([keeper], lambda r: not any(h.generation == 0 for h in r.protection.holdings), SOON_S)
    worker_group.await_finished()
    assert sorted(worker_group.records) == list(range(STEPS))
    for step, record in worker_group.records.items():
        assert record.loss == undisturbed.records[step].loss


def test_a_member_changes_to_another_keeper_and_the_former_one_frees_its_copy(worker_group: LocalWorkerGroup) -> None:
    member, first, second = worker_group.ids
    worker_group.start(worker_group.plan([member]))
    _kept(worker_group, member, first)
    _kept(worker_group, member, second)
    worker_group.await_all([first], lambda r: r.protection.unkept == 0 and bool(r.protection.holdings), SOON_S)
    worker_group.send(keepers=worker_group.directive.keepers[1:])
    worker_group.await_all([first], lambda r: r.protection.holdings == (), SOON_S)
    worker_group.finish()

"""What is known of workers that are gone, and what the others are sent."""

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from orchestrator.controller import worker_group
from orchestrator.controller.worker_group import WorkerGroup
from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.world import World
from orchestrator.protocol.messages import Directive, GenerationPlan, StoreAddress
from orchestrator.protocol.sent_directive import SentDirective
from orchestrator.protocol.worker_phase import Phase
from orchestrator.protocol.worker_report import Report, ShardWritten
from orchestrator.spec.job import JobSpec
from orchestrator.worker.actor import Worker


def _shard(step: int, rank: int) -> ShardWritten:
    return ShardWritten(step, 0, rank, f"rank-{rank}", 0, "", "")


def test_the_last_reports_of_workers_that_are_gone_stay_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_group, "remove_group", lambda name: None)
    monkeypatch.setattr(worker_group, "MAX_GONE", 3)
    group = WorkerGroup("run", tmp_path, JobSpec(name="run"), "", 1, Mock())
    for rank, steps in enumerate([(9,), (9, 19), (), (19,)]):
        worker = f"w{rank}"
        group._handles[worker] = Mock()
        shards = tuple(_shard(step, rank) for step in steps)
        group.reports[worker] = Report(worker, 1, 0, Phase.TRAINING, 0, 20 + rank, 0, shards=shards)
    group._handles["w4"] = Mock()  # never answered
    group._known.update(("w0", "w1", "w2", "w3", "w4"))
    group.reconcile(("w1", "w2", "w3", "w4"))
    assert [(report.step, report.shards) for report in group.gone.values()] == [(20, (_shard(9, 0),))]
    group.reconcile(())
    assert {worker: report.shards for worker, report in group.gone.items()} == {
        "w1": (_shard(19, 1),),
        "w2": (),
        "w3": (_shard(19, 3),),
    }


def _plan(generation: int) -> GenerationPlan:
    world, placement = World(generation, ("w0",)), ExpertPlacement.balanced(2, 1)
    return GenerationPlan(1, world, placement, None, f"1/{generation}", StoreAddress("", 0))


class _Host:
    """A worker in this process, in place of its actor: answers at once, unless a directive is lost on its way."""

    def __init__(self, worker: str) -> None:
        self.worker, self.sent = Worker(worker), list[SentDirective]()

    def hosted(self) -> "_Host":
        return self

    def send(self, method: Callable[..., Any], *args: Any) -> Any:
        self.sent.extend(arg for arg in args if isinstance(arg, SentDirective))
        return getattr(self.worker, method.__name__)(*args)

    @property
    def directive(self) -> Directive:
        return self.worker._mailbox.directive


def _answered(inbox: object, report: Report, take: Callable[["Future[Report]"], None]) -> None:
    answer: Future[Report] = Future()
    answer.set_result(report)
    take(answer)


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WorkerGroup:
    monkeypatch.setattr(worker_group, "post", _answered)
    return WorkerGroup("run", tmp_path, JobSpec(name="run"), "", 1, Mock())


def _join(group: WorkerGroup, worker: str) -> _Host:
    group._handles[worker] = host = _Host(worker)  # type: ignore[assignment]
    return host


def test_a_plan_is_sent_until_the_worker_knows_it(group: WorkerGroup) -> None:
    host, old, new = _join(group, "w0"), _plan(0), _plan(1)
    steps: list[dict[str, Any]] = [{"next": old}, {"current": old}, {"current": old, "next": new}, {"current": new}]
    for seq, plans in enumerate(steps):
        directive = Directive(1, seq, **plans)
        group.direct(directive)
        assert host.directive == directive
    assert [sent.plans for sent in host.sent] == [(old,), (), (new,), ()]


def test_a_replaced_worker_and_a_restarted_controller_need_nothing_else(group: WorkerGroup) -> None:
    plan = _plan(0)
    first = _join(group, "w0")
    group.direct(Directive(1, 0, current=plan))
    second = _join(group, "w1")  # in place of a worker that is gone
    group.direct(Directive(1, 1, current=plan))
    assert [sent.plans for sent in second.sent] == [(plan,)] and second.directive.current == plan
    group._told.clear()  # as in the controller of the next term, before the first report
    group.reports.clear()
    group.direct(Directive(2, 0, current=plan, activated=0))
    assert [sent.plans for sent in first.sent] == [(plan,), (), (plan,)]
    assert first.directive == second.directive == Directive(2, 0, current=plan, activated=0)


def test_a_worker_that_lacks_a_plan_gets_the_directive_again(group: WorkerGroup) -> None:
    host, plan, directive = _join(group, "w0"), _plan(0), Directive(1, 0, current=_plan(0))
    group.reports["w0"] = Report("w0", 1, -1, Phase.STANDBY, -1, -1, -1, plans=(plan.digest,))  # it doesn't any more
    group.direct(directive)
    assert host.directive.current is None and "w0" in group.handles
    group.direct(directive)
    group.direct(directive)
    assert [sent.plans for sent in host.sent] == [(), (plan,)] and host.directive == directive

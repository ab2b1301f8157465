"""The desk from both sides: directives in, reports out."""

import threading
import time

import pytest

from orchestrator.errors import EpochSuperseded
from orchestrator.protocol.messages import Directive, Phase, StepRecord
from orchestrator.worker.runtime.mailbox import MAX_RECORDS, WorkerMailbox


def _record(step: int) -> StepRecord:
    return StepRecord(step, 0, 1, 1.0, 10, 0.1, 1.0, True, step, 1, 0.1, 0.0)


def test_the_newest_directive_wins() -> None:
    desk = WorkerMailbox("w0", 1)
    for epoch, seq in [(1, 5), (1, 4), (2, 0), (2, 0)]:
        desk.put(Directive(epoch, seq))
    assert (desk.directive.epoch, desk.directive.seq) == (2, 0)
    assert (desk.state.epoch, desk.state.seen) == (2, 0)


def test_a_replaced_controller_is_refused_and_nothing_changes() -> None:
    desk = WorkerMailbox("w0", 1)
    desk.put(Directive(2, 3))
    with pytest.raises(EpochSuperseded):
        desk.put(Directive(1, 9))
    assert (desk.directive.epoch, desk.directive.seq) == (2, 3)


def test_a_report_waits_for_news_and_no_longer() -> None:
    desk = WorkerMailbox("w0", 1)
    known = desk.state.version
    answers = []
    asker = threading.Thread(target=lambda: answers.append(desk.report(None, known, 30.0)))
    asker.start()
    desk.publish(phase=Phase.STANDBY)
    asker.join(10.0)
    assert answers[0].phase is Phase.STANDBY
    started = time.monotonic()
    assert desk.report(None, answers[0].version, 0.05).version == answers[0].version
    assert 0.04 < time.monotonic() - started < 5.0


def test_records_come_only_when_asked_for_and_only_the_newer_ones() -> None:
    desk = WorkerMailbox("w0", 1)
    for step in range(4):
        desk.record(_record(step))
    assert desk.report(None, -1, 0.0).records == ()
    report = desk.report(1, -1, 0.0)
    assert [r.step for r in report.records] == [2, 3] and report.step == 3


def test_a_controller_that_is_away_long_costs_bounded_memory() -> None:
    desk = WorkerMailbox("w0", 1)
    for step in range(MAX_RECORDS + 5):
        desk.record(_record(step))
    assert len(desk.report(-1, -1, 0.0).records) == MAX_RECORDS


def test_waiting_for_a_directive_ends_when_it_comes() -> None:
    desk = WorkerMailbox("w0", 1)
    got = []
    waiter = threading.Thread(target=lambda: got.append(desk.wait(lambda d: d.activated >= 3)))
    waiter.start()
    desk.put(Directive(1, 1, activated=2))
    desk.put(Directive(1, 2, activated=3))
    waiter.join(10.0)
    assert got[0].activated == 3


def test_a_newer_controller_counts_its_directives_anew() -> None:
    desk = WorkerMailbox("w0", 1)
    desk.put(Directive(1, 9, activated=4))
    desk.put(Directive(2, 0, activated=5))
    assert desk.wait(lambda d: d.epoch == 2, 0.0).activated == 5


def test_a_repeat_is_no_news() -> None:
    desk = WorkerMailbox("w0", 1)
    desk.put(Directive(1, 1))
    version = desk.state.version
    desk.put(Directive(1, 1))
    desk.put(Directive(1, 0))
    assert desk.state.version == version


def test_waiting_in_vain_ends_after_the_timeout_with_what_there_is() -> None:
    desk = WorkerMailbox("w0", 1)
    assert desk.wait(lambda d: d.activated >= 0, 0.01) == Directive(-1, -1)


def test_nothing_is_lost_between_threads() -> None:
    """Two publish, one records, one directs, two read: every change counts once, and no report goes back in time."""
    desk, rounds = WorkerMailbox("w0", 1), 300
    seen: list[list[int]] = [[], []]

    def read(mine: list[int]) -> None:
        version = -1
        while version < 4 * rounds:
            version = desk.report(None, version, 10.0).version
            mine.append(version)

    jobs = [threading.Thread(target=read, args=(mine,)) for mine in seen]
    jobs += [threading.Thread(target=lambda: [desk.publish(prepared=n) for n in range(rounds)]) for _ in range(2)]
    jobs.append(threading.Thread(target=lambda: [desk.record(_record(n)) for n in range(rounds)]))
    jobs.append(threading.Thread(target=lambda: [desk.put(Directive(1, n)) for n in range(rounds)]))
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(30.0)
    assert desk.state.version == 4 * rounds
    assert [r.step for r in desk.report(-1, -1, 0.0).records] == list(range(rounds))
    assert all(mine == sorted(set(mine)) and mine[-1] == 4 * rounds for mine in seen)


def test_a_failure_is_final() -> None:
    desk = WorkerMailbox("w0", 1)
    desk.publish(phase=Phase.FAILED)
    desk.publish(phase=Phase.FINISHED, generation=3)
    assert (desk.state.phase, desk.state.generation) == (Phase.FAILED, 3)

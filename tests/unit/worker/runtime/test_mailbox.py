"""The mailbox from both sides: directives in, reports out."""

import threading
import time
from dataclasses import replace

import pytest

from orchestrator.elastic.recovery_point import Holding
from orchestrator.errors import TermSuperseded
from orchestrator.protocol.messages import Directive
from orchestrator.protocol.step_record import BatchRecord, RoutingRecord, StepRecord, StepTiming, UpdateRecord
from orchestrator.protocol.worker_phase import Phase
from orchestrator.worker.runtime.mailbox import MAX_RECORDS, NEWEST, WorkerMailbox


def _record(step: int) -> StepRecord:
    return StepRecord(
        step, 0, 1, 1.0, BatchRecord(10, step, 1), UpdateRecord(0.1, 1.0, applied=True), StepTiming(0.1, 0.0)
    )


def test_the_newest_directive_wins() -> None:
    mailbox = WorkerMailbox("w0", 1)
    for term, seq in [(1, 5), (1, 4), (2, 0), (2, 0)]:
        mailbox.put(Directive(term, seq))
    assert (mailbox.directive.term, mailbox.directive.seq) == (2, 0)
    assert (mailbox.state.term, mailbox.state.seen) == (2, 0)


def test_a_replaced_controller_is_refused_and_nothing_changes() -> None:
    mailbox = WorkerMailbox("w0", 1)
    mailbox.put(Directive(2, 3))
    with pytest.raises(TermSuperseded):
        mailbox.put(Directive(1, 9))
    assert (mailbox.directive.term, mailbox.directive.seq) == (2, 3)


def test_a_report_waits_for_news_and_no_longer() -> None:
    mailbox = WorkerMailbox("w0", 1)
    known = mailbox.state.version
    answers = []
    asker = threading.Thread(target=lambda: answers.append(mailbox.report(None, known, 600.0)))
    asker.start()
    mailbox.publish(phase=Phase.STANDBY)
    asker.join(60.0)
    assert answers[0].phase is Phase.STANDBY
    started = time.monotonic()
    assert mailbox.report(None, answers[0].version, 0.05).version == answers[0].version
    assert time.monotonic() - started > 0.04


def test_holdings_of_the_last_thread_that_reports_them_are_the_newest() -> None:
    mailbox, held = WorkerMailbox("w0", 1), [Holding(0, 4, 0)]
    other = threading.Thread(target=lambda: mailbox.publish(holdings=lambda: tuple(held)))

    def holdings() -> tuple[Holding, ...]:
        before = tuple(held)
        held[:] = [Holding(0, 5, 0)]
        other.start()
        other.join(0.05)  # it waits
        return before

    mailbox.publish(holdings=holdings)
    other.join(60.0)
    assert mailbox.state.protection.holdings == (Holding(0, 5, 0),)


def test_records_come_only_when_asked_for_and_only_the_newer_ones() -> None:
    mailbox = WorkerMailbox("w0", 1)
    for step in range(4):
        mailbox.record(_record(step))
    assert mailbox.report(None, -1, 0.0).history.records == ()
    report = mailbox.report(1, -1, 0.0)
    assert [r.step for r in report.history.records] == [2, 3] and report.step == 3


def test_a_worker_that_goes_back_holds_no_later_step() -> None:
    mailbox = WorkerMailbox("w0", 1)
    mailbox.record(_record(7), committed=7, held=6)
    mailbox.go_back_to(4)
    assert (mailbox.state.protection.committed, mailbox.state.protection.held, mailbox.state.step) == (4, 4, 4)


def test_a_controller_that_is_away_long_costs_bounded_memory() -> None:
    mailbox = WorkerMailbox("w0", 1)
    for step in range(MAX_RECORDS + 5):
        mailbox.record(_record(step))
    assert len(mailbox.report(-1, -1, 0.0).history.records) == MAX_RECORDS


def test_waiting_for_a_directive_ends_when_it_comes() -> None:
    mailbox = WorkerMailbox("w0", 1)
    got = []
    waiter = threading.Thread(target=lambda: got.append(mailbox.wait(lambda d: d.activated >= 3)))
    waiter.start()
    mailbox.put(Directive(1, 1, activated=2))
    mailbox.put(Directive(1, 2, activated=3))
    waiter.join(60.0)
    assert got[0].activated == 3


def test_a_newer_controller_numbers_its_directives_from_the_start() -> None:
    mailbox = WorkerMailbox("w0", 1)
    mailbox.put(Directive(1, 9, activated=4))
    mailbox.put(Directive(2, 0, activated=5))
    assert mailbox.wait(lambda d: d.term == 2, 0.0).activated == 5


def test_a_repeat_is_no_news() -> None:
    mailbox = WorkerMailbox("w0", 1)
    mailbox.put(Directive(1, 1))
    version = mailbox.state.version
    mailbox.put(Directive(1, 1))
    mailbox.put(Directive(1, 0))
    assert mailbox.state.version == version


def test_a_wait_ends_after_the_timeout_with_the_present_report() -> None:
    mailbox = WorkerMailbox("w0", 1)
    assert mailbox.wait(lambda d: d.activated >= 0, 0.01) == Directive(-1, -1)


def test_nothing_is_lost_between_threads() -> None:
    """Two publish, one records, one directs, two read: every change counts once, and no report goes back in time."""
    mailbox, rounds = WorkerMailbox("w0", 1), 300
    seen: list[list[int]] = [[], []]

    def read(mine: list[int]) -> None:
        version = -1
        while version < 4 * rounds:
            version = mailbox.report(None, version, 60.0).version
            mine.append(version)

    jobs = [threading.Thread(target=read, args=(mine,)) for mine in seen]
    jobs += [threading.Thread(target=lambda: [mailbox.publish(prepared=n) for n in range(rounds)]) for _ in range(2)]
    jobs.append(threading.Thread(target=lambda: [mailbox.record(_record(n)) for n in range(rounds)]))
    jobs.append(threading.Thread(target=lambda: [mailbox.put(Directive(1, n)) for n in range(rounds)]))
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(120.0)
    assert mailbox.state.version == 4 * rounds
    assert [r.step for r in mailbox.report(-1, -1, 0.0).history.records] == list(range(rounds))
    assert all(mine == sorted(set(mine)) and mine[-1] == 4 * rounds for mine in seen)


def test_a_failure_is_final() -> None:
    mailbox = WorkerMailbox("w0", 1)
    mailbox.publish(phase=Phase.FAILED)
    mailbox.publish(phase=Phase.FINISHED, generation=3)
    assert (mailbox.state.phase, mailbox.state.generation) == (Phase.FAILED, 3)


def test_only_the_newest_steps_and_those_of_a_heat_map_keep_the_loads_of_experts() -> None:
    mailbox = WorkerMailbox("w0", 1)
    mailbox.keeps_loads = lambda step: step % 50 == 0
    for step in range(200):
        mailbox.record(replace(_record(step), routing=RoutingRecord(loads=((1, 2),))))
    with_loads = [r.step for r in mailbox.report(-1, -1, 0.0).history.records if r.routing.loads]
    assert with_loads == [0, 50, 100, *range(200 - NEWEST, 200)]

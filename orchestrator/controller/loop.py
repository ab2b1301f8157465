"""Life of a run's controller, in its own thread: train until the run has ended, then remove everything of it."""

import logging
import os
import time
import traceback
from contextlib import suppress

from orchestrator.cluster.published.status_publisher import StatusPublisher
from orchestrator.cluster.storage_thread import Lane, StorageThread
from orchestrator.controller.decisions import DecisionMaker
from orchestrator.controller.journal_writer import JournalWriter
from orchestrator.controller.keep_alive import keeping_workers_alive
from orchestrator.controller.observer import Observer
from orchestrator.controller.polling import ROUNDS_BURST_S, ROUNDS_SHARE, Polls, RoundLimiter
from orchestrator.controller.requests import BEGIN
from orchestrator.controller.services.run_services import RunServices
from orchestrator.controller.shutdown import FLUSH_S, await_gone, remove_groups, remove_taken_over
from orchestrator.controller.startup import OpenedRun
from orchestrator.controller.worker_group import WorkerGroup
from orchestrator.errors import TermSuperseded
from orchestrator.policy.state.run_state import ended
from orchestrator.protocol.events.base import Event
from orchestrator.protocol.events.run import ControllerFailed, Submitted
from orchestrator.protocol.status import RunPhase
from orchestrator.run_records.journaled_run import retry_until_written
from orchestrator.run_records.status import to_json
from orchestrator.storage.log_file import flush_logs
from orchestrator.storage.tasks import StorageTask, run_inline

log = logging.getLogger("orchestrator.control")


class RunLoop:
    """The loop of one run: process answers, then decide, at every change. What takes time that grows with the number of
    workers is done in rounds, which take a limited share of the time."""

    def __init__(
        self,
        run: OpenedRun,
        polls: Polls,
        storage: StorageThread,
        decisions: DecisionMaker,
        worker_group: WorkerGroup,
        services: RunServices,
        observer: Observer,
        publisher: StatusPublisher,
        writer: JournalWriter,
    ) -> None:
        self._run_id, self._limits, self._memory, self._cluster = run.run_id, run.limits, run.memory, run.cluster
        self._job_sha256 = run.job_sha256
        self._polls, self._storage, self._decisions, self._observer = polls, storage, decisions, observer
        self._worker_group, self._services, self._publisher, self._writer = worker_group, services, publisher, writer
        self._has_begun = False
        self.has_closed = False  # everything of the run has ended

    def live(self) -> None:
        """Control the run to its end."""
        self._publisher.start()
        try:
            try:
                self._adopt()
                self._train()
            except TermSuperseded:
                raise
            except Exception as error:  # the run ends as failed, with this as its reason, and is cleaned up
                with keeping_workers_alive(self._run_id):  # they have the last steps, and storage may hang
                    self._fail(error)
            with keeping_workers_alive(self._run_id):
                self._close()
        except TermSuperseded as error:
            log.error("run %s: %s", self._run_id, error)
            if error.cluster not in ("", self._cluster):  # else the run's processes are its successor's
                self._publisher.close()
                remove_taken_over(self._run_id, error)
        except Exception:
            log.exception("run %s: its end could not be recorded; the next incarnation tries again", self._run_id)
            flush_logs(FLUSH_S)
            os._exit(1)

    def _adopt(self) -> None:
        """Poll the workers that an earlier controller started. End those that it did not journal."""
        state = self._memory.state
        self._worker_group.adopt(state.worker_group)
        left_behind = self._worker_group.handles  # all others are of workers that an earlier incarnation ended
        remove_groups(self._run_id, state.num_spawned, keep=left_behind)
        self._polls.start()

    def _train(self) -> None:
        limiter, has_news = RoundLimiter(ROUNDS_SHARE, ROUNDS_BURST_S), False
        while self._memory.state.outcome is None:
            has_news |= self._polls.listen(limiter.wait_s(time.monotonic()) if has_news else None)
            begins, began_s = limiter.may_begin(time.monotonic()), time.thread_time()
            if begins:
                self._round(has_news)
                has_news = False
            self._storage.advance()
            self._publisher.note(self._memory.state)
            if begins:
                limiter.ended(time.monotonic(), time.thread_time() - began_s)

    def _round(self, has_news: bool) -> None:
        self._polls.send(time.monotonic())
        if not self._has_begun:
            if not self._storage.is_pending(BEGIN):
                self._storage.add(BEGIN, self._begin)
        elif has_news or self._waits_for_time() or self._observer.storage_trouble() is not None:
            self._storage.add("turn", self._turn, Lane.DECISIONS)
        if self._memory.compactor.is_due() and not self._storage.is_pending("compaction"):
            self._storage.add("compaction", self._memory.compactor.advance)

    def _begin(self) -> StorageTask[None]:
        with suppress(OSError):  # the loop tries again
            if Submitted not in self._memory.times:
                submitted = Submitted(self._run_id, self._limits.initial_workers, self._job_sha256)
                entry = yield from self._memory.note(submitted)
                self._services.tracker.publish_event(entry)
            yield from self._services.start(self._memory.data)
            self._has_begun = True
            self._storage.add("turn", self._turn, Lane.DECISIONS)

    def _waits_for_time(self) -> bool:
        """Whether the next decision may depend on time alone."""
        state = self._memory.state
        is_failing = state.transition is not None and state.transition.failing_since_s is not None
        is_late = state.is_recovering or state.wants_restore or is_failing or self._worker_group.is_quiet()
        return is_late and not state.is_queued

    def _turn(self) -> StorageTask[None]:
        if self._services.data not in (None, self._memory.data):
            yield from self._memory.prepared(self._services.data)
        yield from self._decisions.turn()

    def _fail(self, error: Exception) -> None:
        log.exception("run %s: its controller failed", self._run_id)
        trace = "".join(traceback.format_exception(error))
        self._storage.abandon()
        over = ended(self._memory.state, RunPhase.FAILED, f"the run's controller failed: {error!r}", trace)
        events = [ControllerFailed(trace), *(action for action in over.actions if isinstance(action, Event))]
        for entry in retry_until_written(lambda: run_inline(self._memory.decided(over.state, events))):
            self._services.tracker.publish_event(entry)

    def _close(self) -> None:
        """End and remove everything of the run, then write its final status to run storage."""
        state = self._memory.state
        self._storage.finish()
        self._polls.collect_last()
        self._writer.finish()  # what can't be undone follows
        self._worker_group.reconcile(())
        remove_groups(self._run_id, state.num_spawned)
        self._publisher.close()
        self._services.close(str(state.outcome), state.why, self._memory.progress.watermark)
        await_gone(self._run_id)
        retry_until_written(lambda: run_inline(self._memory.conclude(to_json(self._observer.status(closed=True)))))
        self.has_closed = True  # only once run storage shows it too
        log.info("run %s: %s: %s", self._run_id, state.outcome, state.why)

"""Mailbox between a worker's two threads: directives in, reports out.

The control thread never waits for a tensor: it stores the newest directive and copies what the training thread has
published. The training thread waits for the controller only when it has nothing to do.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

from orchestrator.errors import TermSuperseded
from orchestrator.protocol.changes import changed, read
from orchestrator.protocol.messages import Directive
from orchestrator.protocol.step_record import StepRecord, without_loads
from orchestrator.protocol.worker_phase import Phase
from orchestrator.protocol.worker_report import ProcessReport, Report, ShardWritten
from orchestrator.storage.condition import StorageTrouble

MAX_RECORDS = 10_000  # finished steps kept
NEWEST = 64  # of them that keep the loads of experts, which may be large, so that the controller gets them
MOST_UNPUBLISHED = 8_000  # of them, after which a member waits; those of a transition or the run's end come on top


class WorkerMailbox:
    """Thread-safe state of one worker, used by both threads.

    Attributes:
        keeps_loads: whether a step's record keeps the loads of experts when it is no longer one of the newest.
    """

    def __init__(self, worker: str, pid: int, most_unpublished: int = MOST_UNPUBLISHED) -> None:
        self._changed = threading.Condition()
        self.keeps_loads: Callable[[int], bool] = lambda step: True
        self._directive = Directive(term=-1, seq=-1)
        self._records: list[StepRecord] = []
        self._most_unpublished, self._published = most_unpublished, -1
        self._report = Report(
            worker=worker,
            term=-1,
            version=0,
            phase=Phase.COLD,
            generation=-1,
            step=-1,
            seen=-1,
            process=ProcessReport(pid=pid),
        )

    # -- the control thread's side -----------------------------------------------------------------------------

    def put(self, directive: Directive) -> None:
        """Accept a directive. The newest wins; a repeat or an older one of the same controller changes nothing.

        Raises:
            TermSuperseded: it comes from a controller that has been replaced.
        """
        with self._changed:
            if directive.term < self._directive.term:
                raise TermSuperseded(
                    f"directive of term {directive.term}; this worker obeys term {self._directive.term}",
                    remedy="A newer controller of this run exists; this one should stop.",
                    unchanged="The worker continues as before.",
                )
            if (directive.term, directive.seq) > (self._directive.term, self._directive.seq):
                self._directive = directive
                answered = {} if directive.check is not None else {"checked": None}  # no longer requested
                plans = tuple(plan.digest for plan in directive.plans)
                self._publish(term=directive.term, seen=directive.seq, plans=plans, **answered)

    def report(
        self, after_step: int | None, known_version: int, timeout_s: float, published: int | None = None
    ) -> Report:
        """The worker's report, as soon as its version is above `known_version` or `timeout_s` have passed.

        Args:
            after_step: if given, the records of finished steps after this one are added.
            published: the newest step whose record run storage has; None if the caller doesn't know.
        """
        with self._changed:
            if published is not None:
                self._published = published
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._report.version > known_version, timeout_s)
            records = () if after_step is None else tuple(r for r in self._records if r.step > after_step)
            return changed(self._report, records=records)

    # -- the training thread's side ----------------------------------------------------------------------------

    @property
    def directive(self) -> Directive:
        with self._changed:
            return self._directive

    @property
    def state(self) -> Report:
        with self._changed:
            return self._report

    def wait(self, ready: Callable[[Directive], bool], timeout_s: float | None = None) -> Directive:
        """The newest directive, once it satisfies `ready` (or `timeout_s` have passed)."""
        with self._changed:
            self._changed.wait_for(lambda: ready(self._directive), timeout_s)
            return self._directive

    def publish(self, **changes: Any) -> None:
        """Change fields of the report, or of its parts, and wake threads that wait for it.

        Args:
            changes: `holdings` may be a function, which is called with the lock: of several threads that publish them,
                the last one has the newest.
        """
        with self._changed:
            if callable(holdings := changes.get("holdings")):
                changes["holdings"] = holdings()
            self._publish(**changes)

    def record(self, record: StepRecord, **changes: Any) -> None:
        """Add a finished step, and change other fields of the report with it."""
        with self._changed:
            self._records.append(record)
            del self._records[:-MAX_RECORDS]
            if len(self._records) > NEWEST and not self.keeps_loads(self._records[-NEWEST - 1].step):
                self._records[-NEWEST - 1] = without_loads(self._records[-NEWEST - 1])
            if record.routing.saliency:
                changes["saliency"] = (record.step, record.routing.saliency)
            self._publish(step=record.step, first_record=self._records[0].step, **changes)

    def add_shard(self, written: ShardWritten) -> None:
        """Report a shard of a checkpoint. From the thread that wrote it."""
        with self._changed:
            self._publish(shards=(*self._report.shards[-3:], written), unsaved=None)

    def refuse_shard(self, why: StorageTrouble | None) -> None:
        """Report that storage refuses a shard, which is tried again; None: no longer. From the thread that tried."""
        with self._changed:
            if why != self._report.unsaved:  # news of a worker count as progress
                self._publish(unsaved=why)

    def refuse_rows(self, why: StorageTrouble | None) -> None:
        """Report that storage doesn't give the rows of the step, or takes no records; None: it does."""
        with self._changed:
            if why != self._report.unread:
                self._publish(unread=why)

    @property
    def is_full(self) -> bool:
        """Whether so many finished steps wait for run storage that no further one should begin."""
        with self._changed:
            newest = self._records[-1].step if self._records else -1
            first = next((record.step for record in self._records), 0)
            return newest - max(self._published, first - 1) >= self._most_unpublished

    @property
    def records(self) -> tuple[StepRecord, ...]:
        """The newest finished steps."""
        with self._changed:
            return tuple(self._records)

    def keep(self, records: Sequence[StepRecord]) -> None:
        """Add records of steps of another worker, which this one may have to report in its place."""
        with self._changed:
            while records and self._records and self._records[-1].step >= records[0].step:
                self._records.pop()
            self._records.extend(records)
            del self._records[:-MAX_RECORDS]

    def go_back_to(self, step: int, known: Sequence[StepRecord] = ()) -> None:
        """Drop records after `step`, from which the run continues. `known`: records up to it from other workers."""
        with self._changed:
            records = {record.step: record for record in (*self._records, *known) if record.step <= step}
            self._records = [records[number] for number in sorted(records)]
            protection = self._report.protection
            averages = [(r.step, r.routing.saliency) for r in self._records if r.routing.saliency]
            held = {"committed": min(step, protection.committed), "held": min(step, protection.held)}
            self._publish(step=step, saliency=averages[-1] if averages else None, **held)

    def _publish(self, **changes: Any) -> None:
        if self._report.phase is Phase.FAILED:  # final: a later success in another thread must not hide it
            changes.pop("phase", None)
        # Threads of older plans may end after those of newer ones.
        for name in ("prepared", "failed_generation", "settled", "stopped", "kept_by", "unkept"):
            changes[name] = max(changes.get(name, -1), read(self._report, name))
        self._report = changed(self._report, version=self._report.version + 1, **changes)
        self._changed.notify_all()

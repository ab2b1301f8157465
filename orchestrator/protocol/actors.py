"""Interfaces of actors whose classes the controller cannot import, because they need torch."""

from typing import Protocol

from orchestrator.protocol.sent_directive import SentDirective
from orchestrator.protocol.worker_job import WorkerJob
from orchestrator.protocol.worker_report import Report


class WorkerApi(Protocol):
    """A worker (`orchestrator.worker.actor.Worker`)."""

    def warm(self, job: WorkerJob) -> Report:
        """Become a standby. Idempotent."""

    def direct(self, sent: SentDirective) -> Report:
        """Accept a directive; the newest wins. One with a plan that isn't known here is not accepted: the report shows
        an older one as seen. Raises TermSuperseded for a directive of a replaced controller."""

    def report(
        self, after_step: int | None, known_version: int, timeout_s: float, published: int | None = None
    ) -> Report:
        """The worker's state, once it is newer than `known_version` or `timeout_s` has passed.

        Args:
            after_step: include records of the finished steps after this one; None for no records.
            published: the newest step whose record run storage has; None for unknown.
        """


class RendezvousApi(Protocol):
    """A run's rendezvous store (`orchestrator.comm.transport.rendezvous`)."""

    def address(self) -> tuple[str, int]:
        """Host and port on which the store listens."""

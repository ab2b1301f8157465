"""What the controller asks of actors whose classes it cannot import, because they need torch."""

from typing import Protocol

from orchestrator.protocol.messages import Directive, Report, WorkerJob


class WorkerApi(Protocol):
    """A worker (`orchestrator.worker.actor.Worker`)."""

    def warm(self, job: WorkerJob) -> Report:
        """Become a standby. A repeat is harmless."""

    def direct(self, directive: Directive) -> Report:
        """Take a directive; the newest wins. Raises TermSuperseded for one from a replaced controller."""

    def report(self, after_step: int | None, known_version: int, timeout_s: float) -> Report:
        """The worker's state, as soon as it is newer than `known_version` or `timeout_s` have passed.

        Args:
            after_step: with the records of the finished steps after this one; None for no records.
        """


class RendezvousApi(Protocol):
    """A run's rendezvous store (`orchestrator.comm.transport.rendezvous`)."""

    def address(self) -> tuple[str, int]:
        """Host and port where the store listens."""

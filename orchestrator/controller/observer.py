"""Observer of a run: what its controller knows at one moment, for decisions and for users."""

import time

from orchestrator.cluster.storage_thread import StorageThread
from orchestrator.controller.journal_writer import JournalWriter
from orchestrator.controller.requests import PendingRequests
from orchestrator.controller.run_checkpoints import RunCheckpoints
from orchestrator.controller.services.run_services import RunServices
from orchestrator.controller.startup import OpenedRun
from orchestrator.controller.worker_group import WorkerGroup
from orchestrator.policy.state.run_state import Observation
from orchestrator.protocol.status import RunStatus
from orchestrator.run_records.status import status_of
from orchestrator.storage.condition import StorageCondition, StorageTrouble


class Observer:
    """Reads what the other parts of the controller know. Methods may be called from any thread."""

    def __init__(
        self,
        run: OpenedRun,
        requests: PendingRequests,
        worker_group: WorkerGroup,
        services: RunServices,
        checkpoints: RunCheckpoints,
        storage: StorageThread,
        writer: JournalWriter,
    ) -> None:
        self._run, self._memory, self._requests, self._worker_group = run, run.memory, requests, worker_group
        self._services, self._checkpoints = services, checkpoints
        self._storage, self._writer = storage, writer

    def observe(self) -> Observation:
        """What is known now."""
        now_s = time.monotonic()
        return Observation(
            term=self._memory.term,
            now_s=time.time(),
            target=self._requests.newest,
            progress=self._memory.progress,
            reports=dict(self._worker_group.reports),
            lost=dict(self._worker_group.lost),
            gone=self._worker_group.gone,
            checkpointed=self._checkpoints.newest,
            checkpoints=self._checkpoints.paths,
            abandoned=self._checkpoints.abandoned,
            recording=self._memory.recording,
            restorable=self._checkpoints.restorable,
            is_searching=self._checkpoints.is_searching,
            unreadable=self._checkpoints.unreadable,
            causes=dict(self._worker_group.causes),
            nodes=dict(self._worker_group.nodes),
            silence_s=self._worker_group.silence_s(now_s),
            idle_s=now_s - self._worker_group.stirred_s,
            store_address=self._services.store.address,
            faults=self._services.faults,
            draining=self._requests.draining,
            grant=self._requests.grant,
            priority=self._requests.priority,
        )

    def storage_trouble(self) -> StorageTrouble | None:
        """What is wrong with run storage now: it doesn't answer, refuses entries of the journal, a checkpoint or
        prepared data, or doesn't give rows of a step, which are tried again meanwhile."""
        of_workers = (t for r in tuple(self._worker_group.reports.values()) for t in (r.unsaved, r.unread))
        own = self._memory.trouble or self._writer.trouble() or self._storage.trouble() or self._checkpoints.trouble
        return own or self._services.trouble or next(filter(None, of_workers), None)

    def status(self, closed: bool) -> RunStatus:
        """The run's status. `closed`: everything of the run has ended."""
        seen, trouble = self.observe(), self.storage_trouble()
        return status_of(
            self._run.limits,
            self._run.job.model,
            self._memory,
            seen,
            run_dir=self._run.run_dir,
            tracking_url=self._services.tracker.url,
            storage=trouble.condition if trouble is not None else StorageCondition.WELL,
            warning=(trouble.why if trouble is not None else seen.unreadable)
            or self._services.tracker.warning
            or self._services.callbacks.warning,
            preparing=self._services.preparing,
            resources=self._worker_group.request,
            closed=closed,
        )

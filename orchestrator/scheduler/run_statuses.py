"""Statuses of a cluster's runs, from whatever knows a run's newest one."""

import time
from dataclasses import replace
from functools import partial

from orchestrator.cluster.published.known_runs import directory_of
from orchestrator.controller.controller import RunController
from orchestrator.errors import ClusterUnreachable, NotFound, StorageError
from orchestrator.protocol.status import RunStatus
from orchestrator.run_records.final_status import read_status
from orchestrator.run_records.status import status_from_journal
from orchestrator.scheduler.controller_client import PATIENCE_S, ControllerClient
from orchestrator.storage.backends.location import Location
from orchestrator.storage.guard import StorageGuard

STATUS_S = 1.5  # limit of a call to run storage


class RunStatuses:
    """Reads statuses. Methods may be called from any thread.

    Args:
        storage: makes the calls to run storage.
    """

    def __init__(self, storage: StorageGuard) -> None:
        self._storage = storage
        self._ended: dict[str, RunStatus] = {}  # as read last, for while storage hangs

    def get(self, run_id: str) -> RunStatus:
        """The run's status: from its controller, from run storage if the run has ended, or from its journal if the
        controller's node is too busy for an answer. Raises NotFound, StorageError, ClusterUnreachable."""
        directory = directory_of(run_id)
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            controller = ControllerClient(run_id).find()
            try:
                return controller.ask(RunController.status) if controller else self._final(run_id, directory)
            except NotFound:  # its controller is ending
                if time.monotonic() > deadline_s:
                    raise
            except ClusterUnreachable as error:  # it is ending, or restarting
                if time.monotonic() > deadline_s:
                    return self._journalled(directory, error)
            time.sleep(0.1)

    def forget(self, run_id: str) -> None:
        """Forget the final status of a run that is resumed."""
        self._ended.pop(run_id, None)

    def _final(self, run_id: str, directory: Location) -> RunStatus:
        try:
            status = self._storage.call(directory.parent, STATUS_S, partial(read_status, directory))
        except StorageError:
            if run_id not in self._ended:
                raise
            return self._ended[run_id]
        self._ended[run_id] = status
        return status

    def _journalled(self, directory: Location, error: ClusterUnreachable) -> RunStatus:
        """Status as of the journal. Raises `error`, for which the controller isn't asked, if it can't be read."""
        try:
            status = self._storage.call(directory.parent, STATUS_S, partial(status_from_journal, directory))
        except StorageError:
            raise error from None
        why = f"its controller has not answered within {PATIENCE_S:.0f} s; this is the status as of its journal"
        return replace(status, why=why)

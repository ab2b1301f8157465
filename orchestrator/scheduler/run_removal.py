"""Removal of runs that have ended, from run storage, from MLflow and from the cluster's list."""

import logging
from functools import partial

from orchestrator.cluster.actors import ActorOptions, start_host
from orchestrator.cluster.published.known_runs import directory_of, forget_run
from orchestrator.cluster.published.published_keys import forget_key
from orchestrator.cluster.remote import Remote
from orchestrator.errors import ClusterUnreachable, JournalCorrupt, KeyUnknown, OrchestratorError
from orchestrator.run_records.final_status import has_ended
from orchestrator.run_records.removal import TrackedRun, refuse_active, remove_files
from orchestrator.scheduler.claims import RunClaims
from orchestrator.scheduler.controller_client import ControllerClient
from orchestrator.scheduler.run_statuses import STATUS_S, RunStatuses
from orchestrator.storage.backends.location import Location, is_there
from orchestrator.storage.guard import StorageGuard

log = logging.getLogger("orchestrator.control")

REMOVE_S = 60.0  # limit of the call to run storage
TRACKED_S = 45.0  # limit of the deletion in MLflow, by a process that imports it first


class RunRemoval:
    """Removes runs, one call for each run at a time.

    Args:
        claims: of runs that are being changed.
        storage: makes the calls to run storage.
        statuses: of all runs.
    """

    def __init__(self, claims: RunClaims, storage: StorageGuard, statuses: RunStatuses) -> None:
        self._claims, self._storage, self._statuses = claims, storage, statuses

    def remove(self, run_id: str, tracking: bool) -> str:
        """As `Scheduler.remove`."""
        with self._claims.claim(run_id):
            directory = directory_of(run_id)
            if self._storage.call(directory.parent, STATUS_S, partial(is_there, directory)):
                self._refuse_active(run_id, directory)
                ControllerClient(run_id).await_end()  # it writes its log until then
                if tracking:
                    self._remove_tracked(run_id, directory)
                self._storage.call(directory.parent, REMOVE_S, partial(self._remove_files, run_id, directory))
            forget_run(run_id)
            forget_key(run_id)
        log.info("run %s: removed from %s", run_id, directory)
        return str(directory)

    def _refuse_active(self, run_id: str, directory: Location) -> None:
        try:
            refuse_active(self._statuses.get(run_id))
        except (KeyUnknown, JournalCorrupt):  # it may still be removed, if other records show that it has ended
            if ControllerClient(run_id).find() is not None or not self._storage.call(
                directory.parent, STATUS_S, partial(has_ended, directory)
            ):
                raise

    def _remove_tracked(self, run_id: str, directory: Location) -> None:
        """In a process of its own: MLflow is imported there, and may not answer."""
        host = start_host(
            f"{run_id}/removal", "orchestrator.run_records.removal:TrackedRun", (directory,), ActorOptions()
        )
        tracked: Remote[TrackedRun] = host.within(TRACKED_S).hosted()
        try:
            tracked.ask(TrackedRun.remove)
        except ClusterUnreachable as error:
            raise OrchestratorError(
                f"it is not known whether the MLflow run of {run_id} is deleted: {error.message}",
                remedy="Try again once MLflow answers, or leave --tracking out.",
                unchanged="The run's files were not removed.",
            ) from error
        finally:
            host.kill()

    def _remove_files(self, run_id: str, directory: Location) -> None:
        with self._claims.extended(run_id):
            remove_files(directory)

"""Lookup of runs: in the cluster while that is up, in run storage at any time."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from orchestrator.cli.terminal.output import narrate
from orchestrator.client import OrchestratorClient
from orchestrator.cluster.jobs_api import is_url
from orchestrator.errors import ClusterUnreachable, NotFinished, NotFound, OrchestratorError, UsageError, nearest
from orchestrator.protocol.status import RunStatus
from orchestrator.run_records.removal import refuse_active, remove_files, remove_tracked
from orchestrator.run_records.run_files import RunFiles, holds_run, run_dir_in, runs_in
from orchestrator.storage.backends.location import Location, location_of
from orchestrator.storage.backends.probe import reading
from orchestrator.submission.waiting_in_storage import until_ended_in_storage

DEFAULT_STORAGE = Path("runs")
LOOK_EVERY_S, LOOK_IN_STORAGE_S = 0.3, 1.0  # each of the latter may read much of a bucket


class FoundRun:
    """A run's files, and its cluster if there is one.

    Args:
        client: of the cluster that the run was found in; None for one that was found in run storage.
        is_named: its run storage was named, so no cluster was asked, and one may have it.
        address: of that cluster, as of `OrchestratorClient`.
    """

    def __init__(
        self,
        run_id: str,
        files: RunFiles,
        client: OrchestratorClient | None,
        is_named: bool = False,
        address: str | None = None,
    ) -> None:
        self.run_id, self.files = run_id, files
        self._client, self._is_named, self._address = client, is_named, address

    @property
    def look_every_s(self) -> float:
        """Interval at which to poll for what is new."""
        return LOOK_EVERY_S if self._client is not None else LOOK_IN_STORAGE_S

    @property
    def is_in_cluster(self) -> bool:
        return self._client is not None

    def status(self) -> RunStatus:
        return self._client.get(self.run_id) if self._client else self.files.status()

    def wait(self, timeout_s: float | None) -> RunStatus:
        """The run's status at its end. Raises NotFinished if it has not ended by then, or nothing seems to write its
        journal; at once if no cluster has it and its storage was not named."""
        if self._client is not None:
            return self._client.wait(self.run_id, timeout_s=timeout_s)
        if self._is_named:
            return until_ended_in_storage(self.files, timeout_s)
        status = self.files.status()
        if not status.phase.ended:
            raise NotFinished(
                f"run {self.run_id} is {status.phase} by its storage, and no cluster that has it was found",
                remedy=f"Name its cluster with --address, or continue it with `orchestrator resume {self.run_id}`.",
            )
        return status

    def remove(self, tracking: bool) -> str:
        """Remove the files of the run, which has ended, and with `tracking` its MLflow run. Returns its directory.

        Raises UsageError if the run is active in the cluster after all, in the same storage.
        """
        if self._client is not None:
            return self._client.remove(self.run_id, tracking=tracking)
        self._refuse_active_in_cluster()
        if tracking:
            remove_tracked(self.files.run_dir)
        remove_files(self.files.run_dir)
        return str(self.files.run_dir)

    def _refuse_active_in_cluster(self) -> None:
        """Raise if the cluster has the run as active: a resumed run's old end stays in storage until its controller has
        opened it."""
        try:
            client = OrchestratorClient(self._address)
        except ClusterUnreachable:
            return
        with suppress(NotFound):
            status = client.get(self.run_id)
            if location_of(status.run_dir) == self.files.run_dir:
                refuse_active(status)

    def is_over(self) -> bool:
        """Whether nothing more will be written, as far as is known: only a run of a cluster, or of storage that was
        named, may go on."""
        if self._client is not None:
            return self._client.get(self.run_id).phase.ended
        return not self._is_named or self.files.has_ended()


def find_run(run_id: str, storage: str | None, address: str | None) -> FoundRun:
    """Find a run in the named storage; else in the cluster; else, if no cluster knows it, in ./runs.

    Raises:
        NotFound: there is no such run; the message gives the nearest names.
        UsageError: the cluster is named by URL, which shows no files; or no storage has such a URL.
        NotAllowed, StorageError: the storage can't be read.
        ClusterUnreachable: neither storage nor address named one, and ./runs doesn't hold the run either.
    """
    if storage is not None:
        return _in_storage(run_id, location_of(storage), address)
    if is_url(named := address or os.environ.get("RAY_ADDRESS")):
        raise UsageError(
            f"{named} is the URL of a Jobs API; this command needs the run's files, or the cluster itself",
            remedy="Call it in the cluster, or name run storage that this machine reaches: --storage DIR|URL.",
            unchanged="Nothing was started.",
        )
    try:
        client = OrchestratorClient(address)
        return FoundRun(run_id, RunFiles(location_of(client.get(run_id).run_dir)), client)
    except (ClusterUnreachable, NotFound) as error:
        if address is not None:
            raise
        here = DEFAULT_STORAGE.absolute()
        with reading(here):
            if holds_run(run_dir_in(here, run_id)):
                return FoundRun(run_id, RunFiles(here / run_id), None)
            if isinstance(error, ClusterUnreachable) and (known := runs_in(here)):
                raise NotFound(
                    f"there is no cluster, and {here} holds no run {run_id!r}",
                    remedy=f"{nearest(run_id, known)}Other storage is named by --storage DIR|URL, a cluster by "
                    "--address.",
                ) from error
        error.remedy += " A run that has left its cluster is read from run storage: --storage DIR|URL."
        raise


def _in_storage(run_id: str, storage: Location, address: str | None) -> FoundRun:
    with reading(storage):  # for the nearest names
        run_dir = run_dir_in(storage, run_id)
    return FoundRun(run_id, RunFiles(run_dir), None, is_named=True, address=address)


def find_runs(storage: str | None, address: str | None) -> Callable[[], tuple[RunStatus, ...]]:
    """A function that reads the status of every run of the named storage; else of the cluster; else, without one, of
    ./runs.

    Raises:
        NotFound: there is no such directory.
        NotAllowed, StorageError: the storage can't be read.
        ClusterUnreachable: neither storage nor address named one, and ./runs holds no run either.
    """
    if storage is not None:
        place = location_of(storage)
        with reading(place):
            if isinstance(place, Path) and not place.is_dir():
                raise NotFound(f"{storage} is no directory", remedy="Name run storage: --storage DIR|URL.")
        return lambda: _runs_in_storage(place)
    try:
        return OrchestratorClient(address).list
    except ClusterUnreachable:
        with reading(DEFAULT_STORAGE):
            if address is not None or not runs_in(DEFAULT_STORAGE):
                raise
        narrate(f"There is no cluster; these are the runs in {DEFAULT_STORAGE.absolute()}.")
        return lambda: _runs_in_storage(DEFAULT_STORAGE)


def _runs_in_storage(storage: Location) -> tuple[RunStatus, ...]:
    """The newest last. Runs whose records can't be read are left out, with a message."""
    with reading(storage):
        runs = runs_in(storage)
    found = []
    for run_id in runs:
        try:
            found.append(RunFiles(run_dir_in(storage, run_id)).status())
        except (ValueError, OrchestratorError) as error:
            narrate(f"Run {run_id} is left out: its records can't be read: {error}")
    return tuple(sorted(found, key=lambda status: status.submitted_time or 0.0))

"""Lookup of runs: in the cluster while that is up, in run storage at any time."""

import os
from pathlib import Path

from orchestrator.client import OrchestratorClient
from orchestrator.cluster.jobs_api import is_url
from orchestrator.errors import ClusterUnreachable, NotFound, UsageError, nearest
from orchestrator.protocol.status import RunStatus
from orchestrator.run_records.run_files import RunFiles, holds_run, run_dir_in, runs_in

DEFAULT_STORAGE = Path("runs")


class FoundRun:
    """A run's files, and its cluster if there is one."""

    def __init__(self, run_id: str, files: RunFiles, client: OrchestratorClient | None) -> None:
        self.run_id, self.files, self._client = run_id, files, client

    def status(self) -> RunStatus:
        return self._client.get(self.run_id) if self._client else self.files.status()

    def is_over(self) -> bool:
        """Whether nothing more will be written, as far as is known: without a cluster nothing writes."""
        return self._client is None or self._client.get(self.run_id).phase.ended


def find_run(run_id: str, storage: Path | None, address: str | None) -> FoundRun:
    """Find a run in the named storage; else in the cluster; else, if no cluster knows it, in ./runs.

    Raises:
        NotFound: there is no such run; the message gives the nearest names.
        UsageError: the cluster is named by URL, which shows no files.
        ClusterUnreachable: neither storage nor address named one, and ./runs doesn't hold the run either.
    """
    if storage is not None:
        return FoundRun(run_id, RunFiles(run_dir_in(storage, run_id)), None)
    if is_url(named := address or os.environ.get("RAY_ADDRESS")):
        raise UsageError(
            f"{named} is the URL of a Jobs API; this command needs the run's files, or the cluster itself",
            remedy="Call it in the cluster, or name run storage that is seen here: --storage DIR.",
            unchanged="Nothing was started.",
        )
    try:
        client = OrchestratorClient(address)
        return FoundRun(run_id, RunFiles(Path(client.get(run_id).run_dir)), client)
    except (ClusterUnreachable, NotFound) as error:
        if address is not None:
            raise
        here = DEFAULT_STORAGE.absolute()
        if holds_run(run_dir_in(here, run_id)):
            return FoundRun(run_id, RunFiles(here / run_id), None)
        if isinstance(error, ClusterUnreachable) and (known := runs_in(here)):
            raise NotFound(
                f"there is no cluster, and {here} holds no run {run_id!r}",
                remedy=f"{nearest(run_id, known)}Other storage is named by --storage DIR, a cluster by --address.",
            ) from error
        error.remedy += " A run that has left its cluster is read from run storage: --storage DIR."
        raise

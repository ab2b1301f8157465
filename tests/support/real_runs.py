"""Runs as users have them: a local cluster of one's own, and looks at it until something is so."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from orchestrator.client import OrchestratorClient
from orchestrator.cluster import local
from orchestrator.cluster.auth import reread_environment
from orchestrator.cluster.connection import disconnect
from orchestrator.protocol.status import RunStatus

PATIENCE_S = 200.0


@contextmanager
def at_home(home: Path) -> Iterator[None]:
    """Look for local clusters in `home` while this lasts. At the end this process is connected to none, and its
    environment, which says to whom and how, is as it was before."""
    with patch.dict(os.environ, ORCHESTRATOR_HOME=str(home)):
        os.environ.pop("RAY_ADDRESS", None)
        try:
            yield
        finally:
            disconnect()
    reread_environment()


@contextmanager
def own_cluster(home: Path, cpus: int) -> Iterator[OrchestratorClient]:
    """A local cluster that is recorded in `home` while this lasts, and a client of it."""
    with at_home(home):
        up = local.up(cpus)
        try:
            yield OrchestratorClient(up.record.address)
        finally:
            disconnect()
            local.down()


def until(client: OrchestratorClient, run: str, condition: Callable[[RunStatus], bool]) -> RunStatus:
    """The run's status, as soon as it is as wanted. AssertionError if the run ends before, or it takes too long."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition(status := client.get(run)):
        assert time.monotonic() < deadline_s and not status.phase.ended, status
        time.sleep(0.1)
    return status

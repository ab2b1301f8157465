"""Runs as users have them: a local cluster of one's own, and looks at it until something is so."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator.client import OrchestratorClient
from orchestrator.control import local_cluster
from orchestrator.control.connection import disconnect
from orchestrator.protocol.status import RunStatus

PATIENCE_S = 120.0


@contextmanager
def own_cluster(home: Path, cpus: int) -> Iterator[OrchestratorClient]:
    """A local cluster that is recorded in `home` while this lasts, and a client of it. What says whom this process
    connects to is taken out of the environment again."""
    kept = {name: os.environ.get(name) for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")}
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in kept.items():  # noted, and put back at the end
            monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("ORCHESTRATOR_HOME", str(home))
        up = local_cluster.up(cpus)
        try:
            yield OrchestratorClient(up.record.address)
        finally:
            disconnect()
            local_cluster.down()


def until(client: OrchestratorClient, run: str, condition: Callable[[RunStatus], bool]) -> RunStatus:
    """The run's status, as soon as it is as wanted. AssertionError if the run ends before, or it takes too long."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition(status := client.get(run)):
        assert time.monotonic() < deadline_s and not status.phase.ended, status
        time.sleep(0.1)
    return status

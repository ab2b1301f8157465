"""The cluster that a command starts for itself, and its end."""

import signal
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from orchestrator.cli.commands import cluster, data, run
from orchestrator.cluster import connection, local
from orchestrator.cluster.processes import Process
from orchestrator.spec.job import JobSpec

LEADER = Process(1, 0.0, "ray start")
RECORD = local.ClusterRecord("127.0.0.1:1", 4, "", "", "", 0.0, LEADER, (LEADER,))
JOB = JobSpec(name="ours")
MAKE = {
    "data prepare": lambda: data._cluster(None),
    "run": lambda: run._cluster(JOB, None, keep=False, leaves_run=True),
    "demo": lambda: run._cluster(JOB, None, keep=False, leaves_run=False),
}


class Started:
    """A local cluster that was started just now, where `active` runs are. SIGINT arrives while it ends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *active: str) -> None:
        self.has_ended = False
        monkeypatch.setattr(local, "up", lambda num_cpus: local.Up(RECORD, fresh=True))
        monkeypatch.setattr(local, "status", lambda: RECORD)
        monkeypatch.setattr(local, "down", self._down)
        monkeypatch.setattr(connection, "connect", lambda address: None)
        monkeypatch.setattr(cluster, "active_runs", lambda address: list(active))

    def _down(self) -> None:
        signal.raise_signal(signal.SIGINT)
        self.has_ended = True


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_a_second_ctrl_c_leaves_no_cluster_up(
    make: Callable[[], AbstractContextManager[object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = Started(monkeypatch)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), make():
        raise KeyboardInterrupt
    assert started.has_ended and signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("command", "active", "ends"),
    [
        ("run", ["ours"], False),
        ("demo", ["ours"], True),
        ("demo", ["ours", "another"], False),
    ],
)
def test_a_cluster_ends_with_the_run_of_a_demo_but_with_no_other(
    command: str, active: list[str], ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = Started(monkeypatch, *active)
    with pytest.raises(KeyboardInterrupt), MAKE[command]():
        raise KeyboardInterrupt
    assert started.has_ended is ends

"""Faults of whole hosts: a run with a worker on each of several, which lose their power or their link one at a time.

The hosts are those of `tests.support.hosts`, with Ray on each. The first is the head and is never lost. Whoever looks
at the run does so through a client on the head, as nothing outside reaches the hosts.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from benchmarks.support.losses import Fault, after_loss, within_a_step
from benchmarks.support.product import LiveRun
from orchestrator.client import OrchestratorClient
from orchestrator.cluster.actors import find
from orchestrator.cluster.calls import ask
from orchestrator.protocol.status import RunStatus
from orchestrator.protocol.worker_report import Report
from orchestrator.spec.job import JobSpec
from tests.support.driver import Driver
from tests.support.hosts import Hosts


class RemoteClient:
    """The calls of a client that a `LiveRun` makes, made on another host."""

    def __init__(self, driver: Driver) -> None:
        self._call = driver.call

    def submit(self, job: JobSpec) -> str:
        return str(self._call(OrchestratorClient.submit, job))

    def get(self, run_id: str) -> RunStatus:
        status: RunStatus = self._call(OrchestratorClient.get, run_id)
        return status

    def rebalance(self, run_id: str) -> None:
        self._call(OrchestratorClient.rebalance, run_id)

    def stop(self, run_id: str) -> None:
        self._call(OrchestratorClient.stop, run_id)

    def wait(self, run_id: str, timeout_s: float) -> RunStatus:
        status: RunStatus = self._call(OrchestratorClient.wait, run_id, timeout_s=timeout_s)
        return status


class HostedRun(LiveRun):
    """A run on hosts, seen from their head.

    Attributes:
        ended: its status, once it was stopped.
    """

    ended: RunStatus

    def __init__(self, hosts: Hosts, driver: Driver, job: JobSpec) -> None:
        super().__init__(RemoteClient(driver), job)  # type: ignore[arg-type]
        self._hosts, self._driver = hosts, driver

    def report_of(self, worker: str, after_step: int | None = None) -> Report:
        report: Report = self._driver.call(_report, f"{self._id}/worker/{worker}", after_step)
        return report

    def places(self) -> dict[int, tuple[str, ...]]:
        """The members on each host but the head."""
        found: dict[int, list[str]] = {}
        for worker in self.members():
            address = self._driver.call(_address, f"{self._id}/worker/{worker}", str(self.run_dir))
            found.setdefault(self._hosts.addresses.index(address), []).append(worker)
        return {index: tuple(workers) for index, workers in found.items() if index != 0}


@contextmanager
def hosted_run(job: JobSpec, mbit: float | None = None) -> Iterator[tuple[Hosts, HostedRun]]:
    """The job on as many hosts as it has workers, one on each; stopped at the end.

    Args:
        mbit: that each host's link lets through; None for all.
    """
    with Hosts(job.workers.initial) as hosts:
        hosts.start_ray(cpus=1)
        for index in range(job.workers.initial):
            if mbit is not None:
                hosts.limit(index, mbit)
        with Driver(hosts, 0) as driver:
            live = HostedRun(hosts, driver, job)
            yield hosts, live
            live.ended = live.stop()


def node_killed(hosts: Hosts, live: HostedRun, chance: random.Random) -> Fault:
    """Every process of a host ends at once. Another host joins in its place."""
    index, victims = _victims(live, chance)
    fault = after_loss(live, victims, partial(hosts.kill_host, index), within_a_step(live, chance.random()))
    hosts.join(hosts.add())
    return fault


def link_down(hosts: Hosts, live: HostedRun, chance: random.Random) -> Fault:
    """What a host sends, and what is sent to it, is lost, and nobody is told. Later its link is mended."""
    index, victims = _victims(live, chance)
    fault = after_loss(live, victims, partial(hosts.cut, index), within_a_step(live, chance.random()))
    hosts.mend(index)
    return fault


HOST_FAULTS: dict[str, Callable[[Hosts, HostedRun, random.Random], Fault]] = {
    "node_killed": node_killed,
    "link_down": link_down,
}


def _victims(live: HostedRun, chance: random.Random) -> tuple[int, tuple[str, ...]]:
    places = live.places()
    index = chance.choice(sorted(places))
    return index, places[index]


# -- called in the driver --------------------------------------------------------------------------------------------


def _report(client: OrchestratorClient, name: str, after_step: int | None) -> Any:
    return ask(find(name), "call", "report", after_step, -1, 0.0)


def _address(client: OrchestratorClient, name: str, directory: str) -> str:
    return str(ask(find(name), "read_system", directory).node)

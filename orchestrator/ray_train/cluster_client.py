"""The cluster of an `ElasticTrainer`: the one that is there, or one on this machine for as long as the run takes."""

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from orchestrator.client import OrchestratorClient
from orchestrator.cluster import local
from orchestrator.cluster.connection import disconnect
from orchestrator.errors import OrchestratorError
from orchestrator.spec.job import JobSpec

log = logging.getLogger("orchestrator.ray_train")

LOCAL_CPUS = 8  # logical; the least of a cluster that is started for a run


@contextmanager
def client_of(address: str | None, job: JobSpec) -> Iterator[OrchestratorClient]:
    """A client of the existing cluster; without one, of a cluster on this machine, which is stopped again."""
    is_there = address or os.environ.get("RAY_ADDRESS") or ray.is_initialized() or local.status() is not None
    if is_there:
        yield OrchestratorClient(address)
        return
    workers = job.workers.max + max(1, job.workers.standby)
    cpus = max(LOCAL_CPUS, os.cpu_count() or 1, math.ceil(job.resources.cpus * workers))
    up = local.up(cpus)
    try:
        yield OrchestratorClient(up.record.address)
    finally:
        is_needed = not up.fresh or _is_busy(up.record.address)
        disconnect()
        if not is_needed:
            local.down()


def _is_busy(address: str) -> bool:
    """Whether a run is active there, or may be."""
    try:
        return any(not status.phase.ended for status in OrchestratorClient(address).list())
    except OrchestratorError as error:
        log.warning("the local cluster stays up, as its runs can't be listed: %s", error)
        return True

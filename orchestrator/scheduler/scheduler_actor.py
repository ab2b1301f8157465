"""The actor that the Scheduler is."""

from typing import Any

import ray

from orchestrator.cluster.actors import NAMESPACE, ON_HEAD
from orchestrator.cluster.remote import Remote
from orchestrator.scheduler.scheduler import Scheduler

NAME = "scheduler"
MAX_CALLS_AT_ONCE = 32


def get_or_create_scheduler() -> Remote[Scheduler]:
    """The cluster's scheduler. Ray must be connected."""
    options = {
        "name": NAME,
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
        "num_cpus": 0,
        "resources": ON_HEAD,
        "max_restarts": -1,
        "max_task_retries": 0,
        "max_concurrency": MAX_CALLS_AT_ONCE,
    }
    handle: Any = ray.remote(Scheduler).options(**options).remote()
    return Remote(handle)

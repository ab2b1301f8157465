"""The way to a cluster's Scheduler: through Ray, or through the HTTP port of its Jobs API, where a call is a job."""

import os
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

from orchestrator.cluster.connection import connect, probe
from orchestrator.cluster.jobs_api import JobsApiClient, is_url
from orchestrator.cluster.published.published_keys import signer_in_cluster
from orchestrator.scheduler.scheduler import Scheduler
from orchestrator.scheduler.scheduler_actor import get_or_create_scheduler
from orchestrator.storage.backends.signing_keys import add_key_source
from orchestrator.submission.by_url import ask_by_url

HEAD_PATIENCE_S = 5.0  # calls fail if the head is unreachable for longer
ANSWER_TIMEOUT_S = 60.0  # the first call may wait for the Scheduler's process to start

P = ParamSpec("P")
R = TypeVar("R")


class ClusterAccess:
    """A connection to a cluster. Arguments and errors as of `OrchestratorClient`.

    Attributes:
        address: HOST:PORT of its head, or its URL.
        port: of its Jobs API, if it is called by URL.
    """

    def __init__(self, address: str | None) -> None:
        named = address or os.environ.get("RAY_ADDRESS")
        self.port = JobsApiClient(str(named)) if is_url(named) else None
        self.address = connect(address) if self.port is None else self.port.url
        if self.port is None:
            add_key_source(signer_in_cluster)
        self._scheduler = get_or_create_scheduler().within(ANSWER_TIMEOUT_S) if self.port is None else None

    def ask(self, method: Callable[Concatenate[Scheduler, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        """The result of the Scheduler's method. Raises the method's errors."""
        if self.port is not None:
            answer: R = ask_by_url(self.port, method.__name__, *args)
            return answer
        assert self._scheduler is not None, "a client by address has found the Scheduler"
        probe(self.address, patience_s=HEAD_PATIENCE_S)
        return self._scheduler.ask(method, *args, **kwargs)

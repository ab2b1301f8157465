"""Requests that a controller has accepted while run storage doesn't answer, in the cluster's key-value store.

A controller that is restarted before they are journalled takes them up from there.
"""

import json
import logging
from dataclasses import dataclass
from typing import Protocol

from ray.experimental import internal_kv

from orchestrator.protocol.codec import from_plain, to_plain
from orchestrator.protocol.messages import DesiredRunState

log = logging.getLogger("orchestrator.control")

KV_NAMESPACE = b"orchestrator-requests"


@dataclass(frozen=True)
class KeptRequests:
    """The newest requests to a run. Once they are journalled they count no more.

    Args:
        submitted_time: when the run was submitted: another run of its name has nothing to do with them.
        token: of the newest resume; they are void after a later one.
        num_priorities: how often the priority had been changed by the journal.
    """

    submitted_time: float
    token: str
    num_priorities: int
    target: DesiredRunState
    priority: int | None


class RequestStore(Protocol):
    """Where the requests to one run are kept."""

    def read(self) -> KeptRequests | None: ...

    def write(self, requests: KeptRequests) -> None: ...

    def clear(self) -> None: ...


class ClusterRequestStore:
    """The cluster's key-value store, which lives as long as the cluster's head."""

    def __init__(self, run_id: str) -> None:
        self._key = run_id.encode()

    def read(self) -> KeptRequests | None:
        """The requests; None if none are kept, or they can't be read."""
        try:
            found = internal_kv._internal_kv_get(self._key, namespace=KV_NAMESPACE)
            return None if found is None else from_plain(KeptRequests, json.loads(found))
        except Exception:  # of Ray's head, or of another version's record: the run goes on without them
            log.exception("requests that an earlier controller accepted can't be read")
            return None

    def write(self, requests: KeptRequests) -> None:
        """Replace what is kept."""
        text = json.dumps(to_plain(requests)).encode()
        internal_kv._internal_kv_put(self._key, text, overwrite=True, namespace=KV_NAMESPACE)

    def clear(self) -> None:
        """Keep nothing any more."""
        internal_kv._internal_kv_del(self._key, namespace=KV_NAMESPACE)

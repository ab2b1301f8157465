"""Client of the run's rendezvous store.

Members of a generation need the store only to connect, so training continues while it is down. Ray restarts its
process, which then has another address: every plan names the store it is made with (`GenerationPlan.store_address`).
"""

import logging
import time
from concurrent.futures import Future

import ray

from orchestrator.cluster.actors import ActorOptions, Host, find, start_host
from orchestrator.cluster.calls import reason_of
from orchestrator.cluster.inbox import Inbox, post
from orchestrator.cluster.remote import Remote
from orchestrator.protocol.actors import RendezvousApi
from orchestrator.protocol.messages import StoreAddress
from orchestrator.storage.backends.location import Location
from orchestrator.storage.backends.log_target import LogTarget

log = logging.getLogger("orchestrator.control")

NAME = "rendezvous"
ASK_AGAIN_S = 0.5
GIVE_UP_S = 60.0  # of failing calls without an address: the store can't be started here


class RendezvousClient:
    """Starts or finds the store, and keeps its address.

    Args:
        target: dotted name of the store's class.
    """

    def __init__(self, run_id: str, run_dir: Location, target: str, inbox: Inbox) -> None:
        self._name, self._target, self._inbox = f"{run_id}/{NAME}", target, inbox
        self._logs = LogTarget(run_dir, NAME)
        self._host: Remote[Host] | None = None  # while a call to it is open or it is known to be alive
        self._was_ended = False
        self._asked_s = 0.0
        self._failing_s: float | None = None  # since when it fails
        self.address: StoreAddress | None = None  # None while it is down
        self.fault = ""  # why the store was given up

    def tend(self, now_s: float) -> None:
        """Start, find or restart the store, and ask for its address, unless it is known or already asked for."""
        if self._host is None and now_s - self._asked_s >= ASK_AGAIN_S:
            self._asked_s, self._was_ended = now_s, False
            actor_options = ActorOptions(logs=self._logs, max_restarts=-1)
            self._host = start_host(self._name, self._target, (head_address(),), actor_options)
            store: Remote[RendezvousApi] = self._host.hosted()
            post(self._inbox, store.send(RendezvousApi.address), self._located)
            post(self._inbox, self._host.send(Host.hold), self._held)

    def end(self) -> None:
        """End the store, also one that an earlier controller started: a run without workers needs none."""
        if not self._was_ended:
            self._host, self.address, self._was_ended = None, None, True
            if (handle := find(self._name)) is not None:
                ray.kill(handle, no_restart=True)

    def _located(self, answer: "Future[tuple[str, int]]") -> None:
        """Note the store's address, or that it failed, unless its failure is already noted."""
        if self._host is None:
            return
        if (error := answer.exception()) is not None:
            self._failed(error)
        else:
            self.address, self._failing_s = StoreAddress(*answer.result()), None
            log.info("the rendezvous store listens at %s:%d", self.address.host, self.address.port)

    def _held(self, answer: "Future[None]") -> None:
        """Note that the store failed. A call that ends without an error: another controller holds it."""
        if self._host is not None and (error := answer.exception()) is not None:
            self._failed(error)

    def _failed(self, error: BaseException) -> None:
        self._host, self.address = None, None
        now_s, why = time.monotonic(), f"the rendezvous store failed: {reason_of(error)}"
        if self._failing_s is None:
            self._failing_s = now_s
            log.warning("%s; training continues, and no generation is planned until it is back", why)
        elif now_s - self._failing_s > GIVE_UP_S:
            self.fault = why


def head_address() -> str:
    """Address at which workers of other nodes reach this node, and the store, which is on the head too."""
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]

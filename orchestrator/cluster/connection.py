"""Connection of this process to a cluster: made quickly, or refused with an error that names a remedy."""

import logging
import os
import signal
import socket
import sys
import threading
import time

from orchestrator.cluster import local
from orchestrator.cluster.auth import check_head, check_token_file, reread_environment, token_refused
from orchestrator.errors import ClusterUnreachable, UsageError

NAMESPACE = "orchestrator"
PROBE_TIMEOUT_S = 2.0
PROBE_AGAIN_S = 0.2
START_ONE = "Start one with `orchestrator cluster up`, or name yours: --address HOST:PORT, or RAY_ADDRESS."


def connect(address: str | None = None) -> str:
    """Connect Ray to the cluster at `address`, else at RAY_ADDRESS, else to the local one. Returns its address.

    A process that is already connected keeps its connection.

    Raises:
        UsageError: the address is invalid.
        ClusterUnreachable: nothing answers there, or there is no cluster.
        NotAllowed: the cluster refused our token, or asks for none although it is reachable beyond this machine.
    """
    if "ray" in sys.modules and (joined := _connected_to()) is not None:
        check_head(joined)
        return joined
    wanted = find_cluster(address)
    probe(wanted)
    check_token_file()
    check_head(wanted)
    _join(wanted)
    return wanted


def find_cluster(address: str | None) -> str:
    """The address to connect to, as of `connect`. For the local cluster it sets the environment with its token.

    Raises:
        ClusterUnreachable: no cluster is named, and there is no local one.
    """
    record = local.status()
    wanted = address or os.environ.get("RAY_ADDRESS") or (record.address if record is not None else None)
    if wanted is None:
        raise ClusterUnreachable("there is no cluster on this machine, and none was named", remedy=START_ONE)
    if record is not None and wanted == record.address:
        os.environ.update(local.environment(record))
    return wanted


def disconnect() -> None:
    """Leave the cluster; detached actors there continue."""
    if "ray" in sys.modules:
        import ray

        ray.shutdown()


def _connected_to() -> str | None:
    import ray

    return str(ray.get_runtime_context().gcs_address) if ray.is_initialized() else None


def probe(address: str, patience_s: float = 0.0) -> None:
    """Check that a process listens at the address: Ray itself would retry for minutes if none does.

    Args:
        patience_s: how long to wait for a head that is being restarted.

    Raises:
        UsageError: the address is invalid.
        ClusterUnreachable: nothing listens.
    """
    host, _, port = address.rpartition(":")
    if address.startswith(("http:", "https:")):
        raise UsageError(
            f"cluster address {address} is the URL of a Jobs API; this needs HOST:PORT of a Ray head",
            remedy="From outside the cluster use `orchestrator submit`, and `status`, `logs -f` and so on afterwards.",
            unchanged="Nothing was changed.",
        )
    if "://" in address or not host or not port.isdigit():
        raise UsageError(
            f"cluster address {address} is not HOST:PORT of a Ray head", remedy="Name it like 10.0.0.5:6379."
        )
    deadline_s = time.monotonic() + patience_s
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), PROBE_TIMEOUT_S).close()
            return
        except OSError as error:
            if time.monotonic() > deadline_s:
                reason = error.strerror or error
                raise ClusterUnreachable(f"no cluster answers at {address}: {reason}", remedy=START_ONE) from None
        time.sleep(PROBE_AGAIN_S)


def _join(address: str) -> None:
    import ray
    from ray._private import worker as driver
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.exceptions import AuthenticationError

    # Else Ray ends this whole process, with its final messages, a minute after the cluster has gone.
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "86400")
    # Ray would print deaths of workers to stdout, which is for data; a run's events and status have them.
    driver.listen_error_messages = lambda *_: None
    reread_environment()
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        GcsClient(address=address)  # fails at once where ray.init fails after 20 tries
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except AuthenticationError:
        raise token_refused(address) from None
    except (ConnectionError, RuntimeError) as error:
        raise ClusterUnreachable(f"no cluster answers at {address}: {error}", remedy=START_ONE) from error
    if callable(on_sigterm) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray has replaced it

import socket
import threading
import time

import pytest

from orchestrator.cluster.connection import probe
from orchestrator.errors import ClusterUnreachable, UsageError
from tests.support.ports import free_port


@pytest.mark.parametrize("address", ["head", ":6379", "head:", "head:ray", "ray://head:10001"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(UsageError, match="is not HOST:PORT"):
        probe(address)


def test_a_missing_cluster_is_an_error_at_once_or_after_the_timeout() -> None:
    address = f"127.0.0.1:{free_port()}"
    started_s = time.monotonic()
    with pytest.raises(ClusterUnreachable, match="Connection refused"):
        probe(address)
    assert time.monotonic() - started_s < 1.0
    with pytest.raises(ClusterUnreachable):
        probe(address, patience_s=0.3)
    assert time.monotonic() - started_s >= 0.3


def test_a_head_that_comes_back_in_time_is_waited_for() -> None:
    port = free_port()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", port))  # refuses until it listens
        threading.Timer(0.3, listener.listen).start()
        probe(f"127.0.0.1:{port}", patience_s=30.0)

"""This process's gloo connections: a shared listening device, and a way to shut all connections at once.

gloo can't be interrupted: an operation that waits for a frozen or unreachable peer waits for its timeout, and `abort`
does not free it. Shutting the socket under it does, within milliseconds and whatever the peer does. So that only gloo's
own sockets are shut, and none of Ray's in the same process, all groups share one device with a known port, and peers
exchange their addresses. Linux only: sockets are found in /proc.
"""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

Address = tuple[str, int]
LOOPBACK = "127.0.0.1"
DISCARD = 9  # any port works

_lock = threading.Lock()
_device: Any = None
_address, _port = "", -1  # where the device listens
# Listening addresses of the peers of all groups, past ones included: the life of a group isn't known here, since torch
# keeps groups that it has adopted and drops their Python objects.
_peers: set[Address] = set()


def local_address(host: str) -> str:
    """The address of this machine on the route to `host`, where peers on the same network reach it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, DISCARD))  # sends nothing
        return str(probe.getsockname()[0])


def gloo_group(store: Store, prefix: str, rank: int, size: int, timeout: timedelta, address: str | None = None) -> Any:
    """A gloo group over the shared device. Collective over its `size` members.

    Args:
        address: where peers reach this process, as from `local_address`; the same for all of its groups. None: that of
            its earlier groups, or loopback if there were none.

    Raises:
        RuntimeError: a peer did not connect within `timeout`, or earlier groups use another address.
    """
    named = PrefixStore(prefix, store)
    options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [_shared_device(address)]
    options._timeout = timeout
    named.set(f"listens/{rank}", f"{_address}:{_port}")
    group = dist.ProcessGroupGloo(named, rank, size, options)
    listens = [address.decode().rpartition(":") for address in named.multi_get([f"listens/{p}" for p in range(size)])]
    with _lock:
        _peers.update((host, int(port)) for host, _, port in listens)
    return group


def shut_connections() -> int:
    """Shut every connection of this process's gloo groups: operations waiting at either end fail at once.

    Returns:
        how many were shut.
    """
    shut = 0
    with _lock:
        peers = set(_peers)
    for copy in _tcp_sockets():
        with suppress(OSError), copy:
            local, remote = copy.getsockname()[:2], copy.getpeername()[:2]
            if local[1] == _port or tuple(remote) in peers:
                copy.shutdown(socket.SHUT_RDWR)
                shut += 1
    return shut


def _shared_device(address: str | None) -> Any:
    global _device, _address, _port
    with _lock:
        if _device is None:
            before = _listening_ports()
            _address = address or LOOPBACK
            _device = dist.ProcessGroupGloo.create_device(hostname=_address)
            (_port,) = _listening_ports() - before
        elif address not in (None, _address):  # the device doesn't listen at the address that peers would get
            raise RuntimeError(f"this process's gloo groups are reached at {_address}, a new one can't be at {address}")
        return _device


def _listening_ports() -> set[int]:
    """Ports on which a socket of this process listens."""
    ports = set()
    for copy in _tcp_sockets():
        with suppress(OSError), copy:
            if copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                ports.add(int(copy.getsockname()[1]))
    return ports


def _tcp_sockets() -> Iterator[socket.socket]:
    """This process's TCP sockets, each through a duplicated descriptor that the caller closes."""
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                copy = socket.socket(fileno=os.dup(int(name)))
                if copy.family in (socket.AF_INET, socket.AF_INET6) and copy.type == socket.SOCK_STREAM:
                    yield copy
                else:
                    copy.close()

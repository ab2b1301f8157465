"""Statuses of runs as their controllers publish them, read from the head within milliseconds.

A client that asks the Scheduler imports Ray and joins the cluster, which takes seconds beside a run on all cores.
This one sends a request or two to the head's key-value store. Whatever prevents it, the client asks the Scheduler.
"""

import json
import time
from collections.abc import Callable
from typing import Any

from orchestrator.cluster.auth import is_open_allowed, read_token
from orchestrator.cluster.connection import find_cluster
from orchestrator.errors import OrchestratorError
from orchestrator.protocol.codec import from_plain
from orchestrator.protocol.status import RunStatus

KV_NAMESPACE = b"orchestrator-status"
FRESH_S = 3.0  # a controller publishes each second, or later on cores that its workers use
ANSWER_TIMEOUT_S = 1.0
SERVICE = "/ray.rpc.InternalKVGcsService"
# Numbers of fields in its requests and replies, in Ray's gcs_service.proto: the key of a get, keys of a multi-get or
# prefix of a list; the results of any of them; the value of an entry of a multi-get.
KEY, NAMESPACE, RESULT, VALUE = 1, 2, 2, 2


def content_of(status: Any, published_time: float) -> bytes:
    """What is stored for a status in plain form, which may be older than its publication in `time.time()` seconds."""
    return json.dumps({"published_time": published_time, "status": status}).encode()


def status_in(content: bytes) -> tuple[Any, float]:
    """The status in plain form, and when it was published. Raises ValueError for another content."""
    try:
        plain = json.loads(content)
        return plain["status"], float(plain["published_time"])
    except (KeyError, TypeError) as error:  # of another version
        raise ValueError(f"no published status: {error!r}") from error


def published_status(run_id: str, address: str | None) -> RunStatus | None:
    """The run's status, if its controller published it within the last seconds; else None.

    Args:
        address: as of `connect`.
    """
    found = _read(address, lambda head: head.ask("InternalKVGet", run_id.encode()))
    return found[0] if found else None


def published_statuses(address: str | None) -> tuple[RunStatus, ...]:
    """The status of every run whose controller published it within the last seconds, the newest run last. Empty if
    they can't be read.

    Args:
        address: as of `connect`.
    """
    found = _read(address, _all_values)
    return tuple(sorted(found, key=lambda status: status.submitted_time or 0.0))


def _all_values(head: "_Head") -> list[bytes]:
    keys = head.ask("InternalKVKeys", b"")
    entries = head.ask("InternalKVMultiGet", *keys) if keys else []
    return [value for entry in entries for value in _values(entry, VALUE)]


def _read(address: str | None, question: Callable[["_Head"], list[bytes]]) -> list[RunStatus]:
    """The fresh ones of the statuses that the head returns; none if it can't be asked."""
    import grpc  # type: ignore[import-untyped]

    try:
        where = find_cluster(address)
        with grpc.insecure_channel(where, options=[("grpc.enable_http_proxy", 0)]) as channel:
            contents = question(_Head(channel))
    except (OrchestratorError, ValueError, grpc.RpcError):
        return []
    return [status for content in contents if (status := _fresh_status(content)) is not None]


def _fresh_status(content: bytes) -> RunStatus | None:
    try:
        plain, published_time = status_in(content)
        status = from_plain(RunStatus, plain)
    except (OrchestratorError, ValueError):  # of a controller of another version
        return None
    return status if abs(time.time() - published_time) <= FRESH_S else None


class _Head:
    """The key-value store of a cluster's head. It is sent the token once it has asked for one."""

    def __init__(self, channel: Any) -> None:
        self._channel, self._token = channel, read_token()
        self._metadata: tuple[tuple[str, str], ...] = ()

    def ask(self, method: str, *keys: bytes) -> list[bytes]:
        """Results of a request in our namespace. Raises RpcError, and ValueError for a reply of another version."""
        import grpc

        question = b"".join(_field(KEY, key) for key in keys) + _field(NAMESPACE, KV_NAMESPACE)
        call = self._channel.unary_unary(f"{SERVICE}/{method}")
        try:
            reply = call(question, timeout=ANSWER_TIMEOUT_S, metadata=self._metadata)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAUTHENTICATED or self._token is None or self._metadata:
                raise
            self._metadata = (("authorization", f"Bearer {self._token}"),)
            reply = call(question, timeout=ANSWER_TIMEOUT_S, metadata=self._metadata)
        return _values(reply, RESULT) if self._metadata or is_open_allowed() else []


def _field(number: int, content: bytes) -> bytes:
    """A bytes field of a protocol buffer: Ray's own classes for it come only with all of Ray."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    low, high = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + _varint(high) if high else bytes([low])


def _values(message: bytes, number: int) -> list[bytes]:
    """Values of a field in a message whose fields are all of variable length. Raises ValueError."""
    found, at = [], 0
    while at < len(message):
        tag, at = _read_varint(message, at)
        length, at = _read_varint(message, at)
        if tag & 7 != 2:
            raise ValueError(f"reply has a field of wire type {tag & 7}")
        if tag >> 3 == number:
            found.append(message[at : at + length])
        at += length
    return found


def _read_varint(content: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        if at >= len(content):
            raise ValueError("reply ends within a number")
        number |= (content[at] & 0x7F) << shift
        if content[at] < 0x80:
            return number, at + 1
        at, shift = at + 1, shift + 7

"""Status of a run as its controller publishes it, read from the head within milliseconds.

A client that asks the Scheduler imports Ray and joins the cluster, which takes seconds beside a run on all cores.
This one sends a single request to the head's key-value store. Whatever prevents it, the client asks the Scheduler.
"""

import json
import time

from orchestrator.cluster.auth import is_open_allowed, read_token
from orchestrator.cluster.connection import find_cluster
from orchestrator.errors import OrchestratorError
from orchestrator.protocol.codec import from_plain
from orchestrator.protocol.status import RunStatus

KV_NAMESPACE = b"orchestrator-status"
FRESH_S = 3.0  # a controller publishes each second, or later on cores that its workers use
ANSWER_TIMEOUT_S = 1.0
METHOD = "/ray.rpc.InternalKVGcsService/InternalKVGet"
KEY, NAMESPACE, VALUE = 1, 2, 2  # numbers of fields in its request and reply, in Ray's gcs_service.proto


def published_status(run_id: str, address: str | None) -> RunStatus | None:
    """The run's status, if its controller published it within the last seconds; else None.

    Args:
        address: as of `connect`.
    """
    try:
        content = _read(find_cluster(address), run_id.encode())
        status = None if content is None else from_plain(RunStatus, json.loads(content))
    except (OrchestratorError, ValueError):  # of a controller of another version, or the Scheduler's client raises it
        return None
    if status is None or status.as_of_time is None or abs(time.time() - status.as_of_time) > FRESH_S:
        return None
    return status


def _read(address: str, key: bytes) -> bytes | None:
    import grpc  # type: ignore[import-untyped]

    question = _field(KEY, key) + _field(NAMESPACE, KV_NAMESPACE)
    token = read_token()
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        get = channel.unary_unary(METHOD)
        try:
            reply: bytes = get(question, timeout=ANSWER_TIMEOUT_S)  # the token is for clusters that ask for one
            return _value(reply) if is_open_allowed() else None
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAUTHENTICATED or token is None:
                return None
        try:
            return _value(get(question, timeout=ANSWER_TIMEOUT_S, metadata=(("authorization", f"Bearer {token}"),)))
        except grpc.RpcError:
            return None


def _field(number: int, content: bytes) -> bytes:
    """A bytes field of a protocol buffer: Ray's own classes for it come only with all of Ray."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    low, high = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + _varint(high) if high else bytes([low])


def _value(reply: bytes) -> bytes | None:
    """The value in a reply, whose fields are all of variable length; None if there is none. Raises ValueError."""
    at = 0
    while at < len(reply):
        tag, at = _read_varint(reply, at)
        length, at = _read_varint(reply, at)
        if tag & 7 != 2:
            raise ValueError(f"reply has a field of wire type {tag & 7}")
        if tag >> 3 == VALUE:
            return reply[at : at + length]
        at += length
    return None


def _read_varint(content: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        if at >= len(content):
            raise ValueError("reply ends within a number")
        number |= (content[at] & 0x7F) << shift
        if content[at] < 0x80:
            return number, at + 1
        at, shift = at + 1, shift + 7

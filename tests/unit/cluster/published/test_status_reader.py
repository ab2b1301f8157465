"""A run's status is read from the head only if it is fresh, and only with the token of a cluster that asks for one."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import grpc  # type: ignore[import-untyped]
import pytest
from ray.core.generated import gcs_service_pb2

from orchestrator.cluster.auth import ALLOW_NO_TOKEN
from orchestrator.cluster.published.status_reader import (
    FRESH_S,
    KV_NAMESPACE,
    SERVICE,
    content_of,
    published_status,
    published_statuses,
)
from orchestrator.protocol.codec import to_plain
from orchestrator.protocol.status import RunStatus
from tests.unit.cli.statuses import status

SECRET = "s" * 40


@dataclass
class Head(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Answers as a head of Ray does, from `values`."""

    address: str = ""
    asks_for_token: bool = True
    values: dict[bytes, bytes] = field(default_factory=dict)
    tokens: list[str | None] = field(default_factory=list)  # of all requests

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        token = dict(details.invocation_metadata).get("authorization")
        self.tokens.append(token)
        answers = {"InternalKVGet": self._get, "InternalKVKeys": self._keys, "InternalKVMultiGet": self._multi_get}
        answer = answers.get(details.method.removeprefix(f"{SERVICE}/"))
        is_allowed = not self.asks_for_token or token == f"Bearer {SECRET}"
        return grpc.unary_unary_rpc_method_handler(answer if is_allowed else _refuse) if answer else None

    def _keys(self, content: bytes, _: grpc.ServicerContext) -> bytes:
        request = gcs_service_pb2.InternalKVKeysRequest.FromString(content)  # type: ignore[attr-defined]
        assert (request.namespace, request.prefix) == (KV_NAMESPACE, b"")
        return bytes(gcs_service_pb2.InternalKVKeysReply(results=self.values).SerializeToString())  # type: ignore[attr-defined]

    def _multi_get(self, content: bytes, _: grpc.ServicerContext) -> bytes:
        request = gcs_service_pb2.InternalKVMultiGetRequest.FromString(content)  # type: ignore[attr-defined]
        assert request.namespace == KV_NAMESPACE
        reply = gcs_service_pb2.InternalKVMultiGetReply()  # type: ignore[attr-defined]
        for key in request.keys:
            reply.results.add(key=key, value=self.values[key])
        return bytes(reply.SerializeToString())

    def _get(self, content: bytes, _: grpc.ServicerContext) -> bytes:
        request = gcs_service_pb2.InternalKVGetRequest.FromString(content)  # type: ignore[attr-defined]
        reply = gcs_service_pb2.InternalKVGetReply()  # type: ignore[attr-defined]
        if request.namespace == KV_NAMESPACE and request.key in self.values:
            reply.value = self.values[request.key]
        else:
            reply.status.code, reply.status.message = 17, "Failed to find the key"
        return bytes(reply.SerializeToString())

    def publish(self, found: RunStatus) -> None:
        assert found.as_of_time is not None
        self.values[found.run_id.encode()] = content_of(to_plain(found), found.as_of_time)


def _refuse(_: bytes, context: grpc.ServicerContext) -> None:
    context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Head]:
    monkeypatch.setenv("ORCHESTRATOR_HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", SECRET)
    head = Head()
    server = grpc.server(ThreadPoolExecutor(2), handlers=(head,))
    head.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield head
    server.stop(None)


def test_a_fresh_status_is_read(head: Head) -> None:
    now = status(as_of_time=time.time(), why="ü" * 300)  # its length takes several bytes
    head.publish(now)
    found = published_status("try", head.address)
    assert found == now and found.as_of_time == now.as_of_time
    assert head.tokens == [None, f"Bearer {SECRET}"]


@pytest.mark.parametrize("age_s", [FRESH_S + 1, -FRESH_S - 1])
def test_an_old_one_is_not(head: Head, age_s: float) -> None:
    head.publish(status(as_of_time=time.time() - age_s))
    assert published_status("try", head.address) is None


def test_all_fresh_ones_are_read_in_the_order_of_their_submission(head: Head) -> None:
    assert published_statuses(head.address) == ()
    now = time.time()
    runs = [
        status(run_id="second", submitted_time=2.0, as_of_time=now),
        status(run_id="old", submitted_time=1.5, as_of_time=now - FRESH_S - 1),
        status(run_id="first", submitted_time=1.0, as_of_time=now, why="ü" * 300),
    ]
    for run in runs:
        head.publish(run)
    head.values[b"foreign"] = b"{"
    head.tokens.clear()
    assert published_statuses(head.address) == (runs[2], runs[0])
    assert head.tokens == [None, f"Bearer {SECRET}", f"Bearer {SECRET}"]  # sent as soon as it was asked for


def test_a_run_that_publishes_nothing_has_none(head: Head) -> None:
    assert published_status("other", head.address) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"run_id": "try"}'])
def test_what_another_version_published_is_left_to_the_scheduler(head: Head, content: bytes) -> None:
    head.values[b"try"] = content
    assert published_status("try", head.address) is None


def test_a_wrong_token_shows_nothing(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    head.publish(status(as_of_time=time.time()))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    assert published_status("try", head.address) is None and published_statuses(head.address) == ()


def test_a_cluster_that_asks_for_no_token_gets_none(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    head.asks_for_token = False
    head.publish(status(as_of_time=time.time()))
    assert published_status("try", head.address) is None and published_statuses(head.address) == ()
    monkeypatch.setenv(ALLOW_NO_TOKEN, "1")
    assert published_status("try", head.address) is not None and len(published_statuses(head.address)) == 1
    assert set(head.tokens) == {None}


@pytest.mark.parametrize("address", [None, "127.0.0.1:1", "nothing"])
def test_without_a_cluster_no_status_is_published(
    head: Head, monkeypatch: pytest.MonkeyPatch, address: str | None
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert published_status("try", address) is None and published_statuses(address) == ()

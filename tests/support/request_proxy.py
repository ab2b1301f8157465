"""HTTP proxy before a server with buckets: it injects faults, and makes conditional writes what they are on S3.

    with RequestProxy(server_port) as proxy:
        proxy.fail("PUT", RequestFault.LOST_REPLY)

moto checks the condition of a write and then writes: two that come at once may both succeed. So such writes to one key
go one after the other.
"""

import http.client
import socket
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CONDITION, GCS_CONDITION = ("If-None-Match", "*"), "x-goog-if-generation-match"
HOP_BY_HOP = ("connection", "keep-alive", "transfer-encoding", "content-length")


class RequestFault(StrEnum):
    """What happens to a request."""

    LOST_REQUEST = "not carried out; the connection ends"
    LOST_REPLY = "carried out; the connection ends"
    LATE_DUPLICATE = "carried out and answered; `deliver_late` carries it out again"
    LATE_REQUEST = "not carried out; the connection ends, and `deliver_late` carries it out"
    CONFLICT = "not carried out; answered with 409"
    UNAVAILABLE = "not carried out; answered with 503"
    UNAVAILABLE_DONE = "carried out; answered with 503"
    STALL = "not carried out; no answer until the proxy ends"
    TORN = "carried out; the connection ends after half of the answer's body"
    FLIPPED = "carried out; the answer's body has another bit"
    FORBIDDEN = "not carried out; answered with 403"
    GONE = "not carried out; answered with 404"
    NOT_IMPLEMENTED = "not carried out; answered with 501"


STATUS = {
    RequestFault.CONFLICT: 409,
    RequestFault.UNAVAILABLE: 503,
    RequestFault.FORBIDDEN: 403,
    RequestFault.GONE: 404,
    RequestFault.NOT_IMPLEMENTED: 501,
}
CODES = {
    409: "ConditionalRequestConflict",
    503: "SlowDown",
    403: "AccessDenied",
    404: "NoSuchUpload",
    501: "NotImplemented",
}


class RequestProxy:
    """Proxy on a free port of this machine.

    Attributes:
        ignores_conditions: whether writes are passed on without their conditions, as by a service without them.
        requests: numbers of requests so far, by method; one that the client repeats, as when it waited too long on a
            loaded machine, counts again.
        paths: different paths of these requests, by method.
    """

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._faults: defaultdict[str, deque[RequestFault | None]] = defaultdict(deque)
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._guard, self._ends = threading.Lock(), threading.Event()
        self._late: list[tuple[str, str, dict[str, str], bytes]] = []
        self.ignores_conditions = False
        self.requests: Counter[str] = Counter()
        self.paths: defaultdict[str, set[str]] = defaultdict(set)
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler_class())
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> "RequestProxy":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ends.set()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def fail(self, method: str, *faults: RequestFault | None) -> None:
        """Let the next requests of this method, and no others, meet these faults, one each; None is no fault."""
        with self._guard:
            self._faults[method] = deque(faults)

    @contextmanager
    def failing(self, method: str, fault: RequestFault) -> Iterator[None]:
        """Let all requests of this method meet this fault while this lasts."""
        self.fail(method, *[fault] * 10_000)
        try:
            yield
        finally:
            self.fail(method)

    def forget(self) -> None:
        """Drop faults to come, late requests and numbers."""
        with self._guard:
            self._faults.clear()
            self._late.clear()
            self.requests.clear()
            self.paths.clear()

    def deliver_late(self) -> list[int]:
        """Carry out the requests that are late. Returns their statuses."""
        late, self._late = self._late, []
        return [self.forward(*request)[0] for request in late]

    def take_fault(self, method: str, path: str) -> RequestFault | None:
        with self._guard:
            self.requests[method] += 1
            self.paths[method].add(path)
            return self._faults[method].popleft() if self._faults[method] else None

    def hold_back(self, method: str, path: str, headers: dict[str, str], body: bytes) -> None:
        self._late.append((method, path, headers, body))

    def wait_for_end(self) -> None:
        self._ends.wait()

    def forward(
        self, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        """The server's answer: status, headers, body."""
        headers = dict(CONDITION if name.lower() == GCS_CONDITION else (name, value) for name, value in headers.items())
        if self.ignores_conditions:
            headers = {name: value for name, value in headers.items() if name.lower() != "if-none-match"}
        if any(name.lower() == "if-none-match" for name in headers):
            with self._guard:
                lock = self._locks[path]
            with lock:
                return self._forward(method, path, headers, body)
        return self._forward(method, path, headers, body)

    def _forward(
        self, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        server = http.client.HTTPConnection("127.0.0.1", self._server_port, timeout=60.0)
        try:
            server.request(method, path, body, headers)
            answer = server.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            server.close()

    def _handler_class(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(_Handler):
            def respond(self) -> None:
                _respond(proxy, self)

        return Handler


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def respond(self) -> None:
        raise NotImplementedError

    def do_GET(self) -> None:
        self.respond()

    do_PUT = do_POST = do_HEAD = do_DELETE = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


def _respond(proxy: RequestProxy, handler: BaseHTTPRequestHandler) -> None:
    body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
    request = (handler.command, handler.path, dict(handler.headers.items()), body)
    fault = proxy.take_fault(handler.command, handler.path)
    if fault is RequestFault.STALL:
        proxy.wait_for_end()
    if fault in (RequestFault.LATE_DUPLICATE, RequestFault.LATE_REQUEST):
        proxy.hold_back(*request)
    if fault in (RequestFault.LOST_REQUEST, RequestFault.LATE_REQUEST, RequestFault.STALL):
        _hang_up(handler)
    elif fault in STATUS:
        _refuse(handler, STATUS[fault])
    else:
        status, headers, answer = proxy.forward(*request)
        if fault is RequestFault.LOST_REPLY:
            _hang_up(handler)
        elif fault is RequestFault.UNAVAILABLE_DONE:
            _refuse(handler, 503)
        else:
            if fault is RequestFault.FLIPPED:
                answer = answer[:-1] + bytes([answer[-1] ^ 1])
            _send(handler, status, headers, answer, is_torn=fault is RequestFault.TORN)


def _refuse(handler: BaseHTTPRequestHandler, status: int) -> None:
    _send(handler, status, {}, f"<Error><Code>{CODES[status]}</Code></Error>".encode())


def _send(
    handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bytes, is_torn: bool = False
) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        if name.lower() not in HOP_BY_HOP:
            handler.send_header(name, value)
    length = headers.get("Content-Length", str(len(body))) if handler.command == "HEAD" else str(len(body))
    handler.send_header("Content-Length", length)
    handler.end_headers()
    handler.wfile.write(body[: len(body) // 2] if is_torn else body)
    if is_torn:
        _hang_up(handler)


def _hang_up(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.flush()
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True

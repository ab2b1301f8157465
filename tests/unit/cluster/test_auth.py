"""Clusters without a token are accepted on loopback only, and tokens only from files that no other user may read."""

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest

from orchestrator.cluster.auth import ALLOW_NO_TOKEN, check_head, check_jobs_port, check_token_file, is_loopback
from orchestrator.cluster.jobs_api import JobsApiClient
from orchestrator.errors import ClusterUnreachable, NotAllowed

OURS = [
    address.address
    for addresses in psutil.net_if_addrs().values()
    for address in addresses
    if address.family == socket.AF_INET and not address.address.startswith("127.")
]
needs_an_address = pytest.mark.skipif(not OURS, reason="this machine has no address but loopback")


class Server(HTTPServer):
    """Answers as a Jobs API does, with `status` to who shows no token."""

    status = 200


class Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        self.send_response(200 if self.headers["Authorization"] else self.server.status)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("0.0.0.0", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@needs_an_address
def test_a_jobs_api_beyond_loopback_must_ask_for_a_token(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"http://{OURS[0]}:{server.server_port}"
    with pytest.raises(NotAllowed, match=rf"{url} asks for no token.* {ALLOW_NO_TOKEN}=1 .*Nothing was sent"):
        JobsApiClient(url)
    check_jobs_port(f"http://localhost:{server.server_port}")
    monkeypatch.setenv(ALLOW_NO_TOKEN, "yes")
    with pytest.raises(NotAllowed):
        check_jobs_port(url)
    monkeypatch.setenv(ALLOW_NO_TOKEN, "1")
    check_jobs_port(url)


@needs_an_address
@pytest.mark.parametrize("status", [401, 403])
def test_one_that_asks_is_taken(server: Server, status: int) -> None:
    server.status = status
    check_jobs_port(f"http://{OURS[0]}:{server.server_port}/")


def test_an_address_that_is_no_ray_head_is_an_error(server: Server) -> None:
    with pytest.raises(ClusterUnreachable, match="does not answer as a head of Ray"):
        check_head(f"127.0.0.1:{server.server_port}")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_what_is_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.5", "fd00::2", "no-such-host.invalid"])
def test_addresses_beyond_loopback(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize(("mode", "refused"), [(0o600, False), (0o400, False), (0o640, True), (0o604, True)])
def test_a_token_file_is_readable_by_its_owner_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, refused: bool
) -> None:
    token = tmp_path / "token"
    token.write_text("0" * 64)
    token.chmod(mode)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    if not refused:
        check_token_file()
        return
    with pytest.raises(NotAllowed, match=rf"{token} may be read by others \(mode {mode:04o}\).*chmod 600"):
        check_token_file()
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    check_token_file()


def test_a_missing_token_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(NotAllowed, match=f"can't be read from {tmp_path / 'none'}: No such file"):
        check_token_file()

"""The notice of a spot instance's end: read from a metadata service as AWS has it."""

import http.server
import importlib.util
import json
import threading
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[3] / "cluster" / "spot_notice.py"
NOW = datetime(2026, 1, 31, 12, 0, 0, tzinfo=UTC)


def _module() -> Any:
    spec = importlib.util.spec_from_file_location("spot_notice", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


spot_notice = _module()


@contextmanager
def _metadata(planned: dict[str, str] | None, code: int = 404) -> Iterator[str]:
    """A metadata service of version 2 on loopback: nothing without a token, `code` while nothing is planned."""

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            wanted = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
            self._answer(200 if wanted else 400, "a-token")

        def do_GET(self) -> None:
            if self.headers["X-aws-ec2-metadata-token"] != "a-token":
                self._answer(401, "")
            elif planned is None or self.path != "/latest/meta-data/spot/instance-action":
                self._answer(code, "")
            else:
                self._answer(200, json.dumps(planned))

        def _answer(self, status: int, text: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *words: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def test_nothing_is_planned() -> None:
    with _metadata(None) as address:
        assert spot_notice.notice(address) is None


def test_the_end_is_planned() -> None:
    planned = {"action": "terminate", "time": "2026-01-31T12:02:00Z"}
    with _metadata(planned) as address:
        assert spot_notice.notice(address) == planned
    assert spot_notice.seconds_left(planned, NOW) == 120


def test_a_service_that_fails_is_not_taken_for_one_that_plans_nothing() -> None:
    with _metadata(None, code=503) as address, pytest.raises(urllib.error.HTTPError):
        spot_notice.notice(address)


@pytest.mark.parametrize("late_s", [118, 120, 500])
def test_a_notice_that_is_read_late_leaves_a_moment(late_s: int) -> None:
    planned = {"action": "terminate", "time": "2026-01-31T12:02:00Z"}
    assert spot_notice.seconds_left(planned, NOW + timedelta(seconds=late_s)) == spot_notice.LEAST_NOTICE_S

"""Who may ask the MLflow server that we start: browsers that were sent by a page of another site may not."""

import http.client
from collections.abc import Iterator

import pytest

from orchestrator.tracking.mlflow_server import MlflowServer, names_of

SEARCH = "/api/2.0/mlflow/experiments/search?max_results=1"
CREATE = "/api/2.0/mlflow/experiments/create"

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    folder = tmp_path_factory.mktemp("mlflow")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE", "true")
        monkeypatch.setenv("MLFLOW_SERVER_ALLOWED_HOSTS", "*")
        with MlflowServer(f"sqlite:///{folder}/mlflow.db", log=folder / "log", names=["runs.example"]) as server:
            yield server


def _status(server: MlflowServer, method: str, path: str, **headers: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30.0)
    body = '{"name": "forged"}' if method == "POST" else None
    connection.request(method, path, body, {"Content-Type": "application/json", **headers})
    status = connection.getresponse().status
    connection.close()
    return status


@pytest.mark.parametrize("host", ["evil.example", "10.evil.example", "127.0.0.1.evil.example", "127.0.0.1:1"])
@pytest.mark.parametrize("path", ["/", SEARCH, "/ajax-api/2.0/mlflow/experiments/search?max_results=1"])
def test_a_forged_host_is_refused(server: MlflowServer, host: str, path: str) -> None:
    assert _status(server, "GET", path, Host=host) == 403


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "runs.example"])
def test_its_own_names_are_taken(server: MlflowServer, name: str) -> None:
    place = f"{name}:{server.port}"
    assert _status(server, "GET", SEARCH, Host=place, Origin=f"http://{place}") == 200


def test_a_forged_origin_changes_nothing(server: MlflowServer) -> None:
    assert _status(server, "POST", CREATE, Origin="http://evil.example") == 403
    assert _status(server, "POST", CREATE, Origin=server.url) == 200  # so the name was not taken by the other


def test_a_forged_origin_may_not_read(server: MlflowServer) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30.0)
    connection.request("GET", SEARCH, headers={"Origin": "http://evil.example"})
    answer = connection.getresponse()
    assert answer.getheader("Access-Control-Allow-Origin") is None  # so a browser keeps it from the page
    connection.close()


def test_a_server_for_others_is_called_by_its_names_alone() -> None:
    assert names_of("10.0.0.5") == ["10.0.0.5"] and names_of("fd00::2") == ["[fd00::2]"]
    everywhere = names_of("0.0.0.0")
    assert "127.0.0.1" in everywhere and not any("*" in name or name == "0.0.0.0" for name in everywhere)

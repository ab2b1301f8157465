"""A real cluster on this machine, started and ended as users do, in a home of its own."""

import json
import os
import socket
import stat
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from orchestrator.cluster import local
from orchestrator.cluster.local import ClusterRecord, environment
from orchestrator.cluster.processes import Process, is_running, living_of
from orchestrator.errors import ClusterUnreachable, OrchestratorError, UsageError
from orchestrator.protocol.codec import to_plain

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
CONNECT = "from orchestrator.cluster.connection import connect; connect({address!r}); "
START_ACTOR = (
    "import ray\n"
    "@ray.remote\n"
    "class Stayer:\n"
    "    def pid(self):\n"
    "        import os, orchestrator\n"
    "        return os.getpid(), orchestrator.__path__[0]\n"
    "stayer = Stayer.options(name='stayer', lifetime='detached').remote()\n"
    "print(*ray.get(stayer.pid.remote()))"
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("ORCHESTRATOR_HOME", str(tmp_path / "home"))
    yield tmp_path / "home"
    local.down()


def python(script: str, **env: str) -> "subprocess.CompletedProcess[str]":
    """In a separate process that knows of Ray only by `env`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**kept, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        timeout=200,
    )


def members(record: ClusterRecord) -> list[int]:
    return [process.pid for process in living_of(record.head, record.processes)]


def test_up_and_down_leave_nothing(home: Path) -> None:
    record = local.up(6).record
    assert local.status() == record
    assert record.num_cpus == 6 and all(is_running(process) for process in record.processes)
    assert stat.S_IMODE(os.stat(record.token_path).st_mode) == 0o600
    assert stat.S_IMODE((home / "clusters" / "local").stat().st_mode) == 0o700
    assert stat.S_IMODE(os.stat(record.temp_dir).st_mode) == 0o700
    assert only_loopback(record)
    scrape = home / "clusters" / "local" / "scrape.json"
    (group,) = json.loads(scrape.read_text())
    assert group["targets"] == [record.metrics_address]
    with urllib.request.urlopen(f"http://{record.metrics_address}/metrics", timeout=60.0) as answer:
        assert answer.status == 200  # without a token: Prometheus has none

    done = python(CONNECT.format(address=None) + START_ACTOR, ORCHESTRATOR_HOME=str(home))
    assert done.returncode == 0, done.stderr
    worker, package = done.stdout.split()
    assert package == str(ROOT / "orchestrator")
    assert int(worker) in members(record)  # its driver has ended; it has not

    pids = members(record)
    assert local.down() == record
    assert members(record) == [] and [pid for pid in pids if psutil.pid_exists(pid)] == []
    assert not Path(record.temp_dir).exists() and not Path(record.token_path).exists() and not scrape.exists()
    assert local.status() is None and local.down() is None


def test_two_ups_at_once_start_one_cluster_and_only_who_has_its_token_gets_in(home: Path, tmp_path: Path) -> None:
    started: list[local.Up] = []
    threads = [threading.Thread(target=lambda: started.append(local.up(2))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(up.fresh for up in started) == [False, True]
    assert started[0].record == started[1].record

    record = started[0].record
    whoever = {"ORCHESTRATOR_HOME": str(tmp_path / "elsewhere"), **environment(record)}
    script = CONNECT.format(address=record.address) + "print('in')"
    token = tmp_path / "wrong"
    token.write_text("0" * 64)
    wrong = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    for env, mode in (({"RAY_AUTH_MODE": "disabled"}, 0o600), (wrong, 0o600), (wrong, 0o644)):
        token.chmod(mode)
        refused = python(script, **whoever | env)
        assert "NotAllowed" in refused.stderr and "in" not in refused.stdout
        assert ("may be read by others" in refused.stderr) is (mode == 0o644)
    assert python(script, **whoever).stdout == "in\n"
    # one who imported Ray before with another idea of authentication gets in too
    early = python("import ray; " + script, ORCHESTRATOR_HOME=str(home), RAY_AUTH_MODE="disabled")
    assert early.stdout == "in\n", early.stderr


def test_a_cluster_that_was_killed_is_noticed_and_cleared_away(home: Path) -> None:
    record = local.up(2).record
    head = psutil.Process(record.head.pid)
    head.kill()
    psutil.wait_procs([head], timeout=60)
    assert local.status() is None
    assert members(record) == [] and not Path(record.temp_dir).exists()
    assert local.up(2).fresh


def test_a_record_whose_pid_was_reused_kills_no_process(home: Path, tmp_path: Path) -> None:
    stranger = subprocess.Popen(["sleep", "600"], start_new_session=True)
    try:
        reused = Process(stranger.pid, "an earlier start", "ray start")
        temp_dir, token, log = (str(tmp_path / name) for name in ("temp", "token", "log"))
        record = ClusterRecord("127.0.0.1:1", 2, temp_dir, token, log, 0.0, reused, (reused,))
        path = home / "clusters" / "local" / "cluster.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(to_plain(record)))
        assert local.status() is None and not path.exists()
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_a_record_of_another_version_is_named_and_kept(home: Path) -> None:
    path = home / "clusters" / "local" / "cluster.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"address": "127.0.0.1:1", "head": {"pid": 1, "created_time": 0.0}}')
    try:
        with pytest.raises(OrchestratorError, match=r"cluster\.json, can't be read.*another version"):
            local.up(2)
        assert path.exists()
    finally:
        path.unlink()


def test_a_failed_start_is_an_error_and_is_cleaned_up(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> list[str]:
        return [sys.executable, "-c", "raise SystemExit('no room')"]

    monkeypatch.setattr(local, "head_command", broken)
    with pytest.raises(ClusterUnreachable, match="no room"):
        local.up(2)
    assert local.status() is None
    assert not (home / "clusters" / "local" / "token").exists()


def test_a_port_in_use_is_an_error_before_anything_starts(home: Path) -> None:
    with pytest.raises(UsageError, match="port 18265 for the Jobs API: Ray gives ports 10002 to 19999 to its workers"):
        local.up(2, jobs_port=18265)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {port} for the Jobs API: it can't be used: Address already in use"):
            local.up(2, jobs_port=port)
    assert local.status() is None


def only_loopback(record: ClusterRecord) -> bool:
    """Whether no process of the cluster listens to the outside."""
    hosts = {
        connection.laddr.ip
        for process in living_of(record.head, record.processes)
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }
    return bool(hosts) and all(host in ("127.0.0.1", "::ffff:127.0.0.1", "::1") for host in hosts)

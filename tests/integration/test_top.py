"""The live screen of a real cluster: in this process, led by Textual's pilot, and on a terminal of its own."""

import asyncio
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest.mock import patch

import psutil
import pytest
from textual.pilot import Pilot
from textual.widgets import Static

from orchestrator.cli.top.client_process import ClusterLink
from orchestrator.cli.top.look import Look
from orchestrator.cli.top.screen import TopApp
from orchestrator.client import OrchestratorClient
from orchestrator.cluster import local
from orchestrator.spec.job import JobSpec
from orchestrator.spec.workers import WorkersSpec
from tests.support.control import UNHURRIED
from tests.support.real_runs import own_cluster
from tests.support.real_runs import until as await_status
from tests.support.simulated_services import simulated_parts
from tests.support.texts import small_job

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
PATIENCE_S = 120.0
ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[()][A-Z0-9]|\x1b[=>78]")


@pytest.mark.journey
def test_a_run_is_opened_scaled_and_stopped_by_keys(texts: Path, tmp_path: Path) -> None:
    workers = WorkersSpec(min=1, max=3, initial=2)
    changes = {"name": "watched", "workers": workers, "storage": str(tmp_path / "runs")}
    job: JobSpec = small_job(texts, max_steps=100_000).model_copy(update=changes)

    async def live(link: ClusterLink) -> None:
        app = TopApp(link, Look(link.address, link.begin(None), link.is_joining))

        async def until(name: str, words: str) -> None:
            deadline_s = time.monotonic() + PATIENCE_S
            while words not in _text(pilot, name):
                assert time.monotonic() < deadline_s, (words, _text(pilot, name))
                await pilot.pause(0.05)

        async def until_error(words: str) -> None:
            deadline_s = time.monotonic() + PATIENCE_S
            while not any(note.severity == "error" and words in note.message for note in app._notifications):
                assert time.monotonic() < deadline_s
                await pilot.pause(0.05)

        async with app.run_test(size=(120, 40)) as pilot:
            await until("title", "1 run, 1 going on")
            await pilot.press("enter")
            await until("head", "2 workers, ")
            await until("traffic-text", "snapshots    each step")
            await pilot.press("plus")
            await until("head", "3 workers, ")
            await until("workers-text", "rank 2   training")
            await until("events-text", "rescaled  2 -> 3 workers")
            await pilot.press("plus")
            await until_error("4")  # more than workers.max
            await pilot.press("s", "y")
            await until("head", "stopped")
            await until("workers-text", "none: the run has ended")

    with own_cluster(tmp_path / "home", cpus=4) as client:
        client.submit(job)
        link = ClusterLink(client.address)
        try:
            asyncio.run(live(link))
        finally:
            link.close()
        assert client.get("watched").rescales[-1].to_size == 3


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OrchestratorClient]:
    """A client of a cluster with a run `watched`, of simulated workers."""
    job = JobSpec.model_validate(
        {
            "schema": "v1",
            "name": "watched",
            "storage": str(tmp_path_factory.mktemp("runs")),
            "workers": {"min": 1, "max": 4, "initial": 2},
            "resources": {"cpus": 0.5},
            "train": {"max_steps": 100_000, "global_batch_size": 16, "micro_batch_size": 4},
            "envs": UNHURRIED,
        }
    )
    with (
        patch.dict(os.environ, PYTHONPATH=str(ROOT)),  # for the cluster's processes
        own_cluster(tmp_path_factory.mktemp("home"), cpus=4) as client,
    ):
        client.submit(job, parts=simulated_parts())
        yield client


@pytest.fixture
def training(cluster: OrchestratorClient) -> OrchestratorClient:
    """That client, once the run trains with two workers."""
    await_status(cluster, "watched", lambda status: status.step > 0)
    cluster.scale("watched", 2)
    await_status(cluster, "watched", lambda status: status.workers_now == 2)
    return cluster


@pytest.mark.journey
@pytest.mark.parametrize("opened", [(), ("watched",)], ids=["list", "run"])
def test_the_first_screen_comes_before_the_cluster_is_joined_and_early_requests_are_carried_out(
    training: OrchestratorClient, opened: tuple[str, ...]
) -> None:
    with _terminal("top", *opened) as (process, until):
        child = _client_process(process.child.pid)
        child.suspend()  # it can't have joined yet
        until("joining the cluster, 1 going on")
        until("watched")
        os.write(process.terminal, b"+")
        until("Sent once the cluster is joined.")
        os.write(process.terminal, b"+")
        child.resume()
        until("watched: 4 workers wanted")
        until("1 run, 1 going on")
        assert training.get("watched").workers_wanted == 4
        os.write(process.terminal, b"q")
        assert process.code(PATIENCE_S) == 0
    with _terminal("top", *opened) as (process, until):
        child = _client_process(process.child.pid)
        child.suspend()
        until("joining the cluster, 1 going on")
        os.write(process.terminal, b"q")
        assert process.code(PATIENCE_S) == 0 and psutil.wait_procs([child], timeout=PATIENCE_S)[1] == []


@pytest.mark.journey
def test_errors_at_the_start_end_the_command(training: OrchestratorClient, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("0" * 64)
    wrong.chmod(0o600)
    foreign = {"ORCHESTRATOR_HOME": str(tmp_path / "elsewhere"), "RAY_ADDRESS": "", "RAY_AUTH_MODE": "token"}
    refused = foreign | {"RAY_ADDRESS": training.address, "RAY_AUTH_TOKEN_PATH": str(wrong)}
    for arguments, environment, code, words in (
        (["absent"], {}, 102, "this cluster has no run 'absent'"),
        ([], refused, 77, "refused this process: its token is missing or wrong"),
        (["watched"], refused, 77, "refused this process: its token is missing or wrong"),
        ([], foreign, 69, "there is no cluster on this machine, and none was named"),
        (["--address", "127.0.0.1:1"], {}, 69, "no cluster answers at 127.0.0.1:1"),
    ):
        with _terminal("top", *arguments, **environment) as (process, _):
            assert process.code(PATIENCE_S) == code
            assert words in " ".join(process.seen().split())


@pytest.mark.journey
def test_a_cluster_that_dies_is_a_line_and_its_successor_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    first = local.up(2)
    try:
        with _terminal("top") as (process, until):
            until("no run yet")
            os.kill(first.record.head.pid, signal.SIGKILL)
            until("No answer, trying again")
            second = local.up(2)
            until(second.record.address)
            os.write(process.terminal, b"q")
            process.code(PATIENCE_S)
            seen = process.seen()
        assert process.child.returncode == 0 and "Traceback" not in seen and "Error" not in seen
    finally:
        local.down()


@pytest.mark.parametrize("verb", [["top"], ["top", "watched"]])
def test_without_a_terminal_the_screen_is_refused_with_a_remedy(verb: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "orchestrator.cli.main", *verb], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert "top needs a terminal" in done.stderr and "-o json" in done.stderr and "Nothing was changed" in done.stderr


def _client_process(pid: int) -> psutil.Process:
    """The process that calls the cluster for the screen of process `pid`, as soon as there is one."""
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        for child in psutil.Process(pid).children():
            with suppress(psutil.Error):
                if "orchestrator.cli.top.client_process" in child.cmdline():
                    return child
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def _text(pilot: Pilot[None], name: str) -> str:
    found = pilot.app.screen.query(f"#{name}")
    return str(found.first(Static).render()) if found else ""


class OnTerminal:
    """A command on a terminal of 80 by 24, and all that it wrote there."""

    def __init__(self, child: subprocess.Popen[bytes], terminal: int) -> None:
        self.child, self.terminal, self._written = child, terminal, b""

    def code(self, timeout_s: float) -> int:
        """The command's exit code, once it has ended. Its output is read meanwhile: it waits for that."""
        deadline_s = time.monotonic() + timeout_s
        while (code := self.child.poll()) is None:
            assert time.monotonic() < deadline_s, self.seen()
            self.seen()
        return code

    def seen(self) -> str:
        while select.select([self.terminal], [], [], 0.1)[0]:
            try:
                self._written += os.read(self.terminal, 65536)
            except OSError:  # it has ended
                break
        return ESCAPES.sub("", self._written.decode(errors="replace"))


@contextmanager
def _terminal(*arguments: str, **environment: str) -> Iterator[tuple[OnTerminal, Callable[[str], None]]]:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    env = os.environ | {"TERM": "xterm-256color"} | environment
    command = [sys.executable, "-m", "orchestrator.cli.main", *arguments]
    child = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env, start_new_session=True)
    os.close(theirs)
    process = OnTerminal(child, ours)

    def until(words: str) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while words not in (seen := process.seen()):
            assert time.monotonic() < deadline_s and child.poll() is None, seen[-3000:]

    try:
        yield process, until
    finally:
        child.kill()
        child.wait()
        os.close(ours)

"""A user whose host is no part of the cluster's network and reaches one port of it; and clusters without a token.

The user's files lie where no node sees them, and what the nodes share is not seen by the user.
"""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from orchestrator.client import OrchestratorClient
from orchestrator.cluster.auth import ALLOW_NO_TOKEN
from orchestrator.protocol.status import RunPhase, RunStatus
from orchestrator.run_records.run_files import RunFiles
from tests.support.driver import Driver
from tests.support.hosts import Hosts, until
from tests.support.outside import GATEWAY, Laptop
from tests.support.own_models import linear
from tests.support.texts import small_job

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(300),
    pytest.mark.skipif(Hosts.available() is not None, reason=str(Hosts.available())),
]
JOBS_PORT = 8265
REACH = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 1.0); print('reached')"


def _job(texts: Path, storage: Path, name: str, **changes: Any) -> str:
    plain = small_job(texts, max_steps=100_000).model_copy(update={"name": name, "storage": str(storage)})
    job = plain.model_dump(mode="json", by_alias=True) | {"workers": "1..3", **changes}
    job["model"] |= {"entrypoint": "mine.net:build", "code_dir": "code"}
    return json.dumps(job)


def _until(run_dir: Path, condition: Callable[[RunStatus], bool]) -> RunStatus:
    """Read from run storage."""
    found: list[RunStatus] = []

    def is_so() -> bool:
        if (run_dir / "job.json").exists():
            found[:] = [RunFiles(run_dir).status()]
        return bool(found) and condition(found[0])

    until(is_so, 120.0, f"{run_dir}: {found}")
    return found[0]


def left(client: OrchestratorClient) -> tuple[list[str], list[str]]:
    """Names of living actors, and states of placement groups that are not removed. In a driver."""
    actors = [actor["Name"] for actor in ray._private.state.actors().values() if actor["State"] != "DEAD"]
    groups = [group["state"] for group in ray.util.placement_group_table().values()]
    return sorted(name for name in actors if name), [state for state in groups if state != "REMOVED"]


def test_a_host_outside_sends_steers_and_ends_a_run(texts: Path, tmp_path: Path) -> None:
    storage = tmp_path / "shared"
    storage.mkdir()
    with Hosts(2) as hosts:
        hosts.start_ray(cpus=2, jobs_port=JOBS_PORT)
        with Laptop(hosts, JOBS_PORT, hidden=(storage, texts)) as laptop, Driver(hosts, 0) as driver:
            for address, port, reached in (
                (GATEWAY, JOBS_PORT, True),
                (GATEWAY, 6379, False),
                (hosts.addresses[0], JOBS_PORT, False),
                (hosts.addresses[1], 6379, False),
            ):
                said = laptop.run([sys.executable, "-c", REACH, address, str(port)]).stdout
                assert (said == "reached\n") is reached, (address, port)

            laptop.write("job.yaml", _job(texts, storage, "distant"))
            laptop.write("code/mine/net.py", linear())
            assert laptop.command("submit", "job.yaml").stdout == "distant\n"
            assert laptop.run(["ls", str(storage)]).stdout == ""  # what is asked for below comes through the port
            run_dir = storage / "distant"
            _until(run_dir, lambda s: s.step > 5)
            assert json.loads(laptop.command("status", "distant", "-o", "json").stdout)["phase"] == "training"
            follower = laptop.popen(laptop.ours("events", "distant", "-f"))
            assert follower.stdout is not None
            until(lambda: "generation_planned" in follower.stdout.readline(), 60.0, "the first event")
            laptop.command("scale", "distant", "-w", "2")
            _until(run_dir, lambda s: bool(s.rescales) and s.rescales[-1].stall_s is not None)
            until(lambda: "rescale" in follower.stdout.readline(), 60.0, "the event of the rescale")
            laptop.interrupt("-f")
            _, said = follower.communicate(timeout=30.0)
            assert (follower.returncode, said) == (0, "")
            (listed,) = json.loads(laptop.command("ls", "-o", "json").stdout)
            assert (listed["run_id"], listed["workers_now"]) == ("distant", 2)
            (job_id,) = set(re.findall(r"submission_id='(distant-[^']+)'", laptop.ray("list")))
            assert "generation" in laptop.ray("logs", job_id)
            laptop.command("stop", "distant")
            ended = _until(run_dir, lambda s: s.phase is RunPhase.STOPPED)
            assert ended.checkpoint_step == ended.step - 1
            assert json.loads(laptop.command("check", "data", "distant", "-o", "json").stdout)["ok"]
            until(lambda: driver.call(left) == (["scheduler"], []), 20.0, "the end of all that belonged to the run")
            until(lambda: not _running(laptop.ray("list")), 30.0, "the end of Ray's jobs")


def _running(listed: str) -> list[str]:
    """Submitted jobs that go on, of what `ray job list` prints; a driver of this test is in there too."""
    return [job for job in listed.split("JobDetails(") if "SUBMISSION" in job and "RUNNING" in job]


@pytest.fixture
def open_hosts() -> Iterator[Hosts]:
    """Ray on two hosts, and it asks for no token."""
    with Hosts(2, asks=False) as hosts:
        hosts.start_ray(jobs_port=JOBS_PORT)
        yield hosts


def test_a_cluster_without_a_token_is_refused(open_hosts: Hosts, texts: Path, tmp_path: Path) -> None:
    storage = tmp_path / "shared"
    (tmp_path / "job.yaml").write_text(json.dumps({"schema": "v1", "name": "open", "storage": str(storage)}))
    head, url = open_hosts.head, f"http://{open_hosts.addresses[0]}:{JOBS_PORT}"
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(open_hosts.token)}

    def call(host: int, *arguments: str, **variables: str) -> "tuple[int, str]":
        command = [sys.executable, "-m", "orchestrator.cli.main", *arguments]
        env = open_hosts.environment() | variables
        there = ["env", "--chdir", str(tmp_path), *command]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = open_hosts.popen(host, there, env=env, text=True, **pipes)
        out, err = process.communicate(timeout=60.0)
        return process.returncode, out + err

    for address in (head, url):
        for env in ({}, token):  # a token of ours doesn't make the cluster ask for one
            for command in (("ls",), ("submit", "job.yaml")):
                code, said = call(0, *command, "--address", address, **env)
                assert code == 77 and f"{address} asks for no token" in said and ALLOW_NO_TOKEN in said, said
    # A head that listens to all is no better for being called by its loopback.
    code, said = call(0, "ls", "--address", "127.0.0.1:6379")
    assert code == 77 and "asks for no token" in said
    assert not storage.exists()
    began_s = time.monotonic()
    for address in (head, url):
        code, said = call(0, "ls", "--address", address, **{ALLOW_NO_TOKEN: "1"})
        assert code == 0, said
    print(f"two lists with what has to be said aloud: {time.monotonic() - began_s:.1f} s")

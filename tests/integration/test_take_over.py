"""Two clusters and one storage: a run continues in the one that takes it over, and the other ends the run's
processes."""

import json
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.cli_user import JOB, Here
from tests.support.control import UNHURRIED
from tests.support.worker_processes import until_workers

pytestmark = [pytest.mark.ray, pytest.mark.journey, pytest.mark.timeout(600)]

COUNTED = """
import json, ray
from orchestrator.client import OrchestratorClient
from orchestrator.cluster.actors import actor_names
OrchestratorClient()
states = [group["state"] for group in ray.util.placement_group_table().values()]
print(json.dumps([actor_names(), states.count("CREATED"), ray.available_resources().get("CPU")]))
"""


@pytest.fixture
def users(tmp_path: Path) -> Iterator[tuple[Here, Here]]:
    """Users of a cluster each, who share a directory."""
    both = Here(tmp_path, "first"), Here(tmp_path, "second")
    try:
        for user in both:
            user("cluster", "up", "--cpus", "4")
        yield both
    finally:
        for user in both:
            user("cluster", "down", "--force")


def test_a_run_is_taken_over_and_removed_from_its_first_cluster(
    users: tuple[Here, Here], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = users
    monkeypatch.setenv("ORCHESTRATOR_HOME", str(first.home))  # this process reads the journal too
    train = JOB["train"] | {"max_steps": 100_000}
    job = first.job("wanted", envs=UNHURRIED, checkpoint={"every": 10}, train=train, signing_key="auto")
    first("submit", job)
    first.until_event("wanted", "checkpoint")
    workers = until_workers("wanted", ("w0", "w1"), psutil.process_iter).values()

    key = first.home / "keys" / "own"
    unknown = second("resume", "wanted", "--storage", "runs", expect=77).stderr
    assert "signed with key" in unknown and "--key-file FILE" in unknown
    refused = second("resume", "wanted", "--storage", "runs", "--key-file", str(key), expect=2).stderr
    assert "wanted may be active in another cluster" in refused and "--take-over" in refused
    assert "Nothing was started" in refused
    assert json.loads(first("status", "wanted", "-o", "json").stdout)["phase"] == "training"

    second("resume", "wanted", "--storage", "runs", "--key-file", str(key), "--take-over")
    second.until_event("wanted", "activated", 2)
    gone, alive = psutil.wait_procs(workers, timeout=200)
    assert len(gone) == len(workers) and not alive
    first.until(lambda: json.loads(first("ls", "-o", "json").stdout) == [])
    assert (
        "wanted was taken over by another cluster: term 1 may not write" in first("pause", "wanted", expect=102).stderr
    )
    first.until(lambda: json.loads(first.python(COUNTED)) == [["scheduler"], 0, 4.0])  # actors, groups, free CPUs

    second("stop", "wanted")
    ended = second.until_ended("wanted")
    assert ended.phase == "stopped" and ended.recoveries == ()
    second("check", "data", "wanted", "--storage", "runs", expect=77)  # in the cluster its key is known
    assert "each exactly once, in order" in second("check", "data", "wanted").stdout
    assert "another cluster has taken it over" in second("logs", "wanted").stdout
    first("resume", "wanted", "--storage", "runs")  # it has ended: no cluster has to let go
    first.until_event("wanted", "activated", 3)
    first("stop", "wanted", "--now")
    first.until_ended("wanted")

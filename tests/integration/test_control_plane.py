"""Every process that steers a run is killed by its id, in the middle of training, which continues undisturbed."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from orchestrator.cluster.actors import find, names_of
from orchestrator.cluster.calls import ask
from orchestrator.errors import ClusterUnreachable
from orchestrator.protocol.status import RunPhase
from orchestrator.protocol.worker_report import Report
from orchestrator.run_records.run_history import read_steps
from orchestrator.scheduler.scheduler_actor import NAME as SCHEDULER
from orchestrator.scheduler.scheduler_actor import get_or_create_scheduler
from tests.support.control import PATIENCE_S, Cluster
from tests.support.worker_processes import pid_of_actor

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

TITLES = {SCHEDULER: "ray::scheduler", "controller": "ray::controller {run}"}  # these aren't hosted


@pytest.fixture
def on(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def _pid(on: Cluster, run: str, victim: str) -> int:
    if (title := TITLES.get(victim)) is None:
        return on.pid_of(f"{run}/{victim}")
    return pid_of_actor(title.format(run=run))


def _back(on: Cluster, run: str, victim: str, killed: int) -> None:
    """Return once it answers again, as another process under the same name."""
    name = victim if victim == SCHEDULER else f"{run}/{victim}"
    deadline_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline_s:
        try:
            if victim in TITLES:
                ask(find(name), "list" if victim == SCHEDULER else "status", timeout_s=1.0)
            if _pid(on, run, victim) != killed:
                return
        except (ClusterUnreachable, AssertionError, AttributeError):  # not yet: no process, or no actor of that name
            pass
        time.sleep(0.05)
    raise AssertionError(f"{victim} did not come back")


def _worker_step(run: str, worker: str = "w0") -> int:
    report: Report = ask(find(f"{run}/worker/{worker}"), "call", "report", None, -1, 0.0)
    return report.step


def _published_once(on: Cluster, run: str, steps: int) -> None:
    lines = [json.loads(line) for line in (on.storage / run / "tracking/published.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line.get("name") == "train/loss"] == list(range(steps))
    told = [line["seq"] for line in lines if "event" in line]
    assert len(told) == len(set(told))


@pytest.mark.parametrize(
    "rounds",
    [
        (("rendezvous",), ("rendezvous", "scheduler", "tracker", "controller")),
        pytest.param((("scheduler",),), marks=pytest.mark.slow),
        pytest.param((("tracker",),), marks=pytest.mark.slow),
        pytest.param((("controller",),), marks=pytest.mark.slow),
    ],
    ids=["one, then all", "scheduler", "tracker", "controller"],
)
def test_scheduler_controller_tracker_and_store_may_die(on: Cluster, rounds: tuple[tuple[str, ...], ...]) -> None:
    run = f"steered-{len(rounds)}-{rounds[0][0]}"
    train = {"max_steps": 100_000, "global_batch_size": 16, "micro_batch_size": 4}
    on.submit(run, train=train, envs={"SIM_STEP_S": "0.05"})  # several while a process starts
    on.until(run, lambda s: s.step > 5)
    members = {worker: on.pid_of(f"{run}/worker/{worker}") for worker in ("w0", "w1")}
    for victims in rounds:
        pids = {victim: _pid(on, run, victim) for victim in victims}
        killed_time = time.time()
        for pid in pids.values():
            os.kill(pid, signal.SIGKILL)
        for victim, pid in pids.items():
            _back(on, run, victim, pid)
        back_time, step = time.time(), _worker_step(run)
        on.scheduler = get_or_create_scheduler()
        status = on.until(run, lambda s, step=step: s.step > step)  # the watermark has caught up
        assert status.generation == 0 and not status.recoveries
        assert {worker: on.pid_of(f"{run}/worker/{worker}") for worker in members} == members
        meanwhile = [r for r in read_steps(on.storage / run) if killed_time < r.timing.vote_time < back_time]
        assert len(meanwhile) > 5, "no step was done until they were back"

    on.ask("scale", run, 3)
    on.until(run, lambda s: s.workers_now == 3)
    os.kill(members["w0"], signal.SIGKILL)
    status = on.until(run, lambda s: bool(s.recoveries) and s.workers_now == 3)
    assert status.recoveries[0].lost == ("w0",) and status.recoveries[0].steps_lost == 0
    processes = [on.pid_of(name) for name in names_of(run) if not name.endswith("controller")]
    on.ask("stop", run)
    ended = on.end_of(run)
    assert ended.phase is RunPhase.STOPPED and ended.warning is None
    on.assert_every_step_once(run, ended.step)
    _published_once(on, run, ended.step)
    on.assert_nothing_left(run, processes)


@pytest.mark.slow
def test_a_member_lost_with_the_rendezvous_store_is_recovered_from_once_that_is_back(on: Cluster) -> None:
    run = "both"
    on.submit(
        run,
        train={"max_steps": 300, "global_batch_size": 16, "micro_batch_size": 4},
        workers={"min": 1, "max": 3, "initial": 3},
    )
    on.until(run, lambda s: s.step > 5)
    pids = [on.pid_of(f"{run}/{name}") for name in ("rendezvous", "worker/w1")]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    on.until(run, lambda s: bool(s.recoveries))
    status = on.end_of(run, hurried=True)
    assert status.phase is RunPhase.SUCCEEDED, status
    (recovery,) = status.recoveries
    assert recovery.lost == ("w1",) and recovery.source == "memory" and recovery.steps_lost == 0
    on.assert_every_step_once(run, 300)
    _published_once(on, run, 300)
    on.assert_nothing_left(run, pids)

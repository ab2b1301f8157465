"""Several runs on one cluster, on real Ray with simulated workers: who is let in, shrunk, preempted, and comes back."""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from orchestrator.cluster.actors import find, names_of
from orchestrator.controller.services.actor_classes import ActorClasses
from orchestrator.errors import JobDoesNotFit, UsageError
from orchestrator.protocol.status import RunPhase
from orchestrator.storage.backends.location import objects_at
from orchestrator.storage.chain_reader import newest_term
from tests.support.control import PATIENCE_S, Cluster
from tests.support.hosts import until
from tests.support.simulated_services import simulated_parts
from tests.support.worker_processes import pid_of_actor

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture
def on(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.end_all()


def _job(workers: str, priority: int = 0, cpus: int = 1, **changes: Any) -> dict[str, Any]:
    """Workers of so many processors each, of which there are four."""
    least, most = workers.split("..")
    return {
        "workers": {"min": int(least), "max": int(most), "initial": int(most)},
        "priority": priority,
        "resources": {"cpus": cpus},
        "train": {"max_steps": 100_000, "global_batch_size": 16, "micro_batch_size": 4},
        **changes,
    }


def _events(on: Cluster, name: str, *kinds: str) -> list[dict[str, Any]]:
    return [event for event in on.ask("events", name) if event["kind"] in kinds]


@pytest.mark.journey
def test_a_priority_that_is_set_shrinks_a_lower_run_which_grows_back(on: Cluster) -> None:
    """It counts at once, and survives the controller and the run's end."""
    on.submit("low", **_job("1..4"))
    on.until("low", lambda s: s.workers_now == 4)
    on.submit("high", wait=True, **_job("2..2", priority=-1))
    on.until("high", lambda s: s.phase is RunPhase.QUEUED and "no room" in s.why)
    assert on.ask("set_priority", "high", 5) == 5
    on.until("high", lambda s: s.phase is RunPhase.TRAINING and s.workers_now == 2)
    shrunk = on.status("low")
    assert (shrunk.workers_now, shrunk.workers_wanted, on.status("high").priority) == (2, 2, 5)
    assert shrunk.why == (
        "as many workers train as are granted, 2 of 4: there is room for 2; high of priority 5 comes first"
    )
    (changed,) = _events(on, "high", "priority_changed")
    assert (changed["priority"], changed["before"]) == (5, -1)
    with pytest.raises(UsageError, match="priority is 101; it must be from -100 to 100"):
        on.ask("set_priority", "high", 101)

    controller = find("high/controller")
    assert controller is not None
    ray.kill(controller, no_restart=False)
    back = on.until("high", lambda s: s.priority == 5 and s.phase is RunPhase.TRAINING)
    on.until("high", lambda s: s.step > back.step + 5)  # its controller has caught up
    assert newest_term(objects_at(on.storage / "high")) == 2
    on.ask("stop", "high")
    on.assert_every_step_once("high", on.end_of("high").step)
    assert on.status("high").priority == 5
    with pytest.raises(UsageError, match="has ended"):
        on.ask("set_priority", "high", 3)

    grown = on.until("low", lambda s: s.workers_now == 4)
    assert [r.why for r in grown.rescales] == [
        "there is room for 2; high of priority 5 comes first",
        "there is room for all 4",
    ]
    assert not grown.recoveries and sum(rescale.steps_lost for rescale in grown.rescales) == 0
    assert [e["workers"] for e in _events(on, "low", "admitted", "granted")] == [None, 2, None]
    on.ask("set_priority", "low", 9)
    on.until("low", lambda s: s.priority == 9)
    on.ask("stop", "low")
    ended = on.end_of("low")
    on.assert_every_step_once("low", ended.step)


@pytest.mark.journey
def test_a_run_without_room_waits_in_the_queue_and_is_admitted(on: Cluster) -> None:
    """No run overtakes it, even with a controller that is slow to come. One that is stopped while it waits leaves
    nothing."""
    on.submit("first", **_job("1..1", cpus=3))
    on.until("first", lambda s: s.phase is RunPhase.TRAINING)
    on.submit("slow", wait=True, **_job("1..1", cpus=2))
    job = on.storage / "slow" / "job.json"
    text = job.read_text()
    with _held(job, text):  # its controller, just starting, blocks on this pipe until a writer opens it
        _wait_behind(on)
    on.until("slow", lambda s: s.phase is RunPhase.QUEUED)
    third = on.until("third", lambda s: s.submitted_time is not None)
    assert third.phase is RunPhase.QUEUED

    on.submit("waits", wait=True, **_job("1..1"))
    on.until("waits", lambda s: s.why.startswith("queued: there is no room"))
    on.ask("stop", "waits")
    assert on.end_of("waits").phase is RunPhase.STOPPED
    on.assert_nothing_left("waits", [])

    on.ask("stop", "first")
    for name in ("slow", "third"):
        on.until(name, lambda s: s.phase is RunPhase.TRAINING)
    (let_in,) = _events(on, "slow", "admitted")
    assert let_in["waited_s"] > 0 and let_in["why"] == "there is room for all 1"
    for name in ("slow", "third"):
        on.ask("stop", name)
        on.end_of(name)


def _wait_behind(on: Cluster) -> None:
    """A third run waits behind the slow one, and a fourth may not."""
    on.submit("third", wait=True, **_job("1..1"))
    waiting = on.until("third", lambda s: "behind slow in the queue" in s.why)
    assert (waiting.phase, waiting.workers_now) == (RunPhase.QUEUED, 0)
    assert waiting.why == "queued: there is no room for 1 worker; behind slow in the queue"
    names = [g["name"] for g in ray.util.placement_group_table().values() if g["state"] != "REMOVED"]
    assert {name.partition("/")[0] for name in names if "/worker/" in name} == {"first"}  # no other run holds a place
    refused = "fourth, whose workers take 1 CPU, would have to wait: there is no room for 1 worker; behind slow in the"
    with pytest.raises(JobDoesNotFit, match=refused):
        on.submit("fourth", **_job("1..1"))


@contextmanager
def _held(file: Path, text: str) -> Iterator[None]:
    """Let those who open the file wait while this lasts; then they read the text."""
    pipe, plain = file.with_name("pipe"), file.with_name("plain")
    os.mkfifo(pipe)
    pipe.replace(file)
    try:
        yield
    finally:
        plain.write_text(text)
        writer = os.open(file, os.O_RDWR)  # waits for no reader: there may be none, if this process came late
        plain.replace(file)  # for those who open it later
        os.write(writer, text.encode())
        os.close(writer)


@pytest.mark.slow
@pytest.mark.journey
@pytest.mark.timeout(300)
def test_minimums_that_leave_no_room_preempt_the_lower_run_which_resumes_later(on: Cluster) -> None:
    """While it waits it has no process but its controller, and its tracker, the real one, misses nothing."""
    on.submit("low", parts=replace(simulated_parts(), tracker=ActorClasses().tracker), **_job("3..4"))
    on.until("low", lambda s: s.step > 20)
    low = on.ask("events", "low")
    until_preemptible_s = 60.0  # a run that was just let in keeps its places for so long: policy/cluster/fair_share.py
    on.submit("high", wait=True, **_job("3..3", priority=5))
    on.until("high", lambda s: s.phase is RunPhase.QUEUED and "no room" in s.why)
    assert on.status("low").workers_now == 4  # it isn't shrunk in vain
    on.until("high", lambda s: s.phase is RunPhase.TRAINING, until_preemptible_s + PATIENCE_S)
    (admitted,) = _events(on, "low", "admitted")
    (preempted,) = _events(on, "low", "preempted")
    assert low and preempted["time"] - admitted["time"] >= until_preemptible_s - 1.0
    waiting = on.status("low")
    assert waiting.phase is RunPhase.QUEUED and waiting.checkpoint_step == waiting.step - 1
    until(lambda: names_of("low") == ["low/controller"], PATIENCE_S, "the end of all services")
    on.ask("stop", "high")
    on.end_of("high")
    step = on.until("low", lambda s: s.workers_now == 4).step
    on.until("low", lambda s: s.step > step + 20)
    on.ask("stop", "low")
    ended = on.end_of("low")
    on.assert_every_step_once("low", ended.step)
    store = sqlite3.connect(on.storage / "mlflow.db")
    losses = store.execute("SELECT step FROM metrics WHERE key = 'train/loss'").fetchall()
    store.close()
    assert ended.warning is None and sorted(step for (step,) in losses) == list(range(ended.step))


@pytest.mark.journey
def test_a_scheduler_that_dies_takes_nothing_with_it(on: Cluster) -> None:
    """Grants are the runs' own; its successor goes on where it was."""
    on.submit("low", **_job("1..4"))
    on.until("low", lambda s: s.workers_now == 4)
    on.submit("high", wait=True, **_job("2..2", priority=5))
    on.until("high", lambda s: s.phase is RunPhase.TRAINING)
    killed = psutil.Process(pid_of_actor("ray::scheduler", ray.get_runtime_context().gcs_address))
    killed.kill()
    killed.wait(PATIENCE_S)  # one that dies may pass a request on, and the repeated one finds that the run has ended
    on.ask("stop", "high")
    on.end_of("high")
    on.until("low", lambda s: s.workers_now == 4)
    on.ask("stop", "low")
    on.end_of("low")


def test_a_job_that_the_cluster_can_never_hold_is_refused(on: Cluster, tmp_path: Path) -> None:
    with pytest.raises(JobDoesNotFit) as refused:
        on.submit("huge", wait=True, **_job("5..8"))
    assert refused.value.message.startswith(
        "5 workers of 1 CPU is the least that huge may have; the cluster has room for 4 if nothing else runs"
    )
    assert not (tmp_path / "huge").exists()
    on.assert_nothing_left("huge", [])

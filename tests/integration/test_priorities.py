"""Several runs on one cluster, on real Ray with simulated workers: who is let in, shrunk, preempted, and comes back."""

import os
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from orchestrator.cluster.actors import find, names_of
from orchestrator.controller.services.actor_classes import ActorClasses
from orchestrator.errors import JobDoesNotFit, UsageError
from orchestrator.protocol.status import RunPhase
from orchestrator.scheduler.scheduler import get_or_create_scheduler
from orchestrator.storage.backends.location import objects_at
from orchestrator.storage.journal import newest_term
from tests.support.control import PATIENCE_S, Cluster, local_ray
from tests.support.hosts import until
from tests.support.simulated_worker import simulated_parts

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with local_ray(num_cpus=4):
        yield


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


def test_a_higher_priority_shrinks_a_lower_run_which_grows_back(on: Cluster) -> None:
    on.submit("low", **_job("1..4"))
    on.until("low", lambda s: s.workers_now == 4)
    on.submit("high", wait=True, **_job("2..2", priority=5))
    on.until("high", lambda s: s.phase is RunPhase.TRAINING and s.workers_now == 2)
    shrunk = on.status("low")
    assert (shrunk.workers_now, shrunk.workers_wanted) == (2, 2)
    assert shrunk.why == (
        "as many workers train as are granted, 2 of 4: there is room for 2; high of priority 5 comes first"
    )
    on.ask("stop", "high")
    on.end_of("high")
    grown = on.until("low", lambda s: s.workers_now == 4)
    assert [r.why for r in grown.rescales] == [
        "there is room for 2; high of priority 5 comes first",
        "there is room for all 4",
    ]
    assert not grown.recoveries and sum(rescale.steps_lost for rescale in grown.rescales) == 0
    assert [e["workers"] for e in _events(on, "low", "admitted", "granted")] == [None, 2, None]
    on.ask("stop", "low")
    ended = on.end_of("low")
    on.assert_every_step_once("low", ended.step)


def test_a_priority_that_is_set_counts_at_once_and_survives_the_controller_and_a_resume(on: Cluster) -> None:
    on.submit("first", **_job("1..4"))
    on.until("first", lambda s: s.workers_now == 4)
    on.submit("second", wait=True, **_job("2..2"))
    on.until("second", lambda s: s.phase is RunPhase.QUEUED and "no room" in s.why)
    assert on.ask("set_priority", "second", 5) == 5
    on.until("second", lambda s: s.phase is RunPhase.TRAINING and s.workers_now == 2)
    assert (on.status("first").workers_now, on.status("second").priority) == (2, 5)
    (changed,) = _events(on, "second", "priority_changed")
    assert (changed["priority"], changed["before"]) == (5, 0)
    with pytest.raises(UsageError, match="priority is 101; it must be from -100 to 100"):
        on.ask("set_priority", "second", 101)
    controller = find("second/controller")
    assert controller is not None
    ray.kill(controller, no_restart=False)
    on.until("second", lambda s: s.priority == 5 and s.phase is RunPhase.TRAINING)
    assert newest_term(objects_at(on.storage / "second")) == 2
    on.ask("set_priority", "first", 9)
    on.until("first", lambda s: s.priority == 9)
    for name in ("first", "second"):
        on.ask("stop", name)
        on.assert_every_step_once(name, on.end_of(name).step)
    assert on.status("second").priority == 5
    with pytest.raises(UsageError, match="has ended"):
        on.ask("set_priority", "second", 3)


def test_a_run_without_room_waits_in_the_queue_and_is_let_in(on: Cluster) -> None:
    on.submit("first", **_job("1..1", cpus=3))
    on.until("first", lambda s: s.phase is RunPhase.TRAINING)
    on.submit("second", wait=True, **_job("1..1", cpus=2))
    on.submit("third", wait=True, **_job("1..1"))
    waiting = on.until("third", lambda s: "behind second" in s.why)
    assert (waiting.phase, waiting.workers_now) == (RunPhase.QUEUED, 0)
    assert waiting.why == "queued: there is no room for 1 worker; behind second in the queue"
    names = [g["name"] for g in ray.util.placement_group_table().values() if g["state"] != "REMOVED"]
    assert {name.partition("/")[0] for name in names if "/worker/" in name} == {"first"}  # nobody else holds a place
    with pytest.raises(JobDoesNotFit, match=r"fourth, whose workers take 1 CPU, would have to wait: there is no"):
        on.submit("fourth", **_job("1..1"))
    on.ask("stop", "first")
    for name in ("second", "third"):
        on.until(name, lambda s: s.phase is RunPhase.TRAINING)
    (let_in,) = _events(on, "second", "admitted")
    assert let_in["waited_s"] > 0 and let_in["why"] == "there is room for all 1"
    for name in ("second", "third"):
        on.ask("stop", name)
        on.end_of(name)


def test_nobody_overtakes_a_run_whose_controller_is_slow_to_come(on: Cluster) -> None:
    on.submit("first", **_job("1..1", cpus=3))
    on.until("first", lambda s: s.phase is RunPhase.TRAINING)
    on.submit("slow", wait=True, **_job("1..1", cpus=2))
    job = on.storage / "slow" / "job.json"
    text = job.read_text()
    job.unlink()
    os.mkfifo(job)  # its controller, whose process is just starting, waits for somebody who writes here
    on.submit("third", wait=True, **_job("1..1"))
    on.until("third", lambda s: "behind slow in the queue" in s.why)
    with pytest.raises(JobDoesNotFit, match="behind slow in the queue"):
        on.submit("fourth", **_job("1..1"))
    job.write_text(text)
    on.until("slow", lambda s: s.phase is RunPhase.QUEUED)
    third = on.until("third", lambda s: s.submitted_time is not None)
    assert third.phase is RunPhase.QUEUED
    on.ask("stop", "first")
    for name in ("slow", "third"):
        on.until(name, lambda s: s.phase is RunPhase.TRAINING)
        on.ask("stop", name)
        on.end_of(name)


def test_a_run_that_waits_may_be_stopped_and_leaves_nothing(on: Cluster) -> None:
    on.submit("here", **_job("1..1", cpus=4))
    on.until("here", lambda s: s.phase is RunPhase.TRAINING)
    on.submit("waits", wait=True, **_job("1..1"))
    on.until("waits", lambda s: s.why.startswith("queued: there is no room"))
    on.ask("stop", "waits")
    assert on.end_of("waits").phase is RunPhase.STOPPED
    on.assert_nothing_left("waits", [])
    on.ask("stop", "here")
    on.end_of("here")


@pytest.mark.journey
@pytest.mark.timeout(300)
def test_minimums_that_leave_no_room_preempt_the_lower_run_which_goes_on(on: Cluster) -> None:
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
    ray.kill(on.scheduler.handle, no_restart=False)
    on.scheduler = get_or_create_scheduler()
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

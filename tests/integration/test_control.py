"""Runs on real Ray with simulated workers: real actors, placement groups, journal and checkpoints, no torch."""

import json
import os
import re
import signal
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError

from orchestrator.checkpoint.read import CheckpointReader
from orchestrator.cluster.actors import CALLS_AT_ONCE, ActorOptions, Host, find, names_of, start_host
from orchestrator.cluster.calls import ask
from orchestrator.cluster.cluster_objects import ClusterObjects
from orchestrator.controller.services.actor_classes import ActorClasses
from orchestrator.errors import JobDoesNotFit, NameTaken, NotFound, StorageError, UsageError
from orchestrator.protocol.status import RunPhase
from orchestrator.run_records.final_status import read_status
from orchestrator.scheduler.claims import RunClaims
from orchestrator.scheduler.run_removal import RunRemoval
from orchestrator.scheduler.run_statuses import RunStatuses
from orchestrator.scheduler.scheduler_actor import get_or_create_scheduler
from orchestrator.storage.backends.location import objects_at
from orchestrator.storage.backends.probe import refusal_at
from orchestrator.storage.chain_reader import newest_term
from orchestrator.storage.guard import StorageGuard
from tests.support.control import UNHURRIED, Cluster
from tests.support.disk import exchange
from tests.support.hosts import until
from tests.support.simulated_services import simulated_parts

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

ROOT = Path(__file__).parents[2]
PATIENCE_S = 120.0


@pytest.fixture
def on(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def await_titles(wanted: set[str]) -> None:
    """Wait until `ps` has shown these processes. During a short call Ray shows the method instead."""
    deadline_s = time.monotonic() + PATIENCE_S
    while wanted and time.monotonic() < deadline_s:
        for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                wanted = wanted - {cmdline.read_bytes().rstrip(b"\0 ").decode()}
    assert wanted == set()


def test_objects_in_the_cluster_are_created_once() -> None:
    """The contract of `storage.objects.Objects`."""
    objects, other = ClusterObjects("run"), ClusterObjects("run2")
    with ThreadPoolExecutor(16) as threads:
        found = set(threads.map(lambda i: objects.create("a/b", bytes([i]) * 100_000), range(16)))
    assert found == {objects.get("a/b")} and objects.create("a/b", b"later") in found
    assert objects.create("c", b"") == b"" == objects.create("c", b"later")
    assert other.create("a/b", b"other") == b"other"
    assert (objects.names(""), objects.names("a"), objects.names("none")) == (("a", "c"), ("b",), ())
    objects.delete(["a/b", "none"])
    with pytest.raises(FileNotFoundError):
        objects.get("a/b")
    objects.delete(["c"])
    assert objects.names("") == () and other.names("") == ("a",)
    other.delete(["a/b"])


def test_a_run_from_submission_to_its_end(on: Cluster) -> None:
    on.submit("whole", checkpoint={"every": 20}, envs={"SIM_STEP_S": "1.0"})
    on.until("whole", lambda s: s.step > 0)
    actors = {f"whole/{name}" for name in ("controller", "worker/w0", "worker/w1", "rendezvous", "tracker")}
    until(lambda: set(names_of("whole")) == actors, PATIENCE_S, "the end of data preparation")
    pids = [on.pid_of(name) for name in actors if not name.endswith("controller")]
    titles = {
        "controller whole",
        "worker whole/w0",
        "worker whole/w1",
        "rendezvous whole",
        "tracker whole",
        "scheduler",
    }
    await_titles({f"ray::{title}" for title in titles})
    status = on.end_of("whole", hurried=True)
    assert status.phase is RunPhase.SUCCEEDED, status
    assert (status.step, status.checkpoint_step, status.workers_now) == (60, 59, 0)
    assert status.loss is not None and status.first_loss is not None and status.loss < status.first_loss
    assert status.submitted_time < status.started_time < status.ended_time  # type: ignore[operator]
    on.assert_nothing_left("whole", pids)
    on.assert_every_step_once("whole", 60)
    assert read_status(on.storage / "whole") == status
    with CheckpointReader(Path(str(status.checkpoint))) as checkpoint:
        checkpoint.verify()
        assert [float(checkpoint.read(f"master/expert.{e}", 0, 1)[0]) for e in range(8)] == [60.0] * 8
    published = [json.loads(line) for line in (on.storage / "whole/tracking/published.jsonl").read_text().splitlines()]
    losses = [line["step"] for line in published if line.get("name") == "train/loss"]
    assert losses == list(range(60))
    values = [line for line in published if "artifact" not in line]  # files are published again at the end
    assert (values[-2]["event"], values[-1]) == ("ended", {"term": 1, "outcome": "succeeded"})
    assert {line["artifact"] for line in published if "artifact" in line} == {"job.yaml", "tokenizer.json"}
    assert "whole" in [s.run_id for s in on.ask("list")]


def test_scheduled_sizes_come_at_their_steps(on: Cluster) -> None:
    schedule = [{"at_step": 20, "workers": 3}, {"at_step": 40, "workers": 1}]
    workers = {"min": 1, "max": 3, "initial": 2, "standby": 1, "schedule": schedule}
    on.submit("planned", workers=workers, train=_steps(300), checkpoint={"every": 20})
    on.until("planned", lambda s: len(s.rescales) == 2)
    status = on.end_of("planned", hurried=True)
    assert status.phase is RunPhase.SUCCEEDED, status
    sizes = on.sizes("planned")
    # Never before its step; later only if a busy machine did not get a worker warm in time.
    assert sizes.index(3) >= 20 and sizes.index(1) >= 40 and sizes[-1] == 1
    assert [(r.from_size, r.to_size) for r in status.rescales] == [(2, 3), (3, 1)]
    assert all(r.state_identical and r.stall_s is not None and r.stall_s < 2.0 for r in status.rescales)
    on.assert_every_step_once("planned", 300)
    # The fences fall on steps that have a checkpoint. Of those in the hurry at the end only the newest four are marked.
    marked = [event["step"] for event in on.ask("events", "planned") if event["kind"] == "checkpoint"]
    assert marked[:2] == [19, 39] and marked[-1] == 299


def test_a_request_is_checked_and_carried_out_after_storage_has_failed_for_a_while(on: Cluster) -> None:
    on.submit("request", train=_steps(250))
    on.until("request", lambda s: s.step > 5)
    journal = on.storage / "request" / "journal"
    away = journal.with_name("away")
    away.touch()
    exchange(journal, away)  # no directory: even root can't write into it
    stuck = on.until("request", lambda s: "can't be written" in str(s.warning))
    assert stuck.phase is RunPhase.TRAINING
    exchange(journal, away)
    with pytest.raises(UsageError, match="9 workers asked for; request allows 1 to 4"):
        on.ask("scale", "request", 9)
    on.ask("scale", "request", 4)
    on.until("request", lambda s: s.workers_now == 4)
    on.ask("scale", "request", 1)
    on.until("request", lambda s: s.workers_now == 1)
    status = on.end_of("request", hurried=True)
    assert (status.phase, status.warning) == (RunPhase.SUCCEEDED, None), status
    on.assert_every_step_once("request", 250)
    with pytest.raises(UsageError, match="it is succeeded"):
        on.ask("scale", "request", 2)
    assert on.kinds("request").count("rescaled") == 2


@pytest.mark.parametrize("moment", [pytest.param("prepared", marks=pytest.mark.slow), "moving"])
def test_a_newcomer_lost_on_the_way_costs_no_step(on: Cluster, moment: str) -> None:
    name = f"newcomer-{moment}"
    on.submit(name, train=_steps(100_000), envs={**UNHURRIED, "SIM_DIE": f"w2:{moment}"})
    on.until(name, lambda s: s.step > 0)
    on.ask("scale", name, 3)
    on.until(name, lambda s: s.workers_now == 3)
    on.ask("stop", name)
    status = on.end_of(name)
    assert status.phase is RunPhase.STOPPED, status
    assert "transition_abandoned" in on.kinds(name)
    on.assert_every_step_once(name, status.step)
    assert on.sizes(name)[-1] == 3


def test_stop_leaves_a_checkpoint(on: Cluster) -> None:
    on.submit("stopped", train=_steps(5000))
    with pytest.raises(NameTaken, match="stopped"):
        on.submit("stopped")
    on.until("stopped", lambda s: s.step > 5)
    on.ask("stop", "stopped")
    status = on.end_of("stopped")
    assert status.phase is RunPhase.STOPPED
    assert status.checkpoint_step == status.step - 1 and Path(str(status.checkpoint)).is_dir()
    on.assert_nothing_left("stopped", [])
    on.assert_every_step_once("stopped", status.step)
    with pytest.raises(NameTaken, match="holds a run stopped"):
        on.submit("stopped")


def test_a_controller_that_does_not_answer_and_workers_that_ignore_sigterm_or_are_frozen(on: Cluster) -> None:
    """Meanwhile the status of the run is that of its journal, and the run ends all the same."""
    workers = {"min": 1, "max": 3, "initial": 2, "standby": 1}
    on.submit("deaf", train=_steps(100_000), workers=workers, envs={**UNHURRIED, "SIM_DEAF": "1"})
    step = on.until("deaf", lambda s: s.step > 5 and s.standbys == 1).step
    controller = _controller_of(on, "deaf")
    os.kill(controller, signal.SIGSTOP)
    try:
        mute = on.status("deaf")
    finally:
        os.kill(controller, signal.SIGCONT)
    assert mute.why == "its controller has not answered within 15 s; this is the status as of its journal"
    assert mute.phase is RunPhase.TRAINING and mute.workers_now == 2 and mute.step >= step
    pids = {worker: on.pid_of(f"deaf/worker/{worker}") for worker in ("w0", "w1", "w2")}
    for pid in pids.values():
        os.kill(pid, signal.SIGTERM)
    step = on.status("deaf").step
    on.until("deaf", lambda s: s.step > step + 20 and s.workers_now == 2 and not s.recoveries)
    (standby,) = pids.keys() - on.members("deaf")
    os.kill(pids[standby], signal.SIGSTOP)
    on.ask("stop", "deaf")
    status = on.end_of("deaf")
    assert status.phase is RunPhase.STOPPED, status
    on.assert_nothing_left("deaf", list(pids.values()))
    on.assert_every_step_once("deaf", status.step)


def test_a_killed_controller_is_restarted_and_the_run_continues(on: Cluster) -> None:
    """And its tracker, the real one: MLflow has every value once."""
    parts = replace(simulated_parts(), tracker=ActorClasses().tracker)
    envs = {"SIM_STEP_S": "0.4"}  # two minutes for all that happens before the end: MLflow takes long to load
    on.submit("phoenix", train=_steps(300), parts=parts, checkpoint={"every": 100, "keep_last": 1}, envs=envs)
    on.until("phoenix", lambda s: s.step > 5)
    os.kill(on.pid_of("phoenix/tracker"), signal.SIGKILL)
    workers = [on.pid_of(f"phoenix/worker/{w}") for w in ("w0", "w1")]
    os.kill(_controller_of(on, "phoenix"), signal.SIGKILL)
    killed_at = on.status("phoenix").step
    on.until("phoenix", lambda s: s.step > killed_at)
    assert [on.pid_of(f"phoenix/worker/{w}") for w in ("w0", "w1")] == workers
    on.ask("scale", "phoenix", 3)
    on.until("phoenix", lambda s: s.workers_now == 3)
    tracker = find("phoenix/tracker")
    until(lambda: bool(ask(tracker, "call", "describe")["published"]), PATIENCE_S, "the new tracker's first values")
    status = on.end_of("phoenix", hurried=True)
    assert status.phase is RunPhase.SUCCEEDED, status
    assert newest_term(objects_at(on.storage / "phoenix")) == 2
    assert status.warning is None
    on.assert_every_step_once("phoenix", 300)
    on.assert_nothing_left("phoenix", workers)
    store = sqlite3.connect(on.storage / "mlflow.db")
    rows = store.execute("SELECT key, step FROM metrics WHERE key NOT LIKE 'system/%'").fetchall()
    losses = [step for key, step in rows if key == "train/loss"]
    assert sorted(losses) == list(range(300)) and len(set(rows)) == len(rows)
    fates = store.execute(
        "SELECT tag_value FROM logged_model_tags WHERE tag_key = 'orchestrator.checkpoint'"
    ).fetchall()
    store.close()
    assert sorted(fate for (fate,) in fates) == ["deleted", "deleted", "stored"]
    deleted = [event["steps"] for event in on.ask("events", "phoenix") if event["kind"] == "checkpoints_deleted"]
    assert [step for steps in deleted for step in steps] == [99, 199]  # at once, if both are complete by then
    _assert_a_removal_that_is_refused_deletes_nothing(on, "phoenix")


def _assert_a_removal_that_is_refused_deletes_nothing(on: Cluster, run: str) -> None:
    """Also in MLflow; one that isn't deletes the run there and its files."""

    def stage_in_mlflow() -> str:
        store = sqlite3.connect(on.storage / "mlflow.db")
        ((stage,),) = store.execute("SELECT lifecycle_stage FROM runs").fetchall()
        store.close()
        return str(stage)

    claims, storage = RunClaims(), StorageGuard(refusal_at)
    removal = RunRemoval(claims, storage, RunStatuses(storage))
    with claims.claim(run), pytest.raises(UsageError, match="by another request"):
        removal.remove(run, tracking=True)
    assert (on.storage / run).exists() and stage_in_mlflow() == "active"
    assert removal.remove(run, tracking=True) == str(on.storage / run)
    assert not (on.storage / run).exists() and stage_in_mlflow() == "deleted"
    until(lambda: names_of(run) == [], PATIENCE_S, "the end of the process that deleted it there")
    assert run not in [status.run_id for status in on.ask("list")]


def test_a_host_outlives_any_number_of_controllers_that_hold_it() -> None:
    host = start_host("held", "tests.support.simulated_services:SimulatedPreparation", (), ActorOptions())
    holds = [host.send(Host.hold) for _ in range(2 * CALLS_AT_ONCE)]
    pid = host.within(PATIENCE_S).ask(Host.pid)
    freed, holding = ray.wait(holds, num_returns=len(holds) - 1, timeout=PATIENCE_S)  # of controllers that are gone
    assert len(holding) == 1 and ray.get(freed) == [None] * len(freed)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(RayActorError):  # the newest call fails when the process ends
        ray.get(holding[0], timeout=PATIENCE_S)


@pytest.mark.slow
def test_a_killed_scheduler_finds_its_runs_again(on: Cluster) -> None:
    on.submit("kept", train=_steps(300))
    on.until("kept", lambda s: s.step > 0)
    ray.kill(on.scheduler.handle, no_restart=False)
    on.scheduler = get_or_create_scheduler()
    status = on.end_of("kept", hurried=True)
    assert status.phase is RunPhase.SUCCEEDED, status
    on.scheduler = get_or_create_scheduler()
    assert on.status("kept").step == 300


def test_what_is_refused_before_anything_starts(on: Cluster) -> None:
    with pytest.raises(NotFound, match="no run 'nobody'"):
        on.ask("status", "nobody")
    with pytest.raises(JobDoesNotFit, match=r"4 workers of 3 CPU is the least that greedy may have; the cluster"):
        on.submit("greedy", workers=4, resources={"cpus": 3})
    assert not (on.storage / "greedy").exists()
    (on.storage / "file").touch()
    with pytest.raises(StorageError, match="run storage can't be written: Not a directory"):
        Cluster(on.storage / "file").submit("nowhere")


def _steps(steps: int) -> dict[str, Any]:
    return {"max_steps": steps, "global_batch_size": 16, "micro_batch_size": 4}


def _controller_of(on: Cluster, name: str) -> int:
    """Process of the run's newest controller."""
    log = (on.storage / name / "logs/controller.log").read_text()
    return int(re.findall(r"controller of term \d+, pid (\d+)", log)[-1])

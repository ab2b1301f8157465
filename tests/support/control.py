"""Controllers on real Ray, led through their scheduler, with simulated workers."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import ray
from ray import PlacementGroupID
from ray._private.node import Node
from ray._private.parameter import RayParams
from ray.util.placement_group import PlacementGroup, remove_placement_group

from orchestrator.cluster.actors import NAMESPACE, actor_names, find, names_of
from orchestrator.cluster.calls import ask
from orchestrator.cluster.local_ray.head_process import SETUP
from orchestrator.controller.services.actor_classes import ActorClasses
from orchestrator.errors import OrchestratorError
from orchestrator.protocol.status import RunStatus
from orchestrator.run_records.run_history import read_steps
from orchestrator.scheduler.scheduler_actor import NAME as SCHEDULER
from orchestrator.scheduler.scheduler_actor import get_or_create_scheduler
from orchestrator.spec.job import JobSpec
from tests.support.hosts import until
from tests.support.simulated_services import hurry, simulated_parts

ROOT = Path(__file__).parents[2]
PATIENCE_S = 200.0
SOON_S = 60.0
OBJECT_STORE_BYTES = 200_000_000
# Steps of runs to which something happens: short ones would only take processors away. Once everything has happened, a
# run that has to reach its end gets `hurry`.
UNHURRIED = {"SIM_STEP_S": "0.2"}


@contextmanager
def ray_head(num_cpus: int) -> Iterator[str]:
    """Address of a Ray on this machine that nothing has joined yet. Of Ray's processes it has those that it can't do
    without: no monitor for a cloud's autoscaler, no reader of log files."""
    directory = tempfile.mkdtemp(prefix="oc", dir="/tmp")  # sockets need a short path
    head = Node(_params(num_cpus, temp_dir=directory, no_monitor=True), head=True, shutdown_at_exit=False)
    try:
        yield str(head.gcs_address)
    finally:
        head.kill_all_processes(check_alive=False, allow_graceful=True, wait=True)
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def joined(address: str) -> Iterator[None]:
    """This process is a driver of that Ray while this lasts."""
    ray.init(address=address, namespace=NAMESPACE, log_to_driver=False)
    try:
        yield
    finally:
        gc.collect()
        gc.disable()  # a reference that some thread collects during the shutdown would have Ray end this process
        ray.shutdown()
        gc.enable()


@contextmanager
def local_ray(num_cpus: int) -> Iterator[None]:
    """A Ray of its own on this machine."""
    with ray_head(num_cpus) as address, joined(address):
        yield


@contextmanager
def another_node(num_cpus: int, **labels: str) -> Iterator[None]:
    """A further node of this process's Ray, on this machine too, while this lasts."""
    before = _living()
    address = ray.get_runtime_context().gcs_address
    node = Node(_params(num_cpus, gcs_address=address, labels=labels), head=False, shutdown_at_exit=False)
    try:
        until(lambda: _living() > before, PATIENCE_S, "a further node")
        yield
    finally:
        node.kill_all_processes(check_alive=False, allow_graceful=True, wait=True)
        until(lambda: _living() <= before, PATIENCE_S, "a node's end")


def _params(num_cpus: int, **more: Any) -> RayParams:
    return RayParams(
        num_cpus=num_cpus,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        include_log_monitor=False,
        env_vars={"PYTHONPATH": str(ROOT)},
        setup_worker_path=SETUP,
        **more,
    )


def drain(node: str) -> None:
    """Have Ray drain a node of this process's Ray, as a cloud's notice does; nothing happens to it."""
    options = {
        "address": ray.get_runtime_context().gcs_address,
        "node-id": node,
        "reason": "DRAIN_NODE_REASON_PREEMPTION",
        "reason-message": "taken back",
        "deadline-remaining-seconds": "600",
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node"]
    subprocess.run([*command, *(f"--{key}={value}" for key, value in options.items())], check=True)


def _living() -> int:
    return sum(bool(node["Alive"]) for node in ray.nodes())


def assert_only_the_scheduler_is_left() -> None:
    """Whatever else is there is ended first: it would be in the way of what comes next."""
    with suppress(AssertionError):
        until(lambda: set(actor_names()) <= {SCHEDULER} and not _groups(), SOON_S, "the end of all actors")
    left = [name for name in actor_names() if name != SCHEDULER]
    for name in left:
        if (actor := find(name)) is not None:
            ray.kill(actor)
    groups = _groups()
    for group in groups:
        remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(group["placement_group_id"])))
    assert (left, [group["name"] for group in groups]) == ([], [])


def _groups() -> list[dict[str, Any]]:
    """Placement groups of all runs."""
    return [group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]


def kill_at_once(pids: Iterable[int]) -> None:
    """Send SIGKILL to all of them. All are stopped before the first one is killed, so that the loss of the first one is
    not noticed before the others are lost too: a stopped process is waited for for some seconds."""
    pids = list(pids)
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in pids:
            os.kill(pid, number)


class Cluster:
    """The scheduler, and runs in one storage."""

    def __init__(self, storage: Path) -> None:
        self.storage = storage
        self.scheduler = get_or_create_scheduler()

    def ask(self, method: str, *args: Any) -> Any:
        return ask(self.scheduler.handle, method, *args, timeout_s=PATIENCE_S)

    def submit(self, name: str, wait: bool = False, parts: ActorClasses | None = None, **changes: Any) -> str:
        spec: dict[str, Any] = {
            "schema": "v1",
            "name": name,
            "workers": {"min": 1, "max": 4, "initial": 2, "standby": 0},
            "resources": {"cpus": 0.5},
            "model": {"n_routed_experts": 8, "num_experts_per_tok": 2},
            "train": {"max_steps": 60, "global_batch_size": 16, "micro_batch_size": 4},
            "envs": UNHURRIED,
        }
        job = JobSpec.model_validate_json(json.dumps(spec | changes))
        text = f"name: {name}\n"
        return str(
            self.ask(
                "submit",
                job.model_dump_json(by_alias=True),
                name,
                str(self.storage / name),
                text,
                wait,
                parts or simulated_parts(),
            )
        )

    def status(self, name: str) -> RunStatus:
        status: RunStatus = self.ask("status", name)
        return status

    def until(self, name: str, condition: Callable[[RunStatus], bool], patience_s: float = PATIENCE_S) -> RunStatus:
        deadline_s = time.monotonic() + patience_s
        while not condition(status := self.status(name)):
            if status.phase.ended or time.monotonic() > deadline_s:
                log = (self.storage / name / "logs" / "controller.log").read_text()
                raise AssertionError(f"never came true: {status}\n{log}")
            time.sleep(0.05)
        return status

    def end_of(self, name: str, hurried: bool = False) -> RunStatus:
        """Once it has ended; `hurried` if nothing has to happen to it until then."""
        if hurried:
            hurry(self.storage / name)
        return self.until(name, lambda status: status.phase.ended)

    def end_all(self) -> None:
        """End what a failed test has left behind, which would hold the processors of the next ones."""
        for name in (path.name for path in self.storage.iterdir() if names_of(path.name)):
            with suppress(OrchestratorError, AssertionError):
                self.ask("stop", name)
                self.end_of(name)

    def kinds(self, name: str) -> list[str]:
        return [event["kind"] for event in self.ask("events", name)]

    def members(self, name: str) -> list[str]:
        """Of the newest generation: with a standby, the first ones that got warm."""
        return [event["members"] for event in self.ask("events", name) if event["kind"] == "activated"][-1]

    def sizes(self, name: str) -> list[int]:
        return [record.world_size for record in read_steps(self.storage / name)]

    def pid_of(self, actor: str) -> int:
        return int(ask(find(actor), "pid"))

    def assert_nothing_left(self, name: str, pids: list[int]) -> None:
        def left() -> list[Any]:
            return [
                *names_of(name),
                *(group["name"] for group in _groups() if group["name"].startswith(f"{name}/")),
                *(pid for pid in pids if psutil.pid_exists(pid)),
            ]

        deadline_s = time.monotonic() + SOON_S
        while left() and time.monotonic() < deadline_s:
            time.sleep(0.05)
        assert left() == []

    def assert_every_step_once(self, name: str, steps: int) -> None:
        result = self.ask("audit", name)
        assert result.ok, result.problems
        assert result.steps == steps

"""Torch-free Ray actor that hosts an object of any class in its own process.

The class is named by a dotted string, so the control layer never imports torch: the host imports it where it runs.
Calls run in threads, so one that waits never blocks another.
"""

import gc
import importlib
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup, get_placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from orchestrator.cluster.process_title import name_process, show_title
from orchestrator.cluster.remote import Remote
from orchestrator.protocol.usage import EnergyReading
from orchestrator.storage.backends.log_target import LogTarget
from orchestrator.storage.caller import Caller, call_here
from orchestrator.storage.storage_process import StorageProcess
from orchestrator.telemetry.energy import EnergyMeter
from orchestrator.telemetry.node import Reading, read_system

NAMESPACE = "orchestrator"
CALLS_AT_ONCE = 16

# Control actors run on the head, whose failure ends the cluster anyway: so no other node's failure ends run control.
# Ray puts an actor without resources on any node, even if it should prefer one. Every head has 1.0 of this resource.
ON_HEAD = {"node:__internal_head__": 0.0001}


class Host:
    """Creates `target` ("package.module:Class") from `args` and forwards calls to it.

    Args:
        logs: place of this process's log lines of `orchestrator`; None leaves logging unchanged.
        storage_process: whether a child process makes the calls to run storage, so that this one can be killed during
            them. `target` gets their `caller`.
    """

    def __init__(self, target: str, args: tuple[Any, ...], logs: LogTarget | None, storage_process: bool) -> None:
        self._title = name_process(self)
        self._caller: Caller = StorageProcess(self._title.removeprefix("ray::")).call if storage_process else call_here
        if logs is not None:
            logs.open(self._caller)
        self._energy = EnergyMeter(os.environ.get("CUDA_VISIBLE_DEVICES"))
        module, _, name = target.partition(":")
        # Another one than for log lines, which shouldn't wait for a checkpoint.
        process = StorageProcess(f"checkpoints of {self._title.removeprefix('ray::')}")
        options = {"caller": process.call} if storage_process else {}
        with _no_garbage_collection():
            hosted = getattr(importlib.import_module(module), name)
        self._object = hosted(*args, **options)
        self._lock, self._held = threading.Lock(), threading.Event()

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        show_title(self._title)
        return getattr(self._object, method)(*args, **kwargs)

    def pid(self) -> int:
        return os.getpid()

    def node(self) -> str:
        """Id of the node that this process runs on."""
        return str(ray.get_runtime_context().get_node_id())

    def read_system(self, directory: str) -> Reading:
        """Load of this node; `directory` is in the file system whose usage is read."""
        node = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        return read_system(node, directory, self._caller)

    def read_energy(self, gpus: float) -> EnergyReading:
        """Energy that this process has used so far; `gpus` is the number that it reserves."""
        with self._lock:
            return self._energy.read(gpus)

    def hold(self) -> None:
        """Block until a newer call: this call's error shows the caller within milliseconds that this process has ended.

        A newer call ends the previous one because a killed controller leaves its call in one of few threads, which its
        successor's call frees.
        """
        show_title(self._title)
        with self._lock:
            self._held.set()
            mine = self._held = threading.Event()
        mine.wait()


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collect no garbage while modules are imported, nor search them for any later. A worker's imports make 250,000
    objects and drop few: collections took a sixth of their time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@dataclass(frozen=True)
class ActorOptions:
    """Placement and options of a hosted process. `group` reserves its resources; without one it needs none, and runs on
    the cluster's head. `logs` and `storage_process` are as of a `Host`.

    With `calls_at_once` of 1, calls of one caller run in the order in which they were made.
    """

    cpus: float = 0.0
    gpus: float = 0.0
    memory_bytes: int = 0
    group: PlacementGroup | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    logs: LogTarget | None = None
    max_restarts: int = 0
    calls_at_once: int = CALLS_AT_ONCE
    storage_process: bool = False


def start_host(name: str, target: str, args: tuple[Any, ...], actor_options: ActorOptions) -> Remote[Host]:
    """Start a detached host named `name`, or find the existing one. Returns at once; calls wait for its start."""
    placed: Any = "DEFAULT"
    if actor_options.group is not None:
        placed = PlacementGroupSchedulingStrategy(actor_options.group, placement_group_bundle_index=0)
    options = {
        "name": name,
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
        "num_cpus": actor_options.cpus,
        "num_gpus": actor_options.gpus,
        "memory": actor_options.memory_bytes,
        "resources": ON_HEAD if actor_options.group is None else None,
        "max_concurrency": actor_options.calls_at_once,
        "max_restarts": actor_options.max_restarts,
        "scheduling_strategy": placed,
        "runtime_env": {"env_vars": dict(actor_options.env)} if actor_options.env else None,
    }
    handle: Any = (
        ray.remote(Host).options(**options).remote(target, args, actor_options.logs, actor_options.storage_process)
    )
    return Remote(handle)


@ray.remote(num_cpus=0, max_retries=0)
def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def kill_on_node(node_id: str, pid: int) -> Any:
    """Kill a process of the run on its node by SIGKILL. Returns Ray's reference of the call."""
    placed = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return _kill.options(scheduling_strategy=placed).remote(pid)


def find(name: str) -> ActorHandle[Any] | None:
    """The living actor of this name; None if there is none."""
    try:
        handle: ActorHandle[Any] = ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return None
    return handle


def actor_names() -> list[str]:
    """Names of all living actors of this package."""
    actors: list[dict[str, str]] = ray.util.list_named_actors(all_namespaces=True)
    return sorted(actor["name"] for actor in actors if actor["namespace"] == NAMESPACE)


def names_of(run_id: str) -> list[str]:
    """Names of all living actors of a run."""
    return [name for name in actor_names() if name.startswith(f"{run_id}/")]


def remove_group(name: str) -> None:
    """Remove the placement group of this name, if there is one."""
    try:
        group = get_placement_group(name)
    except ValueError:
        return
    remove_placement_group(group)

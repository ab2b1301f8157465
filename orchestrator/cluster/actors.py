"""A torch-free Ray actor that holds an object of any class in a process of its own.

Who starts it names the class by a dotted string, so control never imports torch: the host imports it where it runs.
Calls run in threads, so one that waits never blocks another.
"""

import importlib
import logging
import os
import signal
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from orchestrator.protocol.usage import EnergyReading
from orchestrator.telemetry.energy import EnergyMeter
from orchestrator.telemetry.node import Reading, read_system

NAMESPACE = "orchestrator"
CALLS_AT_ONCE = 16

# Whoever steers lives on the head, whose loss ends the cluster anyway: no other node's loss ends a run's control then.
# Ray puts an actor that needs no resource onto any node, even if it was to prefer one. Every head has 1.0 of this one.
ON_HEAD = {"node:__internal_head__": 0.0001}

Handle = Any  # a Ray actor handle; Ray's own types don't say what an actor answers


class Host:
    """Makes `target` ("package.module:Class") from `args` and forwards calls to it.

    Args:
        log_file: where the log lines of `orchestrator` in this process go; None leaves logging alone.
    """

    def __init__(self, target: str, args: tuple[Any, ...], log_file: str | None) -> None:
        if log_file is not None:
            log_to(Path(log_file))
        self._energy = EnergyMeter(os.environ.get("CUDA_VISIBLE_DEVICES"))
        module, _, name = target.partition(":")
        self._object = getattr(importlib.import_module(module), name)(*args)
        self._lock, self._held = threading.Lock(), threading.Event()

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._object, method)(*args, **kwargs)

    def pid(self) -> int:
        return os.getpid()

    def node(self) -> str:
        """The id of the node that this process lives on."""
        return str(ray.get_runtime_context().get_node_id())

    def read_system(self, directory: str) -> Reading:
        """How busy this node is; `directory` lies in the file system whose room counts."""
        return read_system(str(ray.util.get_node_ip_address()), directory)  # type: ignore[no-untyped-call]

    def read_energy(self, gpus: float) -> EnergyReading:
        """What this process has used so far; `gpus` are those that it reserves."""
        with self._lock:
            return self._energy.read(gpus)

    def hold(self) -> None:
        """Doesn't return: the call's error is how the caller hears of this process's end, within milliseconds.

        The newest caller's, that is: a controller that was killed leaves its call behind in one of few threads, and its
        successor frees that.
        """
        with self._lock:
            self._held.set()
            mine = self._held = threading.Event()
        mine.wait()


@dataclass(frozen=True)
class ActorOptions:
    """Where and how a hosted process runs. `group` reserves its resources; without one it needs none, and lives on the
    cluster's head.

    With one call at once, calls of one caller are done in the order in which they were made.
    """

    cpus: float = 0.0
    gpus: float = 0.0
    memory_bytes: int = 0
    group: PlacementGroup | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    log_file: Path | None = None
    max_restarts: int = 0
    calls_at_once: int = CALLS_AT_ONCE


def start_host(name: str, target: str, args: tuple[Any, ...], actor_options: ActorOptions) -> Handle:
    """Start a detached host called `name`, or find the one that is there. Returns at once; calls wait for its start."""
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
    log_file = None if actor_options.log_file is None else str(actor_options.log_file)
    return ray.remote(Host).options(**options).remote(target, args, log_file)


@ray.remote(num_cpus=0, max_retries=0)
def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def kill_on_node(node_id: str, pid: int) -> Any:
    """Kill a process of the run on its node, whatever it is doing. Returns the reference of the call."""
    placed = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return _kill.options(scheduling_strategy=placed).remote(pid)


def find(name: str) -> Handle | None:
    """The living actor of this name; None if there is none."""
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return None


def names_of(run_id: str) -> list[str]:
    """Names of all living actors of a run."""
    actors: list[dict[str, str]] = ray.util.list_named_actors(all_namespaces=True)
    names = [actor["name"] for actor in actors if actor["namespace"] == NAMESPACE]
    return sorted(name for name in names if name.startswith(f"{run_id}/"))


def log_to(path: Path) -> None:
    """Send the package's log lines to a file, one line per change of state."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logger = logging.getLogger("orchestrator")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)

"""Client of a run's controller for the Scheduler and its autoscaler."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Concatenate, ParamSpec, TypeVar

import ray

from orchestrator.cluster.actors import NAMESPACE, ON_HEAD, actor_names, find
from orchestrator.cluster.remote import Remote
from orchestrator.controller.controller import RunController
from orchestrator.controller.services.actor_classes import ActorClasses
from orchestrator.errors import ClusterUnreachable
from orchestrator.policy.state.config import RunLimits
from orchestrator.protocol.messages import ResumeRequest

P = ParamSpec("P")
R = TypeVar("R")

PATIENCE_S = 15.0  # a controller that Ray is restarting answers within this time, except on a very busy node
SUFFIX = "/controller"

# When the connection to a worker breaks, Ray waits 1 s for news of its end before it fails the call, and checks once a
# second whether that is over. The worker's node reports the end within milliseconds; if the node is gone, nothing does.
CONTROLLER_ENV = {
    "RAY_timeout_ms_task_wait_for_death_info": "200",
    "RAY_core_worker_internal_heartbeat_ms": "100",
}


@dataclass(frozen=True)
class ControllerClient:
    """Starts, finds and calls the controller of one run.

    Args:
        patience_s: how long a call waits for an answer, also while Ray restarts the controller.
    """

    run_id: str
    patience_s: float = PATIENCE_S

    def start(
        self,
        run_dir: str,
        limits: RunLimits,
        parts: ActorClasses,
        order: ResumeRequest | None,
        queued_s: float | None,
    ) -> None:
        """Start it as a detached actor. Arguments are those of `RunController`."""
        options = {
            "name": self.run_id + SUFFIX,
            "namespace": NAMESPACE,
            "lifetime": "detached",
            "num_cpus": 0,
            "resources": ON_HEAD,
            "max_restarts": -1,
            "max_concurrency": 16,
            "runtime_env": {"env_vars": dict(CONTROLLER_ENV)},
        }
        ray.remote(RunController).options(**options).remote(self.run_id, run_dir, limits, parts, order, queued_s)

    def find(self) -> Remote[RunController] | None:
        """The controller, if it lives or is being restarted."""
        handle = find(self.run_id + SUFFIX)
        return None if handle is None else Remote(handle, timeout_s=self.patience_s)

    def await_end(self) -> None:
        """Wait for the controller of a run that has ended to end too. Raises ClusterUnreachable if it doesn't."""
        deadline_s = time.monotonic() + self.patience_s
        while self.find() is not None:
            if time.monotonic() > deadline_s:
                raise ClusterUnreachable(
                    f"the controller of run {self.run_id} does not end", remedy="Try again in a moment."
                )
            time.sleep(0.1)

    def ask(self, method: Callable[Concatenate[RunController, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        """The result of the method.

        Raises:
            OrchestratorError: raised by the method.
            ClusterUnreachable: there is no controller, or it has ended or not answered.
        """
        controller = self.find()
        if controller is None:
            raise ClusterUnreachable(f"run {self.run_id} has no controller")
        return controller.ask(method, *args, **kwargs)


def controlled_runs() -> list[str]:
    """Runs that have a controller."""
    return [name.removesuffix(SUFFIX) for name in actor_names() if name.endswith(SUFFIX)]

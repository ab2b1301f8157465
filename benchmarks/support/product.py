"""The product on this machine as a user runs it: a local cluster, the client, a run that is scaled.

The cluster is one of `orchestrator cluster up`, recorded in a home of its own, so that it meets no other.
"""

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from orchestrator.client import OrchestratorClient
from orchestrator.cluster import local
from orchestrator.cluster.actors import find, names_of
from orchestrator.cluster.calls import ask
from orchestrator.cluster.connection import disconnect
from orchestrator.errors import OrchestratorError
from orchestrator.policy.state.run_state import RunState
from orchestrator.protocol.codec import from_plain
from orchestrator.protocol.messages import GenerationPlan
from orchestrator.protocol.status import Rescale, RunStatus
from orchestrator.protocol.worker_report import Report
from orchestrator.spec.job import JobSpec
from orchestrator.storage.backends.location import objects_at
from orchestrator.storage.journal import read_events

LOOK_EVERY_S = 0.2
PATIENCE_S = 300.0


class Product:
    """A fresh local cluster with a client; ended on leaving."""

    def __init__(self, home: Path, num_cpus: int) -> None:
        os.environ["ORCHESTRATOR_HOME"] = str(home)
        up = local.up(num_cpus)
        try:
            self.client = OrchestratorClient(up.record.address)
        except BaseException:
            local.down()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        disconnect()
        local.down()


@dataclass(frozen=True)
class Request:
    """A request for another size, and the rescale that it led to. `asked_time` is `time.time()` before the request."""

    asked_time: float
    rescale: Rescale


class LiveRun:
    """A run that was submitted, until it is stopped."""

    def __init__(self, client: OrchestratorClient, job: JobSpec, **options: Any) -> None:
        self._client, self._id = client, client.submit(job, **options)
        self.run_dir = Path(client.get(self._id).run_dir)

    def until(self, condition: Callable[[RunStatus], bool], what: str, patience_s: float = PATIENCE_S) -> RunStatus:
        """Wait for a status. Raises RuntimeError if the run ends before, or it takes more than `patience_s`."""
        deadline_s = time.monotonic() + patience_s
        while not condition(status := self._client.get(self._id)):
            if status.phase.ended or time.monotonic() > deadline_s:
                raise RuntimeError(f"waiting until {what}, but the run is {status.phase}: {status.error or status.why}")
            time.sleep(LOOK_EVERY_S)
        return status

    def until_again(self, condition: Callable[[RunStatus], bool], what: str) -> RunStatus:
        """`until`, where the controller that would answer may be away for a while."""
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            try:
                return self.until(condition, what)
            except OrchestratorError:
                if time.monotonic() > deadline_s:
                    raise
                time.sleep(LOOK_EVERY_S)

    def status(self) -> RunStatus:
        return self._client.get(self._id)

    def members(self) -> tuple[str, ...]:
        """Of the generation that trains now, by rank."""
        return self.plans()[max(self.plans())].world.members

    def ask_for(self, workers: int) -> None:
        """Ask for another size, and wait for nothing."""
        self._client.scale(self._id, workers)

    def rebalance(self) -> None:
        """Ask for experts to be placed by load, and wait for nothing."""
        self._client.rebalance(self._id)

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        """Events of these kinds so far."""
        return [event for event in read_events(objects_at(self.run_dir)) if event["kind"] in kinds]

    def scale(self, workers: int, measured: bool = True) -> Request:
        """Ask for another size and wait until the run has it; `measured`: and until its stall is known."""
        known = len(self._client.get(self._id).rescales)
        asked_time = time.time()
        self._client.scale(self._id, workers)

        def has_it(status: RunStatus) -> bool:
            new = status.rescales[known:]
            return bool(new) and new[-1].to_size == workers and (new[-1].stall_s is not None or not measured)

        status = self.until(has_it, f"it has {workers} workers")
        return Request(asked_time, status.rescales[-1])

    def report_of(self, worker: str, after_step: int | None = None) -> Report:
        """What the worker itself says; with `after_step` the steps that it voted on, those done twice included."""
        report: Report = ask(find(f"{self._id}/worker/{worker}"), "call", "report", after_step, -1, 0.0)
        return report

    def ask_tracker(self, method: str) -> Any:
        return ask(find(f"{self._id}/tracker"), "call", method)

    def plans(self) -> dict[int, GenerationPlan]:
        """Every generation that was activated, from the journal."""
        states = (
            from_plain(RunState, e["state"]) for e in read_events(objects_at(self.run_dir)) if e["kind"] == "state"
        )
        return {state.current.generation: state.current for state in states if state.current is not None}

    def first_member(self) -> str:
        """The worker that is in every generation: members keep their order, and the last ones leave. Which it is shows
        at the start: the first generation is made of those who were warm first."""
        return self.plans()[0].world.members[0]

    def pids(self) -> dict[str, int]:
        """The run's processes by name: `controller`, `tracker`, `worker/w0` and so on."""
        hosts = [name for name in names_of(self._id) if not name.endswith("/controller")]
        found = {name.removeprefix(f"{self._id}/"): int(ask(find(name), "pid")) for name in hosts}
        log = (self.run_dir / "logs" / "controller.log").read_text()
        return found | {"controller": int(re.findall(r"controller of term \d+, pid (\d+)", log)[-1])}

    def stop(self) -> RunStatus:
        self._client.stop(self._id)
        return self.wait()

    def wait(self) -> RunStatus:
        return self._client.wait(self._id, timeout_s=PATIENCE_S)

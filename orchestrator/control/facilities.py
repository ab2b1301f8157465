"""What a run has besides workers, each in a process of its own: data preparation, rendezvous store and tracker.

All of them are started at once, while workers start. The tracker may be away at any time; without one of the other
two the run can't go on, which shows as a fault.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from orchestrator.control.calls import ask, reason_of
from orchestrator.control.crew import Answer, Inbox, post
from orchestrator.control.host import Handle, Seat, find, start_host
from orchestrator.control.parts import Parts
from orchestrator.control.preparation import PreparedData
from orchestrator.errors import OrchestratorError
from orchestrator.spec.job import JobSpec
from orchestrator.tracking.sink import MetricPoint

log = logging.getLogger("orchestrator.control")

NAMES = ("preparation", "rendezvous", "tracker")
LOOK_EVERY_S = 1.0
FINISH_S = 30.0  # how long the end of a run waits for its tracker


class Facilities:
    """Starts or finds them, and knows what they have answered."""

    def __init__(self, run_id: str, run_dir: Path, job: JobSpec, parts: Parts, epoch: int, inbox: Inbox) -> None:
        self._run_id, self._run_dir, self._job = run_id, run_dir, job
        self._parts, self._epoch, self._inbox = parts, epoch, inbox
        self._handles: dict[str, Handle] = {}
        self.address: tuple[str, int] | None = None
        self.data: PreparedData | None = None
        self.preparing = ""  # how far the data is, in words; empty once it is there
        self._asked_s = 0.0  # when its progress was last asked for
        self._known_data: PreparedData | None = None
        self.tracking_url: str | None = None
        self.warning: str | None = None  # metrics that don't arrive
        self.faults: list[str] = []

    def start(self, data: PreparedData | None, has_workers: bool) -> None:
        """Start what isn't there. `data` is what an earlier controller has prepared already, made anew if it is gone;
        workers that it left behind know its rendezvous store, so another one would be of no use to them."""
        self._known_data = data
        self.data = data if data is not None and Path(data.store_dir).is_dir() else None
        storage = self._run_dir.parent
        if self.data is None:
            self._begin("preparation", self._parts.preparation, ())
            data_dir = str(storage / ".data")
            self._call("preparation", "prepare", self._job.model_dump_json(by_alias=True), str(self._run_dir), data_dir)
        if has_workers and find(self._name("rendezvous")) is None:
            self.faults.append("the run's rendezvous store was gone when its controller came back")
            return
        self._begin("rendezvous", self._parts.rendezvous, (_my_address(),))
        self._call("rendezvous", "address")
        post(self._inbox, "rendezvous", "hold", self._handles["rendezvous"].hold.remote())
        uri = self._job.tracking.uri or f"sqlite:///{storage / 'mlflow.db'}"
        params = self._job.model_dump_json(by_alias=True)
        args = (uri, self._job.tracking.experiment, self._run_id, self._run_id, params, str(self._run_dir / "tracking"))
        # One call at once: what was published before `finish` is published. And it may come back as often as it dies.
        self._begin("tracker", self._parts.tracker, args, max_restarts=-1, calls_at_once=1)
        self._call("tracker", "artifact", self._epoch, str(self._run_dir / "job.yaml"))

    def look_at_preparation(self, now_s: float) -> None:
        """Ask how far the data is, once in a while."""
        if "preparation" in self._handles and now_s - self._asked_s >= LOOK_EVERY_S:
            self._asked_s = now_s
            self._call("preparation", "progress")

    def take(self, answer: Answer) -> None:
        """Note an answer, or the fault that it is."""
        error = answer.future.exception()
        if error is None:
            self._note(answer)
        elif answer.method == "progress":  # it has ended meanwhile
            return
        elif answer.of == "tracker":
            log.warning("tracker: %s failed: %s", answer.method, reason_of(error))
        else:
            why = reason_of(error)
            self.faults.append(why if answer.of == "preparation" else f"the {answer.of} store failed: {why}")

    def publish(self, points: Sequence[MetricPoint]) -> None:
        if points and "tracker" in self._handles:
            self._call("tracker", "publish", self._epoch, list(points))

    def publish_event(self, event: dict[str, Any]) -> None:
        if "tracker" in self._handles:
            self._call("tracker", "event", self._epoch, event)

    def look_at_tracker(self) -> None:
        if "tracker" in self._handles:
            self._call("tracker", "describe")

    def close(self, outcome: str, why: str) -> None:
        """Let the tracker finish, then end all of them."""
        tracker = find(self._name("tracker"))
        if tracker is not None:
            try:
                ask(tracker, "call", "finish", self._epoch, outcome, why, FINISH_S, timeout_s=FINISH_S + 5.0)
                self._described(ask(tracker, "call", "describe", timeout_s=5.0))
            except OrchestratorError as error:
                self.warning = f"not all metrics were published: {error}"
            if self.warning:
                log.warning(self.warning)
        for name in NAMES:
            handle = find(self._name(name))
            if handle is not None:
                ray.kill(handle, no_restart=True)

    def _note(self, answer: Answer) -> None:
        result = answer.future.result()
        if answer.method == "address":
            self.address = (result[0], int(result[1]))
        elif answer.method == "progress" and self.data is None:
            self.preparing = f"prepares the data: {result[0]}, {result[1]:.0%}"
        elif answer.method == "prepare":
            self.preparing = ""
            self._prepared(result)
            ray.kill(self._handles.pop("preparation"), no_restart=True)
            self._call("tracker", "artifact", self._epoch, result.tokenizer)
        elif answer.method == "describe":
            self._described(result)

    def _prepared(self, data: PreparedData) -> None:
        known = self._known_data
        if known is None or Path(known.store_dir).name == Path(data.store_dir).name:  # named by content
            self.data = data
        else:
            self.faults.append(
                "the corpus is not what the run has trained on so far, and the store that was made of it is gone: "
                f"{known.store_dir}"
            )

    def _described(self, tracker: Mapping[str, Any]) -> None:
        self.tracking_url = tracker["url"] or self.tracking_url
        lines = tracker["error"].splitlines()
        self.warning = f"metrics can't be published: {lines[0]}" if lines else None

    def _begin(self, name: str, target: str, args: tuple[Any, ...], **seat_fields: Any) -> None:
        seat = Seat(
            node_id=ray.get_runtime_context().get_node_id(),
            log_file=self._run_dir / "logs" / f"{name}.log",
            **seat_fields,
        )
        self._handles[name] = start_host(self._name(name), target, args, seat)

    def _call(self, name: str, method: str, *args: Any) -> None:
        post(self._inbox, name, method, self._handles[name].call.remote(method, *args))

    def _name(self, name: str) -> str:
        return f"{self._run_id}/{name}"


def _my_address() -> str:
    """Where workers of other nodes reach this one."""
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]

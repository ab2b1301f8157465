"""What a run has besides workers, each in a process of its own: data preparation, rendezvous store and tracker.

All of them are started at once, while workers start. The tracker may be away at any time; without one of the other
two the run can't go on, which shows as a fault.
"""

import logging
from pathlib import Path
from typing import Any

import ray

from orchestrator.control.calls import reason_of
from orchestrator.control.crew import Answer, Inbox, post
from orchestrator.control.host import Handle, Seat, find, start_host
from orchestrator.control.parts import Parts
from orchestrator.control.preparation import PreparedData
from orchestrator.control.tracker_link import NAME as TRACKER
from orchestrator.control.tracker_link import TrackerLink
from orchestrator.spec.job import JobSpec

log = logging.getLogger("orchestrator.control")

NAMES = ("preparation", "rendezvous", TRACKER)
LOOK_EVERY_S = 1.0


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
        self.tracker = TrackerLink(run_id, run_dir, job, parts.tracker, epoch, inbox)
        self.faults: list[str] = []

    def start(self, data: PreparedData | None, has_workers: bool) -> None:
        """Start what isn't there. `data` is what an earlier controller has prepared already, made anew if it is gone;
        workers that it left behind know its rendezvous store, so another one would be of no use to them."""
        self._known_data = data
        self.tracker.start()
        self.data = data if data is not None and Path(data.store_dir).is_dir() else None
        if self.data is not None:
            self.tracker.prepared(self.data)
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

    def look_at_preparation(self, now_s: float) -> None:
        """Ask how far the data is, once in a while."""
        if "preparation" in self._handles and now_s - self._asked_s >= LOOK_EVERY_S:
            self._asked_s = now_s
            self._call("preparation", "progress")

    def take(self, answer: Answer) -> None:
        """Note an answer, or the fault that it is."""
        if answer.of == TRACKER:
            self.tracker.take(answer)
        elif (error := answer.future.exception()) is None:
            self._note(answer)
        elif answer.method == "progress":  # it has ended meanwhile
            return
        else:
            why = reason_of(error)
            self.faults.append(why if answer.of == "preparation" else f"the {answer.of} store failed: {why}")

    def close(self, outcome: str, why: str, watermark: int) -> None:
        """Let the tracker finish, then end all of them."""
        self.tracker.close(outcome, why, watermark)
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

    def _prepared(self, data: PreparedData) -> None:
        known = self._known_data
        if known is None or Path(known.store_dir).name == Path(data.store_dir).name:  # named by content
            self.data = data
            self.tracker.prepared(data)
        else:
            self.faults.append(
                "the corpus is not what the run has trained on so far, and the store that was made of it is gone: "
                f"{known.store_dir}"
            )

    def _begin(self, name: str, target: str, args: tuple[Any, ...]) -> None:
        seat = Seat(log_file=self._run_dir / "logs" / f"{name}.log")
        self._handles[name] = start_host(self._name(name), target, args, seat)

    def _call(self, name: str, method: str, *args: Any) -> None:
        post(self._inbox, name, method, self._handles[name].call.remote(method, *args))

    def _name(self, name: str) -> str:
        return f"{self._run_id}/{name}"


def _my_address() -> str:
    """Where workers of other nodes reach this one, which is the facilities' too: all of them live on the head."""
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]

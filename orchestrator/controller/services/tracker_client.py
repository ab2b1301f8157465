"""Client of the run's tracker. The journal is the source: what a failed or unreachable tracker has not acknowledged is
read from it and published again. Only the run's end waits for the tracker.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Concatenate, ParamSpec

from orchestrator.cluster.actors import ActorOptions, start_host
from orchestrator.cluster.calls import has_ended, reason_of
from orchestrator.cluster.inbox import Inbox, post
from orchestrator.cluster.remote import Remote
from orchestrator.cluster.storage_thread import StorageThread
from orchestrator.errors import JournalCorrupt, KeyUnknown, OrchestratorError, ProtocolError
from orchestrator.protocol.events.base import JournalEntry
from orchestrator.protocol.expert_load import Loads
from orchestrator.run_records.journaled_run import retry_until_written
from orchestrator.run_records.prepared_data import PreparedData
from orchestrator.run_records.tracker_setup import outbox_of, tracker_setup
from orchestrator.run_records.tracking_sync import Call, calls_for_data, missing_after
from orchestrator.spec.job import JobSpec
from orchestrator.storage.backends.location import Location
from orchestrator.storage.backends.log_target import LogTarget
from orchestrator.storage.tasks import Lengthy, StorageTask
from orchestrator.telemetry.step_metrics import points_of_event
from orchestrator.tracking.sinks.sink import MetricPoint, Outcome, TrackerPosition
from orchestrator.tracking.tracker import Tracker

log = logging.getLogger("orchestrator.control")

P = ParamSpec("P")

NAME = "tracker"
FINISH_S = 30.0  # how long the end of a run waits for its tracker
EXPORT_S = 1800.0  # and while it writes the model that is registered, without an error
ASK_AGAIN_S = 1.0
START_AGAIN_S = 10.0  # after it could not be started, because its outbox can't be written
DAMAGED_AGAIN_S = 60.0  # until a journal that is damaged is read again
LOOK_EVERY_S = 3.0
MOST_OPEN = 64  # calls without an answer: beyond that the journal keeps what would pile up here
LAST_TRIES = 3
MOST_HELD = 1_000


class TrackerClient:
    """Starts or finds the run's tracker, and ensures that it gets everything once."""

    def __init__(
        self, run_id: str, run_dir: Location, job: JobSpec, target: str, term: int, storage: StorageThread, inbox: Inbox
    ) -> None:
        self._run_id, self._run_dir, self._job = run_id, run_dir, job
        self._target, self._term, self._storage, self._inbox = target, term, storage, inbox
        self._tracker: Remote[Tracker] | None = None
        self._data: PreparedData | None = None
        self._is_current = False  # it has, or was sent, everything in the journal
        self._is_reading = False  # the journal, for what it lacks
        self._held: list[Call] = []  # values of steps that were published meanwhile
        self._events: deque[JournalEntry] = deque(maxlen=MOST_HELD)  # the newest: run storage may not have them yet
        self._asked_s: float | None = None  # when its position was last requested
        self._ended_s: float | None = None  # when it was found to have ended for good
        self._newest_event = -1  # `seq` of the newest event that it has or was sent, while it is current
        self._num_open = 0
        self._looked_s = 0.0  # when its description was last requested
        self._has_delivered = False  # MLflow has everything that it was sent
        self.is_resting = False  # it was ended, and has nothing to do
        self.url: str | None = None
        self.warning: str | None = None  # about values that don't arrive

    def start(self) -> Remote[Tracker]:
        """Start or find the tracker, unless that was done already."""
        if self._tracker is not None:
            return self._tracker
        actor_options = ActorOptions(
            logs=LogTarget(self._run_dir, NAME),
            # One call at once: what was sent before `finish` is published before it. Restarts are unlimited.
            max_restarts=-1,
            calls_at_once=1,
        )
        self.is_resting = False
        setup = tracker_setup(self._run_id, self._run_dir, self._job)
        self._tracker = start_host(f"{self._run_id}/{NAME}", self._target, (setup,), actor_options).hosted()
        return self._tracker

    def _start_anew(self) -> None:
        """Start a tracker in the place of one that has ended."""
        log.info("the tracker has ended, and is started again")
        self._tracker, self._is_current, self._ended_s = None, False, None
        self.start()

    def tend(self, now_s: float) -> None:
        """Ask a tracker that lacks something for its position, and start one that has ended, at intervals."""
        if self._ended_s is not None and now_s - self._ended_s >= START_AGAIN_S:
            self._start_anew()
        overdue = self._asked_s is None or now_s - self._asked_s >= ASK_AGAIN_S
        is_idle = self._num_open == 0 and not self._storage.is_pending("tracker")
        if self._tracker is not None and not self._is_current and is_idle and overdue:
            self._asked_s = now_s
            self._call(Tracker.position)

    def rest(self) -> None:
        """End a tracker that has delivered everything: `start` starts it again, once there is more to publish."""
        self.look()
        if self._tracker is not None and self._is_current and self._has_delivered and self._num_open == 0:
            self._tracker.kill()
            self._tracker, self._is_current, self._asked_s, self.is_resting = None, False, None, True
            self._ended_s = None

    def prepared(self, data: PreparedData) -> None:
        """Note the run's data, which is also sent whenever the tracker has to catch up."""
        self._data, self.is_resting = data, False
        if self._is_current:
            self._send(calls_for_data(data))

    def publish(self, points: Sequence[MetricPoint]) -> None:
        """Publish values that are not journalled."""
        if points and self._is_current:
            self._send([(Tracker.publish, (list(points),))])

    def publish_steps(self, points: Sequence[MetricPoint], after: int, loads: Mapping[int, Loads]) -> None:
        """Publish all values of the steps after `after`, and the loads of their experts."""
        call = (Tracker.publish, (list(points), after, loads))
        if points and self._is_current:
            self._send([call])
        elif points and self._is_reading:
            self._held.append(call)

    def publish_event(self, entry: JournalEntry) -> None:
        self._events.append(entry)
        self.is_resting = False
        if self._is_current:
            self._send([self._event_call(entry)])

    def _event_call(self, entry: JournalEntry) -> Call:
        after, self._newest_event = self._newest_event, entry.seq
        return Tracker.event, (entry, points_of_event(entry), after)

    def look(self) -> None:
        """Ask the tracker for its URL and its errors, at intervals."""
        now_s = time.monotonic()
        if self._tracker is not None and self._num_open < MOST_OPEN and now_s - self._looked_s >= LOOK_EVERY_S:
            self._looked_s = now_s
            self._call(Tracker.describe)

    def _take(self, tracker: Remote[Tracker], method: Callable[..., Any], answer: "Future[Any]") -> None:
        """Note an answer. After any error, the tracker is asked for its position before it gets more."""
        self._num_open -= 1
        error = answer.exception()
        if error is not None:
            self._is_current = False
            self._failed(method, reason_of(error))
            if has_ended(error) and tracker is self._tracker and self._ended_s is None:
                self._ended_s = time.monotonic()
        elif method is Tracker.position:
            self._storage.add("tracker", partial(self._catch_up, answer.result()))
        elif method is Tracker.describe:
            self._described(answer.result())

    def close(self, outcome: str, why: str, watermark: int) -> None:
        """Send the tracker the values that it lacks, and let it deliver. Values that MLflow doesn't accept in time stay
        on disk."""
        if self._ended_s is not None:
            self._start_anew()
        tracker = self.start().within(FINISH_S)
        self._is_current, arrived = True, False
        is_exported = outcome == Outcome.SUCCEEDED and self._job.tracking.register_as is not None
        deadline_s = time.monotonic() + (EXPORT_S if is_exported else 0.0)
        try:
            for _ in range(LAST_TRIES):
                position = tracker.ask(Tracker.position)
                for method, args in retry_until_written(self._missing(position, self._data)):
                    tracker.ask(method, self._term, *args)
                while True:
                    arrived = tracker.within(FINISH_S + 5.0).ask(Tracker.finish, self._term, outcome, why, FINISH_S)
                    state = tracker.within(5.0).ask(Tracker.describe)
                    self._described(state)
                    if arrived or state["error"] or time.monotonic() >= deadline_s:
                        break
                if state["position"] >= watermark:
                    break
        except OrchestratorError as error:
            self.warning = f"the tracker failed: {error}"
        if not arrived:
            deliver = f"`orchestrator tracking sync {self._run_id}` delivers what waits in {outbox_of(self._run_dir)}"
            self.warning = f"{self.warning or 'not every sink has taken everything in time'}; {deliver}"
        if self.warning:
            log.warning(self.warning)

    def _catch_up(self, position: TrackerPosition) -> StorageTask[None]:
        data, self._is_reading = self._data, True
        try:
            missing = yield Lengthy(self._missing(position, data))
        except OSError as error:  # its position is requested again, and the rest sent once the journal can be read
            self._warn(f"metrics wait in the journal, which can't be read: {error.strerror or error}")
        except (JournalCorrupt, KeyUnknown, ProtocolError) as error:  # the run itself doesn't need what is damaged
            self._asked_s = time.monotonic() + DAMAGED_AGAIN_S
            self._warn(f"metrics wait in the journal: {error}")
        else:
            self._is_current, self.warning = True, None
            if self._data is not None and self._data is not data:  # prepared meanwhile
                missing += calls_for_data(self._data)
            seqs = [args[0].seq for method, args in missing if method is Tracker.event]
            self._newest_event = max(seqs, default=position.event)
            missing += (self._event_call(entry) for entry in tuple(self._events) if entry.seq > self._newest_event)
            self._send(missing + self._held)  # steps that it has are dropped by the tracker
        finally:
            self._is_reading = False
            self._held.clear()

    def _missing(self, position: TrackerPosition, data: PreparedData | None) -> Callable[[], list[Call]]:
        """The call that reads what a tracker at `position` lacks."""
        return partial(self._storage.caller, missing_after, self._run_dir, self._job, position, data)

    def _failed(self, method: Callable[..., Any], why: str) -> None:
        """Warn users only of a tracker that can't report its position: it is down, and may be restarting."""
        if method is not Tracker.position:
            log.warning("tracker: %s failed: %s", method.__name__, why)
            return
        self._warn(f"metrics wait in the journal, the tracker doesn't answer: {why}")

    def _warn(self, warning: str) -> None:
        if warning != self.warning:
            log.warning(warning)
        self.warning = warning

    def _described(self, state: Mapping[str, Any]) -> None:
        self.url = state["url"] or self.url
        self._has_delivered = self._is_current and not state["waiting"]
        if state["error"] or self._is_current:  # else it works, and lacks what waits in the journal
            self.warning = f"metrics wait on disk: {state['error']}" if state["error"] else None

    def _send(self, calls: Iterable[Call]) -> None:
        for method, args in calls:
            if self._num_open >= MOST_OPEN and method is Tracker.publish and len(args) > 1:
                self._is_current = False  # the rest is sent once it has answered
                return
            self._call(method, self._term, *args)

    def _call(self, method: Callable[Concatenate[Tracker, P], Any], *args: P.args, **kwargs: P.kwargs) -> None:
        assert self._tracker is not None, "the tracker was not started"
        self._num_open += 1
        self._has_delivered = False
        post(self._inbox, self._tracker.send(method, *args, **kwargs), partial(self._take, self._tracker, method))

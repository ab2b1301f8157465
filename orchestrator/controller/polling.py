"""Polls of a run's actors, their answers, and the pace at which the controller acts on them."""

from contextlib import suppress
from functools import partial
from queue import Empty

from orchestrator.cluster.inbox import Arrival, Inbox, wake
from orchestrator.cluster.storage_thread import Lane, StorageThread
from orchestrator.controller.monitors import Monitors
from orchestrator.controller.observer import Observer
from orchestrator.controller.recorder import StepRecorder
from orchestrator.controller.services.run_services import RunServices
from orchestrator.controller.shutdown import collect_final_records
from orchestrator.controller.worker_group import WorkerGroup
from orchestrator.protocol.worker_report import Report
from orchestrator.run_records.journaled_run import JournaledRun

BEAT_S = 0.05  # poll interval while the world changes
CALM_BEAT_S = 0.25  # and while it trains: each poll takes half a millisecond of a core that workers may need
ROUNDS_SHARE = 1 / 9  # of a core; a round of 1,000 workers takes 6 ms: 20 a second
ROUNDS_BURST_S = 0.1  # of a core; a recovery of four workers takes some ten rounds of 1 to 4 ms


class RoundLimiter:
    """Limits rounds to a share of a thread's time: a token bucket, so what they haven't used is left for several rounds
    in a row. A small world, whose rounds are short, isn't delayed while it recovers or rescales, and a large one leaves
    time for its answers.

    Args:
        share: of the time.
        burst_s: processor time that rounds may use at most before they wait.
    """

    def __init__(self, share: float, burst_s: float) -> None:
        self._share, self._burst_s = share, burst_s
        self._left_s, self._at_s = burst_s, 0.0  # processor time that is left, when it was last counted

    def may_begin(self, now_s: float) -> bool:
        return self.wait_s(now_s) == 0.0

    def ended(self, now_s: float, took_s: float) -> None:
        """Note the end of a round that took so much processor time."""
        self._left_s, self._at_s = self._left_at(now_s) - took_s, now_s

    def wait_s(self, now_s: float) -> float:
        """Seconds until the next round may begin."""
        return max(0.0, -self._left_at(now_s) / self._share)

    def _left_at(self, now_s: float) -> float:
        return min(self._burst_s, self._left_s + self._share * (now_s - self._at_s))


class Polls:
    """Polls workers and services, and takes in what has arrived."""

    def __init__(
        self,
        inbox: Inbox,
        storage: StorageThread,
        memory: JournaledRun,
        worker_group: WorkerGroup,
        services: RunServices,
        monitors: Monitors,
        recorder: StepRecorder,
        observer: Observer,
    ) -> None:
        self._inbox, self._storage, self._memory, self._worker_group = inbox, storage, memory, worker_group
        self._services, self._monitors, self._recorder, self._observer = services, monitors, recorder, observer
        worker_group.on_report = self._hear

    def start(self) -> None:
        """Let the first `listen` return at once."""
        wake(self._inbox)

    def listen(self, timeout_s: float | None) -> bool:
        """Process all answers that have arrived, waiting briefly for the first.

        Args:
            timeout_s: of the wait; None for the interval of polls.

        Returns:
            whether anything arrived but results of storage calls.
        """
        arrivals: list[Arrival] = []
        with suppress(Empty):
            beat_s = BEAT_S if self._memory.state.is_changing else CALM_BEAT_S
            arrivals.append(self._inbox.get(timeout=beat_s if timeout_s is None else timeout_s))
            while not self._inbox.empty():
                arrivals.append(self._inbox.get())
        for arrival in arrivals:
            arrival.take()
        return any(arrival.is_news for arrival in arrivals)

    def collect_last(self) -> None:
        """Collect what the workers of a run that has ended still know: their last steps and their energy."""
        members, watermark = self._memory.state.members, self._memory.progress.watermark
        collect_final_records(self._worker_group, self._inbox, members, watermark, self._take_now)
        self._monitors.close(self._worker_group.handles)
        self._storage.finish()

    def _take_now(self, arrival: Arrival) -> None:
        """Take an answer, and wait until all of it is recorded."""
        arrival.take()
        self._storage.finish()

    def send(self, now_s: float) -> None:
        """Send the polls that are due."""
        published = self._memory.progress.watermark
        self._worker_group.poll(now_s, eager=self._memory.state.is_changing, published=published)
        seen = self._observer.observe()
        if not self._storage.is_pending("records"):
            self._recorder.ask(seen, now_s)
        is_queued = self._memory.state.is_queued
        self._services.tend(now_s, has_places=bool(self._worker_group.nodes), is_queued=is_queued)
        self._monitors.poll(now_s, self._worker_group.handles)
        if self._recorder.tracking_changed():
            self._storage.add("tracking", self._recorder.note_tracking, Lane.DECISIONS)
        trouble = self._observer.storage_trouble()
        if self._recorder.storage_changed(trouble):  # the newest replaces one that waits
            self._storage.add("trouble", partial(self._recorder.note_storage, trouble), Lane.DECISIONS)
        self._recorder.show_run(seen, trouble, now_s)

    def _hear(self, worker: str, report: Report) -> None:
        """Have what is new in a worker's report recorded."""
        if self._recorder.are_new(worker, report):
            self._storage.add(f"report of {worker}", partial(self._recorder.hear, worker, report), Lane.DECISIONS)
        if report.history.records:
            enter = partial(self._recorder.enter, report.history.records, self._observer.observe)
            self._storage.add("records", enter, Lane.RECORDS)

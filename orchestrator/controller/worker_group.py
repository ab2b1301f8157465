"""Worker group of a run: starts, polls, directs and ends workers for the controller, without blocking.

Every answer arrives in the controller's inbox. Reports are requested by long polls. One call per
worker never returns, so a failure is known as soon as Ray knows it: the call ends with an error.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from ray.util.placement_group import placement_group

from orchestrator.cluster.actors import ActorOptions, Host, find, kill_on_node, names_of, remove_group, start_host
from orchestrator.cluster.calls import cause_of, reason_of
from orchestrator.cluster.inbox import Inbox, post
from orchestrator.cluster.remote import Remote
from orchestrator.controller.worker_env import env_of_worker
from orchestrator.protocol.actors import WorkerApi
from orchestrator.protocol.changes import changed
from orchestrator.protocol.messages import Directive
from orchestrator.protocol.sent_directive import SentDirective
from orchestrator.protocol.worker_job import WorkerJob
from orchestrator.protocol.worker_report import Report
from orchestrator.spec.job import JobSpec
from orchestrator.spec.keys.labels import NODE_ID
from orchestrator.storage.backends.location import Location
from orchestrator.storage.backends.log_target import LogTarget

log = logging.getLogger("orchestrator.control")

POLL_S = 0.5  # how long a worker may wait for news before it answers
POLL_PAUSE_S = 0.25  # between an answer and the next poll, unless a rescale waits for it
SILENCE_S = 60.0  # a cold worker that answered before counts as failed if a poll hangs this long
MAX_GONE = 64  # workers that are gone whose last reports are kept
QUIET_S = 1.0  # without an answer or news: from then on, time alone may change a decision


class WorkerGroup:
    """The workers of one run.

    Args:
        target: dotted name of the worker class.
        threads: torch threads per worker.

    Attributes:
        on_report: called with each report of a worker.
    """

    def __init__(self, run_id: str, run_dir: Location, job: JobSpec, target: str, threads: int, inbox: Inbox) -> None:
        self._run_id, self._run_dir, self._job = run_id, run_dir, job
        self._job_json = job.model_dump_json(by_alias=True)
        self._target, self._threads, self._inbox = target, threads, inbox
        self._handles: dict[str, Remote[Host]] = {}
        self._known, self._warmed = set[str](), set[str]()  # workers started by this or an earlier controller; warmed
        self._told: dict[str, int] = {}  # seq of the directive that was sent last
        self._polled_s: dict[str, float] = {}  # open polls, since when
        self._rested_s: dict[str, float] = {}  # when the last report came
        self.reports: dict[str, Report] = {}
        self._heard_s: dict[str, float] = {}  # when the last answer to any call came
        self._last_poll_s = time.monotonic()
        self.on_report: Callable[[str, Report], None] = lambda worker, report: None
        self.stirred_s = time.monotonic()  # when any worker last reported something new
        self.lost: dict[str, str] = {}
        self.gone: dict[str, Report] = {}  # the last reports of workers that are gone, with their newest shards
        self.causes: dict[str, str] = {}  # the class of each failure, as far as Ray reports it
        self.nodes: dict[str, str] = {}  # by worker, once it has reported its node

    @property
    def handles(self) -> Mapping[str, Remote[Host]]:
        """Hosts of the living workers, by id."""
        return self._handles

    @property
    def request(self) -> dict[str, float]:
        """Resources that Ray reserves for each worker."""
        return self._job.resources.request

    def adopt(self, worker_group: tuple[str, ...]) -> None:
        """Find the workers that an earlier controller started; end those that it did not journal."""
        for name in names_of(self._run_id):
            handle = find(name) if name.startswith(f"{self._run_id}/worker/") else None
            if handle is not None:
                worker = name.rpartition("/")[2]
                self._handles[worker] = Remote(handle)
                self._watch(worker)
        for worker in worker_group:
            self._known.add(worker)
            if worker not in self._handles:
                self.lost[worker] = "it was gone when the run's controller restarted"
        self.reconcile(worker_group)

    def reconcile(self, worker_group: tuple[str, ...], avoid: tuple[str, ...] = ()) -> None:
        """Start missing workers, on none of the nodes to `avoid`; end those outside `worker_group`."""
        for worker in [w for w in self._handles if w not in worker_group]:
            self._dismiss(worker)
        for worker in worker_group:
            if worker not in self._known:
                self._start(worker, avoid)

    def warm(self, store_dir: str, vocab_size: int, head_host: str) -> None:
        """Turn every worker that hasn't begun into a standby, with the data of `store_dir`."""
        job = WorkerJob(
            run_id=self._run_id,
            job_json=self._job_json,
            store_dir=store_dir,
            storage_dir=str(self._run_dir),
            head_host=head_host,
            threads=self._threads,
            vocab_size=vocab_size,
        )
        for worker in self._handles.keys() - self._warmed:
            self._warmed.add(worker)
            post(self._inbox, self._worker(worker).send(WorkerApi.warm, job), partial(self._reported, worker))

    def direct(self, directive: Directive) -> None:
        """Send the directive to every worker that doesn't have it yet, with the plans that it doesn't know."""
        for worker in self._handles:
            if self._told.get(worker, -1) < directive.seq:
                self._told[worker] = directive.seq
                known = self.reports[worker].plans if worker in self.reports else ()
                call = self._worker(worker).send(WorkerApi.direct, SentDirective.of(directive, worker, known))
                post(self._inbox, call, partial(self._directed, worker, (directive.term, directive.seq)))

    def poll(self, now_s: float, eager: bool, published: int) -> None:
        """Poll every worker without an open poll, which shows it the newest step that is published; count one as failed
        that has been silent for too long."""
        if now_s - self._last_poll_s > QUIET_S:  # this process was delayed: answers may be on their way
            self._polled_s = dict.fromkeys(self._polled_s, now_s)
        self._last_poll_s = now_s
        for worker in list(self._handles):
            if worker not in self._polled_s:
                if eager or now_s - self._rested_s.get(worker, 0.0) >= POLL_PAUSE_S:
                    version = self.reports[worker].version if worker in self.reports else -1
                    self._polled_s[worker] = now_s
                    call = self._worker(worker).send(WorkerApi.report, None, version, POLL_S, published)
                    post(self._inbox, call, partial(self._polled, worker))
            elif worker in self.reports and now_s - self._polled_s[worker] > POLL_S + SILENCE_S:
                self._lose(worker, f"it did not answer for {SILENCE_S:.0f} s")

    def silence_s(self, now_s: float) -> dict[str, float]:
        """Seconds for which each worker's answer is overdue. An answer is due after `POLL_S` at the latest; a poll that
        was sent while the process still started counts from its first answer to any other call."""
        known = [(w, since_s) for w, since_s in self._polled_s.items() if w in self._handles and w in self.reports]
        asked = {worker: max(since_s, self._heard_s.get(worker, since_s)) for worker, since_s in known}
        return {worker: max(0.0, now_s - since_s - POLL_S) for worker, since_s in asked.items()}

    def is_quiet(self) -> bool:
        """Whether an answer is overdue, or no worker has reported anything new, for `QUIET_S`."""
        now_s = time.monotonic()
        return now_s - self.stirred_s > QUIET_S or max(self.silence_s(now_s).values(), default=0.0) > QUIET_S

    def ask_records(self, worker: str, after_step: int, answered: Callable[[], None]) -> bool:
        """Request the finished steps after this one, which arrive as a report.

        Args:
            answered: called first when the request has ended, with an answer or an error.

        Returns:
            whether the worker could be called.
        """
        if worker not in self._handles:
            return False

        def take(answer: "Future[Report]") -> None:
            answered()
            self._reported(worker, answer)

        post(self._inbox, self._worker(worker).send(WorkerApi.report, after_step, -1, 0.0), take)
        return True

    def record_source(self, members: Sequence[str], watermark: int) -> str:
        """The first member that has the steps after `watermark`; those that joined later don't."""
        known = (w for w in members if w in self.reports and self.reports[w].history.first_record <= watermark + 1)
        return next(known, members[0])

    def kill(self, worker: str) -> None:
        """End a process that doesn't answer, by its id on its own node."""
        report = self.reports.get(worker)
        if worker in self._handles and report is not None and report.process.pid:
            killing = kill_on_node(self.nodes.get(worker, ""), report.process.pid)
            post(self._inbox, killing, lambda _: None)  # its effect shows elsewhere

    def _polled(self, worker: str, answer: "Future[Report]") -> None:
        self._polled_s.pop(worker, None)
        self._rested_s[worker] = time.monotonic()
        self._reported(worker, answer)

    def _directed(self, worker: str, sent: tuple[int, int], answer: "Future[Report]") -> None:
        """Note a worker's report. One that hasn't accepted the directive of this (term, seq) gets it again."""
        self._reported(worker, answer)
        report = self.reports.get(worker)
        if report is not None and (report.term, report.seen) < sent:  # it lacks a plan that it had
            self._told.pop(worker, None)

    def _reported(self, worker: str, answer: "Future[Report]") -> None:
        """Note a worker's report."""
        if not self._has_answered(worker, answer):
            return
        self._heard_s[worker] = time.monotonic()
        report, known = answer.result(), self.reports.get(worker)
        if known is None or report.version > known.version:
            self.stirred_s = time.monotonic()
        if known is None or report.version >= known.version:
            self.reports[worker] = report
        self.on_report(worker, report)

    def _located(self, worker: str, answer: "Future[str]") -> None:
        if self._has_answered(worker, answer):
            self.nodes[worker] = answer.result()

    def _held(self, worker: str, answer: "Future[None]") -> None:
        """A call that ends without an error: another controller holds the worker, and this one will find its term
        superseded."""
        self._has_answered(worker, answer)

    def _has_answered(self, worker: str, answer: "Future[Any]") -> bool:
        """Whether this is the result of a call to a worker of the group. An error is the worker's failure."""
        if worker not in self._handles:  # dismissed meanwhile
            return False
        if (error := answer.exception()) is not None:
            self.causes[worker] = cause_of(error)
            self._lose(worker, reason_of(error))
        return error is None

    def _start(self, worker: str, avoid: tuple[str, ...]) -> None:
        resources = self._job.resources
        name = f"{self._run_id}/worker/{worker}"
        selector = self._job.workers.label_selector | ({NODE_ID: f"!in({','.join(avoid)})"} if avoid else {})
        group = placement_group([self.request], name=name, lifetime="detached", bundle_label_selector=[selector])
        actor_options = ActorOptions(
            cpus=resources.cpus,
            gpus=resources.num_gpus,
            memory_bytes=resources.memory_bytes or 0,
            group=group,
            env=env_of_worker(self._job, self._threads),
            logs=LogTarget(self._run_dir, worker),
            storage_process=True,
        )
        self._known.add(worker)
        self._handles[worker] = start_host(name, self._target, (worker,), actor_options)
        self._watch(worker)

    def _watch(self, worker: str) -> None:
        host = self._handles[worker]
        post(self._inbox, host.send(Host.node), partial(self._located, worker))
        post(self._inbox, host.send(Host.hold), partial(self._held, worker))

    def _worker(self, worker: str) -> Remote[WorkerApi]:
        return self._handles[worker].hosted()

    def _lose(self, worker: str, why: str) -> None:
        self.lost[worker] = why
        self._dismiss(worker)

    def _dismiss(self, worker: str) -> None:
        """Kill a worker's process and free its reservation."""
        host = self._handles.pop(worker)
        if (report := self.reports.pop(worker, None)) is not None:
            earlier = list(self.gone.items())[1 - MAX_GONE :]
            self.gone = dict([*earlier, (worker, changed(report, shards=report.shards[-1:]))])
        host.kill()
        remove_group(f"{self._run_id}/worker/{worker}")

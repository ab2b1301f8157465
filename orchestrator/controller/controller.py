"""Controller of one run: the actor that journals requests to the run and its decisions.

    loop.RunLoop                    the run from beginning to end, in its own thread
    decisions.DecisionMaker         one decision: observe, ask `policy.lifecycle`, journal, carry out
    journal_writer.JournalWriter    records what is decided: in run storage, else in the cluster until then
    storage_thread.StorageThread    orders all other calls to run storage, which may be slow or hang
    storage_process.StorageProcess  makes them, in a process of its own for the journal and one for the others

A detached actor with unlimited restarts. Its state is in the journal, and the actors it works with have names. So after
a crash the next incarnation takes a new term and continues, while the workers have kept training.
"""

import logging
import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass

from orchestrator.cluster.calls import once
from orchestrator.cluster.cluster_objects import ClusterObjects, cluster_id
from orchestrator.cluster.inbox import Inbox
from orchestrator.cluster.process_title import name_process
from orchestrator.cluster.published.published_keys import published_key
from orchestrator.cluster.published.status_publisher import (
    StatusPublisher,
    last_published,
    publishing_the_last,
)
from orchestrator.cluster.storage_thread import StorageThread
from orchestrator.controller.decisions import DecisionMaker
from orchestrator.controller.journal_writer import JournalWriter
from orchestrator.controller.keep_alive import keeping_workers_alive
from orchestrator.controller.loop import RunLoop
from orchestrator.controller.monitors import Monitors
from orchestrator.controller.observer import Observer
from orchestrator.controller.polling import Polls
from orchestrator.controller.recorder import StepRecorder
from orchestrator.controller.requests import PATIENCE_S, PendingRequests, member_of_rank
from orchestrator.controller.run_checkpoints import RunCheckpoints
from orchestrator.controller.services.actor_classes import ActorClasses
from orchestrator.controller.services.run_services import RunServices
from orchestrator.controller.shutdown import FLUSH_S, exit_for_good, remove_taken_over
from orchestrator.controller.startup import OpenedRun, open_run, worker_threads
from orchestrator.controller.worker_group import WorkerGroup
from orchestrator.errors import ClusterUnreachable, KeyUnknown, OrchestratorError, TermSuperseded, UsageError
from orchestrator.policy.cluster.autoscaling import scale_of
from orchestrator.policy.lifecycle import phase_of
from orchestrator.policy.rescale.expert_number import check_request
from orchestrator.policy.state.config import RunLimits
from orchestrator.protocol.events.run import Submitted
from orchestrator.protocol.messages import DesiredRunState, ExpertRequest, FinishMode, ResumeRequest
from orchestrator.protocol.scaling import Grant, ScalingView
from orchestrator.protocol.status import RunStatus
from orchestrator.run_records.journaled_run import retry_until_written
from orchestrator.spec.job_file.live_changes import check_priority
from orchestrator.storage.backends.location import location_of
from orchestrator.storage.backends.signing_keys import hold_key
from orchestrator.storage.log_file import flush_logs
from orchestrator.storage.storage_process import StorageProcess
from orchestrator.telemetry.prometheus import Exporter

log = logging.getLogger("orchestrator.control")

OPEN_AGAIN_S = 10.0  # after an error that nothing explains


@dataclass(frozen=True)
class _Controlled:
    """What of the run exists once it has been opened."""

    run: OpenedRun
    worker_group: WorkerGroup
    observer: Observer
    loop: RunLoop


class RunController:
    """Controls one run, whose location `run_dir` contains `job.json`. Methods may be called from any thread.

    A thread opens the run, which takes as long as run storage hangs or refuses to be written. Requests are accepted
    meanwhile, and the status is the newest one that was published.

    Args:
        limits: of the run's job.
        order: request to resume from a checkpoint; applied once, whichever incarnation reads it.
        since_s: `time.time()` when the run was requested and entered the queue; None for now.
    """

    def __init__(
        self,
        run_id: str,
        run_dir: str,
        limits: RunLimits,
        parts: ActorClasses,
        order: ResumeRequest | None = None,
        since_s: float | None = None,
    ) -> None:
        name_process(self)
        self._run_id, self._run_dir, self._limits = run_id, location_of(run_dir), limits
        self._inbox = Inbox()
        self._requests = PendingRequests(run_id, self._inbox)
        self._opened: Future[_Controlled] = Future()
        threading.Thread(target=self._live, args=(parts, order, since_s), name="run", daemon=True).start()

    def _live(self, parts: ActorClasses, order: ResumeRequest | None, since_s: float | None) -> None:
        """Open the run and control it to its end, then end this process."""
        try:
            controlled = self._control(self._open(order, since_s), parts)
        except OrchestratorError as error:  # permanent: another incarnation would raise it too
            log.error("run %s: it can't be controlled: %s", self._run_id, error)
        except Exception:
            log.exception("run %s: it could not be opened; the next incarnation tries again", self._run_id)
            flush_logs(FLUSH_S)
            time.sleep(OPEN_AGAIN_S)  # an error that comes back takes a term each time
            os._exit(1)
        else:
            log.info("run %s: controller of term %d, pid %d", self._run_id, controlled.run.memory.term, os.getpid())
            self._opened.set_result(controlled)
            controlled.loop.live()
        exit_for_good()

    def _open(self, order: ResumeRequest | None, since_s: float | None) -> OpenedRun:
        process = StorageProcess(f"controller {self._run_id}")
        bulk = StorageProcess(f"checkpoints of controller {self._run_id}").call
        cluster, kept = retry_until_written(cluster_id), ClusterObjects(self._run_id)
        published = retry_until_written(lambda: published_key(self._run_dir))
        if published is not None:
            hold_key(self._run_dir, published.key)
        job_sha256 = "" if published is None else published.job_sha256
        try:
            with keeping_workers_alive(self._run_id), publishing_the_last(self._run_id):
                return open_run(
                    self._run_id, self._run_dir, order, since_s, process.call, kept, cluster, bulk, job_sha256
                )
        except (TermSuperseded, KeyUnknown) as error:
            if error.cluster not in ("", cluster):  # else the run's processes are its successor's
                remove_taken_over(self._run_id, error)
            raise

    def _control(self, run: OpenedRun, parts: ActorClasses) -> _Controlled:
        """Build the run's loop and its parts, and let requests be recorded."""
        inbox, memory = self._inbox, run.memory
        storage, writer = StorageThread(inbox, run.caller), JournalWriter(memory, inbox)
        memory.writer = writer
        worker_group = WorkerGroup(self._run_id, run.run_dir, run.job, parts.worker, worker_threads(run), inbox)
        services = RunServices(self._run_id, run.run_dir, run.job, parts, memory.term, storage, inbox)
        recorder = StepRecorder(run, worker_group, services.tracker, Exporter(self._run_id))
        checkpoints = RunCheckpoints(run, storage, inbox, recorder.note)
        monitors = Monitors(run, storage, inbox, recorder.show)
        observer = Observer(run, self._requests, worker_group, services, checkpoints, storage, writer)
        decisions = DecisionMaker(run, observer, recorder, checkpoints, worker_group, self._requests)
        polls = Polls(inbox, storage, memory, worker_group, services, monitors, recorder, observer)
        publisher = StatusPublisher(self._run_id, self.status)
        loop = RunLoop(run, polls, storage, decisions, worker_group, services, observer, publisher, writer)
        resources = run.job.resources
        log.info("each worker reserves %g CPUs and %g GPUs", resources.cpus, resources.num_gpus)
        self._requests.open(memory, writer, storage)
        return _Controlled(run, worker_group, observer, loop)

    def _controlled(self) -> _Controlled:
        """The run, once it has been opened. Raises ClusterUnreachable if that takes long."""
        try:
            return self._opened.result(PATIENCE_S)
        except TimeoutError:
            raise ClusterUnreachable(
                f"the controller of run {self._run_id} waits for run storage",
                remedy="Try again in a moment.",
                unchanged="Nothing was changed.",
            ) from None

    def status(self) -> RunStatus:
        """The run's status; before it has been opened, the newest one of the controller before this one. Raises
        ClusterUnreachable if there is none."""
        try:
            controlled = self._controlled()
        except ClusterUnreachable:
            if (last := last_published(self._run_id)) is not None:
                return last
            raise
        return controlled.observer.status(controlled.loop.has_closed)

    def scale(self, workers: int | None, reason: str, by_hand: bool = True) -> DesiredRunState:
        """Request another size; None leaves it to the Scheduler from now on. Returns when the request is journalled,
        not when it is fulfilled.

        Args:
            by_hand: False from the Scheduler, whose requests yield to those of a user.

        Raises:
            UsageError: the job doesn't allow this size, or the run is ending.
        """
        if workers is None:
            self._limits.check_autoscale()
            return self._requests.aim(FinishMode.NO, reason, by_hand=False)
        self._limits.check_size(workers)
        return self._requests.aim(FinishMode.NO, reason, workers, by_hand=by_hand)

    def scaling(self, draining: Mapping[str, float]) -> ScalingView | None:
        """Input for the Scheduler's decision on this run's size; None once the run is over. Raises ClusterUnreachable
        before it has been opened.

        Args:
            draining: nodes that are being drained, with deadlines in `time.time()` seconds, 0 without one.
        """
        self._requests.drained(draining)
        controlled = self._controlled()
        memory = controlled.run.memory
        if memory.state.outcome is not None:
            return None
        submitted_s, seen = memory.times.get(Submitted, time.time()), controlled.observer.observe()
        return scale_of(self._limits, memory.state, seen, controlled.worker_group.request, submitted_s)

    def grant(self, grant: Grant) -> None:
        """Accept the Scheduler's grant of workers. Returns when it is journalled; raises NotFinished."""
        self._requests.granted(grant)

    def set_priority(self, priority: int) -> int:
        """Give the run another priority than its job has. Returns it when it is journalled.

        Raises:
            UsageError: a job can't have it, or the run is ending.
        """
        check_priority(priority)
        return self._requests.prioritise(priority)

    def stage(self, name: str, reason: str) -> DesiredRunState:
        """Request another stage of the curriculum, or the `next` one. Returns when the request is journalled.

        Raises:
            UsageError: the job has no such stage, or the run is ending.
        """
        self._limits.check_stage(name)
        return self._requests.aim(FinishMode.NO, reason, stage=name)

    def checkpoint(self, reason: str) -> DesiredRunState:
        """Request a checkpoint of the newest finished step or a later one. Returns when the request is journalled, not
        when the checkpoint is complete; the result names the step.

        Raises:
            UsageError: the run is ending, or has finished no step yet.
            ClusterUnreachable: the run has not been opened.
        """
        step = self._controlled().observer.observe().step
        if step < 0:
            raise UsageError(
                f"run {self._run_id} has not finished a step yet",
                remedy=f"Ask again once `orchestrator status {self._run_id}` shows one.",
                unchanged="Nothing was changed.",
            )
        return self._requests.aim(FinishMode.NO, reason, checkpoint=step)

    def rebalance(self, reason: str) -> DesiredRunState:
        """Request that experts are placed by load. Returns when the request is journalled, not when they are.

        Raises:
            UsageError: the run isn't training, has one worker or no experts, or is ending.
            ClusterUnreachable: the run has not been opened.
        """
        controlled = self._controlled()
        state, seen = controlled.run.memory.state, controlled.observer.observe()
        has_loads = seen.progress.loads.weight > 0
        self._limits.check_rebalance(phase_of(state, seen), len(state.members), has_loads)
        return self._requests.aim(FinishMode.NO, reason, rebalance=True)

    def set_experts(self, request: ExpertRequest, reason: str) -> DesiredRunState:
        """Request another number of experts. Returns when the request is journalled, not when they are there.

        Raises:
            UsageError: the run isn't training or is ending, or it can't have this number.
            ClusterUnreachable: the run has not been opened.
        """
        controlled = self._controlled()
        state, seen = controlled.run.memory.state, controlled.observer.observe()
        check_request(self._limits, state, seen, phase_of(state, seen), request)
        return self._requests.aim(FinishMode.NO, reason, experts=request)

    def finish(self, how: FinishMode, reason: str) -> DesiredRunState:
        """Request the run's end, with a checkpoint. Raises UsageError if it is already ending another way."""
        return self._requests.aim(how, reason)

    @once
    def kill_worker(self, rank: int | None) -> str:
        """Kill a member's process, as a fault would: the highest rank, or the given one. Returns the worker's id.

        Raises:
            UsageError: no member has this rank now.
            ClusterUnreachable: the run has not been opened.
        """
        controlled = self._controlled()
        worker = member_of_rank(self._run_id, controlled.run.memory.state.members, rank)
        controlled.worker_group.kill(worker)
        return worker

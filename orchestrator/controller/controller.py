"""Controller of one run: the actor that journals what is asked of the run, and decides.

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

from orchestrator.cluster.cluster_objects import ClusterObjects, cluster_id
from orchestrator.cluster.inbox import Inbox
from orchestrator.cluster.nodes import cores_of_nodes
from orchestrator.cluster.process_title import name_process
from orchestrator.cluster.published.published_keys import published_key
from orchestrator.cluster.published.status_publisher import StatusPublisher, publishing_the_last
from orchestrator.cluster.storage_thread import StorageThread
from orchestrator.controller.decisions import DecisionMaker
from orchestrator.controller.journal_writer import JournalWriter
from orchestrator.controller.keep_alive import keeping_workers_alive
from orchestrator.controller.loop import RunLoop
from orchestrator.controller.monitors import Monitors
from orchestrator.controller.observer import Observer
from orchestrator.controller.polling import Polls
from orchestrator.controller.recorder import StepRecorder
from orchestrator.controller.requests import PendingRequests, member_of_rank
from orchestrator.controller.run_checkpoints import RunCheckpoints
from orchestrator.controller.services.actor_classes import ActorClasses
from orchestrator.controller.services.run_services import RunServices
from orchestrator.controller.shutdown import let_go
from orchestrator.controller.startup import OpenedRun, open_run
from orchestrator.controller.worker_group import WorkerGroup
from orchestrator.errors import KeyUnknown, TermSuperseded
from orchestrator.policy.cluster.autoscaling import scale_of
from orchestrator.policy.cluster.capacity import threads_of
from orchestrator.policy.state.config import RunLimits
from orchestrator.protocol.events.run import Submitted
from orchestrator.protocol.messages import DesiredRunState, FinishMode, ResumeRequest
from orchestrator.protocol.scaling import Grant, ScalingView
from orchestrator.protocol.status import RunStatus
from orchestrator.run_records.journaled_run import retry_until_written
from orchestrator.spec.live_changes import check_priority
from orchestrator.storage.backends.location import location_of
from orchestrator.storage.backends.signing_keys import hold_key
from orchestrator.storage.storage_process import StorageProcess
from orchestrator.telemetry.prometheus import Exporter

log = logging.getLogger("orchestrator.control")


class RunController:
    """Controls one run, whose location `run_dir` contains `job.json`. Methods may be called from any thread.

    Args:
        order: request to resume from a checkpoint; applied once, whichever incarnation reads it.
        since_s: `time.time()` when the run was requested and entered the queue; None for now.
    """

    def __init__(
        self,
        run_id: str,
        run_dir: str,
        parts: ActorClasses,
        order: ResumeRequest | None = None,
        since_s: float | None = None,
    ) -> None:
        name_process(self)
        process = StorageProcess(f"controller {run_id}")
        bulk = StorageProcess(f"checkpoints of controller {run_id}").call
        cluster, kept = retry_until_written(cluster_id), ClusterObjects(run_id)
        published = retry_until_written(lambda: published_key(location_of(run_dir)))
        if published is not None:
            hold_key(location_of(run_dir), published.key)
        job_sha256 = "" if published is None else published.job_sha256
        try:
            with keeping_workers_alive(run_id), publishing_the_last(run_id):
                run = open_run(
                    run_id, location_of(run_dir), order, since_s, process.call, kept, cluster, bulk, job_sha256
                )
        except (TermSuperseded, KeyUnknown) as error:
            if error.cluster not in ("", cluster):  # else the run's processes are its successor's
                let_go(run_id, error)
            raise
        inbox = Inbox()
        storage, writer = StorageThread(inbox, bulk), JournalWriter(run.memory, inbox)
        run.memory.writer = writer
        self._run, self._memory = run, run.memory
        self._requests = PendingRequests(run_id, run.memory, writer, storage, inbox)
        self._worker_group = WorkerGroup(run_id, run.run_dir, run.job, parts.worker, _threads_of(run), inbox)
        services = RunServices(run_id, run.run_dir, run.job, parts, run.memory.term, storage, inbox)
        recorder = StepRecorder(run, self._worker_group, services.tracker, Exporter(run_id))
        checkpoints = RunCheckpoints(run, storage, inbox, recorder.note)
        monitors = Monitors(run, storage, inbox, recorder.show)
        self._observer = Observer(run, self._requests, self._worker_group, services, checkpoints, storage, writer)
        decisions = DecisionMaker(run, self._observer, recorder, checkpoints, self._worker_group, self._requests)
        polls = Polls(inbox, storage, run.memory, self._worker_group, services, monitors, recorder, self._observer)
        publisher = StatusPublisher(run_id, self.status)
        self._loop = RunLoop(
            run, polls, storage, decisions, self._worker_group, services, self._observer, publisher, writer
        )
        resources = run.job.resources
        log.info("each worker reserves %g CPUs and %g GPUs", resources.cpus, resources.num_gpus)
        log.info("run %s: controller of term %d, pid %d", run_id, run.memory.term, os.getpid())
        threading.Thread(target=self._loop.live, name="run", daemon=True).start()

    def status(self) -> RunStatus:
        return self._observer.status(self._loop.has_closed)

    def limits(self) -> RunLimits:
        return self._run.limits

    def scale(self, workers: int | None, reason: str, by_hand: bool = True) -> DesiredRunState:
        """Request another size; None leaves it to the Scheduler from now on. Returns when the request is journalled,
        not when it is fulfilled.

        Args:
            by_hand: False from the Scheduler, whose requests yield to those of a user.

        Raises:
            UsageError: the job doesn't allow this size, or the run is ending.
        """
        if workers is None:
            self._run.limits.check_autoscale()
            return self._requests.aim(FinishMode.NO, reason, by_hand=False)
        self._run.limits.check_size(workers)
        return self._requests.aim(FinishMode.NO, reason, workers, by_hand=by_hand)

    def scaling(self, draining: Mapping[str, float]) -> ScalingView | None:
        """Input for the Scheduler's decision on this run's size; None once the run is over.

        Args:
            draining: nodes that are being drained, with deadlines in `time.time()` seconds, 0 without one.
        """
        self._requests.drained(draining)
        state = self._memory.state
        if state.outcome is not None:
            return None
        submitted_s = self._memory.times.get(Submitted, time.time())
        return scale_of(self._run.limits, state, self._observer.observe(), self._worker_group.request, submitted_s)

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
        self._run.limits.check_stage(name)
        return self._requests.aim(FinishMode.NO, reason, stage=name)

    def finish(self, how: FinishMode, reason: str) -> DesiredRunState:
        """Request the run's end, with a checkpoint. Raises UsageError if it is already ending another way."""
        return self._requests.aim(how, reason)

    def kill_worker(self, rank: int | None) -> str:
        """Kill a member's process, as a fault would: the highest rank, or the given one. Returns the worker's id.

        Raises:
            UsageError: no member has this rank now.
        """
        worker = member_of_rank(self._run.run_id, self._memory.state.members, rank)
        self._worker_group.kill(worker)
        return worker


def _threads_of(run: OpenedRun) -> int:
    """Torch threads per worker."""
    if run.job.train.is_exact:  # its results must not depend on the cluster's nodes
        return max(1, int(run.job.resources.cpus))
    return threads_of(cores_of_nodes(run.job.workers.label_selector), run.limits.initial_workers)

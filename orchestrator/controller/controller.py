"""Controller of one run: observes, asks `policy.lifecycle` for a decision, journals it and carries it out.

    RunController._live     the run from beginning to end, in its own thread
    RunController._turn     one decision

A detached actor with unlimited restarts. Its state is in the journal, and the actors it works with have names. So after
a crash the next incarnation takes a new term and continues, while the workers have kept training.
"""

import logging
import os
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from queue import Empty

import ray

from orchestrator.cluster.actors import find, log_to
from orchestrator.cluster.nodes import cores_of_nodes
from orchestrator.controller.actor_classes import ActorClasses
from orchestrator.controller.monitors import DrainWatch, EnergyWatch, NodeWatch
from orchestrator.controller.recorder import StepRecorder
from orchestrator.controller.rendezvous_client import head_address
from orchestrator.controller.requests import PendingRequests, member_of_rank
from orchestrator.controller.run_metrics import values_of_run
from orchestrator.controller.services import NAMES, RunServices
from orchestrator.controller.shutdown import await_gone, collect_final_records, remove_groups
from orchestrator.controller.worker_group import CallResult, Inbox, WorkerGroup
from orchestrator.errors import OrchestratorError, StorageError, TermSuperseded
from orchestrator.policy.cluster.autoscaling import scale_of
from orchestrator.policy.cluster.capacity import threads_of
from orchestrator.policy.lifecycle import decide, directive_of, phase_of
from orchestrator.policy.state.config import RunLimits
from orchestrator.policy.state.requests import queued, resumed
from orchestrator.policy.state.run_state import Commit, KillWorker, Observation, ended
from orchestrator.protocol.events.base import Event
from orchestrator.protocol.events.run import ControllerFailed, Submitted
from orchestrator.protocol.events.training import CheckpointCommitted, CheckpointsDeleted
from orchestrator.protocol.messages import DesiredRunState, FinishMode, ResumeRequest
from orchestrator.protocol.scaling import Grant, ScalingView
from orchestrator.protocol.status import RunPhase, RunStatus
from orchestrator.run_records.checkpoints import CheckpointFinder, commit_checkpoint, drop_old_checkpoints, leave_behind
from orchestrator.run_records.run_history import STATUS_FILE, JournaledRun, retry_until_written
from orchestrator.run_records.status import status_of, to_json
from orchestrator.spec.job import JobSpec
from orchestrator.storage.journal import acquire_term
from orchestrator.telemetry.prometheus import Exporter

log = logging.getLogger("orchestrator.control")

BEAT_S = 0.05  # poll interval while the world changes
CALM_BEAT_S = 0.25  # and while it trains: each poll takes half a millisecond of a core that workers may need


class RunController:
    """Controls one run, whose `run_dir` in run storage contains `job.json`. Methods may be called from any thread.

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
        since_s = time.time() if since_s is None else since_s
        self._run_id, self._run_dir = run_id, Path(run_dir)
        retry_until_written(lambda: log_to(self._run_dir / "logs" / "controller.log"))
        self._job = JobSpec.model_validate_json(retry_until_written((self._run_dir / "job.json").read_text))
        self._limits = RunLimits.of(run_id, self._job)
        self._inbox = Inbox()
        self._term = retry_until_written(lambda: acquire_term(self._run_dir))
        self._memory = retry_until_written(lambda: JournaledRun(self._run_dir, self._term, self._limits))
        if order is not None and order.token != self._memory.resumed_by:
            retry_until_written(lambda: self._resume(order, since_s))
        elif Submitted not in self._memory.times:
            retry_until_written(lambda: self._memory.decided(queued(self._memory.state, since_s), []))
        if self._memory.state.current is None:  # an earlier incarnation may have crashed before this
            retry_until_written(lambda: leave_behind(self._run_dir, self._memory.state.checkpoint_done, self._term))
        cores = cores_of_nodes(self._job.workers.label_selector)
        self._threads = threads_of(cores, self._limits.initial_workers)
        log.info("each worker reserves %g CPUs and %g GPUs", self._job.resources.cpus, self._job.resources.num_gpus)
        if self._job.train.is_exact:  # its results must not depend on the cluster's nodes
            self._threads = max(1, int(self._job.resources.cpus))
        self._worker_group = WorkerGroup(run_id, self._run_dir, self._job, parts.worker, self._threads, self._inbox)
        self._services = RunServices(run_id, self._run_dir, self._job, parts, self._term, self._inbox)
        self._nodes = NodeWatch(self._run_dir, self._inbox)
        self._energy = EnergyWatch(self._job.resources.num_gpus, self._memory, self._inbox)
        self._drains = DrainWatch(self._inbox)
        self._checkpointed, self._back = self._memory.state.checkpoint_done, CheckpointFinder(self._run_dir)
        self._exporter = Exporter(run_id)
        self._account = StepRecorder(
            run_id, self._job.model, self._memory, self._worker_group, self._services.tracker, self._exporter
        )
        self._requests = PendingRequests(run_id, self._memory, self._inbox)
        self._faults: list[str] = []
        self._closed = False
        log.info("run %s: controller of term %d, pid %d", run_id, self._term, os.getpid())
        threading.Thread(target=self._live, name="run", daemon=True).start()

    def _resume(self, order: ResumeRequest, since_s: float) -> None:
        decision = resumed(self._limits, self._memory.state, order)
        events = [action for action in decision.actions if isinstance(action, Event)]
        self._memory.decided(queued(decision.state, since_s), events)
        (self._run_dir / STATUS_FILE).unlink(missing_ok=True)  # of its previous end

    # -- requests and queries ----------------------------------------------------------------------------------

    def status(self) -> RunStatus:
        return self._status(self._closed)

    def _status(self, closed: bool) -> RunStatus:
        seen = self._observe(verifies=False)
        return status_of(
            self._limits,
            self._job.model,
            self._memory,
            seen,
            run_dir=self._run_dir,
            tracking_url=self._services.tracker.url,
            warning=self._memory.trouble or seen.unreadable or self._services.tracker.warning,
            preparing=self._services.preparing,
            closed=closed,
        )

    def limits(self) -> RunLimits:
        return self._limits

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

    def scaling(self) -> ScalingView | None:
        """Input for the Scheduler's decision on this run's size; None once the run is over."""
        state = self._memory.state
        if state.outcome is not None:
            return None
        submitted_s = self._memory.times.get(Submitted, time.time())
        return scale_of(self._limits, state, self._observe(verifies=False), self._worker_group.request, submitted_s)

    def grant(self, grant: Grant) -> None:
        """Accept the Scheduler's grant of workers. Returns when it is journalled; raises NotFinished."""
        self._requests.granted(grant)

    def stage(self, name: str, reason: str) -> DesiredRunState:
        """Request another stage of the curriculum, or the `next` one. Returns when the request is journalled.

        Raises:
            UsageError: the job has no such stage, or the run is ending.
        """
        self._limits.check_stage(name)
        return self._requests.aim(FinishMode.NO, reason, stage=name)

    def finish(self, how: FinishMode, reason: str) -> DesiredRunState:
        """Request the run's end, with a checkpoint. Raises UsageError if it is already ending another way."""
        return self._requests.aim(how, reason)

    def kill_worker(self, rank: int | None) -> str:
        """Kill a member's process, as a fault would: the highest rank, or the given one. Returns the worker's id.

        Raises:
            UsageError: no member has this rank now.
        """
        worker = member_of_rank(self._run_id, self._memory.state.members, rank)
        self._worker_group.kill(worker)
        return worker

    # -- the run's life ----------------------------------------------------------------------------------------

    def _live(self) -> None:
        try:
            try:
                self._train()
            except TermSuperseded:
                raise
            except Exception as error:  # the run ends as failed, with this as its reason, and is cleaned up
                self._fail(error)
            self._close()
        except TermSuperseded as error:
            log.error("run %s: %s", self._run_id, error)
        except Exception:
            log.exception("run %s: its end could not be recorded; the next incarnation tries again", self._run_id)
            os._exit(1)
        self._exit()

    def _train(self) -> None:
        self._begin()
        while self._memory.state.outcome is None:
            state = self._memory.state
            waits_for_time = (
                state.is_recovering
                or state.wants_restore
                or (state.transition is not None and state.transition.failing_since_s is not None)
                or self._worker_group.is_quiet()
            )
            waits_for_time = waits_for_time and not state.is_queued
            if self._listen() or waits_for_time or self._memory.trouble is not None:
                with suppress(StorageError):  # nothing was decided; the next turn decides again
                    self._turn()

    def _begin(self) -> None:
        state = self._memory.state
        if Submitted not in self._memory.times:
            retry_until_written(lambda: self._memory.note(Submitted(self._run_id, self._limits.initial_workers)))
        if state.outcome is None:
            self._services.start(self._memory.data)
        self._drains.start()
        self._worker_group.adopt(state.worker_group)
        remove_groups(
            self._run_id, state.num_spawned, keep=self._worker_group.handles
        )  # left by an earlier incarnation
        self._inbox.put(None)  # triggers the first turn

    def _listen(self) -> bool:
        """Process all answers that have arrived, waiting briefly for the first, then send the polls that are due.

        Returns:
            whether anything arrived.
        """
        answers: list[CallResult | None] = []
        with suppress(Empty):
            answers.append(self._inbox.get(timeout=BEAT_S if self._memory.state.is_changing else CALM_BEAT_S))
            while not self._inbox.empty():
                answers.append(self._inbox.get())
        for answer in answers:
            if answer is not None:
                self._take(answer)
        now_s = time.monotonic()
        state = self._memory.state
        self._worker_group.poll(now_s, eager=state.is_changing)
        seen = self._observe(verifies=False)
        self._account.ask(seen, now_s)
        self._services.tend(now_s, has_places=bool(self._worker_group.nodes))
        self._nodes.poll(now_s, self._worker_group.handles)
        self._energy.poll(now_s, self._worker_group.handles)
        self._account.tell_of_tracking()
        if self._exporter.is_due(now_s):
            values = values_of_run(self._limits, self._job.model, self._memory, seen)
            self._exporter.show_run(now_s, values, phase_of(state, seen))
        return bool(answers)

    def _take(self, answer: CallResult) -> None:
        if answer.of in NAMES:
            return self._services.take(answer)
        if answer.method == NodeWatch.READ:
            return self._account.show(self._nodes.take(answer, self._memory.progress.watermark))
        if answer.method == EnergyWatch.READ:
            return self._energy.take(answer)
        if answer.method == WorkerGroup.RECORDS:
            self._account.answered()
        report = self._worker_group.take(answer)
        if report is not None:
            self._account.hear_numerics(answer.of, report.numerics)
            self._account.hear_saturation(answer.of, report.saturated)
        if report is not None and report.records:
            self._account.enter(report.records, self._observe(verifies=False))
        return None

    def _turn(self) -> None:
        """Make one decision: journal it first, then carry it out."""
        if self._services.data not in (None, self._memory.data):
            self._memory.prepared(self._services.data)
        decision = decide(self._limits, self._memory.state, self._observe())
        events = [action for action in decision.actions if isinstance(action, Event)]
        for entry in self._memory.decided(decision.state, events):
            self._account.tell(entry)
        for action in decision.actions:
            if isinstance(action, Commit):
                self._commit(action)
            elif isinstance(action, KillWorker):
                self._worker_group.kill(action.worker)
        if decision.state.outcome is None:  # else `_close` ends the workers, once their last records are read
            self._worker_group.reconcile(
                decision.state.worker_group, (*decision.state.failures.quarantine, *self._drains.nodes)
            )
            self._warm()
            self._worker_group.tell(directive_of(decision.state, self._term))
        self._requests.turned()

    def _observe(self, verifies: bool = True) -> Observation:
        """Snapshot of what is known now. `verifies`: verify checkpoints, which may take long, if one is wanted."""
        wanted = self._memory.state.wants_restore
        restorable = self._back.newest_good(time.monotonic()) if verifies and wanted else None
        return Observation(
            term=self._term,
            now_s=time.time(),
            target=self._requests.newest,
            progress=self._memory.progress,
            reports=dict(self._worker_group.reports),
            lost=dict(self._worker_group.lost),
            checkpointed=self._checkpointed,
            restorable=restorable,
            unreadable=self._back.trouble if wanted else "",
            causes=dict(self._worker_group.causes),
            nodes=dict(self._worker_group.nodes),
            silence_s=self._worker_group.silence_s(time.monotonic()),
            idle_s=time.monotonic() - self._worker_group.stirred_s,
            store_address=self._services.store.address,
            faults=(*self._faults, *self._services.faults),
            draining=self._drains.nodes,
            grant=self._requests.grant,
        )

    def _warm(self) -> None:
        """Warm up new workers, once the data's location is known."""
        data = self._memory.data
        if data is None:
            return
        self._worker_group.warm(data.store_dir, data.vocab_size, head_address())

    def _commit(self, action: Commit) -> None:
        try:
            path = commit_checkpoint(self._run_id, self._run_dir, self._term, action)
        except (OrchestratorError, OSError) as error:
            if isinstance(error, TermSuperseded):
                raise
            self._faults.append(f"the checkpoint of step {action.step} could not be completed: {error}")
            return
        self._account.note(CheckpointCommitted(action.step, str(path)))
        self._checkpointed = action.step
        self._inbox.put(None)
        deleted = drop_old_checkpoints(self._run_dir, self._job.checkpoint, self._memory.progress.validations)
        if deleted:
            with suppress(StorageError):
                self._account.note(CheckpointsDeleted(deleted))

    # -- the end -----------------------------------------------------------------------------------------------

    def _fail(self, error: Exception) -> None:
        log.exception("run %s: its controller failed", self._run_id)
        trace = "".join(traceback.format_exception(error))
        over = ended(self._memory.state, RunPhase.FAILED, f"the run's controller failed: {error!r}", trace)
        events = [ControllerFailed(trace), *(action for action in over.actions if isinstance(action, Event))]
        retry_until_written(lambda: self._memory.decided(over.state, events))

    def _close(self) -> None:
        """End and remove everything of the run, then write its final status to run storage."""
        state = self._memory.state
        collect_final_records(
            self._worker_group, self._inbox, state.members, self._memory.progress.watermark, self._take
        )
        self._energy.close(self._worker_group.handles)
        self._worker_group.reconcile(())
        remove_groups(self._run_id, state.num_spawned)
        self._services.close(str(state.outcome), state.why, self._memory.progress.watermark)
        await_gone(self._run_id)
        retry_until_written(lambda: self._memory.conclude(to_json(self._status(closed=True))))
        self._closed = True  # only once run storage shows it too
        log.info("run %s: %s: %s", self._run_id, state.outcome, state.why)

    def _exit(self) -> None:
        """Exit for good: Ray restarts an actor that merely exits."""
        me = find(f"{self._run_id}/controller")
        if me is not None:
            ray.kill(me, no_restart=True)

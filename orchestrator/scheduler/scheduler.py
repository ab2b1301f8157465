"""Scheduler of a cluster: the list of its runs, and the actor that users' commands call.

It starts a controller per run and forwards requests to it. Its only state is each run's directory, kept in Ray's
internal key-value store; after a restart it finds all controllers by name.
"""

import logging
import threading
from collections.abc import Callable, Mapping
from functools import partial
from hashlib import sha256
from typing import Any, Concatenate, ParamSpec, TypeVar

from orchestrator.cluster.calls import once
from orchestrator.cluster.process_title import name_process
from orchestrator.cluster.published.known_runs import directory_of, known_runs, remember_run
from orchestrator.cluster.published.published_keys import publish_key, signer_in_cluster
from orchestrator.controller.controller import RunController
from orchestrator.controller.services.actor_classes import ActorClasses
from orchestrator.errors import ClusterUnreachable, JournalCorrupt, KeyUnknown, NotFound, StorageError, UsageError
from orchestrator.policy.state.config import RunLimits
from orchestrator.protocol.messages import DesiredRunState, ExpertRequest, FinishMode, ResumeRequest
from orchestrator.protocol.scaling import ScalingView
from orchestrator.protocol.status import RunStatus
from orchestrator.run_records.job_files import NO_CODE, remove_job, write_code, write_job
from orchestrator.run_records.run_files import RunFiles
from orchestrator.run_records.run_history import user_events
from orchestrator.sampling.sample_ledger import AuditResult
from orchestrator.scheduler.admission import check_admissible, newcomer, refuse_taken, resumed_run, with_gpus
from orchestrator.scheduler.autoscaler import Autoscaler
from orchestrator.scheduler.claims import RunClaims
from orchestrator.scheduler.controller_client import ControllerClient
from orchestrator.scheduler.run_removal import RunRemoval
from orchestrator.scheduler.run_statuses import RunStatuses
from orchestrator.spec.job import JobSpec
from orchestrator.storage.backends.location import Location, location_of
from orchestrator.storage.backends.probe import refusal_at
from orchestrator.storage.backends.signed_objects import SigningKey
from orchestrator.storage.backends.signing_keys import add_key_source
from orchestrator.storage.guard import StorageGuard

log = logging.getLogger("orchestrator.control")

P = ParamSpec("P")
R = TypeVar("R")

LATER = "Try again in a moment."

WRITE_S, HISTORY_S = 10.0, 30.0  # limits of calls to run storage: the files of a new run, a journal
BYTES_PER_S = 4e6  # slowest storage that takes packages of code in time


class Scheduler:
    """One per cluster, named `scheduler`. Every method may be called at any time, from anywhere in the cluster."""

    def __init__(self) -> None:
        name_process(self)
        add_key_source(signer_in_cluster)
        self._submitting = threading.Lock()  # never held during a call to storage
        self._claims = RunClaims()
        self._storage = StorageGuard(refusal_at)
        self._statuses = RunStatuses(self._storage)
        self._removal = RunRemoval(self._claims, self._storage, self._statuses)
        self._autoscaler = Autoscaler()
        self._autoscaler.start()

    def submit(
        self,
        job_json: str,
        run_id: str,
        run_dir: str,
        job_text: str,
        wait: bool = True,
        parts: ActorClasses | None = None,
        key: SigningKey | None = None,
        code: Mapping[str, bytes] = NO_CODE,
    ) -> str:
        """Put a run into the queue: write its job to run storage and start its controller. The run begins once it has
        its place.

        Args:
            job_json: the resolved `JobSpec`.
            run_dir: the run's directory in run storage, absolute; created here.
            job_text: the job file as the user wrote it.
            wait: accept the run even if it has to wait for room.
            parts: actor classes other than the default ones, for tests.
            key: with which its records are signed; None: they aren't.
            code: packages of the job's own code, by their digests.

        Raises:
            NameTaken: the cluster or the storage has a run of this name.
            JobDoesNotFit: the cluster is too small for `workers.min`, or has no room now and `wait` is False.
            StorageError: the run's directory can't be written.
        """
        job, directory = JobSpec.model_validate_json(job_json), location_of(run_dir)
        with self._claims.claim(run_id):
            self._storage.call(directory.parent, WRITE_S, partial(refuse_taken, run_id, directory))
            job = with_gpus(job)
            limits = RunLimits.of(run_id, job)
            run = newcomer(limits, job, job.workers.initial)
            with self._submitting:
                check_admissible(run, None if wait else self._autoscaler)
            job_json = job.model_dump_json(by_alias=True)
            write = partial(self._write_job, run_id, directory, job_json, job_text, code)
            limit_s = WRITE_S + sum(map(len, code.values())) / BYTES_PER_S
            self._storage.call(directory.parent, limit_s, write, undo=partial(remove_job, directory, job_json))
            publish_key(directory, key, sha256(job_json.encode()).hexdigest())
            self._start_controller(run, run_dir, limits, parts)
        log.info("run %s: submitted, stored in %s", run_id, run_dir)
        return run_id

    def _write_job(
        self, run_id: str, directory: Location, job_json: str, job_text: str, code: Mapping[str, bytes]
    ) -> None:
        with self._claims.extended(run_id):
            write_job(directory, job_json, job_text, code)

    def resume(
        self,
        run_id: str,
        run_dir: str,
        order: ResumeRequest,
        wait: bool = True,
        parts: ActorClasses | None = None,
        take_over: bool = False,
        key: SigningKey | None = None,
        code: Mapping[str, bytes] = NO_CODE,
    ) -> str:
        """Start a controller again for a run that has ended, or has lost its cluster.

        Args:
            run_dir: the run's directory in run storage, absolute.
            wait: accept the run even if it has to wait for room.
            take_over: even if another cluster, which then ends its workers, has written its journal recently.
            key: with which its records are signed; None: they aren't.
            code: packages of the code that `order` names, by their digests.

        Raises:
            NotFound: the directory holds no run.
            UsageError: the run has a controller, here or perhaps elsewhere, has done all its steps, may not have so
                many workers, or compresses its gradients differently than when it wrote the checkpoint; or its job's
                file was changed.
            KeyUnknown, JournalCorrupt: its records are not signed with `key`.
            JobDoesNotFit: the cluster is too small for `workers.min`, or has no room now and `wait` is False.
        """
        directory = location_of(run_dir)
        with self._claims.claim(run_id):
            limits, run = self._storage.call(
                directory.parent, HISTORY_S, partial(resumed_run, run_id, directory, order, take_over, key)
            )
            with self._submitting:
                check_admissible(run, None if wait else self._autoscaler)
            if code:
                limit_s = WRITE_S + sum(map(len, code.values())) / BYTES_PER_S
                self._storage.call(directory.parent, limit_s, partial(write_code, directory, code))
            publish_key(directory, key)
            self._start_controller(run, run_dir, limits, parts, order)
        log.info("run %s: resumed after step %d", run_id, order.restore.step if order.restore else -1)
        return run_id

    def list(self) -> tuple[RunStatus, ...]:
        """All runs that the cluster has seen, the newest last. Runs whose storage is gone are left out."""
        found: list[RunStatus] = []
        for run_id in known_runs():
            try:
                found.append(self.status(run_id))
            except (NotFound, ClusterUnreachable, StorageError, KeyUnknown, JournalCorrupt) as error:
                log.warning("run %s: %s", run_id, error)
        return tuple(sorted(found, key=lambda status: status.submitted_time or 0.0))

    def status(self, run_id: str) -> RunStatus:
        """The run's status: from its controller, or from run storage if it has ended, or its controller's node is too
        busy for an answer. Raises NotFound, StorageError, ClusterUnreachable."""
        return self._statuses.get(run_id)

    def scale(self, run_id: str, workers: int | None, reason: str = "asked for") -> DesiredRunState:
        """Request another number of workers; None leaves it to the job's `autoscale`. Raises UsageError outside
        min..max, or if the run has ended; NotFound."""
        target = self._forward(run_id, RunController.scale, workers, reason)
        self._autoscaler.stir()
        return target

    def stage(self, run_id: str, name: str, reason: str = "asked for") -> DesiredRunState:
        """Request another stage of the curriculum. Raises UsageError if the job has none of that name, or the run has
        ended; NotFound."""
        return self._forward(run_id, RunController.stage, name, reason)

    def set_priority(self, run_id: str, priority: int) -> int:
        """Give the run another priority than its job has; returned once it is journalled. Raises UsageError if a job
        can't have it or the run has ended; NotFound."""
        changed = self._forward(run_id, RunController.set_priority, priority)
        self._autoscaler.stir()
        return changed

    def checkpoint(self, run_id: str, reason: str = "asked for") -> DesiredRunState:
        """Request a checkpoint now; the result names the step that it will be of, at least. Raises UsageError if the
        run has ended or finished no step yet; NotFound."""
        return self._forward(run_id, RunController.checkpoint, reason)

    def rebalance(self, run_id: str, reason: str = "asked for") -> DesiredRunState:
        """Request that the run's experts are placed by load. Raises UsageError if it isn't training, or has nothing to
        place; NotFound."""
        return self._forward(run_id, RunController.rebalance, reason)

    def set_experts(self, run_id: str, request: ExpertRequest, reason: str = "asked for") -> DesiredRunState:
        """Request another number of experts. Raises UsageError if the run isn't training, or can't have it;
        NotFound."""
        return self._forward(run_id, RunController.set_experts, request, reason)

    def stop(self, run_id: str, reason: str = "stopped", now: bool = False) -> DesiredRunState:
        """Request the run's end, with a checkpoint unless `now`. Raises UsageError if it has ended; NotFound."""
        how = FinishMode.STOP_NOW if now else FinishMode.STOP
        return self._forward(run_id, RunController.finish, how, reason)

    def pause(self, run_id: str, reason: str = "paused") -> DesiredRunState:
        """Request the run's end, with a checkpoint, to be resumed later. Raises as `stop` does."""
        return self._forward(run_id, RunController.finish, FinishMode.PAUSE, reason)

    def remove(self, run_id: str, tracking: bool = False) -> str:
        """Remove a run that has ended from run storage and from the list of runs. Returns the directory that it had.

        Args:
            tracking: delete its MLflow run before.

        Raises:
            NotFound: there is no such run.
            UsageError: it has not ended.
            StorageError: its files can't be removed.
            OrchestratorError: MLflow does not answer; the files stay.
        """
        return self._removal.remove(run_id, tracking)

    @once
    def kill_worker(self, run_id: str, rank: int | None = None) -> str:
        """Kill one member's process. Returns the worker's id. Raises UsageError if no member has the rank; NotFound."""
        return self._forward(run_id, RunController.kill_worker, rank)

    def events(self, run_id: str, after: int = -1) -> tuple[dict[str, Any], ...]:
        """Events of the run after the one whose `seq` is `after`. Raises NotFound."""
        return tuple(self._read(run_id, partial(user_events, after=after)))

    def audit(self, run_id: str) -> AuditResult:
        """Audit of the run's sample ledger. Raises NotFound."""
        return self._read(run_id, lambda directory: RunFiles(directory).audit())

    def _read(self, run_id: str, read: Callable[[Location], R]) -> R:
        directory = directory_of(run_id)
        return self._storage.call(directory.parent, HISTORY_S, partial(read, directory))

    def _start_controller(
        self,
        run: ScalingView,
        run_dir: str,
        limits: RunLimits,
        parts: ActorClasses | None,
        order: ResumeRequest | None = None,
    ) -> None:
        self._statuses.forget(run.run_id)
        remember_run(run.run_id, run_dir)
        ControllerClient(run.run_id).start(run_dir, limits, parts or ActorClasses(), order, run.queued_s)
        self._autoscaler.expect(run)
        self._autoscaler.stir()

    def _forward(
        self, run_id: str, method: Callable[Concatenate[RunController, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        try:
            return ControllerClient(run_id).ask(method, *args, **kwargs)
        except ClusterUnreachable:  # it has ended, or did not answer: its status shows which
            pass
        status = self.status(run_id)
        if status.phase.ended:
            raise UsageError(
                f"run {run_id} has ended: it is {status.phase}",
                remedy="Only an active run can be changed; `orchestrator resume` continues one that isn't done.",
                unchanged="Nothing was changed.",
            )
        raise ClusterUnreachable(f"the controller of run {run_id} does not answer", remedy=LATER)

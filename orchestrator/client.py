"""The Python API; the CLI uses it too.

    from orchestrator.client import OrchestratorClient

    client = OrchestratorClient()                       # RAY_ADDRESS, else the cluster of `orchestrator cluster up`
    run_id = client.submit("jobs/quickstart.yaml")
    client.scale(run_id, workers=3)
    print(client.wait(run_id).validation_loss)

Arguments and results are plain values.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from orchestrator.errors import JobDoesNotFit
from orchestrator.protocol.messages import DesiredRunState, ExpertRequest
from orchestrator.protocol.status import RunStatus, raise_unless_succeeded
from orchestrator.run_records.run_files import RunFiles
from orchestrator.run_records.run_logs import LogLine
from orchestrator.sampling.sample_ledger import AuditResult
from orchestrator.scheduler.scheduler import Scheduler
from orchestrator.spec.job import JobSpec
from orchestrator.storage.backends.location import location_of
from orchestrator.storage.backends.signing_keys import key_to_resume, read_key
from orchestrator.submission.by_url import refuse_by_url, submit_file
from orchestrator.submission.cluster_access import ClusterAccess
from orchestrator.submission.resume_request import code_of_now, find_run_dir, resume_request
from orchestrator.submission.submission import check_job, order_of
from orchestrator.submission.waiting import until_ended, when_there_is_room

__all__ = ["OrchestratorClient", "check_job", "raise_unless_succeeded"]

LOOK_EVERY_S = 0.5


class OrchestratorClient:
    """Client of a cluster, to submit, watch and steer runs.

    Args:
        address: HOST:PORT of the cluster's head, or the URL of its Jobs API; None for RAY_ADDRESS, else the local
            cluster. A client by URL refuses `resume` and `logs`: use the commands of `orchestrator`.

    Raises:
        ClusterUnreachable: there is no cluster, or it doesn't answer.
        NotAllowed: the cluster refused the token.
    """

    def __init__(self, address: str | None = None) -> None:
        self._cluster = ClusterAccess(address)
        self.address = self._cluster.address

    def submit(
        self,
        job: JobSpec | str | os.PathLike[str],
        *,
        name: str | None = None,
        overrides: Sequence[str] = (),
        timeout_s: float | None = None,
        on_wait: Callable[[JobDoesNotFit], None] | None = None,
        **options: Any,
    ) -> str:
        """Queue a run of a job or job file. It starts once the cluster has room for `workers.min`. Relative paths in
        the job are resolved against the current directory.

        By URL, `job` must be a file in the current directory, which is sent with it, and `on_wait` is ignored.

        Args:
            name: overrides the job's name.
            overrides: `KEY=VALUE`: a dotted key, and YAML, or plain text where the key's value is text. Each overrides
                a key of the job file.
            timeout_s: don't queue the run: submit nothing if there is no room within this time.
            on_wait: called each second with what is missing, while there is no room and `timeout_s` is set.
            options: passed on to `Scheduler.submit`.

        Returns:
            the run's id, which is its name.

        Raises:
            SpecError: the file has mistakes.
            DataError: the corpus doesn't exist.
            EntrypointError: the job's own model can't be trained.
            NameTaken: the storage or the cluster has a run of this name.
            JobDoesNotFit: the cluster is too small for `workers.min`, or had no room within `timeout_s`.
        """
        if self._cluster.port is not None:
            return submit_file(self._cluster.port, job, name, overrides, timeout_s)
        order = order_of(job, name, overrides)
        args = (order.job_json, order.spec.name, order.run_dir, order.text)
        key = None if order.spec.signing_key is None else read_key(order.spec.signing_key)
        start = partial(self._cluster.ask, Scheduler.submit, *args, key=key, code=order.code, **options)
        return when_there_is_room(start, timeout_s, on_wait)

    def list(self) -> tuple[RunStatus, ...]:
        """Every run that the cluster knows, the newest last."""
        return self._cluster.ask(Scheduler.list)

    def get(self, run_id: str) -> RunStatus:
        """The run's current status. Raises NotFound, with the nearest names."""
        return self._cluster.ask(Scheduler.status, run_id)

    def scale(self, run_id: str, workers: int | None) -> DesiredRunState:
        """Request another number of workers; None returns the decision to the job's `autoscale`. Returns at once;
        the run rescales at its next fence.

        Raises:
            UsageError: outside min..max of the job, its autoscale.policy is manual, or the run has ended.
            NotFound: there is no such run.
        """
        return self._cluster.ask(Scheduler.scale, run_id, workers)

    def stage(self, run_id: str, name: str) -> DesiredRunState:
        """Request another stage of the run's curriculum, or the `next` one. Returns at once; the stage begins some
        steps later, at the same step on all workers.

        Raises:
            UsageError: the job has no stage of that name, or the run has ended.
            NotFound: there is no such run.
        """
        return self._cluster.ask(Scheduler.stage, run_id, name)

    def set_priority(self, run_id: str, priority: int) -> int:
        """Give an active run another priority than its job has, which it keeps when it is resumed. Returns the priority
        once it is journalled.

        Raises:
            UsageError: a job can't have this priority, or the run has ended.
            NotFound: there is no such run.
        """
        return self._cluster.ask(Scheduler.set_priority, run_id, priority)

    def kill_worker(self, run_id: str, rank: int | None = None) -> str:
        """Kill the process of one member, by default the highest rank, to test recovery.

        Returns:
            the worker's id.

        Raises:
            UsageError: no member has this rank now, or the run has ended.
            NotFound: there is no such run.
        """
        return self._cluster.ask(Scheduler.kill_worker, run_id, rank)

    def checkpoint(self, run_id: str) -> DesiredRunState:
        """Request a checkpoint besides those of the job's `checkpoint.every`. Returns at once. The checkpoint will be
        of the step in the result's field `checkpoint`, or of a later one, and is complete once the status shows it.

        Raises:
            UsageError: the run has ended, or finished no step yet.
            NotFound: there is no such run.
        """
        return self._cluster.ask(Scheduler.checkpoint, run_id)

    def rebalance(self, run_id: str) -> DesiredRunState:
        """Request that the run's experts are placed on its workers by the tokens that they got lately. Returns at once;
        an event of kind `experts_rebalanced` or `experts_kept` follows.

        Raises:
            UsageError: the run isn't training, has one worker or no experts, or has ended.
            NotFound: there is no such run.
        """
        return self._cluster.ask(Scheduler.rebalance, run_id)

    def set_experts(self, run_id: str, request: ExpertRequest) -> DesiredRunState:
        """Request another number of experts in each MoE layer of a run that trains. Returns at once; an event of kind
        `experts_changed` or `experts_unchanged` follows.

        Args:
            request: `number` is set by the run.

        Raises:
            UsageError: the run isn't training, its model can't have this number, or a later entry of its schedule
                couldn't follow.
            NotFound: there is no such run.
        """
        return self._cluster.ask(Scheduler.set_experts, run_id, request)

    def stop(self, run_id: str, *, now: bool = False) -> DesiredRunState:
        """Request an early end with a checkpoint. Raises UsageError if the run has ended, NotFound.

        Args:
            now: end it without a checkpoint; steps after its newest one are lost.
        """
        return self._cluster.ask(Scheduler.stop, run_id, "stopped", now)

    def pause(self, run_id: str) -> DesiredRunState:
        """Request a checkpoint and the release of the run's resources; `resume` continues it. Raises as `stop`."""
        return self._cluster.ask(Scheduler.pause, run_id)

    def remove(self, run_id: str, *, tracking: bool = False) -> str:
        """Remove the files of a run that has ended, and the run from the cluster's list. Returns the directory it had.

        Args:
            tracking: delete its MLflow run, too; that happens first.

        Raises:
            UsageError: the run has not ended.
            NotFound: there is no such run.
            StorageError: its files can't be removed.
            OrchestratorError: MLflow does not answer; the files stay.
        """
        return self._cluster.ask(Scheduler.remove, run_id, tracking)

    def resume(
        self,
        run_id: str,
        *,
        storage: str | os.PathLike[str] | None = None,
        step: int | None = None,
        workers: int | None = None,
        reset_residuals: bool = False,
        take_over: bool = False,
        signing_key: str | None = None,
        new_code: bool = False,
        timeout_s: float | None = None,
        on_wait: Callable[[JobDoesNotFit], None] | None = None,
        **options: Any,
    ) -> str:
        """Resume a run from a checkpoint: after its end, or in a new cluster. It keeps its name and its MLflow run.

        Steps after the checkpoint are repeated; later checkpoints are set aside, not deleted.

        Args:
            storage: run storage with the run; None for the directory that this cluster knows, else ./runs.
            step: of the checkpoint; None for the newest. Without any checkpoint the run starts from the beginning.
            workers: number of workers; None for the number requested last.
            reset_residuals: discard gradients that compression has not sent yet; without compression there are none.
            take_over: resume the run even if it may be active in another cluster, which then ends its workers of it.
            signing_key: key that its records are signed with: `auto`, `file:PATH` or `env:NAME`, as in a job; None for
                the one that this cluster or this machine's user has.
            new_code: use the present code on this machine, instead of the code that was submitted.
            timeout_s: don't queue the run: resume nothing if there is no room within this time.

        Raises:
            EntrypointError: the new code can't be trained.
            NotFound: there is no such run, or no checkpoint of this step.
            CheckpointCorrupt: files of the checkpoint are missing or changed; the message names the one before.
            UsageError: the run is active, here or perhaps in another cluster, has done all its steps, may not have
                so many workers, or was compressed otherwise; or its job's file was changed.
            KeyUnknown: its records are signed with another key.
            JournalCorrupt: its records were changed, or aren't signed though the run has a key.
            JobDoesNotFit: the cluster is too small for it, or had no room within `timeout_s`.
        """
        refuse_by_url(self._cluster.port, "resume")
        run_dir = find_run_dir(run_id, storage, self.get)
        key = key_to_resume(run_dir, signing_key)
        code, packages = code_of_now(run_dir, key) if new_code else (None, {})
        order = resume_request(run_dir, key, step, workers, reset_residuals, code)
        how = {"take_over": take_over, "key": key, "code": packages, **options}
        start = partial(self._cluster.ask, Scheduler.resume, run_id, str(run_dir), order, **how)
        return when_there_is_room(start, timeout_s, on_wait)

    def wait(
        self, run_id: str, *, timeout_s: float | None = None, on_status: Callable[[RunStatus], None] | None = None
    ) -> RunStatus:
        """Wait until the run has ended and return its status. `on_status` is called with every status polled.

        Raises:
            NotFinished: the run has not ended within `timeout_s`. It continues.
        """
        return until_ended(partial(self.get, run_id), timeout_s, on_status)

    def events(self, run_id: str, *, after: int = -1, follow: bool = False) -> Iterator[dict[str, Any]]:
        """The run's events after the one whose `seq` is `after`; with `follow` until the run has ended.

        Each has `seq`, `time` (`time.time()` seconds), `kind`, and fields of its kind. The first raises NotFound.
        """
        while True:
            last_look = not follow or self.get(run_id).phase.ended  # asked first, to yield all events before the end
            for event in self._cluster.ask(Scheduler.events, run_id, after):
                after = event["seq"]
                yield event
            if last_look:
                return
            time.sleep(LOOK_EVERY_S)

    def audit(self, run_id: str) -> AuditResult:
        """Check from the run's ledger that every sample position was consumed exactly once, in order."""
        return self._cluster.ask(Scheduler.audit, run_id)

    def logs(self, run_id: str, *, follow: bool = False) -> Iterator[LogLine]:
        """Log lines of all the run's processes, merged by time; with `follow` until the run has ended."""
        refuse_by_url(self._cluster.port, "logs")
        files = RunFiles(location_of(self.get(run_id).run_dir))
        return files.logs((lambda: self.get(run_id).phase.ended) if follow else None)

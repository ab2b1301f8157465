"""The Python API, which the CLI uses too.

    from orchestrator.client import OrchestratorClient

    client = OrchestratorClient()                       # RAY_ADDRESS, else the cluster of `orchestrator cluster up`
    run_id = client.submit("jobs/quickstart.yaml")
    client.scale(run_id, workers=3)
    print(client.wait(run_id).validation_loss)

A client talks to the cluster's Scheduler through Ray, or through the HTTP port of its Jobs API, where each question is
a job of some seconds. Everything that passes between them is a plain value, and all calls go through
`OrchestratorClient._ask`, which knows both ways.
"""

import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from orchestrator.checkpoint.read import choose, read_manifest
from orchestrator.cluster.connection import connect, probe
from orchestrator.cluster.jobs_api import JobsApiClient, is_url
from orchestrator.cluster.remote import Remote
from orchestrator.errors import JobDoesNotFit, NotFinished, NotFound, RunCancelled, RunFailed
from orchestrator.protocol.messages import DesiredRunState, Restore, ResumeRequest
from orchestrator.protocol.status import RunPhase, RunStatus
from orchestrator.run_records.run_files import LogLine, RunFiles, run_dir_in
from orchestrator.sampling.sample_ledger import AuditResult
from orchestrator.scheduler.scheduler import Scheduler, get_or_create_scheduler
from orchestrator.spec.job import JobSpec
from orchestrator.submission.by_url import ask_by_url, refuse_by_url, submit_file
from orchestrator.submission.submission import order_of

__all__ = ["OrchestratorClient", "check_job", "raise_unless_succeeded"]

LOOK_EVERY_S = 0.5
RETRY_EVERY_S = 1.0
HEAD_PATIENCE_S = 5.0  # a head that is gone for longer is not waited for
ANSWER_TIMEOUT_S = 60.0  # the first call may wait for the Scheduler's process to start


P = ParamSpec("P")
R = TypeVar("R")


class OrchestratorClient:
    """Submit runs to a cluster, watch and steer them.

    Args:
        address: HOST:PORT of the cluster's head, or the URL of its Jobs API; None for RAY_ADDRESS, else the local
            cluster. By URL, `resume` and `logs` are refused: they are commands of `orchestrator` only.

    Raises:
        ClusterUnreachable: there is none, or it doesn't answer.
        NotAllowed: it refused our token.
    """

    def __init__(self, address: str | None = None) -> None:
        named = address or os.environ.get("RAY_ADDRESS")
        self._port = JobsApiClient(str(named)) if is_url(named) else None
        self.address = connect(address) if self._port is None else self._port.url
        self._scheduler = get_or_create_scheduler() if self._port is None else None

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
        """Put a run of a job, or of a job file, into the queue: it starts when the cluster has room for its least.
        Paths in it are taken from the current directory.

        By URL it must be a job file in the current directory, which is sent along; `timeout_s` has no meaning then.

        Args:
            name: the run's name, in place of the job's.
            overrides: of a job file, each `KEY=VALUE`, a dotted key and YAML, in place of what the file says.
            timeout_s: don't leave it in the queue: if there is no room within so long, submit nothing.
            on_wait: called once with what is missing, if there is no room now and a `timeout_s`.
            options: passed on to `Scheduler.submit`.

        Returns:
            the run's id: its name.

        Raises:
            SpecError: the file has mistakes.
            DataError: there is no such corpus.
            EntrypointError: the job's own model can't be trained.
            NameTaken: the storage or the cluster has a run of this name.
            JobDoesNotFit: the cluster is too small for `workers.min`, or has had no room for `timeout_s`.
        """
        if self._port is not None:
            return submit_file(self._port, job, name, overrides)
        order = order_of(job, name, overrides)
        args = (order.job_json, order.spec.name, order.run_dir, order.text)
        start = partial(self._ask, Scheduler.submit, *args, **options)
        return _when_there_is_room(start, timeout_s, on_wait)

    def list(self) -> tuple[RunStatus, ...]:
        """Every run that the cluster has seen, the newest last."""
        return self._ask(Scheduler.list)

    def get(self, run_id: str) -> RunStatus:
        """The run as it is now. Raises NotFound, with the nearest names."""
        return self._ask(Scheduler.status, run_id)

    def scale(self, run_id: str, workers: int | None) -> DesiredRunState:
        """Ask for another number of workers; None leaves the number to the job's `autoscale` again. Returns at once;
        the run changes at its next fence.

        Raises:
            UsageError: outside min..max of the job, its autoscale.policy is manual, or the run has ended.
            NotFound: there is no such run.
        """
        return self._ask(Scheduler.scale, run_id, workers)

    def stage(self, run_id: str, name: str) -> DesiredRunState:
        """Ask for another stage of the run's curriculum, or the `next` one. Returns at once; it begins some steps
        later, on all workers at the same one.

        Raises:
            UsageError: the job has no stage of that name, or the run has ended.
            NotFound: there is no such run.
        """
        return self._ask(Scheduler.stage, run_id, name)

    def kill_worker(self, run_id: str, rank: int | None = None) -> str:
        """Kill the process of one member, the highest rank unless named, to see the run survive it.

        Returns:
            the worker's id.

        Raises:
            UsageError: nobody has this rank now, or the run has ended.
            NotFound: there is no such run.
        """
        return self._ask(Scheduler.kill_worker, run_id, rank)

    def cancel(self, run_id: str) -> DesiredRunState:
        """Ask the run to end early, with a checkpoint. Raises UsageError if it has ended, NotFound."""
        return self._ask(Scheduler.cancel, run_id)

    def pause(self, run_id: str) -> DesiredRunState:
        """Ask the run to write a checkpoint and free its resources; `resume` lets it go on. Raises as `cancel`."""
        return self._ask(Scheduler.pause, run_id)

    def resume(
        self,
        run_id: str,
        *,
        storage: str | os.PathLike[str] | None = None,
        from_step: int | None = None,
        workers: int | None = None,
        reset_residuals: bool = False,
        timeout_s: float | None = None,
        on_wait: Callable[[JobDoesNotFit], None] | None = None,
        **options: Any,
    ) -> str:
        """Let a run go on from a checkpoint: after its end, or in a new cluster. It keeps its name and its MLflow run.

        Steps after the checkpoint are done again; checkpoints after it are set aside, not deleted.

        Args:
            storage: run storage with the run; None for where this cluster knows it to be, else ./runs.
            from_step: of the checkpoint; None for the newest. Without any checkpoint the run begins again.
            workers: how many; None for as many as were wanted last.
            reset_residuals: leave what compression of gradients had not sent yet; without compression there is none.
            timeout_s: don't leave it in the queue: if there is no room within so long, resume nothing.

        Raises:
            NotFound: there is no such run, or no checkpoint of this step.
            CheckpointCorrupt: the checkpoint isn't as it was written; the message names the one before.
            UsageError: the run goes on, has done all its steps, may not have so many workers, or compresses otherwise.
            JobDoesNotFit: the cluster is too small for it, or has had no room for `timeout_s`.
        """
        refuse_by_url(self._port, "resume")
        run_dir = self._run_dir(run_id, storage)
        path = choose(run_dir / "checkpoints", from_step)
        restore = Restore(read_manifest(path).step, str(path), reset_residuals) if path is not None else None
        order = ResumeRequest(uuid.uuid4().hex, restore, workers)
        start = partial(self._ask, Scheduler.resume, run_id, str(run_dir), order, **options)
        return _when_there_is_room(start, timeout_s, on_wait)

    def wait(
        self, run_id: str, *, timeout_s: float | None = None, on_status: Callable[[RunStatus], None] | None = None
    ) -> RunStatus:
        """Wait for the run's end, however it ends, and return how. `on_status` is called with every look at it.

        Raises:
            NotFinished: not within `timeout_s`. The run goes on.
        """
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            status = self.get(run_id)
            if on_status is not None:
                on_status(status)
            if status.phase.ended:
                return status
            if deadline_s is not None and time.monotonic() > deadline_s:
                raise NotFinished(f"run {run_id} is {status.phase} after {timeout_s:g} s of waiting: {status.why}")
            time.sleep(LOOK_EVERY_S)

    def events(self, run_id: str, *, after: int = -1, follow: bool = False) -> Iterator[dict[str, Any]]:
        """What happened to the run, after the event whose `seq` is `after`; with `follow` until the run has ended.

        Each has `seq`, `time` (`time.time()` seconds), `kind`, and fields of its kind. Raises NotFound at the first.
        """
        while True:
            last_look = not follow or self.get(run_id).phase.ended  # asked first: what precedes the end is told
            for event in self._ask(Scheduler.events, run_id, after):
                after = event["seq"]
                yield event
            if last_look:
                return
            time.sleep(LOOK_EVERY_S)

    def audit(self, run_id: str) -> AuditResult:
        """Whether every sample position was consumed exactly once, in order, from the run's ledger."""
        return self._ask(Scheduler.audit, run_id)

    def logs(self, run_id: str, *, follow: bool = False) -> Iterator[LogLine]:
        """Log lines of all the run's processes, merged by time; with `follow` until the run has ended."""
        refuse_by_url(self._port, "logs")
        files = RunFiles(Path(self.get(run_id).run_dir))
        return files.logs((lambda: self.get(run_id).phase.ended) if follow else None)

    def _run_dir(self, run_id: str, storage: str | os.PathLike[str] | None) -> Path:
        if storage is not None:
            return RunFiles(run_dir_in(Path(storage), run_id)).run_dir
        try:
            return Path(self.get(run_id).run_dir)
        except NotFound as error:
            try:
                return RunFiles(run_dir_in(Path("runs"), run_id)).run_dir
            except NotFound:
                error.remedy += " A run of another cluster is found by its run storage: --storage DIR."
                raise error from None

    def _ask(self, method: Callable[Concatenate[Scheduler, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        if self._port is not None:
            answer: R = ask_by_url(self._port, method.__name__, *args)
            return answer
        probe(self.address, patience_s=HEAD_PATIENCE_S)
        return Remote[Scheduler](self._scheduler, timeout_s=ANSWER_TIMEOUT_S).ask(method, *args, **kwargs)


def _when_there_is_room(
    start: Callable[..., str], timeout_s: float | None, on_wait: Callable[[JobDoesNotFit], None] | None
) -> str:
    """What `start` returns: at once if the run may wait in the queue, which is without a `timeout_s`, else once there
    is room. Raises JobDoesNotFit."""
    if timeout_s is None:
        return start()
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            return start(wait=False)
        except JobDoesNotFit as error:
            if time.monotonic() + RETRY_EVERY_S > deadline_s:
                raise
            if on_wait is not None:
                on_wait(error)
                on_wait = None
        time.sleep(RETRY_EVERY_S)


def check_job(job: JobSpec | str | os.PathLike[str], name: str | None = None, overrides: Sequence[str] = ()) -> JobSpec:
    """The job, if it could be submitted as far as is known without a cluster. Raises what `submit` raises."""
    return order_of(job, name, overrides).spec


def raise_unless_succeeded(status: RunStatus) -> None:
    """The end of a run as an exception.

    Raises:
        RunFailed, RunCancelled: it ended so.
        NotFinished: it goes on.
    """
    if status.phase is RunPhase.FAILED:
        raise RunFailed(
            f"run {status.run_id} failed: {status.error or status.why}",
            traceback=status.traceback or "",
            remedy=f"`orchestrator logs {status.run_id}` shows what its processes said.",
            unchanged=f"Its newest checkpoint is {status.checkpoint}." if status.checkpoint else "",
        )
    if status.phase is RunPhase.CANCELLED:
        raise RunCancelled(f"run {status.run_id} was cancelled: {status.why}")
    if status.phase is RunPhase.PAUSED:
        raise NotFinished(
            f"run {status.run_id} is paused: {status.why}",
            remedy=f"`orchestrator resume {status.run_id}` lets it go on.",
        )
    if status.phase is not RunPhase.SUCCEEDED:
        raise NotFinished(f"run {status.run_id} is {status.phase}: {status.why}")

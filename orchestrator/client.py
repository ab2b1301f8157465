"""The Python API, which the CLI uses too.

    from orchestrator.client import OrchestratorClient

    client = OrchestratorClient()                       # RAY_ADDRESS, else the cluster of `orchestrator cluster up`
    run_id = client.submit("jobs/quickstart.yaml")
    client.scale(run_id, workers=3)
    print(client.wait(run_id).validation_loss)

A client talks to the cluster's Scheduler through Ray. Everything that passes between them is a plain value, and all
calls go through `OrchestratorClient._ask`: a client that reaches the cluster another way replaces that one method.
"""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from orchestrator.control.calls import ask
from orchestrator.control.connection import connect, probe
from orchestrator.control.run_files import LogLine, RunFiles
from orchestrator.control.scheduler import get_or_create_scheduler
from orchestrator.errors import DataError, JobDoesNotFit, NameTaken, NotFinished, RunCancelled, RunFailed, UsageError
from orchestrator.protocol.messages import Target
from orchestrator.protocol.status import RunPhase, RunStatus
from orchestrator.sampling.ledger import AuditResult, audit
from orchestrator.spec.job import JobSpec
from orchestrator.spec.loading import load_job

__all__ = ["OrchestratorClient", "check_job", "raise_unless_succeeded"]

LOOK_EVERY_S = 0.5
RETRY_EVERY_S = 1.0
HEAD_PATIENCE_S = 5.0  # a head that is gone for longer is not waited for
ANSWER_TIMEOUT_S = 60.0  # the first call may wait for the Scheduler's process to start


class OrchestratorClient:
    """Submit runs to a cluster, watch and steer them.

    Args:
        address: HOST:PORT of the cluster's head; None for RAY_ADDRESS, else the local cluster.

    Raises:
        ClusterUnreachable: there is none, or it doesn't answer.
        NotAllowed: it refused our token.
    """

    def __init__(self, address: str | None = None) -> None:
        self.address = connect(address)
        self._scheduler = get_or_create_scheduler()

    def submit(
        self,
        job: JobSpec | str | os.PathLike[str],
        *,
        name: str | None = None,
        timeout_s: float = 0.0,
        on_wait: Callable[[JobDoesNotFit], None] | None = None,
        **options: Any,
    ) -> str:
        """Start a run of a job, or of a job file. Paths in it are taken from the current directory.

        Args:
            name: the run's name, in place of the job's.
            timeout_s: how long to wait for room in the cluster, if it has none now.
            on_wait: called once with what is missing, if it has none now and is waited for.
            options: passed on to `Scheduler.submit`.

        Returns:
            the run's id: its name.

        Raises:
            SpecError: the file has mistakes.
            DataError: there is no such corpus.
            NameTaken: the storage or the cluster has a run of this name.
            JobDoesNotFit: the cluster has no room for the first workers, for `timeout_s`.
        """
        order = _order(job, name)
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                return str(self._ask("submit", order.job_json, order.spec.name, order.run_dir, order.text, **options))
            except JobDoesNotFit as error:
                if time.monotonic() + RETRY_EVERY_S > deadline_s:
                    raise
                if on_wait is not None:
                    on_wait(error)
                    on_wait = None
            time.sleep(RETRY_EVERY_S)

    def list(self) -> tuple[RunStatus, ...]:
        """Every run that the cluster has seen, the newest last."""
        found: tuple[RunStatus, ...] = self._ask("list")
        return found

    def status(self, run_id: str) -> RunStatus:
        """The run as it is now. Raises NotFound."""
        found: RunStatus = self._ask("status", run_id)
        return found

    def scale(self, run_id: str, workers: int) -> Target:
        """Ask for another number of workers. Returns at once; the run changes at its next fence.

        Raises:
            UsageError: outside min..max of the job, or the run has ended.
            NotFound: there is no such run.
        """
        target: Target = self._ask("scale", run_id, workers)
        return target

    def cancel(self, run_id: str) -> Target:
        """Ask the run to end early, with a checkpoint. Raises UsageError if it has ended, NotFound."""
        target: Target = self._ask("cancel", run_id)
        return target

    def wait(
        self, run_id: str, *, timeout_s: float | None = None, on_status: Callable[[RunStatus], None] | None = None
    ) -> RunStatus:
        """Wait for the run's end, however it ends, and return how. `on_status` is called with every look at it.

        Raises:
            NotFinished: not within `timeout_s`. The run goes on.
        """
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            status = self.status(run_id)
            if on_status is not None:
                on_status(status)
            if status.phase.ended:
                return status
            if deadline_s is not None and time.monotonic() > deadline_s:
                raise NotFinished(f"run {run_id} is {status.phase} after {timeout_s:g} s of waiting: {status.why}")
            time.sleep(LOOK_EVERY_S)

    def events(self, run_id: str, after: int = -1) -> tuple[dict[str, Any], ...]:
        """What happened to the run after the event whose `seq` is `after`. Raises NotFound."""
        events: tuple[dict[str, Any], ...] = self._ask("events", run_id, after)
        return events

    def audit(self, run_id: str) -> AuditResult:
        """Whether every sample position was consumed exactly once, in order, from the run's ledger."""
        return audit(self._ask("ledger", run_id))

    def logs(self, run_id: str, *, follow: bool = False) -> Iterator[LogLine]:
        """Log lines of all the run's processes, merged by time; with `follow` until the run has ended."""
        files = RunFiles(Path(self.status(run_id).run_dir))
        return files.logs((lambda: self.status(run_id).phase.ended) if follow else None)

    def _ask(self, method: str, *args: Any, **kwargs: Any) -> Any:
        probe(self.address, patience_s=HEAD_PATIENCE_S)
        return ask(self._scheduler, method, *args, timeout_s=ANSWER_TIMEOUT_S, **kwargs)


def check_job(job: JobSpec | str | os.PathLike[str], name: str | None = None) -> JobSpec:
    """The job, if it could be submitted as far as is known without a cluster. Raises what `submit` raises."""
    return _order(job, name).spec


def raise_unless_succeeded(status: RunStatus) -> None:
    """The end of a run as an exception.

    Raises:
        RunFailed, RunCancelled: it ended so.
        NotFinished: it goes on.
    """
    if status.phase is RunPhase.FAILED:
        raise RunFailed(
            f"run {status.run_id} failed: {status.error or status.why}",
            remedy=f"`orchestrator logs {status.run_id}` shows what its processes said.",
            unchanged=f"Its newest checkpoint is {status.checkpoint}." if status.checkpoint else "",
        )
    if status.phase is RunPhase.CANCELLED:
        raise RunCancelled(f"run {status.run_id} was cancelled: {status.why}")
    if status.phase is not RunPhase.SUCCEEDED:
        raise NotFinished(f"run {status.run_id} is {status.phase}: {status.why}")


@dataclass(frozen=True)
class _Order:
    """What the Scheduler needs: the job with every path absolute, and the text that the user wrote."""

    spec: JobSpec
    text: str

    @property
    def run_dir(self) -> str:
        return str(Path(self.spec.storage) / self.spec.name)

    @property
    def job_json(self) -> str:
        return self.spec.model_dump_json(by_alias=True)


def _order(job: JobSpec | str | os.PathLike[str], name: str | None) -> _Order:
    """Read and resolve a job; checked as far as is possible from here."""
    if isinstance(job, JobSpec):
        spec, text = job, yaml.safe_dump(job.model_dump(mode="json", by_alias=True), sort_keys=False)
    else:
        spec, text = load_job(job), Path(job).read_text(encoding="utf-8")
    if name is not None:
        spec = _renamed(spec, name)
    run_dir = spec.storage_path / spec.name
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise NameTaken(
            f"{run_dir} exists already; a run's name must be new in its storage",
            remedy="Choose another name (--name) or storage, or move that directory away.",
            unchanged="Nothing was started.",
        )
    source = _absolute_source(spec.data.source)
    data = spec.data.model_copy(update={"source": source})
    resolved = spec.model_copy(update={"storage": str(spec.storage_path), "data": data})
    return _Order(resolved, text)


def _renamed(spec: JobSpec, name: str) -> JobSpec:
    try:
        return JobSpec.model_validate(spec.model_dump(by_alias=True) | {"name": name})
    except ValidationError as error:
        raise UsageError(
            f"{name!r} can't be a run's name: {error.errors()[0]['msg']}", unchanged="Nothing was started."
        ) from error


def _absolute_source(source: str) -> str:
    if source.startswith("builtin:"):
        return source
    path = Path(source).expanduser().absolute()
    if not path.exists():
        wrong = "does not exist"
    elif path.is_dir():
        wrong = "" if any(path.rglob("*.txt")) else "holds no .txt file"
    else:
        wrong = "" if path.suffix == ".txt" else "is no .txt file"
    if wrong:
        raise DataError(
            f"data.source {path} {wrong}",
            remedy="Name a folder of .txt files, one such file, or builtin:stdlib.",
            unchanged="Nothing was started.",
        )
    return str(path)

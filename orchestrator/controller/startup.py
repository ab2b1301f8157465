"""Start of a controller: it takes the run's next term and continues from the journal. Retried until storage works."""

import os
import socket
import time
from dataclasses import dataclass

from orchestrator.policy.state.config import RunLimits
from orchestrator.policy.state.requests import queued, resumed
from orchestrator.protocol.events.base import Event
from orchestrator.protocol.events.run import Submitted
from orchestrator.protocol.messages import ResumeRequest
from orchestrator.run_records.final_status import drop_statuses
from orchestrator.run_records.job_files import JOB
from orchestrator.run_records.journaled_run import JournaledRun, open_journal, retry_until_written
from orchestrator.spec.job import JobSpec
from orchestrator.storage.backends.location import Location, objects_at
from orchestrator.storage.backends.log_target import LogTarget
from orchestrator.storage.caller import Caller, call_here
from orchestrator.storage.chain import Holder
from orchestrator.storage.objects import Objects
from orchestrator.storage.tasks import run_inline


@dataclass(frozen=True)
class OpenedRun:
    """A run as its new controller finds it."""

    run_id: str
    run_dir: Location
    job: JobSpec
    limits: RunLimits
    memory: JournaledRun
    cluster: str = ""  # its id
    caller: Caller = call_here  # makes the calls to run storage


def open_run(
    run_id: str,
    run_dir: Location,
    order: ResumeRequest | None,
    since_s: float | None,
    caller: Caller = call_here,
    kept: Objects | None = None,
    cluster: str = "",
) -> OpenedRun:
    """Take the next term, read the journal, and apply `order` unless an earlier incarnation has.

    Args:
        run_dir: the run's location, which contains `job.json`.
        order: request to resume from a checkpoint.
        since_s: `time.time()` when the run was requested and entered the queue; None for now.
        caller: makes the calls to run storage.
        kept: objects of the run in this cluster, where journal entries are kept that storage doesn't take; None:
            nowhere.
        cluster: id of this cluster.

    Raises:
        TermSuperseded: another cluster has taken the run over since it was requested here.
    """
    since_s = time.time() if since_s is None else since_s
    LogTarget(run_dir, "controller").open(caller)
    job = JobSpec.model_validate_json(retry_until_written(lambda: caller(objects_at(run_dir).get, JOB)))
    limits = RunLimits.of(run_id, job)
    holder = Holder(f"{socket.gethostname()} pid {os.getpid()}", cluster)
    takes_over = retry_until_written(lambda: order is not None and not _has_begun(kept, order))
    journal = retry_until_written(lambda: open_journal(run_dir, holder, caller, kept, takes_over))
    memory = retry_until_written(lambda: JournaledRun(run_dir, limits, journal, caller=caller))
    run = OpenedRun(run_id, run_dir, job, limits, memory, cluster, caller)
    if order is not None and kept is not None:
        kept.create(_begun_key(order), b"")
    if order is not None and order.token != memory.resumed_by:
        retry_until_written(lambda: _resume(run, order, since_s))
    elif Submitted not in memory.times:
        retry_until_written(lambda: run_inline(memory.decided(queued(memory.state, since_s), [])))
    return run


def _has_begun(kept: Objects | None, order: ResumeRequest) -> bool:
    """Whether an earlier incarnation has held a term for this order: if another cluster has one since, it is newer."""
    return kept is not None and _begun_key(order) in kept.names("")


def _begun_key(order: ResumeRequest) -> str:
    return f"resumed-{order.token}"


def _resume(run: OpenedRun, order: ResumeRequest, since_s: float) -> None:
    decision = resumed(run.limits, run.memory.state, order)
    events = [action for action in decision.actions if isinstance(action, Event)]
    run_inline(run.memory.decided(queued(decision.state, since_s), events))
    run.caller(drop_statuses, objects_at(run.run_dir))

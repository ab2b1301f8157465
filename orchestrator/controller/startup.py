"""Start of a controller: it takes the run's next term and continues from the journal. Retried until storage works."""

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from orchestrator.policy.state.config import RunLimits
from orchestrator.policy.state.requests import queued, resumed
from orchestrator.protocol.events.base import Event
from orchestrator.protocol.events.run import Submitted
from orchestrator.protocol.messages import ResumeRequest
from orchestrator.run_records.journaled_run import JournaledRun, open_journal, retry_until_written
from orchestrator.run_records.run_history import STATUS_FILE
from orchestrator.spec.job import JobSpec
from orchestrator.storage.caller import Caller, call_here
from orchestrator.storage.log_file import log_to
from orchestrator.storage.objects import Objects
from orchestrator.storage.tasks import run_inline


@dataclass(frozen=True)
class OpenedRun:
    """A run as its new controller finds it."""

    run_id: str
    run_dir: Path
    job: JobSpec
    limits: RunLimits
    memory: JournaledRun
    caller: Caller = call_here  # makes the calls to run storage


def open_run(
    run_id: str,
    run_dir: Path,
    order: ResumeRequest | None,
    since_s: float | None,
    caller: Caller = call_here,
    kept: Objects | None = None,
) -> OpenedRun:
    """Take the next term, read the journal, and apply `order` unless an earlier incarnation has.

    Args:
        run_dir: the run's directory in run storage, which contains `job.json`.
        order: request to resume from a checkpoint.
        since_s: `time.time()` when the run was requested and entered the queue; None for now.
        caller: makes the calls to run storage.
        kept: where journal entries are kept that storage doesn't take; None: nowhere.
    """
    since_s = time.time() if since_s is None else since_s
    log_to(run_dir / "logs" / "controller.log", caller)
    job = JobSpec.model_validate_json(retry_until_written(lambda: caller((run_dir / "job.json").read_text)))
    limits = RunLimits.of(run_id, job)
    holder = f"{socket.gethostname()} pid {os.getpid()}"
    journal = retry_until_written(lambda: open_journal(run_dir, holder, caller, kept))
    memory = retry_until_written(lambda: JournaledRun(run_dir, limits, journal, caller=caller))
    run = OpenedRun(run_id, run_dir, job, limits, memory, caller)
    if order is not None and order.token != memory.resumed_by:
        retry_until_written(lambda: _resume(run, order, since_s))
    elif Submitted not in memory.times:
        retry_until_written(lambda: run_inline(memory.decided(queued(memory.state, since_s), [])))
    return run


def _resume(run: OpenedRun, order: ResumeRequest, since_s: float) -> None:
    decision = resumed(run.limits, run.memory.state, order)
    events = [action for action in decision.actions if isinstance(action, Event)]
    run_inline(run.memory.decided(queued(decision.state, since_s), events))
    run.caller((run.run_dir / STATUS_FILE).unlink, missing_ok=True)  # of its previous end

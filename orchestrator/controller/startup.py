"""Start of a controller: it takes the run's next term and continues from the journal. Retried until storage works."""

import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from orchestrator.cluster.nodes import cores_of_nodes
from orchestrator.policy.cluster.capacity import threads_of
from orchestrator.policy.state.config import RunLimits
from orchestrator.policy.state.requests import queued, resumed
from orchestrator.protocol.events.base import Event
from orchestrator.protocol.events.run import Submitted
from orchestrator.protocol.messages import Restore, ResumeRequest
from orchestrator.run_records.checkpoints.search import newest_good
from orchestrator.run_records.final_status import note_resumed
from orchestrator.run_records.job_files import JOB, check_job
from orchestrator.run_records.journaled_run import JournaledRun, open_journal, retry_until_written
from orchestrator.spec.job import JobSpec
from orchestrator.storage.backends.location import Location, location_of, objects_at
from orchestrator.storage.backends.log_target import LogTarget
from orchestrator.storage.backends.signing_keys import run_objects
from orchestrator.storage.caller import Caller, call_here
from orchestrator.storage.chain import Holder
from orchestrator.storage.chain_reader import newest_holder, newest_term
from orchestrator.storage.compaction import delete_half_written
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
    job_sha256: str = ""  # of the job's file
    cluster: str = ""  # its id
    caller: Caller = call_here  # makes the calls to run storage that may take long


def open_run(
    run_id: str,
    run_dir: Location,
    order: ResumeRequest | None,
    since_s: float | None,
    caller: Caller = call_here,
    kept: Objects | None = None,
    cluster: str = "",
    bulk: Caller | None = None,
    job_sha256: str = "",
) -> OpenedRun:
    """Take the next term, read the journal, and apply `order` unless an earlier incarnation has.

    Args:
        run_dir: the run's location, which contains `job.json`.
        order: request to resume from a checkpoint.
        since_s: `time.time()` when the run was requested and entered the queue; None for now.
        caller: makes the calls to run storage, for the journal.
        kept: objects of the run in this cluster, where journal entries are kept that storage doesn't take; None:
            nowhere.
        cluster: id of this cluster.
        job_sha256: digest of the job's file, as it was submitted; empty if only the journal has it.
        bulk: makes the calls that may take long, such as those for log lines and checkpoints; None: `caller`.

    Raises:
        TermSuperseded: another cluster has taken the run over since it was requested here.
        KeyUnknown: so it has, with another key.
        JournalCorrupt: records are damaged, or aren't signed with the run's key.
        UsageError: the job's file isn't the one that was submitted.
    """
    since_s = time.time() if since_s is None else since_s
    LogTarget(run_dir, "controller").open(bulk or caller)
    job_json = retry_until_written(lambda: caller(objects_at(run_dir).get, JOB))
    job = JobSpec.model_validate_json(job_json)
    limits = RunLimits.of(run_id, job)
    holder = Holder(f"{socket.gethostname()} pid {os.getpid()}", cluster)
    objects = run_objects(run_dir, caller, names_key=job.signing_key is not None)
    before = retry_until_written(lambda: newest_holder(objects))
    followed = retry_until_written(lambda: _followed(objects, kept, order))
    journal = retry_until_written(lambda: open_journal(run_dir, holder, caller, kept, followed, objects))
    if isinstance(run_dir, Path):
        with suppress(OSError):  # the next term's controller tries again
            caller(delete_half_written, run_dir, journal.last.number)
    memory = retry_until_written(lambda: JournaledRun(run_dir, limits, journal, caller=caller, objects=objects))
    check_job(run_dir, job_json, memory.job_sha256 or job_sha256, objects)
    run = OpenedRun(run_id, run_dir, job, limits, memory, sha256(job_json).hexdigest(), cluster, bulk or caller)
    if order is not None and order.token != memory.resumed_by:
        _resume(run, order, since_s, had_elsewhere=before.cluster != cluster)
    elif Submitted not in memory.times:
        retry_until_written(lambda: run_inline(memory.decided(queued(memory.state, since_s), [])))
    if order is not None and memory.state.outcome is None:
        retry_until_written(lambda: note_resumed(objects, memory.term))
    return run if memory.code is None else replace(run, job=job.model_copy(update={"code": memory.code}))


def _followed(run: Objects, kept: Objects | None, order: ResumeRequest | None) -> int | None:
    """The newest term of another cluster that this controller may follow; None: any. The first one with an order takes
    the run from any cluster; later ones only from the cluster that had it then. Raises OSError."""
    if order is None:
        return 0
    if kept is None:
        return None
    is_first = order.token not in kept.names("resumed")
    found = kept.create(f"resumed/{order.token}", str(newest_term(run)).encode())
    return None if is_first else int(found)


def _resume(run: OpenedRun, order: ResumeRequest, since_s: float, had_elsewhere: bool) -> None:
    """Apply an order. `had_elsewhere`: another cluster had the run until now."""
    if had_elsewhere:
        order = replace(order, restore=retry_until_written(lambda: _newest(run, order)))
    decision = resumed(run.limits, run.memory.state, order)
    events = [action for action in decision.actions if isinstance(action, Event)]
    state = queued(decision.state, since_s)
    retry_until_written(lambda: run_inline(run.memory.decided(state, events)))


def _newest(run: OpenedRun, order: ResumeRequest) -> Restore | None:
    """The checkpoint to resume a run from that another cluster had: a newer good one than was chosen with the order, if
    that cluster has written any since, unless the user named one. Raises OSError while it can't be read."""
    current = run.memory.checkpoints.current
    chosen = location_of(order.restore.path).name if order.restore is not None else ""
    if order.is_named or not current or current[-1].name == chosen:
        return order.restore
    newest = run.caller(newest_good, run.run_dir, run.memory.checkpoints, reads_files=False)  # workers verify it
    if newest is None:
        return order.restore
    return replace(newest, reset_residuals=order.restore is not None and order.restore.reset_residuals)


def worker_threads(run: OpenedRun) -> int:
    """Torch threads per worker."""
    if run.job.train.is_exact:  # its results must not depend on the cluster's nodes
        return max(1, int(run.job.resources.cpus))
    return threads_of(cores_of_nodes(run.job.workers.label_selector), run.limits.initial_workers)

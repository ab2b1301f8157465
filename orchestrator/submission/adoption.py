"""Adoption of a run's records by another key: after its key was lost, changed hands, or before it had one.

What is there is believed from then on, so all that the run goes on from is read first: its journal, its job, and the
newest checkpoint.
"""

from dataclasses import dataclass

from orchestrator.errors import NotFound, UsageError
from orchestrator.policy.state.config import RunLimits
from orchestrator.run_records.checkpoints.search import choose
from orchestrator.run_records.final_status import has_ended, status_keys
from orchestrator.run_records.job_files import JOB, read_job
from orchestrator.run_records.run_history import RunHistory
from orchestrator.storage.backends.location import Location, objects_at
from orchestrator.storage.backends.signed_objects import SignedObjects, SigningKey, adopt, digests_of
from orchestrator.storage.journal_age import LIVELY_S, journal_age_s


@dataclass(frozen=True)
class Adopted:
    """Records that count as signed with another key.

    Args:
        num_objects: of the journal, and final statuses.
        key_id: of the key.
        checkpoint: the newest one, or the one that was named; None without any.
    """

    num_objects: int
    key_id: str
    checkpoint: Location | None


def adopt_records(run_dir: Location, key: SigningKey, step: int | None = None) -> Adopted:
    """Let the records of a run count as signed with `key`, once they and a checkpoint are read and whole.

    Args:
        step: of the checkpoint; None for the newest.

    Raises:
        UsageError: the run may be going on, or its job's file isn't the one that was submitted.
        NotFound: there is no such run, or no checkpoint of this step.
        JournalCorrupt, CheckpointCorrupt: records or files are damaged.
        OSError: run storage can't be read or written.
    """
    objects = objects_at(run_dir)
    age_s = journal_age_s(objects)
    if age_s == float("inf"):
        raise NotFound(f"{run_dir} holds no journal of a run", remedy="Name its run storage: --storage DIR|URL.")
    if not has_ended(run_dir) and age_s < LIVELY_S:
        raise UsageError(
            f"run {run_dir.name} may be active: its journal was written {age_s:.0f} s ago",
            remedy=f"Stop or pause it first, or wait until its journal is {LIVELY_S:.0f} s old.",
            unchanged="Nothing was adopted.",
        )
    digests = digests_of(objects, [JOB, *status_keys(objects)])
    records = SignedObjects(objects, run_dir.name, key, adopted=digests)
    history = RunHistory(run_dir, RunLimits.of(run_dir.name, read_job(run_dir)), objects=records)
    read_job(run_dir, history.job_sha256, records)
    checkpoint = choose(run_dir, history.checkpoints, step)
    adopt(objects, run_dir.name, key, digests)
    return Adopted(len(digests), key.id, checkpoint)

"""Replay of committed steps at another world size, on this machine, to compare bits.

    order = what_to_verify("demo", run_dir)
    for record in done_again(order): ...

Needs run storage, no cluster. The run is only read, and may be active meanwhile.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.elastic.expert_change import ExpertChange
from orchestrator.errors import NotFinished, UsageError
from orchestrator.policy.replay_check import Differences
from orchestrator.policy.state.run_state import StateDecided
from orchestrator.protocol.child_process import Numerics
from orchestrator.protocol.events.base import JournalEntry
from orchestrator.protocol.events.notices import NumericsDiffer, NumericsRecorded
from orchestrator.protocol.events.training import StageDecided
from orchestrator.protocol.replay_task import PastWorld
from orchestrator.protocol.step_record import StepRecord
from orchestrator.run_records.prepared_data import PreparedData
from orchestrator.run_records.run_files import RunFiles
from orchestrator.run_records.run_history import committed_steps
from orchestrator.spec.job import JobSpec
from orchestrator.storage.backends.location import Location
from orchestrator.submission.model_process import data_of


@dataclass(frozen=True)
class Verification:
    """Steps to replay.

    Args:
        records: of the steps, as the run did them.
        worlds: that did them.
        workers: world size of the replay.
        checkpoint: before the first of the steps; None for the beginning.
        change: of the number of experts, with which the first step begins.
        numerics: fingerprint of the run's first worker, on which the bits depend; None where that isn't known.
        differing: workers of `worlds` whose numerics differ from that one's, and in what.
    """

    run_id: str
    run_dir: Location
    job: JobSpec
    records: tuple[StepRecord, ...]
    worlds: tuple[PastWorld, ...]
    workers: int
    checkpoint: Location | None
    data: PreparedData
    numerics: Mapping[str, Any] | None
    differing: Mapping[str, Differences]
    change: ExpertChange | None = None


def what_to_verify(
    run_id: str, run_dir: Location, after: int | None = None, steps: int = 20, workers: int | None = None
) -> Verification:
    """Choose at most `steps` steps after a checkpoint.

    Args:
        after: the checkpoint's step, -1 for the run's beginning; None for the newest checkpoint with steps after it, or
            else the beginning.
        workers: None for another world size than those of the steps.

    Raises:
        UsageError: training is not exact, or there are no such steps.
        NotFound: there is no such checkpoint.
        CheckpointCorrupt: its files are missing or changed.
        DataError: the token store is gone.
    """
    files = RunFiles(run_dir)
    job = files.job()
    if not job.train.is_exact:
        raise UsageError(
            f"train.determinism of run {run_id} is {job.train.determinism}: repeating its steps may give other bits",
            remedy="Verify runs of jobs with train.determinism: exact.",
        )
    entries = files.entries()
    committed = committed_steps(entries)
    if not committed:
        raise NotFinished(f"run {run_id} has no committed step yet", remedy="Verify it once it has trained.")
    newest = committed[-1].step
    if after is None:
        after = max((record.step for record in files.checkpoints() if record.step < newest), default=-1)
    elif after >= newest:
        raise UsageError(f"run {run_id} has no step after {after}; its newest committed one is {newest}")
    checkpoint = files.choose_checkpoint(after) if after >= 0 else None
    decided = [e.event.first_step for e in entries if isinstance(e.event, StageDecided) and e.event.first_step > after]
    last = min([after + steps, *(first_step - 1 for first_step in decided)])
    records = tuple(record for record in committed if after < record.step <= last)
    worlds = past_worlds(entries, records)
    if other := [past.first_step for past in worlds if not _alike(past, worlds[0])]:
        records = tuple(record for record in records if record.step < other[0])
        worlds = past_worlds(entries, records)
    if not records:
        raise UsageError(
            f"step {after + 1} of run {run_id} began a stage of its curriculum by a request, which its checkpoint of "
            f"step {after} doesn't know of",
            remedy="Name another checkpoint: --step STEP.",
        )
    sizes = {record.world_size for record in records}
    return Verification(
        run_id=run_id,
        run_dir=run_dir,
        job=job,
        records=records,
        worlds=worlds,
        workers=workers or next(size for size in (1, 2, 3) if size not in sizes or sizes >= {1, 2, 3}),
        checkpoint=checkpoint,
        data=data_of(run_id, run_dir),
        numerics=next((e.event.fingerprint for e in entries if isinstance(e.event, NumericsRecorded)), None),
        differing=differing_workers(entries, worlds),
        change=_change_at(entries, records[0].step),
    )


def _alike(one: PastWorld, other: PastWorld) -> bool:
    """Whether one replay can do the steps of both: micro-batches change after an out-of-memory failure, the number of
    experts by request and by schedule."""
    sizes = ((past.micro_batch, past.placement.num_experts, past.families) for past in (one, other))
    return next(sizes) == next(sizes)


def differing_workers(entries: Sequence[JournalEntry], worlds: Sequence[PastWorld]) -> dict[str, Differences]:
    """Workers of these worlds whose numerics differed from the run's first worker's."""
    members = {worker for past in worlds for worker in past.world.members}
    differing = (entry.event for entry in entries if isinstance(entry.event, NumericsDiffer))
    return {event.worker: event.differs for event in differing if event.worker in members}


def _change_at(entries: Sequence[JournalEntry], step: int) -> ExpertChange | None:
    """The change of the number of experts with which a step begins, if it is one."""
    states = [entry.event.state for entry in entries if isinstance(entry.event, StateDecided)]
    return states[-1].experts.at(step) if states else None


def past_worlds(entries: Sequence[JournalEntry], records: Sequence[StepRecord]) -> tuple[PastWorld, ...]:
    """The worlds that did these steps, from the decisions in the journal."""
    decisions = (entry.event.state.current for entry in entries if isinstance(entry.event, StateDecided))
    plans = {plan.generation: plan for plan in decisions if plan is not None}
    worlds: list[PastWorld] = []
    for record in records:
        if not worlds or worlds[-1].world.generation != record.generation:
            plan = plans[record.generation]
            worlds.append(PastWorld(record.step, plan.world, plan.placement, plan.micro_batch, plan.families))
    return tuple(worlds)


def numerics_here(numerics: Numerics) -> dict[str, Any]:
    """A fingerprint in the journal's form."""
    found: dict[str, Any] = json.loads(numerics.fingerprint)
    return found

"""Position of a run's callbacks in its journal, with their states: what a replaced process goes on from."""

import json
from dataclasses import dataclass
from typing import Any

from orchestrator.callback import Json, Step
from orchestrator.protocol.events.run import Resumed
from orchestrator.protocol.events.training import StepsCommitted
from orchestrator.protocol.step_record import StepRecord
from orchestrator.run_records.run_history import read_entries
from orchestrator.storage.backends.location import location_of, objects_at

FOLDER = "callbacks"


@dataclass(frozen=True)
class Position:
    """The newest event of the journal, and the newest step, that the callbacks have had; -1 before any.

    `states` are theirs after that step, by entrypoint.
    """

    seq: int = -1
    step: int = -1
    states: tuple[tuple[str, dict[str, Json]], ...] = ()


def read_position(run_dir: str) -> Position:
    """The newest one that was stored. Raises OSError."""
    objects = objects_at(location_of(run_dir))
    names = objects.names(FOLDER)
    if not names:
        return Position()
    found: dict[str, Any] = json.loads(objects.get(f"{FOLDER}/{names[-1]}"))
    return Position(found["seq"], found["step"], tuple((name, state) for name, state in found["states"]))


def store_position(run_dir: str, position: Position) -> None:
    """Store it, and remove older ones. Raises OSError."""
    objects = objects_at(location_of(run_dir))
    name = f"{position.seq:010d}"
    objects.create(f"{FOLDER}/{name}", json.dumps(vars(position)).encode())
    objects.delete(f"{FOLDER}/{old}" for old in objects.names(FOLDER) if old < name)


def read_steps_after(run_dir: str, position: Position) -> list[tuple[int, list[Step]]]:
    """Steps that were committed after a position: number of each event of the journal that has some, and its steps.
    Raises OSError, JournalCorrupt."""
    newest, found = position.step, []
    for entry in read_entries(location_of(run_dir), position.seq, only=(StepsCommitted, Resumed)):
        match entry.event:
            case Resumed(step=step):
                newest = min(newest, step)
            case StepsCommitted(records):
                fresh = [record for record in records if record.step > newest]  # one may have been written twice
                newest = fresh[-1].step if fresh else newest
                found.append((entry.seq, [step_of(record) for record in fresh]))
    return found


def step_of(record: StepRecord) -> Step:
    """What callbacks see of a step's record."""
    return Step(
        step=record.step,
        loss=record.loss,
        lr=record.update.lr,
        grad_norm=record.update.grad_norm,
        applied=record.update.applied,
        tokens=record.batch.tokens,
        world_size=record.world_size,
        step_s=record.timing.step_s,
        time=record.timing.vote_time,
        metrics=dict(record.metrics),
        validation_loss=record.validation_loss,
        validation_metrics=dict(record.validation_metrics),
    )

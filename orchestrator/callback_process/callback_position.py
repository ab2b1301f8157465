"""Position of a run's callbacks in its journal, with their states, from which a new process continues."""

import json
from dataclasses import dataclass
from itertools import pairwise
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


@dataclass(frozen=True)
class ReadSteps:
    """Steps of one event of the journal, which is `seq`; `newest` is the run's newest step after it."""

    seq: int
    newest: int
    steps: list[Step]


def read_position(run_dir: str) -> Position:
    """The newest one that was stored, and that no resume from an earlier step has left behind. Raises OSError,
    JournalCorrupt."""
    objects = objects_at(location_of(run_dir))
    names = objects.names(FOLDER)
    resumed = read_entries(location_of(run_dir), only=(Resumed,)) if names else []
    for name in reversed(names):
        found: dict[str, Any] = json.loads(objects.get(f"{FOLDER}/{name}"))
        position = Position(found["seq"], found["step"], tuple((name, state) for name, state in found["states"]))
        after = (entry.event for entry in resumed if entry.seq > position.seq)
        if all(position.step <= event.step for event in after if isinstance(event, Resumed)):
            return position
    return Position()


def store_position(run_dir: str, position: Position) -> None:
    """Store it, and remove most of the older ones: of a run that resumes from an old checkpoint one before that is
    needed. Raises OSError."""
    objects = objects_at(location_of(run_dir))
    name = f"{position.seq:010d}"
    objects.create(f"{FOLDER}/{name}", json.dumps(vars(position)).encode())
    names = objects.names(FOLDER)
    kept = thinned([int(other) for other in names])
    objects.delete(f"{FOLDER}/{other}" for other in names if int(other) not in kept)


def thinned(numbers: list[int]) -> set[int]:
    """Some of ascending numbers: the further back they are from the newest, the wider apart."""
    newest = numbers[-1]
    kept = numbers[:1] + numbers[-1:]
    for older, number in reversed(list(pairwise(numbers[:-1]))):
        if kept[-1] - older > newest - kept[-1]:
            kept.append(number)
    return set(kept)


def read_steps_after(run_dir: str, position: Position) -> list[ReadSteps]:
    """Steps that were committed after a position, without those that the run has left behind by a resume since.

    Raises:
        OSError, JournalCorrupt: the journal can't be read.
    """
    newest = position.step
    found: list[ReadSteps] = []
    for entry in read_entries(location_of(run_dir), position.seq, only=(StepsCommitted, Resumed)):
        match entry.event:
            case Resumed(step=step):
                newest = min(newest, step)
                found = [ReadSteps(r.seq, min(r.newest, step), [s for s in r.steps if s.step <= step]) for r in found]
            case StepsCommitted(records):
                fresh = [record for record in records if record.step > newest]  # one may have been written twice
                newest = fresh[-1].step if fresh else newest
                found.append(ReadSteps(entry.seq, newest, [step_of(record) for record in fresh]))
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

"""Time of a run by use, from the votes of its steps and the events between them. Pure.

Each attempt is split at the votes. The stretch before a vote is the step, of the length in its record, preceded by a
gap: nearly zero inside a generation, else the transition from one world to the next. So all parts of an attempt add up
to its length, even where details are unknown.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from orchestrator.policy.report.attempts import Attempt
from orchestrator.protocol.events.base import JournalEntry
from orchestrator.protocol.events.generations import Activated, GenerationAborted, RolledBack
from orchestrator.protocol.step_record import StepRecord


class Use(StrEnum):
    """Use of a run's time."""

    COMPUTE = "compute"
    COMMUNICATION = "exposed communication"
    DATA_WAIT = "data wait"
    PROTECTION = "protection"
    BETWEEN = "between steps"
    WASTED = "wasted steps"
    START = "start"
    DETECT = "detect"
    RENDEZVOUS = "rendezvous"
    TRANSFER = "transfer"
    REBUILD = "rebuild"
    END = "end"


PRODUCTIVE = (Use.COMPUTE, Use.COMMUNICATION)

MEANINGS = {
    Use.COMPUTE: "forward, backward, update and validation of steps that count",
    Use.COMMUNICATION: "of these steps, waits for peers: bytes under way, and peers that were slower",
    Use.DATA_WAIT: "of these steps, waits for rows",
    Use.PROTECTION: "of these steps, waits for a snapshot to be with its buddy",
    Use.BETWEEN: "from a vote to the next step of the same world: copies for checkpoints and snapshots begin",
    Use.WASTED: "steps that were done again after a checkpoint, or whose update was left out",
    Use.START: "from admission to the first step: data, warm workers, first engines",
    Use.DETECT: "from the last step that counts to the end of its generation; what was computed since is in it",
    Use.RENDEZVOUS: "stopping, waiting for enough workers, planning, connecting, activating",
    Use.TRANSFER: "state on its way between workers, and its digests",
    Use.REBUILD: "engines of the new world; a checkpoint that was read",
    Use.END: "from the last step to the end: last checkpoint and records",
}


@dataclass(frozen=True)
class Slice:
    """Some seconds of a run, and the world size by step records: that of the step, between worlds that of the older
    one, before the first step 0."""

    use: Use
    seconds: float
    workers: int


@dataclass(frozen=True)
class TransitionTime:
    """The time between the last step of a world and the first step of the next world with steps.

    Args:
        kind: `recovery` where a generation was aborted, else `rescale`.
        generation: of the new world.
        step: its first one.
        began_s: `time.time()` of the old world's last vote.
        wasted_s: steps that were done again, after a checkpoint.
        transfer_s, rebuild_s: of the member that took longest. None: not journalled, and part of `rendezvous_s`.
    """

    kind: str
    generation: int
    step: int
    from_size: int
    to_size: int
    began_s: float
    detect_s: float
    rendezvous_s: float
    transfer_s: float | None
    rebuild_s: float | None
    wasted_s: float = 0.0

    @property
    def total_s(self) -> float:
        moved_s = (self.transfer_s or 0.0) + (self.rebuild_s or 0.0)
        return self.detect_s + self.rendezvous_s + moved_s + self.wasted_s


def account_of(attempt: Attempt) -> tuple[tuple[Slice, ...], tuple[TransitionTime, ...]]:
    """All of the attempt's time in slices, and its transitions."""
    slices: list[Slice] = []
    transitions: list[TransitionTime] = []
    moment_s, before = attempt.began_s, None
    for record in attempt.steps:
        vote_s = max(record.timing.vote_time, moment_s)  # votes of workers on different hosts: never back in time
        step_s = min(record.timing.step_s, vote_s - moment_s)
        gap_s = vote_s - moment_s - step_s
        if before is None:
            slices.append(Slice(Use.START, gap_s, 0))
        elif before.generation == record.generation:
            slices.append(Slice(Use.BETWEEN, gap_s, before.world_size))
        else:
            transitions.append(_transition(attempt.events, before, record, moment_s, gap_s))
            slices += _parts_of_transition(transitions[-1])
        slices += _parts_of_step(record, step_s, attempt.counts(record))
        moment_s, before = vote_s, record
    slices += _tail(attempt, before, moment_s)
    return tuple(part for part in slices if part.seconds > 0.0), tuple(transitions)


def _parts_of_step(record: StepRecord, step_s: float, counts: bool) -> Iterator[Slice]:
    """The record's waits, and the rest as computing. Scaled down where the step is longer than the time between votes,
    which two clocks can cause."""
    if not counts:
        yield Slice(Use.WASTED, step_s, record.world_size)
        return
    waits = {
        Use.COMMUNICATION: record.timing.communication_wait_s or 0.0,
        Use.DATA_WAIT: record.timing.data_wait_s,
        Use.PROTECTION: record.timing.protection_wait_s,
    }
    known_s = max(record.timing.step_s, sum(waits.values()))
    scale = step_s / known_s if known_s else 0.0
    yield Slice(Use.COMPUTE, scale * (known_s - sum(waits.values())), record.world_size)
    yield from (Slice(use, scale * wait_s, record.world_size) for use, wait_s in waits.items())


def _transition(
    events: Sequence[JournalEntry], before: StepRecord, record: StepRecord, moment_s: float, gap_s: float
) -> TransitionTime:
    """The transition in the `gap_s` seconds after the vote at `moment_s`, by part."""
    between = events[_activation(events, before) + 1 : _activation(events, record) + 1]
    aborts = [event for event in between if isinstance(event.event, GenerationAborted)]
    activated = [(event.time, event.event) for event in between if isinstance(event.event, Activated)]
    detect_s = _within(aborts[0].time - moment_s, gap_s) if aborts else 0.0
    wasted_s = 0.0
    if activated and any(isinstance(event.event, RolledBack) for event in between):
        wasted_s = _within(moment_s + gap_s - activated[-1][0], gap_s - detect_s)
    left_s = gap_s - detect_s - wasted_s
    took = [
        (event.transfer_s + event.digest_s, event.build_s)
        for _, event in activated
        if event.transfer_s is not None and event.digest_s is not None and event.build_s is not None
    ]
    transfer_s = rebuild_s = None
    if activated and len(took) == len(activated):
        transfer_s, rebuild_s = (sum(part) for part in zip(*took, strict=True))
        scale = min(1.0, left_s / (transfer_s + rebuild_s)) if transfer_s + rebuild_s else 1.0
        transfer_s, rebuild_s = scale * transfer_s, scale * rebuild_s
    return TransitionTime(
        kind="recovery" if aborts else "rescale",
        generation=record.generation,
        step=record.step,
        from_size=before.world_size,
        to_size=record.world_size,
        began_s=moment_s,
        detect_s=detect_s,
        rendezvous_s=max(0.0, left_s - (transfer_s or 0.0) - (rebuild_s or 0.0)),
        transfer_s=transfer_s,
        rebuild_s=rebuild_s,
        wasted_s=wasted_s,
    )


def _parts_of_transition(transition: TransitionTime) -> Iterator[Slice]:
    yield Slice(Use.DETECT, transition.detect_s, transition.from_size)
    yield Slice(Use.RENDEZVOUS, transition.rendezvous_s, transition.from_size)
    yield Slice(Use.TRANSFER, transition.transfer_s or 0.0, transition.from_size)
    yield Slice(Use.REBUILD, transition.rebuild_s or 0.0, transition.from_size)
    yield Slice(Use.WASTED, transition.wasted_s, transition.from_size)


def _tail(attempt: Attempt, last: StepRecord | None, moment_s: float) -> Iterator[Slice]:
    """From the last step to the end: an orderly end, or the end of an aborted generation without a successor."""
    left_s = attempt.ended_s - moment_s
    if last is None:
        yield Slice(Use.START, left_s, 0)
        return
    after = attempt.events[_activation(attempt.events, last) + 1 :]
    aborts = [event for event in after if isinstance(event.event, GenerationAborted)]
    if not aborts:
        yield Slice(Use.END, left_s, last.world_size)
        return
    detect_s = _within(aborts[0].time - moment_s, left_s)
    yield Slice(Use.DETECT, detect_s, last.world_size)
    yield Slice(Use.RENDEZVOUS, left_s - detect_s, last.world_size)


def _activation(events: Sequence[JournalEntry], record: StepRecord) -> int:
    """Index of the event that activated the step's generation; -1 if there is none."""
    found = (
        n
        for n, entry in enumerate(events)
        if isinstance(entry.event, Activated) and entry.event.generation == record.generation
    )
    return next(found, -1)


def _within(seconds: float, limit_s: float) -> float:
    return min(max(seconds, 0.0), max(limit_s, 0.0))

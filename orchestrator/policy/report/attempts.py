"""Attempts of a run, split from its journal. Each lasts from the submission, a resume request or the preemption of the
attempt before to the next end. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.protocol.events.base import JournalEntry
from orchestrator.protocol.events.generations import Activated
from orchestrator.protocol.events.run import Admitted, Ended, Queued, Resumed, Suspended
from orchestrator.protocol.events.training import StepsCommitted
from orchestrator.protocol.step_record import StepRecord

SUSPENDED = "suspended"  # outcome of an attempt that ended by preemption, to be resumed later


@dataclass(frozen=True)
class Attempt:
    """A stretch of a run up to a pause or another end. Times are `time.time()` seconds.

    Args:
        asked_s: when it was submitted or resumed; it was queued until `began_s`.
        ended_s: when it ended by the journal; where that holds no end, the time of its newest event or vote.
        outcome: how it ended; empty where the journal holds no end: it is still running, or its cluster was lost.
        steps: all finished and journalled steps, in order.
        counts_to: the newest step that counts: later ones were done again by a later attempt.
    """

    asked_s: float
    began_s: float
    ended_s: float
    outcome: str
    events: tuple[JournalEntry, ...]
    steps: tuple[StepRecord, ...]
    counts_to: int

    def counts(self, record: StepRecord) -> bool:
        """Whether the run's state comes from this step: it was not done again, and its update was made."""
        return record.step <= self.counts_to and record.update.applied


def attempts_of(events: Sequence[JournalEntry]) -> tuple[Attempt, ...]:
    """All attempts of a run, from every event of its journal; empty if there are no events."""
    groups: list[list[JournalEntry]] = []
    for event in events:
        if not groups or isinstance(event.event, Resumed) or isinstance(groups[-1][-1].event, Suspended):
            groups.append([])
        groups[-1].append(event)
    attempts: list[Attempt] = []
    for number, group in enumerate(groups):
        after = [_goes_on_after(groups[n - 1], groups[n]) for n in range(number + 1, len(groups))]
        was_suspended = bool(attempts) and attempts[-1].outcome == SUSPENDED
        asked_s = attempts[-1].ended_s if was_suspended else group[0].time
        attempts.append(_attempt(group, asked_s, was_suspended, after))
    return tuple(attempts)


def _goes_on_after(before: Sequence[JournalEntry], group: Sequence[JournalEntry]) -> int:
    """The step after which an attempt continues, by its `Resumed` event or the `Suspended` event before it."""
    end = group[0].event if isinstance(group[0].event, Resumed) else before[-1].event
    assert isinstance(end, Resumed | Suspended)
    return end.step


def _attempt(events: Sequence[JournalEntry], asked_s: float, was_suspended: bool, later: Sequence[int]) -> Attempt:
    """Args: later: steps after which later attempts continued."""
    done = [entry.event.records for entry in events if isinstance(entry.event, StepsCommitted)]
    steps = tuple(record for records in done for record in records)
    end = next((entry for entry in events if isinstance(entry.event, Ended | Suspended)), None)
    # Members' last records are journalled after the end, and their clocks are not the controller's.
    votes_s = [record.timing.vote_time for record in steps]
    ended_s = max([event.time for event in ([end] if end is not None else events)] + votes_s)
    newest = steps[-1].step if steps else -1
    return Attempt(
        asked_s=asked_s,
        began_s=min(_let_in_s(events, asked_s, ended_s, was_suspended), ended_s),
        ended_s=ended_s,
        outcome="" if end is None else end.event.outcome if isinstance(end.event, Ended) else SUSPENDED,
        events=tuple(events),
        steps=steps,
        counts_to=min([newest, *later]),
    )


def _let_in_s(events: Sequence[JournalEntry], asked_s: float, ended_s: float, is_queued: bool) -> float:
    """The last admission before the attempt trained. Older journals have no queue events: then `asked_s`. An attempt
    that was queued and not admitted waited until `ended_s`."""
    start = next((n for n, event in enumerate(events) if isinstance(event.event, Activated)), len(events))
    let_in = [event.time for event in events[:start] if isinstance(event.event, Admitted)]
    if let_in:
        return float(let_in[-1])
    return ended_s if is_queued or any(isinstance(event.event, Queued) for event in events[:start]) else asked_s

"""A run's journal cut into attempts: from its submission, an order to go on, or the moment at which it gave its places
away, to the end that followed. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.protocol.codec import from_plain
from orchestrator.protocol.messages import StepRecord

Event = Mapping[str, Any]

SUSPENDED = "suspended"  # it gave its places away, to go on later: an end of an attempt, and the event that tells of it


@dataclass(frozen=True)
class Attempt:
    """A stretch of a run between two pauses, or whatever else had ended it. Times are `time.time()` seconds.

    Args:
        asked_s: when it was submitted, or was to go on; it waited in the queue until `began_s`.
        ended_s: when it ended, says the journal; where that holds no end, its newest sign of life.
        outcome: how it ended; empty where the journal holds no end: it goes on, or its cluster was lost.
        steps: all that were finished and journalled, in order.
        counts_to: the newest step that counts: those after it were done again by a later attempt.
    """

    asked_s: float
    began_s: float
    ended_s: float
    outcome: str
    events: tuple[Event, ...]
    steps: tuple[StepRecord, ...]
    counts_to: int

    def counts(self, record: StepRecord) -> bool:
        """Whether the run's state comes from this step: it was not done again, and its update was made."""
        return record.step <= self.counts_to and record.applied


def attempts_of(events: Sequence[Event]) -> tuple[Attempt, ...]:
    """All attempts of a run, from every event of its journal. None if there are no events."""
    groups: list[list[Event]] = []
    for event in events:
        if not groups or event["kind"] == "resumed" or groups[-1][-1]["kind"] == SUSPENDED:
            groups.append([])
        groups[-1].append(event)
    attempts: list[Attempt] = []
    for number, group in enumerate(groups):
        after = [_goes_on_after(groups[n - 1], groups[n]) for n in range(number + 1, len(groups))]
        was_suspended = bool(attempts) and attempts[-1].outcome == SUSPENDED
        asked_s = attempts[-1].ended_s if was_suspended else group[0]["time"]
        attempts.append(_attempt(group, asked_s, was_suspended, after))
    return tuple(attempts)


def _goes_on_after(before: Sequence[Event], group: Sequence[Event]) -> int:
    """The step after which an attempt goes on: says the order, or whoever suspended the one before."""
    step: int = (group[0] if group[0]["kind"] == "resumed" else before[-1])["step"]
    return step


def _attempt(events: Sequence[Event], asked_s: float, was_suspended: bool, later: Sequence[int]) -> Attempt:
    """Args: steps after which later attempts went on."""
    plain = [record for event in events if event["kind"] == "steps" for record in event["records"]]
    steps = tuple(from_plain(StepRecord, record) for record in plain)
    end = next((event for event in events if event["kind"] in ("ended", SUSPENDED)), None)
    # What members still knew is written down after the end, and their clocks are not the controller's.
    votes_s = [record.vote_time for record in steps]
    ended_s = max([event["time"] for event in ([end] if end is not None else events)] + votes_s)
    newest = steps[-1].step if steps else -1
    return Attempt(
        asked_s=asked_s,
        began_s=min(_let_in_s(events, asked_s, ended_s, was_suspended), ended_s),
        ended_s=ended_s,
        outcome=end.get("outcome", SUSPENDED) if end is not None else "",
        events=tuple(events),
        steps=steps,
        counts_to=min([newest, *later]),
    )


def _let_in_s(events: Sequence[Event], asked_s: float, ended_s: float, is_queued: bool) -> float:
    """When it was given its place the last time before it trained. Journals of before there was a queue tell nothing
    of it; one that does, and was not let in, waited all the time."""
    start = next((n for n, event in enumerate(events) if event["kind"] == "activated"), len(events))
    let_in = [event["time"] for event in events[:start] if event["kind"] == "admitted"]
    if let_in:
        return float(let_in[-1])
    return ended_s if is_queued or any(event["kind"] == "queued" for event in events[:start]) else asked_s

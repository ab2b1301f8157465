"""A run's journal cut into attempts: from its submission, or an order to go on, to the end that followed. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.protocol.codec import from_plain
from orchestrator.protocol.messages import StepRecord

Event = Mapping[str, Any]


@dataclass(frozen=True)
class Attempt:
    """A stretch of a run between two pauses, or whatever else had ended it. Times are `time.time()` seconds.

    Args:
        ended_s: when it ended, says the journal; where that holds no end, its newest sign of life.
        outcome: how it ended; empty where the journal holds no end: it goes on, or its cluster was lost.
        steps: all that were finished and journalled, in order.
        counts_to: the newest step that counts: those after it were done again by a later attempt.
    """

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
        if not groups or event["kind"] == "resumed":
            groups.append([])
        groups[-1].append(event)
    attempts: list[Attempt] = []
    for number, group in enumerate(groups):
        later = [other[0]["step"] for other in groups[number + 1 :]]
        attempts.append(_attempt(group, later))
    return tuple(attempts)


def _attempt(events: Sequence[Event], later: Sequence[int]) -> Attempt:
    """Args: steps after which later attempts went on."""
    plain = [record for event in events if event["kind"] == "steps" for record in event["records"]]
    steps = tuple(from_plain(StepRecord, record) for record in plain)
    end = next((event for event in events if event["kind"] == "ended"), None)
    # What members still knew is written down after the end, and their clocks are not the controller's.
    votes_s = [record.vote_time for record in steps]
    ended_s = max([event["time"] for event in ([end] if end is not None else events)] + votes_s)
    newest = steps[-1].step if steps else -1
    return Attempt(
        began_s=events[0]["time"],
        ended_s=ended_s,
        outcome=end["outcome"] if end is not None else "",
        events=tuple(events),
        steps=steps,
        counts_to=min([newest, *later]),
    )

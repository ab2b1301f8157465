"""What must be so of a run's events, whatever happened to it. Pure, and without code of the product.

Each function returns what is wrong; nothing if all is well.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tests.chaos.journal import Event

LOSSES = ("worker_lost", "generation_aborted", "rolled_back")  # none of which storage alone may cause
SHOWN = 5  # differences in a message


def records_of(events: Iterable[Event]) -> Iterator[dict[str, Any]]:
    """Records of committed steps."""
    return (record for event in events if event["kind"] == "steps" for record in event["records"])


def step_faults(events: Iterable[Event]) -> list[str]:
    """Steps that are missing, recorded again, or out of order."""
    faults, expected = [], 0
    for record in records_of(events):
        if record["step"] != expected:
            faults.append(f"step {record['step']} is recorded where step {expected} follows")
        expected = record["step"] + 1
    return faults[:SHOWN]


def count_faults(events: Iterable[Event], num_steps: int) -> list[str]:
    """Whether as many steps are recorded as the run claims to have done."""
    count = sum(1 for _ in records_of(events))
    return [] if count == num_steps else [f"{count} steps are recorded, the run claims {num_steps}"]


def end_faults(events: Iterable[Event], checkpoints: Sequence[int]) -> list[str]:
    """Whether a run that was stopped has a checkpoint of its last step, unless it lost its state after the request:
    then it ends where it would have gone back to."""
    last, lost = -1, False
    for event in events:
        if event["kind"] == "steps":
            last = event["records"][-1]["step"]
        lost = (lost or event["kind"] == "rolled_back") and event["kind"] != "target"
    return [] if lost or checkpoints[-1:] == [last] else [f"step {last} is the last one, checkpoints: {checkpoints}"]


def storage_faults(events: Iterable[Event]) -> list[str]:
    """Workers lost and steps given up in these events, during which nothing failed but storage."""
    lost = [event for event in events if event["kind"] in LOSSES]
    return [f"{event['kind']}: {event.get('worker', '')} {event.get('why', '')}" for event in lost]


def is_replaying(events: Sequence[Event]) -> bool:
    """Whether the run went back to a checkpoint and has not done again yet what it gave up: steps are recorded once, so
    none is recorded meanwhile but by the members before."""
    kinds = [event["kind"] for event in events if event["kind"] in ("rolled_back", "activated", "steps")]
    if "rolled_back" not in kinds:
        return False
    since = kinds[len(kinds) - kinds[::-1].index("rolled_back") :]
    return "activated" not in since or "steps" not in since[since.index("activated") :]


def loss_faults(events: Iterable[Event], undisturbed: Iterable[Event]) -> list[str]:
    """Steps whose losses or gradient norm are not those of the undisturbed run, bit by bit."""
    pairs = zip(records_of(events), records_of(undisturbed), strict=False)
    differ = [ours["step"] for ours, other in pairs if _differ(ours, other)]
    return [f"{len(differ)} steps differ, the first is step {differ[0]}"] if differ else []


def _differ(ours: dict[str, Any], other: dict[str, Any]) -> bool:
    """The last step is validated only if the job has no more."""
    validations = {record["validation_loss"] for record in (ours, other) if "validation_loss" in record}
    pairs = [(record["step"], record["loss"], record["update"]["grad_norm"]) for record in (ours, other)]
    return pairs[0] != pairs[1] or len(validations) > 1

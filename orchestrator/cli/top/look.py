"""What one poll of a cluster has found, for the live screen."""

from dataclasses import dataclass, field
from typing import Any

from orchestrator.protocol.status import RunStatus
from orchestrator.protocol.step_record import StepRecord


@dataclass(frozen=True)
class RunRecords:
    """Records of a run: its newest events and steps, and its goodput so far, if that is known."""

    events: tuple[dict[str, Any], ...] = ()
    steps: tuple[StepRecord, ...] = ()
    goodput: float | None = None


@dataclass(frozen=True)
class Look:
    """One poll of the cluster; `statuses` are those of the last one that was answered.

    Args:
        is_joining: whether the client is joining the cluster: then runs that have ended may be missing.
        trouble: why there are no new ones; empty if there are.
        newest: the newest event by run, where there is one.
        opened: records of the run that is open.
    """

    address: str
    statuses: tuple[RunStatus, ...] = ()
    is_joining: bool = False
    trouble: str = ""
    newest: dict[str, dict[str, Any]] = field(default_factory=dict)
    opened: RunRecords = RunRecords()

"""Events of interest to users: experts, replay checks, numerics, tracking."""

from dataclasses import dataclass
from typing import Any

from orchestrator.protocol.events.base import Event


@dataclass(frozen=True)
class ExpertsCollapsed(Event):
    """Most tokens of an MoE layer go to the same experts."""

    step: int
    layer: int
    max_violation: float


@dataclass(frozen=True)
class ExpertsEven(Event):
    """No layer is collapsed any more."""

    step: int


@dataclass(frozen=True)
class LoadsSwing(Event):
    """Experts are full and empty by turns. `swing` is the share of experts that changed sides within a step."""

    step: int
    swing: float


@dataclass(frozen=True)
class LoadsSteady(Event):
    """The loads of experts do not swing any more."""

    step: int


@dataclass(frozen=True)
class ReplayChecked(Event, kind="checked"):
    """A standby replayed committed steps. `equal`: all of them came out with the same bits."""

    worker: str
    first_step: int
    last_step: int
    equal: bool


@dataclass(frozen=True)
class ReplayFailed(Event, kind="check_failed"):
    """A standby could not replay the steps after `step`."""

    worker: str
    step: int
    why: str


@dataclass(frozen=True)
class StateDiffers(Event):
    """A replayed step did not reproduce: a processor or memory is suspect.

    Args:
        parts: of the step that differ: `loss`, `grad_norm`, digests of the state.
        ranks, workers, nodes: whose state differs, where that is known.
    """

    step: int
    parts: tuple[str, ...]
    ranks: tuple[int, ...]
    workers: tuple[str, ...]
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class NumericsRecorded(Event, kind="numerics"):
    """What decides the bits of the run's results, of its first worker (`orchestrator.engine.numerics`)."""

    fingerprint: dict[str, Any]


@dataclass(frozen=True)
class NumericsDiffer(Event):
    """A worker computes other bits than the run's first one. `differs` holds `before -> now` by key."""

    worker: str
    differs: dict[str, str]


@dataclass(frozen=True)
class GradientSaturated(Event):
    """A gradient was too large for an exact sum; its step was left out."""

    worker: str
    step: int
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class TrackingFails(Event):
    """Metrics wait on disk because the tracking server does not take them."""

    why: str


@dataclass(frozen=True)
class TrackingWorks(Event):
    """The tracking server takes metrics again."""

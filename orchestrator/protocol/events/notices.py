"""Events of interest to users: experts, replay checks, numerics, storage, tracking."""

from dataclasses import dataclass
from typing import Any

from orchestrator.protocol.events.base import Event
from orchestrator.storage.condition import StorageCondition


@dataclass(frozen=True)
class ExpertsCollapsed(Event):
    """Most tokens of an MoE layer go to the same experts, of which it has `num_experts`; 0: as many as its job has."""

    step: int
    layer: int
    max_violation: float
    num_experts: int = 0


@dataclass(frozen=True)
class ExpertsEven(Event):
    """No layer is collapsed any more."""

    step: int


@dataclass(frozen=True)
class LoadsSwing(Event):
    """Experts alternate between high and low load. `swing` is the share of experts that changed sides within a step."""

    step: int
    swing: float


@dataclass(frozen=True)
class LoadsSteady(Event):
    """The loads of experts no longer swing."""

    step: int


@dataclass(frozen=True)
class ReplayChecked(Event, kind="checked"):
    """A standby replayed committed steps. `equal`: all of them had the same bits."""

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
    """A replayed step did not reproduce: suspect faulty CPU or memory.

    Args:
        parts: differing parts of the step: `loss`, `grad_norm`, digests of the state.
        ranks, workers, nodes: owners of the differing state, if known.
    """

    step: int
    parts: tuple[str, ...]
    ranks: tuple[int, ...]
    workers: tuple[str, ...]
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class NumericsRecorded(Event, kind="numerics"):
    """Properties of the first worker that determine the bits of the run's results (`orchestrator.engine.numerics`)."""

    fingerprint: dict[str, Any]


@dataclass(frozen=True)
class NumericsDiffer(Event):
    """A worker's numerics differ from those of the run's first worker. `differs` has `before -> now` by key."""

    worker: str
    differs: dict[str, str]


@dataclass(frozen=True)
class GradientSaturated(Event):
    """A gradient was too large for an exact sum; its step was left out."""

    worker: str
    step: int
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class StorageFails(Event):
    """Run storage refuses checkpoints, prepared data or entries of the journal, doesn't answer, or doesn't give rows of
    a step. Calls are repeated; training continues meanwhile, or waits for its rows."""

    condition: StorageCondition
    why: str


@dataclass(frozen=True)
class StorageWorks(Event):
    """Run storage takes everything again."""


@dataclass(frozen=True)
class TrackingFails(Event):
    """Metrics wait on disk because the tracking server does not take them."""

    why: str


@dataclass(frozen=True)
class TrackingWorks(Event):
    """The tracking server takes metrics again."""

"""Events of generations: planned, activated, abandoned, aborted, and the cost of transitions between them."""

from dataclasses import dataclass

from orchestrator.protocol.events.base import Event
from orchestrator.protocol.status import Recovery, Rescale


@dataclass(frozen=True)
class GenerationPlanned(Event):
    """The next generation was planned. `first_step` is None if it begins as soon as it is prepared."""

    generation: int
    members: tuple[str, ...]
    first_step: int | None
    why: str


@dataclass(frozen=True)
class Activated(Rescale, Event):
    """A generation became the current one: every member holds its shard. Its stall is measured later (`Rescaled`,
    `Recovered`).

    Args:
        connect_s, build_s, transfer_s, digest_s: seconds by part, of the slowest member; None if no member reported
            them.
    """

    members: tuple[str, ...] = ()
    connect_s: float | None = None
    build_s: float | None = None
    transfer_s: float | None = None
    digest_s: float | None = None


@dataclass(frozen=True)
class Rescaled(Rescale, Event):
    """The stall of a rescale was measured."""


@dataclass(frozen=True)
class Recovered(Recovery, Event):
    """The stall of a recovery was measured."""


@dataclass(frozen=True)
class TransitionAbandoned(Event):
    """A planned generation was abandoned before it became current. `gave_up`: after several in a row the run keeps its
    size."""

    generation: int
    why: str
    gave_up: bool


@dataclass(frozen=True)
class GenerationAborted(Event):
    """The current generation ended because a member failed."""

    generation: int
    step: int
    why: str


@dataclass(frozen=True)
class RolledBack(Event):
    """The surviving workers did not hold the whole state: the run returns to a checkpoint, or without one to step 0."""

    step: int
    checkpoint: str | None
    why: str

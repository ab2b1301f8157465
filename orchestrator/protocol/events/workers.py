"""Events of workers and nodes."""

from dataclasses import dataclass

from orchestrator.protocol.events.base import Event
from orchestrator.protocol.usage import EnergyReading


@dataclass(frozen=True)
class WorkersSpawned(Event):
    """Workers were started."""

    workers: tuple[str, ...]


@dataclass(frozen=True)
class WorkersReleased(Event):
    """Workers were ended that are not needed any more."""

    workers: tuple[str, ...]


@dataclass(frozen=True)
class WorkerLost(Event):
    """A worker failed or stopped answering.

    Args:
        member: it was a member of the world. Standbys and starting workers are none.
        step, cause: newest finished step, and class of the failure; of members only.
    """

    worker: str
    why: str
    member: bool
    step: int | None = None
    cause: str | None = None


@dataclass(frozen=True)
class StragglerFound(Event, kind="straggler"):
    """A member is persistently slower than the others. `slowness` is its step time over their median."""

    worker: str
    node: str
    slowness: float
    step: int


@dataclass(frozen=True)
class NodeDraining(Event):
    """A node will be taken away. `seconds_left` is None where no deadline is known."""

    node: str
    workers: tuple[str, ...]
    seconds_left: float | None


@dataclass(frozen=True)
class NodeQuarantined(Event):
    """The run starts no more workers on a node where several have failed."""

    node: str
    failures: int


@dataclass(frozen=True)
class NodeReleased(Event):
    """A node's quarantine is over."""

    node: str


@dataclass(frozen=True)
class EnergyRead(Event, kind="energy", internal=True):
    """What each worker has used since it started."""

    workers: dict[str, EnergyReading]

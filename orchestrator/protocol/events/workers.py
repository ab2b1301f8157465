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
    """Workers that are no longer needed were ended."""

    workers: tuple[str, ...]


@dataclass(frozen=True)
class WorkerLost(Event):
    """A worker failed or stopped answering.

    Args:
        member: it was a member of the world, not a standby or a starting worker.
        step, cause: newest finished step, and class of the failure; for members only.
    """

    worker: str
    why: str
    member: bool
    step: int | None = None
    cause: str | None = None


@dataclass(frozen=True)
class KeeperConnected(Event):
    """A standby has a snapshot of the only member, and is sent the following ones: steps are held twice. `step` is the
    newest finished one."""

    worker: str
    step: int


@dataclass(frozen=True)
class KeeperLost(Event):
    """The only member sends no more snapshots to the standby that kept them: steps are held once, until another one is
    connected."""

    worker: str
    step: int


@dataclass(frozen=True)
class StragglerFound(Event, kind="straggler"):
    """A member is persistently slower than the others. `slowness` is its step time over their median."""

    worker: str
    node: str
    slowness: float
    step: int


@dataclass(frozen=True)
class NodeDraining(Event):
    """A node will be removed. `seconds_left` is None if the deadline is unknown."""

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
    """A node's quarantine ended."""

    node: str


@dataclass(frozen=True)
class EnergyRead(Event, kind="energy", internal=True):
    """Energy of each worker since its start."""

    workers: dict[str, EnergyReading]

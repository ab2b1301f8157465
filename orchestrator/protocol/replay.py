"""What the processes that do a run's steps again are told, and what they answer."""

from dataclasses import dataclass

from orchestrator.protocol.child_process import Fault
from orchestrator.protocol.lines import Lines
from orchestrator.protocol.messages import GenerationPlan, StepRecord, StoreAddress, WorkerJob


@dataclass(frozen=True)
class ReplayOrder:
    """Do the steps up to `last_step` again, as `worker` in the plan's world. A store address without a port: make the
    store, and say where it listens."""

    worker: str
    job: WorkerJob
    plan: GenerationPlan
    last_step: int


@dataclass(frozen=True)
class Numerics:
    """What decides the bits of this process's results, as JSON."""

    fingerprint: str


PEER_LOST = "PeerLost"  # kind of a Fault that another rank is to blame for
LINES = Lines(ReplayOrder, Numerics, StoreAddress, StepRecord, Fault)

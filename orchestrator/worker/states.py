"""States of a worker's training thread, and what it holds in each.

    Standby ──── a plan includes it ────► Rescaling ──► Ready ────► Training ──── last step ────► Finished
       ▲                                  ▲   │   │       │          │    │
       ├── Leaving ◄───── its part sent ──│───┘   │       │          │    └─ error ─► Interrupted
       │                                  │       │       │          │                     │
       │                                  └───────│───────│── fence ─┘                     │
    Stranded ◄───────── error ────────────────────┴───────┴── another plan ◄───────────────┘

`Trainer` moves from one to the next. The phase in the worker's report (`Phase`) is what others see of it. No state but
Training and Ready refers to a shard: gloo closes the connections of a generation, on which peers may be blocked, once
nothing refers to it.
"""

from dataclasses import dataclass

from orchestrator.worker.shard.shard import Shard
from orchestrator.worker.step.training_loop import LiveShard
from orchestrator.worker.transition.transition import PreparedTransition


@dataclass(frozen=True)
class Standby:
    """Holds no training state; may replay steps until a plan includes it."""


@dataclass(frozen=True)
class Stranded:
    """Its generation, or the transition from it, has ended without the next one. Keeps its state, and snapshots for
    others, in the `SnapshotManager`; waits for a plan."""


@dataclass(frozen=True)
class Rescaling:
    """Between two generations. The old state is in the `SnapshotManager`, without an engine; a newcomer has none."""

    prepared: PreparedTransition


@dataclass(frozen=True)
class Ready:
    """Has its shard of the next generation and waits for activation. The old state stays until then."""

    prepared: PreparedTransition
    shard: Shard


@dataclass(frozen=True)
class Leaving:
    """Has sent its state to the next generation, of which it is no member; keeps it until activation."""

    prepared: PreparedTransition


@dataclass(frozen=True)
class Training:
    """A member of an activated generation."""

    live: LiveShard


@dataclass(frozen=True)
class Interrupted:
    """Its generation has ended by an error. The engine is closed, and nothing but the error refers to the shard."""

    generation: int
    error: Exception


@dataclass(frozen=True)
class Finished:
    """The run has ended, and its last checkpoint is complete."""


WorkerState = Standby | Stranded | Rescaling | Ready | Leaving | Training | Interrupted | Finished

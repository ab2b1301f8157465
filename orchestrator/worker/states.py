"""States of a worker's training thread: what it holds in each, and which states may follow.

| state | holds | next |
|---|---|---|
| `Standby` | nothing | `Rescaling`, once a plan includes it |
| `Rescaling` | its old state, without an engine | `Ready`, `Leaving`; after an error `Stranded` or `Standby` |
| `Ready` | its old state, and the new shard | `Training` on activation; `Stranded` if another plan replaces this one |
| `Leaving` | its old state | `Standby` on activation; `Stranded` if another plan replaces this one |
| `Training` | its shard | `Rescaling` at a fence; `Finished` after the last step; `Interrupted` by an error |
| `Interrupted` | the error, and its old state if that is of a finished step | `Stranded` |
| `Stranded` | its old state, and snapshots for others | `Rescaling`, once a plan includes it |
| `Finished` | its shard | |

`Trainer` moves from one to the next. The phase in the worker's report (`Phase`) is what others see of it. Only `Ready`
and `Training` refer to a shard: gloo closes the connections of a generation, on which peers may be blocked, once
nothing refers to it.
"""

from dataclasses import dataclass

from orchestrator.worker.shard.shard import Shard
from orchestrator.worker.training_loop import LiveShard
from orchestrator.worker.transition.prepared_transition import PreparedTransition


@dataclass(frozen=True)
class Standby:
    """Holds no training state; may replay steps until a plan includes it."""


@dataclass(frozen=True)
class Stranded:
    """Its generation, or the transition from it, has ended, and no other has begun. The `SnapshotManager` has its state
    and its snapshots for others."""


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

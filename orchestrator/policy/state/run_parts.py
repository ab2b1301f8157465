"""Parts of a run's state: its transition, its place in the cluster, an abort, failures, and what was decided so far.

See `run_state.RunState`, which holds one of each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from orchestrator.protocol.messages import FIRST_INTERVAL_S, Fence, GenerationPlan, Keeper, StageStart
from orchestrator.protocol.replay_task import ReplayTask
from orchestrator.protocol.scaling import UNLIMITED, Grant
from orchestrator.protocol.status import Recovery
from orchestrator.sampling.micro_batches import UNSAID, MicroBatchSize

MAX_FAILURES = 256  # kept as the history that the response to the next one depends on


@dataclass(frozen=True)
class WorkerFailure:
    """A failure: its worker and node (empty: of no single worker), its class, the last finished step, the generation if
    the worker reported the failure itself, and whether the worker trained."""

    worker: str
    node: str
    cause: str
    step: int
    time_s: float
    generation: int = -1
    is_member: bool = True


@dataclass(frozen=True)
class Probe:
    """Memory that a worker had taken, in bytes, with `tokens` in its largest micro-batch, padding included."""

    worker: str
    sequence_length: int
    tokens: int
    resident_bytes: int


@dataclass(frozen=True)
class Rebalance:
    """A change of the experts' placement by their loads.

    Args:
        generation: that has the new placement.
        before, after: largest load of a rank over the mean, minus 1, over all layers, with the loads that were known.
        num_moved: experts that ranks get, over all layers.
        request: number of the newest request for one, which it answers.
    """

    generation: int
    before: float
    after: float
    num_moved: int
    request: int = 0


@dataclass(frozen=True)
class Transition:
    """A planned generation, from its plan to its activation.

    Args:
        first_step: its first step; None where it begins as soon as all are prepared.
        fence: where the current generation ends; None until all are prepared.
        failing_since_s: when it was first seen to fail with no culprit known.
        rebalance: what it changes of the experts' placement, if that is its purpose.
    """

    plan: GenerationPlan
    first_step: int | None
    why: str
    fence: Fence | None = None
    failing_since_s: float | None = None
    rebalance: Rebalance | None = None

    def failing(self, now_s: float) -> "Transition":
        """This transition, marked as failing since `now_s` unless it already is."""
        return self if self.failing_since_s is not None else replace(self, failing_since_s=now_s)


@dataclass(frozen=True)
class QueueState:
    """The run's place in the cluster.

    Args:
        grant: workers that the Scheduler lets the run hold, received before step `granted_since` was done.
        since_s: when the run began to wait for workers; None once it has a world.
        admitted_s: when it last left the queue.
        begun_s: when it first had a world after that.
    """

    grant: Grant = UNLIMITED
    granted_since: int = 0
    since_s: float | None = None
    admitted_s: float | None = None
    begun_s: float | None = None


@dataclass(frozen=True)
class AbortState:
    """The newest generation that was ended because a member failed. Until another one is activated the run recovers.

    Args:
        generation: -1 before the first abort.
        since_s: when it was aborted; None once the next generation is active.
        account: the recovery's cost, as far as known.
    """

    generation: int = -1
    since_s: float | None = None
    account: Recovery | None = None


@dataclass(frozen=True)
class KeeperState:
    """Standbys that keep the snapshots of a world of one.

    Args:
        chosen: those that may hold some, oldest first.
        count: number of keepers chosen so far.
        connected: the one that was last seen to have a snapshot, and to get more.
        ended_s: when the connection to the newest one ended, whose worker is still there.
    """

    chosen: tuple[Keeper, ...] = ()
    count: int = 0
    connected: Keeper | None = None
    ended_s: float | None = None


def number_of(worker: str) -> int:
    """The number of a worker, by which a run counts those that it has started."""
    return int(worker.removeprefix("w"))


def _of(failures: Sequence[WorkerFailure], is_member: bool) -> list[WorkerFailure]:
    return [failure for failure in failures if failure.is_member is is_member]


@dataclass(frozen=True)
class FailureState:
    """Failures and their consequences.

    Args:
        recent: the newest ones.
        spawns, transitions: failures in a row to start workers and to change the generation.
        attempts: as `spawns`, but workers that were started together count once.
        attempted: workers with a lower number belong to attempts that have failed.
        spawn_s: when the newest of these workers failed.
        counted_from: workers with a lower number don't count: they were started when the run didn't need them.
        quarantine: nodes that get no new workers.
        skips: steps whose batches are left out, because their loss exploded.
    """

    recent: tuple[WorkerFailure, ...] = ()
    spawns: int = 0
    attempts: int = 0
    attempted: int = 0
    spawn_s: float = 0.0
    counted_from: int = 0
    transitions: int = 0
    quarantine: tuple[str, ...] = ()
    skips: tuple[int, ...] = ()

    def with_new(self, failures: Sequence[WorkerFailure]) -> "FailureState":
        """With more failures. The newest `MAX_FAILURES` are kept, and so are those of workers that didn't train."""
        recent = (*self.recent, *failures)
        kept = {id(each) for which in (True, False) for each in _of(recent, which)[-MAX_FAILURES:]}
        return replace(self, recent=tuple(failure for failure in recent if id(failure) in kept))

    def with_failed_spawns(self, places: Mapping[str, str], num_spawned: int, now_s: float) -> "FailureState":
        """With workers that ended before they trained, those that don't count left out.

        Args:
            places: by worker, what fails as one: a node, or the worker itself.
            num_spawned: workers started so far.
        """
        counted = {number_of(w): place for w, place in places.items() if number_of(w) >= self.counted_from}
        if not counted:
            return self
        recorded = replace(self, spawns=self.spawns + len({*counted.values()}), spawn_s=now_s)
        is_new = max(counted) >= self.attempted
        return replace(recorded, attempts=self.attempts + 1, attempted=num_spawned) if is_new else recorded

    def without_failed_spawns(self, num_spawned: int | None = None) -> "FailureState":
        """With none of them in a row. Given a number of workers started so far, these don't count any more."""
        counted_from = self.counted_from if num_spawned is None else num_spawned
        return replace(self, spawns=0, attempts=0, counted_from=counted_from)


@dataclass(frozen=True)
class MicroBatchState:
    """Micro-batch size from the next generation on.

    Args:
        size: unset for no change.
        ceiling_tokens: a size that was too large in a world of `ceiling_workers`; 0 where none is known.
        probes: memory that workers had taken at the last change of the size.
    """

    size: MicroBatchSize = UNSAID
    ceiling_tokens: int = 0
    ceiling_workers: int = 0
    probes: tuple[Probe, ...] = ()


@dataclass(frozen=True)
class ExpertBalance:
    """Placement of experts by load.

    Args:
        requests: number of requests for one that were applied.
        unmeasured: newest change, until its effect on steps is measured.
        share: of a step's time that was measured to follow the load of the busiest rank, in worlds of this size; None
            before.
    """

    requests: int = 0
    unmeasured: Rebalance | None = None
    share: float | None = None


@dataclass(frozen=True)
class CheckpointInterval:
    """Interval of checkpoints with `checkpoint.every: auto`.

    Args:
        seconds: of training between two checkpoints.
        costs_s: training time that each of the newest checkpoints took.
        measured: (generation, step) of the newest one of them.
        since_s: the time from which on the run's failures count; None before its first world.
    """

    seconds: float = FIRST_INTERVAL_S
    costs_s: tuple[float, ...] = ()
    measured: tuple[int, int] = (-1, -1)
    since_s: float | None = None


@dataclass(frozen=True)
class CurriculumDecisions:
    """Decided stages of the curriculum.

    Args:
        version: counts decisions.
        requests: number of requests for a stage that were applied.
    """

    stages: tuple[StageStart, ...] = ()
    version: int = 0
    requests: int = 0


@dataclass(frozen=True)
class ReplayState:
    """Replay checks by a standby.

    Args:
        task: the check in progress.
        count: number of checks begun.
        last_step: the step after which the newest one began.
        differences: steps that did not reproduce.
    """

    task: ReplayTask | None = None
    count: int = 0
    last_step: int = -1
    differences: tuple[int, ...] = ()

    def up_to(self, step: int) -> "ReplayState":
        """Without differences at later steps, which the state after this step does not contain."""
        return replace(self, differences=tuple(differing for differing in self.differences if differing <= step))

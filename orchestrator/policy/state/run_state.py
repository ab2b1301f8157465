"""The values that a run's decisions are made from and lead to.

`RunState` is what a controller must remember: it is journalled at every change and is all that its successor needs.
`Observation` is what the controller sees at one moment. Which workers exist and what they are told follows from the
state alone (`RunState.worker_group`, `lifecycle.directive_of`), so the controller brings it about however often it is
asked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from orchestrator.policy.state.progress import Progress
from orchestrator.policy.state.world_size import SizeRequest
from orchestrator.protocol.events.base import Event
from orchestrator.protocol.events.run import Ended
from orchestrator.protocol.messages import (
    DesiredRunState,
    Fence,
    Finish,
    GenerationPlan,
    Phase,
    ReplayTask,
    Report,
    Restore,
    ShardWritten,
    StageStart,
    StoreAddress,
)
from orchestrator.protocol.scaling import UNLIMITED, Grant
from orchestrator.protocol.status import Recovery, Rescale, RunPhase
from orchestrator.sampling.micro_batches import UNSAID, MicroBatchSize

MAX_FAILURES = 256  # kept for judging what to do about the next one
USER_ERROR = "user_error"  # a WorkerError's kind: another worker would fail in the same way


@dataclass(frozen=True)
class WorkerFailure:
    """A failure: which worker on which node (empty: nobody's), in what way, after which finished step, and in which
    generation, if it tells of it itself."""

    worker: str
    node: str
    cause: str
    step: int
    time_s: float
    generation: int = -1


@dataclass(frozen=True)
class Probe:
    """What a worker had taken, in bytes, when its largest micro-batch had so many tokens, padding included."""

    worker: str
    sequence_length: int
    tokens: int
    resident_bytes: int


@dataclass(frozen=True)
class Transition:
    """A planned generation, from its plan to its activation.

    Args:
        first_step: its first step; None where it begins as soon as all are prepared.
        fence: where the current generation ends; None until all are prepared.
        failing_since_s: when it was first seen to fail with no culprit known.
    """

    plan: GenerationPlan
    first_step: int | None
    why: str
    fence: Fence | None = None
    failing_since_s: float | None = None

    def failing(self, now_s: float) -> "Transition":
        """The same, known to fail since now or longer."""
        return self if self.failing_since_s is not None else replace(self, failing_since_s=now_s)


@dataclass(frozen=True)
class QueueState:
    """The run's place in the cluster.

    Args:
        grant: what the Scheduler lets the run hold, received before step `granted_since` was done.
        since_s: since when the run has waited for a world of its own; None once it has one.
        admitted_s: when it was let out of the queue last.
        begun_s: when it first had a world then.
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
        account: what the recovery is known to cost so far.
    """

    generation: int = -1
    since_s: float | None = None
    account: Recovery | None = None


@dataclass(frozen=True)
class FailureState:
    """What failures have led to.

    Args:
        recent: the newest ones.
        spawns, transitions: failures in a row to start workers and to change the generation.
        quarantine: nodes that get no new workers.
        skips: steps whose batches are left out, because their loss exploded.
    """

    recent: tuple[WorkerFailure, ...] = ()
    spawns: int = 0
    transitions: int = 0
    quarantine: tuple[str, ...] = ()
    skips: tuple[int, ...] = ()

    def with_new(self, failures: Sequence[WorkerFailure]) -> "FailureState":
        """With more failures; the newest `MAX_FAILURES` are kept."""
        return replace(self, recent=(*self.recent, *failures)[-MAX_FAILURES:])


@dataclass(frozen=True)
class MicroBatchState:
    """How large micro-batches are to be from the next generation on.

    Args:
        size: unset for as they are.
        ceiling_tokens: too many tokens in a world of `ceiling_workers`; 0 where none is known.
        probes: what workers had taken when micro-batches were changed last.
    """

    size: MicroBatchSize = UNSAID
    ceiling_tokens: int = 0
    ceiling_workers: int = 0
    probes: tuple[Probe, ...] = ()


@dataclass(frozen=True)
class CurriculumState:
    """Stages of the curriculum that were decided.

    Args:
        version: counts decisions.
        requests: how many requests for a stage were heeded.
    """

    stages: tuple[StageStart, ...] = ()
    version: int = 0
    requests: int = 0


@dataclass(frozen=True)
class ReplayState:
    """Replay checks by a standby.

    Args:
        task: the one under way.
        count: how many were begun.
        last_step: the step after which the last one began.
        differences: steps that did not reproduce.
    """

    task: ReplayTask | None = None
    count: int = 0
    last_step: int = -1
    differences: tuple[int, ...] = ()

    def up_to(self, step: int) -> "ReplayState":
        """With those differences only that the state after this step is made of."""
        return replace(self, differences=tuple(differing for differing in self.differences if differing <= step))


@dataclass(frozen=True)
class RunState:
    """What a run is to be and has come to.

    Args:
        target: the newest request that was heeded.
        seq: counts decisions.
        worker_group: workers that should exist, oldest first.
        previous: the generation before `current`, whose shards of a checkpoint or snapshots may still be of use.
        activated, settled: newest generation that was activated; that has committed a step of its own.
        finish: how the fence ends the run, once it is raised.
        checkpoint_done: newest step with a complete checkpoint.
        draining: nodes that will soon be gone. `leaving`: workers that are to leave.
        straggler: a worker that is much slower than the others; empty for none.
        wants_restore: nobody holds a whole state any more, so checkpoints are looked through.
        restore: the checkpoint that a generation without a source begins from.
        outcome: None while the run goes on.
        why, traceback: of the newest failure, or of the end.
    """

    target: DesiredRunState
    seq: int = 0
    size_request: SizeRequest | None = None
    queue: QueueState = QueueState()
    worker_group: tuple[str, ...] = ()
    num_spawned: int = 0
    num_generations: int = 0
    previous: GenerationPlan | None = None
    current: GenerationPlan | None = None
    transition: Transition | None = None
    activated: int = -1
    settled: int = -1
    finish: Finish = Finish.NO
    checkpoint_done: int = -1
    abort: AbortState = AbortState()
    failures: FailureState = FailureState()
    micro_batch: MicroBatchState = MicroBatchState()
    draining: tuple[str, ...] = ()
    leaving: tuple[str, ...] = ()
    straggler: str = ""
    curriculum: CurriculumState = CurriculumState()
    replay: ReplayState = ReplayState()
    wants_restore: bool = False
    rescales: tuple[Rescale, ...] = ()
    recoveries: tuple[Recovery, ...] = ()
    restore: Restore | None = None
    outcome: RunPhase | None = None
    why: str = ""
    traceback: str = ""

    @property
    def next(self) -> GenerationPlan | None:
        """The generation that is being prepared or moved to."""
        return self.transition.plan if self.transition is not None else None

    @property
    def fence(self) -> Fence | None:
        """Where the current generation ends, once that is decided."""
        return self.transition.fence if self.transition is not None else None

    @property
    def is_ending(self) -> bool:
        """Whether it was asked to end, or is about to."""
        return any(finish is not Finish.NO for finish in (self.target.finish, self.finish))

    @property
    def is_queued(self) -> bool:
        """It waits for its place in the cluster, and holds nobody."""
        return self.queue.grant.workers == 0 and self.current is None

    @property
    def gives_way(self) -> bool:
        """It has a world, and stops to give all its places away and go on later. It finishes that once it has begun,
        whatever is granted meanwhile."""
        stops = self.queue.grant.workers == 0 or self.finish is not Finish.NO
        return self.current is not None and self.target.finish is Finish.NO and stops

    @property
    def members(self) -> tuple[str, ...]:
        return self.current.world.members if self.current else ()

    @property
    def needed(self) -> tuple[str, ...]:
        """Without whom the run can't go on: members of the current world; before the first, of the one planned."""
        return self.members or (self.next.world.members if self.next else ())

    @property
    def is_recovering(self) -> bool:
        """The current generation is over, and no other one has begun."""
        return self.current is not None and self.abort.generation >= self.current.generation

    @property
    def is_changing(self) -> bool:
        """Another generation is on its way, or has to be."""
        return self.current is None or self.next is not None or self.is_recovering

    @property
    def involved(self) -> tuple[str, ...]:
        """Members of the current world, and whoever has a part in the move to the next one."""
        return tuple(dict.fromkeys(self.members + (self.next.involved if self.next else ())))


@dataclass(frozen=True)
class StateDecided(Event, kind="state", internal=True):
    """The newest decisions: what a controller goes on from."""

    state: RunState


@dataclass(frozen=True)
class Observation:
    """What a controller sees: the newest report of every worker that answered, who is gone and why, and the rest.

    `lost` holds workers of the worker group whose process has ended, `causes` the class of that failure where it is
    known. `checkpointed` is the newest step with a checkpoint's marker, `restorable` the newest good one, if
    `wants_restore` asked for it; `unreadable` says why that can't be known now. `nodes` tells where workers live,
    `silence_s` for how long they haven't answered, and `idle_s` for how long no worker has said anything new.
    `store_address` is the rendezvous store's, None while there is none: no generation can be planned then. `faults` are
    things outside the workers without which the run can't go on. `draining` holds the cluster's nodes that will be
    taken away, with `time.time()` of the deadline, 0 without one. `grant` is the newest one of the Scheduler.
    """

    term: int
    now_s: float
    target: DesiredRunState
    progress: Progress
    reports: Mapping[str, Report] = field(default_factory=dict)
    lost: Mapping[str, str] = field(default_factory=dict)
    checkpointed: int = -1
    restorable: Restore | None = None
    unreadable: str = ""
    causes: Mapping[str, str] = field(default_factory=dict)
    nodes: Mapping[str, str] = field(default_factory=dict)
    silence_s: Mapping[str, float] = field(default_factory=dict)
    idle_s: float = 0.0
    store_address: StoreAddress | None = None
    faults: tuple[str, ...] = ()
    draining: Mapping[str, float] = field(default_factory=dict)
    grant: Grant = UNLIMITED

    def phase(self, worker: str) -> Phase:
        """COLD too if the worker never answered."""
        report = self.reports.get(worker)
        return report.phase if report else Phase.COLD

    @property
    def committed(self) -> int:
        """The newest step that can't be lost any more, as far as votes or a checkpoint's marker tell."""
        return max([self.progress.watermark, self.checkpointed, *(r.committed for r in self.reports.values())])

    @property
    def step(self) -> int:
        """The newest finished step that anybody knows of; -1 before the first."""
        return max([self.progress.watermark, *(report.step for report in self.reports.values())])


@dataclass(frozen=True)
class Commit:
    """All shards of a checkpoint are in run storage: write its marker. `term` is that of the generation's plan."""

    step: int
    term: int
    generation: int
    shards: tuple[ShardWritten, ...]


@dataclass(frozen=True)
class KillWorker:
    """End a worker's process, which doesn't answer, by its id on its node."""

    worker: str


Action = Event | Commit | KillWorker


@dataclass(frozen=True)
class Decision:
    """A new state, and what to do besides."""

    state: RunState
    actions: tuple[Action, ...] = ()

    def then(self, *actions: Action, **changes: Any) -> "Decision":
        """This decision with `changes` to the state's fields, and more actions."""
        return Decision(replace(self.state, **changes), self.actions + actions)


def ended(state: RunState, outcome: RunPhase, why: str, traceback: str = "") -> Decision:
    """The run is over: nobody of the worker group is needed any more."""
    over = replace(state, outcome=outcome, why=why, traceback=traceback, worker_group=(), transition=None)
    return Decision(over, (Ended(outcome.value, why),))

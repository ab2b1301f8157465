"""The values that a run's decisions are made from and lead to.

`RunState` is what a controller must remember: it is journalled at every change and is all that its successor needs.
`Observation` is what the controller sees at one moment. Which workers exist and what they are told follows from the
state alone (`RunState.worker_group`, `lifecycle.directive_of`), so the controller brings it about however often it is
asked.
"""

from collections.abc import Mapping
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
class RunState:
    """What a run is to be and has come to.

    `worker_group` names the workers that should exist, oldest first. `next` is the generation being prepared or moved
    to, `next_first_step` its first step if that is fixed, `next_why` the reason. `previous` is the generation before
    `current`, whose shards of a checkpoint or snapshots may still be of use. `failed_spawns` and `failed_moves` count
    failures in a row; `broken_s` is when a move was first seen to fail, with no culprit known.

    `aborted` is the newest generation that was ended because somebody in it was lost, at `aborted_s`; until another one
    is activated the run recovers, and `recovery` is the account of that so far. `settled` is the newest generation that
    has a committed step of its own. `losses` are the newest members lost.

    `wants_restore`: nobody has a whole state any more, so checkpoints are looked through. `restore` is the one that a
    generation without a source begins from. `outcome` is None while the run goes on. `traceback` is that of the
    worker's error that `why` tells of. `micro_batch` is how much a micro-batch is to take from the next generation on;
    if it says nothing, what it takes now. `micro_batch_ceiling` is a number of tokens that were too many in a world of
    `ceiling_size`; `probes` tell what workers had taken when micro-batches were changed last. `skips` are steps whose
    batches are left out; `quarantine` names nodes that get no new workers, `draining` nodes that will soon be gone,
    `leaving` workers that are to leave, `straggler` one that is much slower than the others. `stages` are those that
    were decided, `stages_version` counts decisions, and `stage_wishes` those that were asked for and are decided.

    `check` is what a standby does again, `num_checks` counts those that were begun, `check_step` is the step after
    which the last one began, and `differences` are the steps that didn't come out again as they had.

    `grant` is what the Scheduler lets the run hold, heard before step `granted_since` was done. `queued_s` is since
    when it has waited for a world of its own, None once it has one; `admitted_s` is when it was last given its place in
    the cluster, `begun_s` when it first had a world there.
    """

    target: DesiredRunState
    seq: int = 0
    size_request: SizeRequest | None = None
    grant: Grant = UNLIMITED
    granted_since: int = 0
    queued_s: float | None = None
    admitted_s: float | None = None
    begun_s: float | None = None
    worker_group: tuple[str, ...] = ()
    num_spawned: int = 0
    num_generations: int = 0
    previous: GenerationPlan | None = None
    current: GenerationPlan | None = None
    next: GenerationPlan | None = None
    next_first_step: int | None = None
    next_why: str = ""
    fence: Fence | None = None
    activated: int = -1
    finish: Finish = Finish.NO
    checkpoint_done: int = -1
    failed_spawns: int = 0
    failed_transitions: int = 0
    broken_s: float | None = None
    aborted: int = -1
    aborted_s: float | None = None
    settled: int = -1
    failures: tuple[WorkerFailure, ...] = ()
    micro_batch: MicroBatchSize = UNSAID
    micro_batch_ceiling: int = 0
    ceiling_size: int = 0
    probes: tuple[Probe, ...] = ()
    skips: tuple[int, ...] = ()
    quarantine: tuple[str, ...] = ()
    draining: tuple[str, ...] = ()
    leaving: tuple[str, ...] = ()
    straggler: str = ""
    stages: tuple[StageStart, ...] = ()
    stages_version: int = 0
    stage_requests: int = 0
    check: ReplayTask | None = None
    num_checks: int = 0
    check_step: int = -1
    differences: tuple[int, ...] = ()
    recovery: Recovery | None = None
    wants_restore: bool = False
    rescales: tuple[Rescale, ...] = ()
    recoveries: tuple[Recovery, ...] = ()
    restore: Restore | None = None
    outcome: RunPhase | None = None
    why: str = ""
    traceback: str = ""

    @property
    def is_ending(self) -> bool:
        """Whether it was asked to end, or is about to."""
        return any(finish is not Finish.NO for finish in (self.target.finish, self.finish))

    @property
    def is_queued(self) -> bool:
        """It waits for its place in the cluster, and holds nobody."""
        return self.grant.workers == 0 and self.current is None

    @property
    def gives_way(self) -> bool:
        """It has a world, and stops to give all its places away and go on later. It finishes that once it has begun,
        whatever is granted meanwhile."""
        stops = self.grant.workers == 0 or self.finish is not Finish.NO
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
        return self.current is not None and self.aborted >= self.current.generation

    @property
    def is_changing(self) -> bool:
        """Another generation is on its way, or has to be."""
        return self.current is None or self.next is not None or self.is_recovering

    def differences_in(self, step: int) -> tuple[int, ...]:
        """Those that the state after this step is made of."""
        return tuple(differing for differing in self.differences if differing <= step)

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
    over = replace(state, outcome=outcome, why=why, traceback=traceback, worker_group=(), next=None, fence=None)
    return Decision(over, (Ended(outcome.value, why),))

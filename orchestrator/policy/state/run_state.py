"""Inputs and outputs of a run's decisions.

`RunState` is the controller's memory: it is journalled at every change, and a successor needs nothing else.
`Observation` is the controller's view at one moment. The workers that should exist and the directive that they receive
follow from the state alone (`RunState.worker_group`, `lifecycle.directive_of`), so applying it is idempotent.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from orchestrator.policy.state.expert_changes import ExpertChanges, Known
from orchestrator.policy.state.progress import Progress
from orchestrator.policy.state.run_parts import (
    AbortState,
    CheckpointInterval,
    CurriculumDecisions,
    ExpertBalance,
    FailureState,
    KeeperState,
    MicroBatchState,
    QueueState,
    ReplayState,
    Transition,
)
from orchestrator.policy.state.world_size import SizeRequest
from orchestrator.protocol.events.base import Event
from orchestrator.protocol.events.run import Ended
from orchestrator.protocol.messages import (
    DesiredRunState,
    Fence,
    FinishMode,
    GenerationPlan,
    Restore,
    StoreAddress,
)
from orchestrator.protocol.scaling import UNLIMITED, Grant
from orchestrator.protocol.status import Recovery, Rescale, RunPhase
from orchestrator.protocol.worker_phase import Phase
from orchestrator.protocol.worker_report import Report, ShardWritten

USER_ERROR = "user_error"  # a WorkerError's kind: another worker would fail in the same way
UNHEARD = Report(worker="", term=-1, version=-1, phase=Phase.COLD, generation=-1, step=-1, seen=-1)


@dataclass(frozen=True)
class RunState:
    """Desired and actual state of a run.

    Args:
        target: the newest request that was applied.
        seq: counts decisions.
        worker_group: workers that should exist, oldest first.
        previous: the generation before `current`, whose checkpoint shards or snapshots may still be needed.
        activated, settled: newest generation that was activated; newest one that has committed a step.
        finish: how the fence ends the run, once it is raised.
        checkpoint_done, checkpoint_generation: of the newest complete checkpoint, its step and who wrote it.
        draining: nodes that are being drained. `leaving`: workers that are to leave.
        straggler: a worker that is much slower than the others; empty for none.
        priority: set for this run; None for the job's.
        wants_restore: search for a checkpoint: no live workers hold a whole state, or a preempted run has written one.
        restore: the checkpoint that a generation without a source begins from.
        outcome: None until the run has ended.
        why, traceback: of the newest failure, or of the end.
    """

    target: DesiredRunState
    seq: int = 0
    size_request: SizeRequest | None = None
    queue: QueueState = field(default_factory=QueueState)
    priority: int | None = None
    worker_group: tuple[str, ...] = ()
    num_spawned: int = 0
    num_generations: int = 0
    previous: GenerationPlan | None = None
    current: GenerationPlan | None = None
    transition: Transition | None = None
    activated: int = -1
    settled: int = -1
    finish: FinishMode = FinishMode.NO
    checkpoint_done: int = -1
    checkpoint_generation: int = -1
    checkpoint_interval: CheckpointInterval = field(default_factory=CheckpointInterval)
    abort: AbortState = field(default_factory=AbortState)
    failures: FailureState = field(default_factory=FailureState)
    micro_batch: MicroBatchState = field(default_factory=MicroBatchState)
    draining: tuple[str, ...] = ()
    leaving: tuple[str, ...] = ()
    straggler: str = ""
    curriculum: CurriculumDecisions = field(default_factory=CurriculumDecisions)
    replay: ReplayState = field(default_factory=ReplayState)
    keeping: KeeperState = field(default_factory=KeeperState)
    balance: ExpertBalance = field(default_factory=ExpertBalance)
    experts: ExpertChanges = field(default_factory=ExpertChanges)
    wants_restore: bool = False
    rescales: tuple[Rescale, ...] = ()
    recoveries: tuple[Recovery, ...] = ()
    restore: Restore | None = None
    outcome: RunPhase | None = None
    why: str = ""
    traceback: str = ""

    @property
    def next(self) -> GenerationPlan | None:
        """The generation that is being prepared or that the world is in transition to."""
        return self.transition.plan if self.transition is not None else None

    @property
    def fence(self) -> Fence | None:
        """Where the current generation ends, once that is decided."""
        return self.transition.fence if self.transition is not None else None

    @property
    def is_ending(self) -> bool:
        """Whether the run was asked to end, or is about to."""
        return any(finish is not FinishMode.NO for finish in (self.target.finish, self.finish))

    @property
    def is_queued(self) -> bool:
        """Whether the run waits for admission to the cluster and has no world."""
        return self.queue.grant.workers == 0 and self.current is None

    @property
    def gives_way(self) -> bool:
        """Whether the run is being preempted: it has a world, releases all its workers and resumes later. Once begun
        this is completed, even if workers are granted again meanwhile."""
        stops = self.queue.grant.workers == 0 or self.finish is not FinishMode.NO
        return self.current is not None and self.target.finish is FinishMode.NO and stops

    @property
    def checkpoint(self) -> tuple[int, int]:
        """(generation, step) of the newest complete checkpoint. One of a later generation is newer, even at a lower
        step: the run may have gone back behind an older checkpoint."""
        return self.checkpoint_generation, self.checkpoint_done

    @property
    def members(self) -> tuple[str, ...]:
        return self.current.world.members if self.current else ()

    @property
    def needed(self) -> tuple[str, ...]:
        """Workers without which the run can't continue: members of the current world, before the first of the plan."""
        return self.members or (self.next.world.members if self.next else ())

    @property
    def is_recovering(self) -> bool:
        """Whether the current generation was aborted and no other one is active yet."""
        return self.current is not None and self.abort.generation >= self.current.generation

    @property
    def is_changing(self) -> bool:
        """Whether another generation is planned, or has to be."""
        return self.current is None or self.next is not None or self.is_recovering

    @property
    def involved(self) -> tuple[str, ...]:
        """Members of the current world, and all workers in the transition to the next one."""
        return tuple(dict.fromkeys(self.members + (self.next.involved if self.next else ())))


@dataclass(frozen=True)
class StateDecided(Event, kind="state", internal=True):
    """The newest decisions, from which a successor controller continues."""

    state: RunState


@dataclass(frozen=True)
class Observation:
    """A controller's view of its run at one moment.

    Args:
        reports, gone: newest report of every worker that answered; last report of each worker that is gone.
        lost, causes: workers of the group whose process has ended, with the reason; the class of failure where known.
        checkpointed: (generation, step) of the newest complete checkpoint.
        checkpoints: directories of all complete checkpoints, by step.
        abandoned: (generation, step) of checkpoints that won't be completed.
        recording: newest step whose record is in the journal, or is about to be.
        restorable: newest good checkpoint, if `wants_restore` asked for it; known once `is_searching` ends.
        unreadable: why it can't be read now; empty if it can.
        nodes: node of each worker.
        silence_s, idle_s: time since the last answer of each worker; since any worker reported something new.
        store_address: of the rendezvous store; None while there is none, when no generation can be planned.
        faults: failures outside the workers that end the run.
        draining: nodes that will be removed from the cluster, with the deadline in `time.time()`, 0 without one.
        grant, priority: newest grant of the Scheduler; newest requested priority, None for the job's.
    """

    term: int
    now_s: float
    target: DesiredRunState
    progress: Progress
    reports: Mapping[str, Report] = field(default_factory=dict)
    lost: Mapping[str, str] = field(default_factory=dict)
    gone: Mapping[str, Report] = field(default_factory=dict)
    checkpointed: tuple[int, int] = (-1, -1)
    checkpoints: Mapping[int, str] = field(default_factory=dict)
    abandoned: Collection[tuple[int, int]] = ()
    recording: int = -1
    restorable: Restore | None = None
    is_searching: bool = False
    unreadable: str = ""
    causes: Mapping[str, str] = field(default_factory=dict)
    nodes: Mapping[str, str] = field(default_factory=dict)
    silence_s: Mapping[str, float] = field(default_factory=dict)
    idle_s: float = 0.0
    store_address: StoreAddress | None = None
    faults: tuple[str, ...] = ()
    draining: Mapping[str, float] = field(default_factory=dict)
    grant: Grant = UNLIMITED
    priority: int | None = None

    def report(self, worker: str) -> Report:
        """The worker's newest report; UNHEARD if it never answered."""
        return self.reports.get(worker, UNHEARD)

    def phase(self, worker: str) -> Phase:
        """The worker's phase; COLD if it never answered."""
        return self.report(worker).phase

    @property
    def committed(self) -> int:
        """The newest committed step, by members' reports or a complete checkpoint; without a second holder, the newest
        finished one."""
        return max(
            [self.progress.watermark, self.checkpointed[1], *(r.protection.committed for r in self.reports.values())]
        )

    @property
    def experts(self) -> Known:
        """What is known of the experts: workers report averages before the steps are published that these are of."""
        reported = [r.history.saliency for r in self.reports.values() if r.history.saliency is not None]
        saliency = dict([*self.progress.saliency, *reported])
        return Known(self.progress.watermark, tuple(sorted(saliency.items())), self.progress.loads.mean_LE)

    @property
    def step(self) -> int:
        """The newest finished step in any report or received record; -1 before the first."""
        return max([self.progress.watermark, *(report.step for report in self.reports.values())])


@dataclass(frozen=True)
class Commit:
    """All shards of a checkpoint are in run storage: complete it. `term` is that of the generation's plan."""

    step: int
    term: int
    generation: int
    shards: tuple[ShardWritten, ...]


@dataclass(frozen=True)
class KillWorker:
    """Kill an unresponsive worker's process, by its id on its node."""

    worker: str


Action = Event | Commit | KillWorker


@dataclass(frozen=True)
class Decision:
    """A new state, and the actions to take."""

    state: RunState
    actions: tuple[Action, ...] = ()

    def then(self, *actions: Action, **changes: Any) -> "Decision":
        """This decision with `changes` to the state's fields, and more actions."""
        return Decision(replace(self.state, **changes), self.actions + actions)


def ended(state: RunState, outcome: RunPhase, why: str, traceback: str = "") -> Decision:
    """The decision that ends the run and releases the whole worker group."""
    over = replace(state, outcome=outcome, why=why, traceback=traceback, worker_group=(), transition=None)
    return Decision(over, (Ended(outcome.value, why),))

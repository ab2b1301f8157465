"""Workers and a controller as a pure simulation, to live whole runs through `policy.lifecycle` without a process.

`Life.tick` lets every worker do one thing and the controller decide once. Time is counted in ticks of a second.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from orchestrator.elastic.recovery_point import Holding
from orchestrator.policy.health.expert_load import rank_violation
from orchestrator.policy.health.stragglers import slowest
from orchestrator.policy.lifecycle import decide, directive_of, first_state
from orchestrator.policy.publication import publishable
from orchestrator.policy.state.config import RunLimits
from orchestrator.policy.state.expert_changes import experts_at
from orchestrator.policy.state.progress import Progress, absorb
from orchestrator.policy.state.run_state import Commit, KillWorker, Observation, RunState
from orchestrator.protocol.changes import changed
from orchestrator.protocol.codec import from_plain, to_plain
from orchestrator.protocol.events.base import Event
from orchestrator.protocol.expert_load import ExpertLoad, Loads
from orchestrator.protocol.messages import (
    DesiredRunState,
    Directive,
    ExpertRequest,
    FinishMode,
    GenerationPlan,
    Keeper,
    Restore,
    StoreAddress,
)
from orchestrator.protocol.scaling import UNLIMITED, Grant
from orchestrator.protocol.step_record import BatchRecord, Saliency, StepRecord, StepTiming, UpdateRecord
from orchestrator.protocol.worker_phase import Phase
from orchestrator.protocol.worker_report import (
    CHECKPOINT_CORRUPT,
    Handover,
    MicroBatchMemory,
    Report,
    ShardWritten,
    WorkerError,
)

FIRST_STORE = StoreAddress("10.0.0.1", 1)


def limits_of(**changes: object) -> RunLimits:
    """Twelve steps on two workers, one to four allowed."""
    defaults: dict[str, object] = {
        "run_id": "run",
        "steps": 12,
        "min_workers": 1,
        "max_workers": 4,
        "initial_workers": 2,
        "standby": 0,
        "num_experts": 8,
    }
    return RunLimits(**(defaults | changes))  # type: ignore[arg-type]


def record(
    step: int, generation: int = 0, vote_time: float = 0.0, step_s: float = 1.0, **changes: object
) -> StepRecord:
    plain = StepRecord(
        step=step,
        generation=generation,
        world_size=2,
        loss=4.0 - 0.01 * step,
        batch=BatchRecord(tokens=100, first_position=step * 16, num_positions=16),
        update=UpdateRecord(lr=0.1, grad_norm=1.0, applied=True),
        timing=StepTiming(step_s, vote_time),
    )
    return changed(plain, **changes)


@dataclass
class Life:
    """A run and its imagined workers. `checkpoint_every` steps the members write shards."""

    limits: RunLimits
    checkpoint_every: int | None = None
    target: DesiredRunState = field(init=False)
    state: RunState = field(init=False)
    progress: Progress = field(default_factory=Progress)
    reports: dict[str, Report] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    notes: list[Event] = field(default_factory=list)
    committed: int = -1  # newest marked checkpoint
    committed_by: int = -1  # its generation
    marked: list[int] = field(default_factory=list)  # steps with a checkpoint of this past
    refuses_markers: bool = False  # storage does
    damaged: set[int] = field(default_factory=set)  # generations whose checkpoints can't be completed
    abandoned: set[tuple[int, int]] = field(default_factory=set)  # (generation, step) of those that weren't
    spoilt: set[int] = field(default_factory=set)  # steps whose checkpoint has other digests now
    unreadable: str = ""  # why checkpoints can't be read
    restorable: Restore | None = None  # whatever is marked
    rotten: set[int] = field(default_factory=set)  # steps whose checkpoint is found damaged by the last rank only
    misreads: set[str] = field(default_factory=set)  # workers that find damage in any checkpoint
    now_s: float = 0.0
    pending: dict[int, StepRecord] = field(default_factory=dict)  # finished, but not known to be committed
    done_by: list[tuple[str, ...]] = field(default_factory=list)  # per step, who did it last
    experts_by: list[int] = field(default_factory=list)  # per step, the number of experts that did it last
    began: dict[int, int] = field(default_factory=dict)  # last step before a generation, by its number
    replayed: int = 0  # steps done again
    snapshots: dict[tuple[str, Holding], bool] = field(default_factory=dict)  # who keeps what
    keeper: Keeper | None = None  # the one that a lone member is connected to
    frozen: set[str] = field(default_factory=set)  # workers that do nothing
    holds_still: bool = False  # no step gets done
    nodes: dict[str, str] = field(default_factory=dict)
    causes: dict[str, str] = field(default_factory=dict)
    gone: dict[str, Report] = field(default_factory=dict)  # last reports of workers that were killed
    draining: dict[str, float] = field(default_factory=dict)
    slow: dict[str, float] = field(default_factory=dict)  # times the others' time for a step
    store: StoreAddress | None = FIRST_STORE
    measured: Callable[[str, GenerationPlan], MicroBatchMemory] | None = (
        None  # what a worker says its micro-batches take
    )
    loads: Loads = ()  # of each step
    saliency: dict[int, Saliency] = field(default_factory=dict)  # of steps whose records have it
    step_s: Callable[[GenerationPlan], float] | None = None  # duration of steps of a generation
    grant: Grant = UNLIMITED
    priority: int | None = None
    directive: Directive = field(init=False)

    def __post_init__(self) -> None:
        self.state = first_state(self.limits)
        self.target = self.state.target
        self.directive = directive_of(self.state, 1)

    def seen(self, **changes: object) -> Observation:
        plain = Observation(
            term=1,
            now_s=self.now_s,
            target=self.target,
            progress=self.progress,
            reports={w: r for w, r in self.reports.items() if w not in self.lost},
            lost={w: why for w, why in self.lost.items() if w in self.state.worker_group},
            nodes=dict(self.nodes),
            causes=dict(self.causes),
            gone=dict(self.gone),
            checkpointed=(self.committed_by, self.committed),
            checkpoints={self.committed: f"/checkpoints/{self.committed}"} if self.committed >= 0 else {},
            abandoned=frozenset(self.abandoned),
            restorable=self._restorable(),
            unreadable=self.unreadable if self.state.wants_restore else "",
            store_address=self.store,
            draining=dict(self.draining),
            grant=self.grant,
            priority=self.priority,
        )
        return replace(plain, **changes)  # type: ignore[arg-type]

    def _restorable(self) -> Restore | None:
        if self.restorable is not None:
            return self.restorable
        bad = self.spoilt | (self.rotten if self.state.current is None else set())  # then they are read whole
        good = [step for step in self.marked if step not in bad and not self.unreadable]
        return Restore(good[-1], f"step-{good[-1]}") if good else None

    def tick(self) -> None:
        """The controller decides, then every worker does one thing."""
        before = self.state
        decision = decide(self.limits, self.state, self.seen())
        if decision.state != before:  # what a successor would have to continue from is what we continue from
            self.state = from_plain(RunState, json.loads(json.dumps(to_plain(decision.state))))
            assert self.state == decision.state
        assert self.state.num_generations >= before.num_generations
        plan = self.state.next
        if plan is not None and plan.source is not None:  # a change is made once
            assert plan.experts_before == plan.source.placement.num_experts
        for action in decision.actions:
            if isinstance(action, Commit) and action.generation in self.damaged:
                self.abandoned.add((action.generation, action.step))
            elif isinstance(action, Commit) and not self.refuses_markers:
                self.committed, self.committed_by = action.step, action.generation
                self.marked = [*(step for step in self.marked if step < action.step), action.step]
                self.spoilt -= {action.step}
            elif isinstance(action, KillWorker):
                self.lost[action.worker] = "killed by its controller"
            else:
                self.notes.append(action)
        self.directive = directive_of(self.state, 1)
        self._publish()
        self.now_s += 1
        for worker in list(self.reports):
            if worker not in self.state.worker_group:
                del self.reports[worker]  # dismissed
        for worker in self.state.worker_group:
            if worker not in self.lost and worker not in self.frozen:
                self._obey(worker)
        self._train()

    def run_until(self, condition: Callable[[], bool], max_ticks: int = 200) -> None:
        for _ in range(max_ticks):
            if condition():
                return
            self.tick()
        raise AssertionError(f"not reached in {max_ticks} ticks; {self.state}\n{self.reports}")

    def run_to_the_end(self) -> None:
        self.run_until(lambda: self.state.outcome is not None)

    def scale(self, workers: int) -> None:
        self.target = DesiredRunState(seq=self.target.seq + 1, workers=workers)

    def rebalance(self) -> None:
        target = self.target
        self.target = replace(target, seq=target.seq + 1, rebalances=target.rebalances + 1)

    def set_experts(self, num_experts: int, **more: Any) -> None:
        """A user asks for another number of experts."""
        target = self.target
        request = ExpertRequest(target.experts.number + 1, num_experts, **more)
        self.target = replace(target, seq=target.seq + 1, experts=request)

    def stop_run(self, how: FinishMode = FinishMode.STOP) -> None:
        self.target = DesiredRunState(seq=self.target.seq + 1, workers=self.target.workers, finish=how)

    def kill(self, worker: str) -> None:
        """It is gone at once; peers that train or move with it notice."""
        self.lost[worker] = "killed by signal 9"
        self.gone |= {worker: self.reports[worker]} if worker in self.reports else {}
        self._part(worker)
        for peer in self.state.involved:
            report = self.reports.get(peer)
            if report is None or peer == worker or peer in self.lost or peer in self.frozen:
                continue
            if worker in self.state.members and report.phase in (Phase.TRAINING, Phase.MOVING):
                self.stop(peer)

    def stop(self, worker: str) -> None:
        """It leaves its generation and reports the state that it holds."""
        assert self.state.current is not None
        error = WorkerError("peer_lost", "a connection was closed")
        stopped = self.state.current.generation
        self.say(worker, phase=Phase.STRANDED, stopped=stopped, holdings=self.held_by(worker), error=error)

    def _part(self, worker: str) -> None:
        """The connection between a lone member and its keeper ends with either of them."""
        keeper = self.keeper
        if keeper is None or worker not in (keeper.worker, *self.state.members):
            return
        self.keeper = None
        if worker == keeper.worker:
            self.say(self.state.members[0], unkept=keeper.number)
        else:
            self.say(keeper.worker, unkept=keeper.number, holdings=self.held_by(keeper.worker))

    def _meet_keeper(self) -> None:
        """A lone member connects to the newest keeper, which gets its state at once."""
        current, keeper = self.state.current, next(reversed(self.directive.keepers), None)
        if self.keeper is not None and (current is None or self.keeper.generation != current.generation):
            self.keeper = None
        if current is None or keeper is None or keeper.generation != current.generation or keeper == self.keeper:
            return
        if keeper.worker not in self.lost and keeper.worker not in self.frozen:
            self.keeper = keeper
            self._snapshot(current.world.members[0])

    def held_by(self, worker: str) -> tuple[Holding, ...]:
        return tuple(holding for keeper, holding in self.snapshots if keeper == worker)

    def say(self, worker: str, **changes: object) -> None:
        old = self.reports.get(worker) or Report(worker, 1, 0, Phase.COLD, -1, -1, -1)
        self.reports[worker] = changed(old, version=old.version + 1, **changes)

    def of_kind(self, kind: str) -> list[Any]:
        return [note for note in self.notes if note.kind == kind]

    @property
    def sizes(self) -> list[int]:
        """World size of each step done."""
        return [len(members) for members in self.done_by]

    @property
    def step(self) -> int:
        return len(self.done_by) - 1

    def _obey(self, worker: str) -> None:
        report = self.reports.get(worker)
        if report is None:
            return self.say(worker)
        if report.phase is Phase.COLD:
            return self.say(worker, phase=Phase.WARMING)
        if report.phase is Phase.WARMING:
            return self.say(worker, phase=Phase.STANDBY)
        order = self.directive
        self.say(worker, seen=order.seq)
        current = self.state.current
        is_over = current is not None and order.aborted >= current.generation and worker in current.world
        if is_over and report.phase in (Phase.TRAINING, Phase.MOVING, Phase.FINISHED):
            return self.stop(worker)
        if (
            order.next is not None
            and worker in self.state.involved
            and report.transition.prepared < order.next.generation
        ):
            if order.next.store_address == self.store and all(w not in self.lost for w in order.next.involved):
                self.say(worker, prepared=order.next.generation)
            return None
        self._move(worker)
        self._settle(worker)
        return None

    def _move(self, worker: str) -> None:
        """What a worker does behind a fence, or for the first generation."""
        order, report = self.directive, self.reports[worker]
        if order.next is None or (worker not in order.next.world and order.current is None):
            return
        generation = order.next.generation
        begun = order.next.source is None or order.next.source.step is not None or self._fenced()
        joins = worker in order.next.world and begun
        moves = (
            report.phase in (Phase.MOVING, Phase.STRANDED)
            or (report.phase is Phase.READY and report.generation < generation)  # of a move that failed others
            or (report.phase is Phase.STANDBY and joins)
        )
        if not moves or report.transition.prepared < generation:
            return
        if any(peer in self.lost for peer in order.next.involved):
            if report.transition.failed_generation < generation:
                holdings = self.held_by(worker)
                is_stranded = order.next.source is not None and worker in order.next.source.world
                phase = Phase.STRANDED if is_stranded else Phase.STANDBY
                self.say(worker, phase=phase, failed_generation=generation, holdings=holdings)
        elif order.next.restore and self._finds_damage(worker, order.next):
            error = WorkerError(CHECKPOINT_CORRUPT, "shard-00001: block 3 has another sha256")
            self.say(worker, phase=Phase.STANDBY, failed_generation=generation, error=error)
        elif worker in order.next.involved:
            if order.next.source is None or order.next.source.step is not None:
                self._go_back(order.next)
            handover = Handover(generation, self.step, 0.0, 0.0, 0.0, 0.0, 10, 20, True)
            holdings = self.held_by(worker)
            self.say(
                worker,
                phase=Phase.READY,
                generation=generation,
                handovers=(handover,),
                holdings=holdings,
                error=None,
                step=self.step,
            )

    def _finds_damage(self, worker: str, plan: GenerationPlan) -> bool:
        """Whether this worker finds the checkpoint damaged from which the generation is to begin."""
        assert plan.restore is not None
        is_rotten = plan.restore.step in self.rotten and worker == plan.world.members[-1]
        return worker in plan.world and (is_rotten or worker in self.misreads)

    def _go_back(self, plan: GenerationPlan) -> None:
        """The state is that of an earlier step: what came after it is done again."""
        step = plan.source.step if plan.source else plan.restore.step if plan.restore else -1
        assert step is not None
        if plan.source is not None:  # whoever is named really has it
            for rank, holder in enumerate(plan.source.holders):
                holding = Holding(plan.source.world.generation, step, rank)
                assert (holder, holding) in self.snapshots, f"{holder} has no {holding}"
        self.replayed += len(self.done_by) - 1 - step
        del self.done_by[step + 1 :], self.experts_by[step + 1 :]

    def _settle(self, worker: str) -> None:
        """After an activation members train and leavers stand by."""
        order, report = self.directive, self.reports[worker]
        if order.current is None or order.next is not None:
            return
        if worker in order.current.world and order.activated == order.current.generation:
            if report.phase is Phase.READY and report.generation == order.activated:
                self.say(worker, phase=Phase.TRAINING, step=self.step, holdings=())
                self._snapshot(worker)
        elif report.phase in (Phase.MOVING, Phase.READY):
            self.say(worker, phase=Phase.STANDBY)

    def _publish(self) -> None:
        """What can't be lost any more, and comes next, becomes known."""
        safe = publishable(self.limits, self.state, self.seen())
        while (step := self.progress.watermark + 1) <= safe and step in self.pending:
            self.progress = absorb(self.progress, [self.pending.pop(step)])

    def _rank_violation(self, plan: GenerationPlan) -> float | None:
        if not self.loads:
            return None
        layers = self.limits.moe_layers or ("",) * len(self.loads)
        shares_LEW = np.array([plan.placement.shares((), layer) for layer in layers])
        return rank_violation(np.array(self.loads), shares_LEW)

    def _snapshot(self, worker: str) -> None:
        """Its state, with itself and with its buddy; of the newest two steps."""
        plan = self.state.current
        assert plan is not None
        rank = plan.world.rank_of(worker)
        keepers = [worker, *(plan.world.members[ring[rank]] for ring in plan.rings)]
        keepers += [self.keeper.worker] if self.keeper is not None else []
        for keeper in keepers:
            self.snapshots[(keeper, Holding(plan.generation, self.step, rank))] = True
        self.snapshots = {
            (keeper, h): True
            for keeper, h in self.snapshots
            if h.generation != plan.generation or h.step > self.step - 2
        }

    def _fenced(self) -> bool:
        fence = self.directive.fence
        return fence is not None and (fence.at_step is None or self.step >= fence.at_step)

    def _train(self) -> None:
        """One step, if all members train; the vote is taken at its end."""
        current = self.state.current
        if self.holds_still or current is None or any(w in self.lost for w in current.world.members):
            return
        members = current.world.members
        if any(w not in self.reports or self.reports[w].phase is not Phase.TRAINING for w in members):
            return
        if self.step + 1 == self.limits.steps:  # a loss after the last step: only its checkpoint is missing
            for rank, worker in enumerate(members):
                shard = ShardWritten(self.step, current.generation, rank, f"rank-{rank}", 0, "", "")
                self.say(worker, phase=Phase.FINISHED, shards=(*self.reports[worker].shards, shard))
            return
        self._meet_keeper()
        is_made = current.change is not None and self.began.setdefault(current.generation, self.step) == self.step
        if self.step + 1 == current.until_step and not is_made:  # a generation with other experts does it
            for worker in members if self._fenced() else ():
                self.say(worker, phase=Phase.MOVING)
            return
        assert experts_at(self.limits, self.state.experts, self.step + 1) == current.experts
        self.done_by.append(members)
        self.experts_by.append(current.experts.num_experts)
        is_held_twice = current.buddies or self.keeper is not None
        committed = self.step - 1 if is_held_twice else self.step  # each had its buddy's answer before it voted
        kept_by = self.keeper.number if self.keeper is not None else -1
        rank, slowness = slowest([self.slow.get(worker, 1.0) for worker in members])
        step_s = 1.0 if self.step_s is None else self.step_s(current)
        self.pending[self.step] = record(
            self.step,
            current.generation,
            self.now_s,
            step_s,
            slowest=rank,
            slowness=slowness,
            loads=self.loads,
            saliency=self.saliency.get(self.step, ()),
            experts=ExpertLoad(rank_violation=self._rank_violation(current)),
        )
        for worker in members:
            micro_batches = self.measured(worker, current) if self.measured else None
            fields = {"committed": committed, "settled": current.generation, "kept_by": kept_by}
            fields |= {"held": committed} if is_held_twice else {}
            self.say(worker, micro_batches=micro_batches, **fields)
            self._snapshot(worker)
        self._publish()
        last = self.step + 1 == self.limits.steps or self.directive.finish is not FinishMode.NO
        write = last or (self.checkpoint_every and (self.step + 1) % self.checkpoint_every == 0)
        for rank, worker in enumerate(members):
            shards = self.reports[worker].shards
            if write:
                name = f"rank-{rank}"
                shards += (ShardWritten(self.step, current.generation, rank, name, 0, "", ""),)
            phase = Phase.FINISHED if last else Phase.MOVING if self._fenced() else Phase.TRAINING
            self.say(worker, step=self.step, phase=phase, shards=shards)

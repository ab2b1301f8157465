"""The states of the training thread: which follows which, what is reported, and what is let go of."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.recovery_point import Holding
from orchestrator.elastic.world import World
from orchestrator.protocol.messages import GenerationPlan, StateSource, StoreAddress
from orchestrator.protocol.worker_phase import Phase
from orchestrator.spec.fault_tolerance import ProtectionSpec
from orchestrator.state.ranges import NamedRanges
from orchestrator.state.snapshot_store import RankSnapshots
from orchestrator.worker.runtime.abort import AbortHandle
from orchestrator.worker.runtime.errors import AbortedGeneration, LossExploded, StateCorrupted
from orchestrator.worker.runtime.mailbox import WorkerMailbox
from orchestrator.worker.shard.shard import TrainingProgress
from orchestrator.worker.trainer import Trainer
from orchestrator.worker.training_loop import LiveShard
from orchestrator.worker.transition.prepared_transition import PreparedTransition
from orchestrator.worker.transition.snapshots import SnapshotManager
from tests.unit.worker.keeper_pair import layout_of

AT = TrainingProgress(5, 6, "order")
LOST = AbortedGeneration("a peer is gone")


class _Engine:
    closed = 0

    def ranges(self) -> NamedRanges:
        return NamedRanges()

    def close(self) -> None:
        self.closed += 1


class _Shard:
    def __init__(self, world: World) -> None:
        self.world, self.rank, self.engine = world, 0, _Engine()


class _Mailbox(WorkerMailbox):
    """Notes the phases, and runs a check at the one of that name."""

    def __init__(self) -> None:
        super().__init__("w0", 1)
        self.phases: list[Phase] = []
        self.checks: dict[Phase, Callable[[], None]] = {}

    def publish(self, **changes: Any) -> None:
        super().publish(**changes)
        if (phase := changes.get("phase")) is not None:
            self.phases.append(phase)
            self.checks.get(phase, lambda: None)()


class _Run:
    """A trainer whose waits, transitions and steps follow a script.

    Args:
        plans: that it waits for, in order.
        entries: per transition, an error, or whether this worker becomes a member.
        activated: per transition, the newest activated generation then.
        steps: per generation, an error, the transition at its fence, or None at the end of the run.
    """

    def __init__(
        self,
        plans: list[PreparedTransition],
        entries: list[Exception | bool],
        activated: list[int],
        steps: list[Exception | PreparedTransition | None],
        in_update: bool = False,
    ) -> None:
        self.plans, self.entries, self.activated, self.steps = plans, entries, activated, steps
        self.in_update, self.releases = in_update, list[int]()
        self.mailbox, self.replays, self.shards, self.engines = _Mailbox(), [], [], []
        self.mailbox.publish(phase=Phase.STANDBY)
        self.trainer: Any = object.__new__(Trainer)
        self.trainer._mailbox = self.mailbox
        self.trainer._snapshots = SnapshotManager("w0", ProtectionSpec(every="none"), 99)
        self.trainer._abort_handle = AbortHandle(())
        self.trainer._waiter = self.trainer._rescaler = self.trainer._loop = self

    @property
    def phases(self) -> list[str]:
        self.trainer.run()
        return [phase.value for phase in self.mailbox.phases[1:]]

    # The loop
    def release(self, live: LiveShard) -> None:
        """Generations that were released, each while its engine was open and its state not yet held."""
        assert not self.engines[-1].closed and not self.trainer._snapshots.holdings()
        self.releases.append(live.generation)

    # The waiter
    def await_transition(self, may_replay: bool) -> PreparedTransition:
        self.replays.append(may_replay)
        return self.plans.pop(0)

    def await_activation(self, plan: GenerationPlan) -> int:
        return self.activated.pop(0)

    # The rescaler
    def enter(self, prepared: PreparedTransition) -> Any:
        outcome = self.entries.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        self.mailbox.publish(phase=Phase.READY)
        if not outcome:
            return None
        shard = _Shard(prepared.plan.world)
        self.shards.append(weakref.ref(shard))
        self.engines.append(shard.engine)
        return shard

    # The loop
    def live(self, shard: Any) -> LiveShard:
        return LiveShard(shard, AT)

    def train(self, live: LiveShard) -> PreparedTransition | None:
        self.mailbox.publish(phase=Phase.TRAINING)
        outcome = self.steps.pop(0)
        if isinstance(outcome, Exception):
            live.progress = None if self.in_update else AT
            raise outcome
        return outcome

    def finish(self, live: LiveShard) -> None:
        self.mailbox.publish(phase=Phase.FINISHED)

    def close(self) -> None:
        pass


def _to(generation: int, *members: str, first: bool = False) -> PreparedTransition:
    world, placement = World(generation, members), ExpertPlacement.balanced(4, len(members))
    old = StateSource(World(generation - 1, ("w0",)), ExpertPlacement.balanced(4, 1), ("w0",))
    plan = GenerationPlan(1, world, placement, None if first else old, f"1/{generation}", StoreAddress("", 0))
    return PreparedTransition(plan, store=None)  # type: ignore[arg-type]


FIRST = _to(0, "w0", first=True)


def test_a_life_with_a_rescale() -> None:
    run = _Run([FIRST], [True, True], [0, 1], [_to(1, "w0", "w1"), None])
    assert run.phases == ["moving", "ready", "training", "moving", "ready", "training", "finished"]
    assert run.replays == [True]
    assert [engine.closed for engine in run.engines] == [1, 0] and run.releases == [0]


def test_the_old_state_is_held_through_a_rescale_and_dropped_after_it() -> None:
    run = _Run([FIRST], [True, True], [0, 1], [_to(1, "w0"), None])
    held = []
    run.mailbox.checks[Phase.READY] = lambda: held.append(run.trainer._snapshots.holdings())
    run.mailbox.checks[Phase.TRAINING] = lambda: held.append(run.trainer._snapshots.holdings())
    assert run.phases[-1] == "finished"
    assert held == [(), (), (Holding(0, 5, 0),), ()]


def test_a_worker_that_leaves_is_a_standby_once_the_others_continue() -> None:
    run = _Run([FIRST, _to(2, "w0", first=True)], [True, False, True], [0, 1, 2], [_to(1, "w1"), None])
    assert run.phases[:6] == ["moving", "ready", "training", "moving", "ready", "standby"]
    assert run.replays == [True, True] and run.mailbox.state.protection.holdings == ()


@pytest.mark.parametrize(
    ("error", "in_update", "kind", "holdings"),
    [
        (LOST, False, "peer_lost", (Holding(0, 5, 0),)),
        (LOST, True, "peer_lost", ()),
        (LossExploded("9.0"), True, "numeric", ()),
    ],
    ids=["between updates", "in an update", "after a discarded step"],
)
def test_an_interrupted_generation_leaves_what_belongs_to_a_finished_step(
    error: Exception, in_update: bool, kind: str, holdings: tuple[Holding, ...]
) -> None:
    run = _Run([FIRST, _to(1, "w0")], [True, True], [0, 1], [error, None], in_update)
    stranded, are_freed = [], []
    run.mailbox.checks[Phase.STRANDED] = lambda: stranded.append(run.mailbox.state)
    run.mailbox.checks[Phase.MOVING] = lambda: are_freed.extend(shard() is None for shard in run.shards)
    assert run.phases == ["moving", "ready", "training", "stranded", "moving", "ready", "training", "finished"]
    (report,) = stranded
    assert report.transition.stopped == 0 and report.protection.holdings == holdings
    assert report.health.error is not None and report.health.error.kind == kind
    assert "in train" in report.health.error.traceback
    assert are_freed == [True]  # or gloo would keep connections that peers wait on
    assert run.replays == [True, False] and run.engines[0].closed == 1 and run.releases == [0]


@pytest.mark.parametrize(
    "error",
    [
        StateCorrupted("a bit has flipped"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    ],
    ids=["memory", "gpu"],
)
def test_a_worker_whose_memory_or_gpu_can_t_be_trusted_ends_and_holds_nothing(error: Exception) -> None:
    run = _Run([FIRST], [True], [0], [error])
    assert run.phases == ["moving", "ready", "training", "failed"]
    assert run.mailbox.state.health.error is not None and run.mailbox.state.health.error.kind == "corrupted"
    assert run.trainer._snapshots.holdings() == () and run.engines[0].closed == 1 and run.releases == [0]


@pytest.mark.parametrize(
    ("plan", "then"),
    [(_to(1, "w0", "w1"), "stranded"), (_to(0, "w0", "w1", first=True), "standby")],
    ids=["of a member", "of a newcomer"],
)
def test_a_failed_transition_is_abandoned(plan: PreparedTransition, then: str) -> None:
    run = _Run([plan, _to(2, "w0", first=True)], [LOST, True], [2], [None])
    assert run.phases[:2] == ["moving", then]
    assert run.mailbox.state.transition.failed_generation == plan.plan.generation
    assert run.replays == [True, then == "standby"]


def test_a_keeper_whose_transition_fails_is_a_standby_again_and_reports_its_snapshots() -> None:
    layout = layout_of(("a",))
    kept = RankSnapshots(4, 0, layout, shared_only=True)
    kept.finish(kept.begin(5, ""))
    old = StateSource(World(4, ("a",)), ExpertPlacement.balanced(2, 1), ("a",))
    plan = GenerationPlan(1, World(5, ("a", "w0")), ExpertPlacement.balanced(2, 2), old, "1/5", StoreAddress("", 0))
    run = _Run([PreparedTransition(plan, store=None), _to(6, "w0", first=True)], [LOST, True], [6], [None])  # type: ignore[arg-type]
    run.trainer._snapshots.keep(kept)
    reported = []
    run.mailbox.checks[Phase.STANDBY] = lambda: reported.append(run.mailbox.state.protection.holdings)
    assert run.phases[:2] == ["moving", "standby"]
    assert reported == [(Holding(4, 5, 0),)] and run.replays == [True, True]


def test_a_first_shard_that_cannot_be_built_fails_the_worker() -> None:
    run = _Run([FIRST], [ValueError("no such model")], [], [])
    assert run.phases == ["moving", "failed"]
    assert run.mailbox.state.health.error is not None and "no such model" in run.mailbox.state.health.error.message


@pytest.mark.parametrize(("activated", "phases"), [(0, []), (2, ["standby"])], ids=["replaced", "too late"])
def test_a_generation_that_is_not_activated_closes_its_shard(activated: int, phases: list[str]) -> None:
    run = _Run([_to(1, "w0"), _to(3, "w0")], [True, True], [activated, 3], [None])
    assert run.phases == ["moving", "ready", *phases, "moving", "ready", "training", "finished"]
    assert [engine.closed for engine in run.engines] == [1, 0] and run.shards[0]() is None
    assert run.replays == [True, activated == 2]

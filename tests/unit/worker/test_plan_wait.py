"""Which snapshots a worker without a generation replays before the transition that needs them begins."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.recovery_point import Holding
from orchestrator.elastic.world import World
from orchestrator.protocol.messages import Directive, GenerationPlan, StateSource, StoreAddress
from orchestrator.spec.fault_tolerance import ProtectionSpec
from orchestrator.state.ranges import NamedRanges
from orchestrator.state.snapshot import Snapshot, Update, copy_into
from orchestrator.state.snapshot_store import RankSnapshots
from orchestrator.worker.plan_wait import PlanWaiter
from orchestrator.worker.runtime.mailbox import WorkerMailbox
from orchestrator.worker.transition.snapshots import SnapshotManager
from tests.unit.worker.keeper_pair import layout_of, shard_of

OLD = World(4, ("w0", "w1"))
LAYOUT = layout_of(OLD.members)
NEWEST = 3  # step of the newest snapshot: a whole one of step 1, and two deltas


class _Preparer:
    """One whose plan is prepared as soon as there is nothing to do meanwhile."""

    def __init__(self, mailbox: WorkerMailbox) -> None:
        self._mailbox = mailbox

    def await_next(self, meanwhile: Callable[[Directive], bool]) -> Any:
        if meanwhile(self._mailbox.directive):
            return None
        return SimpleNamespace(plan=self._mailbox.directive.next)


class _Waiting:
    """w0, which keeps snapshots of w1's rank and waits for a plan after w1 is lost."""

    def __init__(self) -> None:
        self.replays: list[int] = []
        self.mailbox = WorkerMailbox("w0", 1)
        self.snapshots = SnapshotManager("w0", ProtectionSpec(every=1), last_step=99)
        self.kept = RankSnapshots(4, 1, LAYOUT, True, whole_every=5, replay=self._replay)
        self.snapshots.keep(self.kept)
        for step in range(1, NEWEST + 1):
            update = Update(step, 0.1) if step > 1 else None
            snapshot = self.kept.begin(step, "", update)
            if update is None:
                copy_into(snapshot, shard_of(LAYOUT, 1, float(step)))
            self.kept.finish(snapshot)
        checker: Any = SimpleNamespace(is_asked=lambda _: False)
        self.waiter = PlanWaiter("w0", self.mailbox, _Preparer(self.mailbox), Any, checker, self.snapshots)  # type: ignore[arg-type]

    def _replay(self, state: NamedRanges, deltas: Sequence[Snapshot]) -> None:
        self.replays.append(len(deltas))

    def wait_for(self, *holders: str, step: int | None = NEWEST, activated: int = 4) -> None:
        source = StateSource(OLD, ExpertPlacement.balanced(2, 2), holders, step)
        world = World(5, ("w0",))
        plan = GenerationPlan(1, world, ExpertPlacement.balanced(2, 1), source, "1/5", StoreAddress("", 0))
        self.mailbox.put(Directive(1, self.mailbox.state.seen + 1, next=plan, activated=activated))
        if "w0" in holders:
            self.waiter.await_transition(may_replay=False)


@pytest.mark.parametrize("step", [NEWEST - 1, NEWEST])
def test_deltas_of_a_lost_rank_are_replayed_once_the_plan_is_known(step: int) -> None:
    waiting = _Waiting()
    waiting.wait_for("w0", "w0", step=step)
    assert waiting.replays == [step - 1]
    assert Holding(4, step, 1) in waiting.mailbox.state.protection.holdings
    waiting.wait_for("w0", "w0", step=step)  # a directive that repeats the plan
    waiting.kept.state(step)  # what the transition does
    assert waiting.replays == [step - 1]


@pytest.mark.parametrize(
    ("holders", "step", "activated"),
    [
        (("w0", "w1"), NEWEST, 4),  # its own rank's snapshots only, of which it has none here
        (("w0", "w0"), None, 4),  # a rescale, at whose fence all shards are live
        (("w0", "w0"), NEWEST, 5),  # it has begun already
    ],
)
def test_nothing_else_is_replayed(holders: tuple[str, ...], step: int | None, activated: int) -> None:
    waiting = _Waiting()
    waiting.wait_for(*holders, step=step, activated=activated)
    assert waiting.replays == []

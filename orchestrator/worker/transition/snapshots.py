"""State that a worker keeps for recovery: snapshots, and its own shard after the end of a generation.

begin .. leave      one generation's protection: buddy and protected rank are connected
change_keeper       the same for a world of one, from the step at which a keeper has connected
keep, drop          snapshots that this worker keeps for the member of a world of one
due, take, agree    when the shard is copied, and what the members agree on in votes
hold, gathered      the shard without an engine around it, and all state that this worker can hand over
"""

import gc
import logging
from contextlib import suppress
from dataclasses import replace

import torch

from orchestrator.comm.transport.stream import StreamClosed
from orchestrator.elastic.recovery_point import Holding
from orchestrator.elastic.state_spec import Inventory
from orchestrator.policy.health.snapshot_interval import IntervalChoice
from orchestrator.protocol.messages import Keeper, StateSource
from orchestrator.spec.fault_tolerance import AUTO, ProtectionSpec
from orchestrator.state.ranges import NamedRanges
from orchestrator.state.snapshot import Update, merge_ranges
from orchestrator.state.snapshot_store import RankSnapshots, SnapshotStore
from orchestrator.worker.shard.shard import Shard, TrainingProgress
from orchestrator.worker.shard.snapshot_replicator import SnapshotReplicator
from orchestrator.worker.transition.parking import parked
from orchestrator.worker.transition.transition import Held

log = logging.getLogger("orchestrator.worker")

NEVER = 0  # interval of a run without snapshots


class SnapshotManager:
    """Used by the training thread; `settle` and `shut` by the control thread too, `keep` and `drop` by any.

    Args:
        me: this worker's id.
        protection: the job's section.
        last_step: after it a snapshot is always taken.
    """

    def __init__(self, me: str, protection: ProtectionSpec, last_step: int) -> None:
        self._me, self._last_step = me, last_step
        self._fixed = None if protection.every == AUTO else protection.interval or NEVER
        self._store = SnapshotStore()
        self._protection: SnapshotReplicator | None = None
        self._keeper = self._lost_keeper = -1  # numbers of the present one, and of the newest one without connection
        self._left: RankSnapshots | None = None  # of this rank, from before its keeper was lost in the present step
        self._choice = IntervalChoice(0, 0.0)
        self._interval = NEVER  # steps between two snapshots, agreed by all members
        self._paid_s = 0.0
        self.held: Held | None = None  # the last activated state, while it has no engine

    # -- a generation ------------------------------------------------------------------------------------------

    def begin(self, generation: int, protection: SnapshotReplicator | None) -> None:
        """Send snapshots to the buddies of a newly activated generation; None where there are none."""
        if protection is not None:
            self._protect(protection)
        else:
            self._interval = NEVER
            self._store.drop_before(generation)

    def _protect(self, protection: SnapshotReplicator) -> None:
        self._protection, self._paid_s = protection, 0.0
        self._choice = IntervalChoice(protection.sender.whole_bytes, protection.sender.mean_bytes)
        self._interval = self._choice.interval if self._fixed is None else self._fixed
        protection.start(self._store)

    def change_keeper(self, keeper: Keeper, protection: SnapshotReplicator) -> None:
        """Send the snapshots of a world of one to this keeper from now on. The next one must be taken at once."""
        self._end_keeper()
        self._drop_left()
        self._keeper = keeper.number
        self._protect(protection)

    def leave(self) -> None:
        """End snapshots of this generation. Those that are whole stay."""
        self._left = None
        if self._protection is not None:
            self._protection.close()
            self._protection, self._keeper = None, -1
            self._store.leave_free()

    def _end_keeper(self) -> None:
        if self._protection is not None:
            self._protection.close()
            self._left = self._protection.sender.own
        self._protection, self._interval, self._keeper = None, NEVER, -1

    def _drop_left(self) -> None:
        """Drop the snapshots from before the keeper was lost."""
        if self._left is not None:
            self._store.remove(self._left)
        self._left = None

    def shut(self) -> None:
        """Free threads that wait for buddy or protected rank. From any thread."""
        if (protection := self._protection) is not None:
            protection.shut()

    def settle(self, generation: int) -> None:
        """Drop older generations: this one has a committed step, so the run won't return to them. From any thread."""
        self._store.drop_before(generation)

    # -- a step ------------------------------------------------------------------------------------------------

    @property
    def interval(self) -> int:
        """Steps between two snapshots now; 0 where none are taken."""
        return self._interval

    @property
    def wanted_interval(self) -> int:
        """The interval that this worker prefers for the next snapshots."""
        return self._interval if self._fixed is not None or self._protection is None else self._choice.interval

    def due(self, step: int) -> bool:
        """Whether a snapshot follows `step`. The same on all members."""
        return self._interval != NEVER and ((step + 1) % self._interval == 0 or step == self._last_step)

    def copied(self) -> None:
        """Wait until the shard may change."""
        if self._protection is not None:
            self._protection.sender.copied()

    def acknowledged(self) -> None:
        """Wait until the buddy or keeper has the newest snapshot. Training goes on without a keeper that is lost.

        Raises:
            StreamClosed: a buddy is lost.
        """
        if self._protection is None:
            return
        try:
            self._protection.sender.acknowledged()
        except StreamClosed as error:
            if self._keeper < 0:
                raise
            log.warning("keeper %d is lost: %s", self._keeper, error)
            self._lost_keeper = self._keeper
            self._end_keeper()

    def wants_gradients(self, step: int) -> bool:
        """Whether the snapshot after `step` can be a delta, for which the step's gradients are needed."""
        return self._interval == 1 and self._protection is not None and self._protection.sender.takes_delta(step)

    def take(
        self, shard: Shard, progress: TrainingProgress, lr: float = 0.0, gradients: NamedRanges | None = None
    ) -> None:
        """Begin a snapshot of the shard's current state.

        Args:
            lr, gradients: of the newest step's update; without them the snapshot is whole.
        """
        if self._protection is None:
            return
        ranges, update = shard.engine.ranges().until_update(), None
        if gradients is not None:
            update = Update(progress.num_updates, lr)
            for name, held in gradients:
                ranges.add(name, held.start, held.data)
        self._protection.sender.begin(progress.step, ranges, progress.to_json(), update)

    def agree(self, interval: int, step_s: float, took_snapshot: bool) -> None:
        """Apply the interval agreed on in the vote, and observe the step's cost.

        Args:
            interval: the longest that any member prefers.
            step_s: duration of the step, seconds.
            took_snapshot: whether the snapshot before this step was acknowledged in it.
        """
        if self._protection is None or self._fixed is not None:
            return
        if took_snapshot:
            paid_s = self._protection.cost_s()
            self._choice.observe(paid_s - self._paid_s, self._protection.sender.begun_bytes, step_s)
            self._paid_s = paid_s
        self._interval = interval

    def committed(self, generation: int, step: int, votes_tell: bool) -> dict[str, int]:
        """Report fields of what is held twice: each member had its buddy's acknowledgement before it voted."""
        if self._protection is None:
            self._drop_left()  # not earlier: if the step had failed, they would have been the newest state
            return {"committed": step, "settled": generation, "unkept": self._lost_keeper}
        if not votes_tell:
            return {}
        self.settle(generation)
        held = self._protection.sender.begun
        return {"committed": held, "held": held, "settled": generation, "kept_by": self._keeper}

    # -- what is held, for another worker too ------------------------------------------------------------------

    def keep(self, snapshots: RankSnapshots) -> None:
        """Hold the snapshots of the member of a world of one."""
        self._store.add(snapshots)

    def drop(self, snapshots: RankSnapshots) -> None:
        """Hold them no longer."""
        self._store.remove(snapshots)

    def hold(self, shard: Shard, progress: TrainingProgress) -> None:
        """Keep the shard's state; its engine is about to close."""
        self._store.leave_free()
        self.held = Held(shard.world.generation, shard.rank, progress, shard.engine.ranges().detached())

    def make_room(self, needed_bytes: int) -> None:
        """Move the held state to host memory if its GPU lacks room for another shard. Nothing else may refer to it."""
        if self.held is None:
            return
        ranges = parked(self.held.ranges, needed_bytes)
        if ranges is not self.held.ranges:
            self.held = replace(self.held, ranges=ranges)
            gc.collect()  # the engine of the old shard, which is full of cycles
            torch.cuda.empty_cache()

    def distrust(self, generation: int, step: int) -> None:
        """Exclude the state after a step from recovery: it no longer matches its record."""
        self._store.distrust(generation, step)
        if self.held is not None and (self.held.generation, self.held.progress.step) == (generation, step):
            self.held = None

    def holdings(self) -> tuple[Holding, ...]:
        """All states held here. From any thread."""
        held = self.held
        found = {*self._store.holdings(), *(() if held is None else (held.holding,))}
        return tuple(sorted(found, key=lambda h: (h.generation, h.step, h.rank)))

    def gathered(self, source: StateSource, progress: TrainingProgress, tensors: Inventory) -> Held:
        """All shards of a state that this worker hands over, its own first.

        Args:
            progress: training progress here; the state is that of its step where the source names none.
            tensors: of the state.

        Raises:
            KeyError: one of them isn't here.
        """
        step = progress.step if source.step is None else source.step
        parts, mine = [], -1
        for wanted in self._wanted(source, step):
            if self.held is not None and self.held.holding == wanted:
                parts.append(self.held.ranges)
                progress, mine = self.held.progress, wanted.rank
            else:
                snapshot = self._store.find(wanted)
                parts.append(snapshot.ranges)
                progress = TrainingProgress.from_json(snapshot.note)
        return Held(source.world.generation, mine, progress, merge_ranges(parts, tensors))

    def make_whole(self, source: StateSource) -> None:
        """Replay the deltas of the snapshots that `gathered` will need. What isn't here is left out.

        Args:
            source: that of a plan after a failure, which names a step.
        """
        assert source.step is not None
        for wanted in self._wanted(source, source.step):
            if self.held is None or self.held.holding != wanted:
                with suppress(KeyError):
                    self._store.find(wanted)

    def _wanted(self, source: StateSource, step: int) -> list[Holding]:
        """What this worker hands over, its own rank's shard first."""
        ranks = [rank for rank, holder in enumerate(source.holders) if holder == self._me]
        ranks.sort(key=lambda rank: source.world.members[rank] != self._me)
        return [Holding(source.world.generation, step, rank) for rank in ranks]

"""A worker's entry into the next generation, at a fence, after a failure, or at the start of the run."""

import logging

from orchestrator.protocol.worker_phase import Phase
from orchestrator.worker.runtime.errors import DigestMismatch
from orchestrator.worker.runtime.mailbox import WorkerMailbox
from orchestrator.worker.shard.shard import Shard, ShardFactory
from orchestrator.worker.step.position import RunPosition
from orchestrator.worker.transition.fence import announce
from orchestrator.worker.transition.prepared_transition import PreparedTransition
from orchestrator.worker.transition.snapshots import SnapshotManager
from orchestrator.worker.transition.transition import closed_on_error, first_shard, make_transition

log = logging.getLogger("orchestrator.worker")

MOST_HANDOVERS = 10  # in a report


class Rescaler:
    """Builds and fills this worker's shard of the next generation. Used by the training thread."""

    def __init__(
        self, factory: ShardFactory, mailbox: WorkerMailbox, snapshots: SnapshotManager, position: RunPosition
    ) -> None:
        self._factory, self._mailbox, self._snapshots, self._position = factory, mailbox, snapshots, position

    def enter(self, prepared: PreparedTransition) -> Shard | None:
        """Do everything up to activation. Collective over the plan's involved workers. The old state is kept.

        Returns:
            the new shard; None for a worker that leaves.

        Raises:
            RuntimeError, DigestMismatch: as `make_transition`; KeyError: a state to hand over isn't here.
        """
        plan, source, position = prepared.plan, prepared.plan.source, self._position
        shard: Shard | None
        if source is None:
            self._snapshots.held = None
            shard, progress, handover = first_shard(self._factory, prepared, position.first_order)
            with closed_on_error(shard):
                position.follow(progress)
                self._mailbox.go_back_to(progress.step)
        else:
            self._snapshots.make_room(prepared.shard_bytes)
            mine = self._factory.me in source.holders
            tensors = self._factory.state(source.placement.num_experts).tensors
            held = self._snapshots.gathered(source, position.progress, tensors) if mine else None
            if held is not None:
                position.follow(held.progress)
                self._mailbox.go_back_to(held.progress.step)
            if source.holders[0] == self._factory.me and plan.newcomers:
                announce(prepared, position.progress, self._mailbox.records, self._mailbox.directive.journalled)
            recorded = next((r for r in reversed(self._mailbox.records) if r.step == position.step), None)
            try:
                shard, handover = make_transition(self._factory, prepared, held, position.progress, recorded)
            except DigestMismatch:
                self._snapshots.distrust(source.world.generation, position.step)
                raise
        with closed_on_error(shard):
            self._snapshots.acknowledged()  # of the old world: the snapshot begun at the fence
            log.info("generation %d is ready: %s", plan.generation, handover)
            self._mailbox.publish(
                phase=Phase.READY,
                generation=plan.generation,
                holdings=self._snapshots.holdings,
                handovers=(*self._mailbox.state.transition.handovers[1 - MOST_HANDOVERS :], handover),
            )
            prepared.close_transfer()  # only now: each of gloo's connections takes up to 10 ms to close
        return shard

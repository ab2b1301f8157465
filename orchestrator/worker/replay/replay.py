"""Replay of a run's steps, from the seed or from one of its checkpoints, in a world of any size."""

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from orchestrator.engine.base import noop
from orchestrator.engine.process_groups import disconnect
from orchestrator.protocol.step_record import StepRecord
from orchestrator.storage.condition import StorageTrouble
from orchestrator.worker.shard.shard import ShardFactory
from orchestrator.worker.step.batches import BatchReader
from orchestrator.worker.step.hooks import RankProposal
from orchestrator.worker.step.train_step import TrainStep
from orchestrator.worker.step.vote import NO_FENCE
from orchestrator.worker.transition.prepared_transition import PreparedTransition
from orchestrator.worker.transition.transition import first_shard


@dataclass(frozen=True)
class ReplayHooks:
    """Hooks of a replayed step: it asks for nothing, and can be interrupted before micro-batches and while it waits for
    rows."""

    before_micro_batch: Callable[[], None]

    def wait_for_rows(self, trouble: StorageTrouble | None) -> None:
        self.before_micro_batch()

    def before_update(self) -> None:
        pass

    def propose(self, step: int) -> RankProposal:
        return RankProposal(NO_FENCE, finish=False, interval=0)


def replay(
    factory: ShardFactory,
    feed: BatchReader,
    prepared: PreparedTransition,
    last_step: int,
    between: Callable[[], None] = noop,
) -> Iterator[StepRecord]:
    """Yield the record of each step up to `last_step`. Collective over the plan's members. Their groups and the state
    are freed with the iterator; nothing else may train in this process meanwhile.

    Args:
        prepared: for a plan whose state comes from the seed or a checkpoint, `replayed` worlds included.
        between: called before each micro-batch, and each piece of the checkpoint; an exception from it ends the replay.
    """
    train_step, hooks = TrainStep(factory, feed, validates=False), ReplayHooks(between)
    shard = None
    try:
        shard, progress, _ = first_shard(factory, prepared, feed.first_order, between)
        feed.follow(progress.sampler)
        while progress.step < last_step:
            result = train_step.step(shard, progress, hooks, keep_gradients=False)
            progress = result.progress
            yield result.record
    finally:
        train_step.close()
        if shard is not None:
            shard.engine.close()
        del shard
        disconnect()
        gc.collect()  # DeepSpeed's engine is full of cycles: without this the state stays in memory

"""The training thread of a worker: stand by, move into a generation, train to its fence, and so on to the end.

`Trainer.run` is a worker's life, `Trainer.train` its generation, `Trainer.step` a step.
"""

import gc
import logging
import time
import traceback
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from orchestrator.engine.groups import disconnect
from orchestrator.model.router import corrected_bias, max_violation
from orchestrator.protocol.messages import (
    Finish,
    GenerationPlan,
    Phase,
    ShardWritten,
    StepRecord,
    WorkerError,
)
from orchestrator.spec.schedule import learning_rate
from orchestrator.worker.desk import Desk
from orchestrator.worker.faults import kind_of
from orchestrator.worker.feed import Feed, StepFeed
from orchestrator.worker.moving import Held, Prepared, announce, announced, first_shard, move
from orchestrator.worker.prefetch import Prefetch
from orchestrator.worker.preparing import Preparations
from orchestrator.worker.saving import Saver
from orchestrator.worker.shard import Progress, Shard, Workshop
from orchestrator.worker.vote import NO_FENCE, Ballot, Outcome, vote

log = logging.getLogger("orchestrator.worker")

POLL_S = 0.25  # how often a waiting newcomer looks whether its plan still stands


class Trainer:
    """Trains one shard after another, as the desk's directives ask.

    Args:
        desk: where directives come in and reports go out.
        workshop: builds shards.
        feed: rows of a step.
    """

    def __init__(self, desk: Desk, workshop: Workshop, feed: Feed) -> None:
        self._desk, self._workshop, self._feed = desk, workshop, feed
        self._spec = workshop.spec
        self._prefetch = Prefetch(feed, workshop.spec.train.steps)
        self._preparations = Preparations(workshop, desk)
        checkpoints = Path(workshop.job.storage_dir) / "checkpoints"
        self._saver = Saver(checkpoints, workshop.saved_shapes(), self._saved, self._not_saved)
        self._shard: Shard | None = None
        self._held: Held | None = None  # the last activated state, while a move is under way
        self._progress = Progress(-1, 0, feed.sampler.to_json())

    # -- a worker's life ---------------------------------------------------------------------------------------

    def run(self) -> None:
        """From standby to the end of the run. Errors end up in the report."""
        try:
            self._live()
        except Exception as error:
            self._fail(error)
        finally:
            self._preparations.close()
            self._prefetch.close()
            disconnect()

    def _live(self) -> None:
        prepared = self._await_move()
        while True:
            shard = self._shard if self._arrive(prepared) else None
            if shard is None:
                prepared = self._await_move()
                continue
            fence = self.train(shard)
            if fence is None:
                return self._finish(shard)
            prepared = fence

    def _arrive(self, prepared: Prepared) -> bool:
        """Move, and wait until the new generation is activated. False if it isn't reached; then all is as before."""
        try:
            self._move(prepared)
        except RuntimeError as error:
            if self._held is None and prepared.plan.source is None:
                raise
            prepared.close()  # first of all: peers that wait for this worker, not for the lost one, are freed
            self._strand(prepared.plan, error)
            return False
        arrived = self._await_activation(prepared.plan)
        if arrived and self._shard is None:
            self._desk.publish(phase=Phase.STANDBY, generation=-1)
        return arrived

    # -- a generation ------------------------------------------------------------------------------------------

    def train(self, shard: Shard) -> Prepared | None:
        """Step after step until all members agree on a fence. None when there is no step left, or the run shall end."""
        self._desk.publish(phase=Phase.TRAINING, generation=shard.world.generation)
        while self._progress.step + 1 < self._spec.train.steps:
            outcome = self.step(shard, self._progress.step + 1)
            if outcome.finish:
                return None
            if self._checkpoint_due():
                self._saver.save(shard, self._progress)
            if outcome.fence != NO_FENCE:
                return self._preparations.take(outcome.fence)
        return None

    def step(self, shard: Shard, step: int) -> Outcome:
        """Slots, update, vote: after it every member knows that all have finished the step."""
        started = time.perf_counter()
        feed = self._prefetch.step(step, shard.rank, shard.world.size)
        data_wait_s = time.perf_counter() - started
        losses = np.zeros(feed.num_slots)
        counts_LE = torch.zeros(len(shard.model.moe_layers), self._spec.model.num_experts, dtype=torch.int64)
        for slot in feed.slots:
            loss, slot_counts_LE = shard.engine.accumulate(slot.batch, feed.global_tokens)
            if slot.number is not None:
                losses[slot.number] = float(loss)
                counts_LE += slot_counts_LE.cpu()
        lr = learning_rate(self._spec.train, step)
        update = shard.engine.step(lr)
        validation = self._validate(shard, step)

        ballot = Ballot(
            slot_losses=losses,
            validation_losses=validation[0],
            counts_LE=counts_LE,
            applied=update.applied,
            fence=self._preparations.fence_after(step),
            finish=self._desk.directive.finish is not Finish.NO,
        )
        outcome = vote(ballot, shard.rank, shard.world.size, shard.groups.exchange, self._workshop.device)
        self._balance(shard, outcome)
        self._progress = replace(
            self._progress, step=step, num_updates=self._progress.num_updates + int(outcome.applied)
        )
        record = StepRecord(
            step=step,
            generation=shard.world.generation,
            world_size=shard.world.size,
            loss=outcome.loss_sum / max(feed.global_tokens, 1),
            tokens=feed.global_tokens,
            lr=lr,
            grad_norm=update.grad_norm if outcome.applied else float("inf"),
            applied=outcome.applied,
            max_violation=max_violation(outcome.counts_LE),
            first_position=feed.first_position,
            num_positions=feed.num_positions,
            step_s=time.perf_counter() - started,
            vote_time=time.time(),
            data_wait_s=data_wait_s,
            validation_loss=(
                None if outcome.validation_loss_sum is None else outcome.validation_loss_sum / max(validation[1], 1)
            ),
        )
        self._desk.record(record)
        return outcome

    def _validate(self, shard: Shard, step: int) -> tuple[np.ndarray, int]:
        """Loss sums per validation slot, and the targets in all of them; empty in most steps."""
        every, last = self._spec.eval.every, self._spec.train.steps - 1
        if every is None or ((step + 1) % every and step not in (0, last)):
            return np.zeros(0), 0
        feed: StepFeed = self._feed.validation(shard.rank, shard.world.size)
        losses = np.zeros(feed.num_slots)
        for slot in feed.slots:
            loss = shard.engine.evaluate(slot.batch)
            if slot.number is not None:
                losses[slot.number] = float(loss)
        return losses, feed.global_tokens

    def _balance(self, shard: Shard, outcome: Outcome) -> None:
        """Move the routers' biases by the global counts. A skipped update moves nothing."""
        speed = self._spec.model.bias_update_speed
        if not outcome.applied or not speed:
            return
        for layer, counts_E in zip(shard.model.moe_layers, outcome.counts_LE, strict=True):
            bias_E = layer.router.correction_bias_E
            bias_E.copy_(corrected_bias(bias_E, counts_E.to(bias_E.device), speed))

    # -- between generations -----------------------------------------------------------------------------------

    def _await_move(self) -> Prepared:
        """Stand by, or stranded, until a plan has a place for this worker and its move can begin."""
        while True:
            prepared = self._preparations.await_next()
            plan = prepared.plan
            if self._held is not None and (plan.source is None or plan.source.generation != self._held.generation):
                self._held = None  # the run went on without this worker; what it holds is of the past
            if self._held is not None or plan.source is None or self._await_fence(plan):
                return prepared
            prepared.close()

    def _await_fence(self, plan: GenerationPlan) -> bool:
        """Wait for the old world to reach its fence. False if the plan is given up before."""
        while (progress := announced(self._workshop.store, plan, POLL_S)) is None:
            if not self._preparations.stands(plan):
                return False
        self._progress = progress
        return True

    def _move(self, prepared: Prepared) -> None:
        """Into the next generation, up to the point where only activation is missing."""
        plan = prepared.plan
        self._desk.publish(phase=Phase.MOVING)
        self._hold()
        if plan.source is None:
            self._shard, self._progress, handover = first_shard(self._workshop, prepared, self._progress.sampler)
        else:
            if plan.source.members[0] == self._workshop.me:
                announce(self._workshop.store, plan, self._progress)
            self._shard, handover = move(self._workshop, prepared, self._held, self._progress)
        prepared.close()
        self._desk.publish(
            phase=Phase.READY, generation=plan.generation, handovers=(*self._desk.state.handovers[-9:], handover)
        )

    def _hold(self) -> None:
        """Take the engine away from the shard; its state stays in memory."""
        if self._shard is not None:
            shard = self._shard
            self._held = Held(shard.world.generation, self._progress, shard.engine.ranges().detached())
            self._drop()

    def _drop(self) -> None:
        """Let the engine go, and with it the generation's groups."""
        if self._shard is not None:
            self._shard.engine.close()
            self._shard = None
        disconnect()

    def _strand(self, plan: GenerationPlan, error: Exception) -> None:
        """A move failed: give up the half-built shard, keep the old one, and say so."""
        log.warning("the move to generation %d failed: %s", plan.generation, error)
        self._free_peers(error)
        self._desk.publish(
            phase=Phase.STANDBY if self._held is None else Phase.STRANDED, failed_generation=plan.generation
        )

    def _await_activation(self, plan: GenerationPlan) -> bool:
        """True once the run has moved on, by `plan` or past it; then the old shard is let go. False if another plan
        came in its place. A newcomer that was ready for a plan that failed may have no part in the next one."""
        activated = self._preparations.await_activation(plan)
        if activated != plan.generation:
            self._drop()
        if activated >= plan.generation:
            self._held = None
            gc.collect()  # DeepSpeed's engine is full of cycles: without this the old shard stays in memory
        return activated >= plan.generation

    # -- checkpoints and the end -------------------------------------------------------------------------------

    def _checkpoint_due(self) -> bool:
        every = self._spec.checkpoint.every
        done = self._progress.step + 1
        return every is not None and done % every == 0 and done < self._spec.train.steps

    def _finish(self, shard: Shard) -> None:
        self._saver.save(shard, self._progress)
        self._saver.wait()
        self._desk.publish(phase=Phase.FINISHED)
        log.info("finished after step %d", self._progress.step)

    def _saved(self, written: ShardWritten) -> None:
        self._desk.publish(shards=(*self._desk.state.shards[-3:], written))

    def _not_saved(self, error: Exception) -> None:
        self._desk.publish(
            phase=Phase.FAILED,
            error=WorkerError("storage", f"a checkpoint could not be written: {error}", traceback.format_exc()),
        )

    def _fail(self, error: Exception) -> None:
        text = "".join(traceback.format_exception(error))
        kind = kind_of(error)
        self._free_peers(error)
        log.error("%s\n%s after step %d: %s", text.rstrip(), kind, self._progress.step, error)
        self._desk.publish(phase=Phase.FAILED, error=WorkerError(kind, str(error), text))

    def _free_peers(self, error: BaseException) -> None:
        """Close the connections that peers may be blocked on. gloo does so only once nothing refers to its groups, not
        even the frames of an error."""
        cause: BaseException | None = error
        while cause is not None:
            cause.__traceback__ = None
            cause = cause.__context__
        self._drop()
        gc.collect()

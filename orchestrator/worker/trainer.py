"""The training thread of a worker: stand by, enter a generation, train to its fence, and repeat until the run ends.

`Trainer.run` is a worker's lifetime, `Trainer.train` one generation, `TrainStep.step` one step. When a peer fails, or
the step fails here, the generation is over: the thread releases everything that peers may wait for, keeps its state,
and waits for the plan of the next generation.
"""

import gc
import logging
import traceback
from dataclasses import replace
from pathlib import Path

from orchestrator.comm import collective_stats
from orchestrator.comm.transport.gloo import shut_connections
from orchestrator.engine.process_groups import abort_collectives, disconnect
from orchestrator.policy.health.loss_spike import explosion
from orchestrator.protocol.messages import (
    Directive,
    FinishMode,
    GenerationPlan,
    Phase,
    Saturation,
    ShardWritten,
    WorkerError,
)
from orchestrator.worker.replay.checker import ReplayChecker
from orchestrator.worker.runtime.abort import AbortHandle
from orchestrator.worker.runtime.errors import AbortedGeneration, DigestMismatch, LossExploded, StateCorrupted, kind_of
from orchestrator.worker.runtime.mailbox import WorkerMailbox
from orchestrator.worker.shard.shard import Shard, ShardFactory, TrainingProgress
from orchestrator.worker.step.batches import BatchReader
from orchestrator.worker.step.checkpoint_timer import CheckpointTimer
from orchestrator.worker.step.curriculum import Stages
from orchestrator.worker.step.train_step import RankProposal, TrainStep
from orchestrator.worker.step.vote import NO_FENCE, VoteResult
from orchestrator.worker.transition.preparation import TransitionPreparer
from orchestrator.worker.transition.save_shard import ShardSaver
from orchestrator.worker.transition.snapshots import SnapshotManager
from orchestrator.worker.transition.transition import (
    PreparedTransition,
    announce,
    announced,
    first_shard,
    make_transition,
)

log = logging.getLogger("orchestrator.worker")

POLL_S = 0.25  # how often a waiting newcomer checks whether its plan is still wanted


class Trainer:
    """Trains one shard after another, as directed through the mailbox.

    Args:
        mailbox: source of directives and destination of reports.
        factory: builds shards.
        feed: reads the rows of a step.
    """

    def __init__(self, mailbox: WorkerMailbox, factory: ShardFactory, feed: BatchReader) -> None:
        self._mailbox, self._factory, self._feed = mailbox, factory, feed
        self._spec = factory.spec
        self._stepper = TrainStep(factory, feed)
        self._preparer = TransitionPreparer(factory, mailbox)
        self._checks = ReplayChecker(factory, feed, mailbox, self._preparer)
        checkpoints = Path(factory.job.storage_dir) / "checkpoints"
        keeps = self._spec.communication.compression.keeps
        numerics = mailbox.state.numerics
        self._saver = ShardSaver(checkpoints, factory.saved_shapes(), keeps, numerics, self._saved, self._not_saved)
        self._shard: Shard | None = None
        self._checkpoint_timer = CheckpointTimer(self._spec.checkpoint.every, self._spec.train.max_steps)
        self._snapshots = SnapshotManager(factory.me, self._spec.protection, self._spec.train.max_steps - 1)
        self._abort_handle = AbortHandle((shut_connections, abort_collectives, self._snapshots.shut))
        self._between_steps = True  # False: the shard's state belongs to no finished step
        self._progress = TrainingProgress(-1, 0, feed.first_order)
        self._stages = Stages(feed)

    # -- a worker's life ---------------------------------------------------------------------------------------

    def run(self) -> None:
        """Run from standby to the end of the run. Errors end up in the report."""
        try:
            self._live()
        except Exception as error:
            self._fail(error)
        finally:
            self._preparer.close()
            self._stepper.close()
            self._snapshots.leave()
            disconnect()

    def _live(self) -> None:
        prepared: PreparedTransition | None = self._await_transition()
        while prepared is not None:
            if self._arrive(prepared) and self._shard is not None:
                prepared = self._train_or_stop(self._shard)
            else:
                prepared = self._await_transition()

    def _train_or_stop(self, shard: Shard) -> PreparedTransition | None:
        """Train until a fence or a failure and return the next transition; None at the end of the run."""
        try:
            fence = self.train(shard)
            if fence is not None:
                return fence
            self._finish(shard)
        except StateCorrupted:  # this process's memory can't be trusted; its buddy holds a copy of its state
            raise
        except Exception as error:
            del shard
            self._stop(error)
            return self._await_transition()
        return None

    def abort(self, generation: int) -> None:
        """End generations up to this one and free the training thread from them. Called from the control thread."""
        self._abort_handle.abort(generation)

    def settle(self, generation: int) -> None:
        """Drop snapshots of older generations, to which the run won't return. Called from the control thread."""
        self._snapshots.settle(generation)

    # -- a generation ------------------------------------------------------------------------------------------

    def train(self, shard: Shard) -> PreparedTransition | None:
        """Train until all members agree on a fence. None when no step is left, or the run is to end."""
        self._abort_handle.begin(shard.world.generation)
        collective_stats.reset()
        if shard.seal is not None:
            shard.seal.close()
        self._snapshots.take(shard, self._progress)
        self._checkpoint_timer.begin()
        self._mailbox.publish(phase=Phase.TRAINING, generation=shard.world.generation, holdings=())
        while self._progress.step + 1 < self._spec.train.max_steps:
            outcome = self._step(shard)
            if self._checkpoint_timer.due(self._progress.step, outcome.checkpoint):
                self._saver.save(shard, self._progress)
            if outcome.finish:
                return None
            if outcome.fence != NO_FENCE:
                return self._preparer.take(outcome.fence)
        return None

    def _step(self, shard: Shard) -> VoteResult:
        """Do one step, and take the snapshot after it."""
        step = self._progress.step + 1
        is_due = self._snapshots.due(step)

        def before_update() -> None:
            self._snapshots.copied()
            self._between_steps = False

        def propose() -> RankProposal:
            directive = self._mailbox.directive
            if directive.aborted >= shard.world.generation:
                raise AbortedGeneration(f"generation {shard.world.generation} was aborted")
            fence, finish = self._preparer.fence_after(step), directive.finish is not FinishMode.NO
            if is_due or finish or fence != NO_FENCE:
                self._snapshots.acknowledged()
            stages, interval = self._stages.propose(directive), self._snapshots.wanted_interval
            return RankProposal(fence, finish, interval, stages, self._checkpoint_timer.wanted)

        keep_gradients = self._snapshots.wants_gradients(step)
        stepped = self._stepper.step(shard, self._progress, before_update, propose, keep_gradients)
        why = explosion(self._mailbox.records, stepped.record, self._spec.recovery.loss_explosion)
        if why:  # the shard's state is that of a discarded step: only snapshots of earlier ones are usable
            self._between_steps = False
            raise LossExploded(why)
        outcome, generation = stepped.outcome, shard.world.generation
        self._progress, self._between_steps = self._stages.agree(outcome, stepped.progress), True
        is_due = is_due or outcome.finish or outcome.fence != NO_FENCE
        record = replace(stepped.record, snapshot_interval=self._snapshots.interval)
        if stepped.saturated:
            self._mailbox.publish(saturated=Saturation(step, stepped.saturated))
        self._mailbox.record(
            record, micro_batches=stepped.memory, **self._snapshots.committed(generation, step, is_due)
        )
        self._snapshots.agree(outcome.interval, record.step_s, is_due)
        if is_due:
            self._snapshots.take(shard, self._progress, record.lr, stepped.gradients)
        return outcome

    # -- between generations -----------------------------------------------------------------------------------

    def _await_transition(self) -> PreparedTransition:
        """Wait, on standby or stranded, until a plan includes this worker and its transition can begin."""
        while True:
            prepared = self._preparer.await_next(meanwhile=self._may_check)
            if prepared is None:
                self._checks.run()
                continue
            source = prepared.plan.source
            if source is None or self._factory.me in source.holders or self._await_fence(prepared):
                return prepared
            prepared.close()

    def _may_check(self, directive: Directive) -> bool:
        """Whether a replay check is requested and this worker holds no state that takes memory beside it."""
        return self._mailbox.state.phase is Phase.STANDBY and self._checks.is_asked(directive)

    def _await_fence(self, prepared: PreparedTransition) -> bool:
        """Wait for the old world to reach its fence. False if the plan is dropped before, or its store fails."""
        plan = prepared.plan
        try:
            while (standing := announced(prepared, POLL_S)) is None:
                if not self._preparer.stands(plan):
                    return False
        except RuntimeError as error:
            log.warning("generation %d can't be reached, its rendezvous store is gone: %s", plan.generation, error)
            self._mailbox.publish(failed_generation=plan.generation)
            return False
        self._progress = self._stages.follow(standing.progress)
        self._mailbox.go_back_to(standing.progress.step, standing.records)
        return True

    def _arrive(self, prepared: PreparedTransition) -> bool:
        """Enter the new generation and wait for its activation. False if that fails; the old state is kept."""
        plan = prepared.plan
        try:
            self._move(prepared)
        except Exception as error:
            if plan.source is None and kind_of(error) != "peer_lost":
                raise
            if plan.source is not None and isinstance(error, DigestMismatch):
                self._snapshots.distrust(plan.source.world.generation, self._progress.step)
            prepared.close()  # first: frees peers that wait for this worker, not for the failed one
            self._abandon_transition(plan, error)
            return False
        return self._await_activation(prepared)

    def _move(self, prepared: PreparedTransition) -> None:
        """Enter the next generation, up to the point where only activation is missing."""
        plan, source = prepared.plan, prepared.plan.source
        self._abort_handle.begin(plan.generation if source is None else source.world.generation)
        self._mailbox.publish(phase=Phase.MOVING, error=None)
        self._hold()
        if source is None:
            self._snapshots.held = None
            sampler = self._feed.first_order
            self._shard, progress, handover = first_shard(self._factory, prepared, sampler)
            self._progress = self._stages.follow(progress)
            self._mailbox.go_back_to(progress.step)
        else:
            mine = self._factory.me in source.holders
            held = self._snapshots.gathered(source, self._progress) if mine else None
            if held is not None:
                self._progress = self._stages.follow(held.progress)
                self._mailbox.go_back_to(held.progress.step)
            if source.holders[0] == self._factory.me:
                announce(prepared, self._progress, self._mailbox.records)
            recorded = next((r for r in reversed(self._mailbox.records) if r.step == self._progress.step), None)
            self._shard, handover = make_transition(self._factory, prepared, held, self._progress, recorded)
        self._snapshots.acknowledged()  # of the old world: the snapshot begun at the fence
        prepared.close_transfer()
        log.info("generation %d is ready: %s", plan.generation, handover)
        self._mailbox.publish(
            phase=Phase.READY,
            generation=plan.generation,
            holdings=self._snapshots.holdings(),
            handovers=(*self._mailbox.state.handovers[-9:], handover),
        )

    def _hold(self) -> None:
        """Close the shard's engine; its state stays in memory if it belongs to a finished step."""
        if self._shard is not None:
            if self._between_steps:
                self._snapshots.hold(self._shard, self._progress)
            self._drop()

    def _drop(self) -> None:
        """Close the engine and the generation's process groups."""
        if self._shard is not None:
            self._shard.engine.close()
            self._shard = None
        disconnect()

    def _stop(self, error: Exception) -> None:
        """End the generation after an error: free peers that wait for this worker, keep its state, and report."""
        assert self._shard is not None
        generation, text = self._shard.world.generation, "".join(traceback.format_exception(error))
        kind = kind_of(error)
        log.warning("generation %d stops after step %d: %s: %s", generation, self._progress.step, kind, error)
        shut_connections()  # first: peers may wait for this worker, not for the failed one
        abort_collectives()
        self._hold()
        self._snapshots.leave()
        self._free_peers(error)
        self._between_steps = True
        self._abort_handle.end()
        self._mailbox.publish(
            phase=Phase.STRANDED,
            stopped=generation,
            holdings=self._snapshots.holdings(),
            error=WorkerError(kind, str(error), text),
        )

    def _abandon_transition(self, plan: GenerationPlan, error: Exception) -> None:
        """Drop the half-built shard of a failed transition, keep the old one, and report."""
        kind, text = kind_of(error), "".join(traceback.format_exception(error))
        log.warning("the transition to generation %d failed: %s", plan.generation, error)
        self._snapshots.leave()
        self._drop()
        self._free_peers(error)
        self._abort_handle.end()
        holdings = self._snapshots.holdings()
        was_member = plan.source is not None and self._factory.me in plan.source.world
        self._mailbox.publish(
            phase=Phase.STRANDED if holdings or was_member else Phase.STANDBY,
            failed_generation=plan.generation,
            holdings=holdings,
            error=None if kind == "peer_lost" else WorkerError(kind, str(error), text),
        )

    def _await_activation(self, prepared: PreparedTransition) -> bool:
        """True once this plan is activated with this worker as a member; then the old shard is dropped. False if this
        worker leaves, or another plan replaced this one: a newcomer that was ready for a failed plan may have no part
        in the next one."""
        plan = prepared.plan
        activated = self._preparer.await_activation(plan)
        if activated != plan.generation:
            self._drop()
            if prepared.protection is not None:
                prepared.protection.close()
        if activated >= plan.generation:
            self._snapshots.leave()
            self._snapshots.held = None
            gc.collect()  # DeepSpeed's engine is full of cycles: without this the old shard stays in memory
        if activated == plan.generation and self._shard is not None:
            self._snapshots.begin(plan.generation, prepared.protection)
            log.info("generation %d begins after step %d", plan.generation, self._progress.step)
            return True
        if activated >= plan.generation:
            self._abort_handle.end()
            self._mailbox.publish(phase=Phase.STANDBY, generation=-1, holdings=self._snapshots.holdings())
        return False

    # -- checkpoints and the end -------------------------------------------------------------------------------

    def _finish(self, shard: Shard) -> None:
        """Write the last checkpoint and wait until it is marked: if a worker fails before, the step isn't safe."""
        generation, step = shard.world.generation, self._progress.step
        self._saver.save(shard, self._progress)
        self._saver.wait()
        self._mailbox.publish(phase=Phase.FINISHED)
        log.info("finished after step %d", step)
        directive = self._mailbox.wait(lambda d: d.checkpoint_done >= step or d.aborted >= generation)
        if directive.checkpoint_done < step:
            raise AbortedGeneration(f"generation {generation} was aborted before its last checkpoint was complete")

    def _saved(self, written: ShardWritten) -> None:
        self._mailbox.publish(shards=(*self._mailbox.state.shards[-3:], written))

    def _not_saved(self, error: Exception) -> None:
        self._mailbox.publish(
            phase=Phase.FAILED,
            error=WorkerError("storage", f"a checkpoint could not be written: {error}", traceback.format_exc()),
        )

    def _fail(self, error: Exception) -> None:
        text = "".join(traceback.format_exception(error))
        kind = kind_of(error)
        shut_connections()  # peers may wait for this worker
        abort_collectives()
        self._drop()
        self._free_peers(error)
        log.error("%s\n%s after step %d: %s", text.rstrip(), kind, self._progress.step, error)
        self._mailbox.publish(phase=Phase.FAILED, error=WorkerError(kind, str(error), text))

    def _free_peers(self, error: BaseException) -> None:
        """Close connections that peers may be blocked on. gloo closes them only once nothing refers to its groups, not
        even the frames of an error."""
        cause: BaseException | None = error
        while cause is not None:
            cause.__traceback__ = None
            cause = cause.__context__
        gc.collect()

"""The training thread of a worker: stand by, enter a generation, train to its fence, and repeat until the run ends.

`Trainer.run` is a worker's life, a walk through the states of `orchestrator.worker.states`. A rescale happens in
`Trainer._rescale`: between the fence at which `Trainer._train` ends one generation and the activation for which
`Trainer._activate` waits. When a peer fails, or the step fails here, the generation is over (`Trainer._interrupt`,
`Trainer._strand`): the thread releases what peers may wait for, keeps its state, and waits for the next plan.
"""

import gc
import logging
from contextlib import suppress
from functools import partial

import torch

from orchestrator.comm.transport.gloo import shut_connections
from orchestrator.comm.transport.nccl import abort_communicators
from orchestrator.engine.process_groups import disconnect
from orchestrator.policy.health.expert_load import is_shown
from orchestrator.protocol.messages import GenerationPlan
from orchestrator.protocol.worker_phase import Phase
from orchestrator.protocol.worker_report import CHECKPOINT_CORRUPT
from orchestrator.storage.backends.location import location_of
from orchestrator.storage.caller import Caller, call_here
from orchestrator.worker.plan_wait import PlanWaiter
from orchestrator.worker.replay.checker import ReplayChecker
from orchestrator.worker.runtime.abort import AbortHandle
from orchestrator.worker.runtime.errors import CORRUPTED, failure_of, free_peers, kind_of
from orchestrator.worker.runtime.mailbox import WorkerMailbox
from orchestrator.worker.shard.shard import ShardFactory
from orchestrator.worker.states import (
    Finished,
    Interrupted,
    Leaving,
    Ready,
    Rescaling,
    Standby,
    Stranded,
    Training,
    WorkerState,
)
from orchestrator.worker.step.batches import BatchReader
from orchestrator.worker.step.position import RunPosition
from orchestrator.worker.step.train_step import TrainStep
from orchestrator.worker.training_loop import LiveShard, TrainingLoop
from orchestrator.worker.transition.keeper_link import KeeperLink
from orchestrator.worker.transition.preparation import TransitionPreparer
from orchestrator.worker.transition.prepared_transition import PreparedTransition
from orchestrator.worker.transition.rescaler import Rescaler
from orchestrator.worker.transition.save_shard import ShardSaver
from orchestrator.worker.transition.snapshots import SnapshotManager

log = logging.getLogger("orchestrator.worker")


class Trainer:
    """Trains one shard after another, as directed through the mailbox.

    Args:
        mailbox: source of directives and destination of reports.
        factory: builds shards.
        feed: reads the rows of a step.
        caller: makes the calls that write to run storage.
    """

    def __init__(
        self, mailbox: WorkerMailbox, factory: ShardFactory, feed: BatchReader, caller: Caller = call_here
    ) -> None:
        spec, position = factory.spec, RunPosition(feed)
        preparer = TransitionPreparer(factory, mailbox)
        saver = ShardSaver(
            location_of(factory.job.storage_dir) / "checkpoints",
            lambda num_experts: factory.state(num_experts).tensors,
            spec.communication.compression.keeps,
            mailbox.state.process.numerics,
            mailbox.add_shard,
            mailbox.refuse_shard,
            self._fail_checkpoint,
            caller,
            factory.device,
        )
        self._mailbox = mailbox
        self._snapshots = SnapshotManager(factory.me, spec.protection, spec.train.max_steps - 1)
        self._abort_handle = AbortHandle((shut_connections, abort_communicators, self._snapshots.shut))
        checker = ReplayChecker(factory, feed, mailbox, preparer)
        self._waiter = PlanWaiter(factory.me, mailbox, preparer, position, checker, self._snapshots)
        self._rescaler = Rescaler(factory, mailbox, self._snapshots, position)
        train_step = TrainStep(factory, feed)
        link = KeeperLink(factory, mailbox, self._snapshots)
        mailbox.keeps_loads = partial(is_shown, num_steps=spec.train.max_steps)
        self._loop = TrainingLoop(spec, mailbox, train_step, preparer, self._snapshots, position, saver, link)

    def run(self) -> None:
        """Run from standby to the end of the run. An error ends it and is in the worker's report."""
        try:
            self._live()
        except Exception as error:
            self._fail(error)
        finally:
            self._waiter.close()
            self._loop.close()
            self._snapshots.leave()
            disconnect()

    def abort(self, generation: int) -> None:
        """End generations up to this one and free the training thread from them. Called from the control thread."""
        self._abort_handle.abort(generation)

    def settle(self, generation: int) -> None:
        """Drop snapshots of older generations, to which the run won't return. Called from the control thread."""
        self._snapshots.settle(generation)

    def _live(self) -> None:
        state: WorkerState = Standby()
        while not isinstance(state, Finished):
            state = self._next(state)

    def _next(self, state: WorkerState) -> WorkerState:
        """The state after this one. Returns once it is reached."""
        match state:
            case Standby():
                gc.collect()  # DeepSpeed's engine is full of cycles: without this an old shard stays in memory
                return self._begin_rescale(self._waiter.await_transition(may_replay=True))
            case Stranded():
                return self._begin_rescale(self._waiter.await_transition(may_replay=False))
            case Rescaling(prepared):
                return self._rescale(prepared)
            case Ready() | Leaving():
                return self._activate(state)
            case Training(live):
                return self._train(live)
            case Interrupted():
                return self._strand(state)
            case Finished():
                return state

    # -- a generation ------------------------------------------------------------------------------------------

    def _train(self, live: LiveShard) -> WorkerState:
        """Train to the fence of the next generation, or to the end of the run."""
        prepared: PreparedTransition | None = None
        try:
            self._abort_handle.begin(live.generation)
            prepared = self._loop.train(live)
            if prepared is None:
                self._loop.finish(live)
                return Finished()
            rescaling = self._begin_rescale(prepared)
            self._hold(live)
        except Exception as error:
            if prepared is not None:
                prepared.close()
            return self._interrupt(live, error)
        return rescaling

    def _interrupt(self, live: LiveShard, error: Exception) -> Interrupted:
        """End the generation after an error: free peers that wait for this worker, and close the engine."""
        step = self._mailbox.state.step
        log.warning("generation %d stops after step %d: %s: %s", live.generation, step, kind_of(error), error)
        shut_connections()  # first: peers may wait for this worker, not for the failed one
        abort_communicators()
        if kind_of(error) == CORRUPTED:
            live.progress = None
        self._hold(live)
        return Interrupted(live.generation, error)

    def _strand(self, interrupted: Interrupted) -> Stranded:
        """Report the state that this worker holds after the end of its generation."""
        error = interrupted.error
        if kind_of(error) == CORRUPTED:  # this process or its GPU can't be trusted; its buddy holds a copy
            raise error
        failure = failure_of(error)
        self._snapshots.leave()
        self._abort_handle.end()
        self._mailbox.publish(
            phase=Phase.STRANDED,
            stopped=interrupted.generation,
            holdings=self._snapshots.holdings,
            error=failure,
        )
        free_peers(error)  # while the controller plans: it takes some 15 ms
        return Stranded()

    def _hold(self, live: LiveShard) -> None:
        """Close the shard's engine; its state stays in memory if it is that of a finished step."""
        self._loop.release(live)
        if live.progress is not None:
            self._snapshots.hold(live.shard, live.progress)
        with suppress(torch.AcceleratorError):  # if the GPU is lost
            live.shard.engine.close()
        disconnect()

    # -- between generations -----------------------------------------------------------------------------------

    def _begin_rescale(self, prepared: PreparedTransition) -> Rescaling:
        """Report that this worker leaves its generation, or its standby, for the next one."""
        plan = prepared.plan
        self._abort_handle.begin(plan.generation if plan.source is None else plan.source.world.generation)
        self._mailbox.publish(phase=Phase.MOVING, error=None)
        return Rescaling(prepared)

    def _rescale(self, prepared: PreparedTransition) -> WorkerState:
        """Build the shard of the next generation and fill it from the old ones, without disk or restart."""
        plan = prepared.plan
        try:
            shard = self._rescaler.enter(prepared)
        except Exception as error:
            is_damaged = plan.restore is not None and kind_of(error) == CHECKPOINT_CORRUPT
            if plan.source is None and kind_of(error) != "peer_lost" and not is_damaged:
                raise
            prepared.close()  # first: frees peers that wait for this worker, not for the failed one
            return self._abandon_transition(plan, error)
        return Ready(prepared, shard) if shard is not None else Leaving(prepared)

    def _abandon_transition(self, plan: GenerationPlan, error: Exception) -> Standby | Stranded:
        """Keep the old state after a failed transition, and report."""
        failure = failure_of(error)
        log.warning("the transition to generation %d failed: %s", plan.generation, error)
        self._snapshots.leave()
        disconnect()
        free_peers(error)
        self._abort_handle.end()
        was_member = plan.source is not None and self._mailbox.state.worker in plan.source.world
        state = Stranded() if was_member or self._snapshots.held is not None else Standby()
        self._mailbox.publish(
            phase=Phase.STRANDED if isinstance(state, Stranded) else Phase.STANDBY,
            failed_generation=plan.generation,
            holdings=self._snapshots.holdings,
            error=None if failure.kind == "peer_lost" else failure,
        )
        return state

    def _activate(self, ready: Ready | Leaving) -> WorkerState:
        """Wait until the next generation is activated, then drop the old state. A newer plan may replace it first, and
        need not include this worker."""
        plan, protection = ready.prepared.plan, ready.prepared.protection
        activated = self._waiter.await_activation(plan)
        if activated != plan.generation:
            if isinstance(ready, Ready):
                ready.shard.engine.close()
            disconnect()
            if protection is not None:
                protection.close()
        if activated < plan.generation:
            return Stranded()
        self._snapshots.leave()
        self._snapshots.held = None
        if isinstance(ready, Ready) and activated == plan.generation:
            gc.collect()  # the old shard
            self._snapshots.begin(plan.generation, protection)
            log.info("generation %d begins after step %d", plan.generation, self._mailbox.state.step)
            return Training(self._loop.live(ready.shard))
        self._abort_handle.end()
        gc.collect()  # frees the old shard before a check that needs its memory may begin
        self._mailbox.publish(phase=Phase.STANDBY, generation=-1, holdings=self._snapshots.holdings)
        return Standby()

    def _fail_checkpoint(self, error: Exception) -> None:
        """Report that a shard could not be written. Called by the thread that tried."""
        self._mailbox.publish(phase=Phase.FAILED, error=failure_of(error, "a checkpoint could not be written: "))

    # -- the end -----------------------------------------------------------------------------------------------

    def _fail(self, error: Exception) -> None:
        failure = failure_of(error)
        shut_connections()  # peers may wait for this worker
        abort_communicators()
        disconnect()
        free_peers(error)
        log.error("%s\n%s after step %d: %s", failure.traceback.rstrip(), failure.kind, self._mailbox.state.step, error)
        self._mailbox.publish(phase=Phase.FAILED, error=failure)

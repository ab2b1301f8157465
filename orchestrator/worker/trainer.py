"""The training thread of a worker: stand by, move into a generation, train to its fence, and so on to the end.

`Trainer.run` is a worker's life, `Trainer.train` its generation, `Stepper.step` a step. When a peer is lost, or the
step fails here, the generation is over: the thread lets go of everything that peers may wait for, keeps its state, and
waits for the plan of the next generation.
"""

import gc
import logging
import threading
import traceback
from pathlib import Path

from orchestrator.comm import pulse
from orchestrator.comm.sockets import shut_connections
from orchestrator.elastic.cut import Holding
from orchestrator.engine.groups import disconnect
from orchestrator.protocol.messages import Finish, GenerationPlan, Phase, ShardWritten, Source, WorkerError
from orchestrator.spec.protection import interval_of
from orchestrator.state.snapshot import Vault, joined
from orchestrator.worker.desk import Desk
from orchestrator.worker.faults import GenerationAborted, kind_of
from orchestrator.worker.feed import Feed
from orchestrator.worker.moving import Held, Prepared, announce, announced, first_shard, move
from orchestrator.worker.preparing import Preparations
from orchestrator.worker.protection import Protection
from orchestrator.worker.saving import Saver
from orchestrator.worker.shard import Progress, Shard, Workshop
from orchestrator.worker.stepping import Stepper, Voice
from orchestrator.worker.vote import NO_FENCE, Outcome

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
        self._stepper = Stepper(workshop, feed)
        self._preparations = Preparations(workshop, desk)
        checkpoints = Path(workshop.job.storage_dir) / "checkpoints"
        self._saver = Saver(checkpoints, workshop.saved_shapes(), self._saved, self._not_saved)
        self._shard: Shard | None = None
        self._held: Held | None = None  # the last activated state, while no engine is around it
        self._vault = Vault()
        self._protection: Protection | None = None
        self._between_steps = True  # False: the shard's state is that of no finished step
        self._progress = Progress(-1, 0, feed.sampler.to_json())
        self._lock = threading.Lock()
        self._engaged: int | None = None  # generation whose peers this thread may be waiting for
        self._aborted = -1

    # -- a worker's life ---------------------------------------------------------------------------------------

    def run(self) -> None:
        """From standby to the end of the run. Errors end up in the report."""
        try:
            self._live()
        except Exception as error:
            self._fail(error)
        finally:
            self._preparations.close()
            self._stepper.close()
            self._leave_protection()
            disconnect()

    def _live(self) -> None:
        prepared: Prepared | None = self._await_move()
        while prepared is not None:
            if self._arrive(prepared) and self._shard is not None:
                prepared = self._train_or_stop(self._shard)
            else:
                prepared = self._await_move()

    def _train_or_stop(self, shard: Shard) -> Prepared | None:
        """To the generation's end, whatever that is: a fence, a failure, or the end of the run, which is None."""
        try:
            fence = self.train(shard)
            if fence is not None:
                return fence
            self._finish(shard)
        except Exception as error:
            del shard
            self._stop(error)
            return self._await_move()
        return None

    def abort(self, generation: int) -> None:
        """Called from the control thread: generations up to this one are over, whoever waits in one is freed."""
        with self._lock:
            engaged = self._engaged is not None and self._engaged <= generation
            if generation <= self._aborted or not engaged:
                self._aborted = max(self._aborted, generation)
                return
            self._aborted = generation
        count = shut_connections()
        if (protection := self._protection) is not None:
            protection.shut()
        log.info("generation %d is aborted: %d connections shut", generation, count)

    # -- a generation ------------------------------------------------------------------------------------------

    def train(self, shard: Shard) -> Prepared | None:
        """Step after step until all members agree on a fence. None when there is no step left, or the run shall end."""
        with self._lock:
            self._engaged = shard.world.generation
        pulse.reset()
        self._protect(shard)
        self._desk.publish(phase=Phase.TRAINING, generation=shard.world.generation, holdings=())
        while self._progress.step + 1 < self._spec.train.steps:
            outcome = self._step(shard)
            if self._checkpoint_due():
                self._saver.save(shard, self._progress)
            if outcome.finish:
                return None
            if outcome.fence != NO_FENCE:
                return self._preparations.take(outcome.fence)
        return None

    def _step(self, shard: Shard) -> Outcome:
        """One step, and the snapshot after it."""
        step = self._progress.step + 1
        is_due = self._snapshot_due(step)

        def before_update() -> None:
            if self._protection is not None:
                self._protection.copied()
            self._between_steps = False

        def speak() -> Voice:
            directive = self._desk.directive
            if directive.aborted >= shard.world.generation:
                raise GenerationAborted(f"generation {shard.world.generation} was aborted")
            voice = Voice(self._preparations.fence_after(step), directive.finish is not Finish.NO)
            if self._protection is not None and (is_due or voice.finish or voice.fence != NO_FENCE):
                self._protection.acknowledged()
            return voice

        stepped = self._stepper.step(shard, self._progress, before_update, speak)
        self._progress, self._between_steps = stepped.progress, True
        outcome = stepped.outcome
        is_due = is_due or outcome.finish or outcome.fence != NO_FENCE
        self._desk.record(stepped.record, **self._committed(shard, is_due))
        if is_due:
            self._protect(shard)
        return outcome

    def _committed(self, shard: Shard, votes_tell: bool) -> dict[str, int]:
        """What the newest vote has shown to be held twice: everybody had the answer of its buddy before it voted."""
        if self._protection is None:
            return {"committed": self._progress.step, "settled": shard.world.generation}
        if not votes_tell:
            return {}
        self.settle(shard.world.generation)
        return {"committed": self._protection.begun, "settled": shard.world.generation}

    def _snapshot_due(self, step: int) -> bool:
        interval = interval_of(self._spec.protection)
        return interval is not None and ((step + 1) % interval == 0 or step + 1 == self._spec.train.steps)

    # -- protection --------------------------------------------------------------------------------------------

    def _protect(self, shard: Shard) -> None:
        """Begin a snapshot of the shard as it is."""
        if self._protection is not None:
            self._protection.begin(self._progress.step, shard.engine.ranges().detached(), self._progress.to_json())

    def settle(self, generation: int) -> None:
        """The generation has a committed step of its own: nobody goes back to an older one. From any thread."""
        self._vault.drop_before(generation)

    def _leave_protection(self) -> None:
        if self._protection is not None:
            self._protection.close()
            self._protection = None

    def _holdings(self) -> tuple[Holding, ...]:
        held = set(self._vault.holdings())
        if self._held is not None:
            held.add(Holding(self._held.generation, self._held.progress.step, self._held.rank))
        return tuple(sorted(held, key=lambda h: (h.generation, h.step, h.rank)))

    def _gathered(self, source: Source) -> Held:
        """All shards of a state that this worker hands over, its own first. Raises KeyError if one isn't here."""
        step = self._progress.step if source.step is None else source.step
        generation, parts, progress, mine = source.world.generation, [], self._progress, -1
        ranks = [rank for rank, holder in enumerate(source.holders) if holder == self._workshop.me]
        for rank in sorted(ranks, key=lambda rank: source.world.members[rank] != self._workshop.me):
            held = self._held
            if held is not None and (held.generation, held.progress.step, held.rank) == (generation, step, rank):
                parts.append(held.ranges)
                progress, mine = held.progress, rank
            else:
                snapshot = self._vault.find(Holding(generation, step, rank))
                parts.append(snapshot.ranges)
                progress = Progress.from_json(snapshot.note)
        return Held(generation, mine, progress, joined(parts))

    # -- between generations -----------------------------------------------------------------------------------

    def _await_move(self) -> Prepared:
        """Stand by, or stranded, until a plan has a place for this worker and its move can begin."""
        while True:
            prepared = self._preparations.await_next()
            source = prepared.plan.source
            if source is None or self._workshop.me in source.holders or self._await_fence(prepared.plan):
                return prepared
            prepared.close()

    def _await_fence(self, plan: GenerationPlan) -> bool:
        """Wait for the old world to reach its fence. False if the plan is given up before."""
        while (standing := announced(self._workshop.store, plan, POLL_S)) is None:
            if not self._preparations.stands(plan):
                return False
        self._progress = standing.progress
        self._desk.go_back_to(standing.progress.step, standing.records)
        return True

    def _arrive(self, prepared: Prepared) -> bool:
        """Move, and wait until the new generation is activated. False if it isn't reached; then all is as before."""
        plan = prepared.plan
        try:
            self._move(prepared)
        except Exception as error:
            if plan.source is None and kind_of(error) != "peer_lost":
                raise
            prepared.close()  # first of all: peers that wait for this worker, not for the lost one, are freed
            self._strand(plan, error)
            return False
        return self._await_activation(prepared)

    def _move(self, prepared: Prepared) -> None:
        """Into the next generation, up to the point where only activation is missing."""
        plan, source = prepared.plan, prepared.plan.source
        with self._lock:
            self._engaged = plan.generation if source is None else source.world.generation
        self._desk.publish(phase=Phase.MOVING, error=None)
        self._hold()
        if source is None:
            self._held = None
            self._shard, self._progress, handover = first_shard(self._workshop, prepared, self._progress.sampler)
            self._desk.go_back_to(self._progress.step)
        else:
            held = self._gathered(source) if self._workshop.me in source.holders else None
            if held is not None:
                self._progress = held.progress
                self._desk.go_back_to(held.progress.step)
            if source.holders[0] == self._workshop.me:
                announce(self._workshop.store, plan, self._progress, self._desk.records)
            self._shard, handover = move(self._workshop, prepared, held, self._progress)
        if self._protection is not None:  # that of the old world: what was begun at the fence
            self._protection.acknowledged()
        prepared.close_transfer()
        log.info("generation %d is ready: %s", plan.generation, handover)
        self._desk.publish(
            phase=Phase.READY,
            generation=plan.generation,
            holdings=self._holdings(),
            handovers=(*self._desk.state.handovers[-9:], handover),
        )

    def _hold(self) -> None:
        """Take the engine away from the shard; its state stays in memory, if it is that of a finished step."""
        if self._shard is not None:
            shard = self._shard
            if self._between_steps:
                ranges = shard.engine.ranges().detached()
                self._held = Held(shard.world.generation, shard.rank, self._progress, ranges)
            self._drop()

    def _drop(self) -> None:
        """Let the engine go, and with it the generation's groups."""
        if self._shard is not None:
            self._shard.engine.close()
            self._shard = None
        disconnect()

    def _stop(self, error: Exception) -> None:
        """The generation is over: free whoever waits for this worker, keep what it has, and say so."""
        assert self._shard is not None
        generation, text = self._shard.world.generation, "".join(traceback.format_exception(error))
        kind = kind_of(error)
        log.warning("generation %d stops after step %d: %s: %s", generation, self._progress.step, kind, error)
        shut_connections()  # first of all: others may wait for this worker, not for whoever is lost
        self._hold()
        self._leave_protection()
        self._free_peers(error)
        self._between_steps = True
        self._disengage()
        self._desk.publish(
            phase=Phase.STRANDED,
            stopped=generation,
            holdings=self._holdings(),
            error=WorkerError(kind, str(error), text),
        )

    def _strand(self, plan: GenerationPlan, error: Exception) -> None:
        """A move failed: give up the half-built shard, keep the old one, and say so."""
        kind, text = kind_of(error), "".join(traceback.format_exception(error))
        log.warning("the move to generation %d failed: %s", plan.generation, error)
        self._leave_protection()
        self._drop()
        self._free_peers(error)
        self._disengage()
        holdings = self._holdings()
        self._desk.publish(
            phase=Phase.STRANDED if holdings else Phase.STANDBY,
            failed_generation=plan.generation,
            holdings=holdings,
            error=None if kind == "peer_lost" else WorkerError(kind, str(error), text),
        )

    def _disengage(self) -> None:
        with self._lock:
            self._engaged = None

    def _await_activation(self, prepared: Prepared) -> bool:
        """True once the run has moved on by this plan and this worker is a member; then the old shard is let go. False
        if it is none, or another plan came in its place: a newcomer that was ready for a plan that failed may have no
        part in the next one."""
        plan = prepared.plan
        activated = self._preparations.await_activation(plan)
        if activated != plan.generation:
            self._drop()
            if prepared.protection is not None:
                prepared.protection.close()
        if activated >= plan.generation:
            self._leave_protection()
            self._held = None
            gc.collect()  # DeepSpeed's engine is full of cycles: without this the old shard stays in memory
        if activated == plan.generation and self._shard is not None:
            self._protection = prepared.protection
            if self._protection is not None:
                self._protection.start(self._vault)
            else:
                self._vault.drop_before(plan.generation)
            log.info("generation %d begins after step %d", plan.generation, self._progress.step)
            return True
        if activated >= plan.generation:
            self._disengage()
            self._desk.publish(phase=Phase.STANDBY, generation=-1, holdings=self._holdings())
        return False

    # -- checkpoints and the end -------------------------------------------------------------------------------

    def _checkpoint_due(self) -> bool:
        every = self._spec.checkpoint.every
        done = self._progress.step + 1
        return every is not None and done % every == 0 and done < self._spec.train.steps

    def _finish(self, shard: Shard) -> None:
        """Write the last checkpoint, and stay until it is marked: if somebody is lost before, the step isn't safe."""
        generation, step = shard.world.generation, self._progress.step
        self._saver.save(shard, self._progress)
        self._saver.wait()
        self._desk.publish(phase=Phase.FINISHED)
        log.info("finished after step %d", step)
        directive = self._desk.wait(lambda d: d.checkpoint_done >= step or d.aborted >= generation)
        if directive.checkpoint_done < step:
            raise GenerationAborted(f"generation {generation} was aborted before its last checkpoint was complete")

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
        self._drop()
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
        gc.collect()

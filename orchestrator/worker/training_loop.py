"""Training within one generation: step after step, to its fence or to the end of the run."""

import logging
import time
from dataclasses import dataclass

from orchestrator.comm import collective_stats
from orchestrator.policy.health.loss_spike import explosion
from orchestrator.protocol.changes import changed
from orchestrator.protocol.messages import FinishMode
from orchestrator.protocol.worker_phase import Phase
from orchestrator.protocol.worker_report import Saturation
from orchestrator.spec.fault_tolerance import COMMITTED, MAX_UNPUBLISHED
from orchestrator.spec.job import JobSpec
from orchestrator.storage.condition import StorageCondition, StorageTrouble
from orchestrator.worker.runtime.errors import AbortedGeneration, LossExploded, StateCorrupted
from orchestrator.worker.runtime.mailbox import WorkerMailbox
from orchestrator.worker.shard.shard import Shard, TrainingProgress
from orchestrator.worker.step.checkpoint_timer import CheckpointTimer
from orchestrator.worker.step.hooks import RankProposal
from orchestrator.worker.step.position import RunPosition
from orchestrator.worker.step.seal import open_seal
from orchestrator.worker.step.train_step import TrainStep
from orchestrator.worker.step.vote import NO_FENCE, VoteResult
from orchestrator.worker.transition.keeper_link import KeeperLink
from orchestrator.worker.transition.preparation import TransitionPreparer
from orchestrator.worker.transition.prepared_transition import PreparedTransition
from orchestrator.worker.transition.save_shard import ShardSaver
from orchestrator.worker.transition.shard_write import AGAIN_S
from orchestrator.worker.transition.snapshots import SnapshotManager

log = logging.getLogger("orchestrator.worker")

SAVED_EVERY_S = 0.25  # how often a worker that waits for storage looks whether it still has to
WAIT_SHOWN_AFTER_S = 1.0  # longer than a poll, by which the newest published step becomes known
UNPUBLISHED = StorageTrouble(StorageCondition.AWAY, "training waits: run storage doesn't take the records of steps")


@dataclass
class LiveShard:
    """A shard in training.

    Args:
        progress: of the finished step whose state the shard has; None from the first change by an update until the vote
            on its step.
        until_step: as of the shard, but for a change that this generation began with itself.
    """

    shard: Shard
    progress: TrainingProgress | None
    until_step: int | None = None

    @property
    def generation(self) -> int:
        return self.shard.world.generation


@dataclass(frozen=True)
class TrainingHooks:
    """Hooks of the steps of one generation."""

    live: LiveShard
    mailbox: WorkerMailbox
    preparer: TransitionPreparer
    snapshots: SnapshotManager
    position: RunPosition
    saver: ShardSaver
    timer: CheckpointTimer

    def wait_for_rows(self, trouble: StorageTrouble | None) -> None:
        is_aborted = self.mailbox.directive.aborted >= self.live.generation
        self.mailbox.refuse_rows(None if is_aborted else trouble)
        if is_aborted:
            raise AbortedGeneration(f"generation {self.live.generation} was aborted")

    def before_micro_batch(self) -> None:
        pass

    def before_update(self) -> None:
        self.snapshots.copied()
        self.saver.copied()
        self.live.progress = None

    def propose(self, step: int) -> RankProposal:
        self.saver.verified()  # by the memory guard, which the step has opened
        directive, generation = self.mailbox.directive, self.live.generation
        if directive.aborted >= generation:
            raise AbortedGeneration(f"generation {generation} was aborted")
        fence, finish = self.preparer.fence_after(step), directive.finish is not FinishMode.NO
        if self.snapshots.due(step) or finish or fence != NO_FENCE or ends_after(self.live, step):
            self.snapshots.acknowledged()
        stages, interval = self.position.propose(directive), self.snapshots.wanted_interval
        if self.saver.is_writing:
            is_due = False  # the next one waits for it
        else:
            is_due = self.timer.wants(step, directive.checkpoint_interval_s, directive.checkpoint_from)
        return RankProposal(fence, finish, interval, stages, is_due, self.saver.is_writing)


def ends_after(live: LiveShard, step: int) -> bool:
    """Whether a generation with other experts does the next step."""
    return live.until_step == step + 1


class TrainingLoop:
    """Trains one shard after another."""

    def __init__(
        self,
        spec: JobSpec,
        mailbox: WorkerMailbox,
        train_step: TrainStep,
        preparer: TransitionPreparer,
        snapshots: SnapshotManager,
        position: RunPosition,
        saver: ShardSaver,
        link: KeeperLink,
    ) -> None:
        self._spec, self._mailbox, self._train_step, self._preparer = spec, mailbox, train_step, preparer
        self._snapshots, self._position, self._saver, self._link = snapshots, position, saver, link
        most_steps = MAX_UNPUBLISHED if spec.protection.publish == COMMITTED else None
        self._has_skipped = False  # a checkpoint, for one that was not written yet
        self._timer = CheckpointTimer(spec.checkpoint.every, spec.train.max_steps, at_least_every=most_steps)

    def live(self, shard: Shard) -> LiveShard:
        """A newly activated shard, whose state is that after the run's newest step."""
        is_made = shard.is_changed and shard.until_step == self._position.step + 1
        return LiveShard(shard, self._position.progress, None if is_made else shard.until_step)

    def train(self, live: LiveShard) -> PreparedTransition | None:
        """Train until all members agree on a fence, and return the transition that begins there. None when no step is
        left, or the run is to end."""
        shard, position = live.shard, self._position
        collective_stats.reset()
        if shard.seal is not None:
            shard.seal.close()
        self._snapshots.take(shard, position.progress)
        self._mailbox.publish(phase=Phase.TRAINING, generation=live.generation, holdings=())
        hooks = TrainingHooks(live, self._mailbox, self._preparer, self._snapshots, position, self._saver, self._timer)
        self._timer.begin(position.step)
        self._saver.begin(live.generation)
        while position.step + 1 < self._spec.train.max_steps:
            if ends_after(live, position.step):
                return self._await_successor(live)
            self._follow_keeper(live)
            self._await_published(live)
            outcome = self._step(live, hooks)
            if self._timer.due(position.step, outcome.checkpoint):
                self._save(shard, outcome.is_writing)
            if outcome.finish:
                return None
            if outcome.fence != NO_FENCE:
                return self._preparer.take(outcome.fence)
        return None

    def _save(self, shard: Shard, is_writing: bool) -> None:
        """Write a checkpoint, unless storage has not yet taken an earlier one from all ranks."""
        if is_writing:
            if not self._has_skipped:
                log.warning("no checkpoint of step %d: an earlier one is not written yet", self._position.step)
            self._has_skipped = True
        else:
            self._has_skipped = False
            self._timer.restart()
            self._saver.save(shard, self._position.progress)

    def finish(self, live: LiveShard) -> None:
        """Write the last checkpoint and wait until it is complete: if a worker fails before that, the step may be
        lost."""
        step, shard, progress = self._position.step, live.shard, self._position.progress
        while not self._saver.wait(SAVED_EVERY_S) and not self._saver.is_late:  # for an earlier one
            self._refuse_aborted(live)
        while not self._saver.has_written(shard, progress):
            self._saver.save(shard, progress)  # again, if there was no memory
            self._verify(live)
            if self._saver.wait(SAVED_EVERY_S) and not self._saver.has_written(shard, progress):
                self._mailbox.wait(lambda d: d.aborted >= live.generation, AGAIN_S)
            self._refuse_aborted(live)
        self._mailbox.publish(phase=Phase.FINISHED)
        log.info("finished after step %d", step)
        directive = self._mailbox.wait(
            lambda d: d.has_checkpoint(live.generation, step) or d.aborted >= live.generation
        )
        if not directive.has_checkpoint(live.generation, step):
            raise AbortedGeneration(f"generation {live.generation} was aborted before its last checkpoint was complete")

    def _refuse_aborted(self, live: LiveShard) -> None:
        if self._mailbox.directive.aborted >= live.generation:
            raise AbortedGeneration(f"generation {live.generation} was aborted before its last checkpoint was written")

    def release(self, live: LiveShard) -> None:
        """Wait until no checkpoint reads the shard any more. Raises StateCorrupted if it changed by itself since the
        newest one, which is void then."""
        if self._saver.is_unverified:
            self._verify(live)
        self._saver.copied()

    def _verify(self, live: LiveShard) -> None:
        """Let the newest checkpoint count, or raise StateCorrupted."""
        self._saver.copied()
        try:
            open_seal(live.shard, self._position.step + 1)
        except StateCorrupted:
            self._saver.void()
            raise
        self._saver.verified()

    def close(self) -> None:
        self._train_step.close()
        self._link.close()

    def _await_published(self, live: LiveShard) -> None:
        """Wait while so many steps are not published that the records of further ones might be lost, unless the run is
        to end or to change. All members wait before the same step, as they know of the same published one within a
        poll; the one that goes on first waits for the others in the step's first collective."""
        since_s, mailbox = time.monotonic(), self._mailbox
        while mailbox.is_full and mailbox.directive.finish is FinishMode.NO and mailbox.directive.next is None:
            if mailbox.directive.aborted >= live.generation:
                mailbox.refuse_rows(None)
                raise AbortedGeneration(f"generation {live.generation} was aborted")
            if time.monotonic() - since_s >= WAIT_SHOWN_AFTER_S:
                mailbox.refuse_rows(UNPUBLISHED)
            mailbox.wait(lambda _: not mailbox.is_full, SAVED_EVERY_S)
            self._follow_keeper(live)
        mailbox.refuse_rows(None)

    def _await_successor(self, live: LiveShard) -> PreparedTransition | None:
        """Wait for the transition to the generation that does the next step, which this one can't. None if the run is
        to end instead: the controller decides on one of the two."""
        while True:
            directive = self._mailbox.directive
            if directive.aborted >= live.generation:
                raise AbortedGeneration(f"generation {live.generation} was aborted")
            if (fence := self._preparer.fence_after(self._position.step)) != NO_FENCE:
                return self._preparer.take(fence)
            if directive.finish is not FinishMode.NO:
                return None
            self._follow_keeper(live)
            seq = directive.seq
            self._mailbox.wait(lambda d: d.seq > seq, SAVED_EVERY_S)  # noqa: B023  (called before the next turn)

    def _follow_keeper(self, live: LiveShard) -> None:
        """Send the first snapshot to a keeper that has connected."""
        connected = self._link.take(live.generation)
        if connected is not None:
            self._snapshots.change_keeper(*connected)
            self._snapshots.take(live.shard, self._position.progress)

    def _prunes(self, number: int) -> bool:
        """Whether an update prunes. What it prunes isn't in gradients, so a snapshot after it is whole."""
        pruning = self._spec.train.pruning
        return pruning is not None and pruning.is_due(number)

    def _step(self, live: LiveShard, hooks: TrainingHooks) -> VoteResult:
        """Do one step, report it, and take the snapshot after it."""
        snapshots, position = self._snapshots, self._position
        step = position.step + 1
        keep_gradients = snapshots.wants_gradients(step) and not self._prunes(position.progress.num_updates + 1)
        try:
            result = self._train_step.step(live.shard, position.progress, hooks, keep_gradients)
        except StateCorrupted:
            self._saver.void()
            raise
        why = explosion(self._mailbox.records, result.record, self._spec.recovery.loss_explosion)
        if why:  # the shard's state is that of a discarded step: only snapshots of earlier ones are usable
            live.progress = None
            raise LossExploded(why)
        outcome = result.outcome
        position.advance(outcome, result.progress)
        live.progress = position.progress
        is_last = outcome.finish or outcome.fence != NO_FENCE or ends_after(live, step)
        takes_snapshot = snapshots.due(step) or is_last
        if result.saturated:
            self._mailbox.publish(saturated=Saturation(step, result.saturated))
        self._mailbox.record(
            changed(result.record, snapshot_interval=snapshots.interval),
            micro_batches=result.memory,
            **snapshots.committed(live.generation, step, takes_snapshot),
        )
        snapshots.agree(outcome.interval, result.record.timing.step_s, takes_snapshot)
        if takes_snapshot:
            snapshots.take(live.shard, position.progress, result.record.update.lr, result.gradients)
        return outcome

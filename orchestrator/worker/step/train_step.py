"""One step of training in six phases: load, accumulate, update, validate, vote, record.

After the vote every member knows that all have finished the step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from orchestrator.comm import traffic_meter
from orchestrator.comm.transport import nccl
from orchestrator.engine.base import StepOutcome, noop
from orchestrator.engine.optim.lr_schedule import learning_rate
from orchestrator.model.draws import seed_draws
from orchestrator.protocol.step_record import BatchRecord, CommunicationRecord, StateRecord, StepRecord, UpdateRecord
from orchestrator.protocol.usage import TrafficKind
from orchestrator.protocol.worker_report import MicroBatchMemory
from orchestrator.state.ranges import NamedRanges
from orchestrator.worker.runtime.errors import AbortedGeneration
from orchestrator.worker.shard.shard import Shard, ShardFactory, TrainingProgress
from orchestrator.worker.step.batches import BatchReader, StepBatches
from orchestrator.worker.step.clock import StepClock
from orchestrator.worker.step.hooks import StepHooks
from orchestrator.worker.step.losses import StepLosses
from orchestrator.worker.step.memory_probe import MemoryProbe
from orchestrator.worker.step.prefetch import Prefetch
from orchestrator.worker.step.proven_sum import nonce_of
from orchestrator.worker.step.routing import RoutingRecorder, move_router_state, saliency_at
from orchestrator.worker.step.seal import open_seal
from orchestrator.worker.step.vote import NO_DIGESTS, Ballot, VoteResult, vote


@dataclass(frozen=True)
class StepResult:
    """A finished step: the vote's result, the training progress after it, and its record.

    Args:
        gradients: of its update, if it was applied and they were to be kept.
        memory: use by its generation's micro-batches, if measured.
        saturated: parameters whose gradient was too large here for an exact sum; its update is skipped then.
    """

    outcome: VoteResult
    progress: TrainingProgress
    record: StepRecord
    gradients: NamedRanges | None
    memory: MicroBatchMemory | None
    saturated: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Step:
    """The step under way: what all its phases use."""

    number: int
    shard: Shard
    hooks: StepHooks
    clock: StepClock
    aborted: int = field(default_factory=nccl.aborted)  # communicators, before it began

    @property
    def is_skipped(self) -> bool:
        """Whether its batch is left out: evaluated, without an update."""
        return self.number in self.shard.skips


class TrainStep:
    """Does the steps of any shard.

    Args:
        validates: as often as the job configures; else never.
    """

    def __init__(self, factory: ShardFactory, feed: BatchReader, validates: bool = True) -> None:
        self._spec, self._device, self._validates = factory.spec, factory.device, validates
        self._task = factory.task
        self._prefetch = Prefetch(feed, factory.spec.train.max_steps)
        self._traffic = traffic_meter.Since()
        self._routing = RoutingRecorder(factory.spec.model)
        self._memory = MemoryProbe(factory.device) if factory.spec.train.fits_memory else None

    def close(self) -> None:
        self._prefetch.close()

    def step(self, shard: Shard, progress: TrainingProgress, hooks: StepHooks, keep_gradients: bool) -> StepResult:
        """Do the step after `progress`. Collective over the shard's world."""
        step = _Step(progress.step + 1, shard, hooks, StepClock(self._device))
        batches = self._load(step)
        losses = self._accumulate(step, batches)
        update = self._update(step, keep_gradients)
        validation = self._validate(step)
        compression = shard.choosing.scheme  # of this step; the vote may choose another
        outcome = self._vote(step, batches, losses, update, validation)
        record = self._record(step, batches, update, validation, outcome, compression)
        return StepResult(
            outcome=outcome,
            progress=replace(progress, step=step.number, num_updates=progress.num_updates + int(outcome.applied)),
            record=record,
            gradients=update.gradients if outcome.applied else None,
            memory=None if self._memory is None else self._memory.end_step(shard.world.generation, batches),
            saturated=update.saturated,
        )

    # -- the phases, in order ----------------------------------------------------------------------------------

    def _load(self, step: _Step) -> StepBatches:
        """This rank's rows, read ahead while the step before computed."""
        shard, waits = step.shard, step.hooks.wait_for_rows
        batches = self._prefetch.step(step.number, shard.rank, shard.world.size, shard.micro_batch, waits)
        step.clock.loaded()
        return batches

    def _accumulate(self, step: _Step, batches: StepBatches) -> StepLosses:
        """Forward and backward of each micro-batch; of a batch that is left out, its losses alone."""
        if step.is_skipped:
            open_seal(step.shard, step.number)
            return self._evaluate(step, batches)
        losses = self._no_losses(step, batches)
        for number, micro_batch in enumerate(batches.micro_batches, 1):
            step.hooks.before_micro_batch()
            last, before_backward = number == len(batches.micro_batches), self._measured()
            seed_draws(self._spec.train.seed, step.number, micro_batch.number or 0)
            loss, routed = step.shard.engine.accumulate(
                micro_batch.batch, batches.global_units, last, before_backward, micro_batch.scale
            )
            losses.enter(micro_batch, loss)
            if micro_batch.number is not None:
                losses.routed.add(routed)
            else:  # the experts here computed tokens of other ranks in it
                losses.routed.norms_LE.add_(routed.norms_LE)
        return losses

    def _update(self, step: _Step, keep_gradients: bool) -> StepOutcome:
        """Sum the gradients over the ranks and update the state."""
        if step.is_skipped:
            return StepOutcome(applied=False, grad_norm=float("inf"))
        open_seal(step.shard, step.number)
        lr = learning_rate(self._spec.train, step.number)
        wait = partial(step.clock.wait_for_copies, step.hooks.before_update)
        return step.shard.engine.step(lr, wait, keep_gradients)

    def _validate(self, step: _Step) -> StepLosses | None:
        """Losses of the validation rows; None in most steps."""
        every, last, shard = self._spec.eval.every, self._spec.train.max_steps - 1, step.shard
        if every is None or not self._validates or ((step.number + 1) % every and step.number not in (0, last)):
            return None
        waits = step.hooks.wait_for_rows
        return self._evaluate(step, self._prefetch.validation(shard.rank, shard.world.size, shard.micro_batch, waits))

    def _vote(
        self, step: _Step, batches: StepBatches, losses: StepLosses, update: StepOutcome, validation: StepLosses | None
    ) -> VoteResult:
        """Vote, and apply what the members have agreed on: the compression, and the routers' biases."""
        shard, clock = step.shard, step.clock
        fingerprint = shard.fingerprint(step.number)
        digests = fingerprint.look() if fingerprint is not None else NO_DIGESTS
        clock.updated()
        traffic = self._traffic.look()
        if not step.is_skipped:
            shard.choosing.observe(clock.busy_s, traffic[TrafficKind.GRADIENT].sent)
        proposal = step.hooks.propose(step.number)
        clock.proposed()
        ballot = Ballot(
            sums_SM=losses.sums_SM,
            validation_SM=losses.sums_SM[:0] if validation is None else validation.sums_SM,
            routed=losses.routed,
            applied=update.applied,
            fence=proposal.fence,
            finish=proposal.finish,
            interval=proposal.interval,
            busy_s=clock.busy_s / batches.share if batches.share else 0.0,
            stages=proposal.stages,
            checkpoint=proposal.checkpoint,
            is_writing=proposal.is_writing,
            traffic=traffic,
            compression=shard.choosing.proposal,
            digests=digests,
        )
        nonce = nonce_of(shard.world.generation, step.number)
        outcome = vote(ballot, shard.rank, shard.world.size, shard.groups.exchange, nonce)
        if nccl.aborted() != step.aborted:  # its operations may have given anything, without an error
            raise AbortedGeneration(f"communicators of generation {shard.world.generation} were aborted in the step")
        clock.voted()
        shard.choosing.agree(outcome.compression)
        if outcome.applied:
            move_router_state(self._spec, shard.model, outcome.routed, step.number)
        if shard.seal is not None:
            shard.seal.close()
        return outcome

    def _record(
        self,
        step: _Step,
        batches: StepBatches,
        update: StepOutcome,
        validation: StepLosses | None,
        outcome: VoteResult,
        compression: str,
    ) -> StepRecord:
        """The step's record, equal on all members but for the times."""
        timing, world = step.clock.timing(outcome.busy_s), step.shard.world
        validation_sums, units = outcome.validation_sums, max(batches.global_units, 1)
        return StepRecord(
            step=step.number,
            generation=world.generation,
            world_size=world.size,
            loss=outcome.sums[0] / units,
            batch=BatchRecord(
                tokens=batches.global_tokens,
                first_position=batches.first_position,
                num_positions=batches.num_positions,
                stage=batches.stage,
                sequence_length=batches.sequence_length,
                num_micro_batches=batches.num_micro_batches,
                padding=batches.padding,
            ),
            update=UpdateRecord(
                lr=learning_rate(self._spec.train, step.number),
                grad_norm=update.grad_norm if outcome.applied else float("inf"),
                applied=outcome.applied,
                skipped=step.is_skipped,
                sparsity=update.sparsity,
            ),
            timing=timing,
            validation_loss=validation_sums[0] / max(validation.units, 1) if validation and validation_sums else None,
            metrics=self._metrics(outcome.sums),
            validation_metrics=self._metrics(validation_sums),
            communication=CommunicationRecord(outcome.traffic, compression),
            routing=replace(
                self._routing.record(world.generation, step.number, outcome.routed, step.shard.shares_LEW),
                saliency=saliency_at(self._spec, step.shard.model, step.number),
            ),
            state=StateRecord(outcome.digests),
        )

    # -- parts of phases ---------------------------------------------------------------------------------------

    def _evaluate(self, step: _Step, batches: StepBatches) -> StepLosses:
        """Losses without gradients."""
        losses = self._no_losses(step, batches)
        for micro_batch in batches.micro_batches:
            step.hooks.before_micro_batch()
            seed_draws(self._spec.train.seed, step.number, micro_batch.number or 0)
            losses.enter(micro_batch, step.shard.engine.evaluate(micro_batch.batch))
        return losses

    def _metrics(self, sums: Sequence[float]) -> dict[str, float]:
        """What the task reports of the metrics' sums and weights, which follow the loss."""
        if not self._task.metrics or not sums:
            return {}
        pairs = zip(self._task.metrics, sums[1::2], sums[2::2], strict=True)
        return self._task.report({name: each / weight if weight else 0.0 for name, each, weight in pairs})

    def _no_losses(self, step: _Step, batches: StepBatches) -> StepLosses:
        routed = step.shard.model.zero_counts(self._device)
        num_metrics = len(self._task.metrics)
        return StepLosses.zeros(batches.num_micro_batches, num_metrics, batches.global_units, routed, self._device)

    def _measured(self) -> Callable[[], None]:
        """Called before a micro-batch. Returns the callback between its forward and its backward pass."""
        if self._memory is None:
            return noop
        self._memory.begin_pass()
        return self._memory.end_forward

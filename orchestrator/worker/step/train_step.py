"""One step: micro-batches, update, vote. After it every member knows that all have finished the step."""

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.comm import collective_stats, traffic_meter
from orchestrator.engine.base import StepOutcome, noop
from orchestrator.model.base import seed_draws
from orchestrator.model.moe.balance import RoutingCounts, next_bias
from orchestrator.policy.health.expert_load import expert_load, is_shown
from orchestrator.policy.health.stragglers import slowest
from orchestrator.protocol.expert_load import ExpertLoad
from orchestrator.protocol.messages import MicroBatchMemory, StepRecord
from orchestrator.protocol.usage import TrafficKind
from orchestrator.spec.lr_schedule import decay, learning_rate
from orchestrator.state.ranges import NamedRanges
from orchestrator.worker.runtime.errors import StateCorrupted
from orchestrator.worker.shard.shard import Shard, ShardFactory, TrainingProgress
from orchestrator.worker.step.batches import BatchReader, Prefetch, StepBatches
from orchestrator.worker.step.memory_probe import MemoryProbe
from orchestrator.worker.step.vote import NO_DIGESTS, Ballot, VoteResult, vote


@dataclass(frozen=True)
class RankProposal:
    """A rank's entries in a vote besides its part of the step."""

    fence: int
    finish: bool
    interval: int
    stages: int = 0
    checkpoint: bool = False


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


class TrainStep:
    """Does the steps of any shard.

    Args:
        before_micro_batch: called before each micro-batch of a step.
        validates: as often as the job configures; else never.
    """

    def __init__(
        self,
        factory: ShardFactory,
        feed: BatchReader,
        before_micro_batch: Callable[[], None] = noop,
        validates: bool = True,
    ) -> None:
        self._before_micro_batch, self._validates = before_micro_batch, validates
        self._factory, self._feed, self._spec = factory, feed, factory.spec
        self._prefetch = Prefetch(feed, factory.spec.train.max_steps)
        self._ledger = traffic_meter.Since()
        self._counted: tuple[int, int, NDArray[np.int64]] | None = None  # generation, step and loads of the newest step
        self._gauge = MemoryProbe(factory.device) if factory.spec.train.fits_memory else None

    def close(self) -> None:
        self._prefetch.close()

    def step(
        self,
        shard: Shard,
        progress: TrainingProgress,
        before_update: Callable[[], None],
        propose: Callable[[], RankProposal],
        keep_gradients: bool,
    ) -> StepResult:
        """Do the step after `progress`. Collective over the shard's world.

        Args:
            before_update: called when the state is about to change; not if the update is skipped.
            speak: called at the last moment before the vote.
        """
        started, waited_s, step = time.perf_counter(), collective_stats.waited_s(), progress.step + 1
        feed = self._prefetch.step(step, shard.rank, shard.world.size, shard.micro_batch)
        data_wait_s = time.perf_counter() - started
        losses = np.zeros(feed.num_micro_batches)
        routed = RoutingCounts.zeros(len(shard.model.moe_layers), self._spec.model)
        lr, skipped = learning_rate(self._spec.train, step), step in shard.skips
        if skipped:
            self._open_seal(shard, step)
            losses, update = self._evaluated(shard, feed, step), StepOutcome(applied=False, grad_norm=float("inf"))
        else:
            for number, micro_batch in enumerate(feed.micro_batches, 1):
                self._before_micro_batch()
                last, before_backward = number == len(feed.micro_batches), self._measured()
                seed_draws(self._spec.train.seed, step, micro_batch.number or 0)
                loss, micro_batch_routed = shard.engine.accumulate(
                    micro_batch.batch, feed.global_tokens, last, before_backward
                )
                if micro_batch.number is not None:
                    losses[micro_batch.number] = float(loss)
                    routed.add(micro_batch_routed)
            self._open_seal(shard, step)
            update = shard.engine.step(lr, before_update, keep_gradients)
        validation = self._validate(shard, step)
        witness = shard.witness(step)
        digests = witness.look() if witness is not None else NO_DIGESTS

        updated = time.perf_counter()
        peers_s = collective_stats.waited_s() - waited_s
        busy_s = updated - started - peers_s
        share = feed.share
        traffic, chosen = self._ledger.look(), shard.choosing.scheme
        if not skipped:
            shard.choosing.observe(busy_s, traffic[TrafficKind.GRADIENT].sent)
        proposal = propose()
        proposed_s = time.perf_counter()
        ballot = Ballot(
            micro_batch_losses=losses,
            validation_losses=validation[0],
            routed=routed,
            applied=update.applied,
            fence=proposal.fence,
            finish=proposal.finish,
            interval=proposal.interval,
            busy_s=busy_s / share if share else 0.0,
            stages=proposal.stages,
            traffic=traffic,
            compression=shard.choosing.proposal,
            digests=digests,
            checkpoint=proposal.checkpoint,
        )
        outcome = vote(ballot, shard.rank, shard.world.size, shard.groups.exchange, self._factory.device)
        communication_wait_s = peers_s + time.perf_counter() - proposed_s
        shard.choosing.agree(outcome.compression)
        self._balance(shard, outcome, step)
        if shard.seal is not None:
            shard.seal.close()
        rank, slowness = slowest(outcome.busy_s)
        counts_LE = outcome.routed.counts_LE
        record = StepRecord(
            step=step,
            generation=shard.world.generation,
            world_size=shard.world.size,
            loss=outcome.loss_sum / max(feed.global_tokens, 1),
            tokens=feed.global_tokens,
            lr=lr,
            grad_norm=update.grad_norm if outcome.applied else float("inf"),
            applied=outcome.applied,
            skipped=skipped,
            first_position=feed.first_position,
            num_positions=feed.num_positions,
            step_s=time.perf_counter() - started,
            vote_time=time.time(),
            data_wait_s=data_wait_s,
            protection_wait_s=proposed_s - updated,
            communication_wait_s=communication_wait_s,
            slowest=rank,
            slowness=slowness,
            stage=feed.stage,
            sequence_length=feed.sequence_length,
            num_micro_batches=feed.num_micro_batches,
            padding=feed.padding,
            traffic=outcome.traffic,
            compression=chosen,
            digests=outcome.digests,
            experts=self._load(shard.world.generation, step, counts_LE),
            loads=tuple(map(tuple, counts_LE.tolist())) if is_shown(step, self._spec.train.max_steps) else (),
            validation_loss=(
                None if outcome.validation_loss_sum is None else outcome.validation_loss_sum / max(validation[1], 1)
            ),
        )
        moved_on = replace(progress, step=step, num_updates=progress.num_updates + int(outcome.applied))
        gradients = update.gradients if outcome.applied else None
        memory = self._gauge.end_step(shard.world.generation, feed) if self._gauge is not None else None
        return StepResult(outcome, moved_on, record, gradients, memory, update.saturated)

    def _open_seal(self, shard: Shard, step: int) -> None:
        """Open the memory guard before the state is used. Raises StateCorrupted if it has changed by itself."""
        changed = shard.seal.open() if shard.seal is not None else []
        if changed:
            more = f" and {len(changed) - 1} more tensors" if len(changed) > 1 else ""
            raise StateCorrupted(
                f"{changed[0]}{more} of rank {shard.rank} on {platform.node()} changed between the ends of steps "
                f"{step - 1} and {step}, although nothing writes to it then"
            )

    def _measured(self) -> Callable[[], None]:
        """Called before a micro-batch. Returns the callback between its forward and its backward pass."""
        if self._gauge is None:
            return noop
        self._gauge.begin_pass()
        return self._gauge.end_forward

    def _validate(self, shard: Shard, step: int) -> tuple[NDArray[np.float64], int]:
        """Loss sums per validation micro-batch, and the targets in all of them; empty in most steps."""
        every, last = self._spec.eval.every, self._spec.train.max_steps - 1
        if every is None or not self._validates or ((step + 1) % every and step not in (0, last)):
            return np.zeros(0), 0
        feed = self._feed.validation(shard.rank, shard.world.size, shard.micro_batch)
        return self._evaluated(shard, feed, step), feed.global_tokens

    def _evaluated(self, shard: Shard, feed: StepBatches, step: int) -> NDArray[np.float64]:
        """Loss sums per micro-batch, 0 where the micro-batch is another rank's."""
        losses = np.zeros(feed.num_micro_batches)
        for micro_batch in feed.micro_batches:
            self._before_micro_batch()
            seed_draws(self._spec.train.seed, step, micro_batch.number or 0)
            loss = shard.engine.evaluate(micro_batch.batch)
            if micro_batch.number is not None:
                losses[micro_batch.number] = float(loss)
        return losses

    def _load(self, generation: int, step: int, counts_LE: Tensor) -> ExpertLoad:
        """Summary of the load per expert, compared with the step before where this generation did it."""
        before = self._counted[2] if self._counted is not None and self._counted[:2] == (generation, step - 1) else None
        counts = counts_LE.numpy()
        self._counted = (generation, step, counts)
        return expert_load(counts, before)

    def _balance(self, shard: Shard, outcome: VoteResult, step: int) -> None:
        """Move the routers' biases by the global batch's expert counts. A skipped update moves nothing."""
        model, layers = self._spec.model, shard.model.moe_layers
        if not outcome.applied or not model.bias_update_speed or not layers:
            return
        bias_LE = torch.stack([layer.router.correction_bias_E for layer in layers])
        bias_LE = next_bias(bias_LE.cpu(), outcome.routed, model, decay(self._spec.train, step))
        for layer, bias_E in zip(layers, bias_LE, strict=True):
            layer.router.correction_bias_E.copy_(bias_E)

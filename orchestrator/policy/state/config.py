"""The part of a job that decisions depend on: its world sizes, their schedule, and its length."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from orchestrator.errors import UsageError
from orchestrator.protocol.status import RunPhase
from orchestrator.sampling.micro_batches import ONE_ROW, MicroBatchSize
from orchestrator.spec.curriculum import CurriculumSpec
from orchestrator.spec.data import BY_DOCUMENT
from orchestrator.spec.fault_tolerance import AUTO, FINISHED, RecoverySpec, VerifySpec
from orchestrator.spec.job import JobSpec
from orchestrator.spec.moe.experts import OF_PLACEMENT, PlacementSpec, ScheduledExperts
from orchestrator.spec.workers import MANUAL, AutoscaleSpec, ScheduledScale


@dataclass(frozen=True)
class RunLimits:
    """The part of a job that its lifecycle depends on.

    Args:
        steps: number of steps, which are counted from 0.
        protected, copies: whether workers keep snapshots; in the memory of how many others each is kept.
        publish: the job's `protection.publish`.
        micro_batch, fits_memory: size of micro-batches; whether that is only the first one.
        memory_bytes: of each worker; None if the job sets none.
        unit: of speeds, in the plural.
        by_document: rows are of unequal length.
        checkpoints_by_time: checkpoints follow at intervals that are chosen.
        expert_schedule: changes of the number of experts.
        fixes_experts: keys of the model with which that can't change, with the reasons.
        top_k: experts that a token visits.
        measured_steps: those whose averages decide which experts stay at scheduled steps.
        keeps_saliency: whether it is measured how much each expert adds.
        placement: how experts are placed.
        follows_placement: keys of `communication` that make a token's choice depend on the placement.
        moe_layers: names of the layers that may have placements of their own, in the model's order.
    """

    run_id: str
    steps: int
    min_workers: int
    max_workers: int
    initial_workers: int
    standby: int
    num_experts: int
    expert_schedule: tuple[ScheduledExperts, ...] = ()
    fixes_experts: Mapping[str, str] = field(default_factory=dict)
    top_k: int = 1
    seed: int = 0
    measured_steps: tuple[int, ...] = ()
    keeps_saliency: bool = False
    schedule: tuple[ScheduledScale, ...] = ()
    protected: bool = True
    copies: int = 1
    publish: str = FINISHED
    recovery: RecoverySpec = field(default_factory=RecoverySpec)
    micro_batch: MicroBatchSize = ONE_ROW
    fits_memory: bool = False
    memory_bytes: int | None = None
    global_batch_size: int = 1
    unit: str = "tokens"
    by_document: bool = False
    curriculum: CurriculumSpec | None = None
    autoscale: AutoscaleSpec = field(default_factory=AutoscaleSpec)
    priority: int = 0
    label_selector: Mapping[str, str] = field(default_factory=dict)
    verify: VerifySpec = field(default_factory=VerifySpec)
    checkpoints_by_time: bool = False
    placement: PlacementSpec = field(default_factory=PlacementSpec)
    moe_layers: tuple[str, ...] = ()
    follows_placement: tuple[str, ...] = ()

    @classmethod
    def of(cls, run_id: str, job: JobSpec) -> Self:
        return cls(
            run_id=run_id,
            steps=job.train.max_steps,
            min_workers=job.workers.min,
            max_workers=job.workers.max,
            initial_workers=job.workers.initial,
            standby=job.workers.standby,
            num_experts=job.model.n_routed_experts,
            expert_schedule=job.expert_schedule,
            fixes_experts=job.model.fixes_experts,
            top_k=job.model.num_experts_per_tok,
            seed=job.train.seed,
            measured_steps=job.measured_steps,
            keeps_saliency=job.keeps_saliency,
            protected=job.protection.interval is not None,
            copies=job.protection.copies,
            publish=job.protection.publish,
            recovery=job.recovery,
            micro_batch=micro_batch_of(job),
            fits_memory=job.train.fits_memory,
            memory_bytes=job.resources.memory_bytes,
            global_batch_size=job.train.global_batch_size,
            unit="tokens" if job.has_tokens else job.task.unit,
            by_document=job.data.row_format == BY_DOCUMENT or job.has_chats,
            curriculum=job.curriculum,
            autoscale=job.autoscale,
            priority=job.priority,
            label_selector=job.workers.label_selector,
            verify=job.verify,
            checkpoints_by_time=job.checkpoint.every == AUTO,
            schedule=job.workers.schedule,
            placement=job.experts.placement,
            moe_layers=job.model.moe_layers,
            follows_placement=tuple(name for name in OF_PLACEMENT if getattr(job.communication, name) is not None),
        )

    def check_stage(self, name: str) -> None:
        """Raises UsageError if the job has no such stage. `next` names the following stage."""
        names = [stage.name for stage in self.curriculum.stages] if self.curriculum else []
        if not names or name not in ("next", *names):
            known = f"its stages are {', '.join(names)}" if names else "its job has no curriculum"
            raise UsageError(
                f"stage {name} asked for; {self.run_id} has none of that name: {known}",
                remedy="Name one of its stages, or next." if names else "Submit a job with a curriculum.",
                unchanged=f"{self.run_id} continues unchanged.",
            )
        if any(stage.experts is not None for stage in (self.curriculum.stages if self.curriculum else ())):
            raise UsageError(
                f"stage {name} asked for; the stages of {self.run_id} change its number of experts, at steps that "
                "follow from its job",
                remedy="Wait for the stage, or submit a job with experts.schedule in place of experts of stages.",
                unchanged=f"{self.run_id} continues unchanged.",
            )

    def check_rebalance(self, phase: RunPhase, workers: int, has_loads: bool) -> None:
        """Raises UsageError if experts can't be placed by load now: the run isn't training, has one worker, or no
        tokens have come to experts yet."""
        if phase is not RunPhase.TRAINING:
            why, remedy = f"it is {phase}, not training", "Ask again once it trains."
        elif workers == 1:
            why, remedy = "its one worker has all experts", f"`orchestrator scale {self.run_id} -w 2` gives it more."
        elif self.follows_placement:
            names = ", ".join(f"communication.{name}" for name in self.follows_placement)
            why, remedy = f"with {names} loads follow the placement", "Submit a job without."
        elif not has_loads:
            why = "no expert has got a token yet: its model has none, or no step of it is recorded"
            remedy = "If its model has experts, ask again in some seconds."
        else:
            return
        raise UsageError(
            f"the experts of run {self.run_id} can't be placed by load: {why}",
            remedy=remedy,
            unchanged=f"{self.run_id} continues unchanged.",
        )

    def check_autoscale(self) -> None:
        """Raises UsageError if the job leaves the number of workers to its user."""
        if self.autoscale.policy == MANUAL:
            raise UsageError(
                f"{self.run_id} can't choose its number of workers itself: its job's autoscale.policy is {MANUAL}",
                remedy="Ask for a number, or submit a job with another autoscale.policy.",
                unchanged=f"{self.run_id} continues unchanged.",
            )

    def priority_of(self, requested: int | None) -> int:
        """The run's priority: the one requested for it, else its job's."""
        return self.priority if requested is None else requested

    def check_size(self, workers: int) -> None:
        """Raises UsageError if the job doesn't allow this many workers."""
        if not self.min_workers <= workers <= self.max_workers:
            raise UsageError(
                f"{workers} workers asked for; {self.run_id} allows {self.min_workers} to {self.max_workers}",
                remedy="Ask for a number in between, or submit a job with other workers.min and workers.max.",
                unchanged=f"{self.run_id} continues unchanged.",
            )


def micro_batch_of(job: JobSpec) -> MicroBatchSize:
    """The job's micro-batch size; where it is fitted to memory, the first one: a row of the first stage."""
    if job.train.micro_batch_rows:
        return MicroBatchSize(rows=job.train.micro_batch_rows)
    if not job.train.fits_memory:
        return MicroBatchSize(tokens=job.train.micro_batch_tokens)
    first = job.curriculum.stages[0].sequence_length if job.curriculum else None
    return MicroBatchSize(tokens=first or job.train.sequence_length)

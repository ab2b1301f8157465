"""What decisions need to know of a job: the sizes it may have, when, and how long it runs."""

from dataclasses import dataclass
from typing import Self

from orchestrator.errors import UsageError
from orchestrator.spec.autoscale import MANUAL, AutoscaleSpec
from orchestrator.spec.curriculum import CurriculumSpec
from orchestrator.spec.job import JobSpec
from orchestrator.spec.protection import OFF
from orchestrator.spec.recovery import RecoverySpec

DEFAULT_RECOVERY = RecoverySpec()
DEFAULT_AUTOSCALE = AutoscaleSpec()


@dataclass(frozen=True)
class ScheduledSize:
    """From step `at_step` on the run has `workers` members: step `at_step` is the first that the new world does."""

    at_step: int
    workers: int


@dataclass(frozen=True)
class RunLimits:
    """The part of a job that its life depends on. `steps` are numbered from 0; `protected`: workers keep snapshots."""

    run_id: str
    steps: int
    min_workers: int
    max_workers: int
    initial_workers: int
    standby: int
    num_experts: int
    schedule: tuple[ScheduledSize, ...] = ()
    protected: bool = True
    recovery: RecoverySpec = DEFAULT_RECOVERY
    micro_batch_size: int = 1
    curriculum: CurriculumSpec | None = None
    autoscale: AutoscaleSpec = DEFAULT_AUTOSCALE

    @classmethod
    def of(cls, run_id: str, job: JobSpec) -> Self:
        return cls(
            run_id=run_id,
            steps=job.train.steps,
            min_workers=job.workers.min,
            max_workers=job.workers.max,
            initial_workers=job.workers.initial,
            standby=job.workers.standby,
            num_experts=job.model.num_experts,
            protected=job.protection != OFF,
            recovery=job.recovery,
            micro_batch_size=job.train.micro_batch_size,
            curriculum=job.curriculum,
            autoscale=job.autoscale,
            schedule=tuple(ScheduledSize(entry.at_step, entry.workers) for entry in job.workers.schedule),
        )

    def check_stage(self, name: str) -> None:
        """Raises UsageError if the job has no such stage. `next` is whichever comes next."""
        names = [stage.name for stage in self.curriculum.stages] if self.curriculum else []
        if not names or name not in ("next", *names):
            known = f"its stages are {', '.join(names)}" if names else "its job has no curriculum"
            raise UsageError(
                f"stage {name} asked for; {self.run_id} has none of that name: {known}",
                remedy="Name one of its stages, or next." if names else "Submit a job with a curriculum.",
                unchanged=f"{self.run_id} goes on as it was.",
            )

    def check_autoscale(self) -> None:
        """Raises UsageError if the job leaves the number of workers to its user."""
        if self.autoscale.policy == MANUAL:
            raise UsageError(
                f"{self.run_id} can't find its number of workers itself: its job's autoscale.policy is {MANUAL}",
                remedy="Ask for a number, or submit a job with another autoscale.policy.",
                unchanged=f"{self.run_id} goes on as it was.",
            )

    def check_size(self, workers: int) -> None:
        """Raises UsageError if the job doesn't allow this many workers."""
        if not self.min_workers <= workers <= self.max_workers:
            raise UsageError(
                f"{workers} workers asked for; {self.run_id} allows {self.min_workers} to {self.max_workers}",
                remedy="Ask for a number in between, or submit a job with other workers.min and workers.max.",
                unchanged=f"{self.run_id} goes on as it was.",
            )

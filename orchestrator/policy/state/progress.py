"""Progress of a run by the step records received: the watermark, and figures over the newest steps."""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from statistics import median

from orchestrator.errors import ProtocolError
from orchestrator.policy.state.config import RunLimits
from orchestrator.policy.state.load_average import LoadAverage
from orchestrator.protocol.step_record import Saliency, StepRecord, without_loads
from orchestrator.protocol.usage import Traffic, TrafficKind
from orchestrator.spec.workers import THROUGHPUT

RECENT_STEPS = 512
NOISE = 0.03  # possible error of a speed, as a share, when it decides to remove a worker
MIN_STEPS = 12  # at a size, before its speed is known
STALL_STEPS = 5  # steps of a new generation from which its step time is taken
TYPICAL_STEPS, SPEED_STEPS = 10, 20  # newest steps, for the duration of a step; for speed and traffic


@dataclass(frozen=True)
class Progress:
    """`watermark` is the newest committed step, -1 before the first. Without snapshots, a finished step whose
    record was journalled is committed. `recent` holds the newest records."""

    watermark: int = -1
    recent: tuple[StepRecord, ...] = ()
    first_loss: float | None = None
    loss: float | None = None
    first_validation_loss: float | None = None
    validation_loss: float | None = None
    tokens: int = 0  # target tokens of all steps
    skipped: int = 0  # updates that were not finite
    validations: tuple[tuple[int, float], ...] = ()  # (step, validation loss) of all
    stages: tuple[tuple[str, int], ...] = ()  # of the curriculum, each that began with its first step
    validation_metrics: dict[str, float] = field(default_factory=dict)  # of the newest validation
    loads: LoadAverage = field(default_factory=LoadAverage)  # of experts; records in `recent` have none
    saliency: tuple[tuple[int, Saliency], ...] = ()  # of experts, by step: the newest ones

    @property
    def stage(self) -> str:
        """The newest one; empty without a curriculum."""
        return self.stages[-1][0] if self.stages else ""

    @property
    def stage_step(self) -> int:
        """Its first step."""
        return self.stages[-1][1] if self.stages else 0

    def stage_at(self, step: int) -> str:
        """The stage that a step was in."""
        return next((name for name, first_step in reversed(self.stages) if first_step <= step), "")


def absorb(progress: Progress, records: Sequence[StepRecord]) -> Progress:
    """Progress with these records added; they may repeat known ones.

    Raises:
        ProtocolError: a step is missing between the watermark and the records.
    """
    fresh = sorted((r for r in records if r.step > progress.watermark), key=lambda r: r.step)
    expected = range(progress.watermark + 1, progress.watermark + 1 + len(fresh))
    if [r.step for r in fresh] != list(expected):
        raise ProtocolError(f"records of steps {[r.step for r in fresh]} came after step {progress.watermark}")
    if not fresh:
        return progress
    validations = [(r.step, r.validation_loss) for r in fresh if r.validation_loss is not None]
    validation = [loss for _, loss in validations]
    return Progress(
        watermark=fresh[-1].step,
        recent=(progress.recent + tuple(map(without_loads, fresh)))[-RECENT_STEPS:],
        first_loss=fresh[0].loss if progress.first_loss is None else progress.first_loss,
        loss=fresh[-1].loss,
        first_validation_loss=(
            progress.first_validation_loss
            if progress.first_validation_loss is not None
            else next(iter(validation), None)
        ),
        validation_loss=validation[-1] if validation else progress.validation_loss,
        tokens=progress.tokens + sum(r.batch.tokens for r in fresh),
        skipped=progress.skipped + sum(not r.update.applied for r in fresh),
        validations=(*progress.validations, *validations),
        stages=(*progress.stages, *((r.batch.stage, r.step) for r in stages_begun(progress, fresh))),
        validation_metrics=next(
            (r.validation_metrics for r in reversed(fresh) if r.validation_loss is not None),
            progress.validation_metrics,
        ),
        loads=progress.loads.after((record.step, record.routing.loads) for record in fresh),
        saliency=(*progress.saliency, *((r.step, r.routing.saliency) for r in fresh if r.routing.saliency))[-8:],
    )


def stages_begun(progress: Progress, fresh: Sequence[StepRecord]) -> list[StepRecord]:
    """Records of first steps of stages among the `fresh` ones that follow `progress`."""
    stages = [progress.stage, *(record.batch.stage for record in fresh)]
    return [record for record, before in zip(fresh, stages, strict=False) if record.batch.stage != before]


def typical_step_s(progress: Progress) -> float | None:
    """The median duration of the newest steps."""
    newest = progress.recent[-TYPICAL_STEPS:]
    return median(r.timing.step_s for r in newest) if newest else None


def tokens_per_second(progress: Progress) -> float | None:
    """Target tokens over the time between votes, rescales included."""
    newest = progress.recent[-SPEED_STEPS - 1 :]
    if len(newest) < 2 or newest[-1].timing.vote_time <= newest[0].timing.vote_time:
        return None
    return sum(r.batch.tokens for r in newest[1:]) / (newest[-1].timing.vote_time - newest[0].timing.vote_time)


def traffic_per_step(progress: Progress) -> dict[str, Traffic]:
    """Traffic of all workers per step, by kind: the mean of the newest steps; empty where there is one worker."""
    newest = progress.recent[-SPEED_STEPS:]
    kinds = [kind.value for kind in TrafficKind if any(kind.value in record.communication.traffic for record in newest)]
    sums = {kind: sum((r.communication.traffic.get(kind, Traffic()) for r in newest), Traffic()) for kind in kinds}
    return {kind: Traffic(*(total // len(newest) for total in astuple(sums[kind]))) for kind in kinds}


def stall_s(progress: Progress, generation: int, last_word: bool) -> float | None:
    """Stall before the first step of `generation`: the time between votes minus the time of a step.

    None while too few of its steps are known for a step time; `last_word`: no more will come.
    """
    before = [r for r in progress.recent if r.generation < generation]
    after = [r for r in progress.recent if r.generation == generation][:STALL_STEPS]
    if not before or not after or (len(after) < STALL_STEPS and not last_word):
        return None
    return max(0.0, after[0].timing.vote_time - before[-1].timing.vote_time - median(r.timing.step_s for r in after))


def speeds(progress: Progress) -> dict[int, float]:
    """Target tokens per second by world size, over the newest steps of the present stage; the median of steps."""
    by_size: dict[int, list[float]] = {}
    for record in progress.recent:
        if record.batch.stage == progress.stage and record.timing.step_s > 0:
            by_size.setdefault(record.world_size, []).append(record.batch.tokens / record.timing.step_s)
    return {size: median(found[-64:]) for size, found in sorted(by_size.items()) if len(found) >= MIN_STEPS}


def adds_too_little(limits: RunLimits, progress: Progress, size: int) -> bool:
    """Whether the last of `size` workers was measured to add less than the job's `min_gain`."""
    gain = gain_of(speeds(progress), size, NOISE)
    return limits.autoscale.policy == THROUGHPUT and gain is not None and gain < limits.autoscale.min_gain


def gain_of(speeds: Mapping[int, float], size: int, noise: float) -> float | None:
    """Speed that the last of `size` workers adds, as a share of the mean speed of the others; an upper bound given
    `noise`, a share of the speed. None if unknown."""
    here, before = speeds.get(size), speeds.get(size - 1)
    if here is None or before is None or size < 2:
        return None
    return (here * (1 + noise) - before) / (before / (size - 1))

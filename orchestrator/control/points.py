"""Step records and rescales as metric values."""

from orchestrator.policy.progress import Progress
from orchestrator.protocol.messages import StepRecord
from orchestrator.protocol.status import Rescale
from orchestrator.tracking.sink import MetricPoint


def points_of_steps(before: Progress, records: list[StepRecord]) -> list[MetricPoint]:
    """What a chart shows of these steps, which follow upon `before`."""
    points: list[MetricPoint] = []
    tokens, skipped = before.tokens, before.skipped
    for record in records:
        tokens += record.tokens
        skipped += not record.applied
        values = {
            "train/loss": record.loss,
            "train/lr": record.lr,
            "train/tokens": tokens,
            "train/skipped": skipped,
            "perf/step_s": record.step_s,
            "perf/data_wait_s": record.data_wait_s,
            "perf/tokens_per_second": record.tokens / record.step_s,
            "elastic/world_size": record.world_size,
            "elastic/generation": record.generation,
            "moe/max_violation": record.max_violation,
        }
        if record.applied:
            values["train/grad_norm"] = record.grad_norm
        if record.validation_loss is not None:
            values["eval/loss"] = record.validation_loss
        points += [MetricPoint(name, float(value), record.step, record.vote_time) for name, value in values.items()]
    return points


def points_of_rescale(rescale: Rescale, now_s: float) -> list[MetricPoint]:
    """A measured rescale, at the first step of the new world."""
    step = rescale.step + 1
    return [
        MetricPoint("elastic/rescale_stall_s", rescale.stall_s or 0.0, step, now_s),
        MetricPoint("elastic/moved_bytes", float(rescale.moved_bytes), step, now_s),
    ]

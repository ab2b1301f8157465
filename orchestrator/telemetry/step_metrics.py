"""Metric values of step records, rescales and recoveries."""

from orchestrator.policy.state.progress import Progress
from orchestrator.protocol.events.base import JournalEntry
from orchestrator.protocol.events.generations import Recovered, Rescaled
from orchestrator.protocol.expert_load import ExpertLoad
from orchestrator.protocol.step_record import StepRecord
from orchestrator.tracking.sinks.sink import MetricPoint


def points_of_steps(before: Progress, records: list[StepRecord]) -> list[MetricPoint]:
    """Metric points of these steps, which follow `before`."""
    points: list[MetricPoint] = []
    tokens, skipped = before.tokens, before.skipped
    for record in records:
        tokens += record.batch.tokens
        skipped += not record.update.applied
        values = {
            "train/loss": record.loss,
            "train/lr": record.update.lr,
            "train/tokens": tokens,
            "train/skipped": skipped,
            "perf/step_s": record.timing.step_s,
            "perf/data_wait_s": record.timing.data_wait_s,
            "perf/protection_wait_s": record.timing.protection_wait_s,
            "perf/tokens_per_second": record.batch.tokens / record.timing.step_s,
            "elastic/world_size": record.world_size,
            "elastic/generation": record.generation,
            "perf/slowness": record.timing.slowness,
            "elastic/snapshot_interval": record.state.snapshot_interval,
            "perf/padding": record.batch.padding,
            "perf/micro_batches": record.batch.num_micro_batches,
        }
        if record.routing.experts.worst_layer >= 0:
            values |= values_of_experts(record.routing.experts)
        if record.timing.communication_wait_s is not None:
            values["perf/communication_wait_s"] = record.timing.communication_wait_s
        if record.communication.traffic:
            values |= {f"comm/{kind}_bytes": traffic.sent for kind, traffic in record.communication.traffic.items()}
            values["comm/sent_bytes"] = sum(traffic.sent for traffic in record.communication.traffic.values())
            values["comm/tokens_across_nodes_bytes"] = sum(
                traffic.across for traffic in record.communication.traffic.values()
            )
            values["comm/raw_bytes"] = sum(traffic.raw for traffic in record.communication.traffic.values())
        if record.update.sparsity:
            values["train/sparsity"] = record.update.sparsity
        if record.update.applied:
            values["train/grad_norm"] = record.update.grad_norm
        if record.validation_loss is not None:
            values["eval/loss"] = record.validation_loss
        at = (record.step, record.timing.vote_time)
        points += [MetricPoint(name, float(value), *at) for name, value in values.items()]
        for name, metrics in (("train/metric", record.metrics), ("eval/metric", record.validation_metrics)):
            points += [MetricPoint(name, value, *at, label=label) for label, value in metrics.items()]
    return points


def values_of_experts(load: ExpertLoad) -> dict[str, float]:
    """Metric values of the experts' loads in a step that had any."""
    values = {
        "moe/max_violation": load.max_violation,
        "moe/worst_violation": load.worst_violation,
        "moe/utilisation": load.utilisation,
        "moe/dead_experts": load.dead,
        "moe/choice_entropy": load.entropy,
        "moe/num_experts": float(load.num_experts),
    }
    others = {
        "moe/load_swing": load.swing,
        "moe/dropped": load.dropped,
        "moe/experts_per_token": load.per_token,
        "moe/rank_violation": load.rank_violation,
    }
    return values | {name: value for name, value in others.items() if value is not None}


def points_of_event(entry: JournalEntry) -> list[MetricPoint]:
    """Metric points of an event: the cost of a rescale or recovery, at the first step of the new world."""
    change = entry.event
    if not isinstance(change, Rescaled | Recovered):
        return []
    what = "rescale" if isinstance(change, Rescaled) else "recovery"
    step, at = change.step + 1, entry.time
    return [
        MetricPoint(f"elastic/{what}_stall_s", change.stall_s or 0.0, step, at),
        MetricPoint("elastic/moved_bytes", float(change.moved_bytes), step, at),
    ]

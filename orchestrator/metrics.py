"""The metric registry: every number that a run publishes, declared once with its unit, kind and meaning.

Writers and readers name a metric by `metric(name)`, so that a misspelt name is an error and not an empty chart.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum
from types import MappingProxyType

from orchestrator.errors import NotFound


class Kind(StrEnum):
    """How values of different steps relate."""

    GAUGE = "gauge"  # each value stands alone
    COUNTER = "counter"  # only grows within a run


@dataclass(frozen=True)
class Metric:
    """One declared metric. `name` is `group/what`; a name of a duration or size ends in its unit."""

    name: str
    unit: str
    kind: Kind
    meaning: str


DECLARED = (
    Metric("train/loss", "nats", Kind.GAUGE, "mean cross-entropy over the target tokens of the step's global batch"),
    Metric("train/lr", "1", Kind.GAUGE, "learning rate of the step"),
    Metric("train/grad_norm", "1", Kind.GAUGE, "global L2 norm of the gradients before clipping"),
    Metric("train/skipped", "updates", Kind.COUNTER, "updates skipped on all ranks because they were not finite"),
    Metric("train/tokens", "tokens", Kind.COUNTER, "target tokens trained on since the run began"),
    Metric("eval/loss", "nats", Kind.GAUGE, "mean cross-entropy over the target tokens of the validation rows"),
    Metric("perf/tokens_per_second", "tokens/s", Kind.GAUGE, "target tokens of the step over its duration, all ranks"),
    Metric("perf/step_s", "s", Kind.GAUGE, "duration of the step, vote to vote, without the stall of a rescale"),
    Metric("perf/data_wait_s", "s", Kind.GAUGE, "part of perf/step_s that rank 0 waited for its training rows"),
    Metric("perf/protection_wait_s", "s", Kind.GAUGE, "part of perf/step_s that rank 0 waited for its buddy's answer"),
    Metric("perf/communication_wait_s", "s", Kind.GAUGE, "part of perf/step_s that rank 0 waited for its peers"),
    Metric("perf/slowness", "1", Kind.GAUGE, "the slowest rank's computing time for a slot over the others' median"),
    Metric("perf/padding", "1", Kind.GAUGE, "share of the tokens of the step's slots that is padding, not computed on"),
    Metric("perf/slots", "slots", Kind.GAUGE, "micro-batches of the step, of all workers together"),
    *(
        Metric(f"comm/{kind}_bytes", "bytes", Kind.GAUGE, f"sent between workers since the vote before: {meaning}")
        for kind, meaning in (
            ("gradient", "pieces of gradients, indices included"),
            ("parameter", "updated weights"),
            ("dispatch", "tokens to their experts, and the gradients that come back that way"),
            ("combine", "experts' results, and their gradients"),
            ("protection", "snapshots to buddies"),
            ("transfer", "state in a rescale or recovery"),
            ("control", "votes, expert counts and norms"),
        )
    ),
    Metric("comm/sent_bytes", "bytes", Kind.GAUGE, "all of these together"),
    Metric("comm/raw_bytes", "bytes", Kind.GAUGE, "what they would be without compression"),
    Metric("elastic/world_size", "workers", Kind.GAUGE, "members of the generation that did the step"),
    Metric("elastic/snapshot_interval", "steps", Kind.GAUGE, "steps between two snapshots; 0 where none are taken"),
    Metric("elastic/generation", "1", Kind.COUNTER, "number of the generation that did the step"),
    Metric("elastic/rescale_stall_s", "s", Kind.GAUGE, "training time lost to a rescale, at its first step"),
    Metric(
        "elastic/recovery_stall_s",
        "s",
        Kind.GAUGE,
        "training time lost to the loss of workers, at the first step after",
    ),
    Metric(
        "elastic/moved_bytes",
        "bytes",
        Kind.GAUGE,
        "state sent between workers in a rescale or recovery, at its first step",
    ),
    Metric("system/cpu_percent", "%", Kind.GAUGE, "processor time in use on a node, of all its cores; one per node"),
    Metric("system/memory_bytes", "bytes", Kind.GAUGE, "memory in use on a node; one per node"),
    Metric("system/disk_percent", "%", Kind.GAUGE, "how full the file system of the run storage is; one per node"),
    Metric("system/sent_bytes_per_second", "bytes/s", Kind.GAUGE, "network traffic sent by a node; one per node"),
    Metric("system/received_bytes_per_second", "bytes/s", Kind.GAUGE, "network traffic received; one per node"),
    Metric("moe/max_violation", "1", Kind.GAUGE, "MaxVio: max over layers of (largest expert load / mean load - 1)"),
)

METRICS: Mapping[str, Metric] = MappingProxyType({metric.name: metric for metric in DECLARED})


def metric(name: str) -> Metric:
    """The metric called `name`.

    Raises:
        NotFound: nothing is declared under this name; the message gives the nearest one.
    """
    if name in METRICS:
        return METRICS[name]
    nearest = get_close_matches(name, METRICS, n=1)
    remedy = f"Did you mean `{nearest[0]}`?" if nearest else f"Declared are: {', '.join(METRICS)}."
    raise NotFound(f"metric {name!r} is not declared in orchestrator/metrics.py", remedy=remedy)

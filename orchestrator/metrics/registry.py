"""The metric registry: every number that a run publishes, declared once with its unit, kind and meaning.

Writers and readers look metrics up by `metric(name)`, so that a misspelt name is an error and not an empty chart. The
name in Prometheus follows from the declaration (`Metric.prometheus`).
"""

from collections.abc import Mapping
from difflib import get_close_matches
from types import MappingProxyType

from orchestrator.errors import NotFound
from orchestrator.metrics.metric import UNIX_S, Metric, MetricKind

DECLARED = (
    Metric(
        "train/loss",
        "nats",
        MetricKind.GAUGE,
        "mean over the target tokens, or other units of the task, of the step's global batch",
    ),
    Metric("train/lr", "1", MetricKind.GAUGE, "learning rate of the step"),
    Metric("train/grad_norm", "1", MetricKind.GAUGE, "global L2 norm of the gradients before clipping"),
    Metric("train/sparsity", "1", MetricKind.GAUGE, "share of the weights of pruned parameters that are zero"),
    Metric("train/skipped", "updates", MetricKind.COUNTER, "updates skipped on all ranks because they were not finite"),
    Metric(
        "train/tokens", "tokens", MetricKind.COUNTER, "target tokens, or other units of the task, since the run began"
    ),
    Metric(
        "eval/loss",
        "nats",
        MetricKind.GAUGE,
        "mean over the target tokens, or other units of the task, of the validation rows",
    ),
    Metric(
        "train/metric",
        "1",
        MetricKind.GAUGE,
        "a metric of the task in the step's global batch, by name",
        label="metric",
    ),
    Metric(
        "eval/metric", "1", MetricKind.GAUGE, "a metric of the task on the validation rows, by name", label="metric"
    ),
    Metric(
        "perf/tokens_per_second",
        "tokens/s",
        MetricKind.GAUGE,
        "target tokens, or other units of the task, of the step over its duration, all ranks",
    ),
    Metric("perf/step_s", "s", MetricKind.GAUGE, "duration of the step, vote to vote, without the stall of a rescale"),
    Metric("perf/data_wait_s", "s", MetricKind.GAUGE, "part of perf/step_s that rank 0 waited for its training rows"),
    Metric(
        "perf/protection_wait_s", "s", MetricKind.GAUGE, "part of perf/step_s that rank 0 waited for its buddy's answer"
    ),
    Metric("perf/communication_wait_s", "s", MetricKind.GAUGE, "part of perf/step_s that rank 0 waited for its peers"),
    Metric(
        "perf/slowness",
        "1",
        MetricKind.GAUGE,
        "the slowest rank's computing time for a micro-batch over the others' median",
    ),
    Metric(
        "perf/padding",
        "1",
        MetricKind.GAUGE,
        "share of the tokens of the step's micro-batches that is padding, not computed on",
    ),
    Metric(
        "perf/micro_batches", "micro_batches", MetricKind.GAUGE, "micro-batches of the step, of all workers together"
    ),
    *(
        Metric(
            f"comm/{kind}_bytes", "bytes", MetricKind.AMOUNT, f"sent between workers since the previous vote: {meaning}"
        )
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
    Metric(
        "comm/sent_bytes",
        "bytes",
        MetricKind.AMOUNT,
        "sent between workers since the previous vote, all kinds together",
    ),
    Metric("comm/raw_bytes", "bytes", MetricKind.AMOUNT, "comm/sent_bytes as it would be without compression"),
    Metric(
        "comm/tokens_across_nodes_bytes",
        "bytes",
        MetricKind.AMOUNT,
        "tokens, results and their gradients sent to another node",
    ),
    Metric("elastic/world_size", "workers", MetricKind.GAUGE, "members of the generation that did the step"),
    Metric(
        "elastic/snapshot_interval", "steps", MetricKind.GAUGE, "steps between two snapshots; 0 where none are taken"
    ),
    Metric("elastic/generation", "1", MetricKind.COUNTER, "number of the generation that did the step"),
    Metric("elastic/rescale_stall_s", "s", MetricKind.AMOUNT, "training time lost to a rescale, at its first step"),
    Metric(
        "elastic/recovery_stall_s",
        "s",
        MetricKind.AMOUNT,
        "training time lost to failures of workers, at the first step after",
    ),
    Metric(
        "elastic/moved_bytes",
        "bytes",
        MetricKind.AMOUNT,
        "state sent between workers in a rescale or recovery, at its first step",
    ),
    *(
        Metric(f"system/{what}", unit, MetricKind.GAUGE, f"{meaning}; one per node", label="node")
        for what, unit, meaning in (
            ("cpu_percent", "%", "processor time in use on a node, of all its cores"),
            ("memory_bytes", "bytes", "memory in use on a node"),
            ("disk_percent", "%", "how full the file system of the run storage is"),
            ("sent_bytes_per_second", "bytes/s", "network traffic sent by a node"),
            ("received_bytes_per_second", "bytes/s", "network traffic received"),
        )
    ),
    Metric("moe/max_violation", "1", MetricKind.GAUGE, "MaxVio: largest expert load / mean load - 1, mean over layers"),
    Metric("moe/worst_violation", "1", MetricKind.GAUGE, "MaxVio of the layer where it is largest"),
    Metric(
        "moe/utilisation",
        "1",
        MetricKind.GAUGE,
        "mean expert load / largest, mean over layers: 1 where loads are equal",
    ),
    Metric("moe/dead_experts", "1", MetricKind.GAUGE, "share of all layers' experts that no token of the step chose"),
    Metric(
        "moe/choice_entropy", "1", MetricKind.GAUGE, "entropy of the choices of experts over its largest value, log E"
    ),
    Metric(
        "moe/load_swing",
        "1",
        MetricKind.GAUGE,
        "share of experts that went from well above the mean load to well below it, or back, since the step before",
    ),
    Metric(
        "moe/rank_violation",
        "1",
        MetricKind.GAUGE,
        "largest load of a worker / mean load - 1, over all layers: how far the experts' placement is from even",
    ),
    Metric("moe/num_experts", "experts", MetricKind.GAUGE, "routed experts of each MoE layer"),
    Metric("moe/dropped", "1", MetricKind.GAUGE, "share of tokens' choices of experts that a capacity dropped"),
    Metric("moe/experts_per_token", "experts", MetricKind.GAUGE, "experts that a token chose, mean, with top_p"),
    *(
        Metric(name, unit, kind, meaning, live=True)
        for name, unit, kind, meaning in (
            ("run/wanted_steps", "steps", MetricKind.GAUGE, "steps of the job"),
            ("run/finished_steps", "steps", MetricKind.COUNTER, "steps done, as far as any worker has reported"),
            (
                "run/committed_steps",
                "steps",
                MetricKind.COUNTER,
                "recorded steps that can't be lost any more: the watermark",
            ),
            (
                "run/committed_time",
                UNIX_S,
                MetricKind.GAUGE,
                "time of the newest committed step, or of the run's last start",
            ),
            (
                "run/checkpoint_time",
                UNIX_S,
                MetricKind.GAUGE,
                "time of the newest complete checkpoint, or of the run's last start",
            ),
            ("elastic/workers_wanted", "workers", MetricKind.GAUGE, "how many workers the run should have"),
            ("elastic/standbys", "workers", MetricKind.GAUGE, "warm workers that aren't members"),
            (
                "elastic/holders",
                "copies",
                MetricKind.GAUGE,
                "nodes, or workers of a run on one node, that hold the newest committed step",
            ),
            (
                "elastic/rescales",
                "rescales",
                MetricKind.COUNTER,
                "changes of the members or of the experts' placement, without a failure",
            ),
            (
                "elastic/recoveries",
                "recoveries",
                MetricKind.COUNTER,
                "generations that ended by a failure from which the run recovered",
            ),
            (
                "elastic/quarantined_nodes",
                "nodes",
                MetricKind.GAUGE,
                "nodes that get no new workers, as too many failed there",
            ),
            ("elastic/draining_nodes", "nodes", MetricKind.GAUGE, "nodes that will soon be taken away"),
            ("verify/checks", "checks", MetricKind.COUNTER, "replays of steps by a standby"),
            ("verify/differences", "checks", MetricKind.COUNTER, "replays that computed other bits"),
            (
                "moe/collapse",
                "1",
                MetricKind.GAUGE,
                "moe/worst_violation over what it would be if all tokens chose the same experts; 0 without experts",
            ),
        )
    ),
    Metric(
        "run/phase",
        "1",
        MetricKind.GAUGE,
        "phase of the run: 1 for the current one, 0 for the others",
        label="phase",
        live=True,
    ),
    Metric(
        "run/storage",
        "1",
        MetricKind.GAUGE,
        "condition of the run storage: 1 for the current one, 0 for the others",
        label="condition",
        live=True,
    ),
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
    raise NotFound(f"metric {name!r} is not declared in orchestrator/metrics/registry.py", remedy=remedy)

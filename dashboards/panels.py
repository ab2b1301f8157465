"""What the dashboards show, as data: `build.py` makes Grafana's JSON of it.

Units are Grafana's own names of them.
"""

from dataclasses import dataclass

from dashboards.queries import RUNS, newest, rate, rise
from orchestrator.metrics.registry import metric
from orchestrator.protocol.usage import TrafficKind

HOUR = "1h"


@dataclass(frozen=True)
class Query:
    """`legend` is Grafana's template of a line's name."""

    expr: str
    legend: str = "{{run}}"


@dataclass(frozen=True)
class Chart:
    """A panel. `number`: only the newest values, as large digits. `stacked`: lines are parts of one whole."""

    title: str
    about: str
    unit: str
    queries: tuple[Query, ...]
    number: bool = False
    stacked: bool = False


@dataclass(frozen=True)
class Board:
    """A dashboard; its file is `NAME.json`. `chooses_runs`: it has a list of runs to choose from."""

    name: str
    title: str
    about: str
    charts: tuple[Chart, ...]
    chooses_runs: bool = True


def of(name: str, legend: str = "{{run}}", selector: str = RUNS) -> Query:
    return Query(newest(name, selector), legend)


def simple(title: str, name: str, unit: str, number: bool = False) -> Chart:
    """The newest value of one metric per run, explained by the registry."""
    return Chart(title, _sentence(metric(name).meaning), unit, (of(name),), number)


def per_node(title: str, name: str, unit: str) -> Chart:
    return Chart(title, _sentence(metric(name).meaning), unit, (Query(newest(name, by="node"), "{{node}}"),))


def _sentence(meaning: str) -> str:
    return f"{meaning[0].upper()}{meaning[1:]}."


def _each(name: str) -> str:
    """One value per run that goes on, to be summed over runs."""
    return f"sum({newest(name)})"


NODES_LEFT_OUT = Chart(
    "Nodes left out",
    "Nodes that get no new workers, as too many failed there, and nodes that will soon be taken away.",
    "short",
    (of("elastic/quarantined_nodes", "{{run}} quarantined"), of("elastic/draining_nodes", "{{run}} draining")),
)

FLEET = Board(
    "fleet",
    "Fleet",
    "All runs of the cluster, and its nodes.",
    (
        Chart(
            "Runs",
            "Runs that have a controller.",
            "short",
            (Query(f"count({newest('run/committed_steps')})", "runs"),),
            number=True,
        ),
        Chart(
            "Runs by phase",
            "What runs are doing.",
            "short",
            (Query(f"sum by (phase) ({newest('run/phase', by='run, phase')})", "{{phase}}"),),
            stacked=True,
        ),
        Chart(
            "Workers",
            "Over all runs: members of the worlds, how many are wanted, and warm ones that hold no state.",
            "short",
            (
                Query(_each("elastic/world_size"), "members"),
                Query(_each("elastic/workers_wanted"), "wanted"),
                Query(_each("elastic/standbys"), "standbys"),
            ),
        ),
        Chart(
            "Tokens per second",
            "Target tokens of all runs.",
            "short",
            (Query(newest("perf/tokens_per_second")),),
            stacked=True,
        ),
        Chart(
            "Progress",
            "Committed steps over those that the job wants.",
            "percentunit",
            (Query(f"{newest('run/committed_steps')} / {newest('run/wanted_steps')}"),),
        ),
        Chart(
            "Quarantined nodes",
            "Nodes that get no new workers, as too many failed there.",
            "short",
            (Query(newest("elastic/quarantined_nodes")),),
            number=True,
        ),
        per_node("Processors", "system/cpu_percent", "percentunit"),
        per_node("Memory", "system/memory_bytes", "bytes"),
        per_node("Disk of the run storage", "system/disk_percent", "percentunit"),
        Chart(
            "Network",
            "Traffic of each node.",
            "Bps",
            (
                Query(newest("system/sent_bytes_per_second", by="node"), "{{node}} sent"),
                Query(newest("system/received_bytes_per_second", by="node"), "{{node}} received"),
            ),
        ),
    ),
    chooses_runs=False,
)

RUN = Board(
    "run",
    "Run",
    "Whether a run learns, how fast, and how much of it could be lost.",
    (
        Chart(
            "Phase",
            "1 for the phase that the run is in.",
            "short",
            (Query(f"{newest('run/phase', RUNS, by='run, phase')} == 1", "{{run}} {{phase}}"),),
            number=True,
        ),
        Chart(
            "Steps",
            "Committed, and wanted.",
            "short",
            (of("run/committed_steps", "{{run}} committed"), of("run/wanted_steps", "{{run}} wanted")),
            number=True,
        ),
        Chart(
            "Loss",
            "Mean over target tokens or other units, in nats: of the step's global batch, and of the validation rows.",
            "short",
            (of("train/loss", "{{run}} train"), of("eval/loss", "{{run}} validation")),
        ),
        Chart(
            "Metrics of the task",
            "Means of the task's metrics: over the step's global batch, and over the validation rows.",
            "short",
            (
                Query(newest("train/metric", RUNS, "run, metric"), "{{run}} {{metric}} train"),
                Query(newest("eval/metric", RUNS, "run, metric"), "{{run}} {{metric}} validation"),
            ),
        ),
        simple("Gradient norm", "train/grad_norm", "short"),
        simple("Learning rate", "train/lr", "sci"),
        simple("Zeros in what is pruned", "train/sparsity", "percentunit"),
        Chart(
            "Skipped updates in the last hour",
            _sentence(metric("train/skipped").meaning),
            "short",
            (Query(rise("train/skipped", HOUR, RUNS)),),
        ),
        simple("Tokens per second", "perf/tokens_per_second", "short"),
        simple("Tokens", "train/tokens", "short", number=True),
        Chart(
            "Step",
            "Duration of a step, and the parts of it that rank 0 waited for rows, its peers and its buddy.",
            "s",
            (
                of("perf/step_s", "{{run}} step"),
                of("perf/data_wait_s", "{{run}} waits for rows"),
                of("perf/protection_wait_s", "{{run}} waits for its buddy"),
                of("perf/communication_wait_s", "{{run}} waits for its peers"),
            ),
        ),
        Chart(
            "Micro-batches",
            "Micro-batches of a step, of all workers together.",
            "short",
            (of("perf/micro_batches"),),
        ),
        simple("Padding", "perf/padding", "percentunit"),
        Chart(
            "Steps that could be lost",
            "Finished steps that are not committed and on record yet.",
            "short",
            (Query(f"{newest('run/finished_steps', RUNS)} - {newest('run/committed_steps', RUNS)}"),),
        ),
        Chart(
            "Steps done again",
            "How often a standby did steps again, and how often it came to other bits (verify.every of the job).",
            "short",
            (of("verify/checks", "{{run}} checks"), of("verify/differences", "{{run}} differences")),
        ),
        Chart(
            "Since the newest",
            "Time since the newest committed step was done, and since the newest checkpoint was complete.",
            "s",
            (
                Query(f"time() - {newest('run/committed_time', RUNS)}", "{{run}} step"),
                Query(f"time() - {newest('run/checkpoint_time', RUNS)}", "{{run}} checkpoint"),
            ),
        ),
    ),
)

EXPERTS = Board(
    "experts",
    "Experts",
    "Whether tokens are spread over the experts, and what it costs to bring them there.",
    (
        Chart(
            "MaxVio",
            "Largest expert load / mean load - 1: mean over the MoE layers, and of the layer where it is largest.",
            "short",
            (of("moe/max_violation", "{{run}} mean"), of("moe/worst_violation", "{{run}} worst layer")),
        ),
        Chart(
            "Collapse",
            "MaxVio of the worst layer over what it is where all tokens choose the same experts: 0 even, 1 collapsed.",
            "percentunit",
            (of("moe/collapse"),),
        ),
        simple("Utilisation", "moe/utilisation", "percentunit"),
        simple("Dead experts", "moe/dead_experts", "percentunit"),
        simple("Entropy of choices", "moe/choice_entropy", "percentunit"),
        simple("Swing of loads", "moe/load_swing", "percentunit"),
        simple("Dropped choices", "moe/dropped", "percentunit"),
        simple("Experts per layer", "moe/num_experts", "short"),
        simple("Busiest worker", "moe/rank_violation", "short"),
        simple("Experts per token", "moe/experts_per_token", "short"),
        Chart(
            "Tokens on their way",
            "To their experts and back, results and gradients: bytes per second between workers.",
            "Bps",
            (
                Query(rate("comm/dispatch_bytes"), "{{run}} dispatch"),
                Query(rate("comm/combine_bytes"), "{{run}} combine"),
            ),
        ),
        Chart(
            "Bytes per token",
            "What a target token costs between workers in dispatch and combine.",
            "bytes",
            (
                Query(
                    f"({rate('comm/dispatch_bytes')} + {rate('comm/combine_bytes')}) / {rate('train/tokens')}",
                ),
            ),
        ),
        Chart(
            "Share of the traffic",
            "Dispatch and combine over all that workers send one another.",
            "percentunit",
            (Query(f"({rate('comm/dispatch_bytes')} + {rate('comm/combine_bytes')}) / {rate('comm/sent_bytes')}"),),
        ),
        simple("Slowest rank", "perf/slowness", "short"),
    ),
)

ELASTICITY = Board(
    "elasticity",
    "Elasticity",
    "How the number of workers changes, and what that costs.",
    (
        Chart(
            "Workers",
            "Members of the world, how many are wanted, and warm ones besides.",
            "short",
            (
                of("elastic/world_size", "{{run}} members"),
                of("elastic/workers_wanted", "{{run}} wanted"),
                of("elastic/standbys", "{{run}} standbys"),
            ),
        ),
        Chart(
            "Changes in the last hour",
            "Changes of the members by wish, and after losses.",
            "short",
            (
                Query(rise("elastic/rescales", HOUR, RUNS), "{{run}} rescales"),
                Query(rise("elastic/recoveries", HOUR, RUNS), "{{run}} recoveries"),
            ),
        ),
        Chart(
            "Training time lost",
            "Share of the time that rescales and losses have taken.",
            "percentunit",
            (
                Query(rate("elastic/rescale_stall_s"), "{{run}} to rescales"),
                Query(rate("elastic/recovery_stall_s"), "{{run}} to losses"),
            ),
        ),
        Chart(
            "Training time lost since the controller's start",
            "Stalls, added up.",
            "s",
            (
                of("elastic/rescale_stall_s", "{{run}} to rescales"),
                of("elastic/recovery_stall_s", "{{run}} to losses"),
            ),
        ),
        Chart(
            "State moved",
            "Bytes between workers in rescales and recoveries.",
            "bytes",
            (of("elastic/moved_bytes"),),
        ),
        simple("Generation", "elastic/generation", "short"),
        simple("Steps between snapshots", "elastic/snapshot_interval", "short"),
        simple("Wait for the buddy's answer", "perf/protection_wait_s", "s"),
        simple("Copies of the newest step", "elastic/holders", "short"),
        NODES_LEFT_OUT,
    ),
)

COMMUNICATION = Board(
    "communication",
    "Communication",
    "What workers send one another.",
    (
        Chart(
            "Sent, by kind",
            "Bytes per second between all workers.",
            "Bps",
            tuple(Query(rate(f"comm/{kind}_bytes"), f"{{{{run}}}} {kind}") for kind in TrafficKind),
            stacked=True,
        ),
        Chart(
            "Bytes per step",
            "All that workers send one another, and what of their tokens and results goes to other nodes.",
            "bytes",
            (
                Query(f"{rate('comm/sent_bytes')} / {rate('run/committed_steps')}"),
                Query(
                    f"{rate('comm/tokens_across_nodes_bytes')} / {rate('run/committed_steps')}",
                    "{{run}} tokens to other nodes",
                ),
            ),
        ),
        Chart(
            "Bytes per token",
            "The same over target tokens.",
            "bytes",
            (Query(f"{rate('comm/sent_bytes')} / {rate('train/tokens')}"),),
        ),
        Chart(
            "Saved by compression",
            "Share of the bytes that would be sent without it.",
            "percentunit",
            (Query(f"1 - {rate('comm/sent_bytes')} / {rate('comm/raw_bytes')}"),),
        ),
        Chart(
            "Sent since the controller's start",
            "All together, and what it would be without compression.",
            "bytes",
            (of("comm/sent_bytes", "{{run}} sent"), of("comm/raw_bytes", "{{run}} without compression")),
        ),
        Chart(
            "Network of the nodes",
            "What each node sends and receives, whoever it is for.",
            "Bps",
            (
                Query(newest("system/sent_bytes_per_second", RUNS, by="node"), "{{node}} sent"),
                Query(newest("system/received_bytes_per_second", RUNS, by="node"), "{{node}} received"),
            ),
        ),
    ),
)

BOARDS = (FLEET, RUN, EXPERTS, ELASTICITY, COMMUNICATION)

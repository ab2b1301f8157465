"""The alerts, as data: `build.py` writes `alerts.yml` of it, in the form of Prometheus' rule files.

Each is a figure per run and a bound. So a figure can be asked for when nothing is wrong too, and an alert whose figure
isn't there is found before it is missed.
"""

from dataclasses import dataclass

from dashboards.queries import mean, newest, rise
from orchestrator.policy.health.expert_collapse import COLLAPSED, LASTING_STEPS, SETTLED_STEPS, SWINGING
from orchestrator.protocol.status import RunPhase
from orchestrator.storage.condition import StorageCondition

# One of the cluster's runs that has its workers: whoever waits for room is not to be woken up for.
STARTING = f'phase=~"{RunPhase.QUEUED}|{RunPhase.STARTING}"'
STARTED = f"(1 - {newest('run/phase', STARTING)})"
WELL = f'condition="{StorageCondition.WELL}"'
LOSS = newest("train/loss")
# Bounds are those of the warnings of `orchestrator status`, so that the two say the same of a run.
SETTLED = f"({newest('run/committed_steps')} > bool {SETTLED_STEPS + LASTING_STEPS})"


@dataclass(frozen=True)
class Alert:
    """`figure` over `bound`, for as long as `lasting`, is a case for somebody. `severity`: page or ticket."""

    name: str
    figure: str
    bound: float
    lasting: str
    severity: str
    summary: str
    remedy: str

    @property
    def expr(self) -> str:
        return f"({self.figure}) > {self.bound:g}"

    @property
    def verdict(self) -> str:
        """1 where it would fire, 0 where it wouldn't; nothing where there is no figure."""
        return f"({self.figure}) > bool {self.bound:g}"


ALERTS = (
    Alert(
        "RunStalled",
        f"(time() - {newest('run/committed_time')}) * {STARTED}",
        600.0,
        "1m",
        "page",
        "no step was committed for {{ $value | humanizeDuration }}",
        "`orchestrator status` says what the run waits for, `orchestrator events` what happened last.",
    ),
    Alert(
        "LossNotFinite",
        f"({LOSS} != bool {LOSS}) + (abs({LOSS}) == bool Inf) + ({rise('train/skipped', '10m')})",
        0.0,
        "0m",
        "page",
        "the loss is not finite, or updates were skipped because they weren't",
        "A single bad batch is left out by itself. If it goes on: lower the learning rate, look at the newest data.",
    ),
    Alert(
        "CheckpointOld",
        f"(time() - {newest('run/checkpoint_time')}) * {STARTED}",
        3600.0,
        "1m",
        "ticket",
        "the newest checkpoint is {{ $value | humanizeDuration }} old: the loss of the cluster would cost that much",
        "Set `checkpoint.every`; if it is set, look for storage errors in `orchestrator events` and the log.",
    ),
    Alert(
        "ExpertCollapse",
        f"{newest('moe/collapse')} * {SETTLED}",
        COLLAPSED,
        "10m",
        "ticket",
        "a layer's fullest expert is at {{ $value | humanizePercentage }} of the way from an even load to all tokens",
        "`orchestrator status` names the layer. Routers that collapse at the start need `model.embedding_scale` (8 by "
        "default), `model.bias_update: quantile` or a larger `model.bias_update_speed`; later, a lower learning rate: "
        "resume --from a checkpoint before it began.",
    ),
    Alert(
        "ExpertLoadsSwing",
        f"{mean('moe/load_swing', '10m')} * {SETTLED}",
        SWINGING,
        "5m",
        "ticket",
        "{{ $value | humanizePercentage }} of the experts go from well above the mean load to well below it, or back, "
        "within a step",
        "The routers' bias moves too far at once: lower `model.bias_update_speed`.",
    ),
    Alert(
        "RecoveryStorm",
        rise("elastic/recoveries", "30m"),
        3.0,
        "0m",
        "page",
        "{{ $value }} recoveries within half an hour",
        "`orchestrator events` names workers, nodes and causes; drain the node that they have in common.",
    ),
    Alert(
        "NodeQuarantined",
        newest("elastic/quarantined_nodes"),
        0.0,
        "0m",
        "ticket",
        "nodes that get no new workers, as too many failed there: {{ $value }}",
        "`orchestrator events` names the node and the failures; replace it.",
    ),
    Alert(
        "StateDiffers",
        rise("verify/differences", "1h"),
        0.0,
        "0m",
        "page",
        "steps came out otherwise when a standby did them again: some processor or memory is wrong",
        "`orchestrator events` names the step and, where it can be told, ranks and nodes: drain these, pause the run, "
        "and resume it --from a checkpoint before that step.",
    ),
    Alert(
        "WatermarkLag",
        f"({newest('run/finished_steps')} - {newest('run/committed_steps')}) * {newest('perf/step_s')}",
        60.0,
        "1m",
        "page",
        "{{ $value | humanizeDuration }} of finished steps are not on record and could be lost",
        "The run storage may be full or not writable; `orchestrator status` shows a warning then.",
    ),
    Alert(
        "StorageFails",
        f"1 - {newest('run/storage', WELL)}",
        0.0,
        "1m",
        "page",
        "the run storage refuses writes or doesn't answer: the run trains on, but nothing is recorded or published",
        "`orchestrator status` names the reason. Make room, make it writable, or repair the mount: what waits is "
        "written then. What waits is lost with a worker whose state no other one holds.",
    ),
)

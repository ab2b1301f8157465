"""Ray Train's configs as settings that override keys of a job. Pure functions.

    settings_of(ScalingConfig(num_workers=(2, 8)), RunConfig(name="try"))

Ray Train's configs don't distinguish a default from a value that was written down. So a field with its default leaves
the key to the job, except for `num_workers`, which always counts. A field that asks for something unsupported is
refused: nothing is ignored silently.

The classes are those of `ray.train`, imported from where Ray defines them: type checkers see older ones in `ray.train`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ray.train.constants import DEFAULT_STORAGE_PATH
from ray.train.v2.api.callback import UserCallback
from ray.train.v2.api.config import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig

from orchestrator.errors import UsageError, nearest
from orchestrator.metrics.registry import METRICS
from orchestrator.spec.fault_tolerance import MAX_BUDGET
from orchestrator.spec.job_file.overrides import Setting
from orchestrator.spec.keys.section import Path
from orchestrator.spec.workers import AVAILABLE, MANUAL

VALIDATION = "eval/loss"  # the metric by which checkpoints can be kept
OF_TASK = "eval/metric"  # begins those of a task on validation rows, each with its own name after it
# Kinds that Ray Train counts as failures of workers. It doesn't know loss explosions and failures of the storage.
WORKER_FAILURES = ("worker", "node", "network", "hang", "user_error", "out_of_memory", "internal")
GENERATED_NAME = re.compile(r"ray_train_run-\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d")


@dataclass(frozen=True)
class _Refusal:
    """An unsupported field, as its user wrote it; `rule` gives the rule and the remedy."""

    said: str
    rule: str


_Said = Iterator[Setting | _Refusal]


def settings_of(scaling: ScalingConfig | None, run: RunConfig | None) -> tuple[Setting, ...]:
    """Settings of the configs, which override the job's keys; none for None.

    Raises:
        UsageError: the configs ask for something unsupported; all such fields are named.
    """
    found = [*(_of_scaling(scaling) if scaling is not None else ()), *(_of_run(run) if run is not None else ())]
    refused = [f"{one.said}: {one.rule}" for one in found if isinstance(one, _Refusal)]
    if refused:
        raise UsageError("\n".join(refused), unchanged="Nothing was started.")
    return tuple(one for one in found if isinstance(one, Setting))


def _of_scaling(config: ScalingConfig) -> _Said:
    yield from _sizes(config)
    yield from _resources(config)
    yield from _labels(config)
    if config.placement_strategy != "PACK":
        rule = "workers are placed one by one, so that each can come and go, with a buddy on another node: leave it out"
        yield _Refusal(_said(config, "placement_strategy"), rule)
    for field, rule in (
        ("accelerator_type", "workers reserve CPUs, GPUs and memory, of any type: use a cluster of that type"),
        ("use_tpu", "training runs on CPUs and NVIDIA GPUs: leave it out"),
        ("topology", "training runs on CPUs and NVIDIA GPUs: leave it out"),
    ):
        if getattr(config, field):
            yield _Refusal(_said(config, field), rule)


def _labels(config: ScalingConfig) -> _Said:
    """One selector for all workers: one per worker would name workers that come and go."""
    written = _said(config, "label_selector")
    if isinstance(config.label_selector, dict):
        yield Setting(("workers", "label_selector"), config.label_selector, written)
    elif config.label_selector:
        yield _Refusal(written, "workers are alike, as they come and go: name one selector for all of them")


def _sizes(config: ScalingConfig) -> _Said:
    written = _said(config, "num_workers")
    yield Setting(("workers", "min"), config.min_workers, written)
    yield Setting(("workers", "max"), config.max_workers, written)
    policy: Path = ("autoscale", "policy")
    if config.min_workers == config.max_workers:
        yield Setting(("workers", "initial"), config.max_workers, written)
        yield Setting(("workers", "schedule"), [], written)
        yield Setting(policy, MANUAL, written)
        return
    yield Setting(policy, AVAILABLE, written, unless=(policy, ("workers", "schedule")))
    interval = "elastic_resize_monitor_interval_s"
    if getattr(config, interval) != ScalingConfig.elastic_resize_monitor_interval_s:
        yield Setting(("autoscale", "cooldown_s"), getattr(config, interval), _said(config, interval))


def _resources(config: ScalingConfig) -> _Said:
    written = _said(config, "use_gpu", "resources_per_worker")
    asked: dict[str, Any] = {**({"GPU": 1} if config.use_gpu else {}), **(_dict(config.resources_per_worker))}
    for name, amount in asked.items():
        if name in ("CPU", "GPU"):
            yield Setting(("resources", f"{name.lower()}s"), amount, written)
        elif name == "memory":
            yield Setting(("resources", "memory"), f"{amount / 1e6:.6f}".rstrip("0").rstrip(".") + "MB", written)
        else:
            yield _Refusal(written, f"workers reserve CPU, GPU and memory, {name} is none of them: leave it out")


def _dict(value: Any) -> dict[str, Any]:
    return dict(value or {})


def _of_run(config: RunConfig) -> _Said:
    if config.name and not GENERATED_NAME.fullmatch(config.name):
        yield Setting(("name",), config.name, _said(config, "name"))
    if config.storage_path != DEFAULT_STORAGE_PATH:
        yield Setting(("storage",), config.storage_path, _said(config, "storage_path"))
    if config.storage_filesystem is not None:
        rule = "run storage is a directory that all nodes see: name it by storage_path"
        yield _Refusal(_said(config, "storage_filesystem"), rule)
    yield from _failures(config.failure_config or FailureConfig())
    yield from _checkpoints(config.checkpoint_config or CheckpointConfig())
    yield from _environment(config)
    for callback in config.callbacks or ():
        if not isinstance(callback, UserCallback):
            rule = "only callbacks of the kind ray.train.UserCallback are called: leave it out"
            yield _Refusal(f"RunConfig(callbacks=[{type(callback).__name__}])", rule)


def _failures(config: FailureConfig) -> _Said:
    if config.max_failures:
        budget = MAX_BUDGET if config.max_failures == -1 else config.max_failures
        for kind in WORKER_FAILURES:
            yield Setting(("recovery", "budgets", kind), budget, _said(config, "max_failures"))
    if config.max_preemption_failures != -1:
        budget, written = config.max_preemption_failures, _said(config, "max_preemption_failures")
        yield Setting(("recovery", "budgets", "preemption"), budget, written)
    if config.controller_failure_limit != -1:
        rule = "a controller that dies is always restarted, and training continues meanwhile: leave it out"
        yield _Refusal(_said(config, "controller_failure_limit"), rule)
    for field in ("relax_collectives_on_preemption", "preemption_grace_s"):
        if getattr(config, field):
            rule = "workers leave a node that is taken away at a fence, and no worker waits for them: leave it out"
            yield _Refusal(_said(config, field), rule)


def _checkpoints(config: CheckpointConfig) -> _Said:
    metric, count = config.checkpoint_score_attribute, config.num_to_keep
    is_of_task = metric is not None and metric.startswith((f"{OF_TASK}/", "train/metric/"))
    if (
        metric is not None
        and not is_of_task
        and (metric not in METRICS or METRICS[metric].live or METRICS[metric].label)
    ):
        of_steps = [name for name, declared in METRICS.items() if not declared.live and not declared.label]
        rule = f"must be a metric of steps. {nearest(metric, of_steps)}docs/metrics.md lists them"
        yield _Refusal(_said(config, "checkpoint_score_attribute"), rule)
    elif metric is not None and count is not None and (metric, config.checkpoint_score_order) != (VALIDATION, "min"):
        rule = f'checkpoints are kept for a low {VALIDATION}: name that with checkpoint_score_order="min", or neither'
        yield _Refusal(f"{_said(config, 'checkpoint_score_attribute', 'checkpoint_score_order', 'num_to_keep')}", rule)
    elif count is not None:
        last, best = (count, 0) if metric is None else (1, count)
        yield Setting(("checkpoint", "keep_last"), last, _said(config, "num_to_keep"))
        yield Setting(("checkpoint", "keep_best"), best, _said(config, "num_to_keep"))


def _environment(config: RunConfig) -> _Said:
    for key, value in _dict(config.worker_runtime_env).items():
        if key.startswith("_"):  # of Ray's own
            continue
        if (
            key == "pip"
            and isinstance(value, dict)
            and not any(value.get(name) for name in value.keys() - {"packages"})
        ):
            value = value["packages"]
        if key == "env_vars":
            for name, text in value.items():
                yield Setting(("envs", name), text, f"RunConfig(worker_runtime_env={{'env_vars': {{{name!r}: …}}}})")
        elif key == "pip" and isinstance(value, list):
            yield Setting(("pip",), value, f"RunConfig(worker_runtime_env={{'pip': {value!r}}})")
        else:
            rule = "workers get env_vars and pip, a list of packages, only: install the rest in the image, or on nodes"
            yield _Refusal(f"RunConfig(worker_runtime_env={{{key!r}: …}})", rule)


def _said(config: Any, *fields: str) -> str:
    """Fields of a config as a user writes them: `ScalingConfig(num_workers=(2, 8))`."""
    return f"{type(config).__name__}({', '.join(f'{field}={getattr(config, field)!r}' for field in fields)})"

from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.runtime_env import RuntimeEnv
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.v2.api.callback import RayTrainCallback

from orchestrator.errors import SpecError, UsageError
from orchestrator.ray_train.mapping import settings_of
from orchestrator.spec.job import JobSpec
from orchestrator.spec.job_file.loading import job_from

Job = dict[str, Any]
HEAD: Job = {"schema": "v1", "name": "try"}
BUDGETS = ("worker", "node", "network", "hang", "user_error", "out_of_memory", "internal")


def job_of(scaling: ScalingConfig | None = None, run: RunConfig | None = None, **job: Any) -> JobSpec:
    return job_from(HEAD | job, overrides=settings_of(scaling, run))


def settings(config: Any) -> Job:
    scaling = config if isinstance(config, ScalingConfig) else None
    run = config if isinstance(config, RunConfig) else None
    return {".".join(map(str, setting.key)): setting.value for setting in settings_of(scaling, run)}


def failing(**changes: Any) -> RunConfig:
    return RunConfig(failure_config=FailureConfig(**changes))


def snapshots(**changes: Any) -> RunConfig:
    return RunConfig(checkpoint_config=CheckpointConfig(**changes))


FIXED = {"workers.initial": 1, "workers.schedule": [], "autoscale.policy": "manual"}
ONE = {"workers.min": 1, "workers.max": 1, **FIXED}


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (RunConfig(), {}),
        (ScalingConfig(), ONE),
        (ScalingConfig(num_workers=4), ONE | {"workers.min": 4, "workers.max": 4, "workers.initial": 4}),
        (
            ScalingConfig(num_workers=(2, 8), elastic_resize_monitor_interval_s=5.0),
            {"workers.min": 2, "workers.max": 8, "autoscale.policy": "available", "autoscale.cooldown_s": 5.0},
        ),
        (ScalingConfig(num_workers=(1, 1), elastic_resize_monitor_interval_s=5.0), ONE),
        (ScalingConfig(use_gpu=True), ONE | {"resources.gpus": 1}),
        (
            ScalingConfig(use_gpu=True, resources_per_worker={"CPU": 3, "GPU": 0.5, "memory": 1.5e9}),
            ONE | {"resources.cpus": 3, "resources.gpus": 0.5, "resources.memory": "1500MB"},
        ),
        (ScalingConfig(placement_strategy="PACK"), ONE),
        (ScalingConfig(label_selector={"pool": "a"}), ONE | {"workers.label_selector": {"pool": "a"}}),
        (RunConfig(name="new"), {"name": "new"}),
        (RunConfig(storage_path="/data/runs"), {"storage": "/data/runs"}),
        (RunConfig(callbacks=[UserCallback()], logging_config=LoggingConfig(log_level="DEBUG")), {}),
        (RunConfig(worker_runtime_env={"env_vars": {"A": "1", "B": "2"}}), {"envs.A": "1", "envs.B": "2"}),
        (RunConfig(worker_runtime_env={"pip": ["x==1", "y"]}), {"pip": ["x==1", "y"]}),
        (RunConfig(worker_runtime_env={"pip": {"packages": ["x==1"]}}), {"pip": ["x==1"]}),
        (RunConfig(worker_runtime_env=RuntimeEnv(pip=["x==1"])), {"pip": ["x==1"]}),
        (RunConfig(worker_runtime_env=RuntimeEnv(env_vars={"A": "1"})), {"envs.A": "1"}),
        (failing(max_failures=0), {}),
        (failing(max_failures=7), {f"recovery.budgets.{kind}": 7 for kind in BUDGETS}),
        (failing(max_failures=-1), {f"recovery.budgets.{kind}": 200 for kind in BUDGETS}),
        (failing(max_preemption_failures=2), {"recovery.budgets.preemption": 2}),
        (snapshots(num_to_keep=3), {"checkpoint.keep_last": 3, "checkpoint.keep_best": 0}),
        (
            snapshots(num_to_keep=3, checkpoint_score_attribute="eval/loss", checkpoint_score_order="min"),
            {"checkpoint.keep_last": 1, "checkpoint.keep_best": 3},
        ),
        (snapshots(checkpoint_score_attribute="perf/tokens_per_second"), {}),
    ],
)
def test_each_config_field_becomes_its_job_keys(config: Any, wanted: Job) -> None:
    assert settings(config) == wanted


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (ScalingConfig(placement_strategy="SPREAD"), r"ScalingConfig\(placement_strategy='SPREAD'\): .*leave it out"),
        (ScalingConfig(accelerator_type="A100"), r"accelerator_type='A100'\): .*cluster of that type"),
        (ScalingConfig(num_workers=2, label_selector=[{"pool": "a"}] * 2), r"label_selector=.*one selector for all"),
        (ScalingConfig(use_tpu=True), r"use_tpu=True\): training runs on CPUs"),
        (ScalingConfig(topology="2x2"), r"topology='2x2'\): training runs on CPUs"),
        (ScalingConfig(resources_per_worker={"CPU": 1, "disk": 1}), "disk is none of them"),
        (RunConfig(storage_filesystem=object()), r"RunConfig\(storage_filesystem=.*name it by storage_path"),
        (RunConfig(callbacks=[RayTrainCallback()]), r"callbacks=\[RayTrainCallback\]\): only .*UserCallback"),
        (RunConfig(worker_runtime_env={"conda": {}}), r"worker_runtime_env=\{'conda': …\}\): .*only: install"),
        (failing(controller_failure_limit=3), r"FailureConfig\(controller_failure_limit=3\): "),
        (failing(relax_collectives_on_preemption=True), r"relax_collectives_on_preemption=True\): "),
        (failing(preemption_grace_s=2.0), r"preemption_grace_s=2\.0\): "),
        (snapshots(checkpoint_score_attribute="eval/los"), "Did you mean `eval/loss`"),
        (snapshots(checkpoint_score_attribute="run/phase"), "must be a metric of steps"),
        (
            snapshots(num_to_keep=1, checkpoint_score_attribute="eval/loss"),
            r"checkpoint_score_attribute='eval/loss', checkpoint_score_order='max', num_to_keep=1\): .*order=\"min\"",
        ),
        (
            snapshots(num_to_keep=1, checkpoint_score_attribute="train/loss", checkpoint_score_order="min"),
            "low eval/loss",
        ),
    ],
)
def test_unsupported_options_are_refused_by_name(config: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words) as refused:
        settings(config)
    assert refused.value.unchanged == "Nothing was started."


def test_all_refusals_are_listed_at_once() -> None:
    scaling = ScalingConfig(placement_strategy="SPREAD", accelerator_type="A100")
    with pytest.raises(UsageError) as refused:
        settings_of(scaling, failing(preemption_grace_s=2.0))
    assert len(refused.value.message.splitlines()) == 3


def test_every_field_of_ray_trains_configs_is_known_here() -> None:
    """A field that a new Ray adds would be left out silently."""
    known = {
        ScalingConfig: "num_workers use_gpu resources_per_worker placement_strategy accelerator_type label_selector "
        "use_tpu topology elastic_resize_monitor_interval_s",
        RunConfig: "name storage_path storage_filesystem failure_config checkpoint_config callbacks worker_runtime_env "
        "logging_config",
        FailureConfig: "max_failures controller_failure_limit max_preemption_failures relax_collectives_on_preemption "
        "preemption_grace_s",
        CheckpointConfig: "num_to_keep checkpoint_score_attribute checkpoint_score_order",
    }
    deprecated = "trainer_resources fail_fast checkpoint_frequency checkpoint_at_end sync_config verbose stop "
    deprecated += "progress_reporter log_to_file"  # Ray raises if they are given
    for config, names in known.items():
        assert {field.name for field in fields(config)} - set(deprecated.split()) == set(names.split())


@given(st.tuples(st.integers(1, 64), st.integers(1, 64)).map(sorted), st.integers(0, 3), st.integers(1, 64))
def test_a_range_overrides_the_jobs_sizes(bounds: list[int], standby: int, before: int) -> None:
    low, high = bounds
    for workers in (before, f"{before}..{before + 3}", {"max": before, "standby": standby}):
        job = job_of(ScalingConfig(num_workers=(low, high)), workers=workers)
        assert (job.workers.min, job.workers.max, job.workers.initial) == (low, high, low)
        assert job.autoscale.policy == ("available" if low < high else "manual")
        assert job.workers.standby == (standby if isinstance(workers, dict) else 0)


@given(st.integers(1, 2**49))
def test_memory_is_kept_to_the_byte(amount: int) -> None:
    reserved = job_of(ScalingConfig(resources_per_worker={"memory": amount})).resources.memory_bytes
    assert reserved is not None and abs(reserved - amount) <= 1


def test_a_fixed_number_ends_whatever_would_change_it() -> None:
    schedule = [{"at_step": 5, "workers": 3}]
    scheduled = {"max": 3, "initial": 2, "schedule": schedule}
    job = job_of(ScalingConfig(num_workers=2), workers=scheduled)
    assert (job.workers.initial, job.workers.max, job.workers.schedule) == (2, 2, ())
    assert job_of(ScalingConfig(num_workers=2), workers="1..4", autoscale={"policy": "available"}).workers.max == 2


@pytest.mark.parametrize(
    ("job", "policy"),
    [
        ({}, "available"),
        ({"autoscale": {"policy": "manual"}}, "manual"),
        ({"autoscale": {"cooldown_s": 3.0}}, "available"),
        ({"workers": {"max": 3, "schedule": [{"at_step": 5, "workers": 3}]}}, "manual"),
        ({"workers": {"max": 3, "schedule": []}}, "available"),
    ],
)
def test_a_range_implies_the_policy_available_unless_the_job_names_one(job: Job, policy: str) -> None:
    assert job_of(ScalingConfig(num_workers=(1, 4)), **job).autoscale.policy == policy


def test_a_config_counts_in_place_of_the_job_and_leaves_the_rest() -> None:
    run = RunConfig(name="new", storage_path="/data", worker_runtime_env={"env_vars": {"A": "1"}})
    job = job_of(
        ScalingConfig(num_workers=1, resources_per_worker={"CPU": 2}),
        run,
        storage="/old",
        envs={"A": "0", "B": "2"},
        resources={"cpus": 1, "gpus": 1},
        checkpoint={"keep_last": 9},
    )
    assert (job.name, job.storage, job.envs) == ("new", "/data", {"A": "1", "B": "2"})
    assert (job.resources.cpus, job.resources.gpus, job.checkpoint.keep_last) == (2, 1, 9)


@pytest.mark.parametrize(
    ("config", "job", "words"),
    [
        (ScalingConfig(num_workers=0), {}, r"ScalingConfig\(num_workers=0\).*workers\.min: must be greater than"),
        (RunConfig(name="My_Run"), {}, r"RunConfig\(name='My_Run'\).*name: must be 1 to 40"),
        (RunConfig(storage_path="hdfs://host"), {}, r"storage_path='hdfs://host'\).*storage: must be a path"),
        (failing(max_failures=300), {}, r"max_failures=300\).*budgets\.worker: must be less than or equal to 200"),
        (ScalingConfig(resources_per_worker={"CPU": 0}), {}, r"'CPU': 0.*resources\.cpus: must be greater than 0"),
        (RunConfig(worker_runtime_env={"env_vars": {"LD_PRELOAD": "x"}}), {}, r"LD_PRELOAD.*must not be set"),
        (ScalingConfig(num_workers=(3, 8)), {"workers": {"max": 2, "initial": 2}}, r"initial must be within .*3\.\.8"),
        (
            snapshots(num_to_keep=1, checkpoint_score_attribute="eval/loss", checkpoint_score_order="min"),
            {},
            "keep_best needs validations: set eval.every",
        ),
    ],
)
def test_what_the_job_does_not_allow_is_an_error_that_names_the_config(config: Any, job: Job, words: str) -> None:
    scaling, run = (config, None) if isinstance(config, ScalingConfig) else (None, config)
    with pytest.raises(SpecError, match=words):
        job_of(scaling, run, **job)

"""Jobs whose workers don't fit the memory that they get are refused, with the figures."""

import re
from typing import Any

import pytest

from orchestrator.elastic.state_spec import ParamSpec
from orchestrator.errors import UsageError
from orchestrator.policy.estimate.job_plan import JobPlan, plan_job
from orchestrator.policy.estimate.memory_check import GIB, check_memory, crowding, is_checked
from orchestrator.policy.estimate.worker_memory import StatePlan
from orchestrator.spec.job import JobSpec

MILLION = 1_000_000
EXPERTS = tuple(ParamSpec(f"layers.1.mlp.experts.{expert}.down", (10 * MILLION,), expert) for expert in range(8))
STATE = StatePlan((ParamSpec("dense", (10 * MILLION,), None), *EXPERTS), (), 512)


def _job(memory: str | None, workers: str = "1..4", **changes: Any) -> tuple[JobSpec, JobPlan]:
    spec = {"schema": "v1", "name": "try", "workers": workers, "model": {"n_routed_experts": 8}, **changes}
    job = JobSpec.model_validate(spec | {"resources": {"memory": memory}})
    return job, plan_job(job, STATE, ours=False)


def _refusal(job: JobSpec, plan: JobPlan) -> UsageError:
    with pytest.raises(UsageError) as caught:
        check_memory(job, plan)
    return caught.value


def test_what_fits_at_every_size_passes() -> None:
    job, plan = _job("64GiB")
    check_memory(job, plan)
    peak = max(world.memory.peak for world in plan.worlds)
    check_memory(*_job(f"{peak // 1024 + 1}KiB"))
    assert "needs" in _refusal(*_job(f"{peak // 1024 - 1}KiB")).message


def test_a_buddys_snapshots_that_do_not_fit_are_refused_with_every_figure() -> None:
    """Without them the same job fits, which is one of the remedies."""
    job, plan = _job("4GB", workers="2")
    (world,) = plan.worlds
    refusal = _refusal(job, plan)
    assert "resources.memory is 4GB (4.00 GB), and a worker of try needs " in refusal.message
    assert f"{world.memory.peak / 1e9:.2f} GB in a world of 2" in refusal.message
    assert "its own snapshots and its protected rank's" in refusal.message and "process 320.0 MB" in refusal.message
    assert "protection.every: none" in refusal.remedy and "more workers" in refusal.remedy
    assert refusal.unchanged == "Nothing was started."
    check_memory(*_job("4GB", workers="2", protection={"every": "none"}))


def test_the_memory_error_suggests_whole_snapshots_only() -> None:
    refusal = _refusal(*_job("6GB", workers="2"))
    assert "gradients of the steps between two of them" in refusal.message
    amount = re.search(r"recovery.whole_every: 1, for (\S+) GB", refusal.remedy)
    assert amount and float(amount[1]) < 6
    job, plan = _job("6GB", workers="2", recovery={"whole_every": 1})
    check_memory(job, plan)
    assert f"{plan.worlds[0].memory.peak / 1e9:.2f}" == amount[1]


def test_the_amount_that_is_named_is_enough() -> None:
    refusal = _refusal(*_job("1GB"))
    amount = refusal.remedy.removeprefix("Set resources.memory to ").partition(" ")[0]
    check_memory(*_job(amount))


def test_a_size_that_fits_is_named() -> None:
    refusal = _refusal(*_job("6GB"))
    assert "set workers.min to 3, for 5.19 GB" in refusal.remedy
    check_memory(*_job("6GB", workers="3..5"))


def test_a_world_of_one_has_no_snapshots_to_do_without() -> None:
    refusal = _refusal(*_job("1GB", workers="1"))
    assert "snapshots" not in refusal.message and "protection" not in refusal.remedy


def test_each_worker_holds_the_whole_teacher() -> None:
    distill = {"teacher": "/teacher", "teacher_parameters": 1000 * MILLION}
    for precision, num_bytes in (("fp32", 4000 * MILLION), ("bf16", 2000 * MILLION)):
        _, plain = _job("64GiB", train={"precision": precision})
        _, taught = _job("64GiB", train={"precision": precision}, distill=distill)
        for one, other in zip(plain.worlds, taught.worlds, strict=True):
            assert other.memory.peak - one.memory.peak == other.memory.teacher == num_bytes
            assert other.memory.training - one.memory.training == num_bytes
            assert other.memory.on_gpu - one.memory.on_gpu == num_bytes
    assert "teacher 4.00 GB" in _refusal(*_job("4GB", workers="2", distill=distill)).message


def test_without_a_limit_too_small_a_machine_is_a_warning() -> None:
    job, plan = _job(None)
    check_memory(job, plan)
    needed = max(world.world_size * world.memory.peak for world in plan.worlds)
    assert crowding(job, plan, needed) == ""
    assert "3 workers need 15.56 GB, and this machine has 15.56 GB" in crowding(job, plan, needed - 1)
    assert crowding(*_job("1GB"), GIB) == ""


def test_a_second_copy_of_each_snapshot_takes_memory_and_traffic() -> None:
    one, two = (_job(None, workers="3..4", protection={"copies": copies})[1].worlds for copies in (1, 2))
    for once, twice in zip(one, two, strict=True):
        assert 1.2 * once.memory.snapshots < twice.memory.snapshots < 2 * once.memory.snapshots
        assert once.memory.deltas < twice.memory.deltas and once.memory.peak < twice.memory.peak
        assert once.traffic.snapshots > 0 and abs(twice.traffic.snapshots - 2 * once.traffic.snapshots) <= 1


def test_state_that_the_largest_gpu_of_the_job_can_not_hold_is_refused() -> None:
    experts = tuple(ParamSpec(f"layers.1.mlp.experts.{n}.down", (120 * MILLION,), n) for n in range(8))
    large = StatePlan((ParamSpec("dense", (40 * MILLION,), None), *experts), (), 512)

    def on(kind: str, gpus: str | int = "auto", size: int = 1) -> tuple[JobSpec, JobPlan]:
        workers = {"min": size, "max": size, "label_selector": {"ray.io/accelerator-type": kind}}
        spec = {"schema": "v1", "name": "try", "workers": workers, "model": {"n_routed_experts": 8}}
        job = JobSpec.model_validate(spec | {"resources": {"gpus": gpus}})
        return job, plan_job(job, large, ours=False)

    job, plan = on("T4")
    (world,) = plan.worlds
    assert is_checked(job) and world.memory.engine > 16 * GIB
    refusal = _refusal(job, plan)
    needs = f"{world.memory.engine / 1e9:.2f} GB"
    assert "admits GPUs of 17.18 GB at most (T4), and a worker of try needs " + needs in refusal.message
    assert "workers.min" in refusal.remedy
    check_memory(*on("in(T4,A100)"))
    check_memory(*on("T4", size=4))
    check_memory(*on("T4", gpus=0))
    assert not is_checked(on("T4", gpus=0)[0]) and not is_checked(on("Some-Kind")[0])

import subprocess
import sys
from pathlib import Path

import pytest
import ray.air.config
import yaml
from ray.train import RunConfig, ScalingConfig

from orchestrator import ElasticTrainer
from orchestrator.errors import NameTaken, SpecError, UsageError
from orchestrator.spec.job import JobSpec
from orchestrator.spec.workers import WorkersSpec

JOB = {"schema": "v1", "name": "try", "workers": "1..4", "train": {"max_steps": 7, "optimizer": {"betas": (0.9, 0.9)}}}


def test_a_file_a_dict_and_a_spec_are_the_same_job(tmp_path: Path) -> None:
    text = yaml.safe_dump(JOB | {"train": {"max_steps": 7, "optimizer": {"betas": [0.9, 0.9]}}})
    (tmp_path / "job.yaml").write_text(text)
    scaling, run = ScalingConfig(num_workers=(2, 3)), RunConfig(storage_path=str(tmp_path))
    plain = ElasticTrainer(JOB)
    jobs = [JOB, tmp_path / "job.yaml", str(tmp_path / "job.yaml"), plain.job]
    trainers = [ElasticTrainer(job, scaling_config=scaling, run_config=run) for job in jobs]
    assert len({trainer.job.model_dump_json() for trainer in trainers}) == 1
    assert trainers[0].run_dir == tmp_path / "try" and trainers[0].job.workers.max == 3
    assert plain.job.train.max_steps == 7 and plain.job.workers.max == 4


def test_configs_of_callbacks_have_the_values_that_apply(tmp_path: Path) -> None:
    trainer = ElasticTrainer(JOB | {"storage": tmp_path}, run_config=RunConfig(worker_runtime_env={}))
    assert (trainer.run_config.name, trainer.run_config.storage_path) == ("try", str(tmp_path))
    assert trainer.scaling_config.num_workers == (1, 4)


def test_a_spec_that_was_copied_keeps_what_was_changed() -> None:
    copied = JobSpec(name="try").model_copy(update={"workers": WorkersSpec(min=2, max=3)})
    assert ElasticTrainer(copied).job.workers == WorkersSpec(min=2, max=3)


def test_the_constructor_refuses_mistakes(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"train\.max_stepz: unknown key; nearest known key: train\.max_steps"):
        ElasticTrainer(JOB | {"train": {"max_stepz": 3}})
    with pytest.raises(SpecError, match="must hold only what a job file can"):
        ElasticTrainer(JOB | {"envs": {"A": object()}})
    with pytest.raises(UsageError, match="can't be read: No such file"):
        ElasticTrainer(tmp_path / "none.yaml")
    with pytest.raises(UsageError, match=r"scaling_config must be a ray\.train\.ScalingConfig; got builtins\.dict"):
        ElasticTrainer(JOB, scaling_config={"num_workers": 2})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"got ray\.\S*ScalingConfig"):
        ElasticTrainer(JOB, scaling_config=ray.air.config.ScalingConfig())  # type: ignore[arg-type]


def test_a_directory_with_something_else_in_it_is_refused_before_a_cluster_is_started(tmp_path: Path) -> None:
    (tmp_path / "try").mkdir()
    (tmp_path / "try" / "precious").touch()
    with pytest.raises(NameTaken, match="exists already"):
        ElasticTrainer(JOB | {"storage": tmp_path}).fit()


def test_configs_of_ray_train_v1_are_refused() -> None:
    script = (
        "import os; os.environ['RAY_TRAIN_V2_ENABLED'] = '0'\n"
        "from ray.train import ScalingConfig\nfrom orchestrator import ElasticTrainer\n"
        f"ElasticTrainer({JOB!r}, scaling_config=ScalingConfig(num_workers=2))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "UsageError: scaling_config must be a ray.train.ScalingConfig" in done.stderr, done.stderr

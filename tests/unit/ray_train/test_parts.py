"""Functions of a script as parts of a job."""

import subprocess
import sys
from pathlib import Path

import pytest
from ray.train import RunConfig

from orchestrator import ElasticTrainer
from orchestrator.errors import SpecError, UsageError
from tests.unit.ray_train.given_parts import build, rows, task

ROOT = Path(__file__).parents[3]
TRAIN = {"micro_batch_size": 2, "global_batch_size": 8}


def test_functions_become_entrypoints() -> None:
    job = {"schema": "v1", "name": "parts", "train": TRAIN, "task": {"options": {"beta": 2}}}
    made = ElasticTrainer(job, task=task, model=build, datasets=rows).job
    assert (made.task.entrypoint, made.task.code_dir) == ("tests.unit.ray_train.given_parts:task", str(ROOT))
    assert (made.model.entrypoint, made.data.entrypoint) == (
        "tests.unit.ray_train.given_parts:build",
        "tests.unit.ray_train.given_parts:rows",
    )
    assert made.model.code_dir == made.data.code_dir == str(ROOT) and made.task.options == {"beta": 2}


def test_names_and_paths_are_as_in_a_job(tmp_path: Path) -> None:
    made = ElasticTrainer(task="sft", datasets=tmp_path, run_config=RunConfig(name="chats")).job
    assert (made.name, made.task.name, made.data.source) == ("chats", "sft", str(tmp_path))


def test_a_run_needs_a_name() -> None:
    with pytest.raises(SpecError, match="name"):
        ElasticTrainer(task="sft", datasets="chats.jsonl")


@pytest.mark.parametrize("part", ["lambda", "within", "method", "instance"])
def test_what_no_other_process_can_import_is_refused(part: str) -> None:
    def within(options: object) -> None: ...

    class Object:
        def __call__(self) -> None: ...

    functions = {"lambda": lambda: None, "within": within, "method": Path.cwd, "instance": Object()}
    with pytest.raises(UsageError, match="is no function that another process can import") as refused:
        ElasticTrainer(task=functions[part], run_config=RunConfig(name="parts"))
    assert 'task: {entrypoint: "file:function"}' in refused.value.remedy


SCRIPT = """
from ray.train import RunConfig
from orchestrator import ElasticTrainer

def task(options): ...

{guard}
    made = ElasticTrainer(task=task, run_config=RunConfig(name="parts")).job.task
    print(made.entrypoint, made.code_dir)
"""


def test_a_function_of_the_script_needs_a_guard(tmp_path: Path) -> None:
    outputs = []
    for guard in ('if __name__ == "__main__":', "if '__main__' in __name__:"):
        (tmp_path / "train.py").write_text(SCRIPT.format(guard=guard))
        command = [sys.executable, "train.py"]
        env = {"PYTHONPATH": str(ROOT), "PATH": ""}
        outputs.append(subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True))
    assert outputs[0].stdout == f"train:task {tmp_path}\n", outputs[0].stderr
    assert "task=task is defined in train.py, which workers import too" in outputs[1].stderr

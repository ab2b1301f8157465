"""What a worker's process loads before it is warm."""

import subprocess
import sys
from pathlib import Path

from tests.support.own_models import linear, own_spec

LOOK = """
import os, sys
import orchestrator.worker.actor
assert "deepspeed.runtime.zero.stage_1_and_2" in sys.modules
assert "TORCHDYNAMO_DISABLE" not in os.environ
import torch
from orchestrator.spec.job import JobSpec, ModelSpec
from orchestrator.worker.transition.warmup import warm_up
job = JobSpec(name="small", model=ModelSpec(hidden_size=16, num_attention_heads=2))
warm_up(job, 300, torch.device("cpu"), "127.0.0.1")
from orchestrator.model.factory import catalogue
own = ModelSpec.model_validate_json(sys.argv[1])
catalogue(own, 300)
warm_up(JobSpec(name="own", model=own), 300, torch.device("cpu"), "127.0.0.1")
print(*(name for name in ("mlflow", "pandas", "torch._inductor.compile_fx", "torch._dynamo") if name in sys.modules))
import mlflow
assert mlflow.__version__ and not isinstance(torch.compile(len, backend="eager"), type(len))
"""


def test_a_worker_loads_neither_mlflow_nor_a_compiler_and_may_do_so_later(tmp_path: Path) -> None:
    environment = {"DS_ACCELERATOR": "cpu", "PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", LOOK, own_spec(tmp_path, linear()).model_dump_json()]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.split() == []

"""What a worker's process loads before it is warm."""

import subprocess
import sys

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
print(*(name for name in ("mlflow", "pandas", "torch._inductor.compile_fx", "torch._dynamo") if name in sys.modules))
import mlflow
assert mlflow.__version__ and not isinstance(torch.compile(len, backend="eager"), type(len))
"""


def test_a_worker_loads_neither_mlflow_nor_a_compiler_and_may_do_so_later() -> None:
    environment = {"DS_ACCELERATOR": "cpu", "PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", LOOK], env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.split() == []

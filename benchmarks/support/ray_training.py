"""What the baselines with Ray Train share. Import it where their variables are in the environment: it imports Ray."""

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import torch
from ray import train
from ray.train.v2.api.report_config import CheckpointUploadMode

from benchmarks.harness import ROOT
from benchmarks.support.data_parallel import DataParallel
from benchmarks.support.ray_nodes import RayNodes
from orchestrator.data.store import TokenStore
from orchestrator.spec.job import JobSpec

FILE = "state.pt"


@contextmanager
def cluster(num_cpus: int) -> Iterator[RayNodes]:
    """Nodes of our own, joined by this process. They inherit its Ray variables."""
    ours = {key: value for key, value in os.environ.items() if key.startswith("RAY_")}
    with RayNodes(num_cpus, ours | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}) as nodes:
        ray.init(address=nodes.address, log_to_driver=False, logging_level=logging.ERROR)
        try:
            yield nodes
        finally:
            ray.shutdown()


def loop_of(config: dict[str, Any]) -> DataParallel:
    """The loop of the worker that calls, from the last checkpoint on. `config` has "job" and "store_dir"."""
    torch.set_num_threads(1)
    store, context, latest = TokenStore.open(config["store_dir"]), train.get_context(), train.get_checkpoint()
    file = None if latest is None else Path(latest.path) / FILE  # all on this machine
    job = JobSpec.model_validate_json(config["job"])
    return DataParallel(job, store, context.get_world_rank(), context.get_world_size(), file)


def report_checkpoint(loop: DataParallel, config: dict[str, Any]) -> None:
    """Rank 0 writes a checkpoint straight to where it stays, below "run_dir" of `config`; all ranks report it."""
    checkpoint = None
    if loop.rank == 0:
        run_dir = Path(config["run_dir"])
        run_dir.mkdir(parents=True, exist_ok=True)
        directory = tempfile.mkdtemp(prefix=f"state-{loop.step}-", dir=run_dir)  # a step may be saved twice
        loop.save(Path(directory) / FILE)
        checkpoint = train.Checkpoint.from_directory(directory)
    mode = CheckpointUploadMode.NO_UPLOAD
    train.report({"step": loop.step}, checkpoint=checkpoint, checkpoint_upload_mode=mode)

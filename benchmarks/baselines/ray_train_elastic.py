"""Ray Train's elastic trainer growing from 1 to 2 workers, at its fastest settings.

    python -m benchmarks.baselines.ray_train_elastic JOB.json STORE_DIR ROUNDS

Plain data parallelism: both workers hold the whole model, experts included, so it has as many parameters as ours and
moves no token. Ray Train resizes by stopping every worker and starting anew from the last reported checkpoint. Its
fastest settings: the controller looks every 0.1 s (2 s by default) and may resize every second (every minute by
default), checkpoints are written every 5 steps straight to where they stay, and neither DeepSpeed nor anything else
that isn't needed is imported. How long it takes to notice a new node, up to 20 s, is not counted: training goes on.

`stall_s` is on the clock that ours is measured by: end of the last step of the old world to the end of the first step
of the new world that had never been done before, less the median step of the new world. Prints one line of JSON.
"""

import json
import logging
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness import ROOT, say
from benchmarks.support.ray_nodes import RayNodes, variables

CHECKPOINT_EVERY = 5
STEPS_BEFORE = 12  # in the old world, before there is room for a second worker
STEPS_AFTER = 10  # never done before, in the new world
TIMEOUT_S = 240.0  # a run that hasn't grown by then ends
FASTEST = {"RAY_TRAIN_V2_ENABLED": "1", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1"}


def train_on_worker(config: dict[str, Any]) -> None:
    """What each of Ray Train's workers runs."""
    import numpy as np
    import torch
    import torch.distributed as dist
    from ray import train
    from ray.train.v2.api.report_config import CheckpointUploadMode

    from orchestrator.data.store import TokenStore
    from orchestrator.elastic.placement import Placement
    from orchestrator.model.moe import ExpertHome
    from orchestrator.model.transformer import MoELanguageModel
    from orchestrator.spec.job import JobSpec

    torch.set_num_threads(config["threads"])
    job = JobSpec.model_validate_json(config["job"])
    store = TokenStore.open(config["store_dir"])
    rank, size = train.get_context().get_world_rank(), train.get_context().get_world_size()
    model = MoELanguageModel(
        job.model, store.vocab_size, ExpertHome(Placement.balanced(job.model.num_experts, 1), 0, None)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.train.lr, fused=True)
    step, latest = 0, train.get_checkpoint()
    if latest is None:
        model.init_weights(job.train.seed)
    else:
        with latest.as_directory() as directory:
            state = torch.load(Path(directory) / "state.pt", weights_only=True, mmap=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"] + 1
    parallel = torch.nn.parallel.DistributedDataParallel(model) if size > 1 else model
    num_rows, length = job.train.global_batch_size // size, job.train.sequence_length
    until = step + CHECKPOINT_EVERY + STEPS_AFTER if size > 1 else sys.maxsize
    while step < until and time.time() < config["deadline_time"]:
        first = (step * job.train.global_batch_size + rank * num_rows) % (store.num_rows("train", length) - num_rows)
        for offset in range(0, num_rows, job.train.micro_batch_size):
            rows = store.rows("train", first + offset + np.arange(job.train.micro_batch_size), length)
            is_last = offset + job.train.micro_batch_size >= num_rows
            if size > 1:
                parallel.require_backward_grad_sync = is_last
            loss = parallel(torch.from_numpy(rows.inputs_RT), torch.from_numpy(rows.targets_RT))
            (loss / (num_rows * length)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), job.train.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        mean_loss = loss.detach() / (job.train.micro_batch_size * length)
        if size > 1:
            dist.all_reduce(mean_loss)
        if rank == 0:
            with Path(config["log"]).open("a") as log:
                told = {"step": step, "size": size, "end_time": time.time(), "loss": float(mean_loss) / size}
                log.write(json.dumps(told) + "\n")
        if (step + 1) % CHECKPOINT_EVERY == 0:
            checkpoint = None
            if rank == 0:
                directory = Path(config["run_dir"]) / f"state-{step}-{size}"
                directory.mkdir(parents=True)
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                torch.save(state, directory / "state.pt")
                checkpoint = train.Checkpoint.from_directory(directory)
            mode = CheckpointUploadMode.NO_UPLOAD
            train.report({"step": step}, checkpoint=checkpoint, checkpoint_upload_mode=mode)
        step += 1


def grow_once(job_json: str, store_dir: str) -> dict[str, Any]:
    """One run that grows when a node joins: its stall and what it did again."""
    import ray
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.config import CheckpointConfig, RunConfig, ScalingConfig

    storage = Path(tempfile.mkdtemp(prefix="rt-storage-"))
    log = storage / "steps.jsonl"
    log.touch()
    ours = {key: value for key, value in os.environ.items() if key.startswith("RAY_")}  # as set by `main`
    environment = ours | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run_config: Any = RunConfig(  # Ray's annotations still name the class of its first version
        name="elastic", storage_path=str(storage), checkpoint_config=CheckpointConfig(num_to_keep=2)
    )
    try:
        with RayNodes(num_cpus=1, variables=environment) as nodes:
            ray.init(address=nodes.address, log_to_driver=False, logging_level=logging.ERROR)
            try:
                trainer = TorchTrainer(
                    train_on_worker,
                    train_loop_config={
                        "job": job_json,
                        "store_dir": store_dir,
                        "log": str(log),
                        "run_dir": str(storage / "elastic"),
                        "threads": 1,
                        "deadline_time": time.time() + TIMEOUT_S,
                    },
                    scaling_config=ScalingConfig(num_workers=(1, 2), elastic_resize_monitor_interval_s=1.0),
                    run_config=run_config,
                )
                _fit_while_growing(trainer, nodes, log)
            finally:
                ray.shutdown()
        return growth(read_log(log))
    finally:
        shutil.rmtree(storage, ignore_errors=True)


def _fit_while_growing(trainer: Any, nodes: RayNodes, log: Path) -> None:
    """Fit, and let a node join after `STEPS_BEFORE` steps. Raises what keeps the node from joining."""

    def grow() -> None:
        deadline_s = time.monotonic() + TIMEOUT_S
        while len(read_log(log)) < STEPS_BEFORE and time.monotonic() < deadline_s:
            time.sleep(0.05)
        say("Ray Train: a node joins")
        nodes.add_node(num_cpus=1)

    with ThreadPoolExecutor(1) as pool:
        growing = pool.submit(grow)
        trainer.fit()
        growing.result()


def read_log(log: Path) -> list[dict[str, Any]]:
    lines = log.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def growth(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """The stall between the two worlds, and the steps that the new one did again.

    Raises:
        ValueError: there was no new world, or it did no new step.
    """
    old = [step for step in steps if step["size"] == 1]
    new = [step for step in steps if step["size"] > 1]
    never_done = [step for step in new if step["step"] > old[-1]["step"]] if old else []
    if not never_done:
        raise ValueError(f"{len(old)} steps of one worker and {len(new)} of two; no growth was seen")
    gaps = [b["end_time"] - a["end_time"] for a, b in pairwise(new)]
    step_s = median(gaps)
    return {
        "stall_s": never_done[0]["end_time"] - old[-1]["end_time"] - step_s,
        "steps_replayed": len(new) - len(never_done),
        "step_s": step_s,
        "restart_s": new[0]["end_time"] - old[-1]["end_time"] - step_s,  # without the steps done again
    }


def main() -> None:
    job_json, store_dir, rounds = Path(sys.argv[1]).read_text(), sys.argv[2], int(sys.argv[3])
    with tempfile.TemporaryDirectory(prefix="rt-token-") as folder:
        os.environ.update(variables(Path(folder)) | FASTEST)  # before Ray is imported
        print(json.dumps({"rounds": [grow_once(job_json, store_dir) for _ in range(rounds)]}), flush=True)


if __name__ == "__main__":
    main()

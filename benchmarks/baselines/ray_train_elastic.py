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
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness import say
from benchmarks.support.ray_nodes import RayNodes, variables
from benchmarks.support.trace import FinishedStep, Trace

STEPS_BEFORE = 12  # in the old world, before there is room for a second worker
STEPS_AFTER = 10  # never done before, in the new world
TIMEOUT_S = 240.0  # a run that hasn't grown by then ends
FASTEST = {"RAY_TRAIN_V2_ENABLED": "1", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1"}


def train_on_worker(config: dict[str, Any]) -> None:
    """What each of Ray Train's workers runs."""
    from benchmarks.support.data_parallel import CHECKPOINT_EVERY, finish
    from benchmarks.support.ray_training import loop_of, report_checkpoint

    loop, trace = loop_of(config), Trace(Path(config["folder"]))
    until = loop.step + CHECKPOINT_EVERY + STEPS_AFTER if loop.size > 1 else sys.maxsize
    while loop.step < until and time.time() < config["deadline_time"]:
        loss, _ = loop.train_step()
        if loop.rank == 0:
            finish(trace, loop, loss)
        if loop.step % CHECKPOINT_EVERY == 0:
            report_checkpoint(loop, config)


def grow_once(job_json: str, store_dir: str) -> dict[str, Any]:
    """One run that grows when a node joins: its stall and what it did again."""
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.config import CheckpointConfig, RunConfig, ScalingConfig

    from benchmarks.support.ray_training import cluster

    with tempfile.TemporaryDirectory(prefix="rt-storage-", ignore_cleanup_errors=True) as folder:
        run_config: Any = RunConfig(  # Ray's annotations still name the class of its first version
            name="elastic", storage_path=folder, checkpoint_config=CheckpointConfig(num_to_keep=2)
        )
        with cluster(num_cpus=1) as nodes:
            trainer = TorchTrainer(
                train_on_worker,
                train_loop_config={
                    "job": job_json,
                    "store_dir": store_dir,
                    "folder": folder,
                    "run_dir": f"{folder}/elastic",
                    "deadline_time": time.time() + TIMEOUT_S,
                },
                scaling_config=ScalingConfig(num_workers=(1, 2), elastic_resize_monitor_interval_s=1.0),
                run_config=run_config,
            )
            _fit_while_growing(trainer, nodes, Trace(Path(folder)))
        return growth(Trace(Path(folder)).steps())


def _fit_while_growing(trainer: Any, nodes: RayNodes, trace: Trace) -> None:
    """Fit, and let a node join after `STEPS_BEFORE` steps. Raises what keeps the node from joining."""

    def grow() -> None:
        deadline_s = time.monotonic() + TIMEOUT_S
        while len(trace.steps()) < STEPS_BEFORE and time.monotonic() < deadline_s:
            time.sleep(0.05)
        say("Ray Train: a node joins")
        nodes.add_node(num_cpus=1)

    with ThreadPoolExecutor(1) as pool:
        growing = pool.submit(grow)
        trainer.fit()
        growing.result()


def growth(steps: list[FinishedStep]) -> dict[str, Any]:
    """The stall between the two worlds, and the steps that the new one did again.

    Raises:
        ValueError: there was no new world, or it did no new step.
    """
    old = [step for step in steps if step.size == 1]
    new = [step for step in steps if step.size > 1]
    never_done = [step for step in new if step.step > old[-1].step] if old else []
    if not never_done:
        raise ValueError(f"{len(old)} steps of one worker and {len(new)} of two; no growth was seen")
    step_s = median(b.end_time - a.end_time for a, b in pairwise(new))
    return {
        "stall_s": never_done[0].end_time - old[-1].end_time - step_s,
        "steps_replayed": len(new) - len(never_done),
        "step_s": step_s,
        "restart_s": new[0].end_time - old[-1].end_time - step_s,  # without the steps done again
    }


def main() -> None:
    job_json, store_dir, rounds = Path(sys.argv[1]).read_text(), sys.argv[2], int(sys.argv[3])
    with tempfile.TemporaryDirectory(prefix="rt-token-") as folder:
        os.environ.update(variables(Path(folder)) | FASTEST)  # before Ray is imported
        print(json.dumps({"rounds": [grow_once(job_json, store_dir) for _ in range(rounds)]}), flush=True)


if __name__ == "__main__":
    main()

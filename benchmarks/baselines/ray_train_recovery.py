"""Ray Train's trainer when one of its workers is killed, at its fastest settings.

    python -m benchmarks.baselines.ray_train_recovery JOB.json STORE_DIR ROUNDS

Plain data parallelism over the job's initial workers. Ray Train recovers by stopping every worker and starting as many
anew from the last reported checkpoint; a report counts when the controller has seen it. Its fastest settings: the
controller looks every 0.1 s (2 s by default); no actors or threads for what isn't needed (preemption, metrics,
structured logs); checkpoints are written every 5 steps straight to where they stay; no initial broadcast of weights, as
all have read the same ones; neither DeepSpeed nor anything else that isn't needed is imported. Most of the time goes
into new processes, which import Ray, torch and torch's compiler: about 4 s of CPU time each. Seen to make no difference
beyond noise: malloc's settings of our workers, more processes started at once, idle ones with these modules loaded.

`stall_s` and all else is defined in `benchmarks.support.kills`. Prints one line of JSON.
"""

import json
import os
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from benchmarks.support.kills import kill_in_turn
from benchmarks.support.ray_nodes import variables
from benchmarks.support.trace import Trace
from orchestrator.spec.job import JobSpec

FASTEST = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
}
END_TIMEOUT_S = 60.0


def train_on_worker(config: dict[str, Any]) -> None:
    """What each of Ray Train's workers runs."""
    from benchmarks.support.data_parallel import train_until_stopped
    from benchmarks.support.ray_training import loop_of, report_checkpoint

    loop = loop_of(config)
    train_until_stopped(Trace(Path(config["folder"])), loop, lambda: report_checkpoint(loop, config))


def kill_workers(job: JobSpec, store_dir: str, rounds: int) -> list[dict[str, Any]]:
    """One run whose workers are killed `rounds` times."""
    from ray.train import UserCallback
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.config import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig

    from benchmarks.support.data_parallel import CHECKPOINT_EVERY
    from benchmarks.support.ray_training import cluster

    class Notice(UserCallback):
        """Told by the controller, in its process, when it knows of a dead worker."""

        def __init__(self, folder: str) -> None:
            self._folder = folder

        def after_exception(self, run_context: Any, worker_exceptions: Any) -> None:
            Trace(Path(self._folder)).notice()

    with tempfile.TemporaryDirectory(prefix="rt-storage-", ignore_cleanup_errors=True) as folder:
        run_config: Any = RunConfig(  # Ray's annotations still name the class of its first version
            name="recovery",
            storage_path=folder,
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            failure_config=FailureConfig(max_failures=-1),
            callbacks=[Notice(folder)],
        )
        config = {"job": job.model_dump_json(by_alias=True), "store_dir": store_dir}
        with cluster(num_cpus=job.workers.initial):
            trainer = TorchTrainer(
                train_on_worker,
                train_loop_config=config | {"folder": folder, "run_dir": f"{folder}/recovery"},
                scaling_config=ScalingConfig(num_workers=job.workers.initial),
                run_config=run_config,
            )
            fitting = threading.Thread(target=trainer.fit, daemon=True)
            fitting.start()
            trace = Trace(Path(folder))
            measured = kill_in_turn(trace, rounds, CHECKPOINT_EVERY, fitting.is_alive)
            trace.stop()
            fitting.join(END_TIMEOUT_S)
        return measured


def main() -> None:
    job, store_dir, rounds = JobSpec.model_validate_json(Path(sys.argv[1]).read_text()), sys.argv[2], int(sys.argv[3])
    with tempfile.TemporaryDirectory(prefix="rt-token-") as folder:
        os.environ.update(variables(Path(folder)) | FASTEST)  # before Ray is imported
        print(json.dumps({"rounds": kill_workers(job, store_dir, rounds)}), flush=True)


if __name__ == "__main__":
    main()

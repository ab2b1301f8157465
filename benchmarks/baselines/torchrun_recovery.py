"""torchrun when one of its workers is killed, at its fastest settings.

    python -m benchmarks.baselines.torchrun_recovery JOB.json STORE_DIR ROUNDS [fork|spawn]

Plain data parallelism over the job's initial workers on one node, over gloo. torchrun's agent looks every 0.1 s; when a
worker has died it ends all others, starts as many anew, and they go on from the last checkpoint, of every 5th step. It
is called by `elastic_launch`, as the command does. Its fastest settings:

- Workers are forked from the agent, which has imported all that they need. By `spawn`, or by the command as it's mostly
  used, every new worker imports torch again, which is most of the time then.
- They meet in the agent's store, under a prefix per restart. torch 2.13 by itself sets none (pytorch/pytorch#135712):
  gloo finds the addresses of dead workers there, so restarts fail until all are overwritten, which took 38 s and more.
- No initial broadcast of weights, as all have read the same ones; malloc's settings of our workers; no DeepSpeed.

`stall_s` and all else is defined in `benchmarks.support.kills`. Prints one line of JSON.
"""

import json
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch
import torch._dynamo  # or every optimizer's making would, in each new worker
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from benchmarks.harness import say
from benchmarks.support.data_parallel import CHECKPOINT_EVERY, DataParallel, train_until_stopped
from benchmarks.support.kills import kill_in_turn
from benchmarks.support.trace import Trace
from orchestrator.cluster.processes import describe, end_session
from orchestrator.data.store import TokenStore
from orchestrator.spec.job import JobSpec

MONITOR_INTERVAL_S = 0.1
MAX_RESTARTS = 1_000_000
END_TIMEOUT_S = 60.0


def train_on_worker(job_json: str, store_dir: str, folder: str) -> None:
    """What each of torchrun's workers runs."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a fork has the agent's handler, which a rank in gloo never gets to
    torch.set_num_threads(1)
    rank, size, attempt = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"))
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    dist.init_process_group("gloo", store=dist.PrefixStore(str(attempt), store), rank=rank, world_size=size)
    job, file = JobSpec.model_validate_json(job_json), Path(folder) / "state.pt"
    loop = DataParallel(job, TokenStore.open(Path(store_dir)), rank, size, file if file.exists() else None)

    def save() -> None:
        if rank == 0:
            loop.save(file.with_suffix(".new"))
            file.with_suffix(".new").replace(file)

    train_until_stopped(Trace(Path(folder)), loop, save)
    dist.destroy_process_group()


class Notice(logging.Handler):
    """Enters when the agent tells of a failure."""

    def __init__(self, trace: Trace) -> None:
        super().__init__(logging.WARNING)
        self._trace = trace

    def emit(self, record: logging.LogRecord) -> None:
        self._trace.notice()


def launch(start_method: str, size: int, job_json: str, store_dir: str, folder: str) -> None:
    """torchrun's agent, until its workers end. What it and they write goes to a file."""
    os.setsid()  # so that whatever it starts can be ended with it
    with (Path(folder) / "log").open("wb") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    for name in ("torch.multiprocessing.spawn", "torch.distributed.elastic.multiprocessing.api"):
        logging.getLogger(name).addHandler(Notice(Trace(Path(folder))))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=size,
        run_id="recovery",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=MAX_RESTARTS,
        monitor_interval=MONITOR_INTERVAL_S,
        start_method=start_method,
        logs_specs=DefaultLogsSpecs(log_dir=folder),
    )
    elastic_launch(config, train_on_worker)(job_json, store_dir, folder)


def kill_workers(job: JobSpec, store_dir: str, rounds: int, start_method: str) -> list[dict[str, Any]]:
    """One run whose workers are killed `rounds` times."""
    from benchmarks.support.environment import environment, worker_environment  # it imports Ray, which workers needn't

    with tempfile.TemporaryDirectory(prefix="torchrun-", ignore_cleanup_errors=True) as folder:
        arguments = (start_method, job.workers.initial, job.model_dump_json(by_alias=True), store_dir, folder)
        agent = multiprocessing.get_context("spawn").Process(target=launch, args=arguments)
        with environment(worker_environment(threads=1, keep_memory=True)):
            agent.start()
        leader, trace = describe(psutil.Process(agent.pid)), Trace(Path(folder))
        try:
            measured = kill_in_turn(trace, rounds, CHECKPOINT_EVERY, agent.is_alive)
            trace.stop()
            agent.join(END_TIMEOUT_S)
        except RuntimeError:
            say((Path(folder) / "log").read_text(errors="replace")[-2000:])
            raise
        finally:
            end_session(leader, (leader,))
        return measured


def main() -> None:
    job, store_dir, rounds = JobSpec.model_validate_json(Path(sys.argv[1]).read_text()), sys.argv[2], int(sys.argv[3])
    start_method = sys.argv[4] if len(sys.argv) > 4 else "fork"
    print(json.dumps({"rounds": kill_workers(job, store_dir, rounds, start_method)}), flush=True)


if __name__ == "__main__":
    main()

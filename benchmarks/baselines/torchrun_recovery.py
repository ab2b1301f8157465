"""torchrun when one of its workers is killed, at its fastest settings.

python -m benchmarks.baselines.torchrun_recovery JOB.json STORE_DIR ROUNDS [fork|spawn]
"""

import importlib
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

from benchmarks.support.environment import environment, worker_environment
from benchmarks.support.kills import kill_in_turn
from benchmarks.support.trace import Trace
from orchestrator.control.processes import describe, end_session
from orchestrator.spec.job import JobSpec

MONITOR_INTERVAL_S = 0.1
MAX_RESTARTS = 1_000_000
PRELOADED = ("benchmarks.support.data_parallel", "torch._dynamo")  # an optimizer imports dynamo when it's made
END_TIMEOUT_S = 60.0


def train_on_worker(job_json: str, store_dir: str, folder: str) -> None:
    """What each of torchrun's workers runs."""
    import torch
    import torch.distributed as dist

    from benchmarks.support.data_parallel import DataParallel, train_until_stopped
    from orchestrator.data.store import TokenStore

    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a fork has the agent's handler, which a rank in gloo never gets to
    torch.set_num_threads(1)
    rank, size, attempt = (os.environ[name] for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"))
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    # The agent's store outlives its workers: without a prefix gloo would read the dead ones' addresses there.
    dist.init_process_group("gloo", store=dist.PrefixStore(attempt, store), rank=int(rank), world_size=int(size))
    job, file = JobSpec.model_validate_json(job_json), Path(folder) / "state.pt"
    loop = DataParallel(job, TokenStore.open(Path(store_dir)), int(rank), int(size), file if file.exists() else None)

    def save() -> None:
        if loop.rank == 0:
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
    """torchrun's agent, until its workers end."""
    os.setsid()  # so that whatever it starts can be ended with it
    output = os.open(Path(folder) / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, sys.stdout.fileno())
    os.dup2(output, sys.stderr.fileno())
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in PRELOADED:
        importlib.import_module(name)

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
    )
    elastic_launch(config, train_on_worker)(job_json, store_dir, folder)


def kill_workers(job: JobSpec, store_dir: str, rounds: int, start_method: str) -> list[dict[str, Any]]:
    """One run whose workers are killed `rounds` times."""
    from benchmarks.support.data_parallel import CHECKPOINT_EVERY

    with tempfile.TemporaryDirectory(prefix="torchrun-", ignore_cleanup_errors=True) as folder:
        arguments = (start_method, job.workers.initial, job.model_dump_json(by_alias=True), store_dir, folder)
        agent = multiprocessing.get_context("spawn").Process(target=launch, args=arguments)
        with environment(worker_environment(threads=1, keep_memory=True)):
            agent.start()
        leader = describe(psutil.Process(agent.pid))
        try:
            trace = Trace(Path(folder))
            measured = kill_in_turn(trace, rounds, CHECKPOINT_EVERY, agent.is_alive)
            trace.stop()
            agent.join(END_TIMEOUT_S)
        finally:
            end_session(leader, (leader,))
        return measured


def main() -> None:
    job, store_dir, rounds = JobSpec.model_validate_json(Path(sys.argv[1]).read_text()), sys.argv[2], int(sys.argv[3])
    start_method = sys.argv[4] if len(sys.argv) > 4 else "fork"
    print(json.dumps({"rounds": kill_workers(job, store_dir, rounds, start_method)}), flush=True)


if __name__ == "__main__":
    main()

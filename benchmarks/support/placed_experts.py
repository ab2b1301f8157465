"""Steps of a trained model whose experts are placed in a given way, in one rank."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from orchestrator.data.store import TokenStore
from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.engine.deepspeed.engine import DeepSpeedEngineAdapter
from orchestrator.engine.process_groups import connect, disconnect
from orchestrator.model.factory import build_model
from orchestrator.model.moe.expert_parallel import ExpertParallelContext
from orchestrator.protocol.expert_load import Loads
from orchestrator.sampling.sampler import SamplerState, sample
from orchestrator.spec.job import JobSpec
from orchestrator.worker.transition.load_state import read_pretrained


@dataclass(frozen=True)
class Settings:
    """Settings of the measured steps, the same for every rank.

    Args:
        job: what is trained, and how. Its model begins with the weights of a directory.
        store: the rows.
        steps: to be measured, after one that isn't.
        seed: of the order of rows.
    """

    job: JobSpec
    store: Path
    placement: ExpertPlacement
    steps: int
    seed: int


def steps_of(
    rank: int, world_size: int, store: Store, prefix: str, address: str, settings: Settings
) -> tuple[list[float], list[Loads]]:
    """Seconds of each step, and the tokens of its experts over all ranks."""
    job, placement = settings.job, settings.placement
    groups = connect(store, prefix, rank, placement, "gloo", address=address)
    rows = TokenStore.open(settings.store)
    model = build_model(job.model, rows.vocab_size, ExpertParallelContext(placement, rank, groups.exchange))
    engine = DeepSpeedEngineAdapter(model, job.train, groups, torch.device("cpu"), job.communication)
    engine.on_weights_initialized()
    read_pretrained(job.model, engine.ranges())
    engine.on_state_loaded(0)
    length, batch, at_once = job.train.sequence_length, job.train.global_batch_size, job.train.micro_batch_rows
    sampler = SamplerState(settings.seed, batch, length, rows.num_rows("train", length))
    seconds, loads = [], []
    for step in range(settings.steps + 1):
        mine = np.array_split(sample(sampler, step), world_size)[rank]
        dist.barrier()
        began_s = time.perf_counter()
        counts = torch.zeros((len(model.moe_layers), placement.num_experts), dtype=torch.int64)
        for begin in range(0, len(mine), at_once):
            read = rows.rows("train", mine[begin : begin + at_once], length)
            inputs, targets = torch.from_numpy(read.inputs_RT), torch.from_numpy(read.targets_RT)
            last = begin + at_once >= len(mine)
            _, routed = engine.accumulate({"inputs": inputs, "targets": targets}, batch * length, last)
            counts += routed.counts_LE
        engine.step(job.train.lr)
        dist.barrier()
        seconds.append(time.perf_counter() - began_s)
        dist.all_reduce(counts, group=groups.exchange)
        loads.append(tuple(map(tuple, counts.tolist())))
    engine.close()
    disconnect()
    return seconds[1:], loads[1:]

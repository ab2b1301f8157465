"""Our engine called in one process per rank, without Ray, records and snapshots: the least that a step can cost.

    RANK=0 WORLD_SIZE=1 python -m benchmarks.baselines.bare_engine JOB.json STORE_DIR MEETING_FILE

The weights are those that the job's `model.init_from` names, or drawn. Trains without end; the first rank prints a line
of JSON after each step.
"""

import gc
import json
import os
import sys
import time
from datetime import timedelta
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, HashStore

from orchestrator.data.store import TokenStore
from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.engine.deepspeed.engine import DeepSpeedEngineAdapter
from orchestrator.engine.process_groups import connect
from orchestrator.model.factory import build_model
from orchestrator.model.moe.expert_parallel import ExpertParallelContext
from orchestrator.model.moe.routing.balance import RoutingCounts, next_bias
from orchestrator.policy.health.expert_load import expert_load
from orchestrator.sampling.micro_batches import max_micro_batches, micro_batches_of
from orchestrator.sampling.sampler import SamplerState, sample
from orchestrator.spec.job import JobSpec
from orchestrator.worker.runtime.device import device_of
from orchestrator.worker.transition.load_state import read_pretrained


def main() -> None:
    job, store = JobSpec.model_validate_json(Path(sys.argv[1]).read_text()), TokenStore.open(Path(sys.argv[2]))
    train, length = job.train, job.train.sequence_length
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    meeting = HashStore() if size == 1 else FileStore(sys.argv[3], size)
    meeting.set_timeout(timedelta(seconds=60))
    placement = ExpertPlacement.balanced(job.model.n_routed_experts, size)
    device = device_of(job.resources.num_gpus)
    groups = connect(meeting, "bare", rank, placement, "nccl" if device.type == "cuda" else "gloo")
    model = build_model(job.model, store.vocab_size, ExpertParallelContext(placement, rank, groups.exchange))
    engine = DeepSpeedEngineAdapter(model, train, groups, device, job.communication)
    if job.model.init_from is None:
        model.init_weights(train.seed)
    engine.on_weights_initialized()
    if job.model.init_from is not None:
        read_pretrained(job.model.model_copy(update={"vocab_size": store.vocab_size}), engine.ranges())
    engine.on_state_loaded(0)
    sampler = SamplerState(
        seed=train.seed,
        global_batch_size=train.global_batch_size,
        sequence_length=length,
        num_rows=store.num_rows("train", length),
    )
    routers = [layer.router for layer in model.moe_layers]
    gc.collect()
    gc.freeze()
    for step in count():
        rows = sample(sampler, step)
        num_targets, loss_sum = (
            store.target_count("train", store.spans("train", rows, length)),
            torch.zeros((), device=device),
        )
        routed = RoutingCounts.zeros(len(routers), job.model, device)
        mine = [
            rows[number * train.micro_batch_rows :][: train.micro_batch_rows]
            for number in micro_batches_of(rank, size, train.most_micro_batches)
        ]
        # Ranks exchange tokens in every micro-batch: one with fewer takes part in the others' with no rows of its own.
        mine += [rows[:0]] * (max_micro_batches(size, train.most_micro_batches) - len(mine))
        for number, of_micro_batch in enumerate(mine, 1):
            micro_batch = store.rows("train", of_micro_batch, length)
            inputs_RT, targets_RT = torch.from_numpy(micro_batch.inputs_RT), torch.from_numpy(micro_batch.targets_RT)
            batch = {"inputs": inputs_RT.to(device), "targets": targets_RT.to(device)}
            loss, counts = engine.accumulate(batch, num_targets, last=number == len(mine))
            loss_sum += loss.total
            routed.add(counts)
        engine.step(train.lr)
        for counted in (routed.counts_LE, routed.margins_LEM):
            dist.all_reduce(counted, group=groups.world)
        bias_LE = torch.stack([router.correction_bias_E for router in routers])
        for router, bias_E in zip(routers, next_bias(bias_LE, routed, job.model, decay=1.0), strict=True):
            router.correction_bias_E.copy_(bias_E)
        violation = expert_load(routed.counts_LE.cpu().numpy()).max_violation
        line = {
            "step": step,
            "end_time": time.time(),
            "loss": float(loss_sum) / num_targets,
            "max_violation": violation,
        }
        if rank == 0:
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()

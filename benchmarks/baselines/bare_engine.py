"""Our engine called in one process, without Ray, vote, records and snapshots: the least that a step can cost.

    python -m benchmarks.baselines.bare_engine JOB.json STORE_DIR STEPS

The weights are those that the job's `model.init_from` names. Prints a line of JSON.
"""

import gc
import json
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch._C._distributed_c10d import HashStore

from benchmarks.support.memory import peak_bytes, proportional_bytes
from orchestrator.data.store import TokenStore
from orchestrator.elastic.placement import Placement
from orchestrator.engine.deepspeed_engine import DeepSpeedEngineAdapter
from orchestrator.engine.groups import connect
from orchestrator.model.balance import RoutingCounts, next_bias
from orchestrator.model.batch import MicroBatch
from orchestrator.model.building import alone, build_model
from orchestrator.policy.expert_load import expert_load
from orchestrator.sampling.sampler import SamplerState, sample
from orchestrator.spec.job import JobSpec
from orchestrator.worker.beginning import read_pretrained

WARM_STEPS = 3


def main() -> None:
    job, store = JobSpec.model_validate_json(Path(sys.argv[1]).read_text()), TokenStore.open(Path(sys.argv[2]))
    steps, train, length = int(sys.argv[3]), job.train, job.train.sequence_length
    meeting = HashStore()
    meeting.set_timeout(timedelta(seconds=30))
    groups = connect(meeting, "bare", 0, Placement.balanced(job.model.num_experts, 1), "gloo")
    model = build_model(job.model, store.vocab_size, alone(job.model))
    engine = DeepSpeedEngineAdapter(model, train, groups, torch.device("cpu"), job.communication)
    read_pretrained(job.model.model_copy(update={"vocab_size": store.vocab_size}), engine.ranges())
    engine.loaded(0)
    sampler = SamplerState.of_one_stage(
        seed=train.seed,
        global_batch_size=train.global_batch_size,
        sequence_length=length,
        num_rows=store.num_rows("train", length),
    )
    routers = [layer.router for layer in model.moe_layers]
    gc.collect()
    gc.freeze()
    tokens, loss_sum, violation, began_s = 0, 0.0, 0.0, 0.0
    for step in range(steps + WARM_STEPS):
        if step == WARM_STEPS:
            tokens, began_s = 0, time.perf_counter()
        rows = sample(sampler, step).rows
        num_targets, loss_sum = store.target_count("train", store.spans("train", rows, length)), 0.0
        routed = RoutingCounts.zeros(len(routers), job.model)
        for number in range(train.most_slots):
            slot = store.rows("train", rows[number * train.slot_rows :][: train.slot_rows], length)
            batch = MicroBatch(torch.from_numpy(slot.inputs_RT), torch.from_numpy(slot.targets_RT))
            loss, counts = engine.accumulate(batch, num_targets, last=number == train.most_slots - 1)
            loss_sum += float(loss)
            routed.add(counts)
        engine.step(train.lr)
        bias_LE = torch.stack([router.correction_bias_E for router in routers])
        for router, bias_E in zip(routers, next_bias(bias_LE, routed, job.model, decay=1.0), strict=True):
            router.correction_bias_E.copy_(bias_E)
        tokens, loss_sum = tokens + num_targets, loss_sum / num_targets
        violation = expert_load(routed.counts_LE.numpy()).max_violation
    reported = {
        "tokens_per_s": tokens / (time.perf_counter() - began_s),
        "loss": loss_sum,
        "max_violation": violation,
        "proportional_bytes": proportional_bytes(),
        "peak_bytes": peak_bytes(),
    }
    print(json.dumps(reported), flush=True)


if __name__ == "__main__":
    main()

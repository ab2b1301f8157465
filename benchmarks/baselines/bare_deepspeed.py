"""The loop that somebody would write with DeepSpeed alone: the same model, rows and micro-batches, nothing elastic.

    RANK=0 LOCAL_RANK=0 WORLD_SIZE=2 python -m benchmarks.baselines.bare_deepspeed JOB.json STORE_DIR MEETING_FILE

Stock `deepspeed.initialize` with ZeRO at the job's stage and its own groups for expert parallelism. Its best settings:
fused AdamW, gradients accumulated without DeepSpeed's management (seen: a sixth less CPU time a step), buckets as large
as the model, no overlap (which does nothing on a CPU), no shared-memory op (which would be compiled for 46 s), a frozen
garbage collector. Per step it makes one all-reduce of what any loop of this model needs: the loss for its log and the
expert counts, which move the routers' biases. Rank 0 prints a line of JSON per step. It trains until it is killed.
"""

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.utils import groups
from torch import nn

from orchestrator.data.store import TokenStore
from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.state_spec import expert_of
from orchestrator.model.moe.expert_parallel import ExpertParallelContext
from orchestrator.model.moe.routing.balance import RoutingCounts, next_bias
from orchestrator.model.transformer import MoELanguageModel
from orchestrator.sampling.micro_batches import micro_batches_of
from orchestrator.sampling.sampler import SamplerState, sample
from orchestrator.spec.job import JobSpec

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class ExpertMarker(MoE):  # type: ignore[misc]
    """A child without parameters by which DeepSpeed knows that there are experts, spread over the whole world."""

    def __init__(self, num_experts: int, world_size: int) -> None:
        nn.Module.__init__(self)
        self.num_experts, self.ep_size = num_experts, world_size

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        groups._create_expert_and_data_parallel(self.ep_size, use_data_before_expert_parallel_)


def build(job: JobSpec, vocab_size: int, rank: int, world_size: int) -> tuple[MoELanguageModel, Any]:
    """The model and DeepSpeed's engine around it, with the weights that the job's seed gives."""
    train = job.train
    placement = ExpertPlacement.balanced(job.model.n_routed_experts, world_size)
    model = MoELanguageModel(job.model, vocab_size, ExpertParallelContext(placement, rank, dist.group.WORLD))
    model.init_weights(train.seed)
    model.add_module("marker", ExpertMarker(job.model.n_routed_experts, world_size))
    for name, param in model.named_parameters():
        if expert_of(name) is not None:
            param.allreduce = False  # type: ignore[attr-defined]
            param.group_name = f"ep_size_{world_size}"  # type: ignore[attr-defined]
    param_groups = split_params_into_different_moe_groups_for_optimizer(
        {"params": list(model.parameters()), "name": "all"}
    )
    optimizer = torch.optim.AdamW(
        param_groups,
        lr=train.lr,
        betas=train.optimizer.betas,
        eps=train.optimizer.eps,
        weight_decay=train.optimizer.weight_decay,
        fused=True,
    )
    config = {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "managed_gradient_accumulation": False,  # micro-batches add up by themselves, then one step
        "gradient_clipping": train.gradient_clipping,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
        "zero_optimization": {
            "stage": train.zero_stage,
            "reduce_scatter": True,
            "contiguous_gradients": True,
            "overlap_comm": False,
            "reduce_bucket_size": sum(p.numel() for p in model.parameters()) + 1,
        },
    }
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return model, engine


def train_forever(job: JobSpec, store: TokenStore, model: MoELanguageModel, engine: Any, rank: int, size: int) -> None:
    train, length = job.train, job.train.sequence_length
    sampler = SamplerState(
        seed=train.seed,
        global_batch_size=train.global_batch_size,
        sequence_length=length,
        num_rows=store.num_rows("train", length),
    )
    mine = micro_batches_of(rank, size, train.most_micro_batches)
    step = 0
    while True:
        rows = sample(sampler, step)
        tokens = store.target_count("train", store.spans("train", rows, length))
        loss_sum, routed = 0.0, RoutingCounts.zeros(len(model.moe_layers), job.model)
        for number in mine:
            micro_batch = store.rows("train", rows[number * train.micro_batch_size :][: train.micro_batch_size], length)
            loss = engine(torch.from_numpy(micro_batch.inputs_RT), torch.from_numpy(micro_batch.targets_RT))
            # DeepSpeed takes the mean over ranks; what is wanted is the mean over the batch's tokens.
            engine.backward(loss * (size / tokens))
            loss_sum += float(loss.detach())
            routed.add(model.routing_counts())
        engine.step()
        summed = torch.cat([torch.tensor([loss_sum], dtype=torch.float64), routed.flat().double()])
        dist.all_reduce(summed)
        routed = routed.from_flat(summed[1:].long())
        bias_LE = torch.stack([layer.router.correction_bias_E for layer in model.moe_layers])
        bias_LE = next_bias(bias_LE, routed, job.model, decay=1.0)
        for layer, bias_E in zip(model.moe_layers, bias_LE, strict=True):
            layer.router.correction_bias_E.copy_(bias_E)
        if rank == 0:
            print(json.dumps({"step": step, "end_time": time.time(), "loss": float(summed[0]) / tokens}), flush=True)
        step += 1


def main() -> None:
    job_file, store_dir, meeting_file = (Path(arg) for arg in sys.argv[1:4])
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    job = JobSpec.model_validate_json(job_file.read_text())
    if job.train.most_micro_batches % size:
        sys.exit(
            f"{job.train.most_micro_batches} micro-batches on {size} ranks: "
            "every rank needs as many, or their exchanges don't meet"
        )
    store = TokenStore.open(store_dir)
    dist.init_process_group("gloo", init_method=f"file://{meeting_file}", rank=rank, world_size=size)
    model, engine = build(job, store.vocab_size, rank, size)
    gc.collect()
    gc.freeze()
    train_forever(job, store, model, engine, rank, size)


if __name__ == "__main__":
    main()

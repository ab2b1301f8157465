"""The loop that somebody would write with transformers alone: its own Glm4Moe, AdamW, nothing else.

    python -m benchmarks.baselines.plain_transformers JOB.json STORE_DIR

Its best settings, of those tried: experts by `grouped_mm`, scaled dot product attention, fused AdamW. With precision
bf16 the weights of forward and backward are bf16, and the optimizer has masters and moments in fp32. The router's bias
stays as it is: transformers doesn't move it. Weights, rows and micro-batches are those of the job. Trains without end,
and prints a line of JSON after each step.
"""

import gc
import json
import sys
import time
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from orchestrator.data.store import TokenStore
from orchestrator.sampling.sampler import SamplerState, sample
from orchestrator.spec.job import JobSpec
from orchestrator.worker.runtime.device import device_of

COUNT_EVERY = 20  # steps: counting costs time that the loop of a user wouldn't take


class Loads:
    """The loads of some steps, counted where routers choose."""

    def __init__(self, model: nn.Module, num_experts: int) -> None:
        self.counts: dict[int, Tensor] = {}
        self._num_experts = num_experts
        self.is_counting = False
        layers = [module for name, module in model.named_modules() if name.endswith(".mlp.experts")]
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(lambda _, args, number=number: self._count(number, args[1]))

    def begin(self, is_counting: bool) -> None:
        """Begin a step."""
        self.is_counting = is_counting
        if is_counting:
            self.counts.clear()

    def _count(self, number: int, chosen: Tensor) -> None:
        if self.is_counting:
            counts = torch.bincount(chosen.reshape(-1), minlength=self._num_experts)
            self.counts[number] = self.counts.get(number, torch.zeros_like(counts)) + counts

    def max_violation(self) -> float:
        """Of the last step that was counted, as mean over layers."""
        found = [float(counts.max() / counts.double().mean() - 1) for counts in self.counts.values()]
        return sum(found) / len(found)


class Updates:
    """AdamW in fp32: on the weights, or on masters of bf16 ones."""

    def __init__(self, model: nn.Module, job: JobSpec) -> None:
        self._weights = list(model.parameters())
        self._mixed = job.train.precision == "bf16"
        self._masters = [p.detach().float().requires_grad_() for p in self._weights] if self._mixed else self._weights
        options = job.train.optimizer
        self._adamw = torch.optim.AdamW(
            self._masters, job.train.lr, options.betas, options.eps, options.weight_decay, fused=True
        )

    def step(self, max_norm: float) -> None:
        if self._mixed:
            for master, weight in zip(self._masters, self._weights, strict=True):
                master.grad = None if weight.grad is None else weight.grad.float()
                weight.grad = None
        nn.utils.clip_grad_norm_(self._masters, max_norm)
        self._adamw.step()
        self._adamw.zero_grad()
        if self._mixed:
            with torch.no_grad():
                for master, weight in zip(self._masters, self._weights, strict=True):
                    weight.copy_(master)


def main() -> None:
    job, store = JobSpec.model_validate_json(Path(sys.argv[1]).read_text()), TokenStore.open(Path(sys.argv[2]))
    train, length = job.train, job.train.sequence_length
    device = device_of(job.resources.num_gpus)
    dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(
        job.model.init_from, dtype=dtype, experts_implementation="grouped_mm"
    ).to(device)
    model.train()
    loads, updates = Loads(model, job.model.n_routed_experts), Updates(model, job)
    sampler = SamplerState(
        seed=train.seed,
        global_batch_size=train.global_batch_size,
        sequence_length=length,
        num_rows=store.num_rows("train", length),
    )
    gc.collect()
    gc.freeze()
    for step in count():
        loads.begin(is_counting=step % COUNT_EVERY == 0)
        rows = sample(sampler, step)
        num_targets, loss_sum = store.target_count("train", store.spans("train", rows, length)), 0.0
        for number in range(train.most_micro_batches):
            micro_batch = store.rows("train", rows[number * train.micro_batch_rows :][: train.micro_batch_rows], length)
            logits = model(input_ids=torch.from_numpy(micro_batch.inputs_RT).to(device), use_cache=False).logits
            targets_N = torch.from_numpy(micro_batch.targets_RT).to(device).reshape(-1)
            loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), targets_N, reduction="sum")
            (loss / num_targets).backward()
            loss_sum += float(loss.detach())
        updates.step(train.gradient_clipping)
        line = {"step": step, "end_time": time.time(), "loss": loss_sum / num_targets}
        print(json.dumps(line | {"max_violation": loads.max_violation()}), flush=True)


if __name__ == "__main__":
    main()

"""What one machine with a GPU shows: tests, tokens per second, experts, and copies of state to the host.

    python -m benchmarks.gpu [--quick] [--device cpu]

- `tests`: `pytest --device gpu tests/gpu`, how many passed, failed and were skipped.
- `tokens_per_s`: a model of 0.5 B parameters in bf16, on one GPU: the whole product (`one`), its engine alone and the
  plain loop that a user of transformers would write, in turn, as in `benchmarks.throughput`.
- `experts`: forward and backward of 32 experts on 16,384 tokens, top-4, hidden 1024, inner 512, bf16: our grouped
  products, the same experts one by one, and what torchtitan does: sorted rows and `grouped_mm` over stacked weights,
  with autograd's own backward pass.
- `copies`: state of some gigabytes to pinned memory on a stream of its own: its rate, and how much longer matrix
  products beside it take.

`--device cpu` shows only that all of it runs; with bf16 that takes long there.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.harness import (
    ROOT,
    Result,
    Spread,
    alternate,
    at_least,
    equals,
    median_interval,
    ratios,
    run,
    say,
)
from benchmarks.support.arms import START_TIMEOUT_S, Arm, Loop, WholeProduct
from benchmarks.support.data import Prepared, prepared_storage
from benchmarks.support.environment import worker_environment
from orchestrator.checkpoint.hf.families import GLM4_MOE
from orchestrator.engine.device_time import finished_s
from orchestrator.model.moe.experts import GatedMLP, run_experts
from orchestrator.spec.job import JobSpec
from orchestrator.state.stream_copies import StreamCopies

SEED, NEVER, WARM_STEPS = 0, 1_000_000, 3
MODEL = {
    "hidden_size": 1024,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "intermediate_size": 2816,
    "n_routed_experts": 24,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 512,
    "n_shared_experts": 1,
}
QUICK_MODEL = MODEL | {"hidden_size": 64, "num_hidden_layers": 2, "moe_intermediate_size": 32, "intermediate_size": 64}
BATCH = {"global_batch_size": 32, "micro_batch_size": 8, "sequence_length": 1024}
QUICK_BATCH = {"global_batch_size": 2, "micro_batch_size": 1, "sequence_length": 32}
TIMES_TRANSFORMERS = 1.2  # bar


def measure(quick: bool, device: str) -> Result:
    where = torch.device(device)
    metrics: dict[str, Any] = {"card": _card(where)}
    if where.type == "cuda":
        metrics["tests"] = _tests()
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        metrics |= _throughput(Path(folder), where, quick)
    metrics["experts"] = _experts(where, quick)
    metrics["copies"] = _copies(where, quick)
    bars = [at_least("one over transformers", TIMES_TRANSFORMERS, metrics["one over transformers"])]
    if "tests" in metrics:
        bars.append(equals("failed tests", 0, metrics["tests"].get("failed", 0) + metrics["tests"].get("error", 0)))
    return Result(
        name="gpu",
        seed=SEED,
        settings={"quick": quick, "device": device, "model": QUICK_MODEL if quick else MODEL},
        rounds=2 if quick else 12,
        metrics=metrics,
        baselines={"transformers": "benchmarks.baselines.plain_transformers"},
        bars=tuple(bars),
    )


def _card(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"name": device.type}
    properties = torch.cuda.get_device_properties(device)
    found = {"name": properties.name, "gib": round(properties.total_memory / 2**30, 1), "cuda": torch.version.cuda}
    return found | {"count": torch.cuda.device_count()}


def _tests() -> dict[str, int]:
    """Tests of `tests/gpu` by outcome."""
    command = [sys.executable, "-m", "pytest", "-q", "--device", "gpu", "tests/gpu", "-rA"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    say(done.stdout[-2000:])
    words = ("PASSED", "FAILED", "ERROR", "SKIPPED")
    return {word.lower(): sum(line.startswith(word) for line in done.stdout.splitlines()) for word in words}


# -- tokens per second -----------------------------------------------------------------------------------------------


def _throughput(workspace: Path, device: torch.device, quick: bool) -> dict[str, Any]:
    given, batch = prepared_storage(quick, workspace), QUICK_BATCH if quick else BATCH
    weights = workspace / "weights"
    job = _job(given, batch, device, quick, None)
    _write_weights(job, given, weights)
    job = _job(given, batch, device, quick, weights)
    job_file = workspace / "job.json"
    job_file.write_text(job.model_dump_json(by_alias=True))
    variables = worker_environment(2, keep_memory=True, on_gpu=device.type == "cuda")
    store = str(given.store.directory)
    makers: dict[str, Callable[[], Arm]] = {
        "one": lambda: WholeProduct(job, workspace / "home", num_cpus=4),
        "engine": lambda: Loop(["benchmarks.baselines.bare_engine", str(job_file), store, ""], 1, variables),
        "transformers": lambda: Loop(["benchmarks.baselines.plain_transformers", str(job_file), store], 1, variables),
    }
    with ExitStack() as alive:
        arms: dict[str, Arm] = {}
        for name, make in makers.items():
            arms[name] = alive.enter_context(make())
            arms[name].run_block(WARM_STEPS, START_TIMEOUT_S)
            say(f"{name} is warm")
        tokens = batch["global_batch_size"] * batch["sequence_length"]
        turns = {name: lambda arm=arm: tokens * arm.run_block(2 if quick else 8) for name, arm in arms.items()}
        speeds = alternate(turns, 2 if quick else 12)
        first_losses = {name: arm.losses[0] for name, arm in arms.items()}  # of the same weights and rows
    of_pairs = {
        f"one over {other}": median_interval(ratios(speeds["one"], speeds[other]))
        for other in ("engine", "transformers")
    }
    return {"tokens_per_s": {n: Spread.of(v) for n, v in speeds.items()}, "first_loss": first_losses, **of_pairs}


def _job(given: Prepared, batch: dict[str, int], device: torch.device, quick: bool, weights: Path | None) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": "gpu",
            "workers": 1,
            "resources": {"cpus": 2, "gpus": int(device.type == "cuda")},
            "model": (QUICK_MODEL if quick else MODEL) | ({} if weights is None else {"init_from": str(weights)}),
            "train": {**batch, "lr": 1e-4, "lr_scheduler": {"kind": "constant"}, "max_steps": NEVER}
            | {"precision": "bf16"},
            "data": given.data.model_dump(),
            "storage": str(given.storage),
        }
    )


def _write_weights(job: JobSpec, given: Prepared, directory: Path) -> None:
    """A model with random weights, as transformers writes it."""
    config = GLM4_MOE.configuration(job.model, given.store.vocab_size, job.train.sequence_length, "bfloat16")
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=torch.bfloat16)
    say(f"{sum(param.numel() for param in model.parameters()):,} parameters")
    model.save_pretrained(directory)
    given.store.tokenizer().save(directory / "tokenizer.json")


# -- experts ---------------------------------------------------------------------------------------------------------


class _Titan(nn.Module):
    """Experts as torchtitan computes them: stacked weights, rows sorted by expert, `grouped_mm`."""

    def __init__(self, experts: list[GatedMLP]) -> None:
        super().__init__()
        self.gate_up_LXD = nn.Parameter(torch.stack([expert.gate_up.detach() for expert in experts]))
        self.down_LDH = nn.Parameter(torch.stack([expert.down.detach() for expert in experts]))

    def forward(self, x_ND: Tensor, token_R: Tensor, counts_L: Tensor, gates_R: Tensor) -> Tensor:
        ends_L = counts_L.cumsum(0).int()
        gate_RH, up_RH = F.grouped_mm(x_ND[token_R], self.gate_up_LXD.transpose(1, 2), offs=ends_L).chunk(2, -1)
        y_RD = F.grouped_mm(F.silu(gate_RH) * up_RH, self.down_LDH.transpose(1, 2), offs=ends_L)
        return torch.zeros_like(x_ND).index_add(0, token_R, y_RD * gates_R[:, None])


def _experts(device: torch.device, quick: bool) -> dict[str, Any]:
    num_tokens, num_experts, top_k, hidden, inner = (64, 4, 2, 32, 16) if quick else (16_384, 32, 4, 1024, 512)
    torch.manual_seed(SEED)
    experts = [GatedMLP(hidden, inner) for _ in range(num_experts)]
    for param in (param for expert in experts for param in expert.parameters()):
        nn.init.normal_(param, std=0.02)
    experts = [expert.to(device, torch.bfloat16) for expert in experts]
    chosen_NK = torch.rand(num_tokens, num_experts).topk(top_k).indices
    expert_R, order_R = chosen_NK.reshape(-1).sort(stable=True)
    # Each expert's copies are made a multiple of 8, as torchtitan's padding does, by leaving some out.
    keep_R = torch.cat([torch.arange(n) < n // 8 * 8 for n in expert_R.bincount(minlength=num_experts).tolist()])
    token_R = (order_R // top_k)[keep_R].to(device)
    counts_L = expert_R[keep_R].bincount(minlength=num_experts).to(device)
    gates_R = torch.rand(len(token_R)).to(device, torch.bfloat16)
    x_ND = torch.randn(num_tokens, hidden).to(device, torch.bfloat16).requires_grad_()
    titan = _Titan(experts).to(device)
    params = [param for expert in experts for param in expert.parameters()]
    arms = {
        "grouped": (lambda: run_experts(x_ND, token_R, counts_L, experts, gates_R), params),
        "one by one": (lambda: run_experts(x_ND, token_R, counts_L, experts, gates_R, may_group=False), params),
        "torchtitan": (lambda: titan(x_ND, token_R, counts_L, gates_R), list(titan.parameters())),
    }

    def timed(forward: Callable[[], Tensor], weights: list[nn.Parameter]) -> float:
        for tensor in (x_ND, *weights):
            tensor.grad = None
        began_s = finished_s(device)
        forward().square().sum().backward()
        return finished_s(device) - began_s

    turns = {name: lambda arm=arm: timed(*arm) for name, arm in arms.items()}
    alternate(turns, 2)
    seconds = alternate(turns, 2 if quick else 30)
    return {
        "ms": {name: Spread.of([1e3 * s for s in values]) for name, values in seconds.items()},
        "grouped over torchtitan": median_interval(ratios(seconds["grouped"], seconds["torchtitan"])),
    }


# -- copies ----------------------------------------------------------------------------------------------------------


def _copies(device: torch.device, quick: bool) -> list[dict[str, Any]]:
    """By gigabytes of state: seconds of its copy, and of products alone and beside it."""
    side = 64 if quick else 8192
    left, right = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
    copies, found = StreamCopies(device), []

    def products(number: int) -> float:
        began_s = finished_s(device)
        for _ in range(number):
            left @ right
        torch.cuda.current_stream(device).synchronize() if device.type == "cuda" else None
        return time.perf_counter() - began_s

    for gigabytes in (0.001,) if quick else (0.5, 2.0, 8.0):
        state = torch.ones(int(gigabytes * 1e9 / 4), device=device)
        pinned = torch.empty(state.shape, pin_memory=device.type == "cuda")
        seconds: dict[str, list[float]] = {"copy": [], "alone": [], "beside": []}
        for _ in range(2 if quick else 8):
            mark, began_s = copies.mark(), time.perf_counter()
            with copies.after(mark):
                pinned.copy_(state, non_blocking=True)
            seconds["copy"].append(time.perf_counter() - began_s)
            number = max(1, int(1e3 * seconds["copy"][-1]))
            seconds["alone"].append(products(number))
            mark = copies.mark()
            with copies.after(mark):
                pinned.copy_(state, non_blocking=True)
                seconds["beside"].append(products(number))
        found.append({"gigabytes": gigabytes} | {name: Spread.of(values) for name, values in seconds.items()})
        del state, pinned
    return found


if __name__ == "__main__":
    run(__doc__, measure, {"device": "cuda"})

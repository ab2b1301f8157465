"""Compiled parts of layers against eager ones, and what else is fused against its plain form.

    python -m benchmarks.fusion [--quick]

- `training`: forward, backward and AdamW of a dense model and of a mixture of experts, 1,024 tokens at once, 2 threads,
  fp32 and bf16, eager over compiled (`train.torch_compile`).
- `validation`: the loss alone, without gradients.
- `decode`: a token after a prompt of 64, of the mixture of 183 million parameters of `benchmarks.inference`, at batches
  of 1, 8 and 32, in fp32 and int8 (`model generate --compile`).
- `loss`: the product with the output matrix and the cross-entropy, forward and backward, by torch's functions over
  ours, which computes both in chunks (`orchestrator.model.loss`). `optimizer`: torch's AdamW over its fused kernel.
- `warm-up`: seconds of a worker's warm-up: eager; compiled with nothing in torch's cache; compiled with all in it.
  Without a warm-up the first step after a rescale would wait for the difference.

Arms alternate, and ratios are those of a round. The article says 15 to 20 % for the fusion of kernels. About 13
minutes on two cores.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Interval, Result, alternate, median_interval, ratios, run, say
from benchmarks.inference import LARGE, SHORT
from orchestrator.inference.int_model import use_integers
from orchestrator.inference.load_model import in_precision
from orchestrator.model.attention.kv_cache import KVCache
from orchestrator.model.compiled import compile_parts
from orchestrator.model.factory import build_model, single_rank
from orchestrator.model.loss import cross_entropy_sum
from orchestrator.model.transformer import MoELanguageModel
from orchestrator.spec.job import JobSpec
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.quantization import QuantizationSpec

THREADS = 2
SIZES: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 1408,
}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"first_k_dense_replace": 6},
    "mixture": {
        "first_k_dense_replace": 1,
        "n_routed_experts": 16,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": 352,
    },
}
SMALL = {"hidden_size": 64, "intermediate_size": 96}
ROWS, LENGTH = 4, 256
PRECISIONS, QUICK_PRECISIONS = ("fp32", "bf16"), ("fp32",)
BATCHES, QUICK_BATCHES = (1, 8, 32), (1,)
PROMPT, DECODED = 64, 8
ROUNDS, QUICK_ROUNDS = 9, 2
STEPS = 2  # of an arm in a round
WARM_UP = """
import sys, time, torch
from orchestrator.spec.job import JobSpec
from orchestrator.worker.transition.warmup import warm_up
torch.set_num_threads(1)
began_s = time.perf_counter()
warm_up(JobSpec.model_validate_json(sys.argv[1]), 4096, torch.device("cpu"), "127.0.0.1")
spent_s = time.perf_counter() - began_s
import psutil
print(spent_s, psutil.Process().memory_info().rss / 2**20)
"""


def measure(quick: bool) -> Result:
    torch.set_num_threads(THREADS)
    rounds = QUICK_ROUNDS if quick else ROUNDS
    metrics: dict[str, Any] = {"training": {}, "validation": {}, "decode": {}}
    for name in MODELS:
        for precision in QUICK_PRECISIONS if quick else PRECISIONS:
            arms = {kind: _trained(name, precision, kind == "compiled", quick) for kind in ("eager", "compiled")}
            for what, number in (("training", 0), ("validation", 1)):
                metrics[what][f"{name}, {precision}"] = _compared(
                    {kind: arm[number] for kind, arm in arms.items()}, rounds
                )
            say(f"{name}, {precision}: {metrics['training'][f'{name}, {precision}']}")
    spec = LARGE.model_copy(update=SHORT) if quick else LARGE
    for dtype in ("fp32", "int8"):
        models = {kind: _model(spec, dtype, kind == "compiled") for kind in ("eager", "compiled")}
        for batch in QUICK_BATCHES if quick else BATCHES:
            arms_of = {kind: partial(_decoded, model, batch) for kind, model in models.items()}
            metrics["decode"][f"{dtype}, batch {batch}"] = _compared(arms_of, rounds)
            say(f"decode, {dtype}, batch {batch}: {metrics['decode'][f'{dtype}, batch {batch}']}")
    metrics["loss"] = _compared(_losses(quick), rounds)
    metrics["optimizer"] = _compared(_optimizers(quick), rounds)
    metrics["warm-up"] = _warm_ups(quick)
    settings = {"quick": quick, "rows": ROWS, "length": LENGTH, "threads": THREADS, "rounds": rounds}
    return Result("fusion", 0, settings, rounds, metrics)


def _compared(arms: dict[str, Callable[[], float]], rounds: int) -> dict[str, Interval | float]:
    """Milliseconds of both arms, and the first over the second."""
    for arm in arms.values():
        arm()
    measured = alternate(arms, rounds)
    (first, plain), (second, fused) = measured.items()
    interval = median_interval(ratios(plain, fused))
    return {
        f"{first} over {second}": interval,
        f"{first} ms": 1e3 * median_interval(plain).median,
        f"{second} ms": 1e3 * median_interval(fused).median,
    }


def _timed(function: Callable[[], object], steps: int = STEPS) -> float:
    began_s = time.perf_counter()
    for _ in range(steps):
        function()
    return (time.perf_counter() - began_s) / steps


def _model(spec: ModelSpec, dtype: str, is_compiled: bool) -> MoELanguageModel:
    assert spec.vocab_size is not None
    model = build_model(spec, spec.vocab_size, single_rank(spec))
    assert isinstance(model, MoELanguageModel)
    model.init_weights(0)
    if dtype == "int8":
        use_integers(model, QuantizationSpec.model_validate({}))
    else:
        in_precision(model, dtype)
    if is_compiled:
        compile_parts(model)
    return model


def _trained(name: str, precision: str, is_compiled: bool, quick: bool) -> tuple[Callable[[], float], ...]:
    """Seconds of a step, and of a validation of as many tokens."""
    sizes = SIZES | MODELS[name] | (SMALL if quick else {})
    model = _model(ModelSpec.model_validate(sizes), precision, is_compiled)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    draws = torch.Generator().manual_seed(0)
    inputs_BT, targets_BT = (torch.randint(0, SIZES["vocab_size"], (ROWS, LENGTH), generator=draws) for _ in range(2))

    def step() -> None:
        optimizer.zero_grad()
        (model(inputs_BT, targets_BT) / targets_BT.numel()).backward()
        optimizer.step()

    @torch.no_grad()
    def validate() -> None:
        model(inputs_BT, targets_BT)

    return partial(_timed, step), partial(_timed, validate)


@torch.no_grad()
def _decoded(model: MoELanguageModel, batch: int) -> float:
    """Seconds of a token."""
    ids_BT = torch.randint(0, len(model.head), (batch, PROMPT), generator=torch.Generator().manual_seed(0))
    cache = KVCache(model.spec, batch, PROMPT + DECODED, model.head)
    model.extend(ids_BT, cache)
    return _timed(lambda: model.extend(ids_BT[:, :1], cache), DECODED)


def _losses(quick: bool) -> dict[str, Callable[[], float]]:
    tokens, vocab_size = (64, 256) if quick else (ROWS * LENGTH, SIZES["vocab_size"])
    draws = torch.Generator().manual_seed(0)
    x_ND = torch.randn(tokens, SIZES["hidden_size"], generator=draws, requires_grad=True)
    # Small, as a model's: of larger logits most probabilities are subnormal, and products take ten times as long.
    head_VD = (0.02 * torch.randn(vocab_size, SIZES["hidden_size"], generator=draws)).requires_grad_()
    targets_N = torch.randint(0, vocab_size, (tokens,), generator=draws)

    def plain() -> Tensor:
        return F.cross_entropy(F.linear(x_ND, head_VD), targets_N, reduction="sum")

    def arm(loss: Callable[[], Tensor]) -> float:
        return _timed(lambda: torch.autograd.grad(loss(), (x_ND, head_VD)))

    return {"plain": partial(arm, plain), "fused": partial(arm, lambda: cross_entropy_sum(x_ND, head_VD, targets_N))}


def _optimizers(quick: bool) -> dict[str, Callable[[], float]]:
    """Of one flat piece of weights, as a rank has it."""
    arms: dict[str, Callable[[], float]] = {}
    for name in ("plain", "fused"):
        weights = torch.zeros(1 << 12 if quick else 1 << 24, requires_grad=True)
        weights.grad = torch.ones_like(weights)
        arms[name] = partial(_timed, torch.optim.AdamW([weights], lr=1e-3, fused=name == "fused").step)
    return arms


def _warm_ups(quick: bool) -> dict[str, dict[str, float]]:
    found = {}
    with tempfile.TemporaryDirectory(prefix="fusion-") as cache:
        for name in ("eager", "compiled, nothing cached", "compiled, cached"):
            sizes = SIZES | MODELS["mixture"] | (SMALL if quick else {})
            train = {"torch_compile": name != "eager", "micro_batch_size": ROWS, "sequence_length": LENGTH}
            job = JobSpec.model_validate({"name": "fusion", "model": sizes, "train": train})
            done = subprocess.run(
                [sys.executable, "-c", WARM_UP, job.model_dump_json()],
                env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "DS_ACCELERATOR": "cpu"},
                check=True,
                capture_output=True,
                text=True,
            )
            seconds, megabytes = map(float, done.stdout.split()[-2:])
            found[name] = {"s": seconds, "MiB": megabytes}
            say(f"warm-up, {name}: {json.dumps(found[name])}")
    return found


if __name__ == "__main__":
    run(__doc__, measure)

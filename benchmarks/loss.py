"""What the loss over a large vocabulary costs, and what recomputing activations saves.

    python -m benchmarks.loss [--quick]

1. The chunked cross-entropy (`orchestrator.model.loss`) against the plain one, `F.cross_entropy` of all logits: time of
   forward and backward, taken in turns in one process of 2 threads, and the memory that each needs, in a process each.
2. A model of growing depth with `gradient_checkpointing: sqrt`, and with none: memory of forward and backward, in a
   process each.
   The slope is that of a least-squares line through log(bytes) over log(layers).

Memory is how far the resident set of a fresh process rose above what it held before: parameters, inputs and gradients.
Linux only, as it is read from /proc.
"""

import math
import multiprocessing
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import (
    Bar,
    Result,
    Spread,
    alternate,
    at_least,
    at_most,
    equals,
    median_interval,
    ratios,
    run,
    say,
)
from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.model.loss import IGNORED, cross_entropy_sum
from orchestrator.model.moe.expert_parallel import ExpertParallelContext
from orchestrator.model.transformer import MoELanguageModel
from orchestrator.spec.model import ModelSpec

THREADS = 2
SIZES = {"tokens": 4096, "hidden_size": 256, "vocab_size": 32_768}
QUICK_SIZES = {"tokens": 256, "hidden_size": 32, "vocab_size": 4096}
DEPTHS = (4, 8, 16, 32, 64)
QUICK_DEPTHS = (4, 9)
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(x_ND: Tensor, head_VD: Tensor, targets_N: Tensor) -> Tensor:
    logits_NV = F.linear(x_ND, head_VD).float()
    return F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORED, reduction="sum")


LOSSES: dict[str, Loss] = {"chunked": cross_entropy_sum, "plain": plain}


def measure(quick: bool) -> Result:
    torch.set_num_threads(THREADS)
    sizes, depths, rounds = (QUICK_SIZES, QUICK_DEPTHS, 3) if quick else (SIZES, DEPTHS, 15)
    case = _case(**sizes)
    arms = {name: (lambda loss=loss: 1.0 / _seconds(loss, case)) for name, loss in LOSSES.items()}
    for arm in arms.values():
        arm()
    speeds = alternate(arms, rounds)  # type: ignore[arg-type]
    speed = median_interval(ratios(speeds["chunked"], speeds["plain"]))
    memory = {name: in_a_process(loss_bytes, name, sizes) for name in LOSSES}
    say(f"speed {speed.median:.3f} [{speed.low:.3f}, {speed.high:.3f}], bytes {memory}")
    activations = {
        recompute: [in_a_process(activation_bytes, layers, recompute, quick) for layers in depths]
        for recompute in ("sqrt", "none")
    }
    say(f"bytes over {depths} layers: {activations}")
    slopes = {recompute: log_slope(depths, found) for recompute, found in activations.items()}
    metrics: dict[str, Any] = {
        "speed": speed,
        "chunked_s": Spread.of([1 / value for value in speeds["chunked"]]),
        "plain_s": Spread.of([1 / value for value in speeds["plain"]]),
        "memory_bytes": memory,
        "memory_share": memory["chunked"] / memory["plain"],
        "activation_bytes": activations,
        "sqrt_slope": slopes["sqrt"],
        "none_slope": slopes["none"],
    }
    return Result(
        name="loss",
        seed=0,
        settings={"quick": quick, "threads": THREADS, **sizes, "depths": depths},
        rounds=rounds,
        metrics=metrics,
        baselines={"plain": "F.cross_entropy of all logits"},
        bars=bars_of(metrics, _same_gradients(case)),
    )


def bars_of(metrics: dict[str, Any], same: bool) -> tuple[Bar, ...]:
    return (
        at_most("memory_share", 0.25, metrics["memory_share"]),
        at_least("speed", 0.95, metrics["speed"]),
        at_most("sqrt_slope", 0.6, metrics["sqrt_slope"]),
        equals("gradients_equal", True, same),
    )


def in_a_process(function: Callable[..., int], *args: Any) -> int:
    """What the function returns in a fresh process, whose memory nobody has used before."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def loss_bytes(name: str, sizes: dict[str, int]) -> int:
    torch.set_num_threads(THREADS)
    LOSSES[name](*_case(8, sizes["hidden_size"], 512)).backward()  # what the first call of its kind needs
    x_ND, head_VD, targets_N = _case(**sizes)
    x_ND.grad, head_VD.grad = torch.zeros_like(x_ND), torch.zeros_like(head_VD)
    before = _peak_from_now()
    LOSSES[name](x_ND, head_VD, targets_N).backward()
    return _peak() - before


def activation_bytes(num_layers: int, recompute: str, quick: bool) -> int:
    torch.set_num_threads(THREADS)
    spec = ModelSpec.model_validate(
        {
            "hidden_size": 32 if quick else 64,
            "num_hidden_layers": num_layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 128,
            "n_routed_experts": 4,
            "moe_intermediate_size": 64,
            "gradient_checkpointing": recompute,
        }
    )
    model = MoELanguageModel(spec, 256, ExpertParallelContext(ExpertPlacement.balanced(4, 1), 0, None))
    model.init_weights(0)
    rows, length = (2, 64) if quick else (8, 512)
    tokens_BU = torch.randint(0, 256, (rows, length + 1))
    model(tokens_BU[:1, :8], tokens_BU[:1, 1:9].contiguous()).backward()
    before = _peak_from_now()
    model(tokens_BU[:, :-1], tokens_BU[:, 1:].contiguous()).backward()
    return max(_peak() - before, 1)


def log_slope(xs: Sequence[int], ys: Sequence[int]) -> float:
    """Of the least-squares line through the logarithms."""
    points = [(math.log(x), math.log(y)) for x, y in zip(xs, ys, strict=True)]
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def _case(tokens: int, hidden_size: int, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(tokens, hidden_size, generator=generator).requires_grad_()
    head_VD = (torch.randn(vocab_size, hidden_size, generator=generator) * 0.02).requires_grad_()
    return x_ND, head_VD, torch.randint(0, vocab_size, (tokens,), generator=generator)


def _seconds(loss: Loss, case: tuple[Tensor, Tensor, Tensor]) -> float:
    case[0].grad = case[1].grad = None
    started = time.perf_counter()
    loss(*case).backward()
    return time.perf_counter() - started


def _same_gradients(case: tuple[Tensor, Tensor, Tensor]) -> bool:
    found = []
    for loss in LOSSES.values():
        _seconds(loss, case)
        found.append((case[0].grad, case[1].grad))
    return all(
        a is not None and b is not None and torch.allclose(a, b, rtol=1e-4, atol=1e-6)
        for a, b in zip(*found, strict=True)
    )


def _peak_from_now() -> int:
    """Bytes resident now; `_peak` then tells the most since. Not getrusage: its figure is inherited from the parent."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    run(__doc__, measure)

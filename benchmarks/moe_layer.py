"""Our MoE layer against DeepSpeed's, against transformers', and against the matrix products alone.

    python -m benchmarks.moe_layer [--quick]

Forward and backward of one layer, router included, 256, 1,024 and 4,096 tokens, one process of 2 threads: 16 and 64
experts, top-2 and top-8, fp32 and bf16, balanced and skewed routing. SwiGLU experts, no shared ones; hidden size 256,
inner size 512.

- Balanced: random tokens and a random router. Skewed: tokens and router of a small model that was trained on Python's
  library without anything that balances; every arm gets the same tokens and routes. Fewer tokens are every fourth or
  sixteenth of these.
- `deepspeed`: `deepspeed.moe.layer.MoE` with capacity 1.25, which drops what is more than that
  (`deepspeed_dropped_share`); ours drops nothing.
- `transformers`: the block of its Qwen3 MoE model, with the experts' implementation `grouped_mm`. It drops nothing.
- The limit: SwiGLU on tokens that lie sorted by expert already, no router, nothing gathered or added up: the faster of
  `F.grouped_mm` over the same counts and `torch.bmm` over equal ones.
"""

import math
import multiprocessing
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from deepspeed.moe.layer import MoE
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from benchmarks.harness import (
    Bar,
    Interval,
    Result,
    Spread,
    alternate,
    at_least,
    median_interval,
    ratios,
    run,
    say,
)
from benchmarks.support.environment import environment, worker_environment
from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.model.moe.expert_parallel import ExpertParallelContext
from orchestrator.model.moe.experts import GatedMLP
from orchestrator.model.moe.layer import MoELayer
from orchestrator.model.transformer import MoELanguageModel
from orchestrator.spec.model import ModelSpec

THREADS, SEED = 2, 0
CAPACITY_FACTOR = 1.25
ROUNDS, WARM_UPS = 12, 1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LIMITS = ("grouped_mm", "bmm")
OTHERS = ("deepspeed", "transformers")
TOKENS = (256, 1024, 4096)


@dataclass(frozen=True)
class Sizes:
    """Of a layer, and of the training that makes the skew."""

    tokens: tuple[int, ...] = TOKENS
    hidden_size: int = 256
    inner_size: int = 512
    steps: int = 80


@dataclass(frozen=True)
class Case:
    tokens: int
    experts: int
    top_k: int
    dtype: str
    routing: str


@dataclass(frozen=True)
class Routed:
    """Tokens (N, D) and the router's matrix (E, D), fp32."""

    x_ND: Tensor
    router_ED: Tensor

    def sample(self, tokens: int) -> "Routed":
        """So many of the tokens, at equal distances."""
        return Routed(self.x_ND[:: len(self.x_ND) // tokens].contiguous(), self.router_ED)


def measure(quick: bool) -> Result:
    """In a process with the product's malloc settings, which serve all arms."""
    variables = worker_environment(THREADS, keep_memory=True)
    with environment(variables), multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure, (quick,))


def _measure(quick: bool) -> Result:
    torch.set_num_threads(THREADS)
    _lone_process_group()
    sizes = Sizes(tokens=(64, 256), hidden_size=32, inner_size=32, steps=3) if quick else Sizes()
    shapes = ((4, 2),) if quick else tuple((e, k) for e in (16, 64) for k in (2, 8))
    rounds = 2 if quick else ROUNDS
    found: list[dict[str, Any]] = []
    timed: list[tuple[Case, dict[str, list[float]]]] = []
    for experts, top_k in shapes:
        routed = {"balanced": fresh(experts, sizes), "skewed": trained(experts, top_k, sizes)}
        for tokens, dtype, (routing, all_tokens) in product(sizes.tokens, DTYPES, routed.items()):
            case = Case(tokens, experts, top_k, dtype, routing)
            seconds, about = compare(case, all_tokens.sample(tokens), sizes, rounds)
            timed.append((case, seconds))
            found.append(asdict(case) | about | {"ms": {n: Spread.of(_in_ms(s)) for n, s in seconds.items()}})
            say(f"{case}: { ({n: round(median(s) * 1e3, 1) for n, s in seconds.items()}) }")
    for entry, (_, seconds) in zip(found, timed, strict=True):
        for other in OTHERS:
            entry[f"speedup_vs_{other}"] = median_interval(ratios(seconds[other], seconds["ours"]))
    metrics: dict[str, Any] = {"cases": found}
    for tokens in sizes.tokens:
        for other in OTHERS:
            by_case = [ratios(s[other], s["ours"]) for case, s in timed if case.tokens == tokens]
            metrics[f"speedup_vs_{other}_{tokens}"] = overall(by_case)
        for dtype in DTYPES:
            shares = [ratios(s[limit_of(s)], s["ours"]) for c, s in timed if (c.tokens, c.dtype) == (tokens, dtype)]
            metrics[f"fraction_of_limit_{dtype}_{tokens}"] = overall(shares)
    return Result(
        name="moe_layer",
        seed=SEED,
        settings={"quick": quick, "threads": THREADS, "capacity_factor": CAPACITY_FACTOR, **asdict(sizes)},
        rounds=rounds,
        metrics=metrics,
        baselines={
            "deepspeed": "deepspeed.moe.layer.MoE, capacity 1.25",
            "transformers": f"Qwen3MoeSparseMoeBlock of transformers {transformers.__version__}, grouped_mm",
            "limit": "min(grouped_mm, bmm)",
        },
        bars=bars_of(metrics, sizes.tokens),
    )


def bars_of(metrics: dict[str, Any], tokens: Sequence[int]) -> tuple[Bar, ...]:
    most = max(tokens)
    return (
        at_least("speedup_vs_deepspeed", 1.6, metrics[f"speedup_vs_deepspeed_{most}"]),
        *(at_least(f"slowest_vs_{other}", 1.0, slowest(metrics["cases"], other)) for other in OTHERS),
        *(at_least(f"fraction_of_limit_fp32_{n}", 0.85, metrics[f"fraction_of_limit_fp32_{n}"]) for n in tokens),
        at_least("fraction_of_limit_bf16", 0.65, metrics[f"fraction_of_limit_bf16_{most}"]),
    )


def slowest(cases: Sequence[dict[str, Any]], other: str) -> Interval:
    """The least of the speed-ups over another layer."""
    intervals: list[Interval] = [case[f"speedup_vs_{other}"] for case in cases]
    return min(intervals, key=lambda interval: interval.low)


def overall(by_case: Sequence[Sequence[float]]) -> Interval:
    """The geometric mean over the cases, round by round."""
    return median_interval([geometric_mean(values) for values in zip(*by_case, strict=True)])


def limit_of(seconds: dict[str, list[float]]) -> str:
    return min(LIMITS, key=lambda name: median(seconds[name]))


def compare(case: Case, routed: Routed, sizes: Sizes, rounds: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of every arm, round by round, and what the routes are like."""
    dtype = DTYPES[case.dtype]
    generator = torch.Generator().manual_seed(SEED)
    experts = [GatedMLP(sizes.hidden_size, sizes.inner_size).to(dtype) for _ in range(case.experts)]
    with torch.no_grad():
        for expert in experts:
            for param in expert.parameters():
                param.copy_(torch.randn(param.shape, generator=generator) * 0.02)
    ours = _our_layer(case, routed, experts, sizes)
    arms = {
        "ours": _timed(ours, ours, routed.x_ND.to(dtype)),
        "deepspeed": _timed(*_deepspeed_layer(case, routed, experts, sizes), routed.x_ND.to(dtype)),
        "transformers": _timed(*_transformers_layer(case, routed, experts, sizes), routed.x_ND.to(dtype)),
    }
    for arm in arms.values():
        arm()
    counts_E = ours.last_counts_E
    x_RD = torch.randn(case.tokens * case.top_k, sizes.hidden_size, generator=generator).to(dtype)
    for name in LIMITS:
        module = _Products(name, experts, counts_E)
        arms[name] = _timed(module, module, x_RD)
    for _ in range(WARM_UPS):
        for arm in arms.values():
            arm()
    capacity = math.ceil(case.tokens / case.experts * CAPACITY_FACTOR * case.top_k)
    about = {
        "max_over_mean_load": float(counts_E.max()) * case.experts / float(counts_E.sum()),
        "deepspeed_dropped_share": float((counts_E - capacity).clamp_min(0).sum()) / float(counts_E.sum()),
    }
    return alternate(arms, rounds), about


# -- arms ------------------------------------------------------------------------------------------------------------


def _timed(module: torch.nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], float]:
    """Seconds of forward and backward. Gradients are made anew each time, in every arm."""
    x = x.detach().clone().requires_grad_()
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(SEED + 1)).to(x.dtype)
    params = list(module.parameters())

    def once() -> float:
        for tensor in (x, *params):
            tensor.grad = None
        started_s = time.perf_counter()
        forward(x).backward(dy)
        return time.perf_counter() - started_s

    return once


def _our_layer(case: Case, routed: Routed, experts: list[GatedMLP], sizes: Sizes) -> MoELayer:
    layer = MoELayer(_spec(case.experts, case.top_k, sizes), _home(case.experts)).to(DTYPES[case.dtype])
    with torch.no_grad():
        layer.router.scorer.weight.copy_(routed.router_ED)
        for ours, expert in zip(layer.experts.values(), experts, strict=True):
            ours.load_state_dict(expert.state_dict())
    return layer


def _deepspeed_layer(
    case: Case, routed: Routed, experts: list[GatedMLP], sizes: Sizes
) -> tuple[torch.nn.Module, Callable[[Tensor], Tensor]]:
    layer = MoE(
        hidden_size=sizes.hidden_size,
        expert=experts[0],
        num_experts=case.experts,
        k=case.top_k,
        capacity_factor=CAPACITY_FACTOR,
        use_rts=False,
        top2_2nd_expert_sampling=False,
    )
    layer.set_deepspeed_parallelism()
    with torch.no_grad():
        layer.deepspeed_moe.gate.wg.weight.copy_(routed.router_ED)
        for theirs, expert in zip(layer.deepspeed_moe.experts.deepspeed_experts, experts, strict=True):
            theirs.load_state_dict(expert.state_dict())

    def forward(x_ND: Tensor) -> Tensor:
        y_ND: Tensor = layer(x_ND)[0]
        return y_ND

    return layer, forward


def _transformers_layer(
    case: Case, routed: Routed, experts: list[GatedMLP], sizes: Sizes
) -> tuple[torch.nn.Module, Callable[[Tensor], Tensor]]:
    config = Qwen3MoeConfig(
        hidden_size=sizes.hidden_size,
        moe_intermediate_size=sizes.inner_size,
        num_experts=case.experts,
        num_experts_per_tok=case.top_k,
        norm_topk_prob=True,
        experts_implementation="grouped_mm",
    )
    layer = Qwen3MoeSparseMoeBlock(config).to(DTYPES[case.dtype])
    with torch.no_grad():
        layer.gate.weight.copy_(routed.router_ED)
        layer.experts.gate_up_proj.copy_(torch.stack([expert.gate_up for expert in experts]))
        layer.experts.down_proj.copy_(torch.stack([expert.down for expert in experts]))

    def forward(x_ND: Tensor) -> Tensor:
        y_1ND: Tensor = layer(x_ND[None])
        return y_1ND[0]

    return layer, forward


class _Products(torch.nn.Module):
    """SwiGLU on sorted tokens (R, D): stacked experts, `grouped_mm` over their counts or `bmm` over equal ones."""

    def __init__(self, product: str, experts: list[GatedMLP], counts_E: Tensor) -> None:
        super().__init__()
        self.gate_up_EDH = torch.nn.Parameter(torch.stack([e.gate_up.detach() for e in experts]))
        self.down_EHD = torch.nn.Parameter(torch.stack([e.down.detach() for e in experts]))
        self._product = product
        self._ends_E = counts_E.cumsum(0).to(torch.int32)

    def forward(self, x_RD: Tensor) -> Tensor:
        if self._product == "bmm":
            x_RD = x_RD.view(len(self.gate_up_EDH), -1, x_RD.shape[-1])
        gate, up = self._multiplied(x_RD, self.gate_up_EDH).chunk(2, dim=-1)
        return self._multiplied(F.silu(gate) * up, self.down_EHD).reshape(-1, self.down_EHD.shape[1])

    def _multiplied(self, x: Tensor, weights: Tensor) -> Tensor:
        if self._product == "bmm":
            return torch.bmm(x, weights.transpose(1, 2))
        return F.grouped_mm(x, weights.transpose(1, 2), offs=self._ends_E)


# -- routes ----------------------------------------------------------------------------------------------------------


def fresh(experts: int, sizes: Sizes) -> Routed:
    """Random tokens and a random router: nearly balanced."""
    generator = torch.Generator().manual_seed(SEED)
    x_ND = torch.randn(max(sizes.tokens), sizes.hidden_size, generator=generator)
    return Routed(x_ND, torch.randn(experts, sizes.hidden_size, generator=generator) * 0.02)


def trained(experts: int, top_k: int, sizes: Sizes) -> Routed:
    """What the last layer of a model sees, and its router, after some steps on real text with nothing that balances."""
    model = MoELanguageModel(_spec(experts, top_k, sizes), 256, _home(experts))
    model.init_weights(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for step in range(sizes.steps):
        inputs_BT, targets_BT = _text(step, rows=8)
        optimizer.zero_grad()
        (model(inputs_BT, targets_BT) / targets_BT.numel()).backward()
        optimizer.step()
    layer, seen = model.moe_layers[-1], []
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().flatten(0, 1)))
    with torch.no_grad():
        model(*_text(sizes.steps, rows=-(-max(sizes.tokens) // ROW)))
    return Routed(seen[0][: max(sizes.tokens)].clone(), layer.router.scorer.weight.detach().clone())


ROW = 128


def _text(step: int, rows: int) -> tuple[Tensor, Tensor]:
    """Bytes of some modules of Python's library, and the byte after each."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = b"".join((folder / f"{name}.py").read_bytes() for name in ("argparse", "tarfile", "typing", "inspect"))
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(0, len(text) - ROW - 1, (rows,), generator=generator).tolist()
    tokens = torch.tensor([list(text[start : start + ROW + 1]) for start in starts])
    return tokens[:, :-1], tokens[:, 1:].contiguous()


def _spec(experts: int, top_k: int, sizes: Sizes) -> ModelSpec:
    return ModelSpec(
        hidden_size=sizes.hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=sizes.inner_size,
        n_routed_experts=experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=sizes.inner_size,
        n_shared_experts=0,
        bias_update_speed=0.0,
    )


def _home(experts: int) -> ExpertParallelContext:
    return ExpertParallelContext(ExpertPlacement.balanced(experts, 1), 0, None)


def _lone_process_group() -> None:
    """DeepSpeed's layer wants one even in a world of one."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled for 46 s
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)


def _in_ms(seconds: Sequence[float]) -> list[float]:
    return [1e3 * s for s in seconds]


if __name__ == "__main__":
    run(__doc__, measure)

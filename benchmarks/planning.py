"""How long a transfer plan takes at the size of a large cluster: 1,024 ranks, 64 experts, 60 layers.

    python -m benchmarks.planning [--quick]

Layouts and plan are pure and made by every worker for itself, in the background, before a fence. Each round plans the
loss of a few ranks and the growth back to the full world. Names are `shrink` and `grow`.
"""

import time
from collections.abc import Callable
from typing import Any

from benchmarks.harness import Result, Spread, alternate, at_most, median_interval, run
from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.inventory import inventory
from orchestrator.elastic.state_layout import StateLayout, training_layout
from orchestrator.elastic.state_spec import ParamSpec
from orchestrator.elastic.transfer_plan import TransferPlan
from orchestrator.elastic.world import World
from orchestrator.spec.job import JobSpec
from orchestrator.spec.train import TrainSpec

WANTED_S = 2.0
JOB = JobSpec(name="planning", train=TrainSpec(precision="bf16"))
HIDDEN_SIZE, EXPERT_SIZE, VOCAB_SIZE = 2048, 1024, 65_536
SIZES = {"ranks": 1024, "fewer_ranks": 1000, "experts": 64, "layers": 60}
QUICK_SIZES = {"ranks": 16, "fewer_ranks": 13, "experts": 8, "layers": 4}


def measure(quick: bool) -> Result:
    sizes, rounds = (QUICK_SIZES, 2) if quick else (SIZES, 10)
    params = parameters(sizes["layers"], sizes["experts"])
    large = World(0, tuple(f"w{rank}" for rank in range(sizes["ranks"])))
    small = World(1, large.members[: sizes["fewer_ranks"]])
    placed = ExpertPlacement.balanced(sizes["experts"], large.size)
    placed_small = ExpertPlacement.rebalanced(placed, large, small)
    full = layout(params, placed, large)
    fewer = layout(params, placed_small, small)
    plans: dict[str, TransferPlan] = {}

    def planned(name: str, old: StateLayout, new: StateLayout) -> Callable[[], float]:
        def plan() -> float:
            began_s = time.perf_counter()
            plans[name] = TransferPlan.between(old, new)
            return time.perf_counter() - began_s

        return plan

    spent_s = alternate({"shrink": planned("shrink", full, fewer), "grow": planned("grow", fewer, full)}, rounds)
    layout_s = alternate({"layout": lambda: seconds(lambda: layout(params, placed, large))}, 3)["layout"]
    metrics: dict[str, Any] = {
        "params": sum(spec.numel for spec in params),
        "tensors": len(full.names),
        "layout_s": Spread.of(layout_s),
    }
    for name, plan in plans.items():
        metrics[name] = {"plan_s": Spread.of(spent_s[name]), "moves": len(plan.moves), "moved_bytes": plan.moved_bytes}
    slowest = median_interval([max(pair) for pair in zip(*spent_s.values(), strict=True)])
    return Result(
        name="planning",
        seed=0,
        settings={"quick": quick} | sizes,
        rounds=rounds,
        metrics=metrics,
        bars=(at_most("plan_s", WANTED_S, slowest),),
    )


def layout(params: list[ParamSpec], placement: ExpertPlacement, world: World) -> StateLayout:
    return training_layout(inventory(params, JOB, []), placement, world, JOB.communication)


def seconds(work: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s


def parameters(num_layers: int, num_experts: int) -> list[ParamSpec]:
    """Those of a model of our kind, all layers with experts."""
    params = [ParamSpec(name, (VOCAB_SIZE, HIDDEN_SIZE), None) for name in ("embedding", "head")]
    for layer in range(num_layers):
        for name in ("query", "key", "value", "output"):
            params.append(ParamSpec(f"layers.{layer}.attention.{name}", (HIDDEN_SIZE, HIDDEN_SIZE), None))
        params.append(ParamSpec(f"layers.{layer}.norm", (HIDDEN_SIZE,), None))
        params.append(ParamSpec(f"layers.{layer}.router", (num_experts, HIDDEN_SIZE), None))
        for expert in range(num_experts):
            stem = f"layers.{layer}.experts.{expert}"
            params.append(ParamSpec(f"{stem}.gate_up", (2 * EXPERT_SIZE, HIDDEN_SIZE), expert))
            params.append(ParamSpec(f"{stem}.down", (EXPERT_SIZE, HIDDEN_SIZE), expert))
    return params


if __name__ == "__main__":
    run(__doc__, measure)

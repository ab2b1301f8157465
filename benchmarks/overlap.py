"""What summing gradients adds to a step on slow links: one after the other, overlapped, and overlapped and compressed.

    python -m benchmarks.overlap [--quick]

Four hosts, made of network namespaces (Linux, root), with a rank of the product's engine on each, and links that let
150 Mbit/s through; then the same without a limit. Every rank has an engine for each arm, in one process: `free`, whose
gradients go nowhere (each rank takes its own for the sum), `blocking`, whose buckets leave after the backward pass,
`overlapped`, whose buckets leave during it, `compressed`, which sends them in int4 besides, and `topk`, which sends the
largest. They take turns.

- `exposed`: one less the step of `free` over that of the arm: the part of a step that gradients are waited for, or
  worked on. Tokens and weights travel in all arms alike.
- `speedup`: the step of `blocking` over that of the arm.
"""

from typing import Any

from benchmarks.harness import Interval, Result, Spread, at_least, at_most, median_interval, ratios, run, say
from benchmarks.support.reduction_arms import FREE, LENGTH, ROWS, Settings, steps_of_arms
from tests.support.host_ranks import HostRanks
from tests.support.hosts import Hosts

RANKS, MBIT = 4, 150.0
ROUNDS, QUICK_ROUNDS = 20, 1
MODEL: dict[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 1024,
    "first_k_dense_replace": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 1,
    "n_shared_experts": 2,
    "moe_intermediate_size": 128,
}
QUICK_MODEL = MODEL | {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 3}
BUCKET_MB, QUICK_BUCKET_MB = 4.0, 0.1
ARMS: dict[str, dict[str, Any]] = {
    FREE: {},
    "blocking": {"overlap": False},
    "overlapped": {},
    "compressed": {"compression": "int4"},
    "topk": {"compression": {"scheme": "topk", "share": 0.05}},
}


def measure(quick: bool) -> Result:
    if (why := Hosts.available()) is not None:
        raise SystemExit(f"this benchmark needs hosts of its own: {why}")
    full, small = Settings(ARMS, MODEL, BUCKET_MB, ROUNDS), Settings(ARMS, QUICK_MODEL, QUICK_BUCKET_MB, QUICK_ROUNDS)
    settings = small if quick else full
    found = {}
    with Hosts(RANKS) as hosts, HostRanks(hosts) as ranks:
        found["unlimited"] = _figures(ranks.run(steps_of_arms, settings, timeout_s=1200.0)[0][0], "unlimited")
        for index in range(RANKS):
            hosts.limit(index, MBIT)
        found["limited"] = _figures(ranks.run(steps_of_arms, settings, timeout_s=1200.0)[0][0], "limited")
    limited = found["limited"]
    return Result(
        name="overlap",
        seed=0,
        settings={
            "quick": quick,
            "ranks": RANKS,
            "mbit": MBIT,
            "model": settings.model,
            "rows": ROWS,
            "sequence_length": LENGTH,
            "bucket_mb": settings.bucket_mb,
            "arms": ARMS,
        },
        rounds=settings.rounds,
        metrics=found,
        bars=(
            at_least("exposed_blocking", 0.30, limited["exposed"]["blocking"]),
            at_most("exposed_compressed", 0.10, limited["exposed"]["compressed"]),
            at_least("speedup_compressed", 1.4, limited["speedup"]["compressed"]),
        ),
    )


def _figures(seconds: dict[str, list[float]], name: str) -> dict[str, Any]:
    exposed: dict[str, Interval] = {}
    speedup: dict[str, Interval] = {}
    for arm in list(ARMS)[1:]:
        exposed[arm] = median_interval([1 - ratio for ratio in ratios(seconds["free"], seconds[arm])])
        speedup[arm] = median_interval(ratios(seconds["blocking"], seconds[arm]))
        say(f"{name}: {arm} exposed {exposed[arm]}, speedup {speedup[arm]}")
    return {
        "step_s": {arm: Spread.of(values) for arm, values in seconds.items()},
        "exposed": exposed,
        "speedup": speedup,
    }


if __name__ == "__main__":
    run(__doc__, measure)

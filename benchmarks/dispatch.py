"""What tokens in fewer bytes save on their way to experts and back, and what that costs in loss.

    python -m benchmarks.dispatch [--quick]

An arm is a value of `communication.tokens`. Four of the product's own workers train a small model on Python's library,
three seeds of each arm with the same tokens, steps and tuning. Then four hosts, made of network namespaces (Linux,
root), with links that let 150 Mbit/s through, do steps of a larger model, all arms in turn in the same processes.

- `bytes`: of tokens, results and the gradients of both, over those of `native`, as the ledger counts them.
- `loss_gap`: an arm's last validation loss over that of `native` with the same seed, less one.
- `speedup`: the step of `native` over that of the arm.
"""

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.compression import QUICK_STEPS, STEPS, WORKERS, Trained, job_of, train
from benchmarks.harness import Result, Spread, at_most, median_interval, ratios, run, say
from benchmarks.overlap import BUCKET_MB, MBIT, MODEL, QUICK_BUCKET_MB, QUICK_MODEL, RANKS
from benchmarks.support.data import data_spec, stores_dir
from benchmarks.support.environment import environment, worker_environment
from benchmarks.support.reduction_arms import Settings, steps_of_arms
from orchestrator.data.prepare.job_store import prepare
from tests.support.host_ranks import HostRanks
from tests.support.hosts import Hosts

NATIVE, BEST = "native", "int8"
ARMS: dict[str, dict[str, Any]] = {wire: {"tokens": wire} for wire in (NATIVE, "bf16", BEST)}
SEEDS, QUICK_SEEDS = 3, 1
ROUNDS, QUICK_ROUNDS = 8, 1


def measure(quick: bool) -> Result:
    if (why := Hosts.available()) is not None:
        raise SystemExit(f"this benchmark needs hosts of its own: {why}")
    seeds, steps = (QUICK_SEEDS, QUICK_STEPS) if quick else (SEEDS, STEPS)
    losses = _losses(quick, seeds, steps)
    full, small = Settings(ARMS, MODEL, BUCKET_MB, ROUNDS), Settings(ARMS, QUICK_MODEL, QUICK_BUCKET_MB, QUICK_ROUNDS)
    with Hosts(RANKS) as hosts, HostRanks(hosts) as ranks:
        for index in range(RANKS):
            hosts.limit(index, MBIT)
        seconds, num_bytes = ranks.run(steps_of_arms, small if quick else full, timeout_s=1200.0)[0]
    table = {
        arm: {
            "bytes": num_bytes[arm] / num_bytes[NATIVE],
            "loss_gap": median_interval([a / b - 1 for a, b in zip(losses[arm], losses[NATIVE], strict=True)]),
            "step_s": Spread.of(seconds[arm]),
            "speedup": median_interval(ratios(seconds[NATIVE], seconds[arm])),
        }
        for arm in ARMS
    }
    return Result(
        name="dispatch",
        seed=0,
        settings={"quick": quick, "workers": WORKERS, "steps": steps, "mbit": MBIT, "model": MODEL},
        rounds=seeds,
        metrics={"arms": table, "losses": losses},
        bars=(
            at_most("bytes_int8", 0.3, table[BEST]["bytes"]),
            at_most("loss_gap_int8", 0.005, table[BEST]["loss_gap"]),
        ),
    )


def _losses(quick: bool, seeds: int, steps: int) -> dict[str, list[float]]:
    """The last validation loss by arm and seed."""
    losses: dict[str, list[float]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory(prefix="dispatch-") as folder:
        workspace = Path(folder)
        data = data_spec(quick, workspace)
        store = prepare(data.source, data.vocab_size, data.holdout, stores_dir(quick, workspace)).directory
        with environment(worker_environment(threads=1, keep_memory=True)):
            for seed in range(seeds):
                for arm, communication in ARMS.items():
                    directory = workspace / f"{arm}-{seed}"
                    directory.mkdir()
                    done: Trained = train(job_of(communication, seed, steps, data), store, directory, WORKERS, ())
                    losses[arm].append(done.loss)
                    say(f"seed {seed}, {arm}: validation loss {done.loss:.4f}")
    return losses


if __name__ == "__main__":
    run(__doc__, measure)

"""Balance and loss of routers of each kind, against the default, a linear one with sigmoid scores.

    python -m benchmarks.routers [--quick]

Trains the models of `benchmarks.balance` with other scorers and selections (`balance.ROUTERS`), 2 of 16 and 2 of 64
experts, at the higher learning rate. A router with attention has as many parameters as a linear one. Softmax scores are
balanced by the bias here instead of an auxiliary loss. Bars of balance hold for attention and for softmax scores; the
other figures, and losses, are given as they come. About 40 minutes; it may be stopped, and goes on where it was.
"""

import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.balance import CASES, LRS, OURS, QUICK_STEPS, ROUTERS, SEEDS, STEPS, Arm, results_file, train_all
from benchmarks.harness import Bar, Result, at_most, equals, mean_interval, run
from benchmarks.support.data import data_spec, prepared, stores_dir

MEASURED = (CASES[1], CASES[2])
BALANCED = ("attention", "attention softmax", "softmax bias")


def measure(quick: bool) -> Result:
    seeds, steps = (1, QUICK_STEPS) if quick else (SEEDS, STEPS)
    cases = MEASURED[:1] if quick else MEASURED
    arms = [Arm(case, kind, LRS[0], seed) for case in cases for seed in range(seeds) for kind in (OURS, *ROUTERS)]
    with tempfile.TemporaryDirectory(prefix="routers-") as folder:
        workspace = Path(folder)
        data, stores = data_spec(quick, workspace), stores_dir(quick, workspace)
        store = prepared(data, stores)
        found = train_all(arms, steps, data, store.directory, results_file(stores, data, steps))
    bars: list[Bar] = []
    arms_of: dict[str, Any] = {}
    for case in cases:
        for kind in (OURS, *ROUTERS):
            mine = [found[arm] for arm in arms if (arm.case, arm.kind) == (case, kind)]
            theirs = [found[arm] for arm in arms if (arm.case, arm.kind) == (case, OURS)]
            gaps = [one.loss / other.loss - 1 for one, other in zip(mine, theirs, strict=True)]
            interval = mean_interval(gaps) if len(gaps) > 1 else gaps[0]
            rows = [asdict(measured) for measured in mine]
            arms_of[f"{case.name} {kind}"] = {key: mean(row[key] for row in rows) for key in rows[0]} | {
                "loss over default": interval
            }
            if kind in BALANCED:
                of = f"{kind}, {case.name}"
                bars += [
                    at_most(f"early, {of}", case.early, max(m.early for m in mine)),
                    at_most(f"late, {of}", case.late, max(m.late for m in mine)),
                    at_most(f"late, worst layer, {of}", 2 * case.late, max(m.late_worst for m in mine)),
                    at_most(f"summed, {of}", case.summed, max(m.summed for m in mine)),
                    equals(f"dead, {of}", 0, sum(m.dead for m in mine)),
                ]
    return Result(
        name="routers",
        seed=0,
        settings={"quick": quick, "steps": steps, "routers": ROUTERS},
        rounds=seeds,
        metrics={"arms": arms_of},
        bars=tuple(bars),
    )


if __name__ == "__main__":
    run(__doc__, measure)

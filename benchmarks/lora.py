"""Low-rank adapters against all weights and against the head alone, on a pretrained model that moves to other text.

    python -m benchmarks.lora [--quick]

SmolLM2-135M (`benchmarks.support.smollm2`) is trained on Python's own library: all weights, adapters of rank 4 beside
every matrix of its attention and MLPs, or the head alone as a control. Each has its learning rate chosen, from as many,
with the first seed; then all seeds train with it. The gain is by how much the loss on held-out files falls. Bytes moved
at a rescale are those of the transfer plans of both jobs, which are what runs move.

Runs are kept in a file, so it may be stopped, and goes on where it was. About 40 minutes on two cores.
"""

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.harness import Result, at_least, at_most, mean_interval, run
from benchmarks.support.data import data_spec, stores_dir
from benchmarks.support.local_training import KeptResults, train, validation_loss
from benchmarks.support.smollm2 import smollm2
from orchestrator.checkpoint.hf.pretrained import open_pretrained, resolved
from orchestrator.checkpoint.hf.shapes import listed
from orchestrator.data.prepare.job_store import prepare
from orchestrator.data.store import TokenStore
from orchestrator.elastic.state_spec import PARAM
from orchestrator.model.factory import build_model, single_rank
from orchestrator.model.tasks.language_modeling import LanguageModeling
from orchestrator.policy.estimate.job_plan import plan_job
from orchestrator.policy.estimate.worker_memory import StatePlan
from orchestrator.spec.job import JobSpec
from orchestrator.spec.model import ModelSpec
from orchestrator.state.pretrained_weights import read_weights
from orchestrator.state.ranges import NamedRanges
from tests.support.pretrained import SPEC, write_weights

STEPS, QUICK_STEPS = 30, 3
SEEDS, QUICK_SEEDS = 3, 1
ROWS, LENGTH = 4, 128
VALIDATION_ROWS = 32
SOURCES = ("model", "sampling", "spec/train.py", "spec/optimizer.py")
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# By kind, the keys of the job, and the learning rates that are tried.
KINDS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "all": ({}, (5e-5, 2e-4)),
    "lora": ({"lora": {"r": 4, "lora_alpha": 8, "target_modules": MODULES}}, (1e-3, 4e-3)),
    "head": ({"trainable": ["head"]}, (2e-4, 1e-3)),
}
MOST_TRAINED, LEAST_GAIN, MOST_MOVED = 0.01, 0.95, 1.01


@dataclass(frozen=True)
class Arm:
    kind: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.kind} lr {self.lr:g} seed {self.seed}"


@dataclass(frozen=True)
class Measured:
    """Losses of validation before and after, in nats, and the median second of a step."""

    before: float
    after: float
    step_s: float

    @property
    def gain(self) -> float:
        return self.before - self.after


def measure(quick: bool) -> Result:
    seeds, steps = (QUICK_SEEDS, QUICK_STEPS) if quick else (SEEDS, STEPS)
    with tempfile.TemporaryDirectory(prefix="lora-") as folder:
        workspace = Path(folder)
        stores = stores_dir(quick, workspace)
        base = write_weights(workspace / "base", SPEC) if quick else smollm2(stores)
        source = data_spec(quick, workspace).source
        store = prepare(source, 1024, 0.1, stores, tokenizer=base / "tokenizer.json")
        kept = KeptResults(stores, Path(__file__), f"{steps} {store.digest}", SOURCES)

        def of(arm: Arm) -> Measured:
            return Measured(**kept.of(arm.name, lambda: _train(arm, steps, base, store)))

        tried = [Arm(kind, lr, 0) for kind, (_, lrs) in KINDS.items() for lr in lrs]
        found = {arm: of(arm) for arm in tried}
        best = {
            kind: min(lrs, key=lambda lr, kind=kind: found[Arm(kind, lr, 0)].after) for kind, (_, lrs) in KINDS.items()
        }  # type: ignore[misc]
        arms = {kind: [Arm(kind, lr, seed) for seed in range(seeds)] for kind, lr in best.items()}
        found |= {arm: of(arm) for of_kind in arms.values() for arm in of_kind}
        trained, moved = _sizes(base)
    gains = {kind: [found[arm].gain for arm in of_kind] for kind, of_kind in arms.items()}
    shares = {
        kind: [mine / whole for mine, whole in zip(of_kind, gains["all"], strict=True)]
        for kind, of_kind in gains.items()
    }
    intervals = {kind: mean_interval(of_kind) if seeds > 1 else of_kind[0] for kind, of_kind in shares.items()}
    metrics = {
        "tried": {arm.name: asdict(found[arm]) | {"gain": found[arm].gain} for arm in tried},
        "gain": {kind: mean(of_kind) for kind, of_kind in gains.items()},
        "gain over that of all weights": {kind: intervals[kind] for kind in ("lora", "head")},
        "lr": best,
        "step_s": {kind: mean(found[arm].step_s for arm in of_kind) for kind, of_kind in arms.items()},
        "trained over all parameters": trained,
        "moved over that of all weights": moved,
    }
    bars = [
        at_most("trained over all parameters", MOST_TRAINED, trained["lora"]),
        at_least("gain over that of all weights", LEAST_GAIN, intervals["lora"]),
    ]
    bars += [
        at_most(f"moved over trained, {change}", MOST_MOVED, share / trained["lora"]) for change, share in moved.items()
    ]
    settings = {"quick": quick, "steps": steps, "rows": ROWS, "length": LENGTH, "kinds": KINDS}
    return Result("lora", 0, settings, seeds, metrics, bars=tuple(bars))


def job_of(kind: str, base: Path, lr: float = 1e-3, seed: int = 0, steps: int = STEPS) -> JobSpec:
    keys = dict(KINDS[kind][0])
    given = {"init_from": str(base)} | ({"lora": keys.pop("lora")} if "lora" in keys else {})
    model = resolved(ModelSpec.model_validate(given), base)
    train = {
        "global_batch_size": ROWS,
        "micro_batch_size": ROWS,
        "sequence_length": LENGTH,
        "max_steps": steps,
        "lr": lr,
        "seed": seed,
        "lr_scheduler": {"kind": "linear", "warmup_steps": steps // 10},
        "optimizer": {"weight_decay": 0.0},
        **keys,
    }
    plain = {"name": "lora", "model": model.model_dump(exclude_unset=True), "train": train, "workers": "1..3"}
    return JobSpec.model_validate(plain)


def _sizes(base: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Share of the parameters that each kind trains; and by rescale, the bytes that adapters' move over those of all
    weights."""
    trained, moved = {}, {}
    for kind in KINDS:
        job = job_of(kind, base)
        params, buffers = listed(job.model, job.num_outputs())
        whole = sum(p.numel for p in params if ".lora." not in p.name)
        trained[kind] = sum(p.numel for p in params if job.train.is_trained(p.name)) / whole
        planned = plan_job(job, StatePlan(tuple(params), tuple(buffers), job.num_outputs()))
        moved[kind] = {
            f"{world.world_size} -> {rescale.to_size}": rescale.moved_bytes
            for world in planned.worlds
            for rescale in world.rescales
        }
    return trained, {change: moved["lora"][change] / moved["all"][change] for change in moved["lora"]}


def _train(arm: Arm, steps: int, base: Path, store: TokenStore) -> dict[str, float]:
    """One run from beginning to end, in this process."""
    job, task = job_of(arm.kind, base, arm.lr, arm.seed, steps), LanguageModeling()
    model = build_model(job.model, job.num_outputs(), single_rank(job.model))
    model.init_adapters(arm.seed)
    ranges = NamedRanges()
    for name, param in model.named_parameters():
        ranges.add(f"{PARAM}/{name}", 0, param.data.view(-1))
        param.requires_grad_(job.train.is_trained(name))
    read_weights(open_pretrained(base), ranges)
    before = validation_loss(model, task, job, store, VALIDATION_ROWS)
    step_s = train(model, task, job, store)
    return {"before": before, "after": validation_loss(model, task, job, store, VALIDATION_ROWS), "step_s": step_s}


if __name__ == "__main__":
    run(__doc__, measure)

"""Update rules against their references, and at equal tokens against AdamW.

    python -m benchmarks.optimizers [--quick]

- `error`: a dense model of 4 layers is trained for 50 steps with AdamW, and its clipped gradients are recorded. Each
  rule applies them to the first weights; the largest relative error of a matrix of the layers is that to the reference
  (`tests.support.reference_rules`): torch's own optimizers, Lion's formula in fp32, and Muon's in fp64. torch's own
  Muon, whose iterations are in bf16, is beside it.
- `loss`: a mixture of 8 experts of `benchmarks.balance` is trained for 200 steps of 2,048 tokens by each rule, one
  process of one thread each: with three learning rates from the first seed, with the best of them from two more. The
  control is Muon without what makes it Muon: its momentum is scaled to the same size, and not made orthogonal.
"""

import copy
import math
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.balance import CASES, LENGTH, PROCESSES, ROWS, validated
from benchmarks.harness import Bar, Interval, Result, at_most, mean_interval, run, say
from benchmarks.support.data import data_spec, prepared, stores_dir
from orchestrator.data.store import TokenStore
from orchestrator.elastic.state_spec import ParamSpec
from orchestrator.engine.optim import muon
from orchestrator.engine.optim.lr_schedule import decay, learning_rate
from orchestrator.engine.optim.rule import UpdateInfo
from orchestrator.engine.optim.stepper import ParamPart, Updates
from orchestrator.model.base import TrainableModel, spec_of
from orchestrator.model.factory import build_model, single_rank
from orchestrator.model.moe.routing.balance import next_bias
from orchestrator.sampling.sampler import SamplerState, sample
from orchestrator.spec.data import DataSpec
from orchestrator.spec.job import JobSpec
from orchestrator.spec.train import TrainSpec
from tests.support.reference_rules import REFERENCES, TORCH_MUON

STEPS, QUICK_STEPS, RECORDED, QUICK_RECORDED = 200, 4, 50, 3
LRS = {
    "adamw": (1.5e-3, 3e-3, 6e-3),
    "sgd": (0.1, 0.3, 1.0),
    "lion": (3e-4, 1e-3, 3e-3),
    "muon": (3e-3, 6e-3, 1.2e-2),
    "adafactor": (1e-2, 3e-2, 1e-1),
}
CONTROL = "muon, not orthogonal"
RELATIVE_ERROR = 1e-5  # bar


@dataclass(frozen=True)
class Arm:
    """One run."""

    rule: str  # or CONTROL
    lr: float
    seed: int


def measure(quick: bool) -> Result:
    steps = QUICK_STEPS if quick else STEPS
    with tempfile.TemporaryDirectory(prefix="optimizers-") as folder:
        data = data_spec(quick, Path(folder))
        store = prepared(data, stores_dir(quick, Path(folder))).directory
        with ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as pool:
            errors = pool.submit(relative_errors, data, store, QUICK_RECORDED if quick else RECORDED)
            run_arms = partial(_trained_by, pool, steps, data, store)
            wanted = {rule: LRS[rule][:1] for rule in ("adamw", "muon")} if quick else LRS
            sweep = run_arms([Arm(rule, lr, 0) for rule, lrs in wanted.items() for lr in lrs])
            best = {rule: min((a for a in sweep if a.rule == rule), key=lambda arm: sweep[arm]).lr for rule in wanted}
            best[CONTROL] = best["muon"]
            seeds = (0, 1) if quick else (0, 1, 2)
            others = [Arm(rule, lr, seed) for rule, lr in best.items() for seed in seeds]
            found = sweep | run_arms([arm for arm in others if arm not in sweep])
            error = errors.result()
    losses = {rule: [found[Arm(rule, lr, seed)] for seed in seeds] for rule, lr in best.items()}
    over_adamw = {rule: _over(losses[rule], losses["adamw"]) for rule in losses if rule != "adamw"}
    bars: list[Bar] = [at_most(f"error of {rule}", RELATIVE_ERROR, error[rule]) for rule in REFERENCES]
    return Result(
        name="optimizers",
        seed=0,
        settings={"quick": quick, "steps": steps, "lrs": LRS, "case": CASES[0].name},
        rounds=len(seeds),
        metrics={
            "error": error,
            "sweep": {f"{arm.rule} {arm.lr:g}": loss for arm, loss in sweep.items()},
            "lr": best,
            "loss": losses,
            "loss over adamw's": over_adamw,
        },
        bars=tuple(bars),
    )


def _over(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    return mean_interval([a / b for a, b in zip(ours, theirs, strict=True)])


def _trained_by(
    pool: ProcessPoolExecutor, steps: int, data: DataSpec, store: Path, arms: Sequence[Arm]
) -> dict[Arm, float]:
    begun = {arm: pool.submit(train, arm, steps, data, store) for arm in arms}
    found = {}
    for arm, done in begun.items():
        found[arm] = done.result()
        say(f"{arm}: validation loss {found[arm]:.4f}")
    return found


def _job(data: DataSpec, steps: int, train: Mapping[str, Any], **model: Any) -> JobSpec:
    case = CASES[0]
    sizes = {
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 384,
        "n_routed_experts": case.num_experts,
        "num_experts_per_tok": case.top_k,
        "moe_intermediate_size": case.expert_size,
    }
    batch = {"global_batch_size": ROWS, "micro_batch_size": ROWS, "sequence_length": LENGTH, "max_steps": steps}
    return JobSpec.model_validate(
        {"name": "optimizers", "model": sizes | model, "train": batch | dict(train), "data": data}
    )


class _Optimizer:
    """A rule on a model's parameters, each a partition of its own."""

    def __init__(self, model: TrainableModel, train: TrainSpec) -> None:
        self._updates = Updates(train)
        self._params = [(spec_of(n, p).with_settings(train), p) for n, p in model.named_parameters()]
        self._state = [_zeros(self._updates, spec) for spec, _ in self._params]

    @torch.no_grad()
    def step(self, at: UpdateInfo) -> None:
        for (spec, param), state in zip(self._params, self._state, strict=True):
            assert param.grad is not None
            part = ParamPart(spec, slice(0, param.numel()))
            self._updates.apply([part], param.data.view(-1), param.grad.reshape(-1), state, at)
            param.grad = None


def train(arm: Arm, steps: int, data: DataSpec, store_dir: Path) -> float:
    """The validation loss of a run from beginning to end, in this process."""
    torch.set_num_threads(1)
    usual = muon.orthogonal
    if arm.rule == CONTROL:
        muon.orthogonal = lambda matrix: matrix * (min(matrix.shape) ** 0.5 / (matrix.norm() + muon.TINY))
    try:
        rule = arm.rule.partition(",")[0]
        job = _job(data, steps, {"lr": arm.lr, "seed": arm.seed, "optimizer": {"name": rule}})
        return _train(job, TokenStore.open(store_dir))
    finally:
        muon.orthogonal = usual


def _train(job: JobSpec, store: TokenStore) -> float:
    spec = job.train
    model = build_model(job.model, store.vocab_size, single_rank(job.model))
    model.init_weights(spec.seed)
    optimizer, routers = _Optimizer(model, spec), [layer.router for layer in model.moe_layers]
    for step in range(spec.max_steps):
        _backward(model, store, spec, step)
        routed = model.routing_counts()
        optimizer.step(UpdateInfo(step + 1, learning_rate(spec, step)))
        bias_LE = torch.stack([router.correction_bias_E for router in routers])
        for router, bias_E in zip(routers, next_bias(bias_LE, routed, job.model, decay(spec, step)), strict=True):
            router.correction_bias_E.copy_(bias_E)
    return validated(model, store)[0]


def _backward(model: TrainableModel, store: TokenStore, spec: TrainSpec, step: int) -> None:
    """Clipped gradients of a step."""
    num_rows = store.num_rows("train", LENGTH)
    sampler = SamplerState(seed=spec.seed, global_batch_size=ROWS, sequence_length=LENGTH, num_rows=num_rows)
    rows = store.rows("train", sample(sampler, step), LENGTH)
    loss = model(torch.from_numpy(rows.inputs_RT), torch.from_numpy(rows.targets_RT))
    (loss / int((rows.targets_RT >= 0).sum())).backward()
    nn.utils.clip_grad_norm_(model.parameters(), spec.gradient_clipping)


# -- references ------------------------------------------------------------------------------------------------------


def relative_errors(data: DataSpec, store_dir: Path, steps: int) -> dict[str, float]:
    """By rule, the largest relative error of a matrix of the layers after updates by recorded gradients."""
    torch.set_num_threads(1)
    store, lr = TokenStore.open(store_dir), 1e-3
    job = _job(data, steps, {"lr": lr}, first_k_dense_replace=4)
    model = build_model(job.model, store.vocab_size, single_rank(job.model))
    model.init_weights(0)
    named = {n: p for n, p in model.named_parameters() if n.startswith("layers.") and p.dim() == 2}
    first = {name: param.detach().clone() for name, param in named.items()}
    gradients: dict[str, list[Tensor]] = {name: [] for name in named}
    optimizer = _Optimizer(model, job.train)
    for step in range(steps):
        _backward(model, store, job.train, step)
        for name, param in named.items():
            assert param.grad is not None
            gradients[name].append(param.grad.clone())
        optimizer.step(UpdateInfo(step + 1, lr))
    found = {rule: max(_error(rule, name, first[name], gradients[name], lr) for name in named) for rule in REFERENCES}
    found["torch's muon"] = max(_error("muon", name, first[name], gradients[name], lr, is_torch=True) for name in named)
    return found


def _zeros(updates: Updates, param: ParamSpec) -> dict[str, Tensor]:
    """State of a parameter before its first update."""
    return {kind: torch.zeros(math.prod(param.shape_of(kind))) for kind in updates.kinds(param.update[0])}


def _error(
    rule: str, name: str, first: Tensor, gradients: Sequence[Tensor], lr: float, is_torch: bool = False
) -> float:
    train = TrainSpec.model_validate({"optimizer": {"name": rule}})
    spec = spec_of(name, first).with_settings(train)
    ours, updates = copy.deepcopy(first), Updates(train)
    state = _zeros(updates, spec)
    for number, gradient in enumerate(gradients, 1):
        part = ParamPart(spec, slice(0, first.numel()))
        updates.apply([part], ours.view(-1), gradient.reshape(-1), state, UpdateInfo(number, lr))
    blocks = zip(first.chunk(spec.blocks), *(gradient.chunk(spec.blocks) for gradient in gradients), strict=True)
    reference = TORCH_MUON if is_torch else REFERENCES[rule]
    wanted = torch.cat([reference(block, of_block, lr, spec.weight_decay) for block, *of_block in blocks])
    return float((ours - wanted).norm() / wanted.norm())


if __name__ == "__main__":
    run(__doc__, measure)

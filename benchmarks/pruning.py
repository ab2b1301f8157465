"""A model that is pruned while it trains, against the same model that isn't, at equal tokens.

    python -m benchmarks.pruning [--quick]

On Python's own library a dense model is trained as it is, with half of its neurons and half of its heads pruned, and
with two of each four weights pruned (2:4); as controls, with as many pruned that are drawn, not chosen by magnitude.
Pruning begins after half of the training, which all arms of a seed share, and ends after 80 % of it. (When it begins
after a tenth, drawn neurons and heads do as well as chosen ones: hardly anything is learned yet that they could lose.)
All have the same learning rate, the best for the dense model with the first seed. `inference` compares the time of a
model from which neurons and heads are removed with that of the whole one: `prefill`, the loss of rows, and `decode`, a
token after others, several rows at once. Times of both alternate.

Runs are kept in a file, so it may be stopped, and goes on where it was. About 16 minutes on two cores.
"""

import copy
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Result, at_least, at_most, mean_interval, run
from benchmarks.support.data import data_spec, prepared, stores_dir
from benchmarks.support.local_training import KeptResults, optimizer_of, train, validation_loss
from orchestrator.data.store import TokenStore
from orchestrator.engine.pruning.pruner import Pruner
from orchestrator.inference.pruned_model import without_pruned_units
from orchestrator.model.attention.kv_cache import KVCache
from orchestrator.model.draws import draw_normal
from orchestrator.model.factory import build_model, single_rank
from orchestrator.model.tasks.language_modeling import LanguageModeling
from orchestrator.model.transformer import MoELanguageModel
from orchestrator.spec.job import JobSpec

SEEDS, QUICK_SEEDS = 3, 1
STEPS, QUICK_STEPS = 400, 6
ROWS, LENGTH, VALIDATION_ROWS = 8, 128, 256
LRS = (1e-3, 2e-3, 4e-3)
SIZES = {
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "intermediate_size": 1024,
}
STRUCTURED = [{"pattern": "neurons", "sparsity": 0.5}, {"pattern": "heads", "sparsity": 0.5}]
TARGETS: dict[str, list[dict[str, Any]]] = {"dense": [], "structured": STRUCTURED, "2:4": [{"pattern": "2:4"}]}
DRAWN = "drawn "
MOST_LOSS = {"structured": 1.02, "2:4": 1.01}
LEAST_FASTER = 1.5
ROUNDS, DECODED, AT_ONCE = 9, 32, 8
SOURCES = (
    "model",
    "sampling",
    "spec/train.py",
    "spec/optimizer.py",
    "spec/pruning.py",
    "engine/pruning",
)


class DrawnPruner(Pruner):
    """The control: prunes as much, by magnitudes that are drawn once."""

    def judged(self, name: str) -> Tensor:
        drawn = torch.empty_like(super().judged(name))
        draw_normal(drawn, name, 1, 1.0)
        return drawn


def measure(quick: bool) -> Result:
    seeds, steps = (QUICK_SEEDS, QUICK_STEPS) if quick else (SEEDS, STEPS)
    with tempfile.TemporaryDirectory(prefix="pruning-") as folder:
        workspace = Path(folder)
        stores = stores_dir(quick, workspace)
        store = prepared(data_spec(quick, workspace), stores)
        kept = KeptResults(stores, Path(__file__), f"{steps} {store.digest}", SOURCES)
        kinds = ("dense", "structured", "2:4", DRAWN + "structured", DRAWN + "2:4")
        tried = {lr: kept.of(f"dense lr {lr:g}", partial(_dense, lr, steps, store))["loss"] for lr in LRS}
        lr = min(LRS, key=lambda each: tried[each])
        arms: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
        for seed in range(seeds):
            half = cache(partial(_half, lr, seed, steps, store))
            for kind in kinds:
                arms[kind].append(
                    kept.of(f"{kind} lr {lr:g} seed {seed}", partial(_measured, kind, lr, seed, steps, store, half))
                )
        model, _ = _trained("structured", lr, 0, QUICK_STEPS, store, _half(lr, 0, QUICK_STEPS, store))
        faster = _inference(model, _model(_job("dense", lr, 0, steps), store))
    losses = {kind: [arm["loss"] for arm in of_kind] for kind, of_kind in arms.items()}
    ratios = {
        kind: [mine / whole for mine, whole in zip(of_kind, losses["dense"], strict=True)]
        for kind, of_kind in losses.items()
        if kind != "dense"
    }
    intervals = {kind: mean_interval(of_kind) if seeds > 1 else of_kind[0] for kind, of_kind in ratios.items()}
    metrics = {
        "loss": {kind: mean(of_kind) for kind, of_kind in losses.items()},
        "losses": losses,
        "loss over dense": intervals,
        "tried": {f"{lr:g}": loss for lr, loss in tried.items()},
        "zeros": {kind: [arm["zeros"] for arm in of_kind] for kind, of_kind in arms.items()},
        "step_s": {kind: mean(arm["step_s"] for arm in of_kind) for kind, of_kind in arms.items()},
        "inference": faster,
    }
    bars = [at_most(f"loss over dense, {kind}", most, intervals[kind]) for kind, most in MOST_LOSS.items()]
    bars += [at_least(f"{what}, whole over pruned", LEAST_FASTER, each["ratio"]) for what, each in faster.items()]
    settings = {"quick": quick, "steps": steps, "rows": ROWS, "length": LENGTH, "lr": LRS, "model": SIZES}
    return Result("pruning", 0, settings, seeds, metrics, bars=tuple(bars))


State = tuple[dict[str, Any], dict[str, Any]]  # of a model and its optimizer


def _dense(lr: float, steps: int, store: TokenStore) -> Mapping[str, float]:
    job = _job("dense", lr, 0, steps)
    model = _model(job, store)
    train(model, LanguageModeling(), job, store)
    return {"loss": validation_loss(model, LanguageModeling(), job, store, VALIDATION_ROWS)}


def _half(lr: float, seed: int, steps: int, store: TokenStore) -> State:
    """The state after the first half of the training."""
    job = _job("dense", lr, seed, steps)
    model = _model(job, store)
    optimizer = optimizer_of(model, job)
    train(model, LanguageModeling(), job, store, range(steps // 2), optimizer)
    return model.state_dict(), optimizer.state_dict()


def _measured(
    kind: str, lr: float, seed: int, steps: int, store: TokenStore, half: Callable[[], State]
) -> Mapping[str, float]:
    model, step_s = _trained(kind, lr, seed, steps, store, half())
    loss = validation_loss(model, LanguageModeling(), _job(kind, lr, seed, steps), store, VALIDATION_ROWS)
    layers = [param for name, param in model.named_parameters() if name.startswith("layers.") and param.dim() > 1]
    zeros = sum(int((param == 0).sum()) for param in layers) / sum(param.numel() for param in layers)
    return {"loss": loss, "zeros": zeros, "step_s": step_s}


def _job(kind: str, lr: float, seed: int, steps: int) -> JobSpec:
    train: dict[str, Any] = {
        "global_batch_size": ROWS,
        "micro_batch_size": ROWS,
        "sequence_length": LENGTH,
        "max_steps": steps,
        "lr": lr,
        "seed": seed,
        "lr_scheduler": {"kind": "cosine", "warmup_steps": steps // 10},
    }
    if targets := TARGETS[kind.removeprefix(DRAWN)]:
        pruning = {
            "targets": targets,
            "start_step": steps // 2,
            "end_step": steps * 8 // 10,
            "every": max(steps // 100, 1),
        }
        train["pruning"] = pruning
    return JobSpec.model_validate({"name": "pruning", "model": SIZES, "train": train})


def _model(job: JobSpec, store: TokenStore) -> MoELanguageModel:
    model = build_model(job.model, store.vocab_size, single_rank(job.model))
    assert isinstance(model, MoELanguageModel)
    model.init_weights(job.train.seed)
    return model


def _trained(
    kind: str, lr: float, seed: int, steps: int, store: TokenStore, half: State
) -> tuple[MoELanguageModel, float]:
    """A model after the second half of its training, with zeros where it was pruned, and a step's median seconds."""
    job, task = _job(kind, lr, seed, steps), LanguageModeling()
    model, later = _model(job, store), range(steps // 2, steps)
    optimizer = optimizer_of(model, job)
    model.load_state_dict(half[0])
    optimizer.load_state_dict(copy.deepcopy(half[1]))
    pruning = job.train.pruning
    if pruning is None:
        return model, train(model, task, job, store, later, optimizer)
    pruner = (DrawnPruner if kind.startswith(DRAWN) else Pruner)(model, pruning)
    pruned = {n: p for n, p in model.named_parameters() if pruning.target_of(n, p.shape) is not None}
    zeros: dict[str, Tensor] = {}

    def before(number: int) -> None:
        if pruning.is_due(number):
            pruner.begin(number)
            zeros.update({name: pruner.pruned(name) for name in pruned})
            pruner.end()

    @torch.no_grad()
    def after(number: int) -> None:
        for name, is_zero in zeros.items():
            pruned[name].view(-1).masked_fill_(is_zero, 0.0)

    return model, train(model, task, job, store, later, optimizer, before, after)


# -- inference ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _inference(pruned: MoELanguageModel, whole: MoELanguageModel) -> dict[str, Any]:
    """Seconds of both models, and their ratio, by what is computed."""
    smaller = without_pruned_units(pruned, single_rank(pruned.spec))
    tokens = torch.randint(0, len(whole.head), (AT_ONCE, LENGTH), generator=torch.Generator().manual_seed(0))
    found: dict[str, Any] = {}
    for what, compute in (("prefill", _prefill), ("decode", _decode)):
        spent: dict[str, list[float]] = {"whole": [], "pruned": []}
        for _ in range(ROUNDS):
            for name, model in (("whole", whole.eval()), ("pruned", smaller.eval())):
                spent[name].append(compute(model, tokens))
        seconds = {name: median(each[1:]) for name, each in spent.items()}
        found[what] = {**seconds, "ratio": seconds["whole"] / seconds["pruned"]}
    return found


def _prefill(model: MoELanguageModel, tokens_BT: Tensor) -> float:
    began_s = time.perf_counter()
    for _ in range(2):
        model(tokens_BT, tokens_BT)
    return (time.perf_counter() - began_s) / 2


def _decode(model: MoELanguageModel, tokens_BT: Tensor) -> float:
    cache = KVCache(model.spec, len(tokens_BT), LENGTH + DECODED, model.head)
    model.extend(tokens_BT, cache)
    began_s = time.perf_counter()
    for _ in range(DECODED):
        model.extend(tokens_BT[:, :1], cache)
    return (time.perf_counter() - began_s) / DECODED


if __name__ == "__main__":
    run(__doc__, measure)

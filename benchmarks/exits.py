"""A model with early exits: how many layers tokens skip at 1 % more loss, and what exits cost its training.

    python -m benchmarks.exits [--quick]

On Python's own library a model of eight layers is trained with exits, and one without them for comparison. On half of
some held-out rows a rule is fitted by which tokens leave, as `model eval --max-loss-increase` does; all that is
reported is of the other half. Controls: the model cut off after a layer, for all tokens, with losses of depths in
between by interpolation (`truncation`); and the rule of CALM (arXiv:2207.07061) and others, by which a token leaves
where its likeliest next token is ahead of the second by a margin of probability (`margin`), for which an exit needs the
output matrix. Text is generated with and without exits in alternation.

All layers are dense. Runs are kept in a file, so it may be stopped, and goes on where it was. About 25 minutes on two
cores.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Result, at_least, at_most, mean_interval, run
from benchmarks.support.data import data_spec, prepared, stores_dir
from benchmarks.support.local_training import KeptResults, train, validation_loss
from orchestrator.data.store import TokenStore
from orchestrator.inference.exit_rule import LAYERS, ExitedTask, ThresholdSearch, fitted
from orchestrator.model.attention.kv_cache import KVCache
from orchestrator.model.early_exit import EarlyExit, ExitRule
from orchestrator.model.factory import build_model, single_rank
from orchestrator.model.task import Batch, Task
from orchestrator.model.tasks.exit_losses import ExitLosses
from orchestrator.model.tasks.language_modeling import LanguageModeling
from orchestrator.model.transformer import MoELanguageModel
from orchestrator.spec.job import JobSpec

SEEDS, QUICK_SEEDS = 3, 1
ROWS, LENGTH, VALIDATION_ROWS, HELD_OUT = 8, 128, 256, 1024
STEPS, QUICK_STEPS = 800, 4
SIZES = {"hidden_size": 128, "num_hidden_layers": 8, "intermediate_size": 352, "first_k_dense_replace": 8}
EXITS = {"layers": [2, 4, 6]}
LR = 4e-3
ALLOWED = 0.008  # of the rows that the rule is fitted on, so that others have at most 1 %
LEAST_SKIPPED, MOST_LOSS = 0.3, 0.01
PROMPT, GENERATED, ROUNDS = 32, 96, 5  # tokens, and how often
SOURCES = (
    "model",
    "inference/exit_rule.py",
    "sampling",
    "spec/exits.py",
    "spec/model.py",
    "spec/train.py",
    "spec/optimizer.py",
    "engine/optim/lr_schedule.py",
)


def measure(quick: bool) -> Result:
    seeds, steps = (QUICK_SEEDS, QUICK_STEPS) if quick else (SEEDS, STEPS)
    with tempfile.TemporaryDirectory(prefix="exits-") as folder:
        workspace = Path(folder)
        stores = stores_dir(quick, workspace)
        store = prepared(data_spec(quick, workspace), stores)
        kept = KeptResults(stores, Path(__file__), f"{steps} {store.digest}", SOURCES)

        def of(exits: bool, seed: int) -> dict[str, Any]:
            name = f"{'exits' if exits else 'plain'} seed {seed}"
            return kept.of(name, lambda: _trained(exits, seed, steps, store))

        with_exits, plain = ([of(exits, seed) for seed in range(seeds)] for exits in (True, False))
    shares = {kind: [each["skipped"][kind] for each in with_exits] for kind in ("rule", "margin", "truncation")}
    increases = [each["increase"] for each in with_exits]
    costs = [mine["loss"] / theirs["loss"] - 1.0 for mine, theirs in zip(with_exits, plain, strict=True)]
    skipped = {kind: _interval(of_kind) for kind, of_kind in shares.items()}
    metrics = {
        "loss": {"exits": [each["loss"] for each in with_exits], "plain": [each["loss"] for each in plain]},
        "loss of training with exits": _interval(costs),
        "loss after layers": [each["after"] for each in with_exits],
        "layers skipped": skipped,
        "loss increase": _interval(increases),
        "loss increase of margin": _interval([each["increase of margin"] for each in with_exits]),
        "loss increase of truncation to the same depth": _interval([each["truncated"] for each in with_exits]),
        "left at": [each["left"] for each in with_exits],
        "generated tokens per second, over all layers": [each["speed"] for each in with_exits],
        "training step, over plain": [a["step_s"] / b["step_s"] for a, b in zip(with_exits, plain, strict=True)],
    }
    settings = {
        "quick": quick,
        "steps": steps,
        "rows": ROWS,
        "length": LENGTH,
        "model": SIZES,
        "exits": EXITS,
        "lr": LR,
    }
    bars = (
        at_least("layers skipped", LEAST_SKIPPED, skipped["rule"]),
        at_most("loss increase", MOST_LOSS, _interval(increases)),
    )
    return Result("exits", 0, settings, seeds, metrics, bars=bars)


def _interval(values: Sequence[float]) -> Any:
    return mean_interval(values) if len(values) > 1 else values[0]


def _job(exits: bool, seed: int, steps: int) -> JobSpec:
    model = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "exits": EXITS if exits else None}
    training = {
        "global_batch_size": ROWS,
        "micro_batch_size": ROWS,
        "sequence_length": LENGTH,
        "max_steps": steps,
        "lr": LR,
        "seed": seed,
        "lr_scheduler": {"kind": "cosine", "warmup_steps": steps // 10},
    }
    return JobSpec.model_validate({"name": "exits", "model": model, "train": training})


def _trained(exits: bool, seed: int, steps: int, store: TokenStore) -> Mapping[str, Any]:
    job = _job(exits, seed, steps)
    model = build_model(job.model, store.vocab_size, single_rank(job.model))
    assert isinstance(model, MoELanguageModel)
    model.init_weights(seed)
    task: Task = LanguageModeling() if job.model.exits is None else ExitLosses(LanguageModeling(), job.model.exits)
    step_s = train(model, task, job, store)
    loss = validation_loss(model, LanguageModeling(), job, store, VALIDATION_ROWS)
    measured = _Leaving(model, store).measured() if exits else {}
    return {"loss": loss, "step_s": step_s, **measured}


@dataclass(frozen=True)
class MarginRule(ExitRule):
    """Estimates by the margin of the likeliest token's probability over the second's: minus that."""

    head_VD: Tensor

    def estimates(self, x_XSD: Tensor, exit_index: int) -> Tensor:
        first, second = (x_XSD @ self.head_VD.T).float().softmax(-1).topk(2).values.unbind(-1)
        return second - first


class _Leaving:
    """What tokens of held-out rows run and cost."""

    def __init__(self, model: MoELanguageModel, store: TokenStore) -> None:
        assert model.spec.exits is not None
        self._model, self._exits = model.eval(), model.spec.exits
        numbers = np.random.default_rng(1).permutation(store.num_rows("validation", LENGTH))[:HELD_OUT]
        self._halves = [[_batch(store, some) for some in _chunks(np.sort(half))] for half in np.array_split(numbers, 2)]
        self._num_layers = model.spec.num_hidden_layers

    @torch.no_grad()
    def measured(self) -> Mapping[str, Any]:
        rule, estimates = fitted(self._model, lambda: self._halves[0])
        plain_loss, after = self._loss_after_layers()
        ends = [*self._exits.layers, self._num_layers]
        found = self._searched(rule, estimates)
        left, layers, loss = self._loss(found, 1)
        margin = MarginRule(rule.weights_XD, rule.biases_X, -torch.inf, self._model.head)
        _, margin_layers, margin_loss = self._loss(self._searched(margin, self._estimates(margin)), 1)
        truncated = float(np.interp(layers, ends, after)) / plain_loss - 1.0
        # The fewest layers with which a model that is cut off has as much loss as the rule.
        cut_off = float(np.interp(loss, list(reversed(after)), list(reversed(ends))))
        depths = {"rule": layers, "margin": margin_layers, "truncation": cut_off}
        return {
            "after": after,
            "skipped": {kind: 1.0 - depth / self._num_layers for kind, depth in depths.items()},
            "increase": loss / plain_loss - 1.0,
            "increase of margin": margin_loss / plain_loss - 1.0,
            "truncated": truncated,
            "left": left,
            "speed": self._speed(found),
        }

    def _searched(self, rule: ExitRule, estimates: Tensor) -> ExitRule:
        """The rule with a threshold that is found on the first half."""
        allowed = self._loss(rule, 0)[2] * (1.0 + ALLOWED)
        search = ThresholdSearch(estimates)
        while not search.is_over:
            search.narrow(self._loss(replace(rule, threshold=search.threshold), 0)[2] <= allowed)
        return replace(rule, threshold=search.threshold)

    def _loss(self, rule: ExitRule, half: int) -> tuple[list[float], float, float]:
        """Shares that leave at exits, mean layers, and loss, on a half of the rows."""
        total, sums, weight = 0.0, np.zeros(1 + len(self._exits.layers)), 0.0
        for batch in self._halves[half]:
            loss = ExitedTask(LanguageModeling(), self._exits, rule).loss(self._model, batch)
            total += float(loss.total)
            sums += [float(each) for each, _ in loss.metrics.values()]
            weight += float(loss.metrics[LAYERS][1])
        layers, *left = (sums / weight).tolist()
        return left, layers, total / weight

    def _estimates(self, rule: ExitRule) -> Tensor:
        scored = [self._model.scores(batch["inputs"]) for batch in self._halves[0]]
        return torch.cat([torch.stack([rule.estimates(x, i) for i, x in enumerate(each.exits)], -1) for each in scored])

    def _loss_after_layers(self) -> tuple[float, list[float]]:
        """The second half's loss with all layers, and those after each exit and the last layer."""
        task, sums, weight = ExitLosses(LanguageModeling(), self._exits), np.zeros(1 + len(self._exits.layers)), 0.0
        for batch in self._halves[1]:
            loss = task.loss(self._model, batch)
            sums += [*(float(each) for each, _ in loss.metrics.values()), float(loss.total)]
            weight += float(next(iter(loss.metrics.values()))[1])
        after = (sums / weight).tolist()
        return after[-1], after

    def _speed(self, rule: ExitRule) -> float:
        """Tokens per second with exits over those without, of greedy text after a held-out prompt."""
        early, prompt_1T = EarlyExit(self._model, rule), self._halves[1][0]["inputs"][:1, :PROMPT]

        def spent_s(extend: Callable[[Tensor, KVCache], Tensor]) -> float:
            cache = KVCache(self._model.spec, 1, PROMPT + GENERATED, self._model.head)
            token_11 = self._model.extend(prompt_1T, cache).argmax(-1, keepdim=True)  # nothing waits yet
            began_s = time.perf_counter()
            for _ in range(GENERATED):
                token_11 = extend(token_11, cache).argmax(-1, keepdim=True)
            return time.perf_counter() - began_s

        rounds = [(spent_s(self._model.extend), spent_s(lambda new, cache: early.extend(new, cache)[0]))]
        rounds += [
            (spent_s(self._model.extend), spent_s(lambda new, cache: early.extend(new, cache)[0]))
            for _ in range(ROUNDS)
        ]
        return median(whole_s / early_s for whole_s, early_s in rounds[1:])  # the first one warms up


def _chunks(numbers: Any) -> Iterator[Any]:
    return (numbers[start : start + ROWS] for start in range(0, len(numbers), ROWS))


def _batch(store: TokenStore, numbers: Any) -> Batch:
    rows = store.rows("validation", numbers, LENGTH)
    return {"inputs": torch.from_numpy(rows.inputs_RT), "targets": torch.from_numpy(rows.targets_RT)}


if __name__ == "__main__":
    run(__doc__, measure)

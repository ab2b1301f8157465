"""The rule by which a model's tokens leave at exits: fitted on held-out rows, kept beside a run's checkpoints, and used
in evaluation and generation.

Shape legend: N = tokens, C = tokens of a chunk, D = hidden size, F = D and a constant, X = exits.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.checkpoint.manifest import parse_checkpoint_name
from orchestrator.errors import DataError, NotFound, StorageError, UsageError
from orchestrator.model.base import TokenScores, TrainableModel
from orchestrator.model.early_exit import EarlyExit, ExitRule
from orchestrator.model.loss import IGNORED, MIN_CHUNK, CrossEntropy
from orchestrator.model.task import Batch, Loss, Row, Task
from orchestrator.model.transformer import MoELanguageModel
from orchestrator.spec.exits import ExitsSpec
from orchestrator.spec.job import JobSpec
from orchestrator.storage.backends.location import Location, objects_at

DIRECTORY = "exit-rules"  # of a run: rules of each checkpoint that has some, numbered; the last one counts
LAYERS = "layers"
RIDGE = 0.03  # share of the mean variance of a hidden state's elements, added to all of them
SEARCH_STEPS = 8  # halvings of the share of tokens that may leave


def exits_of(job: JobSpec) -> ExitsSpec:
    """The exits of a run's model. Raises UsageError if it has none."""
    if job.model.exits is None:
        raise UsageError(
            f"the model of run {job.name} has no exits",
            remedy="Leave the option out, or train with model.exits (docs/exits.md).",
        )
    return job.model.exits


@dataclass(frozen=True)
class KeptRule:
    """A rule of a run's checkpoint, and how it was made.

    Args:
        layers: those of the exits.
        dtype, source: of the model's matrices, and the rows, when it was fitted.
        rows: on which it was measured.
        max_loss_increase: that was allowed.
        loss, loss_of_all_layers, mean_layers: what was measured, on other rows than it was fitted on.
    """

    rule: ExitRule
    layers: tuple[int, ...]
    dtype: str
    source: str
    rows: int
    max_loss_increase: float
    loss: float
    loss_of_all_layers: float
    mean_layers: float

    def encoded(self) -> bytes:
        content = vars(self) | {
            "rule": {
                "threshold": str(self.rule.threshold),  # JSON has no infinity
                "weights": self.rule.weights_XD.tolist(),
                "biases": self.rule.biases_X.tolist(),
            }
        }
        return json.dumps(content, allow_nan=False).encode()

    @classmethod
    def decoded(cls, data: bytes) -> "KeptRule":
        """Raises ValueError, KeyError or TypeError: these aren't the bytes of a rule."""
        content = json.loads(data)
        rule = content["rule"]
        weights_XD, biases_X = (torch.tensor(rule[name], dtype=torch.float32) for name in ("weights", "biases"))
        if weights_XD.ndim != 2 or len(weights_XD) != len(biases_X) or len(biases_X) != len(content["layers"]):
            raise ValueError("it has other sizes than its exits")
        exit_rule = ExitRule(weights_XD, biases_X, float(rule["threshold"]))
        return cls(**content | {"rule": exit_rule, "layers": tuple(content["layers"])})


def save_rule(run_dir: Location, checkpoint: str, kept: KeptRule) -> str:
    """Keep a rule of a run's checkpoint, which counts from now on. Returns its place. Raises StorageError if it can't
    be written."""
    objects, folder, data = objects_at(run_dir), f"{DIRECTORY}/{checkpoint}", kept.encoded()
    try:
        names = objects.names(folder)
        number = int(names[-1].partition(".")[0]) if names else 0
        while True:
            number += 1
            key = f"{folder}/{number:04d}.json"
            if objects.create(key, data) == data:  # else another process has kept one of this number
                return str(run_dir / key)
    except (OSError, ValueError) as error:
        raise StorageError(
            f"the rule can't be kept in {run_dir / folder}: {error}",
            remedy="Make that place writable, and repeat the command.",
            unchanged="No rule was kept; those before it count.",
        ) from error


def load_rule(run_dir: Location, checkpoint: str, job: JobSpec) -> KeptRule:
    """The rule of a run's checkpoint that counts.

    Raises:
        UsageError: the model has no exits.
        NotFound: the checkpoint has no rule, or one that is damaged or of other exits.
        StorageError: storage doesn't answer.
    """
    exits, objects, folder = exits_of(job), objects_at(run_dir), f"{DIRECTORY}/{checkpoint}"
    of_step = parse_checkpoint_name(checkpoint)
    option = f" --step {of_step[0]}" if of_step else ""
    remedy = f"Fit one: orchestrator model eval {job.name}{option} --max-loss-increase 0.01"
    try:
        names = objects.names(folder)
        if not names:
            raise NotFound(f"{checkpoint} of run {job.name} has no rule for its exits yet", remedy=remedy)
        kept = KeptRule.decoded(objects.get(f"{folder}/{names[-1]}"))
    except OSError as error:
        raise StorageError(
            f"the rule of exits in {run_dir / folder} can't be read: {error}", remedy="Make that place readable."
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        raise NotFound(
            f"the rule of exits in {run_dir / folder} is damaged: {type(error).__name__}: {error}", remedy=remedy
        ) from error
    if kept.layers != exits.layers or kept.rule.weights_XD.shape[1] != job.model.hidden_size:
        raise NotFound(
            f"the rule {run_dir / folder / names[-1]} is of exits after layers {list(kept.layers)} and not "
            f"{list(exits.layers)}, or of other sizes",
            remedy=remedy,
        )
    return kept


@torch.no_grad()
def fitted(model: MoELanguageModel, batches: Callable[[], Iterable[Batch]]) -> tuple[ExitRule, Tensor]:
    """A rule with which no token leaves, and its estimates (N, X) for the tokens from which it was fitted, by ridge
    regression of the root of KL(last layer || exit).

    Args:
        batches: gives the same ones each time.

    Raises:
        DataError: hidden states aren't finite.
    """
    grams_XFF: list[Tensor] = []
    moments_XF: list[Tensor] = []
    for batch in batches():
        scores, counts_N = _scored(model, batch)
        roots_NX = _divergences(scores).sqrt()[counts_N]
        for index, x_ND in enumerate(scores.exits):
            x_NF = _with_constant(x_ND[counts_N])
            if len(grams_XFF) == index:
                grams_XFF.append(x_NF.new_zeros(x_NF.shape[1], x_NF.shape[1]))
                moments_XF.append(x_NF.new_zeros(x_NF.shape[1]))
            grams_XFF[index] += x_NF.T @ x_NF
            moments_XF[index] += x_NF.T @ roots_NX[:, index].double()
    solved_XF = torch.stack([_ridge(gram, moment) for gram, moment in zip(grams_XFF, moments_XF, strict=True)]).float()
    rule = ExitRule(solved_XF[:, :-1], solved_XF[:, -1], -torch.inf)
    found = []
    for batch in batches():
        scores, counts_N = _scored(model, batch)
        found.append(torch.stack([rule.estimates(x_ND[counts_N], i) for i, x_ND in enumerate(scores.exits)], -1))
    estimates = torch.cat(found)
    if not bool(estimates.isfinite().all()):
        raise DataError(
            "hidden states of exits aren't finite on these rows",
            remedy="Use another checkpoint: --step.",
            unchanged="No rule was kept.",
        )
    return rule, estimates


def _scored(model: MoELanguageModel, batch: Batch) -> tuple[TokenScores, Tensor]:
    """Scores of tokens, and whether they have a target (N,)."""
    scores = model.scores(batch["inputs"], batch.get("documents"), batch.get("lengths"))
    return scores, scores.of_tokens(batch["targets"]) != IGNORED


def _divergences(scores: TokenScores) -> Tensor:
    """KL(last layer || exit) (N, X) in nats."""
    found = []
    for start in range(0, len(scores.x_ND), MIN_CHUNK):
        here = slice(start, start + MIN_CHUNK)
        last_CV = scores.logits(here).float().log_softmax(-1)
        exits = (TokenScores(x_ND, scores.head_VD, None).logits(here).float().log_softmax(-1) for x_ND in scores.exits)
        of_exits = [(last_CV.exp() * (last_CV - exit_CV)).sum(-1).clamp_min(0.0) for exit_CV in exits]
        found.append(torch.stack(of_exits, -1))
    return torch.cat(found)


def _with_constant(x_ND: Tensor) -> Tensor:
    return torch.cat((x_ND.double(), x_ND.new_ones(len(x_ND), 1, dtype=torch.float64)), -1)


def _ridge(gram_FF: Tensor, moment_F: Tensor) -> Tensor:
    penalty_F = torch.full_like(moment_F, RIDGE * float(gram_FF.diagonal()[:-1].mean()))
    penalty_F[-1] = 1e-9
    solved_F: Tensor = torch.linalg.solve(gram_FF + penalty_F.diag(), moment_F)
    return solved_F


class ThresholdSearch:
    """The highest threshold at which a loss is allowed, by bisection over the share of estimates that it exceeds.

    Args:
        estimates: of an `ExitRule`, for all tokens and exits.

    Attributes:
        threshold: the next one to try; at the end the one that was found.
    """

    def __init__(self, estimates: Tensor, num_steps: int = SEARCH_STEPS) -> None:
        self._sorted = estimates.flatten().sort().values
        self._low, self._high, self._tried, self._left = 0.0, 1.0, 1.0, num_steps
        self.threshold = torch.inf

    @property
    def is_over(self) -> bool:
        return self._left < 0 or self._low == 1.0

    def narrow(self, is_allowed: bool) -> None:
        """Take note of whether the loss is allowed at `threshold`."""
        if is_allowed:
            self._low = self._tried
        else:
            self._high = self._tried
        self._left -= 1
        self._tried = self._low if self.is_over else (self._low + self._high) / 2
        self.threshold = self._at(self._tried)

    def _at(self, share: float) -> float:
        if share in (0.0, 1.0):
            return torch.inf if share else -torch.inf
        return float(self._sorted[int(share * len(self._sorted))])


class ExitedTask:
    """A task of next tokens whose tokens leave at exits, for evaluation (`orchestrator.model.task.Task`).

    Args:
        task: whose rows these are.
    """

    needs_reference = False

    def __init__(self, task: Task, exits: ExitsSpec, rule: ExitRule) -> None:
        self._task, self._exits, self._rule = task, exits, rule
        self.metrics = (LAYERS, *(f"exit_{layer}_share" for layer in exits.layers))

    def collate(self, rows: Sequence[Row], rng: np.random.Generator) -> Mapping[str, NDArray[np.generic]]:
        """As the task collates them."""
        return self._task.collate(rows, rng)

    def loss(self, model: TrainableModel, batch: Batch) -> Loss:
        """Sum over the targets that count, in nats. Metrics: the layers that their tokens run, and the share of tokens
        that leave at each exit."""
        assert isinstance(model, MoELanguageModel)
        exiting = EarlyExit(model, self._rule)
        scores, layers_N = exiting.scores(
            batch["inputs"], batch["targets"], batch.get("documents"), batch.get("lengths")
        )
        targets_N = scores.of_tokens(batch["targets"])
        total, _ = scores.loss(CrossEntropy(targets_N))
        ran_M = layers_N[targets_N != IGNORED]
        weight = torch.full((), float(len(ran_M)))
        sums = (ran_M.sum(), *((ran_M == layer).sum() for layer in self._exits.layers))
        metrics = {name: (each.float(), weight) for name, each in zip(self.metrics, sums, strict=True)}
        return Loss(total, metrics=metrics)

    def report(self, means: Mapping[str, float]) -> dict[str, float]:
        """The means over the target tokens."""
        return dict(means)


@dataclass
class LayerCount:
    """Layers that generated tokens have run, each to predict the next one."""

    num_layers: int = 0
    num_tokens: int = 0

    def add(self, layers: int) -> None:
        self.num_layers += layers
        self.num_tokens += 1

    @property
    def mean(self) -> float | None:
        return self.num_layers / self.num_tokens if self.num_tokens else None

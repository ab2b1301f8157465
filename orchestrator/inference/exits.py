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

from orchestrator.errors import NotFound, UsageError
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


def save_rule(run_dir: Location, checkpoint: str, rule: ExitRule) -> str:
    """Keep a rule of a run's checkpoint, which counts from now on. Returns its place. Raises OSError if it can't be
    written."""
    content = {
        "threshold": rule.threshold,
        "weights": rule.weights_XD.tolist(),
        "biases": rule.biases_X.tolist(),
    }
    objects, folder = objects_at(run_dir), f"{DIRECTORY}/{checkpoint}"
    key = f"{folder}/{len(objects.names(folder)) + 1:04d}.json"
    objects.create(key, json.dumps(content).encode())
    return str(run_dir / key)


def load_rule(run_dir: Location, checkpoint: str, job: JobSpec) -> ExitRule:
    """The rule of a run's checkpoint.

    Raises:
        UsageError: the model has no exits.
        NotFound: the checkpoint has no rule, or one that can't be read.
    """
    exits_of(job)
    objects, folder = objects_at(run_dir), f"{DIRECTORY}/{checkpoint}"
    names = objects.names(folder)
    if not names:
        raise NotFound(
            f"{checkpoint} of run {job.name} has no rule for its exits yet",
            remedy=f"Fit one: orchestrator model eval {job.name} --max-loss-increase 0.01",
        )
    try:
        content = json.loads(objects.get(f"{folder}/{names[-1]}"))
        return ExitRule(
            torch.tensor(content["weights"], dtype=torch.float32),
            torch.tensor(content["biases"], dtype=torch.float32),
            float(content["threshold"]),
        )
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise NotFound(
            f"the rule {run_dir / folder / names[-1]} of exits can't be read: {error}",
            remedy=f"Fit another one: orchestrator model eval {job.name} --max-loss-increase 0.01",
        ) from error


@torch.no_grad()
def fitted(model: MoELanguageModel, batches: Callable[[], Iterable[Batch]]) -> tuple[ExitRule, Tensor]:
    """A rule with which no token leaves, and its estimates (N, X) for the tokens from which it was fitted, by ridge
    regression of the root of KL(last layer || exit).

    Args:
        batches: gives the same ones each time.
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
    return rule, torch.cat(found)


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
        self._low, self._high, self._left = 0.0, 1.0, num_steps
        self.threshold = torch.inf

    @property
    def is_over(self) -> bool:
        return self._left < 0 or self._low == 1.0

    def narrow(self, is_allowed: bool) -> None:
        """Take note of whether the loss is allowed at `threshold`."""
        tried = 1.0 if self.threshold == torch.inf else (self._low + self._high) / 2
        self._low, self._high = (tried, self._high) if is_allowed else (self._low, tried)
        self._left -= 1
        self.threshold = self._at(self._low if self.is_over else (self._low + self._high) / 2)

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
        scores, layers_N = exiting.scores(batch["inputs"], batch.get("documents"), batch.get("lengths"))
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
    """Layers that generated tokens have run."""

    num_layers: int = 0
    num_tokens: int = 0

    def add(self, layers: int) -> None:
        self.num_layers += layers
        self.num_tokens += 1

    @property
    def mean(self) -> float | None:
        return self.num_layers / self.num_tokens if self.num_tokens else None

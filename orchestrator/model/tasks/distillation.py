"""Distillation: beside the task's own loss, a student learns to predict what a teacher predicts (Hinton et al.,
arXiv:1503.02531, section 2).

Of each target token the loss is (1 - alpha) * cross-entropy + alpha * T² * KL(teacher || student), where both
distributions have the temperature T; T² keeps the size of the gradients. With `hidden_weight` the distance of the final
hidden states is added, 1 - their cosine (as DistilBERT does, arXiv:1910.01108, section 2).

The teacher isn't training state: every rank has the whole of it, without gradients, and runs it on its own
micro-batches, or its predictions were computed once and come with the rows. Logits of both models exist for a chunk of
tokens at a time.

Shape legend: N = tokens, C = tokens of a chunk, V = vocabulary, K = tokens that were kept of a prediction.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.model.base import TokenScores, TrainableModel
from orchestrator.model.loss import IGNORED, MIN_CHUNK
from orchestrator.model.task import Batch, Loss, Row, Task
from orchestrator.model.tasks.exit_losses import metrics_of, names_of
from orchestrator.spec.distill import LOGITS_HELD, PREDICTION, DistillSpec
from orchestrator.spec.exits import ExitsSpec

CROSS_ENTROPY, DIVERGENCE, HIDDEN_DISTANCE = "cross_entropy", "teacher_divergence", "hidden_distance"


class Distillation:
    """A task of next tokens that is learned from a teacher too (`orchestrator.model.task.Task`). Validation shows the
    task's own loss, which can be compared with that of any other run.

    Args:
        task: whose rows and targets these are.
        teacher: a whole model. None: its predictions come with the rows (`orchestrator.data.logit_store`).
        exits: of the student, which learn from the teacher as its last layer does.
    """

    needs_reference = False

    def __init__(
        self, task: Task, teacher: TrainableModel | None, spec: DistillSpec, exits: ExitsSpec | None = None
    ) -> None:
        self._task, self._spec, self._exits = task, spec, exits
        self._teacher = None if teacher is None else teacher.eval()
        hidden = (HIDDEN_DISTANCE,) if spec.hidden_weight else ()
        self.metrics: tuple[str, ...] = (CROSS_ENTROPY, DIVERGENCE, *names_of(exits), *hidden)

    def collate(self, rows: Sequence[Row], rng: np.random.Generator) -> Mapping[str, NDArray[np.generic]]:
        """As the task collates them."""
        return self._task.collate(rows, rng)

    def loss(self, model: TrainableModel, batch: Batch) -> Loss:
        """Sum over the targets that count, in nats. Arguments as of `LanguageModeling.loss`."""
        tokens = batch["inputs"], batch.get("documents"), batch.get("lengths")
        student = model.scores(*tokens)
        scores_of_teacher: TokenScores | None = None
        if self._teacher is not None:
            with torch.no_grad():
                scores_of_teacher = self._teacher.scores(*tokens)
        teacher: TeacherDistribution = (
            FullDistribution(scores_of_teacher, self._spec.temperature) if scores_of_teacher else _kept(student, batch)
        )
        targets_N = student.of_tokens(batch["targets"])
        loss = DistillationLoss(targets_N, teacher, self._spec.temperature, self._spec.alpha)
        total, (sums_S, *sums_of_exits) = student.joint_loss(
            loss, () if self._exits is None else self._exits.loss_weights
        )
        weight = (targets_N != IGNORED).sum().float()
        metrics = {CROSS_ENTROPY: (sums_S[1], weight), DIVERGENCE: (sums_S[2], weight)}
        metrics |= metrics_of(self._exits, [sums_S[1] for sums_S in sums_of_exits], weight)
        if scores_of_teacher is not None and self._spec.hidden_weight:
            cosine_N = F.cosine_similarity(student.x_ND.float(), scores_of_teacher.x_ND.float(), dim=-1)
            distance = ((1.0 - cosine_N) * (targets_N != IGNORED)).sum()
            total = total + self._spec.hidden_weight * distance
            metrics[HIDDEN_DISTANCE] = (distance.detach(), weight)
        return Loss(total if model.training else sums_S[1], metrics=metrics)

    def report(self, means: Mapping[str, float]) -> dict[str, float]:
        """All means over the target tokens."""
        return dict(means)


class TeacherDistribution(Protocol):
    """What a teacher predicts for the tokens of a micro-batch."""

    def compare(self, log_student_CV: Tensor, here: slice) -> tuple[Tensor, Tensor]:
        """A student with these log-probabilities, at the same temperature, for some tokens.

        Returns:
            divergence_C1: KL(teacher || student) in nats.
            d_CV: its gradient with respect to the student's logits over the temperature.
        """
        ...


@dataclass(frozen=True)
class FullDistribution:
    """The distribution of a teacher that was run on the same tokens (`TeacherDistribution`)."""

    scores: TokenScores
    temperature: float

    def compare(self, log_student_CV: Tensor, here: slice) -> tuple[Tensor, Tensor]:
        log_teacher_CV = (self.scores.logits(here).float() / self.temperature).log_softmax(-1)
        teacher_CV = log_teacher_CV.exp()
        divergence_C1 = (teacher_CV * log_teacher_CV.sub_(log_student_CV)).sum(-1, keepdim=True)
        return divergence_C1, log_student_CV.exp().sub_(teacher_CV)


@dataclass(frozen=True)
class TopKDistribution:
    """A prediction of which the likeliest tokens were kept, and the probability of all others together
    (`TeacherDistribution`). Of these the student is asked for no more than their sum.

    Args:
        ids_NK: tokens.
        logs_NK: their log-probabilities at the temperature.
        rest_N: log-probability of all others.
    """

    ids_NK: Tensor
    logs_NK: Tensor
    rest_N: Tensor

    def compare(self, log_student_CV: Tensor, here: slice) -> tuple[Tensor, Tensor]:
        ids_CK, logs_CK, rest_C1 = self.ids_NK[here], self.logs_NK[here], self.rest_N[here][:, None]
        log_student_CK = log_student_CV.gather(1, ids_CK)
        log_others_C1 = log_student_CV.scatter(1, ids_CK, -torch.inf).logsumexp(-1, keepdim=True)
        teacher_CK = logs_CK.exp()
        divergence_C1 = (teacher_CK * (logs_CK - log_student_CK)).sum(-1, keepdim=True)
        divergence_C1 += rest_C1.exp() * (rest_C1 - log_others_C1)
        # The student minus a teacher whose rest is spread over the other tokens as the student's is.
        student_CV = log_student_CV.exp()
        d_CV = student_CV - (log_student_CV + (rest_C1 - log_others_C1)).exp_()
        return divergence_C1, d_CV.scatter_(1, ids_CK, student_CV.gather(1, ids_CK) - teacher_CK)


def _kept(student: TokenScores, batch: Batch) -> TopKDistribution:
    ids_NK, logs_NK, rest_N = (student.of_tokens(batch[name]) for name in PREDICTION)
    return TopKDistribution(ids_NK, logs_NK, rest_N)


def top_k_distribution(scores: TokenScores, top_k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """The K likeliest tokens (N, K) of a teacher, their log-probabilities (N, K) at the temperature, and that
    (N,) of all others together."""
    found = []
    for start in range(0, len(scores.x_ND), MIN_CHUNK):
        log_CV = (scores.logits(slice(start, start + MIN_CHUNK)).float() / temperature).log_softmax(-1)
        logs_CK, ids_CK = log_CV.topk(top_k, dim=-1)
        found.append((ids_CK, logs_CK, log_CV.scatter_(1, ids_CK, -torch.inf).logsumexp(-1)))
    ids, logs, rest = zip(*found, strict=True)
    return torch.cat(ids), torch.cat(logs), torch.cat(rest)


@dataclass(frozen=True)
class DistillationLoss:
    """Cross-entropy with token ids and divergence from a teacher, in nats (`orchestrator.model.loss.LogitLoss`). Sums:
    the loss, the cross-entropy, and KL(teacher || student) at the temperature.

    Args:
        targets_N: token ids, or `IGNORED`: these have no loss.
        teacher: its prediction for the same tokens.
    """

    targets_N: Tensor
    teacher: TeacherDistribution
    temperature: float
    alpha: float
    num_sums: int = 3
    num_held: int = LOGITS_HELD

    def __call__(self, logits_CV: Tensor, here: slice, wants_gradient: bool) -> tuple[Tensor, Tensor | None]:
        targets_C, temperature = self.targets_N[here], self.temperature
        counted_C1 = (targets_C != IGNORED)[:, None]
        index_C1 = targets_C.clamp_min(0)[:, None]
        log_student_CV = logits_CV.log_softmax(-1)
        log_at_temperature_CV = log_student_CV if temperature == 1.0 else (logits_CV / temperature).log_softmax(-1)
        divergence_C1, d_at_temperature_CV = self.teacher.compare(log_at_temperature_CV, here)
        cross_entropy = (-log_student_CV.gather(1, index_C1) * counted_C1).sum()
        divergence = (divergence_C1 * counted_C1).sum()
        total = (1.0 - self.alpha) * cross_entropy + self.alpha * temperature**2 * divergence
        sums_S = torch.stack((total, cross_entropy, divergence))
        if not wants_gradient:
            return sums_S, None
        # Of the cross-entropy: softmax minus one at the target. Of T² times the divergence: T times its gradient with
        # respect to logits over T.
        d_CV = log_student_CV.exp_()
        d_CV.scatter_add_(1, index_C1, -torch.ones_like(d_CV[:, :1]))
        d_CV.mul_(1.0 - self.alpha).add_(d_at_temperature_CV, alpha=self.alpha * temperature)
        return sums_S, d_CV.mul_(counted_C1)

"""Distillation: beside the task's own loss, a student learns to predict what a teacher predicts (Hinton et al.,
arXiv:1503.02531, section 2).

Of each target token the loss is (1 - alpha) * cross-entropy + alpha * T² * KL(teacher || student), where both
distributions have the temperature T; T² keeps the size of the gradients. With `hidden_weight` the distance of the final
hidden states is added, 1 - their cosine (as DistilBERT does, arXiv:1910.01108, section 3).

The teacher isn't training state: every rank has the whole of it, without gradients, and runs it on its own
micro-batches. Logits of both models exist for a chunk of tokens at a time.

Shape legend: N = tokens, C = tokens of a chunk, V = vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.model.base import TokenScores, TrainableModel
from orchestrator.model.loss import IGNORED
from orchestrator.model.task import Batch, Loss, Row, Task
from orchestrator.spec.distill import DistillSpec

CROSS_ENTROPY, DIVERGENCE, HIDDEN_DISTANCE = "cross_entropy", "teacher_divergence", "hidden_distance"


class Distillation:
    """A task of next tokens that is learned from a teacher too (`orchestrator.model.task.Task`). Validation shows the
    task's own loss, which can be compared with that of any other run.

    Args:
        task: whose rows and targets these are.
        teacher: a whole model.
    """

    needs_reference = False

    def __init__(self, task: Task, teacher: TrainableModel, spec: DistillSpec) -> None:
        self._task, self._teacher, self._spec = task, teacher.eval(), spec
        hidden = (HIDDEN_DISTANCE,) if spec.hidden_weight else ()
        self.metrics: tuple[str, ...] = (CROSS_ENTROPY, DIVERGENCE, *hidden)

    def collate(self, rows: Sequence[Row], rng: np.random.Generator) -> Mapping[str, NDArray[np.generic]]:
        """As the task collates them."""
        return self._task.collate(rows, rng)

    def loss(self, model: TrainableModel, batch: Batch) -> Loss:
        """Sum over the targets that count, in nats. Arguments as of `LanguageModeling.loss`."""
        tokens = batch["inputs"], batch.get("documents"), batch.get("lengths")
        with torch.no_grad():
            taught = self._teacher.scores(*tokens)
        said = model.scores(*tokens)
        targets_N = said.of_tokens(batch["targets"])
        total, sums_S = said.loss(TaughtCrossEntropy(targets_N, taught, self._spec.temperature, self._spec.alpha))
        weight = (targets_N != IGNORED).sum().float()
        metrics = {CROSS_ENTROPY: (sums_S[1], weight), DIVERGENCE: (sums_S[2], weight)}
        if self._spec.hidden_weight:
            cosine_N = F.cosine_similarity(said.x_ND.float(), taught.x_ND.float(), dim=-1)
            distance = ((1.0 - cosine_N) * (targets_N != IGNORED)).sum()
            total = total + self._spec.hidden_weight * distance
            metrics[HIDDEN_DISTANCE] = (distance.detach(), weight)
        return Loss(total if model.training else sums_S[1], metrics=metrics)

    def report(self, means: Mapping[str, float]) -> dict[str, float]:
        """All means over the target tokens."""
        return dict(means)


@dataclass(frozen=True)
class TaughtCrossEntropy:
    """Cross-entropy with token ids and divergence from a teacher, in nats (`orchestrator.model.loss.LogitLoss`). Sums:
    the loss, the cross-entropy, and KL(teacher || student) at the temperature.

    Args:
        targets_N: token ids, or `IGNORED`: these have no loss.
        teacher: scores of the same tokens.
    """

    targets_N: Tensor
    teacher: TokenScores
    temperature: float
    alpha: float
    num_sums: int = 3

    def __call__(self, logits_CV: Tensor, here: slice, wants_gradient: bool) -> tuple[Tensor, Tensor | None]:
        targets_C, heat = self.targets_N[here], self.temperature
        counted_C1 = (targets_C != IGNORED)[:, None]
        index_C1 = targets_C.clamp_min(0)[:, None]
        log_teacher_CV = (self.teacher.logits(here).float() / heat).log_softmax(-1)
        teacher_CV = log_teacher_CV.exp()
        log_warm_CV = logits_CV if heat == 1.0 else logits_CV / heat
        log_warm_CV = log_warm_CV.log_softmax(-1)
        divergence_C1 = (teacher_CV * log_teacher_CV.sub_(log_warm_CV)).sum(-1, keepdim=True)
        log_student_CV = log_warm_CV.clone() if heat == 1.0 else logits_CV.log_softmax(-1)
        cross_entropy_C1 = -log_student_CV.gather(1, index_C1)
        cross_entropy = (cross_entropy_C1 * counted_C1).sum()
        divergence = (divergence_C1 * counted_C1).sum()
        total = (1.0 - self.alpha) * cross_entropy + self.alpha * heat**2 * divergence
        sums_S = torch.stack((total, cross_entropy, divergence))
        if not wants_gradient:
            return sums_S, None
        # Of the cross-entropy: softmax minus one at the target. Of T² times the divergence: T times the difference of
        # the distributions.
        d_CV = log_student_CV.exp_()
        d_CV.scatter_add_(1, index_C1, -torch.ones_like(d_CV[:, :1]))
        d_CV.mul_(1.0 - self.alpha).add_(log_warm_CV.exp_().sub_(teacher_CV), alpha=self.alpha * heat)
        return sums_S, d_CV.mul_(counted_C1)
